"""The project's wheel, and an environment that has it installed and does not know the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.helpers import ROOT

PACKAGES = ("neurojepa", "data_prep", "cluster")
PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")


def build_wheel(folder: Path) -> Path:
    """Built from a copy, as a build leaves folders behind."""
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / "source")
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index",
                    "--wheel-dir", folder, folder / "source"], check=True)
    return next(folder.glob("*.whl"))


def install(wheel: Path, home: Path) -> Path:
    """A new environment that borrows the dependencies of this one; returns its ``bin``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    paths = {"base": str(home), "platbase": str(home)}
    own = Path(sysconfig.get_path("purelib", "venv", paths))
    # by path alone: the .pth files there, and with them this checkout, do not count
    (own / "dependencies.pth").write_text("".join(
        f"{sysconfig.get_path(name)}\n" for name in ("purelib", "platlib")))
    subprocess.run([*PIP, "--python", home / "bin/python", "install", "--no-deps", "--no-index",
                    wheel], check=True)
    return home / "bin"
