"""Times to an event: models against statsmodels and by hand, scores against hand-worked cases, and
a known hazard found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.synth.cohort import draw_person
from data_prep.synth.events import draw_event
from neurojepa.downstream import survive as module
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.cox import Efron, baseline, cox, discrete, fit_cox, periods
from neurojepa.downstream.labels import first_visits
from neurojepa.downstream.stats import auroc
from neurojepa.downstream.survival import (
    brier_parts,
    concordance,
    dynamic,
    kaplan_meier,
    uncensored,
)
from neurojepa.downstream.survive import (
    ALONE,
    DISCRETE,
    NOBODY,
    SHUFFLED,
    WITHOUT,
    followed,
    survive,
)
from neurojepa.errors import NeurojepaError
from tests.helpers.embedded import people, write_embedded
from tests.helpers.trees import write

pytestmark = pytest.mark.usefixtures("few_draws")


def cohort(number: int = 200, effect: float = 1.0, seed: int = 0
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, 6], times to the tenth (so some are tied), events, log hazards."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(number, 6))
    risk = effect * values[:, 0]
    wait, end = rng.exponential(size=number) / (0.2 * np.exp(risk)), rng.uniform(1, 12, number)
    return values, np.maximum(np.minimum(wait, end).round(1), 0.1), wait <= end, risk


# ---- models --------------------------------------------------------------------------------------

@pytest.mark.parametrize("digits", [1, 0])  # few ties, and many
def test_cox_is_that_of_statsmodels_with_ties(digits: int) -> None:
    from statsmodels.duration.hazard_regression import PHReg

    values, time, event, _ = cohort(150)
    time = np.maximum(time.round(digits), 0.1)
    expected = PHReg(time, values, status=event, ties="efron").fit()
    assert np.allclose(fit_cox(values, time, event, 0), expected.params, atol=1e-4)
    assert Efron.of(time, event)(values @ expected.params)[0] == pytest.approx(
        expected.llf, abs=1e-6)


def test_the_gradient_and_curvature_are_those_of_the_likelihood() -> None:
    values, time, event, _ = cohort(60)
    likelihood, at = Efron.of(time.round(), event), np.full(6, 0.3)
    _, slope, curve = likelihood(values @ at, values)
    for k, step in enumerate(1e-5 * np.eye(6)):
        above, below = (likelihood(values @ (at + sign * step), values) for sign in (1, -1))
        assert slope[k] == pytest.approx((above[0] - below[0]) / 2e-5, rel=1e-4, abs=1e-4)
        assert np.allclose(-curve[k], (above[1] - below[1]) / 2e-5, rtol=1e-3, atol=1e-3)


def test_a_penalty_shrinks_and_few_people_with_many_features_are_told() -> None:
    values, time, event, _ = cohort(80)
    sizes = [np.linalg.norm(fit_cox(values, time, event, penalty)) for penalty in (0.1, 10, 1000)]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    wide = np.hstack([values, np.random.default_rng(1).normal(size=(80, 200))]) / 14
    family = np.arange(80).astype(str)
    found = cox(wide[:60], wide[60:], time[:60], event[:60], family[:60], np.array([1.0]))
    assert found.shape == (20, 2) and np.isfinite(found).all()


def test_the_baseline_by_hand() -> None:
    """Breslow with equal people: one over those at risk, added up (Nelson and Aalen)."""
    time, event = np.array([1, 2, 2, 3.0]), np.array([True, True, False, True])
    assert baseline(np.zeros(4), time, event, np.array([0.5, 1, 2.5, 3])) == pytest.approx(
        [0, 1 / 4, 1 / 4 + 1 / 3, 1 / 4 + 1 / 3 + 1])


@pytest.mark.parametrize("model", [cox, discrete])
def test_predicted_shares_are_those_that_happen(model: module.Model) -> None:
    values, time, event, risk = cohort(600)
    horizons = np.array([1.0, 3.0, 6.0])
    found = model(values[:400], values[400:], time[:400], event[:400],
                  np.arange(400).astype(str), horizons)
    true = np.exp(-0.2 * np.exp(risk[400:, None]) * horizons)
    assert np.abs(found[:, 1:] - true).mean() < 0.06
    assert np.corrcoef(found[:, 0], risk[400:])[0, 1] > 0.95
    assert (np.diff(found[:, 1:], axis=1) <= 1e-12).all()  # shares fall


def test_periods_by_hand() -> None:
    """Ends at 1, 2, 4: an event in the second, a censoring in the third and at the second's end."""
    person, interval, fell = periods(np.array([1.5, 3.0, 2.0]), np.array([True, False, False]),
                                     np.array([1.0, 2.0, 4.0]))
    assert person.tolist() == [0, 0, 1, 1, 2, 2] and interval.tolist() == [0, 1, 0, 1, 0, 1]
    assert fell.tolist() == [False, True, False, False, False, False]


