"""The report of a small archive: what it says, what it must not say, and how a browser shows it."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.archive import commit_tables, slot, write_volume
from data_prep.prepare.duplicates import fingerprint, review_table
from data_prep.report.figures import Line, ages, distribution, slices
from data_prep.report.report import report
from data_prep.rows import scan_table
from data_prep.volumes.preview import preview
from data_prep.volumes.reading.volume import Volume
from neurojepa.errors import DataError
from neurojepa.feed.format import ARCHIVE_GRID, LABELS_SCHEMA
from tests.helpers.browser import look
from tests.helpers.fakes import volume
from tests.helpers.texts import without_hashes

ORIGINAL = "secret-19500403"  # stands for names, dates and paths of the source


def row(number: int, status: str = "accepted", **more: object) -> dict:
    return {"uri": f"/data/{ORIGINAL}/{number}.nii.gz", "member": f"{ORIGINAL}.nii",
            "cohort": "ukb" if number % 2 else "adni", "participant": f"person{number // 2}",
            "family": f"person{number // 4}", "session": "1", "site": f"site{number % 3}",
            "modality": "FLAIR" if number // 2 % 2 else "T1w",
            "split": "val" if number % 4 // 2 else "train",
            "sex": (None, "F", "M")[number % 3], "age_at_scan": 40.0 + number, "status": status,
            "reason": None, "message": None, "scan_id": f"{number:024x}",
            "figures": {"qc_snr": 20.0 + number, "qc_cjv": None,
                        "qc_cjv_reason": "<odd> & reason"}} | more


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five scans with voxels, of which two are alike, and many rows that were rejected."""
    uri = str(tmp_path_factory.mktemp("report") / "archive")
    rows = [row(number) for number in range(5)]
    for each, text in zip(rows, ("a", "b", "c", "d", "a"), strict=True):
        image, mask = volume(text)
        write_volume(uri, slot(each["participant"], each["scan_id"]), image=image, mask=mask,
                     label=None)
        each["figures"]["fingerprint"] = fingerprint(image, mask)
        each["modality"] = "T1w"
    rows[2] |= {"status": "flagged", "reason": "low_snr;outlier:qc_cjv;odd_flag"}
    rows[3] |= {"notes": "minimal;demeaned"}
    rows[4] |= {"notes": "minimal"}
    message = f"/data/{ORIGINAL}/x.nii.gz: ends after 3 bytes"
    rows += [row(number, "rejected", scan_id=None, message=message,
                 reason=("truncated", f"duplicate_of:{ORIGINAL}/f00", "a<b")[number % 3])
             for number in range(5, 40)]
    rows[7]["figures"]["preview"] = preview(head())
    commit_tables(uri, scans=scan_table(rows), labels=LABELS_SCHEMA.empty_table(),
                  review=review_table(rows))
    return uri


