"""The table of tasks: what its columns tell of people with planted signals, and its arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.synth import codes
from data_prep.synth.cohort import draw_person, truths
from data_prep.synth.scanner import Head, Pose
from neurojepa.downstream.labels import People
from neurojepa.errors import ConfigError
from neurojepa.feed.format import open_feed
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.tuning import write_weights
from tools.bench import _downstream_tasks as tasks
from tools.bench import downstream
from tools.bench._alff import LINKS, alff
from tools.bench._downstream_table import KNOWN, VOLUMES, row, summary, tables
from tools.bench._people import FEEDS
from tools.bench._quality_run import finish, stored
from tools.bench._sketched import PEOPLE, sketch_people
from tools.bench.compare import Job


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> tuple[People, People]:
    """Sketched people at both visits, whose features are noise."""
    folder = tmp_path_factory.mktemp("sketched")
    sketch_people(folder)
    rng = np.random.default_rng(0)
    first, second = (tasks.people_of(open_feed(str(folder / name)), rng.normal(size=(PEOPLE, 5)))
                     for name in FEEDS)
    assert (first.participant == second.participant).all()
    return first, second


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "DRAWS", 30)
    for name in ("DRAWS", "P_DRAWS"):
        monkeypatch.setattr(f"neurojepa.downstream.stats.{name}", 30)


def told(people: People, name: str) -> People:
    """The same people, whose features are one of their columns and noise."""
    value = people.column(name).astype(float)
    return people.replaced(np.column_stack([people.values[:, :2], value]))


@pytest.mark.slow(5)
def test_only_people_of_split_test_are_tested_and_all_columns_are_there(
        people: tuple[People, People]) -> None:
    first, second = people
    assert first.seen is not None and (~first.seen).sum() == PEOPLE // 4
    rng = np.random.default_rng(1)
    found = tasks.tasks(first, second, {link: rng.normal(size=(PEOPLE, 3)) for link in LINKS})
    assert set(found) == {way + column for way in (tasks.ALONE, tasks.WITHOUT, tasks.WITH)
                          for column in tasks.COLUMNS} | {tasks.TRUE + tasks.SURVIVAL}
    assert all(len(values) == 31 and np.isfinite(values[0]) for values in found.values())
    assert found[tasks.AGE][0] < 0.4 and abs(found[tasks.LINKED][0]) < 0.4


@pytest.mark.slow(5)
def test_what_features_hold_is_told(people: tuple[People, People]) -> None:
    first, second = people
    assert tasks.labels_told(told(first, "age"))[tasks.AGE][0] > 0.95
    risk = tasks.survived(told(first, "log_hazard"))
    assert risk[tasks.SURVIVAL][0] == pytest.approx(risk[tasks.TRUE + tasks.SURVIVAL][0], abs=0.1)
    grown = tasks.changed(told(first, "ventricle_ml"), told(second, "ventricle_ml"))
    assert grown[tasks.CHANGE][0] > 0.9
    aged = told(second, "age")
    target = np.outer(aged.column("age").astype(float), [1.0, -1.0])
    assert tasks.moved_to_function(aged, target, tasks.LINKED)[tasks.LINKED][0] > 0.95


@pytest.mark.slow(3)
def test_a_site_in_the_features_is_told_and_age_is_not_on_sites_that_taught_nothing(
        people: tuple[People, People]) -> None:
    first, _ = people
    names, number = np.unique(first.column("site"), return_inverse=True)
    of_site = first.replaced(np.eye(len(names))[number])
    found = tasks.sites(of_site)
    assert found[tasks.SITE][0] > 0.95 and found[tasks.UNSEEN][0] < 0.1


def test_a_networks_own_head_is_scored_on_the_people_tested(
        people: tuple[People, People], monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = people
    assert first.seen is not None
    tested = np.flatnonzero(~first.seen)[::-1]  # in another order
    for label, said in (("age", first.column("age")[tested].astype(float)),
                        ("diagnosis", (first.column("diagnosis")[tested] == "patient") - 7.0)):
        monkeypatch.setattr(tasks, "predicted_by", lambda *_, label=label, said=said: stored(
            label, said, said, first.participant[tested], first.family[tested]))
        config: Any = SimpleNamespace(objective=SimpleNamespace(label=label))
        found = tasks.of_its_head(None, config, None, first)  # type: ignore[arg-type]
        assert {column: values[0] for column, values in found.items()} == {
            "age": {tasks.AGE: 1, tasks.ERROR: 0}, "diagnosis": {tasks.DIAGNOSIS: 1}}[label]


@pytest.mark.slow(3)
def test_a_session_code_is_learnt_on_its_first_stage_and_is_what_people_are_embedded_by(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("STEPS", 5), ("BATCH", 64), ("LEAST_USE", 0.0)):
        monkeypatch.setattr(f"neurojepa.downstream.sessions.{name}", value)
    uri = write_feed(str(tmp_path / "feed"), 4, per_session=2)  # of T1w and T2w
    write_weights(tmp_path / "weights", uri)
    (tmp_path / "train_cpu_s").write_text("90")
    feed, config = open_feed(uri), tiny_config(uri, "unused")
    (model, spent_s), (other, _) = (tasks.with_code(tmp_path / "weights", feed, seed)
                                    for seed in (0, 1))
    code = model.session_code
    assert code is not None and spent_s > 90
    assert tasks.embedded(model, config, feed, feed)[0].shape == (2, code.atoms)
    assert other.session_code is not None
    assert not torch.equal(code.decoder.weight, other.session_code.decoder.weight)


def test_first_stages_are_made_before_the_codes_that_are_learnt_on_them(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Job] = []
    monkeypatch.setattr(downstream, "sketch_people", lambda folder: str(folder))
    monkeypatch.setattr(downstream, "Runner", lambda *_: SimpleNamespace(make=made.extend))
    methods = ("session code", "sparse JEPA", VOLUMES)
    downstream.make(downstream.Plan(100.0, (0, 1), methods), tmp_path)
    names = [job.folder.name for job in made]
    assert names == ["first-stage-0", "first-stage-1", "session-code-0", "sparse-jepa-0",
                     "region-volumes-0", "session-code-1", "sparse-jepa-1"]
    assert made[2].teacher == made[0].folder / "weights" and made[0].seconds == 70


# ---- the table -----------------------------------------------------------------------------------

def scores(value: float, draws: float) -> np.ndarray:
    return np.array([value, *np.full(tasks.DRAWS, draws)])


def test_means_are_over_seeds_and_intervals_draw_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.bench._downstream_table.DRAWS", tasks.DRAWS)
    alike = summary([scores(1.0, 1.0), scores(3.0, 1.0)], [])
    assert alike == [2.0, 1.0, 1.0]
    value, low, high = summary([scores(1.0, 0.0), scores(3.0, 4.0)], [scores(1.5, 1.0)])
    assert value == 0.5 and low == -1.0 and high == 3.0
    assert row([{"age R2": scores(0.5, 0.5)}], "")["survival C"] is None


def test_the_rows_of_volumes_and_of_what_anyone_knows_stand_beside_methods(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
        ) -> None:
    monkeypatch.setattr("tools.bench._downstream_table.DRAWS", tasks.DRAWS)
    runs = {"ours": [tmp_path / "ours-0", tmp_path / "ours-1"], VOLUMES: [tmp_path / "volumes-0"],
            "random init": [tmp_path / "init-0"]}
    for name, value, spent in (("ours-0", 0.5, np.nan), ("volumes-0", 0.75, 7.0),
                               ("init-0", 0.25, 0.0)):
        (tmp_path / name).mkdir()
        finish(tmp_path / name, {"train_cpu_s": np.array(spent)} | {
            way + tasks.AGE: scores(of, of) for way, of in (
                (tasks.ALONE, value), (tasks.WITHOUT, 0.25), (tasks.WITH, value + 0.125))})
    found = tables(runs)
    told, added, above, of_init = found["tables"].values()
    assert found["seeds"] == {"ours": 1, VOLUMES: 1, "random init": 1}  # a seed is not finished
    assert found["train_cpu_s"] == {VOLUMES: 7.0, "random init": 0.0}  # ours was made in parts
    assert told["ours"][tasks.AGE][0] == 0.5 and told[KNOWN][tasks.AGE][0] == 0.25
    assert added["ours"][tasks.AGE] == [0.375] * 3 and above["ours"][tasks.AGE][0] == -0.25
    assert of_init["ours"][tasks.AGE][0] == 0.25 and "random init" not in of_init
    assert "0.50 [0.50, 0.50]" in capsys.readouterr().out


def test_scores_of_other_code_are_not_compared(tmp_path: Path) -> None:
    runs = {name: [tmp_path / name] for name in ("ours", VOLUMES)}
    for name, value in (("ours", 0.7166), (VOLUMES, 0.7482)):
        (tmp_path / name).mkdir()
        finish(tmp_path / name, {tasks.WITHOUT + tasks.DIAGNOSIS: scores(value, value)})
    with pytest.raises(ConfigError, match=r"region volumes: 'covariates: diagnosis AUROC' is "
                       r"0\.7482, and 0\.7166 in .*ours; .* Delete"):
        tables(runs)


def test_without_runs_there_is_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no runs"):
        downstream.run(True, None, str(tmp_path), finished=True)


# ---- people --------------------------------------------------------------------------------------

@pytest.mark.slow(3)
def test_function_at_rest_follows_what_is_planted() -> None:
    distance = np.sqrt(((np.indices((140, 180, 140)) - [[[[70]]], [[[90]]], [[[70]]]])**2).sum(0))
    labels = np.zeros(distance.shape, np.int16)
    for limit, code in ((68, codes.FLUID), (62, 3), (45, 2)):
        labels[distance < limit] = code
    still = Head(labels, np.zeros((3, 3, 3, 3), np.float32), np.array([70.0, 90.0, 70.0]))
    pose = Pose(np.eye(3), np.array([0.0, -17.0, 6.0]))
    planted, found = [], []
    for index in range(4):
        person = draw_person(14, index)
        visit = replace(person.visits[0], session="2")
        told = alff(still, pose, person, visit, 14)
        assert told == alff(still, pose, person, visit, 14)
        for link, linked in LINKS.items():
            planted.append(truths(replace(person, linked=linked), visit.age)["fluctuation"])
            found.append([value for name, value in told.items() if name.startswith(link + ": ")])
    spread = np.std(found, axis=1)  # of lobes: networks stand out more where they fluctuate more
    assert np.corrcoef(planted, spread)[0, 1] > 0.8
