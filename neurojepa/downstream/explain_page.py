"""The page of explained scans: maps over the scans, by region, and the test with other weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neurojepa.downstream.explain import CHECKED, Explained, OfScan, like_random
from neurojepa.downstream.output import Figures, how_done
from neurojepa.downstream.planes import planes
from neurojepa.downstream.saliency import DRAWN, SMOOTH, STEPS
from neurojepa.feed.format import Grid
from neurojepa.report import page, paragraph, section, table, tiles

SHOWN = 12  # scans with a figure


def explain_page(found: Explained, grid: Grid, record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    lead = (f"{len(found.scans)} scans, weights {record['weights']}; scores in "
            f"{found.unit}, read by a linear model of {record['embeddings']}")
    parts = [tiles([(str(len(found.scans)), "scans", ""), (
        f"{like_random(found.checks):.2f}",
        "size of rank correlations with maps of random encoders", "")])]
    parts += [paragraph(f"Look out: {each}.") for each in found.warnings]
    parts.append(section("Maps", paragraph(
        f"What each voxel adds to the score, in {found.unit}: orange raises it, blue lowers it, "
        "against the usual scan. Planes through the place that adds or takes most. L is the "
        "person's left and R the right, A is the front."), *(
            figures.show(f"scan {number + 1}", planes(each.codes, each.map, grid), _caption(
                each, found.unit)) for number, each in enumerate(found.scans[:SHOWN]))))
    if len(found.scans) > SHOWN:
        parts.append(paragraph(f"Maps of the first {SHOWN} of {len(found.scans)} scans are shown; "
                               "all are in the folder."))
    parts += [section("Scans", _scans(found, record)), section("Regions", _regions(found)),
              section("Other weights", _checks(found)), how_done(record)]
    return page(f"What {found.target.name} is read from", lead, parts)


def _caption(each: OfScan, unit: str) -> str:
    return (f"{each.who.participant}, visit {each.who.session}, {each.who.modality}: score "
            f"{each.score:.2f}, of the usual scan {each.usual:.2f} ({unit}).")


def _scans(found: Explained, record: dict[str, Any]) -> str:
    rows = [[each.who.participant, each.who.session, each.who.modality, f"{each.score:.3f}",
             f"{each.usual:.3f}", f"{each.error:+.2g}", each.taught, path]
            for each, path in zip(found.scans, record["maps"], strict=True)]
    return table(["participant", "visit", "modality", "score", "usual scan", "map's error",
                  "taught by", "file"], rows) + paragraph(
        "A map adds up to the score less that of the usual scan, but for its error. Each scan's "
        "readout was taught by people of other families.")


def _regions(found: Explained) -> str:
    def mean(values: Sequence[np.ndarray]) -> np.ndarray:
        stacked = np.stack(values)
        seen = np.isfinite(stacked)
        return np.where(seen.any(0), np.where(seen, stacked, 0).sum(0) / np.maximum(
            seen.sum(0), 1), np.nan)

    total_R = mean([each.region_R for each in found.scans])
    size_R = mean([each.size_R for each in found.scans])
    order = np.argsort(-np.nan_to_num(size_R, nan=-1))
    rows = [[found.regions.names[k], f"{total_R[k]:+.3g}",
             f"{size_R[k]:.2f}" if np.isfinite(size_R[k]) else "not seen"] for k in order]
    return table(["region", f"adds, {found.unit}", "size of effects, over the brain's"],
                 rows) + paragraph(
        f"Mean over the scans of what a region adds, and of absolute values there. Regions: "
        f"{found.regions.source}.")


def _checks(found: Explained) -> str:
    rows = [[each.who.participant, each.part, f"{each.rank:.2f}", f"{each.rank_of_size:.2f}"]
            for each in found.checks]
    return paragraph(
        f"Maps of the first scans ({CHECKED} at most), made again with the encoder's weights drawn "
        f"anew, from the last block to the first, and all of them {DRAWN} times (Adebayo et al. "
        "2018). What random weights make has a sign by chance, so the last rows count by their "
        "size: a map of the model has less in common with them than one of the image. The rank "
        "correlation of absolute values stays above 0, since any weights have large effects where "
        "the scan is unusual.") + table(
        ["participant", "drawn anew", "rank correlation", "of absolute values"], rows)


def record_of(found: Explained) -> dict[str, Any]:
    """What results.json says of it."""
    return {
        "label": found.target.name, "kind": found.target.kind,
        "classes": list(found.target.classes), "unit": found.unit,
        "regions": {"source": found.regions.source, "names": found.regions.names},
        "scans": [{"participant_id": each.who.participant, "session_id": each.who.session,
                   "modality": each.who.modality, "scan_id": each.who.scan_id,
                   "score": each.score, "usual": each.usual, "error": each.error,
                   "taught_by": each.taught,
                   "adds": dict(zip(found.regions.names, each.region_R.tolist(), strict=True)),
                   "size": dict(zip(found.regions.names, each.size_R.tolist(), strict=True))}
                  for each in found.scans],
        "other_weights": [{"participant_id": each.who.participant, "drawn_anew": each.part,
                           "rank": each.rank, "rank_of_size": each.rank_of_size}
                          for each in found.checks],
        "warnings": found.warnings}


def predictions_of(found: Explained) -> list[list[str]]:
    """Rows of predictions.csv, with a header."""
    return [["participant_id", "session_id", "modality", "scan_id", "score", "usual"],
            *([each.who.participant, each.who.session, each.who.modality, each.who.scan_id,
               f"{each.score:.6g}", f"{each.usual:.6g}"] for each in found.scans)]


def methods(found: Explained, record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    model = ("L2-penalised logistic regression" if found.target.kind == "binary"
             else "ridge regression")
    checked = len({each.who.scan_id for each in found.checks})
    return (
        f"What {found.target.name} was read from was mapped by integrated gradients (Sundararajan "
        f"et al. 2017; Captum, {STEPS} steps) of the score of a {model} on frozen embeddings "
        f"(neurojepa {record['version']}). The baseline of each scan was its least-squares fit by "
        "the smoothed tissue maps of the MNI152 template, and maps were smoothed within the brain "
        f"(Gaussian, sd {SMOOTH:g} of a patch's edge). The readout of a scan was taught by "
        "people of other families, its penalty chosen by inner cross-validation. Maps were "
        f"compared with those of encoders whose weights were drawn anew, block by block, and all "
        f"of them {DRAWN} times, in {checked} scan{'s' if checked > 1 else ''} (Adebayo et al. "
        "2018).")
