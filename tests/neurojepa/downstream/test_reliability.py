"""Rescans: the intraclass correlation that was planted is found, and ComBat takes sites out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.identity import pseudonym
from neurojepa.downstream import reliability as module
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.output import Figures
from neurojepa.downstream.reliability import reliability, scans_of
from neurojepa.downstream.reliability_page import methods, reliability_page
from neurojepa.errors import ConfigError, NeurojepaError
from tests.helpers.browser import look
from tests.helpers.embedded import KEY
from tests.helpers.trees import write

SITES = ("a", "b", "c", "d")


pytestmark = pytest.mark.usefixtures("few_draws")


def travelling(people: int = 40, *, between: float = 1.0, within: float = 0.5, sites: float = 0.0,
               visits: bool = False, seed: int = 0) -> pa.Table:
    """Heads scanned at four sites, 12 features each of these standard deviations."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, sites, (4, 12)) if sites else np.zeros((4, 12))
    rows = []
    for number in range(people):
        own = rng.normal(0, between, 12)
        own[0] = own[0] + 2 * (number % 2)
        for k, site in enumerate(SITES):
            values = own + shift[k] + rng.normal(0, within, 12)
            rows.append({"scan_id": f"s{number}-{k}", "session": str(k) if visits else "1",
                         "participant": pseudonym(KEY, "clinic", f"p{number}"),
                         "family": f"f{number // 2}", "cohort": "clinic", "modality": "T1w",
                         "site": site, "split": "test", "brain_ml": 1400.0, "seen": False,
                         "embedding": values.tolist()})
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize(("within", "expected"), [(0.2, 0.96), (1.0, 0.5), (3.0, 0.1)])
def test_the_planted_correlation_is_found(within: float, expected: float) -> None:
    scans, unit, _ = scans_of(travelling(200, within=within), None, False)
    scans.columns["site"][:] = "a"  # all alike
    found = reliability(scans, unit, {}).measures[0]
    assert found.icc.value == pytest.approx(expected, abs=0.06)
    assert np.median(found.features) == pytest.approx(expected, abs=0.06)
    assert found.icc.low < found.icc.value < found.icc.high
    assert found.icc.num_people == 200 and found.icc.num_scans == 800


def test_the_correlation_by_hand_with_unequal_numbers_of_scans() -> None:
    """Shrout and Fleiss' mean squares of two units with three and two scans."""
    table = travelling(2).take(pa.array([0, 1, 2, 4, 5]))
    scans, unit, _ = scans_of(table, None, False)
    x = scans.values[:, 0].astype(float)
    one, other = x[:3], x[3:]
    between = 3 * (one.mean() - x.mean())**2 + 2 * (other.mean() - x.mean())**2
    within = (one.var() * 3 + other.var() * 2) / 3
    number = 5 - (9 + 4) / 5
    expected = (between - within) / (between + (number - 1) * within)
    scans.columns["site"][:] = "a"
    assert module._icc(scans.values, unit, scans)[1][0] == pytest.approx(expected)


def test_sites_lower_it_and_combat_brings_it_back() -> None:
    scans, unit, _ = scans_of(travelling(60, within=0.4, sites=2.0), None, False)
    labels = {"dx": np.array([str(int(who[1:]) % 2) for who in np.repeat(
        [f"p{n}" for n in range(60)], 4)])}
    found = reliability(scans, unit, labels)
    raw, alike = (each for each in found.measures if each.name == "embedding")
    assert raw.icc.high < 0.4 and alike.icc.low > 0.75
    assert raw.same.value < 0.2 and alike.same.value > 0.8
    assert raw.site.low > 0.9 and alike.site.value < 0.35  # chance is .25
    before, after = (each for each in found.measures if each.name == "readout of dx")
    assert after.icc.value > before.icc.value + 0.1 and before.same is None


