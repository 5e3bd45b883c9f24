"""Brain masks: which source is asked first, and external commands that do or do not deliver."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from data_prep.scan import ScanError
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.reading.volume import Volume
from data_prep.volumes.structural import brain_tools
from data_prep.volumes.structural.brain import brain_mask, silhouettes
from neurojepa.errors import ConfigError
from tests.helpers.synthetic_head import ellipsoid, moved, save

QUICK = PRESETS["quick"]
# Both tools by their real arguments: the mask is what is bright, on another grid than the scan.
FAKE = """#!{python}
import sys, pathlib
import nibabel as nib, numpy as np
words = sys.argv[1:]
scan = nib.load(words[words.index("-i") + 1])
bright = (np.asarray(scan.dataobj) > 500).astype(np.uint8)
name = words[words.index("-m") + 1] if "-m" in words else "brain_bet.nii.gz"
nib.save(nib.as_closest_canonical(nib.Nifti1Image(bright[::-1], scan.affine @ np.array(
    [[-1, 0, 0, bright.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))), name)
pathlib.Path({log!r}).write_text(str(pathlib.Path.cwd()))
"""


@pytest.fixture
def head() -> tuple[Volume, np.ndarray]:
    """A head with scalp, and its true brain."""
    data, affine = ellipsoid()
    return Volume("head", data, moved(affine, 11, (4, 5, -6))[0]), data > 500


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """An empty folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(path: Path, name: str, text: str) -> None:
    (path / name).write_text(text)
    (path / name).chmod(0o755)


@pytest.mark.parametrize(("tool", "command"), [("synthstrip", "mri_synthstrip"),
                                               ("synthstrip", "synthstrip"),
                                               ("hd-bet", "hd-bet")])
def test_an_external_command_draws_the_mask(head, path, tmp_path, tool, command):
    log = tmp_path / "ran"
    install(path, command, FAKE.format(python=sys.executable, log=str(log)))
    mask, source = brain_mask(head[0], replace(QUICK, mask_tool=tool))
    assert source == tool
    np.testing.assert_array_equal(mask, head[1])
    assert not Path(log.read_text()).exists()  # its folder is gone


def test_a_given_mask_and_a_stripped_scan_need_no_tool(head, path, tmp_path):
    volume, truth = head
    preset = replace(QUICK, mask_tool="synthstrip")  # which is not installed
    given = save(tmp_path / "mask.nii.gz", truth.astype(np.uint8), volume.affine)
    assert brain_mask(volume, preset, given)[1] == "given"
    bare = replace(volume, data=np.where(truth, volume.data, 0).astype(np.float32))
    mask, source = brain_mask(bare, preset)
    assert source == "stripped" and (mask == truth).mean() > 0.999


def test_a_missing_command_is_named(head, path):
    with pytest.raises(ConfigError, match="hd-bet in PATH"):
        brain_mask(head[0], replace(QUICK, mask_tool="hd-bet"))


@pytest.mark.parametrize(("script", "what"), [
    ("#!/bin/sh\necho no weights here; exit 3\n", "status 3: no weights here"),
    ("#!/bin/sh\n", "wrote no mask.nii.gz"),
    ("#!/bin/sh\n/bin/sleep 60 &\nwait\n", "took more than 0.3 s")])
def test_a_command_that_fails_rejects_the_scan(head, path, script, what):
    install(path, "mri_synthstrip", script)
    with pytest.raises(ScanError, match=what) as error:
        brain_tools.external_mask(head[0], "synthstrip", limit_s=0.3 if "more" in what else 60)
    assert error.value.code == "mask_tool_failed"


def test_a_mask_of_the_wrong_size_is_refused_whoever_drew_it(head, path):
    install(path, "synthstrip", FAKE.format(python=sys.executable, log="/dev/null").replace(
        "> 500", "> 1100"))
    with pytest.raises(ScanError, match=r"brain mask \(synthstrip\) has 1\d ml"):
        brain_mask(head[0], replace(QUICK, mask_tool="synthstrip"))


def test_a_silhouette_is_what_is_bright_and_whole():
    data, affine = ellipsoid()
    uptake = np.where(data > 500, 400.0, 20.0).astype(np.float32)
    uptake[20:28, 26:34, 22:28] = 30  # ventricles take up nothing
    uptake[:3, :3, :3] = 400  # a spot far outside
    found = silhouettes(Volume("pet", uptake, affine), None, QUICK)[0]
    truth = data > 500
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.95
    assert found[24, 30, 25] and not found[0, 0, 0]


def test_a_scalp_that_takes_up_tracer_is_not_the_brain():
    data, affine = ellipsoid()
    truth = data > 500
    head = ndimage.binary_dilation(truth, iterations=6)
    uptake = np.where(truth, 400.0, np.where(head, 160.0, 2.0)).astype(np.float32)
    found = silhouettes(Volume("pet", uptake, affine), None, QUICK)
    dices = [2 * (piece & truth).sum() / (piece.sum() + truth.sum()) for piece in found]
    assert dices[0] > 0.9 and min(dices) < 0.8  # another threshold finds the head
