"""Objects and folders on a local disk, in memory and in an object store: the same answers."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from neurojepa.errors import DataError
from neurojepa.storage import (
    exists,
    join,
    list_names,
    open_store,
    read_bytes,
    read_if_there,
    remove,
    walk,
    write_bytes,
)


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


def test_a_store_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/file/x: cannot be written"):
        write_bytes(f"{tmp_path}/file/x", b"")
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read"):
        read_bytes(str(tmp_path))  # a folder