@pytest.fixture(scope="module")
def page(archive: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    report(archive, str(out))
    return out


def head() -> Volume:
    """A box whose right half is bright, stored from right to left in voxels of 3 x 5 x 5 mm."""
    data = np.zeros((70, 50, 4), np.float32)
    data[10:60, 10:40] = 0.4
    data[10:35, 10:40] = 1.0
    return Volume("h", data, np.array([[-3.0, 0, 0, 90], [0, 5, 0, -100], [0, 0, 5, 30],
                                       [0, 0, 0, 1]]))


def text_of(page: Path) -> str:
    bare = re.sub(r"<style>.*?</style>|src='data:[^']*'", "", page.read_text(), flags=re.S)
    return re.sub(r"<[^>]+>", " ", bare)


def test_the_page_counts_everything(page: Path) -> None:
    text = " ".join(text_of(page).split())
    assert "40 scans of 20 people: 4 accepted, 1 flagged, 35 rejected" in text
    assert "low: SNR against air grain hides cortex" in text
    assert "outlier: joint variation of grey and white (CJV)" in text and "odd flag" in text
    assert "Rejected: 35" in text and "truncated" in text
    assert "Equal voxels: 11 scans were rejected as copies" in text
    assert "Accepted: 4 of 4" in text and "Flagged: 1 of 1" in text


def test_notes_are_counted_apart_and_flag_nothing(page: Path) -> None:
    text = " ".join(text_of(page).split())
    flags, _, notes = text.partition("Notes A note says how a map was made.")
    assert "the series was delivered without removal of motion" in notes
    assert re.search(r"minimal the series .*? confounds 2 demeaned the series .*? cleaning 1 ",
                     notes)
    assert "minimal" not in flags and "low: SNR against air" in flags


def test_near_duplicates_of_different_people_are_shown_side_by_side(page: Path) -> None:
    assert text_of(page).count("pair 1, similarity 1.00") == 2


def test_splits_count_people_families_and_unknown_sex(page: Path) -> None:
    text = " ".join(text_of(page).split())
    # a person's sex and age are those of the first scan: None at 40 and F at 44, M at 42
    assert "train 2 2 3 1 / 0 / 1 42 (40 to 44)" in text
    assert "val 1 1 2 0 / 1 / 0 42 (42 to 42)" in text


def test_no_source_names_paths_or_messages_are_on_it(page: Path) -> None:
    whole = without_hashes(page.read_text())
    assert ORIGINAL not in whole and "/data/" not in whole and "person1" not in whole
    assert "http" not in whole and "<script" not in whole
    assert "a&lt;b" in whole and "&lt;odd&gt; &amp; reason" in whole  # text stays text


def test_the_page_is_the_same_every_time(archive: str, page: Path, tmp_path: Path) -> None:
    report(archive, str(tmp_path / "again.html"))
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_an_unfinished_archive_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished archive here"):
        report(str(tmp_path), str(tmp_path / "x.html"))


def test_the_slices_keep_left_and_right() -> None:
    from io import BytesIO

    from PIL import Image

    image = np.zeros(ARCHIVE_GRID.shape, np.float32)
    mask = np.zeros(ARCHIVE_GRID.shape, np.uint8)
    mask[40:140, 40:180, 40:140] = 1
    image[mask == 1] = 0.2
    image[110:140, 40:180, 40:140] = 1.0  # a bright right side
    pixels = np.asarray(Image.open(BytesIO(slices(image, mask))).convert("L"), float)
    x, y = ARCHIVE_GRID.shape[:2]
    coronal, axial = pixels[:, y + 6:y + 6 + x], pixels[:, y + x + 12:]
    for panel in (coronal, axial):
        assert panel.shape[1] == x
        assert panel[:, 112:138].mean() > 2 * panel[:, 42:68].mean()


def test_a_rejected_scan_is_shown_coarsely(page: Path) -> None:
    from io import BytesIO

    from PIL import Image

    picture = base64.b64decode(preview(head()))
    pixels = np.asarray(Image.open(BytesIO(picture)), float)
    assert pixels.shape == (128, 384)  # three slices of 64 voxels of 4 mm, doubled
    assert pixels[60:68, 128 + 70:128 + 90].mean() > 2 * pixels[60:68, 128 + 38:128 + 58].mean()
    assert page.read_text().count("alt='a rejected scan") == 1


def test_charts_survive_what_archives_hold() -> None:
    same = np.full(3, 7.0)
    for values, limits in ((same, (7.0,)), (np.array([0.0]), ()), (np.arange(5000.0), (1e9,))):
        chart = distribution("a <b>", "", [Line("x", values, values > 3, limits)])
        assert "nan" not in chart and "a &lt;b&gt;" in chart
        assert len(chart) < 60_000  # dots are drawn for some of many scans
    assert "<rect" in ages({"train": [50.0], "test": [50.0, 71.0]})


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_without_overflow(page: Path, tmp_path: Path, width: int) -> None:
    facts = look(page, tmp_path, """
      facts.small = [...document.querySelectorAll('p, td, th, figcaption, .tile span')].filter(
        e => parseFloat(getComputedStyle(e).fontSize) < 12).length;""", width)
    assert facts["width"] <= max(width, 500) and facts["overflow"] <= 0
    assert facts["images"] == 5 + 2 + 1 and facts["broken"] == 0
    assert facts["requests"] == 0 and facts["small"] == 0
