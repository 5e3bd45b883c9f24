"""One way of training and one seed in the table of tasks, in a process of its own.

    python -m tools.bench._downstream_tasks FOLDER

    recipe.yaml, run.json -> training -> T1w of first and second visits embedded
    -> the models and folds of study, survive, change, transfer (neurojepa/downstream) -> scores.npz

Those of split test alone are tested, by folds that keep a source's people together, so the others
of split test teach, too, beside those of train and val.  What is stored of a score is its value and
what it is for each of ``DRAWS`` draws of the people tested, the same for every method, so that the
table can take means over seeds and paired differences.

With ``volumes`` in run.json, automatic region volumes take the place of embeddings; with ``code``,
a session code is learnt on the weights of ``teacher``, and embeddings are of h.  With --cost it
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
from neurojepa.downstream import survive as survivals
from neurojepa.downstream import transfer as transfers
from neurojepa.downstream.cox import cox
from neurojepa.downstream.crossval import Plan, plan_folds, predict
from neurojepa.downstream.embed import embed, fit_places, reference_rows, select_rows
from neurojepa.downstream.features import Features, beside, design_of, plain
from neurojepa.downstream.labels import People
from neurojepa.downstream.regions import load_regions
from neurojepa.downstream.scoring import Row, Runner, known
from neurojepa.downstream.sessions import rows_of_sessions, session_code
from neurojepa.downstream.stats import resamples
from neurojepa.downstream.targets import Target, classes_of, target_of
from neurojepa.downstream.volumes import tissue_volumes
from neurojepa.errors import run_command
from neurojepa.feed.format import Feed, open_feed
from neurojepa.feed.labels import scan_labels
from neurojepa.model.averaged import Averaged
from neurojepa.weights import load
from tools.bench._alff import LINKS
from tools.bench._compare_run import cost_of_step, spent_on
from tools.bench._people import FEEDS, Cohort
from tools.bench._quality_run import finish, predicted_by, trained
from tools.bench.common import spent_s

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
    changes, train_s = json.loads((folder / "run.json").read_text()), 0.0
    if changes.get("volumes"):
        model, found = None, [volumes(feed, config.model.patch_voxels) for feed in (first, second)]
    else:
        model = trained(config, folder)
        train_s = spent_on(folder)
        if changes.get("unread"):  # the first stage of others
            finish(folder, {"train_cpu_s": np.array(train_s)})
            return
        if changes.get("code"):
            model, train_s = with_code(Path(changes["teacher"]), first, config.train.seed)
        found = embedded(model, config, first, second)
    people = [people_of(feed, values)
              for feed, values in zip((first, second), found, strict=True)]
    scores = tasks(people[0], people[1], alff_of(second))
    if isinstance(model, CNN):
        scores |= of_its_head(model, config, first, people[0])
    finish(folder, scores | {"train_cpu_s": np.array(train_s)})


# ---- features ------------------------------------------------------------------------------------

def with_code(teacher: Path, feed: Feed, seed: int) -> tuple[Averaged, float]:
    """A model of weights that is read through a code of sessions, as ``neurojepa code`` learns it,
    and the CPU seconds of both stages."""
    began, weights = spent_s(), load(str(teacher))
    rows = rows_of_sessions(feed, select_rows(feed, None, None, "train"))
    weights.model.session_code, _ = session_code(weights.model, weights.config, feed, rows,
                                                 seed=seed)
    return weights.model, spent_on(teacher.parent) + spent_s() - began


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


def told(people: People, target: Target, folds: Plan, columns: dict[str, str],
         *covariates: str) -> Scores:
    """A target by features, by covariates and by both; a metric for each column."""
    run, scores = Runner(target, people, folds), {}
    for row, features in ways(people, people.values, *covariates).items():
        predicted = predict(target, features, folds, people.family)
        scores |= {row + column: drawn(partial(run.value, metric, predicted),
                                       np.flatnonzero(known(predicted)), people)
                   for column, metric in columns.items()}
    return scores


def ways(people: People, values: np.ndarray, *covariates: str) -> dict[str, Features]:
    """What the rows of a table read of people."""
    design = design_of({name: people.column(name) for name in covariates})
    return {ALONE: plain(values), WITHOUT: plain(design), WITH: beside(values, design)}


def folds_of(target: Target, people: People) -> Plan:
    """Folds of whole families, of whom those of split test are tested."""
    assert people.seen is not None
    return plan_folds(target, people.family, FOLDS, REPEATS).testing(~people.seen)


def labels_told(people: People) -> Scores:
    """Age and diagnosis."""
    scores: Scores = {}
    for label, columns in OF_LABEL.items():
        target = target_of(label, people.column(label), ("patient",))
        scores |= told(people, target, folds_of(target, people), columns,
                       *(name for name in ("age", "sex") if name != label), "brain_ml")
    return scores


def survived(people: People) -> Scores:
    """When something happens: Harrell's C, and that of the true risk."""
    followed, _ = survivals.followed(people, "event_years", "event", None)
    folds = folds_of(Target("event", "binary", followed.event.astype(float)), people)
    horizons = np.median(followed.time[followed.event], keepdims=True)
    run = survivals.Runner(followed, folds, horizons, horizons[:0])
    risk = plain(design_of({"log_hazard": people.column("log_hazard")}))
    scores = {}
    for row, features in (ways(people, people.values, "age", "sex", "brain_ml")
                          | {TRUE: risk}).items():
        predicted = run.predict(features, cox)
        whom = survivals.scored(predicted)
        scores[row + SURVIVAL] = drawn(run.scorers(predicted, whom)["c_index"], whom, people)
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
    run = transfers.Runner(people, target, folds_of(
        Target("target", "regression", target[:, 0]), people))
    scores = {}
    for row, features in ways(people, people.values, "age", "sex", "brain_ml").items():
        found = run(features)
        r2 = run.scorers(found.predicted, found.truth)["r2"]
        scores[row + column] = drawn(r2, np.flatnonzero(known(found.predicted)), people)
    return scores


def sites(people: People) -> Scores:
    """Age where nobody of the site and of the source taught, and whether the site is told."""
    site, seen = people.column("site"), people.seen
    assert seen is not None
    age, target = target_of("age", people.column("age")), classes_of("site", site)
    outside = Plan([[(np.flatnonzero(seen & (site != name)), np.flatnonzero(~seen & (site == name)))
                     for name in np.unique(site)]], pooled=False)
    return (told(people, age, outside, {UNSEEN: "r2"}, "sex", "brain_ml")
            | told(people, target, folds_of(target, people), {SITE: "balanced_accuracy"},
                   "age", "sex", "brain_ml"))


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
    """``drawn`` of a row whose folds these are."""
    run = Runner(target, people, folds_of(target, people))
    return drawn(partial(run.value, metric, row.predicted),
                 np.flatnonzero(known(row.predicted)), people)


def drawn(value: Callable[[np.ndarray], float], whom: np.ndarray, people: People) -> np.ndarray:
    """[1 + DRAWS]: ``value(indices)`` of the people ``whom``, and of draws of source and person."""
    return np.array([value(whom), *(value(whom[each]) for each in resamples(
        people.participant[whom], people.family[whom], DRAWS))])


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1]), "--cost" in sys.argv), teardown=False)
