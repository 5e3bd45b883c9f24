"""Labels of the user's own table: joined by id, told by nested cross-validation, and nothing taken
for what it is not."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.identity import pseudonym
from neurojepa.downstream import crossval, scoring, study, study_checks, targets
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.crossval import Plan, nearest, plan_folds, plan_sites, predict
from neurojepa.downstream.features import design_of, harmonised, plain
from neurojepa.downstream.harmonise import Combat
from neurojepa.downstream.labels import People, join
from neurojepa.downstream.study import ALONE, LEFT_OUT, SHUFFLED, SITE, WITH, WITHOUT, Design
from neurojepa.downstream.table import read_embeddings
from neurojepa.downstream.targets import scorers, target_of
from neurojepa.errors import ConfigError, DataError, NeurojepaError
from tests.helpers.trees import write

KEY = b"a public key for invented people"
QUICK = Design(folds=3, repeats=1)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scoring, "DRAWS", 40)
    monkeypatch.setattr(study_checks, "SHUFFLES", 2)
    yield


def people(values: np.ndarray, seen: np.ndarray | None = None, **columns: np.ndarray) -> People:
    names = np.array([f"p{number:03d}" for number in range(len(values))])
    brain = np.random.default_rng(9).normal(1400, 100, len(values)).round(1)
    return People(values.astype(np.float32), names, names, names,
                  np.zeros(len(values), bool) if seen is None else seen,
                  {"brain_ml": brain.astype(str),
                   **{name: np.asarray(column).astype(str) for name, column in columns.items()}})


def cohort(number: int = 90, signal: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(number) % 2)
    values = rng.normal(size=(number, 8))
    values[:, 0] += signal * truth
    return values, truth


# ---- targets -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("values", "how", "kind", "classes"), [
    (["0", "1", "1"], {}, "binary", ("0", "1")),
    (["no", "yes"], {}, "binary", ("no", "yes")),
    (["CN", "AD"], {"positive": ["AD"]}, "binary", ("CN", "AD")),
    (["AD", "CN"], {"positive": ["CN"]}, "binary", ("AD", "CN")),
    (["AD", "CN", "MCI"], {"positive": ["AD"]}, "binary", ("not AD", "AD")),
    (["AD", "CN", "MCI"], {}, "multiclass", ("AD", "CN", "MCI")),
    (["AD", "CN", "MCI"], {"order": ["CN", "MCI", "AD"]}, "ordinal", ("CN", "MCI", "AD")),
    (["0", "0.5", "1"], {"order": ["0", "0.5", "1", "2"]}, "ordinal", ("0", "0.5", "1")),
    (["1", "2", "2.5"], {}, "regression", ()),
])
def test_what_a_label_asks_for(values: list[str], how: dict, kind: str,
                               classes: tuple[str, ...]) -> None:
    found = target_of("x", np.array(values), **how)
    assert (found.kind, found.classes) == (kind, classes)
    expected = [float(v) for v in values] if kind == "regression" else [
        float(classes.index(v) if v in classes else 0) for v in values]
    assert found.truth.tolist() == expected


@pytest.mark.parametrize(("values", "how", "words"), [
    (["AD", "AD"], {}, "all 2 people have 'AD'"),
    ([], {}, "nobody has it"),
    (["AD", "CN"], {}, "--positive AD or CN"),
    (["1", "2"], {}, "--positive 1 or 2"),  # in some cohorts 2 is the case
    (["1", "2"], {"order": ["1", "3"]}, "--order leaves out 2"),
    ([f"text {n}" for n in range(30)], {}, "30 different names"),
])
def test_a_label_that_cannot_be_told_says_why(values: list[str], how: dict, words: str) -> None:
    with pytest.raises(NeurojepaError, match=words):
        target_of("x", np.array(values), **how)


# ---- joining -------------------------------------------------------------------------------------

@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """Embeddings of 40 people, p0 to p39, of two visits each; p0 was seen in pretraining."""
    values, _ = cohort(40, signal=8)
    rows = [{"scan_id": f"s{n}-{visit}", "participant": pseudonym(KEY, "clinic", f"p{n}"),
             "family": pseudonym(KEY, "clinic", f"f{n // 2}"), "session": visit, "cohort": "clinic",
             "modality": "T1w", "site": "a", "split": "train", "brain_ml": 1000.0 + n,
             "age": 50.0 + n, "seen": n == 0, "embedding": (values[n] + (visit == "2")).tolist()}
            for n in range(40) for visit in ("1", "2")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "embeddings.parquet")
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    return tmp_path


def joined(folder: Path, text: str, **how: object) -> People:
    write(folder, {"labels.csv": text})
    return join(read_embeddings(str(folder)), str(folder / "labels.csv"), key=str(folder / "key"),
                **{"id_column": "id", **how})


def test_ids_meet_through_the_key_and_what_does_not_is_counted(embedded: Path) -> None:
    found = joined(embedded, "id,dx\nsub-p1,AD\np0,CN\np99,AD\np2,\n,CN\np1,AD\n")
    assert found.ids.tolist() == ["p0", "p1", "p2"] and found.seen.tolist() == [True, False, False]
    assert found.columns["dx"].tolist() == ["CN", "AD", ""]
    assert found.columns["age"].tolist() == ["50.0", "51.0", "52.0"]
    values, _ = cohort(40, signal=8)
    assert np.allclose(found.values, values[:3] + 0.5, atol=1e-6)  # the mean of two visits
    assert found.notes == ["1 rows without an id", "1 rows that stand twice, alike: counted once",
                           "1 rows of the table without a scan",
                           "37 people or visits with a scan but no row in the table"]


def test_visits_meet_by_session(embedded: Path) -> None:
    found = joined(embedded, "id;visit;mmse\np1;1;30\np1;2;28\n", session_column="visit")
    assert found.columns["mmse"].tolist() == ["30", "28"] and len(set(found.participant)) == 1
    assert np.allclose(found.values[1] - found.values[0], 1, atol=1e-6)


def test_codes_are_missing_values(embedded: Path) -> None:
    found = joined(embedded, "id\tx\np1\t-9\np2\tNaN\np3\t4\n", missing=["-9"])
    assert found.columns["x"].tolist() == ["", "", "4"]


def test_a_table_is_read_as_index_reads_tables(embedded: Path) -> None:
    write(embedded, {"labels.csv": "id;score\np1;0,5\np2;-\n".encode("utf-16")})
    found = join(read_embeddings(str(embedded)), str(embedded / "labels.csv"),
                 key=str(embedded / "key"), id_column="id")
    assert found.columns["score"].tolist() == ["0.5", ""]
    assert "1 x labels.csv: is utf-16, not UTF-8: decoded" in found.notes


def test_who_taught_is_unknown_where_one_scan_does_not_say(embedded: Path) -> None:
    rows = pq.read_table(embedded / "embeddings.parquet").to_pylist()
    rows[5]["seen"] = None  # of p2
    pq.write_table(pa.Table.from_pylist(rows), embedded / "embeddings.parquet")
    assert joined(embedded, "id\np2\np3\n").seen is None
    assert joined(embedded, "id\np0\np3\n").seen.tolist() == [True, False]


@pytest.mark.parametrize(("text", "how", "words"), [
    ("PK\3\4", {}, "save it as .csv"),
    ("id,dx\np1,AD\np1,CN\n", {}, "id 'p1' stands twice, with dx 'AD' and 'CN'"),
    ("id,dx\nq1,AD\n", {}, "none of its 1 ids"),
    ("id,dx\np1,AD\n", {"id_column": "eid"}, "no column 'eid'; it has id, dx"),
    ("id,dx\np1,AD,7\n", {}, "line 2: more cells"),
    ("id,dx\n", {}, "no table of text"),
    ("id,dx\np1,AD\n", {"modality": "PET"}, "the embeddings are of T1w"),
])
def test_a_table_that_does_not_fit_says_why(embedded: Path, text: str, how: dict,
                                            words: str) -> None:
    with pytest.raises(NeurojepaError, match=words):
        joined(embedded, text, **how)


# ---- cross-validation ----------------------------------------------------------------------------

def test_families_stay_whole_and_everyone_is_tested_once_a_repeat() -> None:
    family = np.repeat(np.arange(30), 3).astype(str)
    for truth in (np.repeat(np.arange(30) % 2, 3), np.random.default_rng(0).normal(size=90)):
        target = target_of("x", truth.astype(str))
        for folds in plan_folds(target, family, 5, 2).repeats:
            assert sorted(np.concatenate([test for _, test in folds])) == list(range(90))
            assert not [1 for train, test in folds if set(family[train]) & set(family[test])]
    site = np.array(["a", "b", "c"] * 30)  # every family is at all of them
    assert all(len(train) == 0 for train, _ in plan_sites(site, family).repeats[0])


def test_too_few_of_a_class_names_the_cure() -> None:
    target = target_of("dx", np.array(["1"] * 2 + ["0"] * 20))
    with pytest.raises(DataError, match=r"class '1' has 2 people .*--cv 5x2"):
        plan_folds(target, np.arange(22).astype(str), 5, 5)


def test_the_span_of_who_teaches_loses_nothing() -> None:
    """Many features: the same predictions as without rotation."""
    rng = np.random.default_rng(0)
    taught, tested = rng.normal(size=(20, 50)), rng.normal(size=(7, 50))
    truth = taught[:, 0] + rng.normal(size=20)
    _, _, basis = np.linalg.svd(taught, full_matrices=False)
    for fit, y in ((crossval._ridge, truth), (crossval.logistic, (truth > 0).astype(float))):
        whole = fit(taught, y, tested, np.array([0.1, 3.0]), 2)
        rotated = fit(taught @ basis.T, y, tested @ basis.T, np.array([0.1, 3.0]), 2)
        assert np.allclose(whole, rotated, atol=1e-3)
    from sklearn.linear_model import Ridge
    assert np.allclose(crossval._ridge(taught, truth, tested, np.array([3.0]), 0)[0],
                       Ridge(3.0).fit(taught, truth).predict(tested))


def test_the_grid_grows_where_its_best_value_lies_at_an_edge() -> None:
    rng = np.random.default_rng(0)
    family, noise = np.arange(60).astype(str), rng.normal(size=(60, 5))
    truth = rng.normal(size=60)
    target = target_of("x", truth.astype(str))
    best = crossval._best_penalty(target, crossval._ridge, 100 * noise, truth, family)
    assert best > crossval.PENALTIES.max()  # nothing to be learnt
    exact = noise @ rng.normal(size=5)
    target = target_of("x", exact.astype(str))
    assert crossval._best_penalty(target, crossval._ridge, noise, exact, family) < (
        crossval.PENALTIES.min())


def test_levels_are_probabilities_in_order() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 3))
    truth = np.digitize(x[:, 0] + 0.3 * rng.normal(size=90), [-0.5, 0.5]).astype(float)
    found = crossval._ordinal(x, truth, x, np.array([0.1]), 3)[0]
    assert np.allclose(found.sum(1), 1) and (found >= 0).all()
    assert scorers("ordinal")["rank_correlation"](truth, found[:, None]) > 0.8


def test_shuffled_labels_give_a_half() -> None:
    values, truth = cohort(60, signal=0)
    scores = []
    for seed in range(12):
        dealt = np.random.default_rng(seed).permutation(truth)
        target = target_of("x", dealt.astype(str))
        plan = plan_folds(target, np.arange(60).astype(str), 3, 1)
        found = predict(target, plain(values), plan, np.arange(60).astype(str))
        scores.append(scorers("binary")["auroc"](dealt, found))
    assert abs(np.mean(scores) - 0.5) < 0.06


@pytest.mark.parametrize("label", ["dx", "three", "number"])
def test_nearest_people_tell_what_no_line_does(label: str) -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 200)
    ring = np.arange(200) % 2  # an inner and an outer one
    values = (1 + 2 * ring)[:, None] * np.c_[np.cos(angle), np.sin(angle)]
    truth = {"dx": ring.astype(str), "three": np.where(ring, "c", np.where(angle > 3, "a", "b")),
             "number": ring * 10 + angle}[label]
    target, family = target_of(label, truth.astype(str)), np.arange(200).astype(str)
    plan = plan_folds(target, family, 4, 1)
    by_line, by_people = (predict(target, plain(values), plan, family, model)
                          for model in (crossval.linear, nearest))
    score = next(iter(scorers(target.kind).values()))
    assert score(target.truth, by_people) > max(0.9, score(target.truth, by_line) + 0.1)
    assert target.kind == "regression" or ((by_people > 0).all() and (by_people < 1).all())


def test_neighbours_of_the_own_family_choose_nothing() -> None:
    """Twins with equal features and labels: their likeness tells of nobody else."""
    rng = np.random.default_rng(0)
    family = np.repeat(np.arange(40), 2).astype(str)
    values, truth = np.repeat(rng.normal(size=(40, 4)), 2, 0), np.repeat(rng.normal(size=40), 2)
    target = target_of("x", truth.astype(str))
    found = nearest(target, values, rng.normal(size=(5, 4)), truth, family)
    assert np.abs(found - truth.mean()).max() < 0.6 * truth.std()  # not the nearest


def test_sensitivity_by_hand() -> None:
    score = scorers("binary")[targets.SENSITIVITY]
    truth = np.r_[np.zeros(10), np.ones(4)]
    predicted = np.r_[np.arange(10) / 10, 0.1, 0.8, 0.85, 0.95]  # 9 of 10 lie at .8 or below
    assert score(truth, predicted[:, None]) == 0.5
    assert np.isnan(score(np.ones(4), predicted[:4, None]))


def test_scores_by_hand() -> None:
    truth, predicted = np.array([0, 0, 1, 1.0]), np.array([0.1, 0.6, 0.6, 0.9])[:, None]
    binary = {name: scorer(truth, predicted) for name, scorer in scorers("binary").items()}
    assert binary["auroc"] == 7 / 8 and binary["balanced_accuracy"] == 0.75
    assert binary["brier"] == pytest.approx((0.01 + 0.36 + 0.16 + 0.01) / 4)
    numbers = scorers("regression")
    assert numbers["r2"](truth, truth[:, None]) == 1
    assert numbers["mean_absolute_error"](truth, predicted) == pytest.approx(0.3)
    certain = np.eye(3)[[0, 1, 2, 2]][:, None]
    classes = {name: scorer(np.array([0, 1, 2, 2.0]), certain)
               for name, scorer in scorers("multiclass").items()}
    assert classes == {"auroc": 1, "balanced_accuracy": 1, "brier": 0}


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


# ---- sites made alike ----------------------------------------------------------------------------

def scanned_at_sites(number: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, 12] as they are and as two sites with other people show them, sites, ages."""
    rng = np.random.default_rng(0)
    site = np.where(rng.random(number) < 0.4, "x", "y")
    age = rng.normal(50, 10, number) + 8 * (site == "x")  # x has older people
    true = rng.normal(size=(number, 12)) + age[:, None] * rng.normal(0.05, 0.02, 12)
    shown = true + (site == "x")[:, None] * rng.normal(3, 1, 12)
    shown *= np.where(site == "x", 1.6, 1)[:, None]
    return true, shown, site, age


