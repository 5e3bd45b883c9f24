"""Fine-tuning: it begins at the pretrained network, missing scans have no part, a killed run ends
in the same bits, ranks have the same head, and what is written tells people as it was tested."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

import neurojepa
from data_prep.identity import pseudonym
from neurojepa.downstream import finetune_run, stats
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.attentive import Head, Scan, begin, class_weights, cost, told
from neurojepa.downstream.finetune import _one_state
from neurojepa.downstream.finetuned import read_head, write_with
from neurojepa.downstream.lora import LowRank, adapt, merge
from neurojepa.downstream.predicted import predict
from neurojepa.downstream.predicted_page import write_predicted
from neurojepa.downstream.scans import Scans
from neurojepa.downstream.state import packed, read_state
from neurojepa.downstream.targets import Target, target_of
from neurojepa.downstream.tested import split_people
from neurojepa.errors import NeurojepaError
from neurojepa.feed.format import open_feed
from neurojepa.model.build import build_model
from neurojepa.ports import free_port
from tests.helpers import ROOT
from tests.helpers.embedded import KEY
from tests.helpers.feeds import GRID, tiny_config
from tests.helpers.tuning import write_tuning, write_weights

pytestmark = pytest.mark.usefixtures("few_draws")
KILL = """
import os, signal, sys
from neurojepa.downstream import finetune
from neurojepa.downstream.__main__ import main
write, calls = finetune.write_bytes, []
def kill(uri, data):
    calls.append(uri)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(uri, data)