# ---- curves and scores ---------------------------------------------------------------------------

def test_kaplan_meier_by_hand() -> None:
    curve = kaplan_meier(np.array([1, 2, 2, 3, 4.0]), np.array([1, 1, 0, 1, 0], bool))
    assert curve.times.tolist() == [1, 2, 3]
    assert curve.share == pytest.approx([4 / 5, 4 / 5 * 3 / 4, 4 / 5 * 3 / 4 / 2])
    assert curve.at(np.array([0.5, 2, 9])) == pytest.approx([1, 0.6, 0.3])
    assert curve.at(np.array([2.0]), before=True) == pytest.approx([0.8])
    assert (curve.low < curve.share).all() and (curve.share < curve.high).all()


def test_kaplan_meier_is_that_of_statsmodels() -> None:
    from statsmodels.duration.survfunc import SurvfuncRight

    _, time, event, _ = cohort(80)
    expected = SurvfuncRight(time, event.astype(int))
    curve = kaplan_meier(time, event)
    assert np.allclose(curve.at(expected.surv_times), expected.surv_prob)


def test_of_one_time_events_come_before_censorings() -> None:
    """In whole years many are tied: by no event and no censoring is what is seen of both."""
    assert uncensored(np.array([1.0, 1]), np.array([True, False])).share.tolist() == [0]
    rng = np.random.default_rng(0)
    wait, end = (np.ceil(rng.exponential(6, 3000)) for _ in range(2))
    time, event = np.minimum(wait, end), wait <= end
    for horizon in (2.0, 5.0, 8.0):
        both = [curve(time, event).at(np.array([horizon]))[0]
                for curve in (kaplan_meier, uncensored)]
        assert both[0] * both[1] == pytest.approx((time > horizon).mean())
        parts = brier_parts(time, event, np.full((3000, 1), both[0]), horizon)
        assert parts.mean() == pytest.approx(both[0] * (1 - both[0]))


def test_an_interval_that_nobody_outlived_is_told() -> None:
    values = np.random.default_rng(0).normal(size=(6, 2))
    time, event = np.r_[np.full(5, 5.0), 4], np.array([1, 1, 1, 1, 1, 0], bool)
    family = np.arange(6).astype(str)
    found = discrete(values, values[:2], time, event, family, np.array([5.0]))
    assert found[:, 1].tolist() == [0, 0]


def test_concordance_by_hand() -> None:
    """Of pairs (1,2) (1,3) (2,3) where 1 and 2 had events; the censored one outlives its tie."""
    time, event = np.array([1.0, 2.0, 2.0]), np.array([True, True, False])
    ones = np.ones(3)
    assert concordance(time, event, np.array([[3.0], [2], [1]])).share(ones) == 1
    assert concordance(time, event, np.array([[1.0], [2], [2]])).share(ones) == (0 + 0 + 0.5) / 3
    drawn = np.array([2.0, 1, 0])  # the third was not drawn, the first twice
    assert concordance(time, event, np.array([[3.0], [2], [9]])).share(drawn) == 1
    assert np.isnan(concordance(time, ~np.ones(3, bool), np.zeros((3, 1))).share(ones))


