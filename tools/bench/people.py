"""people: are people who are made straight on the grid like the same people after preparation?

Heads of some people that `compare` tests are scanned once more in two ways: straight on the
training grid, as _people.py makes them, and as files of 1 mm with skull, shading and a place of
their own, which go through index, prepare and pack.  Both differ from the scan that compare has by
what a rescan differs by; files differ by what preparation does, too.  Encoders are those of seed 0:

    distance       mean squared distance of the embeddings of two scans of a person, in variances
                   between people (those to learn from; each feature in its deviations)
    same for all   share of it that is the mean over people, so a shift that they have in common
    found          people whose scan is the most similar to their first one, among all
    age            of T1w scans, by a ridge on the people to learn from, who are all made straight

--work is the folder of compare, whose people and weights are taken; what is made stays there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.linear_model import RidgeCV

from data_prep.pack import placed_table, write_tar
from data_prep.rows import Status, flags_of
from data_prep.synth import scanner
from data_prep.synth.cohort import SyntheticPerson, draw_person, truths
from neurojepa.downstream.embed import Embeddings, embed, fit_places, reference_rows, select_rows
from neurojepa.downstream.scans import prepare_scans
from neurojepa.downstream.sessions import rows_of_sessions, session_code
from neurojepa.downstream.stats import r_squared
from neurojepa.errors import ConfigError
from neurojepa.feed.format import LABELS_SCHEMA, Feed, commit_feed, is_brain, open_feed
from neurojepa.feed.loader import SampleReader
from neurojepa.storage import write_bytes
from neurojepa.weights import Weights, load, untrained
from tools.bench import compare
from tools.bench._mixing import Mixer, label_folder, mixer
from tools.bench._people import (
    DOSES,
    GRIDS,
    MODALITIES,
    SLICE_MM,
    Cohort,
    head_of,
    make_person,
    plan_shards,
    signal_of,
)
from tools.bench.common import ROOT, machine, print_table

PEOPLE = 20
INNER = 3  # voxels that the middle of the brain is away from its edge
LYING_MM, LYING_DEGREES = 10.0, 4.0  # of heads in a scanner, as in data_prep/synth/person.py
MOVED = (0.5, 0.7)  # degrees and mm between scans of a session
Person = tuple[Mixer, SyntheticPerson]


def run(quick: bool, official: str | None, work: str | None = None) -> dict[str, Any]:
    """Make what is missing, embed and print the table; returns its rows."""
    cohort = compare.FULL.cohort
    folder = Path(work or ROOT / "build" / "bench-compare") / "full"
    for name in ("mae-with-tissue-head-0", "first-stage-0"):
        if not (folder / "runs" / name / "weights" / "config.json").exists():
            raise ConfigError(f"--work {folder}: no weights of {name}; run compare there")
    print(machine())
    made = folder / ("people-quick" if quick else "people")
    people = chosen(cohort, folder, 3 if quick else PEOPLE)
    again = scanned_again(people, cohort, made / "again")
    files = written(people, cohort, made / "files")
    prepared = prepare_scans([str(files)], str(made / "prepared"), GRIDS[cohort.grid])
    names = {pseudonym: own.removeprefix("sub-") for pseudonym, own in prepared.ids.items()}
    print(judged(prepared.about.to_pylist(), names))
    first = open_feed(str(folder / "feed"))
    others = {"straight again": (open_feed(again), {}),
              "through preparation": (prepared.feed, names)}
    found = {f"{name}, {what}": figures for name, weights in encoders(folder / "runs", first)
             for what, figures in compared(weights, first, others).items()}
    columns = ("people", "distance", "same for all", "found", "age R2", "age R2, first scan")
    print_table(("", *columns), [(name, *map(figures.get, columns))
                                 for name, figures in found.items()])
    seen = {f"{modality}, {way}": beside(first, feed, names, modality)
            for modality in MODALITIES for way, (feed, names) in others.items()}
    print("\nBrain masks and gradients within the brain, beside those of the first scan")
    print_table(("", *next(iter(seen.values()))), [(name, *figures.values())
                                                   for name, figures in seen.items()])
    return found | seen


def chosen(cohort: Cohort, work: Path, count: int) -> list[Person]:
    """People of split test, evenly spread over it, with what their heads come from."""
    folder, cache = label_folder(), work.parent / "anatomies"
    tested = [(shard, index) for shard in plan_shards(cohort, work, folder)
              if shard.split == "test" for index in shard.people]
    return [(mixer(shard.source, shard.others, folder, cache), draw_person(cohort.seed, index))
            for shard, index in tested[::-(-len(tested) // count)]]


# ---- scans ---------------------------------------------------------------------------------------

def scanned_again(people: list[Person], cohort: Cohort, feed: Path) -> str:
    """A feed of other scans of these people, made straight on the grid."""
    if not (feed / "feed.json").exists():
        samples = []
        for mixed, person in people:
            scans, _ = make_person(mixed, person, cohort, again=True)
            samples += [({**row, "split": "test", "family": "again"}, *data)
                        for row, *data in scans]
        data, placed = write_tar(samples)
        name = "shards/again.tar"
        write_bytes(str(feed / name), data)
        rows = placed_table(placed, name)
        commit_feed(str(feed), GRIDS[cohort.grid], rows=rows,
                    labels=LABELS_SCHEMA.empty_table(),
                    source=f"again: {cohort!r}")
    return str(feed)


def written(people: list[Person], cohort: Cohort, folder: Path) -> Path:
    """A BIDS dataset of these people; a person who is there is not written again."""
    write_bytes(str(folder / "dataset_description.json"),
                json.dumps({"Name": "People", "BIDSVersion": "1.8.0"}).encode())
    for number, (mixed, person) in enumerate(people, 1):
        last = folder / f".sub-{person.label}"  # hidden, so that it is not taken for a scan
        if last.exists():
            continue
        for modality, data in raw_scans(mixed, person, cohort).items():
            write_bytes(str(folder / f"sub-{person.label}/anat/sub-{person.label}_{modality}"
                                     ".nii.gz"), data)
        last.touch()
        print(f"sub-{person.label}: {number}/{len(people)} people written", flush=True)
    return folder


def raw_scans(mixed: Mixer, person: SyntheticPerson, cohort: Cohort) -> dict[str, bytes]:
    """Files of a person's first visit by modality: 1 mm, T2w and FLAIR in slices of their site's
    thickness, and with all of the coil's shading."""
    head, texture, _ = head_of(mixed, person, cohort)
    dose, visit = DOSES[cohort.dose], person.visits[0]
    rng = np.random.default_rng([cohort.seed, 12, person.index])
    lying = scanner.Pose(scanner.rotation(rng, LYING_DEGREES), rng.uniform(-1, 1, 3) * LYING_MM)
    own_contrast = truths(person, visit.age)["t1w_contrast"]
    files = {}
    for modality in MODALITIES:
        if modality == "FLAIR" and person.index % cohort.flair_every:
            continue
        pose = lying if modality == "T1w" else lying.moved(rng, *MOVED)
        view = scanner.draw_view(rng, head, pose, np.ones(3))
        signal = signal_of(view, rng, person, modality, own_contrast, texture, dose, dose)
        affine = view.grid.affine.copy()
        if modality != "T1w":
            thick = round(SLICE_MM * person.site.slices)
            signal = signal[:, :, ::thick]
            affine[:3, 2] *= thick
        signal *= 4000 / signal.max()
        files[modality] = scanner.store(np.rint(signal), affine=affine, dtype=np.int16,
                                        orientation=view.orientation, slope=1.0)
    return files