finetune.write_bytes = kill
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feed with a table, weights, and ``m``: what a fit of dx left."""
    folder = tmp_path_factory.mktemp("finetune")
    write_tuning(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "DRAWS", 40)
        patch.setattr(stats, "P_DRAWS", 40)
        assert downstream(words(folder, folder / "m")) == 0
    return folder


def words(folder: Path, out: Path, label: str = "dx", *more: str) -> list[str]:
    return ["finetune", "fit", str(folder / "feed"), "--weights", str(folder / "weights"),
            "--labels", str(folder / "my.csv"), "--key", str(folder / "key"), "--label", label,
            *(["--positive", "AD"] if label == "dx" else []), "--epochs", "2", "--out", str(out),
            *more]


# ---- adapters and head ---------------------------------------------------------------------------

def test_adapters_begin_at_the_network_and_merge_into_it() -> None:
    model = build_model(tiny_config("unused", "unused"), GRID)
    encoder, names = model.target, list(model.target.state_dict())
    inputs = (torch.randn(2, 9, 216), torch.randn(2, 9, 3), torch.ones(2, 9, dtype=torch.bool))
    before = encoder(*inputs).detach()
    trained = adapt(encoder, 4, seed=1)
    assert torch.equal(encoder(*inputs), before)  # to the bit
    assert sum(isinstance(each, LowRank) for each in encoder.modules()) == 16
    assert all(name.endswith((".up", ".down")) for name, _ in trained)
    encoder(*inputs).sum().backward()
    assert all(each.grad is not None for _, each in trained)
    assert all(each.grad is None for each in encoder.parameters() if not each.requires_grad)
    with torch.no_grad():
        for name, each in trained:
            if name.endswith(".up"):
                each.normal_(std=0.05)
    moved = encoder(*inputs).detach()
    merge(encoder)
    assert list(encoder.state_dict()) == names
    assert (moved - before).abs().max() > 0.01
    assert torch.allclose(encoder(*inputs), moved, atol=1e-5)


def scan(seed: int, modality: int, tokens: int = 7) -> Scan:
    drawn = torch.randn(2, tokens, 12, generator=torch.Generator().manual_seed(seed))
    return Scan(drawn[0], drawn[1], modality)


def random_head() -> Head:
    head, generator = Head([0, 2], 12, 3, 2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in head.parameters():
            each.copy_(torch.randn(each.shape, generator=generator))
    return head


def test_a_missing_scan_has_no_part() -> None:
    head, one, other = random_head(), scan(1, 0), scan(2, 2)
    both = head([one, other])
    share = head.trust.softmax(0)
    alone = torch.stack([head([one]), head([other])])
    assert torch.allclose(both, (share[:, None] * alone).sum(0), atol=1e-5)
    assert torch.allclose(both, head([other, one]), atol=1e-6)
    with torch.no_grad():  # whatever is learnt of a modality that is not there
        head.weight[1] += 5
        head.trust[1] += 3
    assert torch.equal(head([one]), alone[0])


def test_a_head_without_queries_pools_the_mean_and_with_one_attends() -> None:
    head, one = Head([0], 12, 3, 1), scan(1, 0)
    assert torch.allclose(head.pool(one), one.value_TD.mean(0), atol=1e-6)
    with torch.no_grad():
        head.query[1] = 1000 * one.z_TD[4, 4:8]  # the channels of one head look for token 4
    most = int((one.z_TD[:, 4:8] @ one.z_TD[4, 4:8]).argmax())
    pooled = head.pool(one)
    assert torch.allclose(pooled[4:8], one.value_TD[most, 4:8], atol=1e-4)
    assert torch.allclose(pooled[:4], one.value_TD.mean(0)[:4], atol=1e-6)
    assert head.pool(Scan(one.z_TD[:0], one.value_TD[:0], 0)).eq(0).all()


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_head_begins_as_the_probe_of_embeddings(kind: str) -> None:
    rng = np.random.default_rng(0)
    number = rng.normal(size=60)
    truth = {"binary": (number > 0.5) * 1.0, "regression": number,
             "multiclass": np.digitize(number, [-0.5, 0.5]) * 1.0}[kind]
    scans = []
    for k in range(60):
        values = torch.from_numpy(rng.normal(size=(2, 5, 12))).float()
        values[0, :, 0] += 3 * number[k]
        values[1, :, 0] -= 3 * number[k]  # the other modality shows it the other way round
        scans.append([Scan(values[m], values[m], 2 * m) for m in range(2) if (k + m) % 3])
    head = Head([0, 2], 12, 3, 3 if kind == "multiclass" else 1)
    rows = [[(each.modality, head.pool(each).detach().numpy()) for each in of_one]
            for of_one in scans]
    teach, choose = np.arange(40), np.arange(40, 60)
    features = begin(head, kind, rows, truth, teach, choose)  # type: ignore[arg-type]
    outputs = torch.stack([head(each) for each in scans]).detach().numpy()
    assert np.allclose(outputs, features @ head.weight.detach().numpy().reshape(24, -1)
                       + head.bias.detach().numpy(), atol=1e-4)
    right = {"binary": ((outputs[:, 0] > 0) == truth).mean(),
             "multiclass": (outputs.argmax(1) == truth).mean(),
             "regression": np.corrcoef(outputs[:, 0], truth)[0, 1]}[kind]
    assert right > 0.85


def test_weighed_classes_give_probabilities_of_the_shares_that_taught() -> None:
    """Where nothing tells the classes apart, the probability is the class's share."""
    for truth in (np.repeat([0.0, 1.0], [90, 10]), np.repeat([0.0, 1.0, 2.0], [70, 20, 10])):
        kind = "binary" if truth.max() == 1 else "multiclass"
        weights = class_weights(kind, truth)  # type: ignore[arg-type]
        assert np.mean([weights[int(k)] for k in truth]) == pytest.approx(1)
        logits = torch.zeros(1, 1 if kind == "binary" else 3, requires_grad=True)
        cost(kind, logits.expand(100, -1), torch.from_numpy(truth), weights).backward()  # type: ignore[arg-type]
        assert logits.grad is not None and logits.grad.abs().max() < 1e-4  # the optimum
        shares = told(kind, logits.detach().double().numpy(), weights)  # type: ignore[arg-type]
        wanted = np.bincount(truth.astype(int)) / 100
        assert np.allclose(shares[0], wanted[1] if kind == "binary" else wanted)


# ---- who teaches and who is tested ---------------------------------------------------------------

def label(number: int = 60) -> Target:
    return target_of("dx", np.where(np.arange(number) % 3, "CN", "AD"), ["AD"])