def test_sites_are_made_alike_and_ages_are_kept() -> None:
    true, shown, site, age = scanned_at_sites()
    fitted = Combat.fit(shown[:160], site[:160], age[:160, None])
    alike = fitted.apply(shown, site, age[:, None])[160:]  # people who taught nothing
    x, differ = site[160:] == "x", (alike - true[160:])
    assert np.abs(differ[x].mean(0) - differ[~x].mean(0)).mean() < 0.35  # 3 before
    assert np.abs(np.log(alike[x].std(0) / alike[~x].std(0))).mean() < 0.2  # .5 before
    # without ages, what x's people owe to their age is taken for the site
    blind = Combat.fit(shown, site, np.zeros((240, 0))).apply(shown, site, np.zeros((240, 0)))
    assert np.allclose(blind[site == "x"].mean(0), blind[site == "y"].mean(0), atol=0.15)


def test_a_site_that_taught_nothing_or_too_few_stays_as_it_is() -> None:
    _, shown, site, _ = scanned_at_sites()
    none = np.zeros((240, 0))
    fitted = Combat.fit(shown[:200], np.where(np.arange(200) < 2, "z", site[:200]), none[:200])
    assert set(fitted.shift) == {"x", "y"}
    there = np.array(["z", "new"] * 120)
    assert np.allclose(fitted.apply(shown, there, none), shown)