def judged(rows: list[Any], names: dict[str, str]) -> str:
    """Which scans preparation rejected, and how many it flagged for what."""
    rejected = [f"{names[row['participant']]} {row['modality']}" for row in rows
                if row["status"] == Status.REJECTED]
    flagged = Counter(row["status"] for row in rows)[Status.FLAGGED]
    flags = Counter(flag for row in rows for flag in flags_of(row))
    return (f"of {len(rows)} scans preparation rejected {', '.join(rejected) or 'none'}, "
            f"and flagged {flagged}: "
            + (", ".join(f"{flag} {count}" for flag, count in flags.most_common()) or "-"))


# ---- what an encoder makes of them ---------------------------------------------------------------

def encoders(runs: Path, feed: Feed) -> Iterator[tuple[str, Weights]]:
    """An untrained one, MAE with the head, and the session code."""
    mae = load(str(runs / "mae-with-tissue-head-0" / "weights"))
    yield "random init", untrained(mae.config, mae.grid)
    yield "MAE with tissue head", mae
    first = load(str(runs / "first-stage-0" / "weights"))
    rows = rows_of_sessions(feed, select_rows(feed, None, None, "train"))
    first.model.session_code, _ = session_code(first.model, first.config, feed, rows)
    yield "session code", first


def compared(weights: Weights, first: Feed, others: dict[str, tuple[Feed, dict[str, str]]]
             ) -> dict[str, dict[str, float]]:
    """How scans of each way differ from those of ``first``; ``others`` come with the names that
    ``first`` has for their people."""
    model, config, figures = weights.model, weights.config, {}
    for modality in MODALITIES:
        train = select_rows(first, modality, None, "train")
        places = fit_places(model, config, first, reference_rows(first, train))
        taught = embed(model, config, first, train, places)
        spread = taught.values.std(0) + 1e-6
        known = by_person(embed(model, config, first, select_rows(first, modality, None, "test"),
                                places), {})
        for way, (feed, names) in others.items():
            found = by_person(embed(model, config, feed, select_rows(feed, modality, None),
                                    places), names)
            people = sorted(found)
            ours, theirs = (np.stack([each[person] for person in people])
                            for each in (known, found))
            figures[f"{modality}, {way}"] = {
                "people": len(people), **differences(ours / spread, theirs / spread),
                **(ages(taught, first, people, ours, theirs) if modality == "T1w" else {})}
    return figures


