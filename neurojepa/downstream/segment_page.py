"""The page of a segmentation: overlays, volumes, and scores where there is a truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neurojepa.downstream.output import Figures, how_done
from neurojepa.downstream.segment_score import SCORES, TOLERANCE_MM
from neurojepa.downstream.slices import COLOURS, show_slices
from neurojepa.report import grid, page, paragraph, section, table, tiles

if TYPE_CHECKING:
    from neurojepa.downstream.segmenter import Segmentation

SHOWN = 4  # scans
HEAD = {"dice": "Dice", "hd95_mm": "HD95, mm", "surface_dice": "surface Dice",
        "volume_bias_percent": "volume bias, %"}


def summary(scores: Sequence[Mapping[int, Mapping[str, float]]],
            names: Mapping[int, str]) -> dict[str, Any]:
    """Means over scans of each region, and over regions; regions not found have no HD95."""
    regions = {}
    for code, name in names.items():
        there = [each[code] for each in scores if code in each]
        if there:
            regions[name] = {metric: _mean([each[metric] for each in there]) for metric in SCORES}
            regions[name]["scans"] = len(there)
            regions[name]["not_found"] = sum(each["dice"] == 0 for each in there)
    whole = {metric: _mean([each[metric] for each in regions.values()]) for metric in SCORES}
    return {"all": whole, "regions": regions}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def segment_page(shown: Sequence[Segmentation], record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    names = list(shown[0].names.values())
    count = len(record["scans"])
    told = [(str(count), "scan" if count == 1 else "scans", ""), (str(len(names)), "regions", "")]
    if record["scores"]:
        told += [(f"{record['scores']['all'][metric]:.3g}", f"{HEAD[metric]}, mean of regions", "")
                 for metric in SCORES]
    parts = [tiles(told)]  # type: ignore[arg-type]
    parts.append(section("Scans", paragraph(
        "Regions over the scan, through the middle of the brain. L and R are the person's left and "
        "right, A is the front."), grid([figures.show(
            f"scan {number + 1}", _overlay(each), f"{each.scan.name}: {len(names)} regions.")
            for number, each in enumerate(shown)])))
    if count > len(shown):
        parts.append(paragraph(f"The first {len(shown)} of {count} scans."))
    if record["scores"]:
        parts.append(_scores(record["scores"]))
    volumes = [[name, f"{np.mean(ml):.2f}", f"{np.min(ml):.2f}", f"{np.max(ml):.2f}"]
               for name, ml in ((name, [each[name] for each in record["volumes_ml"]])
                                for name in names)]
    parts += [section("Volumes", table(["region", "mean, ml", "least", "most"], volumes),
                      paragraph("Each scan's volumes are in volumes.csv.")), how_done(record)]
    return page("Segmentation", f"{count} {told[0][1]} by {record['model']}", parts)


def _scores(scores: dict[str, Any]) -> str:
    rows = [[name, *(f"{each[metric]:.3g}" if np.isfinite(each[metric]) else "-"
                     for metric in SCORES), each["scans"], each["not_found"]]
            for name, each in scores["regions"].items()]
    return section("Against the truth", table(
        ["region", *HEAD.values(), "scans", "not found"], rows), paragraph(
        "Means over scans, at each scan's own resolution. HD95: 95th percentile of distances "
        "between surfaces; regions that were not found have none. Surface Dice: share of the "
        f"surfaces within {TOLERANCE_MM:g} mm of each other."))


def _overlay(found: Segmentation) -> Any:
    scan = found.scan
    assert scan.brain is not None
    high = float(np.percentile(scan.data[scan.brain], 99.5)) or 1.0
    ranks = np.searchsorted(list(found.names), found.data)
    return show_slices(scan.data, scan.spacing, scan.brain, high=high,
                       over=np.where(found.data > 0, ranks % COLOURS + 1, 0))


def methods(record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    how = _by_atlas if record["method"] == "atlas" else _by_network
    text = how(record)
    if record["scores"]:
        text += (" It was compared with the truth at the scans' own resolution by Dice, the 95th "
                 "percentile of surface distances, surface Dice at "
                 f"{TOLERANCE_MM:g} mm and volume bias.")
    return text


def _by_network(record: dict[str, Any]) -> str:
    prior = ("To its output was added the logarithm of the mean shares of labels at the same "
             "coordinates in the labelled people. " if record["prior"] else "")
    return (f"Regions were found by a SegResNet (MONAI) that had learnt from {record['people']} "
            f"labelled scans in {record['steps']} steps of two windows, at {record['mm']:g} mm "
            f"(neurojepa {record['version']}). Its input was the brain, extracted with deepbet "
            f"where scans came with a skull, and three coordinates. {prior}Windows overlapped by "
            "half; each region's map was interpolated linearly into the scan's own grid and the "
            "highest was taken.")


def _by_atlas(record: dict[str, Any]) -> str:
    heads = record["people"]
    many = "each of {} labelled heads was" if heads > 1 else "one labelled head was"
    return (f"Regions were found by the labels of other people (neurojepa {record['version']}): "
            f"{many.format(heads)} laid over the scan by an affine and diffeomorphic demons "
            "(SimpleITK) on locally normalised intensities, after brains had been extracted with "
            "deepbet where scans came with a skull. Labels were carried along as shares, "
            "interpolated linearly in the scan's own grid; the label with the highest "
            f"{'mean ' if heads > 1 else ''}share was taken.")
