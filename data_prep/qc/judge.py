"""Which thresholds a scan's figures cross, and which scans are far from their cohort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from neurojepa.errors import ConfigError
from neurojepa.feed.format import MODALITIES

DEFAULT = Path(__file__).with_name("qc.yaml")
RowKey = tuple[str, str | None, str]  # uri, member, modality
_SIDES = ("low", "high", "both", "none")
_LIMITS = ("flag_below", "flag_above", "reject_below", "reject_above")


@dataclass(frozen=True)
class FigureInfo:
    """How a figure is called and on which side it is worse."""

    label: str
    unit: str
    worse: str  # low, high, both or none
    harmless: float | None = None  # values up to here are no outliers


@dataclass(frozen=True)
class Threshold:
    """Limits of one figure of one modality."""

    why: str
    flag_below: float | None = None
    flag_above: float | None = None
    reject_below: float | None = None
    reject_above: float | None = None


@dataclass(frozen=True)
class Rules:
    """The content of qc.yaml."""

    figures: dict[str, FigureInfo]
    thresholds: dict[str, dict[str, Threshold]] = field(default_factory=dict)
    min_scans: int = 20
    robust_z: float = 5.0


@cache
def rules() -> Rules:
    """The rules of ``qc.yaml``."""
    return load_rules(DEFAULT)


def load_rules(path: Path) -> Rules:
    """Read and check a file like qc.yaml.

    Raises
    ------
    ConfigError
        Not readable, not YAML, or a key or value that cannot be; the message names it.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    _keys(tree, ("figures", "thresholds", "outliers"), str(path), complete=True)
    figures = {}
    for name, entry in _mapping(tree["figures"], f"{path}: figures").items():
        where = f"{path}: figures.{name}"
        _keys(entry, ("label", "unit", "worse", "harmless"), where)
        if missing := [key for key in ("label", "unit", "worse") if key not in entry]:
            raise ConfigError(f"{where}: {missing[0]} is missing")
        if entry["worse"] not in _SIDES:
            raise ConfigError(f"{where}.worse: {entry['worse']}; choose of {', '.join(_SIDES)}")
        figures[name] = FigureInfo(**entry)
    thresholds: dict[str, dict[str, Threshold]] = {}
    for modality, entries in _mapping(tree["thresholds"], f"{path}: thresholds").items():
        where = f"{path}: thresholds.{modality}"
        _known(modality, MODALITIES, where)
        thresholds[modality] = {name: _threshold(entry, name, figures, f"{where}.{name}")
                                for name, entry in _mapping(entries, where).items()}
    outliers = f"{path}: outliers"
    _keys(tree["outliers"], ("min_scans", "robust_z"), outliers, complete=True)
    for name, value in tree["outliers"].items():
        _positive(value, f"{outliers}.{name}")
    return Rules(figures, thresholds, **tree["outliers"])


def flags(figures: Mapping[str, Any], modality: str) -> list[str]:
    """``low_<figure>`` and ``high_<figure>`` for each flag threshold that is crossed."""
    found = []
    for name, limit in rules().thresholds.get(modality, {}).items():
        value, short = figures.get(name), name.removeprefix("qc_")
        if _below(value, limit.flag_below):
            found.append(f"low_{short}")
        elif _above(value, limit.flag_above):
            found.append(f"high_{short}")
    return found


def rejection(figures: Mapping[str, Any], modality: str) -> tuple[str, str] | None:
    """Code and message of the first reject threshold that is crossed, if any."""
    for name, limit in rules().thresholds.get(modality, {}).items():
        value, short = figures.get(name), name.removeprefix("qc_")
        for crossed, side, bound in (
                (_below(value, limit.reject_below), "low", limit.reject_below),
                (_above(value, limit.reject_above), "high", limit.reject_above)):
            if crossed:
                return (f"{side}_{short}",
                        f"{name} is {value:.3g}, the limit {bound:g}: {limit.why}")
    return None


def outliers(values: np.ndarray, figure: str) -> np.ndarray:
    """Which scans are far from the others of their cohort and modality in a figure.

    Far is ``robust_z`` standard deviations, estimated from the median absolute deviation (Iglewicz
    and Hoaglin 1993), on the figure's worse side.  It depends on the values only, so it may be
    asked again whenever scans are added.

    Parameters
    ----------
    values : [n] of the scans that can be used and have the figure

    Returns
    -------
    bool [n]
    """
    info = rules().figures[figure]
    if info.worse == "none" or len(values) < rules().min_scans:
        return np.zeros(len(values), bool)
    distance = values - np.median(values)
    spread = 1.4826 * float(np.median(np.abs(distance)))
    if spread == 0:  # more than half of the scans agree exactly: no scale to judge by
        return np.zeros(len(values), bool)
    side = {"low": -distance, "high": distance, "both": np.abs(distance)}[info.worse]
    far = side > rules().robust_z * spread
    if info.harmless is not None:
        far &= values > info.harmless
    return far


def _below(value: Any, limit: float | None) -> bool:
    return value is not None and limit is not None and value < limit


def _above(value: Any, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit


# ---- checks of the file --------------------------------------------------------------------------

def _threshold(entry: Any, name: str, figures: Mapping[str, Any], where: str) -> Threshold:
    _known(name, tuple(figures), where)
    _keys(entry, ("why", *_LIMITS), where)
    if "why" not in entry or len(entry) < 2:
        raise ConfigError(f"{where}: needs why and at least one of {', '.join(_LIMITS)}")
    for key in _LIMITS:
        if key in entry and (isinstance(entry[key], bool)
                             or not isinstance(entry[key], int | float)):
            raise ConfigError(f"{where}.{key}: {entry[key]!r} is not a number")
    return Threshold(**entry)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a mapping, is {type(value).__name__}")
    return value


def _keys(value: Any, known: tuple[str, ...], where: str, complete: bool = False) -> None:
    for key in _mapping(value, where):
        _known(key, known, f"{where}: {key}")
    if complete and (missing := [key for key in known if key not in value]):
        raise ConfigError(f"{where}: {missing[0]} is missing")


def _known(key: str, known: tuple[str, ...], where: str) -> None:
    if key not in known:
        raise ConfigError(f"{where}: unknown; known are {', '.join(known)}")


def _positive(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{where}: {value!r} is not a number above 0")