def test_scores_without_censoring_are_the_plain_ones() -> None:
    _, time, _, risk = cohort(120)
    event = np.ones(120, bool)
    assert dynamic(time, event, risk[:, None], 2.0).share(np.ones(120)) == pytest.approx(
        auroc((time <= 2).astype(float), risk))
    share = np.random.default_rng(0).random(120)
    assert brier_parts(time, event, share[:, None], 2.0).mean() == pytest.approx(
        np.square(share - (time > 2)).mean())


def test_weights_make_up_for_who_was_censored() -> None:
    """Half of all are censored at random; the scores are about those of everyone followed."""
    rng = np.random.default_rng(0)
    risk = rng.normal(size=3000)
    wait = rng.exponential(size=3000) / (0.2 * np.exp(risk))
    end = rng.exponential(6, 3000)
    time, event, everyone = np.minimum(wait, end), wait <= end, np.ones(3000, bool)
    share = np.exp(-0.2 * np.exp(risk) * 3)
    for name, score in (("auc", lambda t, e: dynamic(t, e, risk[:, None], 3).share(np.ones(3000))),
                        ("brier", lambda t, e: brier_parts(t, e, share[:, None], 3).mean())):
        assert score(time, event) == pytest.approx(score(wait, everyone), abs=0.02), name
    assert uncensored(time, event).at(np.array([6.0]))[0] == pytest.approx(np.exp(-1), abs=0.04)


# ---- the study -----------------------------------------------------------------------------------

def test_a_known_hazard_is_told_and_shuffled_times_are_not() -> None:
    values, time, event, risk = cohort(200, effect=1.2)
    found = survive(people(values, t=time, e=event.astype(int), hazard=risk.round(4)), "t", "e",
                    reference="hazard", folds=3, repeats=1)
    scores = {name: row.scores for name, row in found.rows.items()}
    best = scores["hazard"]["c_index"].value
    assert best > 0.7 and scores[ALONE]["c_index"].value > best - 0.03
    assert scores[DISCRETE]["c_index"].value > best - 0.04
    assert scores[WITHOUT]["c_index"].low < 0.58
    # folds that taught other curves do not order people
    assert {value.value for name, value in scores[NOBODY].items() if name != "brier"} == {0.5}
    assert abs(scores[SHUFFLED]["c_index"].value - 0.5) < 0.08
    assert scores[ALONE]["brier"].value < scores[NOBODY]["brier"].value - 0.01
    assert found.gains[0].score.low > 0.05 and len(found.shown) == 3


@pytest.mark.parametrize(("columns", "words"), [
    ({"t": [1, 2, 3], "e": [0, 0, 0]}, "all 3 people are censored"),
    ({"t": [1, -2, 3], "e": [0, 1, 0]}, "id 'p001': t is -2"),
    ({"t": [1, 2, 3], "e": ["0", "", "1"]}, "id 'p001' has t '2' but no e"),
    ({"t": ["1", "", "3"], "e": [1, 0, 1]}, "id 'p001' has e '0' but no t"),
    ({"t": ["1", "2y", "3"], "e": [1, 0, 1]}, "'2y' is no number"),
    ({"t": [1, 2, 3], "e": ["dead", "alive", "dead"]}, "--positive alive"),
    ({"t": [1, 2, 3], "e": [1, 1, 1], "brain_ml": [1, 1, 1]}, "happened to 3 people .* 5 folds"),
])
def test_what_cannot_be_told_is_said(columns: dict, words: str) -> None:
    with pytest.raises(NeurojepaError, match=words):
        survive(people(np.zeros((3, 2)), **columns), "t", "e")


def test_who_has_neither_time_nor_event_is_left_out_and_counted() -> None:
    values, time, event, _ = cohort(60)
    times, events = time.astype(str), np.where(event, "dead", "alive")
    times[:4] = events[:4] = ""
    found = survive(people(values, t=times, e=events), "t", "e", positive="dead", folds=2,
                    repeats=1)
    assert found.notes == ["4 people without t and e"] and len(found.followed.time) == 56
    seen = replace(people(values, t=time, e=event.astype(int)), seen=np.arange(60) < 10)
    tested = survive(seen, "t", "e", folds=2, repeats=1)
    assert tested.rows[ALONE].scores["c_index"].num_people == 50
    assert "10 of 60 people were seen" in tested.warnings[0]


