"""Maps on the feed's grid -> NIfTI files in the scan's own grid and space, named as BIDS has it.

    sub-01/ses-1/sub-01_ses-1_mod-T1w_desc-dx_saliency.nii.gz    and .json beside it
    dataset_description.json

What preparation did to a scan is undone by the matrix that the archive keeps for it; values are
interpolated linearly.  A feed knows its scans' voxels alone: its maps stay on its grid, in MNI152
space, and are named so (space-MNI152).
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurojepa.downstream.output import write_description
from neurojepa.downstream.scans import Scans, own_grid_of
from neurojepa.feed.format import Feed, Grid
from neurojepa.storage import join, write_bytes


@dataclass(frozen=True)
class Shown:
    """A scan that a map shows, by names that its user knows."""

    scan_id: str
    participant: str  # the user's own id, of a feed the pseudonym
    session: str
    modality: str


def shown(feed: Feed, row: int, scans: Scans | None) -> Shown:
    """Who is shown by a row of the feed's index."""
    told = {name: feed.index[name][row].as_py()
            for name in ("scan_id", "participant", "session", "modality")}
    if scans is not None:
        told["participant"] = scans.ids[told["participant"]]
    return Shown(**told)


class Maps:
    """Writes maps of scans into a folder, one name a map."""

    def __init__(self, out: str, grid: Grid, scans: Scans | None) -> None:
        self.out, self.grid, self.scans = out, grid, scans
        self.taken: dict[str, int] = {}
        write_description(out, "Maps by neurojepa")

    def write(self, who: Shown, volume: np.ndarray, kind: str, label: str,
              about: dict[str, Any], says: str = "") -> str:
        """Write a map [X, Y, Z] of the feed's grid; returns its path below the folder.

        Parameters
        ----------
        kind : the name's suffix, such as saliency
        label : what the map is of; letters and digits of it go into the name
        about : more for the sidecar
        says : the header's description, at most 79 letters

        Raises
        ------
        DataError
            The scan's file is gone, or preparation kept no matrix for it.
        """
        if self.scans is None:
            affine, data, space = self.grid.affine, volume, "_space-MNI152"
        else:
            own, to_scan = own_grid_of(self.scans, who.scan_id)
            affine, space = own.stored, ""
            data = resampled(volume, self.grid.affine, own.shape,
                             np.linalg.inv(to_scan) @ own.affine)
        path = self._path(who, space, kind, label)
        write_bytes(join(self.out, path), gzip.compress(_nifti(data, affine, says), 1,
                                                              mtime=0))
        write_bytes(join(self.out, path.replace(".nii.gz", ".json")), _json(
            {"SpatialReference": "MNI152, after a rigid move" if self.scans is None else "orig",
             "ScanId": who.scan_id, **about}))
        return path

    def _path(self, who: Shown, space: str, kind: str, label: str) -> str:
        person, session, what = (re.sub(r"[^A-Za-z0-9]", "", text)
                                 for text in (who.participant, who.session, label))
        stem = f"sub-{person}_ses-{session}"
        name = f"{stem}{{run}}_mod-{who.modality}{space}_desc-{what}_{kind}.nii.gz"
        number = self.taken[name] = self.taken.get(name, 0) + 1
        run = f"_run-{number}" if number > 1 else ""
        return f"sub-{person}/ses-{session}/{name.format(run=run)}"


def resampled(volume: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int],
              to_mm: np.ndarray) -> np.ndarray:
    """float32 of ``shape``: a volume (voxel to mm by ``affine``) at the voxels of another grid, 0
    outside.

    Parameters
    ----------
    to_mm : [4, 4], voxels of the other grid to the same mm
    """
    from scipy.ndimage import affine_transform

    matrix = np.linalg.inv(affine) @ to_mm
    return affine_transform(volume.astype(np.float32), matrix[:3, :3], matrix[:3, 3], shape,
                            order=1)


def _nifti(data: np.ndarray, affine: np.ndarray, says: str = "") -> bytes:
    import nibabel as nib

    image = nib.Nifti1Image(data.astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = says.encode()
    return image.to_bytes()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
