"""What a task leaves in a folder, alike for all of them.

    results.json       every figure of the page, with a schema, and the methods paragraph
    report.html        the page, which needs no network
    predictions.csv    each person's, under the user's own ids (mode 0600)
    figures/           the page's figures as PNG and SVG
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from neurojepa import __version__
from neurojepa.report import figure
from neurojepa.storage import join, write_bytes


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


def headed(schema: str, record: dict[str, Any]) -> dict[str, Any]:
    """A record with its schema, such as probe/1, and the version that made it."""
    return {"schema": f"neurojepa/{schema}", "version": __version__, **record}


def write_task(out: str, record: dict[str, Any], page: str,
               predictions: Sequence[Sequence[Any]], figures: Figures) -> None:
    """Write all of it; ``predictions`` begin with their header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(predictions)
    uri = join(out, "predictions.csv")
    write_bytes(uri, text.getvalue().encode())
    if os.path.exists(uri):
        os.chmod(uri, 0o600)  # it holds the user's own ids
    for name, data in figures.files.items():
        write_bytes(join(out, "figures", name), data)
    write_bytes(join(out, "report.html"), page.encode())
    write_bytes(join(out, "results.json"), json.dumps(finite(record), indent=1).encode())


def finite(value: Any) -> Any:
    """The same with null for what is not a number, which JSON cannot say."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and value != value else value
