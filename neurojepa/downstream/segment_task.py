"""The two halves of ``segment``: teach a network from labelled scans, and find regions in others.

    fit:    OUT/model.safetensors, config.json           (state.safetensors and fit.json on the way)
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
from neurojepa.downstream.images import read_image, read_labels
from neurojepa.downstream.output import write_task
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

# ---- fit -----------------------------------------------------------------------------------------

def run_fit(scans: Sequence[str], labels: Sequence[str], out: str, *, steps: int, mm: float,
            device: torch.device) -> None:
    """Teach a network and write it; the same call goes on with one that was stopped.

    Raises
    ------
    ConfigError
        Scans and labels are not as many, a number cannot be, or another fit lies in ``out``.
    DataError
        A file cannot be read, or labels do not lie in their scan.
    """
    if len(scans) != len(labels):
        raise ConfigError(f"{len(scans)} scans and --labels of {len(labels)} files: each scan "
                          "needs its label map, in the same order")
    if steps < 1 or not 0.5 <= mm <= 8:
        raise ConfigError(f"--steps {steps} --mm {mm:g}: at least 1 step, and 0.5 to 8 mm")
    recipe = Recipe(mm=mm, steps=steps, window=window_of(mm))
    maps = [read_labels(path) for path in labels]
    codes = np.unique(np.concatenate([np.unique(each.data) for each in maps]))
    codes = codes[codes > 0]
    known = names_beside(labels[0])
    names = [known.get(int(code), str(code)) for code in codes]
    _start(out, {"recipe": asdict(recipe), "codes": codes.tolist(), "scans": list(scans),
                 "labels": list(labels)})
    people = []
    for path, each in zip(scans, maps, strict=True):
        people.append(taught(read_image(path), each, codes, mm))
        print(f"{path}: {each.name}", flush=True)
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


def _start(out: str, plan: dict[str, Any]) -> None:
    """Keep what is fitted; refuse to go on with another plan."""
    if read_config(out):
        raise ConfigError(f"--out {out}: a model lies there already; name another folder")
    uri = join(out, "fit.json")
    if not exists(uri):
        write_bytes(uri, json.dumps(plan, indent=1).encode())
        return
    before = json.loads(read_bytes(uri))
    other = [name for name in plan if before.get(name) != plan[name]]
    if other:
        raise ConfigError(f"--out {out}: holds a fit of other {' and '.join(other)}; give the same "
                          "command to go on, or another folder")


# ---- apply ---------------------------------------------------------------------------------------

def run_apply(model: str, scans: Sequence[str], out: str, *, truth: Sequence[str] | None,
              device: torch.device) -> None:
    """Segment scans and write everything.

    Raises
    ------
    ConfigError
        Scans and truths are not as many, or two scans would have one name.
    DataError
        A file cannot be read, or a truth has another grid than its scan.
    """
    if truth is not None and len(truth) != len(scans):
        raise ConfigError(f"{len(scans)} scans and --truth of {len(truth)} files: each scan needs "
                          "its truth, in the same order")
    places = places_of(scans)
    loaded = Model(load_segmenter(model), device)
    rows, scores = [], []
    shown: list[Segmentation] = []
    for number, path in enumerate(scans):
        found = loaded.segment(path)
        if truth is not None:
            scores.append(_scored(found, truth[number]))
        found.to_nifti(join(out, places[number]))
        rows.append((path, places[number], found.volumes))
        if len(shown) < pages.SHOWN:
            shown.append(found)
        print(f"{path}: {places[number]}", flush=True)
    _write_tables(out, loaded.model, rows)
    record = {"model": model, "scans": list(scans), "files": places,
              "mm": loaded.model.recipe.mm, "people": (read_config(model) or {}).get("people"),
              "steps": loaded.model.recipe.steps,
              "notes": [note for found in shown for note in found.scan.notes],
              "volumes_ml": [volumes for *_, volumes in rows],
              "scores": pages.summary(scores, shown[0].names) if scores else None}
    write_task(out, "segment/1", record, methods=pages.methods,
               page=lambda record, figures: pages.segment_page(shown, record, figures))


def places_of(scans: Sequence[str]) -> list[str]:
    """Where each scan's label map is written, below the output's folder."""
    found = []
    for path in scans:
        name = basename(path.rstrip("/"))
        stem = re.sub(r"\.(nii|mgz|mgh|nii\.gz|hdr|img)$", "", name, flags=re.I)
        entities = dict(re.findall(r"(?:^|_)(sub|ses)-([A-Za-z0-9]+)", stem))
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
    return score(found.data, truth.data, list(found.names), found.scan.spacing)


def _write_tables(out: str, model: Segmenter,
                  rows: Sequence[tuple[str, str, dict[str, float]]]) -> None:
    write_bytes(join(out, "dataset_description.json"), json.dumps({
        "Name": "neurojepa segment", "BIDSVersion": "1.9.0", "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "neurojepa", "Version": __version__}]}, indent=1).encode())
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