def test_shrinkage_follows_the_published_equations() -> None:
    """At the fixed point of Johnson et al. 2007, and towards the mean of all features."""
    from neurojepa.downstream.harmonise import _shrunk

    rng = np.random.default_rng(0)
    rest = rng.normal(rng.normal(1, 0.3, 50), rng.uniform(0.8, 1.4, 50), (8, 50))
    shift, scale = _shrunk(rest)
    own, variance = rest.mean(0), rest.var(0, ddof=1)
    spread, middle = own.var(ddof=1), own.mean()
    level, varies = variance.mean(), variance.var(ddof=1)
    a, b = (2 * varies + level**2) / varies, (level * varies + level**3) / varies
    assert np.allclose(shift, (8 * spread * own + scale * middle) / (8 * spread + scale), atol=1e-3)
    squares = np.square(rest - shift).sum(0)
    assert np.allclose(scale, (squares / 2 + b) / (8 / 2 + a - 1), atol=1e-3)
    assert shift.std() < own.std() and scale.std() < variance.std()


def test_harmonised_features_are_fitted_on_who_teaches_alone() -> None:
    _, shown, site, _ = scanned_at_sites(90)
    train, test = np.arange(60), np.arange(60, 90)
    spoilt = shown.copy()
    spoilt[60:] *= 100
    once, again = (harmonised(values, site)(train, test)[0] for values in (shown, spoilt))
    assert np.array_equal(once, again)


