"""Recipes by path and by name; the command that hands on to the tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.rundir import run_of_arguments
from neurojepa.config import load_config
from neurojepa.errors import ConfigError
from neurojepa.recipes import SHIPPED, read_recipe
from tests.helpers import ROOT

OVERRIDES = ["data.feed=f", "run.dir=r"]


def test_a_shipped_recipe_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SHIPPED.keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of that name is in nobody's way
    by_path = load_config(ROOT / "configs/demo.yaml", OVERRIDES)
    assert load_config("demo", OVERRIDES) == by_path
    run_dir, settings = run_of_arguments(["--config", "demo", *OVERRIDES])
    assert (run_dir.uri, settings["train.steps"]) == ("r", by_path.train.steps)


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("train: {steps: 3}\n")
    assert read_recipe("demo") == {"train": {"steps": 3}}


@pytest.mark.parametrize("name", ["dmeo", "configs/none.yaml"])
def test_what_is_no_recipe_is_refused_with_the_names_of_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: .*one of base, demo, jepa, large, paper"):
        read_recipe(name)


def test_a_recipe_must_be_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: expected a mapping"):
        read_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(("words", "shown"), [
    (["--help"], "    weights             verify, export"),
    (["probe", "--help"], "--labels"),
    (["weights", "export", "--help"], "--step")])
def test_one_command_leads_to_all_tasks(run_cli, words: list[str], shown: str) -> None:
    done = run_cli("-m", "neurojepa", *words)
    assert done.returncode == 0 and shown in done.stdout, done.stderr
