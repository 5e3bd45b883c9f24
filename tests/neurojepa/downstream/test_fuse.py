"""Images beside tables with gaps: what was planted is found, what was not is not, nobody is lost.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.synth.clinical import Clinical, draw_clinical
from data_prep.synth.cohort import draw_person
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.blocks import Block, block_of, filled, gaps_alone, parse_blocks
from neurojepa.downstream.fuse import BOTH, GAPS, IMAGE, SHUFFLED, TABLES, fuse, without
from neurojepa.downstream.labels import People
from neurojepa.errors import NeurojepaError
from tests.helpers.embedded import people, write_embedded
from tests.helpers.trees import write

pytestmark = pytest.mark.usefixtures("few_draws")

BLOCKS = {"genotype": ("allele_dose",), "cognition": ("memory", "attention"),
          "fluid": ("csf_abeta", "csf_tau")}


def synthetic(number: int = 300) -> People:
    """The synthetic cohort's clinic, beside an embedding that shows volumes and lesions alone."""
    persons = [draw_person(11, index) for index in range(number)]
    clinics = [draw_clinical(11, person) for person in persons]
    rng = np.random.default_rng(0)
    seen = np.array([[1.6 * person.patient + person.traits.grey, person.hippocampus_rest * 10,
                      2.0 * person.small_vessel + person.traits.lesions,
                      (person.visits[0].age - 48) / 19] for person in persons])
    values = seen @ rng.normal(size=(4, 12)) + 2.5 * rng.normal(size=(number, 12))
    columns = {name: np.array(["" if getattr(each, name) is None else str(getattr(each, name))
                               for each in clinics]) for name in Clinical.__dataclass_fields__}
    return people(values, age=np.array([person.visits[0].age for person in persons]),
                  diagnosis=np.array([int(person.patient) for person in persons]),
                  small_vessel=np.array([int(person.small_vessel) for person in persons]),
                  **columns)


@pytest.mark.slow(8)
def test_tables_add_to_the_image_where_that_is_planted_and_nothing_elsewhere() -> None:
    whom = synthetic()
    found = fuse(whom, "diagnosis", BLOCKS, adjust=("age",), folds=4, repeats=1)
    scores = {name: row.scores["auroc"] for name, row in found.rows.items()}
    gains = {(gain.row, gain.over): gain for gain in found.gains}
    assert gains[BOTH, IMAGE].score.low > 0 and gains[BOTH, TABLES].score.low > 0
    assert gains[BOTH, without("cognition")].score.low > 0
    assert scores[BOTH].value > 0.85 and abs(scores[SHUFFLED].value - 0.5) < 0.1
    assert scores[BOTH].num_people == len(whom.ids)  # those who lack a block stay
    assert any(note.endswith("without fluid: they stay") for note in found.notes)
    # patients come to the test less often, and that is said
    assert scores[GAPS].low > 0.5 and any("gaps alone tell" in each for each in found.warnings)
    lacking = next(each for each in found.among if each.block == "fluid" and not each.there)
    assert lacking.people > 120 and lacking.scores[BOTH] and lacking.scores[BOTH].value > 0.8

    two = {name: BLOCKS[name] for name in ("cognition", "fluid")}
    null = fuse(whom, "small_vessel", two, adjust=("age",), folds=4, repeats=1)
    gains = {(gain.row, gain.over): gain for gain in null.gains}
    assert gains[BOTH, TABLES].score.low > 0.05
    assert abs(gains[BOTH, without("cognition")].score.value) < 0.03
    assert null.rows["fluid alone"].scores["auroc"].low < 0.5 and not null.warnings


def test_a_gap_is_the_mean_of_those_who_teach_and_says_that_it_was_one() -> None:
    block = Block("fluid", ("a", "b"), np.array(
        [[1.0, 5], [3, 9], [np.nan, 7], [np.nan, np.nan], [100, np.nan]]))
    train, test = np.array([0, 1, 2]), np.array([3, 4])
    taught, tested = filled([block])(train, test)
    # a: mean 2 of the known ones; gaps of a are told, those of b no one who teaches has
    assert taught.shape == (3, 3) and taught[2, 0] == pytest.approx(0)
    assert taught.std(0) == pytest.approx(1)
    assert tested[0, :2] == pytest.approx(0)
    assert tested[1, 0] == pytest.approx((100 - 2) / np.std([1, 3, 2]))
    assert taught[2, 2] > 0 > taught[0, 2] and tested[0, 2] == pytest.approx(taught[2, 2])
    image = np.random.default_rng(0).normal(size=(5, 7))
    both, _ = filled([block], image)(train, test)
    assert both.shape == (3, 10) and np.square(both[:, 3:]).sum(1).mean() == pytest.approx(1)


