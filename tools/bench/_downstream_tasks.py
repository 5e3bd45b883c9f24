"""One way of training and one seed in the table of tasks, in a process of its own.

    python -m tools.bench._downstream_tasks FOLDER

    recipe.yaml, run.json -> training -> T1w of first and second visits embedded
    -> study, survive, change, transfer (neurojepa/downstream), as users run them -> scores.npz

Those of split test alone are tested, by folds that keep a source's people together, so the others
of split test teach, too, beside those of train and val.  What is stored of a score is its value and
what it is for each of ``DRAWS`` draws of the people tested, the same for every method, so that the
table can take means over seeds and paired differences.

With ``volumes`` in run.json, automatic region volumes take the place of embeddings.  With --cost it
prints the CPU seconds of a step instead.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.synth.cohort import draw_person
from data_prep.synth.events import draw_event
from neurojepa.baselines.cnn import CNN
from neurojepa.config import RootConfig, load_config
from neurojepa.downstream import change as changes
from neurojepa.downstream import study as studies
from neurojepa.downstream import survive as survivals
from neurojepa.downstream import transfer as transfers
from neurojepa.downstream.crossval import Plan, plan_folds
from neurojepa.downstream.embed import embed, fit_places, reference_rows, select_rows
from neurojepa.downstream.features import Features, beside, design_of, plain
from neurojepa.downstream.labels import People
from neurojepa.downstream.regions import load_regions
from neurojepa.downstream.scoring import Row, Runner, known
from neurojepa.downstream.stats import resamples
from neurojepa.downstream.targets import Target, classes_of, target_of
from neurojepa.downstream.volumes import tissue_volumes
from neurojepa.errors import run_command
from neurojepa.feed.format import Feed, open_feed
from neurojepa.feed.labels import scan_labels
from neurojepa.model.averaged import Averaged
from tools.bench._alff import LINKS
from tools.bench._compare_run import cost_of_step, spent_on
from tools.bench._people import FEEDS, Cohort
from tools.bench._quality_run import finish, predicted_by, trained

DRAWS, FOLDS, REPEATS = 1000, 5, 1
SEED = Cohort().seed  # of the people
LABEL, CHANGES = ("age", "sex", "diagnosis", "ventricle_ml"), "ventricle_ml"
# rows of a cell: the method, what anyone knows, both, and the risk that events were drawn from
ALONE, WITHOUT, WITH, TRUE = "", "covariates: ", "with covariates: ", "true risk: "
AGE, ERROR, DIAGNOSIS, SURVIVAL, CHANGE, LINKED, NULL, UNSEEN, SITE = COLUMNS = (
    "age R2", "age MAE, y", "diagnosis AUROC", "survival C", "change r", "ALFF R2",
    "ALFF R2, no link", "age R2, unseen site", "site told")
OF_LABEL = {"age": {AGE: "r2", ERROR: "mean_absolute_error"}, "diagnosis": {DIAGNOSIS: "auroc"}}
Scores = dict[str, np.ndarray]  # [1 + DRAWS] by row and column


def main(folder: Path, cost: bool) -> None:
    config = load_config(folder / "recipe.yaml")
    if cost:
        print(json.dumps(cost_of_step(config)))
        return
    first = open_feed(config.data.feed)
    second = open_feed(str(Path(config.data.feed).parent / FEEDS[1]))
    if json.loads((folder / "run.json").read_text()).get("volumes"):
        model, found = None, [volumes(feed, config.model.patch_voxels) for feed in (first, second)]
    else:
        model = trained(config, folder)
        found = embedded(model, config, first, second)
    people = [people_of(feed, values)
              for feed, values in zip((first, second), found, strict=True)]
    scores = tasks(people[0], people[1], alff_of(second))
    if isinstance(model, CNN):
        scores |= of_its_head(model, config, first, people[0])
    finish(folder, scores | {"train_cpu_s": np.array(spent_on(folder))})


# ---- features ------------------------------------------------------------------------------------

def embedded(model: Averaged, config: RootConfig, first: Feed, second: Feed) -> list[np.ndarray]:
    """Embeddings [n, D] of the T1w of both feeds, compared with places of the first."""
    rows = [select_rows(feed, "T1w", None) for feed in (first, second)]
    places = None if isinstance(model, CNN) else fit_places(
        model, config, first, reference_rows(first, rows[0]))
    return [embed(model, config, feed, each, places).values
            for feed, each in zip((first, second), rows, strict=True)]


def volumes(feed: Feed, patch: int) -> np.ndarray:
    """[n, V] ml of fluid, grey and white matter in each region, as ``embed`` writes them."""
    _, found = tissue_volumes(feed, select_rows(feed, "T1w", None), load_regions(feed.grid, patch),
                              patch)
    return found.reshape(len(found), -1)


def people_of(feed: Feed, values: np.ndarray) -> People:
    """Those with a T1w in a feed, what is known of them, and when something happened to them."""
    rows = select_rows(feed, "T1w", None)
    about = {name: np.array(feed.index[name].to_pylist())[rows]
             for name in ("participant", "family", "session", "split", "site", "num_foreground")}
    columns = {name: _labels(feed, rows, name) for name in LABEL}
    events = [draw_event(SEED, draw_person(SEED, int(label) - 1))
              for label in about["participant"].tolist()]
    columns |= {
        "site": about["site"],
        "brain_ml": (about["num_foreground"] * feed.grid.spacing_mm**3 / 1000).astype(str),
        "event_years": np.array([str(event.years) for event in events]),
        "event": np.array([str(int(event.happened)) for event in events]),
        "log_hazard": np.array([str(event.log_hazard) for event in events])}
    return People(values, about["participant"], about["participant"], about["family"],
                  about["split"] != "test", columns, sessions=about["session"])


def alff_of(feed: Feed) -> dict[str, np.ndarray]:
    """[n, lobes] of those with a T1w, with the link and without it."""
    rows, names = select_rows(feed, "T1w", None), sorted(set(feed.labels()["name"].to_pylist()))
    return {link: np.stack([_labels(feed, rows, name).astype(float) for name in names
                            if name.startswith(link + ": ")], 1) for link in LINKS}


def _labels(feed: Feed, rows: np.ndarray, name: str) -> np.ndarray:
    people, sessions = (np.array(feed.index[key].to_pylist())[rows].tolist()
                        for key in ("participant", "session"))
    return scan_labels(feed.labels(), name, people=people, sessions=sessions)


# ---- tasks ---------------------------------------------------------------------------------------

def tasks(first: People, second: People, alff: dict[str, np.ndarray]) -> Scores:
    """All columns, of people at their first visit and of those who came again."""
    scores = labels_told(first) | survived(first) | sites(first) | changed(first, second)
    for column, link in zip((LINKED, NULL), LINKS, strict=True):
        scores |= moved_to_function(second, alff[link], column)
    return scores


def labels_told(people: People) -> Scores:
    """Age and diagnosis."""
    scores: Scores = {}
    rows = {ALONE: studies.ALONE, WITHOUT: studies.WITHOUT, WITH: studies.WITH}
    for label, columns in OF_LABEL.items():
        adjust = tuple(name for name in ("age", "sex") if name != label)
        found = studies.study(people, label, studies.Design(FOLDS, REPEATS, adjust,
                                                            positive=("patient",)))
        scores |= {row + column: of_row(found.rows[name], found.target, found.people, metric)
                   for row, name in rows.items() for column, metric in columns.items()}
    return scores


def survived(people: People) -> Scores:
    found = survivals.survive(people, "event_years", "event", adjust=("age", "sex"),
                              reference="log_hazard", folds=FOLDS, repeats=REPEATS)
    run = survivals.Runner(found.followed, Plan([]), found.horizons, found.shown)
    scores = {}
    for row, name in {ALONE: survivals.ALONE, WITHOUT: survivals.WITHOUT, WITH: survivals.WITH,
                      TRUE: "log_hazard"}.items():
        predicted = found.rows[name].predicted
        whom = survivals.scored(predicted)
        scores[row + SURVIVAL] = drawn(run.scorers(predicted, whom)["c_index"], whom,
                                       found.followed.people)
    return scores


def changed(first: People, second: People) -> Scores:
    """How fast the ventricles grow between two visits: rank correlation."""
    both = People(*(np.concatenate([getattr(first, name), getattr(second, name)]) for name in (
        "values", "ids", "participant", "family", "seen")),
        {name: np.concatenate([first.column(name), second.column(name)])
         for name in first.columns},
        sessions=np.concatenate([first.sessions, second.sessions]))
    found = changes.change(both, CHANGES, "age", adjust=("sex",), folds=FOLDS, repeats=REPEATS)
    start = found.visits.people.take(found.visits.first)
    return {row + CHANGE: of_row(found.rows[name], found.target, start, "rank_correlation")
            for row, name in {ALONE: changes.DIFFERENCE, WITHOUT: changes.WITHOUT,
                              WITH: changes.WITH}.items()}


def moved_to_function(people: People, target: np.ndarray, column: str) -> Scores:
    """ALFF of lobes from the T1w of the same visit: the share of variance that is told."""
    found = transfers.transfer(people, target, adjust=("age", "sex"), folds=FOLDS, repeats=REPEATS)
    scores = {}
    for row, name in {ALONE: transfers.ALONE, WITHOUT: transfers.WITHOUT,
                      WITH: transfers.WITH}.items():
        told = found.rows[name]
        rest, whole = (np.square(each).sum((1, 2)) for each in (told.truth - told.predicted,
                                                                told.truth))

        def r2(whom: np.ndarray, rest: np.ndarray = rest, whole: np.ndarray = whole) -> float:
            return float(1 - rest[whom].sum() / whole[whom].sum())

        scores[row + column] = drawn(r2, np.flatnonzero(known(told.predicted)), found.people)
    return scores


def sites(people: People) -> Scores:
    """Age where nobody of the site and of the source taught, and whether the site is told."""
    site, seen = people.column("site"), people.seen
    assert seen is not None
    age = Target("age", "regression", people.column("age").astype(float))
    outside = Plan([[(np.flatnonzero(seen & (site != name)), np.flatnonzero(~seen & (site == name)))
                     for name in np.unique(site)]], pooled=False)
    target = classes_of("site", site)
    folds = plan_folds(target, people.family, FOLDS, REPEATS).testing(~seen)
    scores = {}
    for column, run, metric, covariates in (
            (UNSEEN, Runner(age, people, outside), "r2", ("sex", "brain_ml")),
            (SITE, Runner(target, people, folds), "balanced_accuracy",
             ("age", "sex", "brain_ml"))):
        design = design_of({name: people.column(name) for name in covariates})
        ways: dict[str, Features] = {ALONE: plain(people.values), WITHOUT: plain(design),
                                     WITH: beside(people.values, design)}
        for row, features in ways.items():
            predicted = run(features).predicted
            scores[row + column] = drawn(partial(run.value, metric, predicted),
                                         np.flatnonzero(known(predicted)), people)
    return scores


def of_its_head(model: CNN, config: RootConfig, feed: Feed, people: People) -> Scores:
    """What a network's own head says of the label that it was taught."""
    label = config.objective.label
    found = predicted_by(model, config, feed)
    said = dict(zip(found[f"{label}/people"].tolist(), found[f"{label}/predicted"], strict=True))
    row = Row(np.array([[said.get(each, np.nan)] for each in people.participant.tolist()]), {})
    target = target_of(label, people.column(label), ("patient",))
    return {column: of_row(row, target, people, metric)
            for column, metric in OF_LABEL[label].items()}


# ---- scores --------------------------------------------------------------------------------------

def of_row(row: Row, target: Target, people: People, metric: str) -> np.ndarray:
    """``drawn`` of a row of study or change, whose folds these are."""
    assert people.seen is not None
    folds = plan_folds(target, people.family, FOLDS, REPEATS).testing(~people.seen)
    return drawn(partial(Runner(target, people, folds).value, metric, row.predicted),
                 np.flatnonzero(known(row.predicted)), people)


def drawn(value: Callable[[np.ndarray], float], whom: np.ndarray, people: People) -> np.ndarray:
    """[1 + DRAWS]: ``value(indices)`` of the people ``whom``, and of draws of source and person."""
    return np.array([value(whom), *(value(whom[each]) for each in resamples(
        people.participant[whom], people.family[whom], DRAWS))])


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1]), "--cost" in sys.argv), teardown=False)