def beside(first: Feed, other: Feed, names: dict[str, str], modality: str) -> dict[str, float]:
    """How masks and sharpness of a modality's scans compare with those of the first ones; means
    over people, of the mean gradient in the middle of the brain."""
    ours, theirs = images(first, {}, modality), images(other, names, modality)
    rows = []
    for person, image in theirs.items():
        pair = [(each, is_brain(each)) for each in (ours[person], image)]
        (_, before), (_, after) = pair
        sharp = [np.linalg.norm(np.gradient(each.astype(np.float32)), axis=0)[
            ndimage.binary_erosion(brain, iterations=INNER)].mean() for each, brain in pair]
        rows.append((2 * (before & after).sum() / (before.sum() + after.sum()),
                     after.sum() / before.sum(), sharp[1] / sharp[0]))
    dice, size, gradient = np.mean(rows, 0).tolist()
    return {"Dice of masks": dice, "size of mask": size, "gradient": gradient}


def images(feed: Feed, names: dict[str, str], modality: str) -> dict[str, np.ndarray]:
    """Each person's volume of a modality, uint8 codes; the first where there are several."""
    reader, found = SampleReader(feed), {}
    for row in select_rows(feed, modality, None)[::-1].tolist():
        person = reader.value("participant", row)
        found[names.get(person, person)] = row
    return {person: reader.image(row) for person, row in found.items()}


def by_person(found: Embeddings, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Each person's embedding."""
    return {names.get(person, person): value for person, value in
            zip(found.participant.tolist(), found.values, strict=True)}


def differences(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How the second scans [n, D] of people differ from their first; in deviations of people."""
    apart = theirs - ours
    alike = _unit(theirs - theirs.mean(0)) @ _unit(ours - ours.mean(0)).T
    return {"distance": float(np.square(apart).mean()),
            "same for all": float(np.square(apart.mean(0)).mean() / np.square(apart).mean()),
            "found": float((alike.argmax(1) == np.arange(len(ours))).mean())}


def _unit(values: np.ndarray) -> np.ndarray:
    return values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-9)


def ages(taught: Embeddings, feed: Feed, people: list[str], ours: np.ndarray,
         theirs: np.ndarray) -> dict[str, float]:
    """How well a ridge on people of train tells the ages of these, from second and first scans."""
    age = taught.labels(feed.labels(), "age").astype(float)
    ridge = RidgeCV(np.logspace(-1, 5, 13)).fit(taught.values, age)
    labels = feed.labels().to_pylist()
    known = {row["participant"]: float(row["value"]) for row in labels if row["name"] == "age"}
    truth = np.array([known[person] for person in people])
    return {"age R2": r_squared(truth, ridge.predict(theirs)),
            "age R2, first scan": r_squared(truth, ridge.predict(ours))}
