"""How a command ends, and what it says where a package is missing."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib

import fsspec
import pytest

from neurojepa.errors import EXTRAS, DataError, run_command
from neurojepa.storage import open_store
from tests.helpers import ROOT


def test_a_pipe_that_breaks_elsewhere_is_not_taken_for_a_reader_who_left() -> None:
    def main() -> int:
        raise BrokenPipeError("to a worker")

    with pytest.raises(BrokenPipeError, match="to a worker"):
        run_command(main)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("package", EXTRAS)
def test_a_package_of_an_extra_that_is_missing_is_told_in_a_line(
        package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: importlib.import_module(f"{package}.part").run())
    assert ended.value.code == 2
    assert capsys.readouterr().err == (f"error: this needs {package}, which is not installed; run: "
                                       f"pip install 'neurojepa[{EXTRAS[package]}]'\n")


def test_a_package_that_is_no_extra_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        run_command(lambda: importlib.import_module("numpy").zeros(1))


def test_the_extras_are_those_of_the_project() -> None:
    extras = {name: {re.split(r"[\[<>=~]", each)[0] for each in needs}
              for name, needs in PROJECT["optional-dependencies"].items()}
    base = {re.split(r"[\[<>=~]", each)[0] for each in PROJECT["dependencies"]}
    assert all(package in extras[extra] for package, extra in EXTRAS.items())
    programs = {"py-spy"}  # run, never imported
    own = set.union(*(extras[name] for name in ("train", "s3", "hub", "segment")))
    assert own == EXTRAS.keys() | programs
    assert not base & EXTRAS.keys()


@pytest.mark.parametrize(("uri", "package", "extra"), [
    ("s3://bucket/weights", "s3fs", "s3"), ("hf://people/weights", "huggingface_hub", "hub")])
def test_a_store_whose_driver_is_missing_names_its_extra(
        uri: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    loaded = sys.modules[fsspec.get_filesystem_class.__module__]._registry  # drivers so far
    monkeypatch.delitem(loaded, uri.partition(":")[0], raising=False)
    with pytest.raises(DataError, match=rf"{uri}: .*run: pip install 'neurojepa\[{extra}\]'"):
        open_store(uri)
