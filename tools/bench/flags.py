"""flags: how often scans are flagged as they are, and how well spoilt ones are told from them.

They are a synthetic cohort and, where they are at hand ($NEUROJEPA_SCANS, or ../shared/data beside
the checkout), real structural scans; each person goes through ``prepare_person``.  A flag on one of
them counts as wrong, but for those in RIGHT.
Then every whole head among their structural scans is spoilt in doses of known size and measured
again in native space, under the brain mask of the scan as it was.  A figure's score is how far it
is towards its threshold (1 is on it), which lets scans of all modalities share one ROC; spoilt
scans are compared with the same heads unspoilt.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import qc
from data_prep.qc.face import face_is_gone
from data_prep.qc.judge import rules
from data_prep.scan import Scan, read_manifest
from data_prep.tables import dicts
from data_prep.volumes.pipeline import Prepared, Rejected, prepare_person
from data_prep.volumes.placing.orientation import check_turn
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.reading.turn import AS_STATED
from data_prep.volumes.reading.volume import Volume, read_scan
from data_prep.volumes.structural.brain import brain_mask
from tools.bench.common import machine, print_table
from tools.bench.prepare import real_people, scans_folder

PEOPLE = 6
MOST_FLAGGED = 0.03  # of good scans, by any one flag
# Real scans that were looked at and are not good, and the flags that say so.
RIGHT = {"sub-ms01_ses-1_T1w.nii.gz": {"brain_cut", "high_cut_cm2"}}  # 1.8 % is outside
STRUCTURAL = ("T1w", "T2w", "FLAIR")
Spoil = Callable[[Volume, np.ndarray, float], tuple[Volume, np.ndarray]]
Figures = Mapping[str, float | str | None]
Head = tuple[str, Volume, np.ndarray]  # modality, the scan as read, its brain


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Measure; returns the highest share of wrong flags, and AUROC by kind of damage."""
    import torch

    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-flags-") as name:
        folder = scans_folder()
        people = {"synthetic": _synthetic(Path(name), 3 if quick else PEOPLE, folder),
                  "real": list(real_people(folder).values()) if folder.exists() else []}
        if quick:
            people["real"] = people["real"][:2]
        results = {kind: [result for scans in groups
                          for result in prepare_person(scans, PRESETS["quick"])]
                   for kind, groups in people.items()}
        wrong = _good(results)
        heads = _heads([scan for groups in people.values() for scans in groups for scan in scans])
        table = _spoilt(heads)
        _turned(heads)
        _faces(heads)
    return {"scans": sum(map(len, results.values())), "highest_wrong_share": wrong,
            "wrong_margin": MOST_FLAGGED - wrong, "spoilt_heads": len(heads), "auroc": table}


# ---- scans as they are ---------------------------------------------------------------------------

def _synthetic(folder: Path, count: int, scans: Path) -> list[list[Scan]]:
    """A cohort as ``synth`` makes it, by person."""
    from data_prep.index import index
    from data_prep.synth import synthesise

    labels = scans / "labels"
    synthesise(str(folder / "cohort"), participants=count,
               anatomies=labels if labels.exists() else None)
    manifest = str(folder / "scans.parquet")
    index("bids", str(folder / "cohort"), out=manifest, key=b"invented people need no secret key")
    people: defaultdict[str, list[Scan]] = defaultdict(list)
    for row in dicts(read_manifest(manifest)[0]):
        people[row["participant"]].append(Scan(**row))
    return list(people.values())


def _good(results: dict[str, list[Prepared | Rejected]]) -> float:
    """Print how many scans each flag marks, and of those the right ones.

    Returns the highest share of scans that a flag marks wrongly.
    """
    counts = {kind: Counter(flag for result in group for flag in set(_said(result)))
              for kind, group in results.items()}
    everyone = [result for group in results.values() for result in group]
    right = Counter(flag for result in everyone
                    for flag in RIGHT.get(_name(result), set()) & set(_said(result)))
    wrong = {flag: (sum(count[flag] for count in counts.values()) - right[flag]) / len(everyone)
             for flag in sorted(set().union(*counts.values()))}
    print("\nScans as they are: how many each flag marks")
    print_table(("flag", *(f"{kind}, of {len(group)}" for kind, group in results.items()),
                 "of them right", "wrong, share of all"),
                [(flag, *(counts[kind][flag] for kind in results), right[flag], wrong[flag])
                 for flag in sorted(wrong, key=lambda flag: -wrong[flag])])
    flagged = [(kind, result) for kind, group in results.items() for result in group
               if _said(result)]
    limit = 1 - 0.05 ** (1 / len(everyone))
    print(f"{len(flagged)} of {len(everyone)} have a flag or are rejected.  Of so few, a flag that "
          f"marks none may still mark {limit:.1%} of good ones (95 % limit)")
    for kind, result in flagged:
        print(f"  {kind} {_name(result)} {result.scan.modality}: {', '.join(_said(result))}")
    return max(wrong.values(), default=0.0)


