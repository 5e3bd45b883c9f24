"""Objects and folders on a local disk, in memory and in an object store: the same answers."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from neurojepa.errors import DataError
from neurojepa.storage import (
    append_rows,
    exists,
    join,
    list_names,
    open_store,
    read_bytes,
    read_if_there,
    read_rows,
    remove,
    walk,
    write_bytes,
    write_parts,
)
from tests.helpers.odd_names import ODD_NAMES


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3').uri}/{uuid.uuid4().hex}"
    return str(tmp_path / "a") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_a_folder_fills_and_empties(folder: str) -> None:
    assert not exists(folder) and list_names(folder) == [] and walk(folder) == []
    assert read_if_there(join(folder, "x")) is None
    remove(folder)  # nothing to do is no error
    for name in ("b/2", "b/1", "x"):
        write_bytes(join(folder, name), name.encode())
    assert exists(folder) and exists(join(folder, "x")) and not exists(join(folder, "y"))
    assert list_names(folder) == ["b", "x"] and list_names(join(folder, "b")) == ["1", "2"]
    assert walk(folder) == ["b/1", "b/2", "x"]
    assert walk(f"{folder}/") == walk(folder)
    remove(join(folder, "x"))
    remove(join(folder, "x"))
    remove(join(folder, "b"))
    assert walk(folder) == []


def test_the_end_of_an_object_can_be_read_alone(folder: str) -> None:
    write_bytes(join(folder, "x"), b"0123456789")
    assert read_if_there(join(folder, "x"), 3) == b"789"
    assert read_if_there(join(folder, "x"), 10) == b"0123456789"
    assert read_if_there(join(folder, "x"), 99) == b"0123456789"
    write_bytes(join(folder, "x"), b"")
    assert read_if_there(join(folder, "x"), 3) == b""


def test_what_is_missing_or_unknown_is_named(folder: str) -> None:
    with pytest.raises(DataError, match=f"{join(folder, 'x')}: not found"):
        read_bytes(join(folder, "x"))
    with pytest.raises(DataError, match="nowhere://x: cannot open this kind of store"):
        open_store("nowhere://x")


def test_an_error_without_words_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: object, path: str, **options: object) -> bytes:
        raise TimeoutError

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", silent)
    with pytest.raises(DataError, match=r"memory://x: cannot be read \(TimeoutError\)"):
        read_bytes("memory://x")


def test_what_is_private_is_so_before_it_appears(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    file, before = tmp_path / "ids.csv", []
    file.write_text("others could read this one")
    replace = os.replace

    def looked_at(one: str, other: str) -> None:
        before.append(os.stat(one).st_mode & 0o777)
        replace(one, other)

    monkeypatch.setattr(os, "replace", looked_at)
    write_bytes(str(file), b"1", private=True)
    assert before == [0o600] and file.stat().st_mode & 0o777 == 0o600


def test_a_store_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/file/x: cannot be written"):
        write_bytes(f"{tmp_path}/file/x", b"")
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read .Is a directory.; check the "
                                        "path, its permissions"):
        read_bytes(str(tmp_path))
    assert read_if_there(f"{tmp_path}/file/x") is None  # below a file nothing is


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_a_path_is_a_name_and_no_pattern(folder: str, name: str) -> None:
    """What its pattern would match lies beside it, and is never touched."""
    if folder.startswith("memory:") and "::" in name:
        pytest.skip("the store in memory itself takes :: for a chain")
    matched = {"MPRAGE [ND]": "MPRAGE N", "a[0-9]": "a1", "T1 *GRE*": "T1 xGREx", "why?": "whyx"}
    beside = join(folder, matched.get(name, "other"), "1")
    write_bytes(beside, b"beside")
    place = join(folder, name)
    write_bytes(join(place, name), b"0123")
    write_parts(join(place, "parts"), [b"01", b"23"])
    append_rows(join(place, "rows.jsonl"), [{"a": 1}])
    append_rows(join(place, "rows.jsonl"), [{"a": 2}])
    assert exists(place) and exists(join(place, name)) and not exists(join(place, "no"))
    assert read_bytes(join(place, name)) == read_bytes(join(place, "parts")) == b"0123"
    assert read_if_there(join(place, name), 2) == b"23"
    assert read_rows(join(place, "rows.jsonl")) == [{"a": 1}, {"a": 2}]
    assert list_names(place) == sorted(["parts", "rows.jsonl", name])
    assert name in list_names(folder) and walk(place) == list_names(place)
    remove(join(place, name))
    assert list_names(place) == ["parts", "rows.jsonl"]
    remove(place)
    assert walk(folder) == [beside[len(folder) + 1:]]


def test_a_key_that_the_driver_would_cut_is_refused(s3) -> None:
    with pytest.raises(DataError, match="rename it"):
        write_bytes(f"{s3.uri}/x?versionId=1", b"1")
