"""Studies of labels: what is told, what explains it, and who may be tested."""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neurojepa.downstream import scoring, study, study_checks, targets
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.crossval import Plan
from neurojepa.downstream.features import design_of
from neurojepa.downstream.output import finite
from neurojepa.downstream.study import ALONE, LEFT_OUT, SHUFFLED, SITE, WITH, WITHOUT, Design
from neurojepa.downstream.targets import target_of
from neurojepa.errors import ConfigError, DataError
from tests.helpers.embedded import cohort, people
from tests.helpers.trees import write

QUICK = Design(folds=3, repeats=1)

pytestmark = pytest.mark.usefixtures("few_draws")


# ---- what explains a score -----------------------------------------------------------------------

def test_calibration_tells_what_happened_in_each_bin() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(400)
    truth = (rng.random(400) < probability**2).astype(float)  # too sure of positives
    curve = study_checks.calibration(truth, probability)
    assert len(curve) == 8 and sum(number for *_, number in curve) == 400
    assert all(abs(share - mean**2) < 0.2 for mean, share, _ in curve)
    assert [number for *_, number in study_checks.calibration(truth[:7], probability[:7])] == [7]


def test_predictions_are_freed_of_their_pull_towards_the_mean() -> None:
    rng = np.random.default_rng(0)
    age, gap = rng.uniform(20, 80, 200), rng.normal(0, 5, 200)
    predicted = 50 + 0.6 * (age - 50) + gap
    found = study_checks.corrected(age, predicted, np.arange(200).astype(str))
    assert np.corrcoef(predicted - age, age)[0, 1] < -0.8
    assert abs(np.corrcoef(found - age, age)[0, 1]) < 0.1
    assert np.corrcoef(found - age, gap)[0, 1] > 0.99


def test_ages_are_put_into_bands() -> None:
    ages = np.array(["3", "18", "39.9", "40", "74.5", "75", "91", ""])
    assert study_checks.banded(ages).tolist() == [
        "0 to 17", "18 to 39", "18 to 39", "40 to 59", "60 to 74", "from 75", "from 75", ""]
    assert set(study_checks.banded(np.array(["old", "young"]))) == {""}


def test_groups_of_people_are_scored_apart() -> None:
    """Told among women alone; two people of a third site are too few."""
    values, truth = cohort(120, signal=4)
    women = np.random.default_rng(2).random(120) < 0.5
    values[~women, 0] = 0
    site = np.array(["x", "y"] * 59 + ["z", "z"])
    found = study.study(people(values, dx=truth, sex=np.where(women, "F", "M"), site=site), "dx",
                        QUICK)
    scores = {(group.column, group.name): group.score for group in found.groups}
    assert set(scores) == {("sex", "F"), ("sex", "M"), ("site", "x"), ("site", "y"), ("site", "z")}
    assert scores["sex", "F"].low > 0.8 > 0.65 > scores["sex", "M"].value
    assert scores["site", "z"] is None


@pytest.mark.parametrize("informative", [True, False])
def test_region_volumes_stand_beside(informative: bool) -> None:
    values, truth = cohort(signal=0 if informative else 4)
    volumes = np.random.default_rng(3).normal(10, 1, (90, 6))
    volumes[:, 2] += 4 * truth * informative
    found = study.study(replace(people(values, dx=truth), volumes=volumes), "dx", QUICK)
    gain = next(gain for gain in found.gains if gain.over == study.VOLUMES)
    assert (gain.score.high < -0.2) if informative else (gain.score.low > 0.2)
    assert gain.p < 0.1 and VOLUMES_TOLD[informative](found.rows[study.VOLUMES].scores["auroc"])


VOLUMES_TOLD = {True: lambda score: score.low > 0.8, False: lambda score: score.value < 0.65}


# ---- studies -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("label", "how"), [
    ("dx", {"positive": ("AD",)}), ("three", {}), ("level", {"order": ("low", "mid", "high")}),
    ("number", {})])
def test_a_signal_is_told_and_shuffled_labels_are_not(label: str, how: dict) -> None:
    values, truth = cohort()
    three = np.digitize(values[:, 0], [0.5, 2.5])
    found = study.study(people(
        values, dx=np.where(truth, "AD", "CN"), three=np.array(["a", "b", "c"])[three],
        level=np.array(["low", "mid", "high"])[three], number=values[:, 0] * 10), label,
        Design(folds=3, repeats=1, **how))
    first = found.rows[ALONE].scores[found.metric]
    chance = study.CHANCE[found.metric]
    assert first.low > chance + 0.2 and first.num_people == 90
    assert found.rows[WITH].scores[found.metric].value > chance + 0.2
    assert found.rows[WITHOUT].scores[found.metric].value < chance + 0.2
    assert abs(found.rows[SHUFFLED].scores[found.metric].value - chance) < 0.25
    assert found.gains[0].score.low > 0 and found.gains[0].p < 0.1 and not found.warnings


