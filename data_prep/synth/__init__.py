"""A synthetic cohort as a BIDS tree: whole heads whose truth is known.

    seed, index -> person (cohort.py) -> head of each visit (anatomy.py, warp.py)
                -> scans and label maps (person.py, scanner.py, contrast.py, series.py)
                -> files, tables (here)

Age, sex, two diagnoses and amyloid change volumes, lesions, contrast, shape and uptake by the
effect sizes of cohort.py; sites differ, some people are siblings.  The truth, volumes counted on
the final label maps and what volumes do not hold, stands in the tables.  Every scan shows a marker
on the person's right.  The same call makes the same bytes, whatever the number
of workers; an interrupted one continues, person by person.  code/synth.json, written first, says
what the tree is to become; dataset_description.json, written last, that it is whole.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_prep.synth import tables
from data_prep.synth.anatomy import anatomy_names, load_anatomy, ventricle_ml
from data_prep.synth.cohort import SyntheticPerson, choose_anatomy, draw_person
from data_prep.synth.person import file_names, make_visit
from neurojepa.errors import ConfigError, DataError
from neurojepa.storage import join, read_bytes, walk, write_bytes

__all__ = ["synthesise"]

VERSION = 4  # of the recipe: the same version and arguments give the same bytes
PEOPLE_PER_TASK = 4
RECIPE = "code/synth.json"


def synthesise(out: str, *, participants: int, seed: int = 0, spacing_mm: float = 2.0,
               workers: int = 2, anatomies: Path | None = None, linked: float = 0.0) -> None:
    """Make a synthetic cohort, or what is missing of it.

    Parameters
    ----------
    out : directory or URI of the BIDS tree
    participants : number of people; about 2.5 scans each
    seed : of everything that is drawn
    spacing_mm : voxel size of the T1w scans and label maps
    workers : processes
    anatomies : folder of whole-head label maps (synthseg_training_seg_*.nii.gz, 1 mm); without it
        sixteen anatomies are derived from the MNI152 template that nilearn ships
    linked : share of people whose uptake (PET) and fluctuation (BOLD) follow their anatomy

    Raises
    ------
    ConfigError
        An argument is out of range.
    DataError
        ``out`` holds something else, or a tree of other arguments; the anatomies are unreadable.
    """
    for name, value, low, high in (("participants", participants, 1, 10 ** 6),
                                   ("seed", seed, 0, 2 ** 63), ("workers", workers, 1, 1024),
                                   ("spacing_mm", spacing_mm, 0.8, 8), ("linked", linked, 0, 1)):
        if not low <= value <= high:
            raise ConfigError(f"{name}={value}: must be between {low} and {high}")
    present = _listing(out)
    asked = {"version": VERSION, "seed": seed, "participants": participants,
             "spacing_mm": float(spacing_mm), "linked": float(linked),
             "anatomies": anatomy_names(anatomies)}
    ventricles = _claim(out, asked, present, anatomies, workers)
    people = [draw_person(seed, index, linked) for index in range(participants)]
    origin = {person.label: choose_anatomy(person, ventricles) for person in people}
    missing = [person for person in people if not _expected(person) <= present]
    if not missing and tables.COMMIT in present:
        print(f"synth: {out} is complete ({participants} people), nothing to do", flush=True)
        return
    if len(missing) < participants:
        print(f"synth: {participants - len(missing)} people are there already", flush=True)
    tasks = [(out, group, name, anatomies, seed, spacing_mm)
             for name, group in _grouped(missing, origin)]
    start, done = time.monotonic(), 0
    for num in _run(_make_people, tasks, workers):
        done += num
        print(f"synth: {done}/{len(missing)} people, {time.monotonic() - start:.0f} s", flush=True)
    for path, data in tables.dataset_files(out, people, origin=origin, recipe=asked).items():
        write_bytes(join(out, path), data)  # the last one is the commit record


def _claim(out: str, asked: dict[str, Any], present: set[str], anatomies: Path | None,
           workers: int) -> dict[str, float]:
    """Make ``out`` ours, or check that it is; returns each anatomy's ventricle volume."""
    if RECIPE in present:
        recipe = json.loads(read_bytes(join(out, RECIPE)))
        ventricles = recipe.pop("ventricle_ml")
        for name, value in asked.items():
            if recipe.get(name) != value:
                raise DataError(f"{out}: was made with {name}={recipe.get(name)}, now asked for "
                                f"{name}={value}; choose another --out or the same arguments")
        return ventricles
    if present:
        raise DataError(f"{out}: holds {len(present)} files but no {RECIPE}, so it is not a "
                        "synthetic cohort; choose an empty --out")
    names = asked["anatomies"]
    volumes = _run(ventricle_ml, [(name, anatomies) for name in names], workers)
    ventricles = dict(zip(names, volumes, strict=True))
    write_bytes(join(out, RECIPE), json.dumps(asked | {"ventricle_ml": ventricles},
                                              indent=1).encode())
    return ventricles


def _listing(out: str) -> set[str]:
    """Paths below ``out`` of all that is there."""
    return {path for path in walk(out) if not path.endswith(".tmp")}


def _expected(person: SyntheticPerson) -> set[str]:
    """Paths of all files of a person."""
    paths = {tables.sessions_path(person)}
    for visit in person.visits:
        names = file_names(person, visit)
        paths |= set(names.values())
        paths |= {names[m].replace(".nii.gz", ".json") for m in visit.modalities}
    return paths


def _grouped(people: list[SyntheticPerson], origin: dict[str, str]
             ) -> Iterator[tuple[str, list[SyntheticPerson]]]:
    """Small groups of people of one anatomy, since reading an anatomy takes a while."""
    for name in sorted(set(origin.values())):
        same = [person for person in people if origin[person.label] == name]
        for first in range(0, len(same), PEOPLE_PER_TASK):
            yield name, same[first:first + PEOPLE_PER_TASK]


def _make_people(out: str, people: list[SyntheticPerson], name: str, anatomies: Path | None,
                 seed: int, spacing_mm: float) -> int:
    """Make and write all files of people of one anatomy; each one's table last."""
    anatomy = load_anatomy(name, anatomies)
    for person in people:
        volumes = []
        for visit in person.visits:
            files, measured = make_visit(anatomy, person, visit, seed=seed, spacing_mm=spacing_mm)
            for path, data in files.items():
                write_bytes(join(out, path), data)
            volumes.append(measured)
        write_bytes(join(out, tables.sessions_path(person)), tables.sessions(person, volumes))
    return len(people)


def _run(function: Callable[..., Any], tasks: list[tuple[Any, ...]],
         workers: int) -> Iterator[Any]:
    """Results of ``function(*task)`` in the order of ``tasks``, by some worker processes."""
    if workers == 1 or len(tasks) < 2:
        yield from (function(*task) for task in tasks)
        return
    pool = ProcessPoolExecutor(min(workers, len(tasks)), multiprocessing.get_context("spawn"))
    try:
        for future in [pool.submit(function, *task) for task in tasks]:
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, most likely for memory (each needs about "
                        "1 GB); run the same command again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
