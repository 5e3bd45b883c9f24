"""What becomes of a scan: voxels on the archive grid, or a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.qc import Figures
from data_prep.scan import Scan, ScanError


@dataclass
class Prepared:
    """A scan on ARCHIVE_GRID."""

    scan: Scan
    scan_id: str  # of the scan as read, see Volume.scan_id; maps of a series add "-" and their name
    image: np.ndarray  # float32 [180, 216, 180], brain in [0, 1], 0 outside
    mask: np.ndarray  # uint8 of MaskCode
    label: np.ndarray | None  # int16, where the scan came with a label map
    figures: Figures
    flags: list[str]  # what may be wrong with it: of flags.Flag, and those of qc.yaml
    notes: list[str] = field(default_factory=list)  # how it was made: of flags.Note
    parcels: np.ndarray | None = None  # float32 [parcels, time], of a CIFTI series


@dataclass
class Rejected:
    """A scan that cannot be used, and why."""

    scan: Scan
    reason: str  # code
    message: str  # one line: file, field, value
    flags: list[str] = field(default_factory=list)  # what was odd about it before that


def rejected(scan: Scan, error: ScanError, flags: Sequence[str] = ()) -> Rejected:
    return Rejected(scan, error.code, str(error), list(flags))
