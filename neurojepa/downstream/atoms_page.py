"""The page of atoms and experts: maps over the template's outline, sorted by the reader.

The figures are in the page as JSON and maximum projections as bytes; a short script draws what is
asked for, so that thousands of atoms make a page of a few megabytes that needs no network.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from neurojepa.downstream.atoms import Anatomy, Summary, Tally, patch_places_mm, summary
from neurojepa.downstream.regions import Regions
from neurojepa.feed.format import Feed
from neurojepa.model.moe import expert_balance
from neurojepa.objective.views import patch_counts
from neurojepa.report import Tone, page, paragraph, section, table, tiles

LEAST_TOKENS = 20  # an atom active in fewer is no pattern yet; the page counts it only


def record_of(seen: Anatomy, regions: Regions, feed: Feed, patch: int) -> dict[str, Any]:
    """results.json: figures of every atom and expert, by region and modality."""
    places = patch_places_mm(feed.grid, patch)

    def rows(tally: Tally) -> list[dict[str, Any]]:
        found = summary(tally, regions, feed, patch)
        return [_row(found, number, regions.names, places)
                for number in range(len(found.share_F))]

    record: dict[str, Any] = {"regions": {"source": regions.source, "names": regions.names}}
    if seen.atoms:
        record["atoms"] = {"active": int((seen.atoms.active_F > 0).sum()),
                           "tokens": int(seen.atoms.tokens_n.sum()), "rows": rows(seen.atoms)}
    record["experts"] = [
        {"block": block, "rows": rows(tally),
         **{name: float(value) for name, value in
            expert_balance(tally.by_modality_mF.sum(0, keepdim=True)).items()}}
        for block, tally in zip(seen.layers, seen.experts, strict=True)]
    return record


def _row(found: Summary, number: int, regions: list[str], places: np.ndarray) -> dict[str, Any]:
    def by_region(values_R: np.ndarray) -> dict[str, float | None]:
        return {name: _short(value) for name, value in zip(regions, values_R, strict=True)}

    column = found.map_nF[:, number]
    return {
        "number": number, "share": _short(found.share_F[number]),
        "mean": _short(found.mean_F[number]),
        "peak_mm": places[column.argmax()].tolist() if column.any() else None,
        "mean_by_region": by_region(found.region_RF[:, number]),
        "selectivity": by_region(found.selectivity_RF[:, number]),
        "mean_by_modality": {name: _short(value) for name, value in
                             zip(found.modalities, found.modality_mF[:, number], strict=True)},
        "strongest": [{**each, "value": _short(each["value"])}
                      for each in found.strongest[number]],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def tables_of(record: dict[str, Any]) -> dict[str, bytes]:
    """atoms.csv and experts.csv: one row for each atom, or expert, and region."""
    found = {}
    if "atoms" in record:
        found["atoms.csv"] = _csv(["atom", "region", "mean_activation", "selectivity"], [
            [row["number"], name, mean, row["selectivity"][name]]
            for row in record["atoms"]["rows"] for name, mean in row["mean_by_region"].items()])
    if record["experts"]:
        found["experts.csv"] = _csv(["block", "expert", "region", "share_of_tokens"], [
            [layer["block"], row["number"], name, mean] for layer in record["experts"]
            for row in layer["rows"] for name, mean in row["mean_by_region"].items()])
    return found


def _csv(header: list[str], rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


# ---- the page ------------------------------------------------------------------------------------

def atoms_page(record: dict[str, Any], seen: Anatomy, regions: Regions, feed: Feed,
               patch: int) -> str:
    """results.json's content, with maps, as a page that needs no network."""
    counts = patch_counts(feed.grid, patch)
    groups, parts = [], [_headline(record)]
    if seen.atoms:
        rows = record["atoms"]["rows"]
        least = LEAST_TOKENS / record["atoms"]["tokens"]
        shown = [row for row in rows if row["share"] >= least]
        groups.append(_group("atom", shown, seen.atoms, counts))
        parts += [section("Atoms by region", _region_table(shown, regions, seen.atoms), paragraph(
            "Selectivity is (in - out) / (in + out) of the mean activation inside a region and in "
            f"all others. Regions: {regions.source}.")),
            section("Atoms", paragraph(
                f"{len(shown)} of {len(rows)} atoms; the others were active in fewer than "
                f"{LEAST_TOKENS} tokens. Maximum projections of the mean activation, each scaled "
                "to its own maximum, over the outline of MNI152; left is left."),
                "<div class='group' data-group='0'></div>")]
    for layer, tally in zip(record["experts"], seen.experts, strict=True):
        name = f"Experts of block {layer['block']}"
        groups.append(_group("expert", layer["rows"], tally, counts))
        parts.append(section(name, paragraph(
            f"Busiest expert {layer['expert_max_load']:.2f} times the mean, entropy "
            f"{layer['expert_entropy']:.3f} of 1, in the target encoder, which embeddings come "
            "from: it sees whole scans, while training balances the contexts. Share of a region's "
            "tokens at each expert, and where an expert's share is largest."),
            _heat_table(layer["rows"], regions),
            f"<div class='group' data-group='{len(groups) - 1}'></div>"))
    data = {"regions": regions.names, "counts": counts, "groups": groups,
            "outlines": _outlines(regions.brain)}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    script = Path(__file__).with_name("atoms.js").read_text()
    parts.append(f"<style>{STYLE}</style><script type='application/json' id='data'>{text}</script>"
                 f"<script>{script}</script>")
    which = ", ".join(str(record[name]) for name in ("split", "modality", "cohort")
                      if record[name])
    return page("Atoms and experts in the brain",
                f"Step {record['step']}, feed {record['feed']}, {record['scans']} scans: {which}",
                parts)