def test_parts_keep_families_whole_and_test_nobody_who_was_seen() -> None:
    family = (np.arange(60) // 2).astype(str)
    parts = split_people(label(), family, np.ones(60, bool))
    assert {part: int((parts == part).sum()) for part in np.unique(parts)} == {
        "test": 12, "train": 38, "val": 10}
    assert all(len(set(parts[family == name])) == 1 for name in family)
    for part in ("train", "val", "test"):
        assert 0.2 < label().truth[parts == part].mean() < 0.5
    may = np.arange(60) >= 50  # the others were seen
    assert set(np.flatnonzero(split_people(label(), family, may) == "test")) == set(range(50, 60))
    may[51] = False  # and so the other one of its family is not tested
    tested = np.flatnonzero(split_people(label(), family, may) == "test")
    assert set(tested) == set(range(52, 60))


def test_too_few_people_are_told() -> None:
    with pytest.raises(NeurojepaError, match="known for 8 people or families, 10 are needed"):
        split_people(label(8), np.arange(8).astype(str), np.ones(8, bool))
    may = np.zeros(60, bool)
    may[[1, 2, 4]] = True  # all CN
    with pytest.raises(NeurojepaError, match="of 3 people of part test none is 'AD'; bring more "
                       "people who were not seen"):
        split_people(label(), np.arange(60).astype(str), may)


# ---- the command ---------------------------------------------------------------------------------

@pytest.mark.slow(6)
def test_what_is_written_tells_people_as_it_was_tested(tuned: Path) -> None:
    record = json.loads((tuned / "m/evaluation/results.json").read_text())
    assert record["schema"] == "neurojepa/finetune/1" and record["classes"] == ["CN", "AD"]
    assert record["people"] == {"train": 19, "val": 5, "test": 6}
    assert record["modalities"] == {"T1w": 25, "T2w": 25} and record["complete"] == 20
    assert set(record["scores"]) == {"fine-tuned", "linear probe"}
    assert record["scores"]["fine-tuned"]["auroc"]["value"] > 0.7  # untrained, on 19 people
    assert record["gains"][0]["over"] == "linear probe" and len(record["history"]) == 3
    page = (tuned / "m/evaluation/report.html").read_text()
    assert page.count("<figure>") == 3 and "taught" in page
    tested = list(csv.DictReader((tuned / "m/evaluation/predictions.csv").open()))
    assert len(tested) == 6 and {row["participant_id"][0] for row in tested} == {"P"}
    assert (tuned / "m/evaluation/predictions.csv").stat().st_mode & 0o77 == 0
    assert downstream(["finetune", "apply", str(tuned / "m"), str(tuned / "feed"), "--out",
                       str(tuned / "applied")]) == 0
    applied = list(csv.DictReader((tuned / "applied/predictions.csv").open()))
    assert len(applied) == 30 and sum(row["taught"] == "yes" for row in applied) == 24
    assert {row["scans"] for row in applied} == {"T1w", "T2w", "T1w T2w"}
    new = sorted(row["probability"] for row in applied if row["taught"] == "no")
    assert new == sorted(row["probability"] for row in tested)  # the same by the loaded model
    assert "24 of them taught this model" in (tuned / "applied/report.html").read_text()
    text = (tuned / "m/README.md").read_text()
    assert "tells dx (CN, AD) of a person from T1w, T2w scans" in text and "## Licence" in text
    model = neurojepa.load(tuned / "m")
    assert model.embed(str(tuned / "feed"), modality="T1w").values.shape == (25, 96)
    alone = model.predict(str(tuned / "feed"), modality="T1w")
    assert len(alone.rows) == 25 and np.isfinite(alone.values).all()
    with pytest.raises(NeurojepaError, match="these weights were not fine-tuned"):
        neurojepa.load(tuned / "weights").predict(str(tuned / "feed"))


def test_who_has_no_usable_scan_is_listed_with_the_reason(tuned: Path) -> None:
    """As of raw scans, of which the archive knows what became."""
    feed = open_feed(str(tuned / "feed"))
    people = sorted(set(feed.index["participant"].to_pylist()))
    about = [{"participant": people[0], "session": "1", "modality": "T1w", "status": "accepted",
              "reason": ""}]
    about += [{**about[0], "participant": "gone", "status": "rejected", "reason": "no_brain"},
              {**about[0], "participant": "other", "modality": "PET"},
              {**about[0], "participant": "more", "modality": "T2w"}]
    ids = {people[0]: "own-1", "gone": "own-2", "other": "own-3", "more": "own-4", "pet": "own-5"}
    model = neurojepa.load(tuned / "m")
    rows = np.flatnonzero(np.array(feed.index["participant"].to_pylist()) == people[0])
    found = predict(model.weights, *read_head(model.name, model.weights), feed, rows, {"PET": 1},
                    Scans(feed, pa.Table.from_pylist(about), ids))
    told = {row["participant_id"]: (bool(row["predicted"]), row["why_not"]) for row in found.rows}
    assert told == {"own-1": (True, ""), "own-2": (False, "T1w rejected: no_brain"),
                    "own-3": (False, "no T1w or T2w"), "own-4": (False, "T2w was not asked for"),
                    "own-5": (False, "no scan was prepared")}
    write_predicted(str(tuned / "listed"), found, {"model": "M", "scans": ["x"]})
    record = json.loads((tuned / "listed/results.json").read_text())
    assert record["without_prediction"] == {
        "T1w rejected: no_brain": 1, "no T1w or T2w": 1, "T2w was not asked for": 1,
        "no scan was prepared": 1}
    assert record["predicted"] == 1 and record["skipped"] == {"PET": 1}


@pytest.mark.slow(8)
def test_a_killed_run_goes_on_to_the_same_bits(tuned: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    killed = subprocess.run([sys.executable, "-c", KILL, *words(tuned, tuned / "k")], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
                            capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in (tuned / "k").iterdir()) == ["state"]
    with monkeypatch.context() as patch:
        patch.setattr(finetune_run, "embed", None)  # it is refused before scans are read
        with pytest.raises(NeurojepaError, match="the state of a fine-tuning with epochs 2, now "):
            downstream([*words(tuned, tuned / "k"), "--epochs", "4"])
    assert downstream(words(tuned, tuned / "k")) == 0
    assert "goes on after epoch 1" in capsys.readouterr().out
    for name in ("model.safetensors", "head.safetensors", "state/finetune.safetensors"):
        assert (tuned / "k" / name).read_bytes() == (tuned / "m" / name).read_bytes(), name


@pytest.mark.slow(10)
def test_two_ranks_have_the_head_of_one(tuned: Path, run_cli) -> None:
    done = run_cli("-m", "neurojepa.downstream", *words(tuned, tuned / "two"), "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1:") == 1  # one rank speaks
    state, other = (load_file(tuned / name / "state/finetune.safetensors") for name in ("m", "two"))
    for part in ("last.head.", "last.encoder.", "best.head.", "best.encoder."):
        names = [name for name in state if name.startswith(part)]
        apart = sum(float((state[name] - other[name]).square().sum()) for name in names) ** 0.5
        size = sum(float(state[name].square().sum()) for name in names
                   if ".down" not in name) ** 0.5  # what was moved from zero
        assert apart < 1e-3 * size, (part, apart, size)
    one, two = (neurojepa.load(tuned / name).predict(str(tuned / "feed")) for name in ("m", "two"))
    assert np.allclose(one.values, two.values, atol=1e-3)


@pytest.mark.slow(10)
def test_tasks_of_srun_are_ranks_of_one_run(tuned: Path) -> None:
    command = [sys.executable, "-m", "neurojepa.downstream", *words(tuned, tuned / "srun"),
               "--epochs", "1"]
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost",
            "MASTER_PORT": str(free_port())}
    tasks = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, env={
        **os.environ, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)]
    told = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert "epoch 1:" in told[0] and not told[1]


