"""Weights that come with the package, weights on a store, and the card of an export."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import neurojepa
from neurojepa.config import load_config
from neurojepa.errors import DataError
from neurojepa.model_card import card, identity
from neurojepa.storage import read_bytes, write_bytes
from neurojepa.weights import SHIPPED, load, shipped
from neurojepa.weights import main as command
from tools import small_weights

FILES = ("model.safetensors", "pooling.safetensors", "seen.json")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The shipped weights in a folder of one's own."""
    return Path(shutil.copytree(SHIPPED / small_weights.NAME, tmp_path / "weights"))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", shipped())
def test_shipped_weights_open_by_name_are_small_and_say_what_they_are(name: str) -> None:
    folder = SHIPPED / name
    model = neurojepa.load(name, device="cpu")
    assert model.weights.places is not None and model.weights.seen
    files = {path.name for path in folder.iterdir()}
    assert files == {*FILES, "config.json", "README.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
    text = (folder / "README.md").read_text()
    assert text == card(record_of(folder))
    assert name.startswith("synthetic") and "synthetic people alone" in text
    for section in ("Data and splits", "Results", "Limits", "Licence"):
        assert f"## {section}\n" in text
    assert "random init" in text and "None yet" not in text and "license:" in text
    assert "://" not in json.dumps(record_of(folder)["config"])
    assert not [value for value in json.dumps(record_of(folder)["config"]).split('"')
                if value.startswith("/")]


def test_the_command_that_makes_them_has_their_recipe(tmp_path: Path) -> None:
    small_weights.write_recipe(tmp_path, "feed", steps=small_weights.STEPS,
                               rate=small_weights.RATE, seed=small_weights.SEED,
                               overrides=small_weights.RECIPE)
    made = load_config(str(tmp_path / "recipe.yaml"), [])
    theirs = load(small_weights.NAME).config
    assert theirs.model == made.model and theirs.objective == made.objective
    assert theirs.optim == made.optim and theirs.train == made.train
    assert record_of(SHIPPED / small_weights.NAME)["step"] == small_weights.STEPS


def test_weights_open_from_a_store_and_every_file_is_checked(copied: Path) -> None:
    uri = f"memory://{uuid.uuid4().hex}/weights"
    for path in copied.iterdir():
        write_bytes(f"{uri}/{path.name}", path.read_bytes())
    there, here = load(uri), load(str(copied))
    assert all(torch.equal(tensor, here.model.state_dict()[name])
               for name, tensor in there.model.state_dict().items())
    assert there.seen == here.seen and there.grid == here.grid
    for name in FILES:
        whole = read_bytes(f"{uri}/{name}")
        write_bytes(f"{uri}/{name}", whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DataError, match=rf"{uri}/{name}: does not match the sha256"):
            load(uri)
        write_bytes(f"{uri}/{name}", whole)


def test_a_folder_counts_before_a_shipped_name(copied: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = record_of(copied) | {"step": 7}
    copied.rename(tmp_path / small_weights.NAME)
    assert load(small_weights.NAME).step == small_weights.STEPS
    (tmp_path / small_weights.NAME / "config.json").write_text(json.dumps(record))
    assert load(small_weights.NAME).step == 7


@pytest.mark.parametrize("name", ["synthetic-huge", "runs/none"])
def test_weights_that_are_not_there_name_those_that_are_shipped(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: no exported weights .*{small_weights.NAME}"):
        load(name)


@pytest.mark.parametrize("text", ['{"model_type": "vit"}', "[1]", "no JSON"])
def test_weights_of_something_else_are_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"no exported weights here .*config.json: is not of an"):
        load(str(copied))


# ---- the card ------------------------------------------------------------------------------------

def results(folder: Path, record: dict[str, Any], **changed: Any) -> Path:
    found = {"step": record["step"], "feed": record["feed"], "modality": "T1w", "cohort": None,
             "results": {"neurojepa": {"age": {"num_train_people": 9, "r2": {
                 "value": 0.25, "low": 0.125, "high": 0.5, "num_people": 12}}}}}
    file = folder / "results.json"
    file.write_text(json.dumps(found | changed))
    return file


def test_a_card_is_completed_bit_by_bit(copied: Path, tmp_path: Path) -> None:
    record = {name: value for name, value in record_of(copied).items()
              if name not in ("results", "licence", "about")}
    (copied / "config.json").write_text(json.dumps(record))
    assert command(["card", str(copied)]) == 0
    bare = (copied / "README.md").read_text()
    assert "None yet" in bare and "license:" not in bare and "Not stated" in bare
    (tmp_path / "about.md").write_text("Of **no** one.\n")
    command(["card", str(copied), "--results", str(results(tmp_path, record))])
    command(["card", str(copied), "--results", str(results(tmp_path, record,
                                                           identity=identity(record)))])
    command(["card", str(copied), "--licence", "cc-by-4.0", "--about", str(tmp_path / "about.md")])
    text = (copied / "README.md").read_text()
    assert "| age | r2 | neurojepa | 0.250 | 0.125 to 0.500 | 12 |" in text
    assert '\nlicense: "cc-by-4.0"\n' in text and "\n\nOf **no** one.\n\n" in text
    assert load(str(copied)).step == record["step"]


OWN = identity(json.loads((SHIPPED / small_weights.NAME / "config.json").read_text()))


@pytest.mark.parametrize(("changed", "words"), [
    ({"step": 3}, "is of step 3, the weights of"), ({"feed": "f"}, "is of feed f"),
    ({"results": None}, "is not a results.json of probe --feed"),
    ({"identity": {"model": "other"}}, "but of other weights: model, pooling differ; probe these"),
    ({"identity": {}}, "but of other weights: model"),
    ({"identity": OWN | {"code": "a"}}, "but of other weights: code differ")])
def test_results_of_something_else_are_refused(copied: Path, tmp_path: Path,
                                               changed: dict[str, Any], words: str) -> None:
    before = (copied / "config.json").read_bytes()
    file = results(tmp_path, record_of(copied), **changed)
    with pytest.raises(DataError, match=rf"results.json: .*{words}"):
        command(["card", str(copied), "--results", str(file)])
    assert (copied / "config.json").read_bytes() == before


def test_a_text_that_is_no_text_is_refused(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "about.md").write_bytes("Köpfe".encode("latin-1"))
    before = (copied / "README.md").read_bytes()
    with pytest.raises(DataError, match=r"about.md: is no text in UTF-8"):
        command(["card", str(copied), "--about", str(tmp_path / "about.md")])
    assert (copied / "README.md").read_bytes() == before


def test_the_card_of_weights_that_learnt_more_says_what_for() -> None:
    record = record_of(SHIPPED / small_weights.NAME)
    text = card(record | {"purpose": "- tells dx"})
    assert text.index("## Purpose\n\n- tells dx\n") < text.index("\n\nOf the pretraining. Feed ")
    assert "Of the pretraining" not in card(record) and "Purpose" not in card(record)


def test_a_folder_without_weights_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config.json: not found"):
        command(["card", str(tmp_path)])
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match=r"is not an export's config.json"):
        command(["card", str(tmp_path)])