# ---- the synthetic cohort ------------------------------------------------------------------------

def test_event_times_follow_the_hazard_that_the_table_tells() -> None:
    events = [draw_event(3, draw_person(3, index)) for index in range(600)]
    risk = np.array([each.log_hazard for each in events])
    time, event = (np.array([getattr(each, name) for each in events])
                   for name in ("years", "happened"))
    assert fit_cox(risk[:, None], time, event, 0)[0] == pytest.approx(1, abs=0.2)
    assert 0.3 < event.mean() < 0.8 and len(set(time.tolist())) < 200  # some are tied
    assert concordance(time, event, risk[:, None]).share(np.ones(600)) > 0.7
    assert draw_event(3, draw_person(3, 5)) == events[5] != draw_event(4, draw_person(3, 5))


def test_later_scans_do_not_tell_who_lived_to_have_them() -> None:
    def scan(person: str, session: str, age: float | None) -> dict[str, object]:
        return {"participant": person, "session": session, "age": age, "embedding": [0.0]}

    scans = pa.Table.from_pylist([
        scan("a", "post", 61.0), scan("a", "pre", 60.0), scan("a", "pre", None),
        scan("b", "m12", None), scan("b", "m6", 50.0), scan("b", "m6", 50.0), scan("c", "10", 40.0),
        scan("d", "2", 40.0), scan("d", "10", 40.0)])
    table, said = first_visits(scans, scans)
    assert [(row["participant"], row["session"]) for row in table.to_pylist()] == [
        ("a", "pre"), ("a", "pre"), ("b", "m6"), ("b", "m6"), ("c", "10"), ("d", "2")]
    assert said[0].startswith("3 people have several visits; their first one is taken, by age, or "
                              "by name for 2 whose ages are not known or equal")
    assert first_visits(table, table) == (table, [])
    # where a first visit has other scans alone
    assert first_visits(scans.slice(0, 1), scans)[1][0].startswith("1 people have no such scan at")


def test_times_that_look_like_codes_are_told() -> None:
    times = np.where(np.arange(40) < 3, 999, np.arange(40) % 9 + 1)
    _, notes = followed(people(np.zeros((40, 2)), years=times, died=np.ones(40, int)), "years",
                        "died", None)
    assert notes == ["years: 3 values 999 look like a code for missing; add --missing 999 if so"]


def test_a_person_of_two_rows_is_named() -> None:
    twice = people(np.zeros((4, 2)), years=np.arange(4), died=np.ones(4, int))
    twice = replace(twice, participant=np.array(["x", "x", "y", "z"]))
    with pytest.raises(NeurojepaError, match=r"id 'p000' has 2 visits in the table; .* one row"):
        followed(twice, "years", "died", None)


# ---- the command ---------------------------------------------------------------------------------

def test_the_command_writes_results_and_a_page(tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    values, time, event, risk = cohort(80, effect=1.5)
    n = np.arange(80)
    write_embedded(tmp_path, values, [f"p{each}" for each in n],
                   brain_ml=(1400.0 + n % 9).tolist(), age=(50.0 + n % 7).tolist())
    lines = [f"p{n},{time[n]},{int(event[n])},{risk[n]:.3f},{'FM'[n % 2]}" for n in range(80)]
    write(tmp_path, {"my.csv": "participant_id,years,died,hazard,sex\n" + "\n".join(lines)})
    assert downstream(["survive", str(tmp_path), "--labels", str(tmp_path / "my.csv"), "--time",
                       "years", "--event", "died", "--reference", "hazard", "--adjust", "age",
                       "sex", "--cv", "1x3", "--key", str(tmp_path / "key"),
                       "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "died: embedding, discrete time: c_index 0." in said and "died: hazard: c_index" in said
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["schema"] == "neurojepa/survive/1" and record["events"] == int(event.sum())
    assert record["scores"]["embedding"]["c_index"]["low"] > 0.6
    assert "Efron" in record["methods"] and record["gains"][0]["p_holm"] < 0.2
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<figure>") == 2 and "Kaplan-Meier curves of 80 people" in page
    predictions = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert len(predictions) == 81 and predictions[0].startswith("participant_id,years,died")
