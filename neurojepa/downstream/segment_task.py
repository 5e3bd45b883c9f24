"""The two halves of ``segment``: keep or learn from labelled scans, and find regions in others.

    fit:    OUT/config.json last, and of an atlas OUT/heads/KEY_{brain,mask,labels}.nii.gz,
            of a network OUT/model.safetensors, fit.json (state.safetensors on the way)
    apply:  OUT/dataset_description.json, dseg.tsv, volumes.csv, results.json, report.html, and
            OUT/sub-X[/ses-Y]/anat/sub-X[_ses-Y]_T1w_dseg.nii.gz, or STEM_dseg.nii.gz
"""

from __future__ import annotations

import csv
import io
import json
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
from neurojepa.downstream.segment import Recipe, Segmenter, read_config, save_model
from neurojepa.downstream.segment_atlas import HEADS, head_of, is_kept, keep, key_of, save_atlas
from neurojepa.downstream.segment_fit import fit, started, taught
from neurojepa.downstream.segment_labels import Labels, check_pairs, entities_of, read_all
from neurojepa.downstream.segment_score import score
from neurojepa.downstream.segment_seen import learnt_from, why_seen
from neurojepa.downstream.segmenter import Segmentation, load_model
from neurojepa.errors import ConfigError, DataError
from neurojepa.storage import exists, join, list_names, read_if_there, write_bytes

PLAN = "fit.json"  # what a network learns from, so that it goes on with nothing else
STEPS, MM = Recipe.steps, Recipe.mm  # of a network

# ---- fit -----------------------------------------------------------------------------------------

def run_fit(scans: Sequence[str], labels: Sequence[str], out: str, *, method: str,
            steps: int | None = None, mm: float | None = None,
            device: torch.device | None = None) -> None:
    """Keep labelled heads that will vote (``method`` atlas), or teach a network; the same call
    goes on with one that was stopped.

    Raises
    ------
    ConfigError
        Scans and labels are not as many or of other people, label maps have other codes, two
        regions have one name, a number cannot be, or something else lies in ``out``.
    DataError
        A file cannot be read, or labels do not lie in their scan.
    """
    check_pairs(scans, labels, "--labels")
    if method == "atlas":
        _fit_atlas(scans, labels, out, steps, mm)
    else:
        _fit_network(scans, labels, out, STEPS if steps is None else steps,
                     MM if mm is None else mm, device or torch.device("cpu"))


def _fit_atlas(scans: Sequence[str], labels: Sequence[str], out: str, steps: int | None,
               mm: float | None) -> None:
    if steps is not None or mm is not None:
        raise ConfigError("--steps and --mm are of a network; add --method network, or leave them "
                          "out")
    _check_free(out, None)
    known = read_all(labels)
    heads, learnt = list[tuple[str, str]](), list[dict[str, str]]()
    for number, (path, each) in enumerate(zip(scans, known.maps, strict=True), 1):
        scan = read_image(path, brain=False)
        key = key_of(scan, each)
        if key in (other for _, other in heads):
            raise ConfigError(f"{path}: the same scan and label map are given twice")
        if not is_kept(out, key):
            keep(out, key, head_of(read_image(path), each))
        heads.append((path, key))
        learnt.append(learnt_from(scan))
        print(f"{number} of {len(scans)}: {path}, {each.name}", flush=True)
    if len(scans) == 1:
        known.notes.append("one labelled head: its regions are laid over scans, and no other head "
                           "outvotes their errors")
    save_atlas(out, heads, _about(known, learnt))
    print(f"{len(scans)} labelled heads with {len(known.codes)} regions, in {out}")
    for note in known.notes:
        print(note)


def _about(known: Labels, learnt: list[dict[str, str]]) -> dict[str, Any]:
    """What config.json says of every model."""
    return {"version": __version__, "people": len(learnt), "codes": known.codes,
            "names": known.names, "notes": known.notes, "learnt_from": learnt}


def _fit_network(scans: Sequence[str], labels: Sequence[str], out: str, steps: int, mm: float,
                 device: torch.device) -> None:
    if steps < 1 or not 0.5 <= mm <= 8:
        raise ConfigError(f"--steps {steps} --mm {mm:g}: at least 1 step, and 0.5 to 8 mm")
    recipe = Recipe(mm=mm, steps=steps, window=window_of(mm))
    known = read_all(labels)
    codes = np.array(known.codes)
    plan = {"recipe": asdict(recipe), "codes": known.codes, "scans": list(scans),
            "labels": list(labels)}
    _check_free(out, plan)
    people, learnt = [], []
    for path, each in zip(scans, known.maps, strict=True):
        scan = read_image(path)
        people.append(taught(scan, each, codes, mm))
        learnt.append(learnt_from(scan))
        print(f"{path}: {each.name}", flush=True)
    write_bytes(join(out, PLAN), json.dumps(plan, indent=1).encode())
    network = started(people, recipe, len(codes)).to(device)
    fit(network, people, recipe, out, progress=partial(_say, steps))
    save_model(out, Segmenter(network, recipe, known.codes, known.names), _about(known, learnt))
    print(f"{len(codes)} regions learnt from {len(people)} scans, in {out}")
    for note in known.notes:
        print(note)