def _name(result: Prepared | Rejected) -> str:
    return Path(result.scan.uri).name


def _said(result: Prepared | Rejected) -> list[str]:
    return list(result.flags) if isinstance(result, Prepared) else [f"rejected: {result.reason}"]


# ---- spoilt scans --------------------------------------------------------------------------------

def _heads(scans: list[Scan]) -> list[Head]:
    """Whole heads among structural scans, with their masks."""
    heads = []
    for scan in scans:
        if scan.modality in STRUCTURAL and not scan.reason:
            volume = read_scan(scan.uri, scan.member)
            mask, source = brain_mask(volume, PRESETS["quick"], scan.mask_uri)
            if source != "stripped":
                data = volume.data - min(0.0, float(volume.data.min()))
                heads.append((scan.modality, replace(volume, data=data), mask))
    return heads


def _spoilt(heads: list[Head]) -> dict[str, float]:
    """Print rates and AUROC of each damage; returns the best AUROC of its highest dose."""
    clean = [qc.quality(volume, mask, modality=modality) for modality, volume, mask in heads]
    rows, best = [], {}
    for kind, (spoil, unit, doses) in SPOILS.items():
        for dose in doses:
            spoilt = [qc.quality(*spoil(volume, mask, dose), modality=modality)
                      for modality, volume, mask in heads]
            names = sorted({name for limits in rules().thresholds.values() for name in limits})
            found = {name: value for name in names if (value := auroc(
                _scores(spoilt, heads, name), _scores(clean, heads, name))) is not None}
            telling = sorted(found, key=lambda name: -found[name])[:2]
            flagged = np.mean([_is_told(one, head[0]) for one, head in zip(spoilt, heads,
                                                                           strict=True)])
            before = np.mean([_is_told(one, head[0]) for one, head in zip(clean, heads,
                                                                          strict=True)])
            rows.append((kind, f"{dose:g} {unit}", float(before), float(flagged),
                         *(part for name in telling for part in (
                             name, found[name], float(np.mean(_scores(spoilt, heads, name) > 1))))))
            best[kind] = found[telling[0]]
    print(f"\n{len(heads)} whole heads, spoilt: share with a flag or rejected, and the two figures "
          "that tell most")
    print_table(("damage", "dose", "unspoilt", "spoilt", "figure", "AUROC", "over threshold",
                 "figure", "AUROC", "over threshold"), rows)
    return best


def _is_told(figures: Figures, modality: str) -> bool:
    return bool(qc.flags(figures, modality)) or qc.rejection(figures, modality) is not None


def _scores(figures: list[Any], heads: list[Head], name: str) -> np.ndarray:
    """How far a figure is towards its flag threshold, of the heads that have both; 1 is on it."""
    scores = []
    for one, (modality, _, _) in zip(figures, heads, strict=True):
        limit, value = rules().thresholds[modality].get(name), one.get(name)
        if limit is None or not isinstance(value, int | float):
            continue
        if limit.flag_above is not None:
            scores.append(value / limit.flag_above)
        elif limit.flag_below is not None:
            scores.append(limit.flag_below / max(value, 1e-9))
    return np.array(scores)