def _headline(record: dict[str, Any]) -> str:
    items: list[tuple[str, str, Tone]] = [(f"{record['scans']:,}", "scans", "")]
    if atoms := record.get("atoms"):
        rows = atoms["rows"]
        items += [(f"{atoms['active']:,} of {len(rows):,}", "atoms active in these scans", ""),
                  (f"{sum(row['share'] for row in rows):.1f}", "active atoms per token", "")]
    if record["experts"]:
        worst = max(layer["expert_max_load"] for layer in record["experts"])
        items.append((f"{worst:.2f}", "busiest expert's tokens over the mean", ""))
    return tiles(items)


def _region_table(rows: list[dict[str, Any]], regions: Regions, tally: Tally) -> str:
    """For each region its most selective atoms, and how many prefer it to all others."""
    weights = regions.share_nR.T @ tally.tokens_n.cpu().numpy()

    def rank(row: dict[str, Any], name: str) -> float:
        value = row["selectivity"][name]
        return -2 if value is None else value

    preferred = [max(regions.names, key=lambda name: rank(row, name)) for row in rows]
    lines = []
    for name, weight in zip(regions.names, weights / max(weights.sum(), 1e-9), strict=True):
        best = sorted((row for row in rows if rank(row, name) >= -1),
                      key=lambda row: -rank(row, name))[:5]
        lines.append([name, f"{weight:.1%}", preferred.count(name), ", ".join(
            f"{row['number']} ({row['selectivity'][name]:.2f})" for row in best)])
    return table(["region", "tokens", "atoms that prefer it", "most selective atoms"], lines)


def _heat_table(rows: list[dict[str, Any]], regions: Regions) -> str:
    """Regions by experts, shaded by the expert's share of the region's tokens."""
    def cell(value: float | None) -> str:
        if value is None:
            return "<td></td>"
        strength = min(1.0, value * len(rows) / 3)  # full at three times an even share
        return f"<td style='background:rgba(43,108,176,{strength:.2f})'>{value:.0%}</td>"

    head = "".join(f"<th>{row['number']}</th>" for row in rows)
    body = "".join(f"<tr><td>{html.escape(name)}</td>" + "".join(
        cell(row["mean_by_region"][name]) for row in rows) + "</tr>" for name in regions.names)
    return (f"<div class='scroll'><table class='heat'><thead><tr><th>region</th>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>")


def _group(kind: str, rows: list[dict[str, Any]], tally: Tally,
           counts: tuple[int, int, int]) -> dict[str, Any]:
    """One list of cards: figures by position rather than name, and their projections."""
    map_nF = tally.mean_map()[:, [row["number"] for row in rows]]
    return {"kind": kind, "modalities": list(rows[0]["mean_by_modality"]) if rows else [],
            "maps": _projections(map_nF, counts),
            "rows": [[row["number"], row["share"], row["mean"], row["peak_mm"],
                      list(row["mean_by_region"].values()), list(row["selectivity"].values()),
                      list(row["mean_by_modality"].values()),
                      [[each["scan_id"], each["modality"], each["mm"], each["value"]]
                       for each in row["strongest"]]] for row in rows]}


def _projections(map_nF: np.ndarray, counts: tuple[int, int, int]) -> str:
    """base64 of uint8 [F, YZ + XZ + XY]: maxima along x, y and z over each feature's own."""
    scaled = np.rint(255 * map_nF / np.maximum(map_nF.max(0, initial=0), 1e-12)).astype(np.uint8)
    volume = scaled.T.reshape(-1, *counts)
    flat = [volume.max(axis).reshape(len(volume), -1) for axis in (1, 2, 3)]
    return base64.b64encode(np.concatenate(flat, 1).tobytes()).decode()


def _outlines(brain: np.ndarray) -> list[str]:
    """The template's outline seen along x, y and z, as transparent PNGs; up and right increase."""
    from PIL import Image
    from scipy.ndimage import binary_erosion

    found = []
    for axis in range(3):
        shape = brain.any(axis)
        shape = np.kron(shape, np.ones((3, 3), bool))  # finer than voxels, for a thin line
        edge = shape & ~binary_erosion(shape, iterations=2)
        pixels = np.zeros((*edge.T.shape, 4), np.uint8)
        pixels[..., :3], pixels[..., 3] = 90, 200 * edge.T[::-1]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        found.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return found


STYLE = """
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center; margin: .6rem 0 }
.controls select, .controls input, button { font: inherit; padding: .25rem .5rem; max-width: 100% }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: .8rem }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem; font-size: .86rem;
        min-width: 0 }
.card h3 { margin: 0; font-size: 1rem } .views { display: flex; gap: 6px; margin: .4rem 0;
        align-items: end }
.views canvas { background: #fbfcfd; min-width: 0 } .facts { color: var(--soft) }
.bar { display: grid; grid-template-columns: 8.5em 1fr 3.5em; gap: .4rem; align-items: center }
.bar i { display: block; height: .55em; background: var(--accent); border-radius: 2px }
.card details { margin-top: .3rem } .card code { font-size: .8rem; overflow-wrap: anywhere }
.heat td, .heat th { padding: .2rem .45rem; text-align: right; font-size: .86rem }
.heat td:first-child, .heat th:first-child { text-align: left; white-space: nowrap }
@media (max-width: 400px) { .cards { grid-template-columns: 1fr } }
"""
