"""The two halves of ``segment``: teach a network from labelled scans, and find regions in others.

    fit:    OUT/model.safetensors, config.json, fit.json (state.safetensors on the way)
    apply:  OUT/dataset_description.json, dseg.tsv, volumes.csv, results.json, report.html, and
            OUT/sub-X[/ses-Y]/anat/sub-X[_ses-Y]_T1w_dseg.nii.gz, or STEM_dseg.nii.gz
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from os.path import basename
from typing import Any

import numpy as np
import torch

from neurojepa import __version__
from neurojepa.downstream import segment_page as pages
from neurojepa.downstream.images import read_image, read_labels, stem_of
from neurojepa.downstream.output import write_description, write_task
from neurojepa.downstream.regions import names_beside
from neurojepa.downstream.segment import (
    Recipe,
    Segmenter,
    build,
    load_segmenter,
    read_config,
    save_model,
)
from neurojepa.downstream.segment_fit import fit, taught
from neurojepa.downstream.segment_score import score
from neurojepa.downstream.segmenter import Model, Segmentation
from neurojepa.errors import ConfigError, DataError
from neurojepa.storage import exists, join, read_bytes, write_bytes

PLAN = "fit.json"  # what a fit learns from, so that it goes on with nothing else

# ---- fit -----------------------------------------------------------------------------------------

def run_fit(scans: Sequence[str], labels: Sequence[str], out: str, *, steps: int, mm: float,
            device: torch.device) -> None:
    """Teach a network and write it; the same call goes on with one that was stopped.

    Raises
    ------
    ConfigError
        Scans and labels are not as many or of other people, two regions have one name, a number
        cannot be, or something else lies in ``out``.
    DataError
        A file cannot be read, or labels do not lie in their scan.
    """
    _check_pairs(scans, labels, "--labels")
    if steps < 1 or not 0.5 <= mm <= 8:
        raise ConfigError(f"--steps {steps} --mm {mm:g}: at least 1 step, and 0.5 to 8 mm")
    recipe = Recipe(mm=mm, steps=steps, window=window_of(mm))
    maps = [read_labels(path) for path in labels]
    codes = np.unique(np.concatenate([np.unique(each.data) for each in maps]))
    codes = codes[codes > 0]
    names = _names(labels[0], codes.tolist())
    plan = {"recipe": asdict(recipe), "codes": codes.tolist(), "scans": list(scans),
            "labels": list(labels)}
    _check_free(out, plan)
    people = []
    for path, each in zip(scans, maps, strict=True):
        people.append(taught(read_image(path), each, codes, mm))
        print(f"{path}: {each.name}", flush=True)
    write_bytes(join(out, PLAN), json.dumps(plan, indent=1).encode())
    torch.manual_seed(recipe.seed)
    network = build(recipe, len(codes)).to(device)
    fit(network, people, recipe, out, progress=partial(_say, steps))
    save_model(out, Segmenter(network, recipe, codes.tolist(), names),
               {"version": __version__, "people": len(people)})
    print(f"{len(codes)} regions learnt from {len(people)} scans, in {out}")


def window_of(mm: float) -> int:
    """Voxels of a training window's edge: about 96 mm, at least 24, a multiple of 8."""
    return max(24, int(96 / mm) // 8 * 8)


def _say(steps: int, step: int, loss: float) -> None:
    if step % 10 == 0 or step == steps:
        print(f"{step} of {steps} steps, loss {loss:.3f}", end="\r" if step < steps else "\n",
              flush=True)


def _names(labels: str, codes: Sequence[int]) -> list[str]:
    """Names of codes; those that the table beside the label map does not name are their code."""
    known = names_beside(labels)
    names = [known.get(code, str(code)) for code in codes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        both = [code for code, name in zip(codes, names, strict=True) if name == twice]
        raise ConfigError(f"{labels}: codes {both[0]} and {both[1]} are both named {twice!r} in "
                          "the .tsv beside it; give each a name of its own")
    return names


def _check_free(out: str, plan: dict[str, Any]) -> None:
    """Refuse a folder that holds a model, weights or a fit of another plan."""
    if exists(join(out, "config.json")):
        raise ConfigError(f"--out {out}: a model lies there already; name another folder")
    if not exists(join(out, PLAN)):
        return
    before = json.loads(read_bytes(join(out, PLAN)))
    other = [name for name in plan if before.get(name) != plan[name]]
    if other:
        raise ConfigError(f"--out {out}: holds a fit of other {' and '.join(other)}; give the same "
                          "command to go on, or another folder")


# ---- apply ---------------------------------------------------------------------------------------

def run_apply(model: str, scans: Sequence[str], out: str, *, truth: Sequence[str] | None,
              device: torch.device) -> None:
    """Segment scans and write everything; scans that cannot be read are told and left out.

    Raises
    ------
    ConfigError
        Scans and truths are not as many or of other people, or two scans would have one name.
    DataError
        There is no model, or no scan can be segmented.
    """
    if truth is not None:
        _check_pairs(scans, truth, "--truth")
    places = places_of(scans)
    loaded = Model(load_segmenter(model), device)
    rows: list[tuple[str, str, dict[str, float]]] = []
    scores, notes = [], list[str]()
    shown: list[Segmentation] = []
    for number, path in enumerate(scans):
        try:
            found = loaded.segment(path)
            if truth is not None:
                scores.append(_scored(found, truth[number]))
        except DataError as error:
            if number + 1 == len(scans) and not rows:
                raise
            notes.append(f"left out: {error}")
            print(notes[-1], flush=True)
            continue
        found.to_nifti(join(out, places[number]))
        rows.append((path, places[number], found.volumes))
        notes += found.scan.notes
        if len(shown) < pages.SHOWN:
            shown.append(found)
        print(f"{path}: {places[number]}", flush=True)
    _write_tables(out, loaded.model, rows)
    record = {"model": model, "scans": [path for path, *_ in rows],
              "files": [place for _, place, _ in rows], "mm": loaded.model.recipe.mm,
              "people": (read_config(model) or {}).get("people"),
              "steps": loaded.model.recipe.steps, "notes": notes,
              "volumes_ml": [volumes for *_, volumes in rows],
              "scores": pages.summary(scores, shown[0].names) if scores else None}
    write_task(out, "segment/1", record, methods=pages.methods,
               page=lambda record, figures: pages.segment_page(shown, record, figures))


def _check_pairs(scans: Sequence[str], maps: Sequence[str], option: str) -> None:
    """Raise ConfigError where label maps are not as many as scans, or names tell other people."""
    if len(scans) != len(maps):
        raise ConfigError(f"{len(scans)} scans and {option} of {len(maps)} files: each scan needs "
                          "its label map, in the same order")
    for scan, path in zip(scans, maps, strict=True):
        own, other = _entities(scan), _entities(path)
        for key in own.keys() & other.keys():
            if own[key] != other[key]:
                raise ConfigError(f"{option} {path}: is of {key}-{other[key]}, its scan {scan} of "
                                  f"{key}-{own[key]}; name label maps in the order of the scans")


def _entities(path: str) -> dict[str, str]:
    """BIDS's person and visit (sub, ses), as far as a file's name tells them."""
    return dict(re.findall(r"(?:^|_)(sub|ses)-([A-Za-z0-9]+)", stem_of(path)))


def places_of(scans: Sequence[str]) -> list[str]:
    """Where each scan's label map is written, below the output's folder."""
    found = []
    for path in scans:
        stem, entities = stem_of(path), _entities(path)
        folder = "/".join(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities)
        found.append(f"{folder}/anat/{stem}_dseg.nii.gz" if "sub" in entities
                     else f"{stem}_dseg.nii.gz")
    twice = next((place for place in found if found.count(place) > 1), None)
    if twice:
        both = [path for path, place in zip(scans, found, strict=True) if place == twice]
        raise ConfigError(f"{both[0]} and {both[1]}: both would be written to {twice}; segment "
                          "them in two commands")
    return found


def _scored(found: Segmentation, path: str) -> dict[int, dict[str, float]]:
    truth = read_labels(path)
    if truth.data.shape != found.data.shape or not np.allclose(truth.affine, found.scan.affine,
                                                               atol=1e-3):
        raise DataError(f"--truth {path}: its grid {truth.data.shape} is not that of "
                        f"{found.scan.name}, {found.data.shape}; truth is compared voxel by voxel")
    scores = score(found.data, truth.data, list(found.names), found.scan.spacing)
    if not scores:
        raise DataError(f"--truth {path}: holds no region that the model knows (codes "
                        f"{', '.join(map(str, list(found.names)[:5]))}, ...)")
    return scores


def _write_tables(out: str, model: Segmenter,
                  rows: Sequence[tuple[str, str, dict[str, float]]]) -> None:
    write_description(out, "neurojepa segment")
    _write_csv(join(out, "dseg.tsv"), [("index", "name"), *zip(model.codes, model.names,
                                                              strict=True)], "\t")
    _write_csv(join(out, "volumes.csv"), [
        ("scan", "file", *(f"{name} ml" for name in model.names)),
        *((basename(path), place, *(f"{volumes[name]:.3f}" for name in model.names))
          for path, place, volumes in rows)], ",")


def _write_csv(uri: str, rows: Sequence[Sequence[Any]], delimiter: str) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", delimiter=delimiter).writerows(rows)
    write_bytes(uri, text.getvalue().encode())
