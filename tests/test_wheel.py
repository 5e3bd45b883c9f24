"""The wheel, installed outside the checkout: every command runs from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import neurojepa
from tests.helpers import ROOT

pytestmark = [pytest.mark.slow(20), pytest.mark.timeout(900)]
PACKAGES = ("neurojepa", "data_prep", "cluster")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
KEY = "a public key for invented people (3)"  # 5 of 7 to train on, 2 to test on
FEW_STEPS = ("train.steps=4", "train.checkpoint_every=2")
PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
STEPS = (
    "neurojepa-data synth --out cohort --participants 7 --spacing-mm 6",
    "neurojepa-data index --cohort bids --source cohort --out scans.parquet",
    "neurojepa-data prepare --manifest scans.parquet --out archive --preset quick",
    "neurojepa-data pack --archive archive --out feed --grid 3mm",
    "neurojepa-data verify feed",
    "neurojepa-data report archive --out report.html",
    "neurojepa-pretrain --config demo data.feed=feed run.dir=run --dry-run",
    "neurojepa-pretrain --config demo data.feed=feed run.dir=run",
    "neurojepa-cluster supervise -- --config demo data.feed=feed run.dir=run",  # it has finished
    "neurojepa-cluster status run",
    "neurojepa weights verify run",
    "neurojepa weights export run --out weights",
    "neurojepa embed --weights weights --feed feed --out embeddings --modality T1w",
    "neurojepa probe --weights weights --feed feed --out probe --labels age --modality T1w",
    "neurojepa atoms --weights weights --feed feed --out atoms",
    "neurojepa probe --weights random --config demo --feed feed --out untrained --labels age "
    "--modality T1w",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / "source")
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index",
                    "--wheel-dir", folder, folder / "source"], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of a new environment lie, which borrows the dependencies of this one."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    paths = {"base": str(home), "platbase": str(home)}
    own = Path(sysconfig.get_path("purelib", "venv", paths))
    # by path alone: the .pth files there, and with them this checkout, do not count
    (own / "dependencies.pth").write_text("".join(
        f"{sysconfig.get_path(name)}\n" for name in ("purelib", "platlib")))
    subprocess.run([*PIP, "--python", home / "bin/python", "install", "--no-deps", "--no-index",
                    wheel], check=True)
    return home / "bin"


def test_the_wheel_holds_all_files_of_the_packages_and_the_licence(wheel: Path) -> None:
    files = {str((Path(folder) / name).relative_to(ROOT)) for package in PACKAGES
             for folder, _, names in os.walk(ROOT / package, followlinks=True)
             for name in names if not name.endswith(".pyc")}
    held = set(zipfile.ZipFile(wheel).namelist())
    info = f"neurojepa-{neurojepa.__version__}.dist-info"
    assert files == {name for name in held if not name.startswith(info)}
    assert "neurojepa/configs/demo.yaml" in held
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= held


def test_every_command_runs_from_an_empty_folder(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                    "NEUROJEPA_KEY_FILE": str(tmp_path / "key")}

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True,
                              timeout=300)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    where = run(scripts / "python", "-c", "import neurojepa; print(neurojepa.__file__)")
    assert where.startswith(str(scripts.parent))
    for step in STEPS:
        script, *words = step.split()
        said = run(scripts / script, *words, *(FEW_STEPS if "run.dir=run" in words else ()))
        if script == "neurojepa-cluster" and words[0] == "status":
            assert "FINISHED" in said
    assert SCRIPTS.keys() == {step.split()[0] for step in STEPS}
    assert {"report.html", "archive", "feed", "run", "weights", "embeddings", "probe", "atoms",
            "untrained"} <= {path.name for path in tmp_path.iterdir()}


def test_a_recipe_that_is_not_shipped_is_refused_with_the_names_of_those_that_are(
        scripts: Path, tmp_path: Path) -> None:
    for words in (["neurojepa-pretrain"], ["neurojepa-cluster", "supervise", "--"]):
        done = subprocess.run([scripts / words[0], *words[1:], "--config", "dmeo", "run.dir=x"],
                              cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: dmeo: cannot read the config (no such file); name a "
                                      "file, or one of base, demo, large, paper")
