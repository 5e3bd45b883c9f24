"""What a task leaves in a folder, and what its page has in common with those of other tasks.

    results.json       every figure of the page, with a schema, and the methods paragraph
    report.html        the page, which needs no network
    predictions.csv    each person's, under the user's own ids (mode 0600)
    figures/           the page's figures as PNG and SVG
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from neurojepa import __version__
from neurojepa.downstream import stats
from neurojepa.report import BLUE, GREY, figure, heading, paragraph, section, table
from neurojepa.storage import join, write_bytes

BIDS_VERSION = "1.10.0"


class Figures:
    """Figures of a page, which are kept as files, too."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def show(self, name: str, plot: Any, caption: str) -> str:
        """The figure as a part of the page; the matplotlib figure is closed."""
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        for kind in ("svg", "png"):
            buffer = io.BytesIO()
            plot.savefig(buffer, format=kind, dpi=200, bbox_inches="tight", facecolor="white",
                         metadata={"Date": None} if kind == "svg" else None)
            self.files[f"{stem}.{kind}"] = buffer.getvalue()
        return figure(plot, caption)


def new_plot(width: float = 4.6, height: float = 4.2) -> tuple[Any, Any]:
    """A figure and its axes, of the house's look."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    return plot, axis


def scatter(name: str, truth: np.ndarray, predicted: np.ndarray) -> Any:
    """Predicted [n] against true numbers [n] of this name."""
    plot, axis = new_plot()
    low, high = truth.min(), truth.max()
    axis.plot([low, high], [low, high], color=GREY, zorder=0)
    axis.scatter(truth, predicted, s=16, color=BLUE, alpha=0.75)
    axis.set(xlabel=f"true {name}", ylabel=f"predicted {name}")
    return plot


def gains_table(gains: Sequence[dict[str, Any]], metric: str) -> list[str]:
    """Paired differences under their heading, where there are some."""
    if not gains:
        return []
    rows = [[f"{gain['row']} less {gain['over']}",
             f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]", f"{gain['p']:.3f}",
             f"{gain['p_holm']:.3f}"] for gain in gains]
    return [heading("Paired differences"),
            table(["difference", metric, "p", "p, all on this page (Holm)"], rows),
            paragraph(f"p values come from {stats.P_DRAWS:,} draws of families and people: none "
                      f"can be below {2 / (stats.P_DRAWS + 1):.3f} before Holm's adjustment.")]


def bootstrap() -> str:
    """How intervals and p values came about, for the methods section."""
    return (f"Intervals are 95 % percentile intervals of {stats.DRAWS:,} bootstrap draws of "
            f"families and people. Paired differences have {stats.P_DRAWS:,} draws and two-sided p "
            "values, adjusted for all comparisons of the report by Holm's method.")


def how_done(record: dict[str, Any], more: Sequence[str] = ()) -> str:
    """The section of the methods, and of notes: the record's and ``more``."""
    notes = [*record["notes"], *more]
    return section("How it was done", paragraph(record["methods"]), *(
        [paragraph("Notes: " + "; ".join(notes) + ".")] if notes else []))


def write_description(out: str, name: str) -> None:
    """Say as BIDS does that a folder holds derivatives, made by neurojepa."""
    write_bytes(join(out, "dataset_description.json"), json.dumps({
        "Name": name, "BIDSVersion": BIDS_VERSION, "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "neurojepa", "Version": __version__}]}, indent=1).encode() + b"\n")


def write_task(out: str, schema: str, record: dict[str, Any], *,
               methods: Callable[[dict[str, Any]], str],
               page: Callable[[dict[str, Any], Figures], str],
               predictions: Sequence[Sequence[Any]] = ()) -> None:
    """Write all of it, and say where.

    Parameters
    ----------
    schema : of the record, such as probe/1
    methods, page : the paragraph and the page of the whole record
    predictions : rows of a table, from its header on; none of a task that predicts nobody
    """
    record = {"schema": f"neurojepa/{schema}", "version": __version__, **record}
    record["methods"], figures = methods(record), Figures()
    html = page(record, figures)
    if predictions:
        _write_predictions(join(out, "predictions.csv"), predictions)
    for name, data in figures.files.items():
        write_bytes(join(out, "figures", name), data)
    write_bytes(join(out, "report.html"), html.encode())
    write_bytes(join(out, "results.json"), json.dumps(
        finite(record), indent=1, allow_nan=False).encode())
    print(f"read {join(out, 'report.html')}")


def _write_predictions(uri: str, predictions: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(predictions)
    write_bytes(uri, text.getvalue().encode(), private=True)  # it holds the user's own ids


def finite(value: Any) -> Any:
    """The same with null for what is no finite number, which JSON cannot say."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
