"""Raw bytes: packed in any way, followed by anything; headers whose voxels begin elsewhere."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zstandard

from data_prep.scan import ScanError
from data_prep.volumes.reading.packed import unpack, unpack_head
from data_prep.volumes.reading.volume import read_scan

PACK = {"gzip": gzip.compress, "bzip2": bz2.compress, "zstd": zstandard.compress}
TRAILS = {"text": b"\n<html>upload failed</html>", "zeros": bytes(512), "one": b"x"}
CONTENT = np.random.default_rng(0).integers(0, 5, 200_000).astype(np.uint8).tobytes()


def head(affine: np.ndarray | None = None) -> nib.Nifti1Image:
    """A ball in a box of 30 voxels of 4 mm."""
    x = np.indices((30, 32, 34)) - 15
    data = np.where((x**2).sum(0) < 100, 100 + x[0], 0).astype(np.int16)
    return nib.Nifti1Image(data, np.diag([4.0, 4, 4, 1]) if affine is None else affine)


def refused(path: Path) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_scan(str(path))
    assert path.name in str(caught.value)
    return caught.value


@pytest.mark.parametrize("kind", PACK)
def test_streams_are_unpacked_within_the_limit(kind: str) -> None:
    packed = PACK[kind](CONTENT)
    assert unpack(packed, 1 << 20, "x") == (CONTENT, False)
    assert unpack(packed, 1000, "x") == (CONTENT[:1000], False)
    assert unpack_head(packed[:150_000], 600, "x")[:500] == CONTENT[:500]
    two = PACK[kind](CONTENT[:777]) + PACK[kind](CONTENT[777:])  # as parallel packers write
    assert unpack(two, 1 << 20, "x") == (CONTENT, False)
    assert unpack(CONTENT, 10, "x") == (CONTENT, False)  # plain bytes


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("trail", TRAILS)
def test_what_follows_a_whole_stream_does_no_harm(tmp_path: Path, kind: str, trail: str) -> None:
    raw = head().to_bytes()
    path = tmp_path / "sub-1_T1w.nii.gz"  # whatever its ending says
    path.write_bytes(PACK[kind](raw) + TRAILS[trail])
    (tmp_path / "plain.nii").write_bytes(raw)
    volume, plain = read_scan(str(path)), read_scan(str(tmp_path / "plain.nii"))
    assert volume.scan_id == plain.scan_id and plain.flags == []
    assert volume.flags == [] and volume.notes == (
        [] if trail == "zeros" else ["trailing_bytes"])


@pytest.mark.parametrize("kind", PACK)
def test_a_cut_or_changed_stream_is_damaged(tmp_path: Path, kind: str) -> None:
    packed = bytearray(PACK[kind](head().to_bytes()))
    path = tmp_path / "x.nii.gz"
    path.write_bytes(packed[:len(packed) // 2])
    assert refused(path).code == "truncated"
    packed[len(packed) // 2] ^= 255
    path.write_bytes(packed)
    if kind != "zstd":  # carries no checksum as written here
        assert refused(path).code in ("truncated", "not_nifti")


def test_a_second_stream_that_is_cut_is_damage(tmp_path: Path) -> None:
    raw = head().to_bytes()
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(raw[:20_000]) + gzip.compress(raw[20_000:])[:-40])
    assert refused(path).code == "truncated"


@pytest.mark.parametrize(("single", "offset"), [
    (nib.Nifti1Image, 0), (nib.Nifti1Image, 348), (nib.Nifti1Image, 16), (nib.Nifti2Image, 0),
    (nib.Nifti1Image, -1)])
def test_voxels_do_not_begin_inside_the_header(tmp_path: Path, single: type, offset: int) -> None:
    good = head()
    image = single(np.asarray(good.dataobj), good.affine)
    raw = bytearray(image.to_bytes())
    header = type(image.header)(bytes(raw[:image.header.sizeof_hdr]))
    header["vox_offset"] = offset
    raw[:len(header.binaryblock)] = header.binaryblock
    (tmp_path / "x.nii").write_bytes(raw)
    volume = read_scan(str(tmp_path / "x.nii"))
    assert volume.flags == ["voxel_offset_mended"]
    np.testing.assert_array_equal(volume.data, np.asarray(good.dataobj))


def test_voxels_behind_an_extension_or_in_a_pair_stay_where_they_are(tmp_path: Path) -> None:
    image = head()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100))
    nib.save(image, tmp_path / "x.nii")
    nib.save(nib.Nifti1Pair(np.asarray(image.dataobj), image.affine), tmp_path / "y.hdr")
    for name in ("x.nii", "y.hdr", "y.img"):
        volume = read_scan(str(tmp_path / name))
        assert volume.flags == [] and (volume.data == np.asarray(image.dataobj)).all()


@pytest.mark.parametrize(("header", "voxels"), [("HDR", "IMG"), ("hdr", "IMG"), ("hdr", "img.gz"),
                                                ("hdr.gz", "img.gz"), ("hdr.gz", "img")])
def test_pairs_in_any_case_and_packing(tmp_path: Path, header: str, voxels: str) -> None:
    image = head()
    nib.save(nib.Nifti1Pair(np.asarray(image.dataobj), image.affine), tmp_path / "y.hdr")
    for ending, plain in ((header, "y.hdr"), (voxels, "y.img")):
        data = (tmp_path / plain).read_bytes()
        (tmp_path / f"z [1].{ending}").write_bytes(
            gzip.compress(data) if ending.endswith("gz") else data)
    for ending in (header, voxels):
        volume = read_scan(str(tmp_path / f"z [1].{ending}"))
        assert (volume.data == np.asarray(image.dataobj)).all()
    (tmp_path / f"z [1].{voxels}").unlink()
    assert refused(tmp_path / f"z [1].{header}").code == "missing"


def test_mgh_packed_and_plain(tmp_path: Path) -> None:
    image = nib.MGHImage(np.asarray(head().dataobj).astype(np.float32), head().affine)
    raw = image.to_bytes()
    for name, data in (("a.mgh", raw), ("a.mgz", gzip.compress(raw)), ("b.mgz", raw),
                       ("c.mgh.gz", gzip.compress(raw) + b"text")):
        (tmp_path / name).write_bytes(data)
        assert (read_scan(str(tmp_path / name)).data == np.asarray(head().dataobj)).all()


def test_more_than_the_header_promises_is_flagged(tmp_path: Path) -> None:
    raw = bytearray(head().to_bytes())
    (tmp_path / "text.nii").write_bytes(raw + b"<html>")
    raw[42:44] = (29).to_bytes(2, "little")  # dim[1] was 30
    (tmp_path / "dim.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    for name in ("text.nii", "dim.nii.gz"):
        assert read_scan(str(tmp_path / name)).flags == ["surplus_bytes"]
    mgh = nib.MGHImage(np.asarray(head().dataobj), head().affine).to_bytes()
    for name, rest, flags in (("a.mgh", b"", []), ("b.mgh", b"\0\0\0\3" + b"x" * 50, []),
                              ("c.mgh", b"\0\7\0\7" * 50, ["surplus_bytes"])):
        (tmp_path / name).write_bytes(mgh + rest)
        assert read_scan(str(tmp_path / name)).flags == flags, name


@pytest.mark.parametrize("codes", [(-1, -1), (32767, 0), (0, 0), (6, -2)])
def test_codes_that_the_format_does_not_know_tell_no_orientation(tmp_path: Path,
                                                                 codes: tuple[int, int]) -> None:
    raw = bytearray(head().to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    header["sform_code"], header["qform_code"] = codes
    (tmp_path / "x.nii").write_bytes(header.binaryblock + raw[348:])
    assert refused(tmp_path / "x.nii").code == "unknown_orientation"