@pytest.mark.parametrize("sites", [("x", "y"), ("11", "12")])  # numbers of sites are names
@pytest.mark.parametrize("planted", [True, False])
def test_a_planted_site_confound_is_caught(planted: bool, sites: tuple[str, str]) -> None:
    values, truth = cohort(signal=0 if planted else 3)
    rng = np.random.default_rng(1)
    site = np.where(rng.random(90) < (np.where(truth, 0.9, 0.1) if planted else 0.5), *sites)
    values[:, 1] += 4 * (site == sites[0])
    found = study.study(people(values, dx=truth, site=site), "dx", Design(
        folds=3, repeats=1, site="site"))
    assert found.site_told is not None and found.site_told.low > 0.7  # told in both cases
    if planted:
        assert found.rows[ALONE].scores["auroc"].value > 0.7
        assert found.rows[SITE].scores["auroc"].low > 0.6
        assert found.rows[LEFT_OUT].scores["auroc"].value < 0.65
        assert "dx goes with the site" in found.warnings[0]
        assert "what is told may be the site" in found.warnings[1]
    else:
        assert found.rows[LEFT_OUT].scores["auroc"].value > 0.8 and not found.warnings


def test_many_numbered_sites_and_one_of_few_people() -> None:
    values, truth = cohort(66)
    site = np.repeat(np.arange(22), 3).astype(str)
    site[0] = "99"
    found = study.study(people(values, dx=truth, site=site), "dx", Design(
        folds=3, repeats=1, site="site"))
    assert found.site_told is not None and found.num_sites == 21  # not 99 and what it leaves
    assert found.num_sites > targets.MOST_CLASSES
    # one of each name: site 20 is not taken for twice site 10
    assert design_of({"site": site}, ["site"]).shape == (66, 22)


def test_the_site_is_told_above_the_chance_of_those_told_apart() -> None:
    """Two large sites and eight of two people: chance is a half, not a tenth."""
    values, truth = cohort(96, signal=0)
    site = np.array([*("x" if dx else "y" for dx in truth[:80]),
                     *np.repeat([f"z{n}" for n in range(8)], 2)])
    found = study.study(people(values, dx=truth, site=site), "dx", Design(
        folds=3, repeats=1, site="site"))
    assert found.num_sites == 2 and found.site_told is not None
    assert 0.1 < found.site_told.low < 0.5
    assert "goes with the site" in found.warnings[0] and "tells the site" not in found.warnings[0]


def test_sites_of_other_shares_are_scored_at_the_threshold_that_was_taught() -> None:
    """A real signal; 9 of 10 have the diagnosis at one site, 1 of 10 at the other."""
    rng = np.random.default_rng(0)
    site = np.repeat(["x", "y"], 60)
    truth = (rng.random(120) < np.where(site == "x", 0.9, 0.1)).astype(int)
    values = rng.normal(size=(120, 4))
    values[:, 0] += 4 * truth
    left_out = study.study(people(values, dx=truth, site=site), "dx", Design(
        folds=3, repeats=1, site="site")).rows[LEFT_OUT].scores
    assert left_out["auroc"].value > 0.95 and left_out["balanced_accuracy"].value > 0.8


def test_the_threshold_does_not_move_with_who_is_drawn() -> None:
    """Predictions that hardly differ from the share of positives: no draw turns them over."""
    values, truth = cohort(90, signal=0)
    runner = scoring.Runner(target_of("dx", truth.astype(str)), people(values), Plan([]))
    predicted = (truth.mean() + 1e-3 * (2 * truth - 1))[:, None]
    more = np.r_[np.flatnonzero(truth), np.flatnonzero(truth == 0)[:20]]
    assert runner.value("balanced_accuracy", predicted, more) == 1


def test_a_covariate_of_numbers_and_words_is_refused() -> None:
    values, truth = cohort()
    age = np.array(["60"] * 89 + ["61y"])
    with pytest.raises(DataError, match=r"column 'age': '61y' is no number, others are"):
        study.study(people(values, dx=truth, age=age), "dx",
                    Design(folds=3, repeats=1, adjust=("age",)))


def test_what_is_adjusted_for_is_not_told() -> None:
    """The label follows age, and so do features; without age nothing is left."""
    rng = np.random.default_rng(0)
    age = rng.normal(60, 10, 90)
    values = rng.normal(size=(90, 8)) + (age[:, None] - 60) / 5
    found = study.study(people(values, score=age + rng.normal(0, 3, 90), age=age), "score",
                        Design(folds=3, repeats=1, adjust=("age",)))
    assert found.rows[ALONE].scores["r2"].value > 0.6
    assert found.rows["embedding, adjusted for age"].scores["r2"].value < 0.1
    assert found.gains[0].score.high < 0.1