def test_a_state_that_is_damaged_or_not_of_all_ranks_is_said(tuned: Path, tmp_path: Path) -> None:
    data = (tuned / "m/state/finetune.safetensors").read_bytes()
    (tmp_path / "s").write_bytes(data[:-8])
    with pytest.raises(NeurojepaError, match=r"or a damaged one .*; remove it to begin anew"):
        read_state(str(tmp_path / "s"), {}, "fine-tuning")
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(NeurojepaError, match=r"with pooling [0-9a-f]+, now it is x;"):
        read_state(str(tmp_path / "s"), {"pooling": "x"}, "fine-tuning")
    (tmp_path / "old").write_bytes(packed({}, {"settings": {"epochs": 2}}))  # knew no pooling
    assert read_state(str(tmp_path / "old"), {"epochs": 2, "pooling": "x"}, "fine-tuning")
    state = read_state(str(tmp_path / "s"), {"epochs": 2}, "fine-tuning")
    assert state is not None and len(state[0]["history"]) == 3
    with pytest.raises(NeurojepaError, match="2 ranks read different states of --out"):
        _one_state([state[0]["history"], None])


@pytest.mark.slow(4)
def test_weights_without_places_learn_them_from_none_who_are_tested(
        tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tuned / "weights", tmp_path / "weights")
    record = json.loads((tmp_path / "weights/config.json").read_text())
    del record["pooling"]
    (tmp_path / "weights/config.json").write_text(json.dumps(record))
    fit, read = finetune_run.fit_places, []

    def noted(model, config, feed, rows):
        read.extend(feed.index["participant"].take(rows).to_pylist())
        return fit(model, config, feed, rows)

    monkeypatch.setattr(finetune_run, "fit_places", noted)
    assert downstream([*words(tuned, tmp_path / "m"), "--epochs", "1", "--weights",
                       str(tmp_path / "weights")]) == 0
    rows = csv.DictReader((tmp_path / "m/evaluation/predictions.csv").open())
    tested = {pseudonym(KEY, "clinic", row["participant_id"]) for row in rows}
    assert len(tested) == 6 and len(set(read)) == 19 and not tested & set(read)
    assert neurojepa.load(tmp_path / "m").weights.places is not None
    assert "scans of the people who taught it have" in (tmp_path / "m/README.md").read_text()