def test_noise_is_not_reliable() -> None:
    scans, unit, _ = scans_of(travelling(60, between=1e-9, within=1.0), None, False)
    scans.values[:, 0] = np.random.default_rng(1).normal(size=240)
    found = reliability(scans, unit, {}).measures[0]
    assert abs(found.icc.value) < 0.05 and found.same.value < 0.1


def test_visits_are_rescans_only_when_that_is_said() -> None:
    table = travelling(10, visits=True)
    with pytest.raises(NeurojepaError, match=r"0 of 40 visits have two scans.*--across-visits"):
        scans_of(table, None, False)
    _, unit, notes = scans_of(table.slice(0, 37), None, True)  # the last person has one scan
    assert len(unit) == 36 and notes == ["1 scans without a rescan"]


def test_what_is_said_of_rescans_that_were_seen_or_lack_a_site_or_volumes() -> None:
    table = travelling(10, sites=1.0)
    rows = table.to_pylist()
    for row in rows[:8]:
        row["seen"] = True
    rows[0]["site"] = None
    volumes = {row["scan_id"]: np.ones(3) for row in rows[1:]}
    scans, unit, notes = scans_of(pa.Table.from_pylist(rows), volumes, False)
    found = reliability(scans, unit, {})
    assert found.warnings == ["2 of 10 people were seen in the pretraining of the weights and "
                              "tested all the same: scores may be too good"]
    assert notes == ["region volumes are not compared with: 1 of 40 scans have none in volumes.csv"]
    record = {"embeddings": "e", "modality": "T1w", "rescans": "visits", "notes": notes,
              "methods": "", "version": "0"}
    page = reliability_page(found, record, Figures())
    assert "Look out: 2 of 10 people" in page and "some scans do not say theirs" in page
    assert "ComBat" not in methods(found, record)


def test_one_family_tells_nothing() -> None:
    scans, unit, _ = scans_of(travelling(2), None, False)
    with pytest.raises(NeurojepaError, match="all rescans are of one family"):
        reliability(scans, unit, {})


@pytest.mark.browser
@pytest.mark.slow(4)
def test_the_page_fits_a_phone(tmp_path: Path) -> None:
    scans, unit, _ = scans_of(travelling(24, sites=2.0), None, False)
    found = reliability(scans, unit, {})
    record = {"embeddings": "e", "modality": "T1w", "rescans": "visits", "notes": [],
              "methods": "", "version": "0"}
    page = tmp_path / "report.html"
    page.write_text(reliability_page(found, record, Figures()))
    facts = look(page, tmp_path, width=400)
    assert facts["overflow"] <= 0 and not facts["broken"] and not facts["requests"]
    assert facts["images"] == 2


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(travelling(24, sites=2.0), tmp_path / "embeddings.parquet")
    lines = [f"p{n},{n % 2},{n}" for n in range(20)]
    write(tmp_path, {"key": KEY, "my.csv": "participant_id,dx,age\n" + "\n".join(lines)})
    (tmp_path / "key").chmod(0o600)
    words = ["reliability", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="--labels TABLE --label COLUMN"):
        downstream([*words, "--label", "dx"])
    assert downstream([*words, "--labels", str(tmp_path / "my.csv"), "--label", "dx",
                       "--key", str(tmp_path / "key")]) == 0
    said = capsys.readouterr().out
    assert "embedding, after ComBat: ICC 0." in said and "readout of dx: ICC" in said
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["schema"] == "neurojepa/reliability/1" and len(record["measures"]) == 4
    assert record["measures"][0]["site_told"]["value"] > 0.9 and "ICC(1,1)" in record["methods"]
    assert "4 people or visits with a scan but no row in the table" in record["notes"]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<figure>") == 2 and "after ComBat" in page
    assert {path.name for path in (tmp_path / "out/figures").iterdir()} == {
        "icc.svg", "icc.png", "features.svg", "features.png"}
    read = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert len(read) == 81 and read[0].startswith("scan_id,participant")