def window_of(mm: float) -> int:
    """Voxels of a training window's edge: about 96 mm, at least 24, a multiple of 8."""
    return max(24, int(96 / mm) // 8 * 8)


def _say(steps: int, step: int, loss: float) -> None:
    if step % 10 == 0 or step == steps:
        print(f"{step} of {steps} steps, loss {loss:.3f}", end="\r" if step < steps else "\n",
              flush=True)


def _check_free(out: str, plan: dict[str, Any] | None) -> None:
    """Refuse a folder that holds a model, weights, or a fit of the other method or of another
    plan; an atlas has none."""
    if exists(join(out, "config.json")):
        raise ConfigError(f"--out {out}: a model lies there already; name another folder")
    before = read_if_there(join(out, PLAN))
    if plan is None and before is not None:
        raise ConfigError(f"--out {out}: holds a network's fit that was stopped; add --method "
                          "network to go on, or name another folder")
    if plan is not None and list_names(join(out, HEADS)):
        raise ConfigError(f"--out {out}: holds labelled heads of --method atlas; name another "
                          "folder")
    if plan is None or before is None:
        return
    kept = json.loads(before)
    other = [name for name in plan if kept.get(name) != plan[name]]
    if other:
        raise ConfigError(f"--out {out}: holds a fit of other {' and '.join(other)}; give the same "
                          "command to go on, or another folder")


# ---- apply ---------------------------------------------------------------------------------------

def run_apply(model: str, scans: Sequence[str], out: str, *, truth: Sequence[str] | None,
              allow_seen: bool = False, workers: int = 1,
              device: torch.device | None = None) -> None:
    """Segment scans and write everything; scans that cannot be read are told and left out.

    Raises
    ------
    ConfigError
        Scans and truths are not as many or of other people, or two scans would have one name.
    DataError
        There is no model, or no scan can be segmented.
    """
    if truth is not None:
        check_pairs(scans, truth, "--truth")
    places = places_of(scans)
    loaded = load_model(model, device or torch.device("cpu"), workers)
    config = read_config(model) or {}
    rows: list[tuple[str, str, dict[str, float]]] = []
    scores, notes = [], [*config.get("notes", [])]
    shown: list[Segmentation] = []
    for number, path in enumerate(scans):
        try:
            found = loaded.segment(path)
        except DataError as error:
            if number + 1 == len(scans) and not rows:
                raise
            notes.append(f"left out: {error}")
            print(notes[-1], flush=True)
            continue
        found.to_nifti(join(out, places[number]))
        rows.append((path, places[number], found.volumes))
        notes += [*found.scan.notes, *found.notes]
        if truth is not None:
            seen = _told_if_seen(found, config, allow_seen)
            notes += seen
            if allow_seen or not seen:
                try:
                    scores.append(_scored(found, truth[number]))
                except DataError as error:
                    notes.append(f"segmented, but not compared: {error}")
                    print(notes[-1], flush=True)
        if len(shown) < pages.SHOWN:
            shown.append(found)
        print(f"{path}: {places[number]}", flush=True)
    if truth is not None and "learnt_from" not in config:
        notes.append("the model does not say whom it learnt from, so nobody was refused")
    names = shown[0].names
    _write_tables(out, names, rows)
    record = {"model": model, "scans": [path for path, *_ in rows],
              "files": [place for _, place, _ in rows], **loaded.about(),
              "people": config.get("people"), "notes": notes,
              "volumes_ml": [volumes for *_, volumes in rows],
              "scores": pages.summary(scores, names) if scores else None}
    write_task(out, "segment/1", record, methods=pages.methods,
               page=lambda record, figures: pages.segment_page(shown, record, figures))


def places_of(scans: Sequence[str]) -> list[str]:
    """Where each scan's label map is written, below the output's folder."""
    found = []
    for path in scans:
        stem, entities = stem_of(path), entities_of(path)
        folder = "/".join(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities)
        found.append(f"{folder}/anat/{stem}_dseg.nii.gz" if "sub" in entities
                     else f"{stem}_dseg.nii.gz")
    twice = next((place for place in found if found.count(place) > 1), None)
    if twice:
        both = [path for path, place in zip(scans, found, strict=True) if place == twice]
        raise ConfigError(f"{both[0]} and {both[1]}: both would be written to {twice}; segment "
                          "them in two commands")
    return found


def _told_if_seen(found: Segmentation, config: dict[str, Any], allow_seen: bool) -> list[str]:
    """What is to be said of a scan of somebody whom the model learnt from; nothing of others."""
    why = why_seen(found.scan, config.get("learnt_from", []))
    if why is None:
        return []
    told = f"{why}, and is not scored; --allow-seen scores it"
    if allow_seen:
        told = f"{why}, and is scored all the same (--allow-seen): its scores are too good"
    print(told, flush=True)
    return [told]


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


def _write_tables(out: str, names: dict[int, str],
                  rows: Sequence[tuple[str, str, dict[str, float]]]) -> None:
    write_description(out, "neurojepa segment")
    _write_csv(join(out, "dseg.tsv"), [("index", "name"), *names.items()], "\t")
    _write_csv(join(out, "volumes.csv"), [
        ("scan", "file", *(f"{name} ml" for name in names.values())),
        *((basename(path.rstrip("/")), place, *(f"{volumes[name]:.3f}" for name in names.values()))
          for path, place, volumes in rows)], ",")


def _write_csv(uri: str, rows: Sequence[Sequence[Any]], delimiter: str) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", delimiter=delimiter).writerows(rows)
    write_bytes(uri, text.getvalue().encode())