def test_weights_are_not_written_over_and_another_task_is_not_kept(tuned: Path,
                                                                   tmp_path: Path) -> None:
    for out in ("weights", "m"):
        with pytest.raises(NeurojepaError, match="holds weights, which would be written over"):
            downstream([*words(tuned, tuned / out), "--weights", str(tuned / out)])
    weights = neurojepa.load(tuned / "m").weights
    assert weights.places is not None
    write_with(str(tmp_path / "c"), weights, str(tuned / "m"), weights.places, [], {},
               {"completes": {}}, "none")
    with pytest.raises(NeurojepaError, match="these weights were not fine-tuned"):
        read_head(str(tmp_path / "c"), weights)


def test_a_scan_that_cannot_be_read_is_named(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned / "feed", tmp_path / "feed")
    index = open_feed(str(tmp_path / "feed")).index.to_pylist()
    with (tmp_path / "feed" / index[7]["shard"]).open("r+b") as shard:
        shard.seek(index[7]["offset"])
        shard.write(bytes(index[7]["length"]))
    line = words(tuned, tmp_path / "m")
    with pytest.raises(NeurojepaError, match=index[7]["scan_id"]):
        downstream([*line[:2], str(tmp_path / "feed"), *line[3:]])
    assert not (tmp_path / "m").exists()


@pytest.mark.slow(6)
@pytest.mark.parametrize("name", ["three", "level"])
def test_classes_and_numbers(tuned: Path, tmp_path: Path, name: str) -> None:
    assert downstream([*words(tuned, tmp_path / "m", name), "--epochs", "1"]) == 0
    record = json.loads((tmp_path / "m/evaluation/results.json").read_text())
    scores = record["scores"]["fine-tuned"]
    assert (scores["auroc"] if name == "three" else scores["r2"])["value"] > 0.5
    found = neurojepa.load(tmp_path / "m").predict(str(tuned / "feed"))
    if name == "three":
        assert np.allclose(found.values.sum(1), 1)
        assert {row["predicted"] for row in found.rows} <= set("abc")
    else:
        assert 55 < found.values.mean() < 85


def test_what_cannot_be_fine_tuned_is_said(tuned: Path, tmp_path: Path) -> None:
    feed = open_feed(str(tuned / "feed"))
    everyone = tuple(set(feed.index["participant"].to_pylist()))
    write_weights(tmp_path / "weights", str(tuned / "feed"), seen=everyone)
    line = words(tuned, tmp_path / "m")
    for more, message in (
            (["--weights", str(tmp_path / "weights")], "all 30 people were seen"),
            (["--modality", "PET"], r"--modality PET: .* has T1w, T2w"),
            (["--label", "dose"], "column 'dose'"), (["--epochs", "0"], "--epochs 0: take 1 or")):
        with pytest.raises(NeurojepaError, match=message):
            downstream([*line, *more])
    with pytest.raises(NeurojepaError, match="neither a packed feed nor a folder that embed wrote"):
        downstream([*line[:2], str(tmp_path), *line[3:]])
    assert not (tmp_path / "m").exists()