def auroc(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """Probability that a positive scores higher than a negative (Mann-Whitney, ties a half)."""
    if not positive.size or not negative.size:
        return None
    difference = positive[:, None] - negative[None]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def _turned(heads: list[Head]) -> None:
    """Print of how many heads it is said that they lie another way than their header states."""
    counts = {name: sum(_is_doubted(change(volume.data), volume, change(mask))
                        for _, volume, mask in heads) for name, change in TURNS.items()}
    print(f"\nOf {len(heads)} heads, refused as turned or said to fit two ways:")
    print_table(("lies", "told"), list(counts.items()))


def _is_doubted(data: np.ndarray, volume: Volume, mask: np.ndarray) -> bool:
    verdict = check_turn(replace(volume, data=np.ascontiguousarray(data), invalid=None),
                         np.ascontiguousarray(mask))
    return verdict.turn != AS_STATED or not verdict.sure


def _faces(heads: list[Head]) -> None:
    """Print which heads are taken for defaced."""
    words = {True: "defaced", False: "whole", None: "cannot be seen"}
    print("\nFaces, as they are taken:")
    print_table(("head", "face"), [
        (Path(volume.name).name, words[face_is_gone(volume.data, mask, _spacing(volume))])
        for _, volume, mask in heads])


# ---- damage --------------------------------------------------------------------------------------

def _spacing(volume: Volume) -> np.ndarray:
    return np.asarray(np.linalg.norm(volume.affine[:3, :3], axis=0))


def noise(volume: Volume, mask: np.ndarray, share: float) -> tuple[Volume, np.ndarray]:
    """Rician noise, its standard deviation a share of the brain's median."""
    sd = share * float(np.median(volume.data[mask]))
    real, imaginary = np.random.default_rng(0).normal(0, sd, (2, *volume.data.shape))
    data = np.abs(volume.data + real + 1j * imaginary)
    return replace(volume, data=data.astype(np.float32)), mask


def motion(volume: Volume, mask: np.ndarray, mm: float) -> tuple[Volume, np.ndarray]:
    """Every line of k-space along y scanned from another place, ``mm`` apart (sd)."""
    count = volume.data.shape[1]
    moved = mm / _spacing(volume)[1] * np.random.default_rng(0).standard_normal(count)
    phase = np.exp(-2j * np.pi * np.fft.fftfreq(count) * moved)[None, :, None]
    lines = np.fft.fft(volume.data, axis=1) * phase
    return replace(volume, data=np.abs(np.fft.ifft(lines, axis=1)).astype(np.float32)), mask


def ghost(volume: Volume, mask: np.ndarray, share: float) -> tuple[Volume, np.ndarray]:
    """A faint copy, half a field of view away along y."""
    copy = np.roll(volume.data, volume.data.shape[1] // 2, axis=1)
    return replace(volume, data=volume.data + np.float32(share) * copy), mask


def bias(volume: Volume, mask: np.ndarray, strength: float) -> tuple[Volume, np.ndarray]:
    """A field whose logarithm falls by ``strength`` from one corner of the head to the other."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in volume.data.shape),
                       indexing="ij", sparse=True)
    return replace(volume, data=volume.data * np.exp(strength / 6 * sum(axes))), mask


def cut(volume: Volume, mask: np.ndarray, mm: float) -> tuple[Volume, np.ndarray]:
    """The highest ``mm`` of the brain are not scanned."""
    top = int(np.flatnonzero(mask.any(axis=(0, 1)))[-1]) + 1 - round(mm / _spacing(volume)[2])
    return replace(volume, data=volume.data[:, :, :top], invalid=None), mask[:, :, :top]


def wrap(volume: Volume, mask: np.ndarray, mm: float) -> tuple[Volume, np.ndarray]:
    """The field of view ends ``mm`` before the back of the head, which comes in again in front."""
    level = 0.15 * float(np.median(volume.data[mask]))
    back = int(np.flatnonzero((volume.data > level).mean(axis=(0, 2)) > 0.05)[0])
    lost = back + round(mm / _spacing(volume)[1])
    data = volume.data[:, lost:].copy()
    data[:, -lost:] += volume.data[:, :lost]
    return replace(volume, data=data, invalid=None), mask[:, lost:]


SPOILS: dict[str, tuple[Spoil, str, tuple[float, ...]]] = {
    "noise": (noise, "of the brain", (0.1, 0.2, 0.4)),
    "motion": (motion, "mm", (1, 2, 4)),
    "ghost": (ghost, "of the head", (0.1, 0.2, 0.4)),
    "bias": (bias, "in log", (1, 2, 3)),
    "cut": (cut, "mm of brain", (5, 15)),
    "wrap": (wrap, "mm of head", (10, 20, 40)),
}
# Of axes near right, anterior, superior.
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda data: data,
    "back to front (LPS read as RAS)": lambda data: data[::-1, ::-1],
    "upside down": lambda data: data[::-1, :, ::-1],
    "left and right exchanged": lambda data: data[::-1],
}
