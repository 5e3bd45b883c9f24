"""The archive's table: outliers among its rows, and its fixed columns."""

from __future__ import annotations

from typing import Any

from data_prep.prepare.merge import merge
from data_prep.qc.judge import rules
from data_prep.rows import FIXED_SCHEMA, ArchiveRow, Status, archive_rows, scan_table


def rows(values: list[float | None], cohort: str = "a", figure: str = "qc_snr",
         name: str = "") -> list[Any]:
    return [{"uri": f"{cohort}{name}{i}", "member": None, "cohort": cohort, "modality": "T1w",
             "participant": f"p{i}", "session": "1", "scan_id": f"{cohort}{name}{i}",
             "status": Status.ACCEPTED, "reason": None, "figures": {figure: value}}
            for i, value in enumerate(values)]


def flagged(*chunks: list[Any]) -> dict[str, str | None]:
    """Reasons of the flagged rows by URI, once all are merged."""
    return {row["uri"]: row["reason"] for row in archive_rows(merge(None, chunks))
            if row["status"] == Status.FLAGGED}


def test_outliers_are_judged_within_a_cohort_on_the_worse_side() -> None:
    usual = [20 + 0.1 * i for i in range(30)]
    found = flagged(rows([*usual, 2.0, 90.0, None]), rows([*usual[:5], 1.0], "small"))
    assert found == {"a30": "outlier:qc_snr"}
    # what is usual in one cohort says nothing about another
    assert flagged(rows(usual), rows([value / 10 for value in usual], "b")) == {}


def test_rejected_rows_do_not_count_as_usual() -> None:
    many = rows([20 + 0.1 * i for i in range(19)] + [1.0])
    assert flagged(many) == {"a19": "outlier:qc_snr"}
    many[0] |= {"status": Status.REJECTED, "reason": "truncated"}
    assert flagged(many) == {}  # 19 measured are too few


def test_outliers_are_flagged_from_all_that_is_there_now() -> None:
    """A scan far from its cohort is flagged by figures; more scans of its kind undo it."""
    figure = next(name for name, info in rules().figures.items() if info.worse != "none")
    bulk = [100.0 + n % 5 for n in range(30)]
    first = merge(None, [rows([*bulk, 1e6, -1e6], figure=figure)])
    found = {row["scan_id"]: row["reason"] for row in archive_rows(first)
             if row["status"] == Status.FLAGGED}
    assert found and set(found) <= {"a30", "a31"}
    assert set(found.values()) == {f"outlier:{figure}"}
    wide = rows([value for n in range(60) for value in (1e6 + n, -1e6 - n)], figure=figure,
                name="w")
    second = merge(first, [wide])
    assert set(second["status"].to_pylist()) == {"accepted"}
    assert second["reason"].null_count == len(second)


def test_the_typed_row_has_the_fixed_columns_and_figures() -> None:
    assert ArchiveRow.__annotations__.keys() == {*FIXED_SCHEMA.names, "figures"}


def test_a_status_is_stored_as_plain_text() -> None:
    (row,) = scan_table(rows([20.0])).to_pylist()
    assert type(row["status"]) is str and row["status"] == "accepted"