def test_the_site_is_told_no_more_after_combat() -> None:
    values, truth = cohort(120)
    site = np.array(["x", "y"])[np.random.default_rng(1).permutation(np.arange(120) % 2)]
    values += 2 * (site == "x")[:, None]
    found = study.study(people(values, dx=truth, site=site), "dx", Design(
        folds=3, repeats=1, site="site"))
    assert found.site_told.low > 0.8 and found.site_told_alike.value < 0.65
    assert found.rows[study.ALIKE].scores["auroc"].low > 0.8


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
    assert "alt='How often those of each class" in page and "p17" not in page


@pytest.mark.parametrize(("words", "message"), [
    (["--label", "dx", "--cv", "five"], "--cv five: write repeats x folds"),
    ([], "--label COLUMN"),
    (["--label", "iq"], "column 'iq': neither the table nor the scans have it"),
    (["--label", "dx", "--feed", "feed"], "not both"),
])
def test_the_command_says_what_is_missing(embedded: Path, words: list[str], message: str) -> None:
    write(embedded, {"my.csv": "participant_id,dx\np1,AD\np2,CN\n"})
    with pytest.raises(ConfigError, match=message):
        downstream(["probe", str(embedded), "--labels", str(embedded / "my.csv"), *words,
                    "--key", str(embedded / "key")])
