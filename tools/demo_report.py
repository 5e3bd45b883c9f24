"""What the demo shows: summary.json for programs, report.html for people.

Everything is read back from what the commands left: run directories, archive, feed, probe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.archive import IMAGE_SCALE, open_archive, read_volume, slot
from data_prep.rows import ArchiveRow, Status
from neurojepa.config import RootConfig, load_config
from neurojepa.errors import ClusterError
from neurojepa.feed.format import (
    ARCHIVE_GRID,
    MODALITIES,
    Feed,
    FeedCode,
    Grid,
    MaskCode,
    is_brain,
    open_feed,
)
from neurojepa.feed.loader import Batch, SampleReader
from neurojepa.report import (
    BLUE,
    GREY,
    ORANGE,
    WINE,
    Tone,
    figure,
    page,
    paragraph,
    section,
    table,
    tiles,
)
from neurojepa.storage import read_rows


def write_report(out: Path, archive_uri: str, feed_uri: str,
                 seconds: dict[str, float]) -> dict[str, Any]:
    """Write OUT/report.html and, last, OUT/summary.json; returns the summary."""
    archive, feed = open_archive(archive_uri), open_feed(feed_uri)
    if not (out / "run/killed.json").exists():
        raise ClusterError(f"{out / 'run'}: finished before a rank could be killed; remove this "
                           "folder and run the demo again")
    killed = json.loads((out / "run/killed.json").read_text())
    probe = json.loads((out / "probe/results.json").read_text())
    events = read_rows(str(out / "run/events.jsonl"))
    difference = compare_runs(out / "run-undisturbed", out / "run")
    summary = {
        "bit_equal": difference is None, "difference": difference,
        "killed_at_step": killed["step"],
        "resumed_from_step": next((e["step"] for e in events if e["event"] == "resume"), None),
        "scans": {"accepted": 0, "flagged": 0, "quarantined": 0},
        "probe": probe["results"], "seconds": seconds,
    }
    for row in archive.rows:
        summary["scans"][{"rejected": "quarantined"}.get(row["status"], row["status"])] += 1
    html = page("neurojepa demo", "From scans to a probed encoder, with one rank killed on the "
                "way. Everything below was read back from what the commands left on disk.", [
                    tiles(_headlines(summary, archive.rows)),
                    _training(out, summary), _probe(probe), _tokens(out, feed),
                    _scans(archive_uri, archive.rows), _quarantine(archive.rows),
                    _stages(seconds)])
    (out / "report.html").write_text(html)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def compare_runs(undisturbed: Path, disturbed: Path) -> str | None:
    """The first difference of two runs in the losses of all steps or the final state, or None."""
    losses = [{row["step"]: row["loss"] for row in read_rows(str(run / "metrics.jsonl"))}
              for run in (undisturbed, disturbed)]
    if losses[0].keys() != losses[1].keys():
        return f"{len(losses[0])} steps against {len(losses[1])}"
    for step, loss in losses[0].items():
        if losses[1][step] != loss:
            return f"loss of step {step}: {loss!r} against {losses[1][step]!r}"
    states = [[e["state_sha256"] for e in read_rows(str(run / "events.jsonl"))
               if e["event"] == "finish"] for run in (undisturbed, disturbed)]
    if not states[0] or states[0] != states[1]:
        return f"final state {states[0]} against {states[1]}"
    return None


def _headlines(summary: dict[str, Any], rows: list[ArchiveRow]) -> list[tuple[str, str, Tone]]:
    scans = summary["scans"]
    equal = summary["bit_equal"]
    return [
        ("bit-equal" if equal else "DIFFERS", "killed run against undisturbed run",
         "good" if equal else "bad"),
        (f"step {summary['killed_at_step']}", "rank 1 got SIGKILL", ""),
        (f"step {summary['resumed_from_step']}", "continued from this checkpoint", ""),
        (str(scans["accepted"] + scans["flagged"]), f"scans in the archive, {scans['flagged']} "
         "of them flagged", ""),
        (str(scans["quarantined"]), "scans quarantined, with reasons", ""),
        (str(len({row["participant"] for row in rows})), "people", ""),
    ]


# ---- training ------------------------------------------------------------------------------------

def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _training(out: Path, summary: dict[str, Any]) -> str:
    plain = read_rows(str(out / "run-undisturbed/metrics.jsonl"))
    again = read_rows(str(out / "run/metrics.jsonl"))
    plot, (left, right) = _pyplot().subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    left.plot([r["step"] for r in plain], [r["loss"] for r in plain], color=GREY, linewidth=5,
              alpha=0.6, label="undisturbed")
    left.plot([r["step"] for r in again], [r["loss"] for r in again], color=BLUE, linewidth=1.6,
              label="killed and continued")
    left.axvline(summary["killed_at_step"], color=WINE, linestyle="--", linewidth=1,
                 label="rank 1 killed")
    left.axvline(summary["resumed_from_step"], color=ORANGE, linestyle=":", linewidth=1.4,
                 label="restarted from here")
    left.set(xlabel="step", ylabel="loss", title="Loss of every step")
    left.legend(frameon=False, fontsize=8)
    for name, what, color in (("prediction", "voxels of hidden tokens", BLUE),
                              ("tissue", "tissue of visible tokens", ORANGE)):
        right.plot([r["step"] for r in again], [r[name] for r in again], color=color, label=what)
    right.set(xlabel="step", ylabel="loss", title="What the loss is made of")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    equal = ("Losses of all steps and the hash of weights, moments, EMA and router state are equal "
             "to the last bit." if summary["bit_equal"] else summary["difference"])
    return section("Pretraining on two ranks", figure(plot, equal))


def _probe(probe: dict[str, Any]) -> str:
    """What these few people can tell of each target: figures only where intervals do not meet."""
    rows = [[target, metric, scores["num_people"], _verdict(of_models)]
            for (target, metric), of_models in sorted(_by_metric(probe["results"]).items())
            for scores in [next(iter(of_models.values()))]]
    return section(
        "Linear probes on frozen embeddings of T1w scans",
        table(["target", "metric", "people tested", "what they tell"], rows),
        paragraph("People tested come from anatomies that were not trained on; intervals resample "
                  "people. The demo shows that the way works. Which training says most of people "
                  "takes hundreds of them: see docs/results/compare.md. All figures stand in "
                  "probe/results.json."))


def _by_metric(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for model, targets in results.items():
        for target, scores in targets.items():
            for metric, score in scores.items():
                if metric != "num_train_people":
                    found.setdefault((target, metric), {})[model] = score
    return found


def _verdict(of_models: dict[str, Any]) -> str:
    """Every model's value and interval if two intervals do not meet, else that none is shown."""
    if (max(score["low"] for score in of_models.values())
            <= min(score["high"] for score in of_models.values())):
        return "no difference shown between " + " and ".join(of_models)
    return "; ".join(f"{name} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
                     for name, score in of_models.items())


