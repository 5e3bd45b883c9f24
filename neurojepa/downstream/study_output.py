"""What a study of labels leaves in a folder: results.json, report.html and predictions.csv."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from typing import Any

from neurojepa import __version__
from neurojepa.downstream.study import Study, predictions_of, record_of
from neurojepa.downstream.study_page import methods, study_page
from neurojepa.storage import join, write_bytes

SCHEMA = "neurojepa/probe/1"


def write_studies(out: str, studies: Sequence[Study], record: dict[str, Any]) -> None:
    """Write the results of labels studied together.

    Parameters
    ----------
    record : of the command: embeddings, labels, cv, modality, allow_seen, notes
    """
    record = {"schema": SCHEMA, "version": __version__, **record}
    record |= {"results": {each.target.name: record_of(each) for each in studies},
               "methods": methods(studies, record)}
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(predictions_of(studies))
    uri = join(out, "predictions.csv")
    write_bytes(uri, text.getvalue().encode())
    if os.path.exists(uri):
        os.chmod(uri, 0o600)  # it holds the user's own ids
    write_bytes(join(out, "report.html"), study_page(studies, record).encode())
    write_bytes(join(out, "results.json"), json.dumps(_finite(record), indent=1).encode())


def _finite(value: Any) -> Any:
    """The same with null for what is not a number, which JSON cannot say."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value != value else value