def test_patterns_of_gaps_count_once() -> None:
    together = np.array([[1.0, 2, 3], [np.nan, np.nan, 1], [2, 1, 4], [np.nan, np.nan, 7]])
    features = gaps_alone([Block("a", ("x", "y", "z"), together)])
    assert features and features(np.arange(4), np.arange(1))[0].shape == (4, 1)
    assert gaps_alone([Block("a", ("z",), together[:, 2:])]) is None


def test_words_become_columns_and_gaps_stay_gaps() -> None:
    whom = people(np.zeros((4, 2)), stage=np.array(["late", "", "early", "none"]),
                  score=np.array(["1", "x", "3", "4"]), one=np.array(["a", "", "a", "a"]))
    block = block_of(whom, "clinic", ["stage"])
    assert block.values[0].tolist() == [1, 0] and np.isnan(block.values[1]).all()
    assert block.known.tolist() == [True, False, True, True]
    assert block_of(whom, "clinic", ["one"]).known.tolist() == [True, False, True, True]
    with pytest.raises(NeurojepaError, match="'score': 'x' is no number, others are"):
        block_of(whom, "clinic", ["score"])
    with pytest.raises(NeurojepaError, match="column 'mmse': neither the table nor the scans"):
        block_of(whom, "clinic", ["mmse"])
    empty = people(np.zeros((4, 2)), csf=np.full(4, ""))
    with pytest.raises(NeurojepaError, match="'fluid': nobody with a scan has a value in csf"):
        block_of(empty, "fluid", ["csf"])


@pytest.mark.parametrize(("texts", "words"), [
    (["fluid"], "write a name and its columns"), (["=a"], "write a name"),
    (["f=a,"], "write a name"), (["f=a", "f=b"], "a block 'f' already"),
    (["f=a", "g=b,a"], "column 'a' stands in two blocks")])
def test_blocks_that_cannot_be_meant(texts: list[str], words: str) -> None:
    with pytest.raises(NeurojepaError, match=words):
        parse_blocks(texts)


def test_a_block_is_no_label_and_no_covariate() -> None:
    whom = people(np.random.default_rng(0).normal(size=(20, 3)), dx=np.arange(20) % 2,
                  age=50 + np.arange(20))
    for columns in (("dx",), ("age",)):
        with pytest.raises(NeurojepaError, match="the label or a covariate among its columns"):
            fuse(whom, "dx", {"a": columns}, adjust=("age",))
    with pytest.raises(NeurojepaError, match="--adjust dx: is the label itself"):
        fuse(whom, "dx", {"a": ("age",)}, adjust=("dx",))


def test_the_command_writes_results_and_a_page(tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    truth = rng.permutation(60) % 2
    write_embedded(tmp_path, rng.normal(size=(60, 6)) + truth[:, None],
                   [f"p{n}" for n in range(60)], brain_ml=(1400.0 + np.arange(60) % 9).tolist())
    lines = [f"p{n},{'CN' if truth[n] else 'AD'},{'n/a' if n % 3 else f'{30 + rng.normal():.3f}'},"
             f"{rng.normal():.3f}" for n in range(60)]
    write(tmp_path, {"my.csv": "participant_id,dx,mmse,tau\n" + "\n".join(lines)})
    assert downstream([
        "fuse", str(tmp_path), "--labels", str(tmp_path / "my.csv"), "--label", "dx", "--positive",
        "AD", "--block", "cognition=mmse", "fluid=tau", "--cv", "1x2", "--key",
        str(tmp_path / "key"), "--out", str(tmp_path / "out")]) == 0
    assert "dx: image and tables: auroc 0." in capsys.readouterr().out
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["schema"] == "neurojepa/fuse/1" and record["rows"] == 60
    assert record["blocks"][0] == {"name": "cognition", "columns": ["mmse"], "known": 20}
    page = (tmp_path / "out/report.html").read_text()
    assert "dx from images and tables" in page and page.count("<figure>") == 1
    assert len((tmp_path / "out/predictions.csv").read_text().splitlines()) == 61