# ---- pictures ------------------------------------------------------------------------------------

def _tokens(out: Path, feed: Feed) -> str:
    """One scan per modality with the tokens of its masks."""
    import torch

    from neurojepa.objective.views import make_views

    config = load_config(out / "run/config.yaml")
    reader = SampleReader(feed)
    stored = feed.index["modality"].to_pylist()
    rows = [stored.index(name) for name in MODALITIES if name in stored]
    batch = Batch(voxels=torch.from_numpy(np.stack([reader.image(row) for row in rows])),
                  modality=torch.tensor([MODALITIES.index(stored[row]) for row in rows]),
                  position=torch.tensor(rows), weight=torch.ones(len(rows)), scan_ids=[])
    views = make_views(batch, config, feed.grid, config.train.seed)
    masks = views.context_BMC.shape[1]
    plot, axes = _pyplot().subplots(len(rows), masks + 1, squeeze=False, layout="constrained",
                                    figsize=(2.6 * (masks + 1), 3.1 * len(rows)))
    z = feed.grid.shape[2] // 2
    for b, row in enumerate(rows):
        codes = batch.voxels[b].numpy()
        image = np.where(codes == FeedCode.NOT_SCANNED, 0, codes.astype(float))[:, :, z]
        contour = is_brain(codes)[:, :, z]
        coords = views.coords_BN3[b].numpy()
        axes[b][0].set_ylabel(stored[row])
        axes[b][0].set_title("stored volume, brain mask", fontsize=9)
        for m, axis in enumerate(axes[b]):
            axis.imshow(image.T, cmap="gray", origin="lower", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            if m == 0:
                axis.contour(contour.T, levels=[0.5], colors=[ORANGE], linewidths=0.9)
            else:
                axis.set_title(f"mask {m}", fontsize=9)
                for indices, color in ((views.context_BMC, ORANGE), (views.target_BMT, BLUE)):
                    _shade(axis, coords[indices[b, m - 1].numpy()], config, feed.grid, z, color)
    return section("What the model sees", figure(
        plot, "Axial slices. Orange tokens are seen, blue ones are filled in, the rest is not in "
        "the token budget."))


def _shade(axis: Any, coords_mm: np.ndarray, config: RootConfig, grid: Grid, z: int,
           color: str) -> None:
    """Tint the tokens (centres in mm from the grid's centre) that meet slice z."""
    from matplotlib.patches import Rectangle

    edge = config.model.patch_voxels
    corner = coords_mm / grid.spacing_mm + np.array(grid.shape) / 2 - edge / 2
    for x, y, bottom in corner:
        if bottom <= z < bottom + edge:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), edge, edge, facecolor=color, alpha=0.4,
                                     edgecolor="white", linewidth=0.4))


