"""Export, embedding and probes: what is loaded is what was trained, and leaks are refused."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from neurojepa.config import dump_config
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.api import Model, seen_of
from neurojepa.downstream.embed import Embeddings, embed, select_rows, views_of
from neurojepa.downstream.probe import probe
from neurojepa.downstream.table import read_embeddings
from neurojepa.downstream.volumes import read_volumes
from neurojepa.errors import ConfigError, DataError, NeurojepaError
from neurojepa.feed.format import open_feed
from neurojepa.train.checkpoint import latest_step, open_checkpoint
from neurojepa.weights import export, hashed, load, untrained
from neurojepa.weights import main as weights_command
from tests.helpers.feeds import GRID, Describe, relabel, tiny_config, write_feed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_cli) -> Path:
    """A folder with a feed (splits and labels), a finished run and its exported weights."""
    root = tmp_path_factory.mktemp("downstream")
    write_feed(str(root / "raw"))
    relabel(root / "raw", root / "feed", by_size(root / "raw"))
    config = tiny_config(str(root / "feed"), root / "run", steps=4)
    recipe = root / "recipe.yaml"
    recipe.write_text(dump_config(config))
    result = run_cli("-m", "neurojepa.pretrain", "--config", str(recipe))
    assert result.returncode == 0, result.stderr
    export(str(root / "run"), str(root / "weights"), compare_with=open_feed(str(root / "feed")))
    return root


def by_size(feed: Path) -> Describe:
    """Two thirds of the people train, one third tests; size is a number, kind a name."""
    middle = np.median(open_feed(str(feed)).index["num_foreground"].to_numpy())

    def describe(number: int, row: dict) -> tuple[str, list[tuple[str, str, str]]]:
        size = row["num_foreground"]
        return ("test" if number % 3 == 2 else "train",
                [("1", "size", str(size)), ("", "kind", "large" if size > middle else "small")])

    return describe


def test_an_export_holds_the_trained_values_and_loads_strictly(trained: Path) -> None:
    weights = load(str(trained / "weights"))
    run = str(trained / "run")
    step = latest_step(run)
    checkpoint = open_checkpoint(run, step)
    masters, averages = checkpoint.parameters("master"), checkpoint.parameters("ema")
    state = weights.model.state_dict()
    for name, value in masters.items():
        assert torch.equal(state[name], value), name
    for name, value in averages.items():
        assert torch.equal(state["target." + name.removeprefix("encoder.")], value), name
    fresh = untrained(weights.config, weights.grid).model.state_dict()
    moved = [name for name in masters if not torch.equal(state[name], fresh[name])]
    assert len(moved) == len(masters) and weights.step == step == 4
    assert weights.grid == GRID


def test_an_embedding_does_not_depend_on_what_is_embedded_beside_it(trained: Path) -> None:
    weights, feed = load(str(trained / "weights")), open_feed(str(trained / "feed"))
    rows = select_rows(feed, None, None)
    together = embed(weights.model, weights.config, feed, rows, weights.places)
    apart = embed(weights.model, weights.config, feed, rows[:2:-1], weights.places)
    assert together.values.shape[0] == 24 and np.isfinite(together.values).all()
    assert np.array_equal(together.values[:2:-1], apart.values)  # to the bit
    assert np.ptp(together.values, axis=0).max() > 1e-3  # scans differ
    # as fitted on the feed, which is the one of the run
    assert np.array_equal(together.values, embed(weights.model, weights.config, feed, rows).values)


def test_all_brain_is_seen_whatever_the_budget_of_training(trained: Path) -> None:
    weights, feed = load(str(trained / "weights")), open_feed(str(trained / "feed"))
    budget = weights.config.model.token_budget
    rows = select_rows(feed, None, None)
    kept, brain = [], []
    for views, row in zip(views_of(weights.model, weights.config, feed, rows), rows, strict=True):
        kept.append(float(views.foreground_BN.sum()) * 6**3)
        brain.append(feed.index["num_foreground"][int(row)].as_py())
        assert len(views.tokens_BNP) == 1 and views.tokens_BNP.shape[1] >= budget
    assert np.allclose(kept, brain)
    cut = [float(views.foreground_BN[b].sum()) * 6**3
           for views in views_of(weights.model, weights.config, feed, rows, batch_size=8)
           for b in range(8)]
    assert min(np.array(cut) / brain) < 0.95  # as training sees them


def test_the_card_of_an_export_counts_its_data_and_tells_no_paths(trained: Path) -> None:
    text = (trained / "weights" / "README.md").read_text()
    index = open_feed(str(trained / "feed")).index
    for split in ("train", "test"):
        rows = index.filter(np.array(index["split"].to_pylist()) == split)
        people = len(set(rows["participant"].to_pylist()))
        assert f"| {split} | {people} | " in text
        for name, number in Counter(rows["modality"].to_pylist()).items():
            assert re.search(rf"\| {split} \| .*\b{number} {name}\b", text)
    assert "## Limits" in text and "## Licence" in text
    assert str(trained) not in text + (trained / "weights" / "config.json").read_text()


def test_an_export_names_an_atlas_without_its_folder(trained: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(trained / "run")
    checkpoint = open_checkpoint(run, latest_step(run))
    objective = checkpoint.manifest["config"]["objective"]
    objective["masks"]["region_share"], objective["regions"] = 0.5, "/home/me/atlas.nii.gz"
    monkeypatch.setattr("neurojepa.train.checkpoint.open_checkpoint", lambda *_: checkpoint)
    export(run, str(tmp_path))
    assert "/home" not in (tmp_path / "config.json").read_text()
    assert load(str(tmp_path)).config.objective.regions == "atlas.nii.gz"


def test_weights_without_pooling_open_and_are_compared_with_the_feed(trained: Path,
                                                                      tmp_path: Path) -> None:
    export(str(trained / "run"), str(tmp_path))
    assert load(str(tmp_path)).places is None and not (tmp_path / "pooling.safetensors").exists()
    assert load(str(trained / "weights")).places is not None
    (tmp_path / "moved").mkdir()
    assert weights_command(["export", str(trained / "run"), "--out", str(tmp_path / "moved"),
                            "--feed", str(trained / "feed")]) == 0
    assert (tmp_path / "moved/pooling.safetensors").read_bytes() == (
        trained / "weights/pooling.safetensors").read_bytes()
    data = bytearray((tmp_path / "moved/pooling.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "moved/pooling.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=r"pooling.safetensors: does not match the sha256"):
        load(str(tmp_path / "moved"))


def test_who_was_in_the_pretraining_is_known_by_person_and_by_scan(trained: Path) -> None:
    weights = load(str(trained / "weights"))
    found = Model(weights, "W", "cpu").embed(str(trained / "feed")).table
    split = np.array(found["split"].to_pylist())
    assert (np.array(found["seen"].to_pylist()) == (split == "train")).all() and len(split) == 24
    text = (trained / "weights/seen.json").read_text()
    assert len(json.loads(text)) == 32  # 16 people of one scan each
    assert not any(name in text for name in found["scan_id"].to_pylist())  # hashes alone
    under_another_key = hashed(found["scan_id"][int(np.flatnonzero(split == "train")[0])].as_py())
    assert under_another_key in weights.seen  # a scan is known whatever its person is called
    export(str(trained / "run"), str(trained / "bare"))
    bare = load(str(trained / "bare"))
    assert bare.seen is None  # not known, which is not nobody
    table = Model(bare, "W", "cpu").embed(str(trained / "feed")).table
    assert table["seen"].null_count == table.num_rows


def test_who_taught_by_one_scan_is_seen_in_all_of_them() -> None:
    people, scans = ["p", "p", "q", "r"], ["p1", "p2", "q1", "r1"]
    assert seen_of({hashed("p2"), hashed("r")}, people, scans) == [True, True, False, True]
    assert seen_of(set(), people, scans) == [False] * 4
    assert seen_of(None, people, scans) == [None] * 4


def test_the_probe_command_writes_scores_of_both_models(trained: Path) -> None:
    out = trained / "probe"
    assert downstream(["probe", "--weights", str(trained / "weights"), "--feed",
                       str(trained / "feed"), "--out", str(out), "--labels", "size", "kind"]) == 0
    record = json.loads((out / "results.json").read_text())
    assert set(record["results"]) == {"neurojepa", "random init"}
    about = json.loads((trained / "weights/config.json").read_text())
    assert record["identity"] == {"model": about["sha256"], "pooling": about["pooling"]["sha256"]}
    for targets in record["results"].values():
        assert targets["size"]["mae"]["num_people"] == 8
        assert targets["size"]["num_train_people"] == 16
        assert 0 <= targets["kind"]["auroc"]["low"] <= targets["kind"]["auroc"]["high"] <= 1
    page = (out / "report.html").read_text()
    assert "random init" in page and page.count("data:image/png") == 1


@pytest.mark.parametrize(("allow", "tested", "said"), [
    ([], 8, "8 of 16 people of split test were seen .* are not tested"),
    (["--allow-seen"], 16, "8 of 16 people of split test were seen .* tested all the same")])
def test_a_probe_of_another_feed_leaves_out_who_was_seen(
        trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], allow: list[str],
        tested: int, said: str) -> None:
    labels = by_size(trained / "raw")
    relabel(trained / "raw", tmp_path / "feed", lambda number, row: (
        "test" if number % 3 else "train", labels(number, row)[1]))
    assert downstream(["probe", "--weights", str(trained / "weights"), "--feed",
                       str(tmp_path / "feed"), "--out", str(tmp_path / "out"), "--labels", "size",
                       *allow]) == 0
    record = json.loads((tmp_path / "out/results.json").read_text())
    for targets in record["results"].values():
        assert targets["size"]["mae"]["num_people"] == tested
        assert targets["size"]["num_train_people"] == 8
    assert re.search(said, capsys.readouterr().out) and re.search(said, record["notes"][0])
    assert re.search(said, (tmp_path / "out/report.html").read_text())


def test_the_embed_command_writes_one_row_a_scan(trained: Path) -> None:
    import pyarrow.parquet as pq

    out = trained / "embeddings"
    assert downstream(["embed", "--weights", "random", "--config", str(trained / "recipe.yaml"),
                       "--feed", str(trained / "feed"), "--modality", "T1w",
                       "--out", str(out)]) == 0
    table = pq.read_table(out / "embeddings.parquet")
    assert table.num_rows == 12 and set(table["modality"].to_pylist()) == {"T1w"}
    # every voxel of the brain that lies in a lobe is fluid, grey or white matter of it
    volumes = read_volumes(str(out))
    assert list(volumes) == table["scan_id"].to_pylist()
    total = np.array([each.sum() for each in volumes.values()])
    brain = table["brain_ml"].to_numpy()
    assert len(volumes[next(iter(volumes))]) == 13 * 3
    assert (total < 1.02 * brain).all() and (total > 0.8 * brain).all()


def test_volumes_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    assert read_volumes(str(tmp_path)) is None
    (tmp_path / "volumes.csv").write_text(
        "scan_id,participant,session,modality,left deep grey ml\ns,p,1,T1w,7.5\nt,p,1,T1w,\n")
    with pytest.raises(DataError, match=r"volumes.csv, line 3: left deep grey ml is ''"):
        read_volumes(str(tmp_path))


def test_atoms_are_embedded_where_the_code_reads_visible_tokens(trained: Path) -> None:
    words = ["embed", str(trained / "feed"), "--weights", "random", "--modality", "T1w", "--atoms"]
    with pytest.raises(ConfigError, match=r"objective.sparse.visible=1"):
        downstream([*words, "--config", str(trained / "recipe.yaml"), "--out", "unused"])
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    recipe["objective"]["sparse"] = {"code": "relu", "visible": 1.0, "atoms": 24}
    (trained / "visible.yaml").write_text(yaml.safe_dump(recipe))
    assert downstream([*words, "--config", str(trained / "visible.yaml"),
                       "--out", str(trained / "of-atoms")]) == 0
    assert read_embeddings(str(trained / "of-atoms"))["embedding"].combine_chunks(
        ).value_lengths().unique().to_pylist() == [24]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--weights", "WEIGHTS", "--labels", "iq"], ["'iq'", "'size'"]),
    (["--weights", "WEIGHTS", "--modality", "PET"], ["PET", "T1w"]),
    (["--weights", "nowhere"], ["nowhere", "export RUN"]),
    (["--weights", "random"], ["--config"]),
    (["--weights", "WEIGHTS", "--label", "kind"], ["--label:", "--labels"]),
    (["--weights", "WEIGHTS", "--readout", "attentive"], ["--readout:", "EMBEDDINGS"]),
])
def test_what_is_not_there_is_named(trained: Path, arguments: list[str],
                                    words: list[str]) -> None:
    arguments = [str(trained / "weights") if a == "WEIGHTS" else a for a in arguments]
    with pytest.raises(NeurojepaError) as caught:
        downstream(["probe", *arguments, "--feed", str(trained / "feed"), "--out",
                    str(trained / "none")])
    assert all(word in str(caught.value) for word in words)
    assert not (trained / "none").exists()


def test_damaged_weights_and_another_grid_are_refused(trained: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "pooling.safetensors", "seen.json", "config.json"):
        (tmp_path / name).write_bytes((trained / "weights" / name).read_bytes())
    record = json.loads((tmp_path / "config.json").read_text())
    record["grid"]["spacing_mm"] = 5.0
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="pack the archive with --grid"):
        downstream(["probe", "--weights", str(tmp_path), "--feed", str(trained / "feed"),
                    "--out", str(tmp_path / "out")])
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="does not match the sha256"):
        load(str(tmp_path))


def embeddings(num_people: int, signal: float, leak: bool = False) -> tuple[Embeddings, np.ndarray]:
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(num_people), 2)
    truth = rng.normal(size=num_people)[people]
    values = rng.normal(size=(len(people), 6)).astype(np.float32)
    values[:, 0] += signal * truth
    split = np.where(people < num_people * 2 // 3, "train", "test")
    if leak:
        split[0] = "test"
    names = np.array([f"p{person}" for person in people])
    return Embeddings(values, names, names, names, names, names, split), truth


def test_a_probe_finds_signal_and_not_noise() -> None:
    with_signal, truth = embeddings(60, signal=5.0)
    values = truth.astype(str)
    assert probe(with_signal, "x", values).scores["r2"].low > 0.6
    noise, _ = embeddings(60, signal=0.0)
    assert probe(noise, "x", values).scores["r2"].value < 0.2
    classes = np.where(truth > 0, "yes", "no")
    result = probe(with_signal, "x", classes)
    assert result.scores["auroc"].low > 0.8 and result.classes == ("no", "yes")


def test_a_probe_learns_from_one_modality_and_is_tested_on_another() -> None:
    both, truth = embeddings(60, signal=5.0)
    modality = np.where(np.arange(len(truth)) % 2, "T2w", "T1w")
    both = replace(both, modality=modality)
    values = truth.astype(str)
    crossed = probe(both, "x", values, fit_on="T1w", test_on="T2w")
    assert crossed.scores["r2"].num_scans == 20 and crossed.scores["r2"].value > 0.6
    both.values[modality == "T2w", 0] *= -1  # another space
    assert probe(both, "x", values, fit_on="T1w", test_on="T2w").scores["r2"].value < 0
    with pytest.raises(DataError, match="0 of split val"):
        probe(both, "x", values, split="val")


def test_a_person_in_two_splits_is_an_error() -> None:
    leaking, truth = embeddings(30, 1.0, leak=True)
    with pytest.raises(DataError, match="1 participants are in both train and test"):
        probe(leaking, "x", truth.astype(str))


def test_too_few_people_or_classes_are_an_error() -> None:
    few, truth = embeddings(6, 1.0)
    with pytest.raises(DataError, match="4 people of split train"):
        probe(few, "x", truth.astype(str))
    many, truth = embeddings(30, 1.0)
    with pytest.raises(DataError, match="two classes"):
        probe(many, "x", np.full(len(truth), "same"))
