"""The page of a probe: one table of scores with intervals, and predictions against truth."""

from __future__ import annotations

from typing import Any

import numpy as np

from neurojepa.downstream.probe import ProbeResult
from neurojepa.report import BLUE, figure, page, paragraph, section, table

Results = dict[str, list[ProbeResult]]


def probe_page(results: Results, record: dict[str, Any]) -> str:
    """results.json's content as a page that needs no network."""
    which = ", ".join(f"{name} {record[name]}" for name in ("modality", "cohort") if record[name])
    return page("Linear probes on frozen embeddings",
                f"Step {record['step']}, feed {record['feed']}" + (f", {which}" if which else ""),
                [section("Scores on people of the test split",
                         *(paragraph(f"Look out: {note}.") for note in record["notes"]),
                         probe_table(results),
                         paragraph("95 % intervals resample families, then people with "
                                   "all their scans.")),
                 section("Predictions", figure(probe_figure(results),
                                               "Each point is a scan of the test split."))])


def probe_table(results: Results) -> str:
    """One row per target, metric and model."""
    rows = [[each.target, metric, name, str(value), value.num_people, each.num_train_people]
            for name, probes in results.items() for each in probes
            for metric, value in each.scores.items()]
    rows.sort(key=lambda row: (row[0], row[1]))
    return table(["target", "metric", "model", "value [95 % interval]", "test people",
                  "train people"], rows)


def probe_figure(results: Results) -> Any:
    """Predicted against true, a row per model and a column per target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(map(len, results.values()))
    plot, axes = plt.subplots(len(results), columns, squeeze=False,
                              figsize=(4.2 * columns, 3.5 * len(results)), layout="constrained")
    for row, (name, probes) in zip(axes, results.items(), strict=True):
        for axis, each in zip(row, probes, strict=True):
            axis.set_title(f"{each.target} · {name}", fontsize=10)
            if each.kind == "regression":
                low, high = each.truth.min(), each.truth.max()
                axis.plot([low, high], [low, high], color="#c5ccd6", zorder=0)
                axis.scatter(each.truth, each.predicted, s=16, color=BLUE, alpha=0.75)
                axis.set(xlabel="true", ylabel="predicted")
            else:
                assert each.classes is not None
                jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(each.truth))
                axis.scatter(each.truth + jitter, each.predicted, s=16, color=BLUE, alpha=0.75)
                axis.set_xticks([0, 1], each.classes)
                axis.set(ylabel=f"probability of {each.classes[1]}", ylim=(-0.03, 1.03))
            axis.spines[["top", "right"]].set_visible(False)
    return plot