def _scans(archive_uri: str, rows: list[ArchiveRow]) -> str:
    """Every real scan, and the first synthetic ones, in three planes through the MNI centre."""
    usable = [row for row in rows if row["status"] != Status.REJECTED]
    real = [row for row in usable if row["cohort"] != "synthetic"]
    made = [row for row in usable if row["cohort"] == "synthetic"][:4]
    parts = []
    for title, group in (("real scans", real), ("synthetic scans", made)):
        if group:
            sides = (", orange: brain mask. The head's left is on the left, as each scan's header "
                     "has it." if group is real else ".")
            caption = f"{len(group)} usable {title}{sides}"
            parts.append(figure(_montage(archive_uri, group), caption))
    return section("Scans in MNI152 space, at true size", *parts)


def _montage(archive_uri: str, rows: list[ArchiveRow], columns: int = 3) -> Any:
    lines = -(-len(rows) // columns)
    x, y, _ = ARCHIVE_GRID.shape
    plot, axes = _pyplot().subplots(lines, 3 * columns, squeeze=False, layout="constrained",
                                    width_ratios=[y, x, x] * columns,
                                    figsize=(3.7 * columns, 1.45 * lines))
    for axis in axes.flat:
        axis.axis("off")
    for number, row in enumerate(rows):
        line, first = divmod(number, columns)
        arrays = read_volume(archive_uri, slot(row["participant"], row["scan_id"]))
        images, masks = _planes(arrays["image"]), _planes(arrays["mask"] == MaskCode.BRAIN)
        for k, (image, mask) in enumerate(zip(images, masks, strict=True)):
            axis = axes[line][3 * first + k]
            axis.imshow(image.T * IMAGE_SCALE, cmap="gray", origin="lower", vmin=0, vmax=1)
            axis.contour(mask.T, levels=[0.5], colors=[ORANGE], linewidths=0.6)
            if k == 1:
                axis.set_title(f"{row['cohort']} · {row['modality']}"
                               + (f" · {row['reason']}" if row["reason"] else ""), fontsize=6.5)
    return plot


def _planes(volume: np.ndarray) -> list[np.ndarray]:
    """The sagittal, coronal and axial slice through the middle of [X, Y, Z]."""
    x, y, z = (size // 2 for size in volume.shape)
    return [volume[x], volume[:, y], volume[:, :, z]]


def _quarantine(rows: list[ArchiveRow]) -> str:
    counts: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        key = (row["cohort"], row["modality"], row["status"], row["reason"] or "")
        counts[key] = counts.get(key, 0) + 1
    return section("Every scan that was indexed",
                   table(["cohort", "modality", "status", "reason", "scans"],
                         [[*key, count] for key, count in sorted(counts.items())]))


def _stages(seconds: dict[str, float]) -> str:
    return section("Time", table(["stage", "seconds"], list(seconds.items())),
                   paragraph("A stage that found its work done already is short."))
