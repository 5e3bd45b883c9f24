"""Pairs of visits: a planted change is told, a shuffled one is not, and bad tables say why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.change import (
    DIFFERENCE,
    FIRST,
    SHUFFLED,
    VOLUMES,
    WITHOUT,
    change,
    slope,
    visits_of,
)
from neurojepa.downstream.labels import People
from neurojepa.downstream.scoring import Row
from neurojepa.errors import NeurojepaError
from tests.helpers.embedded import write_embedded
from tests.helpers.trees import write

pytestmark = pytest.mark.usefixtures("few_draws")


def followed(number: int = 120, shown: bool = True, seed: int = 0) -> People:
    """People of three visits.  The label falls by a rate of each person's, which feature 0 shows at
    the first visit, and feature 1 by how it moves."""
    rng = np.random.default_rng(seed)
    rate = rng.normal(-1, 0.5, number)
    start, age = rng.normal(30, 3, number), rng.uniform(50, 80, number)
    since = np.column_stack([np.zeros(number), rng.uniform(1, 2, number),
                             rng.uniform(3, 5, number)])
    values = rng.normal(size=(number, 3, 6)) * 0.3 + rng.normal(size=(number, 1, 6))
    if shown:
        values[..., 0] += 4 * rate[:, None]
        values[..., 1] += rate[:, None] * since * 2
    score = start[:, None] + rate[:, None] * since + rng.normal(0, 0.4, (number, 3))
    names = np.repeat([f"p{n:03d}" for n in range(number)], 3)
    return People(
        values.reshape(-1, 6).astype(np.float32), names, names, names,
        np.zeros(3 * number, bool),
        {"mmse": score.round(3).ravel().astype(str),
         "age": (age[:, None] + since).round(3).ravel().astype(str),
         "sex": np.repeat(rng.choice(["F", "M"], number), 3)},
        sessions=np.tile(["1", "2", "3"], number))


def test_a_planted_change_is_told() -> None:
    found = change(followed(), "mmse", "age", adjust=("sex",), folds=4, repeats=1)
    scores = {name: row.scores["r2"] for name, row in found.rows.items()}
    assert scores[DIFFERENCE].low > 0.5 and scores[FIRST].low > 0.5
    assert scores[WITHOUT].value < 0.25 and scores[SHUFFLED].value < 0.1
    assert found.gains[0].score.low > 0.3 and VOLUMES not in scores
    # people change by .5 a year more for one sd, and a prediction is nearly that
    by_row = {each.row: each for each in found.slopes}
    assert by_row[DIFFERENCE].value == pytest.approx(0.45, abs=0.1)
    assert by_row[FIRST].low > 0.25 and by_row[FIRST].p < 1e-6 and by_row[FIRST].converged


def test_what_scans_do_not_show_is_not_told() -> None:
    found = change(followed(shown=False), "mmse", "age", folds=4, repeats=1)
    for name in (DIFFERENCE, FIRST):
        assert found.rows[name].scores["r2"].value < 0.08
    assert all(abs(each.value) < 0.2 for each in found.slopes if each.row != WITHOUT)


@pytest.mark.slow(20)
def test_people_who_differ_in_pace_do_not_make_chance_look_certain() -> None:
    """Random predictions: without slopes of people at random 17 of 100 p would lie below .05."""
    visits, _ = visits_of(followed(80, shown=False), "mmse", "age")
    rng = np.random.default_rng(0)
    p = [slope(visits, Row(rng.normal(size=(80, 1)), {}), "chance").p for _ in range(60)]
    assert np.mean(np.array(p) < 0.05) < 0.12


def test_the_first_and_last_visit_make_a_pair_whatever_their_order() -> None:
    people = followed(20)
    turned = people.take(np.arange(60)[::-1])
    visits, _ = visits_of(turned, "mmse", "age")
    assert set(turned.sessions[visits.first]) == {"1"}
    assert set(turned.sessions[visits.last]) == {"3"}
    assert (visits.span > 0).all()
    by_hand = (visits.value[visits.last] - visits.value[visits.first]) / visits.span
    assert np.array_equal(visits.change, by_hand) and -2 < by_hand.mean() < 0


def test_volumes_stand_beside_and_people_of_the_pretraining_are_not_tested() -> None:
    people = followed(60)
    people = replace(people, volumes=people.values.astype(float),
                     seen=np.repeat(np.arange(60) < 12, 3))
    found = change(people, "mmse", "age", folds=3, repeats=1)
    assert found.rows[VOLUMES].scores["r2"].value == pytest.approx(
        found.rows[DIFFERENCE].scores["r2"].value, abs=1e-6)
    assert found.rows[DIFFERENCE].scores["r2"].num_people == 48
    assert "12 of 60 people were seen" in found.warnings[0]


def spoilt(people: People, **columns: object) -> People:
    return replace(people, columns={**people.columns, **columns})


@pytest.mark.parametrize(("make", "words"), [
    (lambda p: replace(p, sessions=None), "--session COLUMN"),
    (lambda p: spoilt(p, age=np.repeat(p.columns["age"][::3], 3)),
     "id 'p000': two visits have the same age"),
    (lambda p: spoilt(p, mmse=np.array(["good", *p.columns["mmse"][1:]])), "'good' is no number"),
    (lambda p: spoilt(p, mmse=np.full(60, "3")), "changes alike in all 20 people"),
    (lambda p: p.take(np.arange(60) % 3 == 0), "0 people have two visits"),
])
def test_what_cannot_be_told_is_said(make: object, words: str) -> None:
    with pytest.raises(NeurojepaError, match=words):
        change(make(followed(20)), "mmse", "age", folds=3, repeats=1)


def test_visits_without_a_value_are_counted() -> None:
    people = followed(20)
    values = people.columns["mmse"].copy()
    values[0], values[4], values[5] = "", "", ""  # of p000 one, of p001 two
    visits, notes = visits_of(spoilt(people, mmse=values), "mmse", "age")
    assert notes == ["3 people without mmse", "1 people with one visit"]
    assert len(visits.first) == 19


def test_covariates_are_those_of_the_first_visit_alone() -> None:
    people = followed(20)
    sex = np.where(np.arange(60) % 3 == 0, people.columns["sex"], "")  # never told again
    sex[3] = ""
    found = change(spoilt(people, sex=sex), "mmse", "age", adjust=("sex",), folds=3, repeats=1)
    assert found.notes == ["1 people without sex at their first visit"]
    assert len(found.target.truth) == 19 and len(found.visits.value) == 60
    assert (found.visits.span > 2).all()  # to the third visit


def test_a_prediction_that_is_the_same_for_all_has_no_slope() -> None:
    visits, _ = visits_of(followed(20), "mmse", "age")
    found = slope(visits, Row(np.ones((20, 1)), {}), "nothing")
    assert np.isnan(found.value) and np.isnan(found.p) and not found.converged


def test_the_command_writes_results_and_a_page(tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    people = followed(40)
    write_embedded(tmp_path, people.values, people.ids, session=people.sessions.tolist())
    lines = [",".join([people.ids[n], f"ses-{people.sessions[n]}", people.columns["age"][n],
                       people.columns["mmse"][n], people.columns["sex"][n] if n % 3 == 0 else ""])
             for n in range(120)]  # a sex at the first visit alone
    write(tmp_path, {"my.csv": "participant_id,visit,age,mmse,sex\n" + "\n".join(lines)})
    assert downstream(["change", str(tmp_path), "--labels", str(tmp_path / "my.csv"), "--session",
                       "visit", "--time", "age", "--label", "mmse", "--adjust", "sex", "--cv",
                       "1x3", "--key", str(tmp_path / "key"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "mmse: difference of scans: r2 0." in said and "mixed model, first scan: +0." in said
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["schema"] == "neurojepa/change/1" and record["people"] == 40
    assert [each["row"] for each in record["mixed_models"]] == [WITHOUT, FIRST, DIFFERENCE]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<figure>") == 2 and "Mixed models" in page
    assert "moved from the mean of those who taught" in record["methods"]
    assert "p values come from 40 draws" in page and "none can be below 0.049" in page
    rows = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert len(rows) == 41 and rows[1].startswith("p000,1,3,")
