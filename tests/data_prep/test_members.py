"""Archives: members by name without unpacking; what could harm or lie is refused by code."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep import members
from data_prep.members import first_member, list_members, read_member, read_members
from data_prep.scan import ScanError
from neurojepa.storage import write_bytes

CONTENT = {"T1/T1.nii.gz": bytes(range(256)) * 2000, "T1/T1.json": b"{}", "fMRI/leer.txt": b""}


def make_zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        packed.writestr("T1/", b"")
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def make_tar(files: dict[str, bytes], mode: str = "w:gz",
             *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as packed:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("./T1")
        folder.type = tarfile.DIRTYPE
        packed.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
        for info in extra:
            packed.addfile(info)
    return buffer.getvalue()


def refused(path: Path, data: bytes, member: str | None = None) -> str:
    """The code by which an archive (or one member) is refused; its message names the file."""
    path.write_bytes(data)
    with pytest.raises(ScanError) as caught:
        read_member(str(path), member, 1 << 20) if member else list_members(str(path))
    assert str(path) in str(caught.value)
    return caught.value.code


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "1234567_20252_2_0.zip"


@pytest.mark.parametrize("data", [
    make_zip(CONTENT), make_zip(CONTENT, zipfile.ZIP_STORED), make_tar(CONTENT),
    make_tar(CONTENT, "w:"), make_tar({f"./{name}": data for name, data in CONTENT.items()}),
], ids=["deflated", "stored", "tar.gz", "tar", "dotted"])
def test_lists_and_reads_the_members_whatever_the_file_is_called(path: Path, data: bytes):
    path.write_bytes(data)
    assert list_members(str(path)) == [{"name": name, "size": len(content)}
                                       for name, content in CONTENT.items()]
    for name, content in CONTENT.items():
        assert read_member(str(path), name, 1 << 20) == content
    folder = dict(read_members(str(path), lambda name: name.startswith("T1/"), 1 << 20))
    assert folder == {name: CONTENT[name] for name in ("T1/T1.nii.gz", "T1/T1.json")}
    with pytest.raises(ScanError, match=r"no member T1/T2\.nii\.gz") as caught:
        read_member(str(path), "T1/T2.nii.gz", 1 << 20)
    assert caught.value.code == "missing_member"


@pytest.mark.parametrize("name", ["../x.nii", "/etc/x.nii", "T1/../../x.nii", "T1\\x.nii",
                                  "C:x.nii"])
def test_names_that_leave_their_folder_are_refused(path: Path, name: str):
    assert refused(path, make_zip({"T1/T1.nii.gz": b"1", name: b"2"})) == "unsafe_archive"
    assert refused(path, make_tar({"T1/T1.nii.gz": b"1", name: b"2"})) == "unsafe_archive"
    # the good member is not read either: the archive is not what its cohort delivered
    assert refused(path, make_tar({name: b"2", "T1/T1.nii.gz": b"1"}),
                   "T1/T1.nii.gz") == "unsafe_archive"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
                                  tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_devices_and_sparse_files_are_refused(path: Path, kind: bytes):
    info = tarfile.TarInfo("T1/T1.nii.gz")
    info.type, info.linkname = kind, "/etc/passwd"
    assert refused(path, make_tar({}, "w:gz", info), "T1/T1.nii.gz") == "unsafe_archive"


def test_a_link_in_a_zip_is_refused(path: Path):
    info = zipfile.ZipInfo("T1/T1.nii.gz")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr(info, "/etc/passwd")
    assert refused(path, buffer.getvalue(), "T1/T1.nii.gz") == "unsafe_archive"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(path: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("T1/T1.nii.gz", b"one")
        packed.writestr("T1/T1.nii.gz", b"other")
    assert refused(path, buffer.getvalue()) == "unsafe_archive"
    twice = make_tar({"T1.nii": b"one", "./T1.nii": b"other"})
    assert refused(path, twice, "T1.nii") == "unsafe_archive"


def test_an_encrypted_zip_is_refused(path: Path):
    data = bytearray(make_zip(CONTENT))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(mark) + place] |= 1  # the flag of encryption
    assert refused(path, bytes(data)) == "encrypted"


def test_claims_are_judged_before_anything_is_unpacked(path: Path):
    path.write_bytes(make_zip(CONTENT))
    with pytest.raises(ScanError, match="claims 512000 bytes") as caught:
        read_member(str(path), "T1/T1.nii.gz", 511_999)
    assert caught.value.code == "too_large"
    data = bytearray(make_zip({"T1/T1.nii.gz": b"0" * 5000}))
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, 0xFFFFFF00)  # a bomb's claim
    assert refused(path, bytes(data)) == "too_large"
    info = tarfile.TarInfo("T1/T1.nii.gz")
    info.size = 1 << 44
    assert refused(path, gzip.compress(info.tobuf())) == "too_large"
    longname = tarfile.TarInfo("././@LongLink")  # read into memory by tarfile itself
    longname.type, longname.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    for pack in (bytes, gzip.compress):
        assert refused(path, pack(longname.tobuf(tarfile.GNU_FORMAT) + bytes(5120))) == "too_large"


def test_a_member_that_holds_more_than_it_claims_is_cut_off_and_refused(path: Path):
    data = bytearray(make_zip({"T1/T1.nii.gz": b"0" * 5000}))
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.rindex(mark) + place, 100)
    assert refused(path, bytes(data), "T1/T1.nii.gz") == "truncated"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("make", [make_zip, make_tar, lambda files: make_tar(files, "w:")])
def test_truncated_archives_are_refused_wherever_they_end(path: Path, make, share: float):
    data = make({"T1/T1.nii.gz": gzip.compress(bytes(range(256)) * 100), "T1/b": b"b" * 35000})
    assert refused(path, data[:int(len(data) * share)]) == "truncated"


def test_a_flipped_bit_is_found(path: Path):
    for data in (make_zip(CONTENT, zipfile.ZIP_STORED), make_tar(CONTENT)):
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 4
        assert refused(path, bytes(damaged), "T1/T1.nii.gz") == "truncated"


@pytest.mark.parametrize("data, code", [
    (b"", "empty"), (b"<html>404</html>", "not_archive"),
    (b"version https://git-lfs.github.com/spec/v1\n", "not_downloaded"),
    (b"PK\x03\x04 and no more", "truncated"),
])
def test_what_is_no_archive_is_named(path: Path, data: bytes, code: str):
    assert refused(path, data) == code
    path.unlink()
    with pytest.raises(ScanError) as caught:
        list_members(str(path))
    assert caught.value.code == "missing"


def test_the_first_wanted_member_of_a_tar_needs_only_its_beginning(path: Path):
    noise = np.random.default_rng(0).bytes(1 << 20)
    path.write_bytes(make_tar({"a.json": b"{}", "T1w.nii": noise, "rest": noise})[:1 << 19])
    assert first_member(str(path), lambda name: name.endswith(".nii")) == "T1w.nii"
    path.write_bytes(make_tar(CONTENT))
    assert first_member(str(path), lambda name: name.endswith(".mgz")) is None


def test_a_large_zip_on_s3_is_listed_by_its_end(s3, monkeypatch: pytest.MonkeyPatch):
    uri = f"{s3.uri}/1234567_20252_2_0.zip"
    content = bytes(3_000_000)
    write_bytes(uri, make_zip({"T1/big.nii": content, "T1/T1.nii": b"scan"}, zipfile.ZIP_STORED))
    moved = []
    store, _ = members.open_store(uri)
    fetch = store.cat_file

    def counted(*args, **kwargs):
        moved.append(fetch(*args, **kwargs))
        return moved[-1]

    monkeypatch.setattr(store, "cat_file", counted)
    assert [member["size"] for member in list_members(uri)] == [3_000_000, 4]
    assert len(moved) == 1 and len(moved[0]) <= 1 << 16
    assert read_member(uri, "T1/T1.nii", 10) == b"scan"
    assert read_member(uri, "T1/big.nii", 1 << 22) == content
