"""The table of codes: whose scans are read, and how atoms are compared, on values made up here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from neurojepa.downstream.pooling import Tokens
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Feed
from tests.helpers.batches import GRID
from tools.bench import codes


def test_those_who_teach_and_val_are_read_and_nobody_tested(monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    monkeypatch.setattr(codes, "PEOPLE", 2)
    split = ["train"] * 4 + ["val", "test"]
    index = pa.table({"participant": [f"p{k}" for k in range(6) for _ in range(3)],
                      "split": [each for each in split for _ in range(3)],
                      "modality": ["T1w", "T2w", "FLAIR"] * 6})
    assert codes.rows_read(Feed("", GRID, index, "")).tolist() == [0, 1, 3, 4, 12, 13]


@pytest.mark.parametrize("chosen", [[True] * 5, [False, True, True, False, True], [False] * 5])
def test_scans_are_chosen_across_batches(chosen: list[bool]) -> None:
    whole = [Tokens(*(torch.arange(first, last).float().reshape(-1, 1) for _ in range(4)))
             for first, last in ((0, 3), (3, 5))]
    found = codes.only(whole, np.array(chosen))
    values = [value for each in found for value in each.z_BND.flatten().tolist()]
    assert values == [float(k) for k in range(5) if chosen[k]]


def test_atoms_in_another_order_are_the_same_and_strangers_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.relu(torch.randn(2000, 12, generator=generator))
    silent = torch.zeros(2000, 1)
    other = torch.cat([3 * h[:, torch.randperm(12, generator=generator)], silent], 1)
    assert codes.same_atoms(h, other) == pytest.approx(1, abs=1e-4)
    strangers = torch.relu(torch.randn(2000, 12, generator=generator))
    assert codes.same_atoms(h, strangers) < 0.1
    assert codes.same_atoms(h, torch.cat([h[:, :6], strangers[:, :6]], 1)) == pytest.approx(
        0.5, abs=0.06)


def test_the_table_has_what_was_read_and_what_is_the_same(tmp_path: Path) -> None:
    for k, name in enumerate(codes.CODES):
        codes.file_of(tmp_path, name).write_text(json.dumps({"active": 0.1 * k}))
    found = codes.table(tmp_path, {"own, top 16": {"same atoms, other draw": 0.7}})["codes"]
    assert list(found) == list(codes.CODES) and found["wide dense"] == {"active": 0}
    assert found["own, top 16"] == {"active": pytest.approx(0.1 * (len(found) - 1)),
                                    "same atoms, other draw": 0.7}


def test_atoms_are_compared_again_once_there_is_another_encoder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def agreements(first: list[Path]) -> dict[str, dict[str, float]]:
        made.append(len(first))
        return {"own": {"draw": 0.5} | ({codes.OTHER: 0.4} if len(first) > 1 else {})}

    monkeypatch.setattr(codes, "agreements", agreements)
    one, two = [tmp_path / "0"], [tmp_path / "0", tmp_path / "1"]
    for first in (one, one, two, two, one):
        found = codes.agreed(tmp_path / "same.json", first)
    assert made == [1, 2] and found["own"][codes.OTHER] == 0.4


def test_without_a_first_stage_compare_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished first stage in"):
        codes.run(False, None, str(tmp_path))
