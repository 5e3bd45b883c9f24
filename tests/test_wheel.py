"""The wheel holds what it should, and its scripts run from an empty folder outside the checkout.

The commands of the documents run from it too: test_docs_commands.
"""

from __future__ import annotations

import os
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

import neurojepa
from neurojepa.errors import EXTRAS
from tests.helpers import ROOT
from tests.helpers.wheel import PACKAGES, build_wheel, install

pytestmark = pytest.mark.slow(5)
# One scan from a file to an embedding: by the command, and from Python, which takes what the
# command has prepared.
AT_ONCE = "embed scan_T1w.nii.gz --weights synthetic-tiny --preset quick --out out"
FROM_PYTHON = """
import neurojepa
found = neurojepa.load("synthetic-tiny").embed("scan_T1w.nii.gz", preset="quick", out="out")
print(found.values.shape)
"""
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of a new environment lie."""
    return install(wheel, tmp_path_factory.mktemp("environment"))


def test_the_wheel_holds_all_files_of_the_packages_and_the_licence(wheel: Path) -> None:
    files = {str((Path(folder) / name).relative_to(ROOT)) for package in PACKAGES
             for folder, _, names in os.walk(ROOT / package, followlinks=True)
             for name in names if not name.endswith(".pyc")}
    held = set(zipfile.ZipFile(wheel).namelist())
    info = f"neurojepa-{neurojepa.__version__}.dist-info"
    assert files == {name for name in held if not name.startswith(info)}
    assert "neurojepa/configs/demo.yaml" in held
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= held


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_without_the_checkout(name: str, scripts: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run([scripts / "python", "-c", "import neurojepa as n; print(n.__file__)"],
                           cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert where.stdout.startswith(str(scripts.parent)), where.stderr
    done = subprocess.run([scripts / name, "--help"], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_a_recipe_that_is_not_shipped_is_refused_with_the_names_of_those_that_are(
        scripts: Path, tmp_path: Path) -> None:
    for words in (["neurojepa-pretrain"], ["neurojepa-cluster", "supervise", "--"]):
        done = subprocess.run([scripts / words[0], *words[1:], "--config", "dmeo", "run.dir=x"],
                              cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: dmeo: cannot read the config (no such file); name a "
                                      "file, or one of base, demo, jepa, large, paper")


@pytest.mark.slow(15)
def test_a_plain_install_embeds_a_scan_at_once(scripts: Path, tmp_path: Path) -> None:
    """Without the packages of any extra, and with the weights that come along."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({[*EXTRAS]}))\n")
    (tmp_path / "key").write_text("a public key for invented people")
    (tmp_path / "key").chmod(0o600)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1",
                   "NEUROJEPA_KEY_FILE": str(tmp_path / "key")}

    def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([scripts / script, *words], cwd=tmp_path, env=environment, text=True,
                              capture_output=True, timeout=200)

    made = run("neurojepa-data", "synth", "--out", "cohort", "--participants", "1",
               "--spacing-mm", "6", "--workers", "1")
    assert made.returncode == 0, made.stderr
    min((tmp_path / "cohort").rglob("*_T1w.nii.gz")).rename(tmp_path / "scan_T1w.nii.gz")
    done = run("neurojepa", *AT_ONCE.split())
    assert done.returncode == 0, done.stderr
    assert "1 embeddings of 96 features" in done.stdout
    assert "(1, 96)" in run("python", "-c", FROM_PYTHON).stdout
    refused = run("neurojepa-pretrain", "--config", "demo", "data.feed=out/scans/feed",
                  "run.dir=run")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith("run: pip install 'neurojepa[train]'")
