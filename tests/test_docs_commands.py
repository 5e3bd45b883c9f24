"""The commands of README and docs do what these say: run here as they stand, on few people, from
the installed wheel; or by the test that a comment above the block names.  The notebooks run first,
on the same people."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from neurojepa.ports import free_port
from tests.helpers import ROOT
from tests.helpers.trees import write
from tests.helpers.wheel import build_wheel, install

# The same commands on fewer people at a coarser scale, with a key that gives every split people.
SMALLER = {"--participants 48": "--participants 12 --spacing-mm 4"}
KEY = "a public key for invented people (93)"
# What an earlier page has run is not run again, but on this page, whose scans have changed.
CHANGED = "how-to/labels.md"
NOTEBOOKS = ("scans-to-embeddings", "run-to-atoms")  # in the order in which they build on another
PREPARED = ("cohort", "archive")  # by the notebooks, and not again
TRAINED_AGAIN = "how-to/train.md"  # by two ranks, into a run directory of the same name
BLOCK = re.compile(r"(?:<!-- run by (?P<test>\S+) -->\n)?```(?P<kind>\w+)"
                   r"(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)```", re.DOTALL)
SRUN = """#!{python}
import os, subprocess, sys
step = {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_ID": "0"}}
ranks = [subprocess.Popen(sys.argv[1:], env={{**os.environ, **step, "SLURM_PROCID": str(rank),
                                              "SLURM_LOCALID": str(rank)}}) for rank in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    kind: str
    title: str | None  # of a file that it shows
    text: str
    test: str | None  # another test that runs it

    def commands(self) -> list[str]:
        """The lines of a shell block, without comments; a script is one command."""
        if self.text.startswith("#!"):
            return [self.text]
        text = self.text.replace("\\\n", "")  # lines that go on
        lines = [line.split("  #")[0].strip() for line in text.splitlines()]
        return [line for line in lines if line and line != "source .venv/bin/activate"]


def blocks() -> list[Block]:
    """Every block of README and docs: pages in the site's order, but the one that deletes last."""
    text = (ROOT / "mkdocs.yml").read_text()
    nav = yaml.safe_load(text[text.index("\nnav:"):])["nav"]
    pages = [page for page in _pages(nav) if (ROOT / "docs" / page).exists()]
    pages.sort(key=lambda page: page == "how-to/withdraw.md")
    texts = {"README.md": ROOT / "README.md", **{page: ROOT / "docs" / page for page in pages}}
    return [Block(page, found["kind"], found["title"], found["text"], found["test"])
            for page, path in texts.items() for found in BLOCK.finditer(path.read_text())]


def _pages(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    entries = entry.values() if isinstance(entry, dict) else entry
    return [page for each in entries for page in _pages(each)]  # type: ignore[attr-defined]


def test_commands_run_elsewhere_name_tests_that_exist() -> None:
    named = [block for block in blocks() if block.test]
    assert len(named) > 4
    assert not [block.test for block in named if not (ROOT / str(block.test)).is_file()]


def test_every_block_says_what_it_is() -> None:
    """One that does not would not be run."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        fences = re.findall(r"^```.*", page.read_text(), re.M)
        assert "```" not in fences[::2], page


def test_options_of_commands_run_elsewhere_exist() -> None:
    from tools.docs_hooks import help_of

    for block in blocks():
        for command in block.commands() if block.kind == "bash" and block.test else ():
            if found := re.search(r"python -m (data_prep|cluster|neurojepa) "
                                  r"(\w+(?: fit| apply)?)(.*?)(?: -- |$)", command):
                package = found[1].replace("neurojepa", "neurojepa.downstream")
                known = help_of(f"{package}.__main__", *found[2].split())
                options = re.findall(r"--[a-z-]+", found[3])
                assert all(option in known for option in options), command


def notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "docs/notebooks" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    cells = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.fixture(scope="module")
def after_notebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the notebooks have run from top to bottom."""
    folder = tmp_path_factory.mktemp("docs")
    for name in NOTEBOOKS:
        NotebookClient(notebook(name), timeout=600,
                       resources={"metadata": {"path": str(folder)}}).execute()
    return folder


@pytest.mark.slow(80)
@pytest.mark.timeout(900)
def test_the_notebooks_run_in_order(after_notebooks: Path) -> None:
    assert (after_notebooks / "atoms/report.html").stat().st_size > 10_000
    assert (after_notebooks / "key").read_text() == KEY  # so both have the same people


@pytest.mark.slow(100)
@pytest.mark.timeout(1500)
def test_the_commands_work_in_the_order_shown(after_notebooks: Path, s3, tmp_path: Path) -> None:
    folder = after_notebooks
    python = install(build_wheel(tmp_path), tmp_path / "environment") / "python"
    for path in folder.iterdir():
        if path.name not in PREPARED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    environment = _prepare_folder(folder, python)
    replaced = {**SMALLER, "s3://bucket": s3.uri}
    page, ran = "", set[str]()
    for block in blocks():
        if block.page != page and block.page == TRAINED_AGAIN:
            (folder / "run").rename(folder / "run-before")
        if block.page != page and block.page == CHANGED:
            _write_scores(folder)
        page = block.page
        if block.title and block.kind != "bash" and not (folder / block.title).exists():
            (folder / block.title).write_text(block.text)
        if block.test or block.kind not in ("bash", "python"):
            continue
        for command in [block.text] if block.kind == "python" else block.commands():
            if command in ran and page != CHANGED:
                continue
            ran.add(command)
            for shown, here in replaced.items():
                command = command.replace(shown, here)
            shell = [str(python), "-c"] if block.kind == "python" else ["bash", "-c"]
            done = subprocess.run([*shell, command], cwd=folder, env=environment, text=True,
                                  capture_output=True, timeout=600)
            assert done.returncode == 0, (f"{block.page}: {command}\n{done.stdout[-2000:]}\n"
                                          f"{done.stderr[-3000:]}")
    assert len(ran) > 25
    made = {path.name for path in folder.iterdir()}
    assert {"cohort", "scans.parquet", "ukb.parquet", "abcd.parquet", "adni.parquet",
            "files.parquet", "archive", "feed", "run", "run-slurm", "weights", "embeddings",
            "probe", "probe-scores", "atoms", "report.html"} <= made
    assert (folder / "probe/report.html").stat().st_size > 10_000


# ---- small data ----------------------------------------------------------------------------------

def _prepare_folder(folder: Path, python: Path) -> dict[str, str]:
    """A short recipe, a key, cohorts of one scan each, and a Slurm of two tasks."""
    recipe = (ROOT / "configs/demo.yaml").read_text()
    write(folder, {"configs/demo.yaml": recipe.replace("steps: 100", "steps: 20"), "key": KEY,
                   "bin/srun": SRUN.format(python=python),
                   "bin/scontrol": "#!/bin/sh\n", "bin/squeue": "#!/bin/sh\necho tomorrow\n"})
    (folder / "key").chmod(0o600)
    for name in ("srun", "scontrol", "squeue"):
        (folder / "bin" / name).chmod(0o700)
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as file:
        file.writestr("T1/T1.nii.gz", b"x")
    abcd = "abcd/rawdata/sub-0A1B2C3D/ses-00A/anat/sub-0A1B2C3D_ses-00A_run-01_T1w.nii.gz"
    adni = ("adni/ADNI/941_S_0901/MP-RAGE/2007-02-12_08_20_30.0/I45/"
            "ADNI_941_S_0901_MR_MP-RAGE_Br_20070212141516000_S12_I45.nii")
    write(folder, {
        "ukb/1000001_20252_2_0.zip": package.getvalue(), abcd: b"x", adni: b"x",
        "extract.csv": "eid,31-0.0,21003-2.0\n1000001,0,63\n",
        "abcd/rawdata/dataset_description.json": "{}", "scans/old/p07.nii.gz": b"x",
        "scans/old/p07_mask.nii.gz": b"x", "scans/dicom/p08/1.dcm": b"x"})
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**without, "OMP_NUM_THREADS": "1", "NEUROJEPA_KEY_FILE": str(folder / "key"),
            "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "MASTER_PORT": str(free_port()),
            "PATH": f"{folder / 'bin'}:{python.parent}:{os.environ['PATH']}"}


def _write_scores(folder: Path) -> None:
    """Scores of the synthetic people, and a list of one of them who withdraws."""
    with (folder / "cohort/participants.tsv").open() as file:
        people = [row["participant_id"] for row in csv.DictReader(file, delimiter="\t")]
    rows = [f"{person}\t{number}" for number, person in enumerate(people)]
    (folder / "scores.tsv").write_text("\n".join(["participant_id\tscore", *rows]) + "\n")
    (folder / "withdrawn.csv").write_text(f"cohort,participant\ncohort,{people[0][4:]}\n")
