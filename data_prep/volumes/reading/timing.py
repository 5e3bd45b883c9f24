"""The time between the volumes of a series, from two sources that often disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nibabel as nib

from data_prep.flags import Flag

SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
TR_S = (0.1, 20.0)  # what a repetition time can be
TR_TOLERANCE = 0.01  # header against sidecar, relative


def repetition_time(header: Any, facts: Mapping[str, object]) -> tuple[float | None, list[str]]:
    """Seconds between volumes and flags: tr_disagrees, tr_implausible, tr_unit_guessed,
    volume_timing.

    The sidecar's RepetitionTime (seconds, as BIDS has it) is believed before the header, whose
    field converters and resampling tools often lose.  None where neither has a usable value.
    """
    return choose_time(*_header_time(header), facts)


def choose_time(header_s: float | None, flags: list[str], facts: Mapping[str, object]
                ) -> tuple[float | None, list[str]]:
    """The sidecar's time or else the header's, and ``flags`` with what is odd about them.

    None, flagged volume_timing, where volumes do not follow each other by one time: BIDS lets a
    sidecar give VolumeTiming in place of RepetitionTime.
    """
    if facts.get("VolumeTiming"):
        return None, sorted({*flags, Flag.VOLUME_TIMING})
    given = facts.get("RepetitionTime")
    sidecar_s = float(given) if isinstance(given, int | float) else None
    times = {"header": header_s, "sidecar": sidecar_s}
    for source, value in times.items():
        # 0 says "unknown", as does a missing value
        if value is not None and not TR_S[0] <= value <= TR_S[1]:
            times[source] = None
            if value != 0:
                flags.append(Flag.TR_IMPLAUSIBLE)
    header_s, sidecar_s = times["header"], times["sidecar"]
    if header_s and sidecar_s and abs(header_s - sidecar_s) > TR_TOLERANCE * sidecar_s:
        flags.append(Flag.TR_DISAGREES)
    return sidecar_s or header_s, sorted(set(flags))


def _header_time(header: Any) -> tuple[float | None, list[str]]:
    if not isinstance(header, nib.Nifti1Header):
        return float(header["tr"]) / 1000, []  # MGH: milliseconds
    step = float(header["pixdim"][4])
    try:
        unit = header.get_xyzt_units()[1]
    except KeyError:
        unit = "unknown"
    if unit in SECONDS:
        return step * SECONDS[unit], []
    if unit != "unknown" or step == 0:  # Hz, ppm, rad/s: the fourth axis is not time
        return None, []
    # No head is scanned in 30 ms, and none in 30 s.
    return (step if step < 30 else step / 1000), [Flag.TR_UNIT_GUESSED]