def test_people_of_the_pretraining_teach_and_are_not_tested() -> None:
    values, truth = cohort()
    seen = np.arange(90) < 30
    found = study.study(people(values, seen, dx=truth), "dx", QUICK)
    known = np.isfinite(found.rows[ALONE].predicted[:, 0])
    assert not known[seen].any() and known[~seen].all()
    assert "30 of 90 people were seen" in found.warnings[0] and "not tested" in found.warnings[0]
    with pytest.raises(DataError, match=r"all 90 people were seen .*--allow-seen"):
        study.study(people(values, np.ones(90, bool), dx=truth), "dx", QUICK)
    allowed = study.study(people(values, seen, dx=truth), "dx",
                          Design(folds=3, repeats=1, allow_seen=True))
    assert np.isfinite(allowed.rows[ALONE].predicted).all()
    unknown = study.study(replace(people(values, dx=truth), seen=None), "dx", QUICK)
    assert "is not known" in unknown.warnings[0] and len(unknown.warnings) == 1
    assert "--allow-seen" in allowed.warnings[0]


def test_who_lacks_a_value_is_counted_and_codes_are_suspected() -> None:
    values, _ = cohort()
    score = (values[:, 0] * 3 + 50).round(2).astype(str)
    score[:2], age = "-999", np.array(["60"] * 90)
    score[2] = ""
    age[3:7] = ""
    age[7:] = np.arange(83).astype(str)
    found = study.study(people(values, score=score, age=age), "score",
                        Design(folds=3, repeats=1, adjust=("age",)))
    assert found.notes == ["1 people without score", "4 people without age",
                           "score: 2 values -999 look like a code for missing; add --missing -999 "
                           "if so"]


def test_a_repeat_is_a_plan_of_its_own() -> None:
    values, truth = cohort()
    found = study.study(people(values, dx=truth), "dx", Design(folds=3, repeats=2))
    predicted = found.rows[ALONE].predicted
    assert predicted.shape == (90, 2) and not np.array_equal(predicted[:, 0], predicted[:, 1])
    assert isinstance(Plan([]).testing(np.ones(3, bool)), Plan)


# ---- the command ---------------------------------------------------------------------------------

def test_the_command_writes_results_a_page_and_predictions_under_own_ids(
        embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, truth = cohort(40, signal=8)
    lines = [f"p{n},{'AD' if truth[n] else 'CN'},{n % 7 * 3.5}" for n in range(40)]
    write(embedded, {"my.csv": "participant_id,dx,score\n" + "\n".join(lines) + "\np77,AD,1\n"})
    assert downstream(["probe", str(embedded), "--labels", str(embedded / "my.csv"), "--label",
                       "dx", "score", "--positive", "AD", "--cv", "1x3", "--adjust", "age",
                       "--key", str(embedded / "key"), "--out", str(embedded / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 rows of the table without a scan" in said and "1 of 40 people were seen" in said
    record = json.loads((embedded / "out/results.json").read_text())
    assert record["schema"] == "neurojepa/probe/1" and "nested" in record["methods"] and (
        "moved from the class shares" in record["methods"])
    dx = record["results"]["dx"]
    assert dx["classes"] == ["CN", "AD"] and dx["scores"]["embedding"]["auroc"]["low"] > 0.6
    assert dx["people"] == 40 and record["notes"] == ["1 rows of the table without a scan"]
    rows = list(csv.DictReader((embedded / "out/predictions.csv").read_text().splitlines()))
    assert {row["participant_id"] for row in rows} == {f"p{n}" for n in range(1, 40)}
    right = [row for row in rows if row["label"] == "dx" and row["truth"] == row["predicted"]]
    assert len(right) > 30 and "AD=" in right[0]["probability"]
    assert os.stat(embedded / "out/predictions.csv").st_mode & 0o777 == 0o600
    page = (embedded / "out/report.html").read_text()
    assert "Look out: 1 of 40 people were seen" in page and page.count("<figure>") == 4
    assert "alt='How often those of each class" in page and not re.search(
        r"\bp17\b", re.sub("base64,[^'\"]*", "", page))


@pytest.mark.parametrize(("words", "message"), [
    (["--label", "dx", "--cv", "five"], "--cv five: write repeats x folds"),
    ([], "--label COLUMN"),
    (["--label", "iq"], "column 'iq': neither the table nor the scans have it"),
    (["--label", "dx", "--feed", "feed"], "not both"),
    (["--label", "dx", "age", "--adjust", "sex", "age"], "--adjust age: is the label itself"),
    (["--label", "dx", "--cohort", "ukb"], "--cohort ukb: the embeddings are of clinic"),
])
def test_the_command_says_what_is_missing(embedded: Path, words: list[str], message: str) -> None:
    write(embedded, {"my.csv": "participant_id,dx\np1,AD\np2,CN\n"})
    with pytest.raises(ConfigError, match=message):
        downstream(["probe", str(embedded), "--labels", str(embedded / "my.csv"), *words,
                    "--key", str(embedded / "key")])


def test_results_hold_no_number_that_json_cannot_say() -> None:
    assert finite({"a": [1.5, float("inf"), -np.inf], "b": (np.float64("nan"), "x", None, 3)}) == {
        "a": [1.5, None, None], "b": [None, "x", None, 3]}
