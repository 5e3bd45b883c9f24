"""Brain extraction by external commands, for sites that have them: SynthStrip and HD-BET.

They are looked up in PATH, read and write files in a folder of their own, and have a time limit.
Nothing is fetched: where a tool would download its weights, install them beforehand.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import nibabel as nib
import psutil

from data_prep.scan import ScanError
from data_prep.volumes.reading.volume import Volume, read_scan
from neurojepa.errors import ConfigError

TIME_LIMIT_S = 900
SCAN, BRAIN = "scan.nii.gz", "brain.nii.gz"
# Tool: names of its command, its arguments (files are in the current folder), the mask it writes.
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    # Hoopes et al., NeuroImage 2022; the first name is FreeSurfer's
    "synthstrip": (("mri_synthstrip", "synthstrip"), ("-i", SCAN, "-m", "mask.nii.gz"),
                   "mask.nii.gz"),
    # Isensee et al., Human Brain Mapping 2019; arguments of version 2
    "hd-bet": (("hd-bet",), ("-i", SCAN, "-o", BRAIN, "-device", "cpu", "--disable_tta",
                             "--save_bet_mask", "--no_bet_image"), "brain_bet.nii.gz"),
}
TOOLS = ("deepbet", *COMMANDS)


def find_command(tool: str) -> str:
    """Path of a tool's command.

    Raises
    ------
    ConfigError
        There is none in PATH.
    """
    names = COMMANDS[tool][0]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise ConfigError(f"mask tool {tool}: no command {' or '.join(names)} in PATH; install it "
                          "on every node, or use deepbet, which is built in")
    return found


def external_mask(volume: Volume, tool: str, limit_s: float = TIME_LIMIT_S) -> Volume:
    """The mask that a tool draws, on whatever grid it chose.

    Raises
    ------
    ScanError
        mask_tool_failed: it ended with an error, wrote no mask or ran out of time.
    ConfigError
        It is not installed.
    """
    command, (_, arguments, mask) = find_command(tool), COMMANDS[tool]
    with tempfile.TemporaryDirectory(prefix="mask-") as name:
        folder = Path(name)
        nib.save(nib.Nifti1Image(volume.data, volume.affine), folder / SCAN)
        status, last = _run([command, *arguments], folder, limit_s)
        if status == 0 and (folder / mask).exists():
            return read_scan(str(folder / mask), label=True)
    what = (f"took more than {limit_s:g} s" if status is None else
            f"ended with status {status}" if status else f"wrote no {mask}")
    raise ScanError("mask_tool_failed", f"{volume.name}: {tool} {what}: {last}")


def _run(command: list[str], folder: Path, limit_s: float) -> tuple[int | None, str]:
    """Exit status (None: killed at the limit) and the last line it printed."""
    log = folder / "output.txt"
    with log.open("wb") as output, subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT) as process:
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            status = None
    lines = log.read_text(errors="replace").splitlines()
    return status, next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def _kill(pid: int) -> None:
    """End a tool and what it started; it stays in our process group, so that it ends with us."""
    process = psutil.Process(pid)
    for member in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
