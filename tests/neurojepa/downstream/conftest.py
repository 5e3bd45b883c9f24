"""Fixtures of what is read from embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from neurojepa.downstream import stats, study_checks
from tests.helpers.embedded import cohort, write_embedded


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer draws of people and fewer shuffles, to be quick."""
    monkeypatch.setattr(stats, "DRAWS", 40)
    monkeypatch.setattr(stats, "P_DRAWS", 40)
    monkeypatch.setattr(study_checks, "SHUFFLES", 2)
    yield


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """Embeddings of 40 people, p0 to p39, of two visits each; p0 was seen in pretraining."""
    values, _ = cohort(40, signal=8)
    who = np.repeat(np.arange(40), 2)
    second = np.tile([False, True], 40)
    write_embedded(tmp_path, values[who] + second[:, None], [f"p{n}" for n in who],
                   session=np.where(second, "2", "1").tolist(),
                   family=[f"f{n // 2}" for n in who], split="train", seen=(who == 0).tolist(),
                   brain_ml=(1000.0 + who).tolist(), age=(50.0 + who).tolist())
    return tmp_path
