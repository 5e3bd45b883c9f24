"""One modality told from another: a planted link is found, none is not, and the mean of the group
is no success."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.synth.cohort import draw_person, truths
from neurojepa.downstream import transfer as module
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.labels import People
from neurojepa.downstream.transfer import (
    ALONE,
    LEFT_OUT,
    SHUFFLED,
    VOLUMES,
    WITH,
    WITHOUT,
    paired,
    transfer,
)
from neurojepa.errors import NeurojepaError
from tests.helpers.embedded import write_embedded
from tests.helpers.trees import write

pytestmark = pytest.mark.usefixtures("few_draws")


def people(values: np.ndarray, age: np.ndarray) -> People:
    names = np.array([f"p{number:03d}" for number in range(len(values))])
    return People(values, names, names, names, np.zeros(len(values), bool),
                  {"brain_ml": np.full(len(values), "1400") if len(values) < 3 else
                   np.random.default_rng(7).normal(1400, 90, len(values)).astype(str),
                   "age": age.astype(str)})


def linked(link: float, of_age: float = 0.0, number: int = 120
           ) -> tuple[People, np.ndarray]:
    """A source of 10 features and a target of 15 that is a mean, ``link`` of the source, ``of_age``
    of the age, and noise."""
    rng = np.random.default_rng(0)
    source, age = rng.normal(size=(number, 10)), rng.normal(60, 8, number)
    source += of_age * ((age - 60) / 8)[:, None]  # scans show the age, too
    target = 50 * rng.normal(size=15) + link * source @ rng.normal(size=(10, 15)) / 3
    target += of_age * np.outer((age - 60) / 8, rng.normal(size=15)) * 2
    return people(source, age), target + rng.normal(size=(number, 15))


def test_a_planted_link_is_told_beyond_the_mean_and_the_age() -> None:
    source, target = linked(2.0)
    found = transfer(source, target, adjust=("age",), folds=4, repeats=1)
    scores = {name: row.scores for name, row in found.rows.items()}
    assert scores[ALONE]["r2"].low > 0.6 and scores[ALONE]["correlation"].low > 0.7
    assert scores[ALONE]["own_is_nearer"].low > 0.9
    assert abs(scores[WITHOUT]["r2"].value) < 0.05
    assert scores[SHUFFLED]["r2"].value < 0.03
    assert abs(scores[SHUFFLED]["own_is_nearer"].value - 0.5) < 0.1
    assert found.gains[0].score.low > 0.5 and VOLUMES not in scores


def test_without_a_link_nothing_is_told_though_all_share_a_mean() -> None:
    source, target = linked(0.0)
    scores = transfer(source, target, folds=4, repeats=1).rows[ALONE].scores
    assert scores["r2"].value < 0.03 and abs(scores["correlation"].value) < 0.1
    assert abs(scores["own_is_nearer"].value - 0.5) < 0.1


def test_a_link_by_age_alone_is_no_gain_over_the_age() -> None:
    source, target = linked(0.0, of_age=1.0)
    found = transfer(source, target, adjust=("age",), folds=4, repeats=1)
    assert found.rows[ALONE].scores["r2"].low > 0.2
    assert found.rows[WITHOUT].scores["r2"].value > found.rows[ALONE].scores["r2"].value - 0.02
    gain = next(gain for gain in found.gains if gain.row == WITH)
    assert abs(gain.score.value) < 0.05


def test_a_link_that_is_the_sites_is_lost_at_a_site_that_taught_nothing() -> None:
    rng = np.random.default_rng(0)
    site = np.arange(120) % 4
    # what scanners do to one modality and, in no way that could be foreseen, to the other
    of_site, to_other = rng.normal(size=(2, 4, 3))[:, site]
    own = rng.normal(size=(120, 3))
    for link, drops in ((0.0, True), (3.0, False)):
        source = np.hstack([3 * of_site * (link == 0), own, rng.normal(size=(120, 4))])
        target = (3 * to_other * (link == 0) + link * own) @ rng.normal(size=(3, 12))
        whom = people(source, np.full(120, 60.0))
        whom.columns["scanner"] = np.array([f"s{each}" for each in site])
        found = transfer(whom, target + rng.normal(size=(120, 12)), site="scanner", folds=4,
                         repeats=1)
        within, outside = (found.rows[name].scores["r2"] for name in (ALONE, LEFT_OUT))
        assert within.low > 0.4 and (within.low - outside.high > 0.2) == drops
        assert any("on a scanner that taught nothing" in each for each in found.warnings) == drops
    assert next(gain for gain in found.gains if gain.row == LEFT_OUT).score.low > 0.3
    whom.columns["scanner"][:] = "s1"
    with pytest.raises(NeurojepaError, match="all 120 people are at 's1'"):
        transfer(whom, target, site="scanner", folds=4, repeats=1)


def test_few_people_teach_less() -> None:
    source, target = linked(2.0)
    found = transfer(source, target, folds=4, repeats=2)
    curve = {shot.taught: shot.scores for shot in found.shots if shot.row == ALONE}
    assert list(curve) == [1, 2, 5, 10, 20, 50]  # 90 could teach
    assert curve[1]["own_is_nearer"].value == 0.5 and curve[1]["r2"].value < 0
    nearer = [scores["own_is_nearer"].value for scores in curve.values()]
    assert nearer == sorted(nearer) and nearer[-1] > 0.9
    assert curve[50]["r2"].value > curve[10]["r2"].value
    assert curve[50]["r2"].value < found.rows[ALONE].scores["r2"].value
    blind = [shot.scores["own_is_nearer"] for shot in found.shots if shot.row == WITHOUT]
    assert all(abs(score.value - 0.5) < 0.12 for score in blind)
    assert transfer(source, target, folds=4, repeats=2).shots == found.shots


def test_few_who_teach_are_people_and_not_visits() -> None:
    source, target = linked(2.0)
    person = np.repeat(source.participant[:40], 3)
    visits = replace(source, participant=person, family=person)
    found = transfer(visits, target, folds=4, repeats=1)
    assert [shot.taught for shot in found.shots if shot.row == ALONE] == [1, 2, 5, 10, 20]
    run = module.Runner(visits, target, module.Plan([[(np.arange(60), np.arange(60, 120))]]))
    taught: list[np.ndarray] = []

    def features(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        taught.append(train)
        return source.values[train], source.values[test]

    run(features, 5)
    assert len(taught[-1]) == 15 and len(set(person[taught[-1]])) == 5


@pytest.mark.parametrize("linked", [True, False])
def test_function_of_synthetic_people_is_told_where_it_is_linked(linked: bool) -> None:
    """Embeddings that show what their scans show: grey matter and contrast; uptake."""
    rng = np.random.default_rng(0)
    everyone = [draw_person(4, index, linked=0.5) for index in range(560)]
    persons = [person for person in everyone if person.linked == linked][:240]
    age = np.array([person.visits[0].age for person in persons])
    shown = np.array([[person.traits.grey, person.traits.myelin, person.patient * 2.0,
                       (person.visits[0].age - 48) / 19] for person in persons])
    uptake = np.array([truths(person, person.visits[0].age)["fdg_ratio"] for person in persons])
    source = people(shown @ rng.normal(size=(4, 8)) + 0.3 * rng.normal(size=(240, 8)), age)
    source.columns["diagnosis"] = np.array([str(int(person.patient)) for person in persons])
    target = np.outer(uptake / 0.05, rng.normal(size=6)) + 0.4 * rng.normal(size=(240, 6))
    found = transfer(source, target, adjust=("age", "diagnosis"), folds=4, repeats=1)
    gain = next(gain for gain in found.gains if (gain.row, gain.over) == (WITH, WITHOUT))
    assert gain.score.low > 0.02 if linked else gain.score.value < 0.02


def test_scores_by_hand() -> None:
    source, target = linked(1.0, number=12)
    run = module.Runner(source, target, module.Plan([[(np.arange(6), np.arange(6, 12)),
                                                       (np.arange(6, 12), np.arange(6))]]))
    truth = np.random.default_rng(0).normal(size=(12, 1, 15))
    everyone = np.arange(12)
    perfect = {name: value(everyone) for name, value in run.scorers(truth, truth).items()}
    assert perfect == {"r2": 1, "correlation": pytest.approx(1), "own_is_nearer": 1}
    mean = {name: value(everyone) for name, value in run.scorers(0 * truth, truth).items()}
    assert mean == {"r2": 0, "correlation": 0, "own_is_nearer": 0.5}


def test_another_visit_of_the_own_person_is_nobody_else() -> None:
    source, target = linked(1.0, number=12)
    visits = replace(source, participant=np.repeat(source.participant[:6], 2))
    run = module.Runner(visits, target, module.Plan([[(np.arange(6), np.arange(6, 12)),
                                                       (np.arange(6, 12), np.arange(6))]]))
    truth = np.repeat(np.random.default_rng(0).normal(size=(6, 1, 15)), 2, 0)  # of both alike
    assert run.scorers(truth, truth)["own_is_nearer"](np.arange(12)) == 1


def test_a_target_that_was_seen_in_pretraining_counts() -> None:
    source, target = linked(1.0, number=30)
    other = replace(people(target, np.zeros(30)), seen=np.arange(30) == 4)
    assert paired(source, other)[0].seen.tolist() == (np.arange(30) == 4).tolist()
    assert paired(source, replace(other, seen=None))[0].seen is None


def test_one_family_who_teaches_is_told() -> None:
    source, target = linked(1.0, number=20)
    two = replace(source, family=np.repeat(["a", "b"], 10))
    with pytest.raises(NeurojepaError, match="10 who teach in one fold are all of one family"):
        transfer(two, target, folds=2, repeats=1)


def test_visits_with_both_modalities_make_pairs() -> None:
    source, target = linked(1.0, number=30)
    other = people(target, np.zeros(30)).take(np.r_[29, 5:28])
    own, features, notes = paired(source.take(np.arange(0, 30)), other)
    assert len(own.ids) == 24 and notes == ["6 with a scan of the source alone"]
    row = own.ids.tolist().index("p029")
    assert np.array_equal(features[row], target[29])
    visits = replace(source, sessions=np.full(30, "1"))
    with pytest.raises(NeurojepaError, match="0 people or visits have scans of both"):
        paired(visits, replace(people(target, np.zeros(30)), sessions=np.full(30, "2")))


def test_what_cannot_be_told_is_said() -> None:
    source, target = linked(1.0, number=20)
    with pytest.raises(NeurojepaError, match="the same for all people"):
        transfer(source, np.ones((20, 3)), folds=2, repeats=1)
    ages = source.columns["age"].copy()
    ages[3] = ""
    found = transfer(replace(source, columns={**source.columns, "age": ages}), target,
                     adjust=("age",), folds=2, repeats=1)
    assert found.notes == ["1 people without age"] and len(found.people.ids) == 19


def test_the_command_writes_results_and_a_page(tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    source, target = linked(2.0, number=40)
    wide = np.hstack([target, target[:, :1]])[:, :10]  # embeddings have one width
    write_embedded(tmp_path, np.vstack([source.values, wide]), [f"p{n}" for n in range(40)] * 2,
                   modality=["T1w"] * 40 + ["PET"] * 40,
                   brain_ml=(1400.0 + np.arange(80) % 9).tolist())
    lines = [f"p{n},{50 + n % 13},{'FM'[n % 2]}" for n in range(40)]
    write(tmp_path, {"my.csv": "participant_id,age,sex\n" + "\n".join(lines)})
    words = ["transfer", str(tmp_path), "--labels", str(tmp_path / "my.csv"), "--from", "T1w",
             "--adjust", "age", "sex", "--cv", "1x3", "--key", str(tmp_path / "key"),
             "--out", str(tmp_path / "out"), "--to"]
    with pytest.raises(NeurojepaError, match="name two modalities"):
        downstream([*words, "T1w"])
    with pytest.raises(NeurojepaError, match=r"^FLAIR: the embeddings are of PET, T1w"):
        downstream([*words, "FLAIR"])
    assert downstream([*words, "PET"]) == 0
    assert "PET from T1w: embedding: r2 0." in capsys.readouterr().out
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["schema"] == "neurojepa/transfer/1" and record["features"] == 10
    assert record["scores"]["embedding"]["r2"]["low"] > 0.4
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<figure>") == 4 and "PET told from T1w" in page
    assert len((tmp_path / "out/predictions.csv").read_text().splitlines()) == 41
