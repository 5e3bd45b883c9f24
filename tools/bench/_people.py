"""Synthetic people straight on the training grid: a feed in minutes, without files of heads.

    draw_person -> a source of its split that fits -> head, mixed with other sources (_mixing.py)
    -> read on the grid as preparation would have placed it -> signal -> scaled -> feed

A second visit is a feed of its own: T1w of those who came again, whose truth has the ALFF of lobes,
too (_alff.py).

Head, volumes, lesions and contrasts are those of data_prep/synth; what is left out are the scan's
own grid and file, and so the errors of preparation, which are drawn instead: the placement of a
head, of scans of one session to one another, and shading that bias correction leaves.

Signals that volumes do not hold: contrast of cortex to white matter (``t1w_contrast``) and
``texture``, a person's log amplitude of a smooth pattern in white matter.

*Nuisance* comes in doses that multiply everything of scanners at once: contrast of tissues,
shading, noise, ghosts of motion, slice thickness of T2w and FLAIR, placement.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import ndimage

from data_prep.pack import IndexRow, placed_table, write_tar
from data_prep.synth import codes, contrast, scanner
from data_prep.synth.anatomy import ventricle_ml
from data_prep.synth.cohort import (
    CONTRAST,
    SyntheticPerson,
    choose_anatomy,
    draw_person,
    truths,
)
from data_prep.synth.person import measure, visit_head
from data_prep.synth.scanner import Pose, View
from data_prep.tables import read_table
from data_prep.volumes.structural.intensity import scale
from neurojepa.feed.format import (
    LABELS_SCHEMA,
    TRAINING_GRIDS,
    Grid,
    MaskCode,
    commit_feed,
    encode_array,
    is_brain,
    quantise,
)
from neurojepa.storage import parquet_bytes, write_bytes
from tools.bench._alff import alff
from tools.bench._mixing import Mixer, brain_of, label_folder, mixer, split_sources

FEEDS = ("feed", "visits")  # of first visits and of second ones
GRIDS = {"3mm": TRAINING_GRIDS["3mm"], "2mm": Grid("2mm", (81, 99, 81), 2.0)}  # 18 mm: 6, 9 voxels
MODALITIES = ("T1w", "T2w", "FLAIR")
DOSES = {"small": 0.4, "medium": 1.0, "large": 2.5}
# errors of placement at dose 1, assumed from docs/results/prepare.md: of the session, of a scan
SESSION_ERROR, SCAN_ERROR = (1.0, 1.0), (0.3, 0.3)  # degrees, mm
SHADING_LEFT = 0.25  # of the coil's shading, after bias correction
GHOST = 0.02  # of the signal, sd
NOISE_MM = 2.0  # voxel that the sites' noise is of
SLICE_MM = 2.0  # that a site's thickness of slices is in units of
TEXTURE, TEXTURE_LOG_SD, TEXTURE_SD_MM = 0.03, 0.6, 4.0
PER_SHARD = 40


@dataclass(frozen=True)
class Cohort:
    """Whom to make."""

    train: int = 500
    val: int = 200
    test: int = 500
    flair_every: int = 3  # people; T1w and T2w all have
    grid: str = "3mm"
    dose: str = "medium"
    fold: int = 0  # which sources are tested
    seed: int = 14


@dataclass(frozen=True)
class Shard:
    """People of one source, who share a tar."""

    cohort: Cohort
    split: str
    source: str
    others: tuple[str, ...]  # the split's other sources
    people: tuple[int, ...]
    work: Path
    visit: int = 0  # 1: the second one

    @property
    def feed(self) -> Path:
        return self.work / FEEDS[self.visit]

    @property
    def name(self) -> str:
        return f"shards/{self.split}-{self.source}-{self.people[0]:05d}.tar"

    @property
    def record(self) -> Path:
        return self.feed / "records" / (Path(self.name).stem + ".parquet")


def make_people(cohort: Cohort, work: Path, workers: int, visit: int = 0) -> str:
    """The feed of a cohort's visits below ``work``, or what is missing of it; returns its URI."""
    feed = work / FEEDS[visit]
    if (feed / "feed.json").exists():
        return str(feed)
    folder, cache = label_folder(), work.parent / "anatomies"
    shards = plan_shards(cohort, work, folder, visit)
    missing = [shard for shard in shards if not shard.record.exists()]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done, shard in enumerate(pool.map(make_shard, missing, [folder] * len(missing),
                                              [cache] * len(missing)), 1):
            print(f"{shard}: {done}/{len(missing)} shards", flush=True)
    rows = pa.concat_tables(read_table(str(shard.record)) for shard in shards)
    labels = pa.concat_tables(read_table(str(shard.record.with_suffix(".labels")))
                              for shard in shards)
    commit_feed(str(feed), GRIDS[cohort.grid], rows=rows, labels=labels, source=repr(cohort))
    return str(feed)


def plan_shards(cohort: Cohort, work: Path, folder: Path | None, visit: int = 0) -> list[Shard]:
    """People who have the visit, by split and by the source that fits their ventricles."""
    shards, first = [], 0
    for split, names in split_sources(folder, cohort.fold).items():
        ventricles = {name: ventricle_ml(name, folder) for name in names}
        count = getattr(cohort, split) + getattr(cohort, split) % 2  # siblings stay together
        chosen: dict[str, list[int]] = {name: [] for name in names}
        for index in range(first, first + count):
            person = draw_person(cohort.seed, index)
            if len(person.visits) > visit:
                chosen[choose_anatomy(person, ventricles)].append(index)
        first += count
        for name, people in chosen.items():
            others = tuple(other for other in names if other != name)
            shards += [Shard(cohort, split, name, others, tuple(people[at:at + PER_SHARD]), work,
                             visit) for at in range(0, len(people), PER_SHARD)]
    return shards


def make_shard(shard: Shard, folder: Path | None, cache: Path) -> str:
    """Make and write a shard, its record last; nothing where that is there already."""
    if shard.record.exists():
        return shard.name
    cache.mkdir(parents=True, exist_ok=True)
    mixed = mixer(shard.source, shard.others, folder, cache)
    samples, labels = [], []
    for index in shard.people:
        person = draw_person(shard.cohort.seed, index)
        scans, truth = make_person(mixed, person, shard.cohort, shard.visit)
        samples += [({**row, "split": shard.split, "family": shard.source}, *data)
                    for row, *data in scans]
        labels += [{"participant": person.label, "session": person.visits[shard.visit].session,
                    "name": name, "value": str(value)} for name, value in truth.items()]
    data, placed = write_tar(samples)
    write_bytes(str(shard.feed / shard.name), data)
    write_bytes(str(shard.record.with_suffix(".labels")),
                parquet_bytes(pa.Table.from_pylist(labels, schema=LABELS_SCHEMA)))
    write_bytes(str(shard.record), parquet_bytes(placed_table(placed, shard.name)))
    return shard.name


# ---- one person ----------------------------------------------------------------------------------

def make_person(mixed: Mixer, person: SyntheticPerson, cohort: Cohort, number: int = 0,
                again: bool = False
                ) -> tuple[list[tuple[IndexRow, bytes, bytes | None]], dict[str, Any]]:
    """Rows and bytes of a person's scans at a visit, and what is true of the person then; with
    ``again`` of other scans of the same head."""
    grid, dose, visit = GRIDS[cohort.grid], DOSES[cohort.dose], person.visits[number]
    head, texture, rng = head_of(mixed, person, cohort, number)
    if number:
        rng = np.random.default_rng([cohort.seed, 10, person.index, number])
    if again:
        rng = np.random.default_rng([cohort.seed, 11, person.index, number])
    still = centred(placed_pose(mixed), mixed, head)
    pose = still.moved(rng, *(dose * error for error in SESSION_ERROR))
    own_contrast = truths(person, visit.age)["t1w_contrast"]
    truth = {"age": visit.age, "sex": person.sex,
             "diagnosis": "patient" if person.patient else "control",
             "small_vessel": "yes" if person.small_vessel else "no", "texture": np.log(texture),
             "t1w_contrast": own_contrast}
    if number:
        truth |= alff(head, still, person, visit, cohort.seed)
    scans = []
    for modality in MODALITIES[:1] if number else MODALITIES:
        if modality == "FLAIR" and person.index % cohort.flair_every:
            continue
        lying = pose if modality == "T1w" else pose.moved(rng, *(dose * e for e in SCAN_ERROR))
        view = View(head, lying, scanner.Grid(grid.shape, grid.affine), np.zeros((3, 2)))
        stored = scan(view, rng, person, modality, own_contrast, texture, dose)
        label = None
        if modality == "T1w":
            fine_mm3 = grid.spacing_mm**3 / float(view.parts.prod())
            truth |= measure(_within(view.fine_labels), fine_mm3)
            label = encode_array(_within(view.labels).astype(np.uint8))
        row = {"scan_id": hashlib.sha256(stored.tobytes()).hexdigest()[:24],
               "participant": person.label, "session": visit.session, "cohort": "people",
               "modality": modality, "site": person.site.name,
               "num_foreground": int(is_brain(stored).sum())}
        scans.append((row, encode_array(stored), label))
    return scans, truth


def head_of(mixed: Mixer, person: SyntheticPerson, cohort: Cohort, number: int = 0
            ) -> tuple[scanner.Head, float, np.random.Generator]:
    """A person's head at a visit, the amplitude of its texture, and what draws the scans."""
    head = visit_head(mixed.anatomy, person, person.visits[number], cohort.seed,
                      mixed.velocity(person.anatomy_key))
    rng = np.random.default_rng([cohort.seed, 6, person.index])
    # what differs between people comes before what scanners do: doses share it
    return head, TEXTURE * float(np.exp(rng.normal(0, TEXTURE_LOG_SD))), rng


def placed_pose(mixed: Mixer) -> Pose:
    """How the source lies in MNI space: world = rotation @ (voxel - centre) + shift."""
    back = np.linalg.inv(mixed.to_anatomy)
    return Pose(back[:3, :3], back[:3, :3] @ mixed.anatomy.centre + back[:3, 3])


def centred(pose: Pose, mixed: Mixer, head: scanner.Head) -> Pose:
    """The pose after the middle of the person's brain was laid where the source's is."""
    coarse = scanner.Grid((28, 34, 28), Grid("", (28, 34, 28), 6.0).affine)

    def middle(labels: np.ndarray) -> np.ndarray:
        brain = codes.inside(labels) & (labels != codes.FLUID)
        return coarse.affine[:3, :3] @ np.argwhere(brain).mean(0) + coarse.affine[:3, 3]

    still = scanner.Head(mixed.anatomy.labels, np.zeros_like(head.field), head.centre)
    there, here = (middle(View(each, pose, coarse, np.zeros((3, 2))).labels)
                   for each in (still, head))
    return Pose(pose.rotation, pose.shift_mm + there - here)


def scan(view: View, rng: np.random.Generator, person: SyntheticPerson, modality: str,
         t1w_contrast: float, texture: float, dose: float) -> np.ndarray:
    """uint8 codes of a scan on the view's grid."""
    tissue = np.zeros(1000, np.float32)
    tissue[:codes.SKULL], tissue[[0, codes.FLUID]] = 1, 0
    brain = brain_of(view.mean_signal(tissue), float(view.grid.voxel_mm[0]))
    signal = signal_of(view, rng, person, modality, t1w_contrast, texture, dose,
                       dose * SHADING_LEFT)
    return quantise(scale(signal, brain), np.where(brain, MaskCode.BRAIN, MaskCode.AIR))


def signal_of(view: View, rng: np.random.Generator, person: SyntheticPerson, modality: str,
              t1w_contrast: float, texture: float, dose: float, shading: float) -> np.ndarray:
    """float32 signal of a scan on the view's grid; ``shading`` multiplies that of the coil."""
    site, voxel_mm = person.site, view.grid.voxel_mm
    table = contrast.signal_table(modality, site, rng, dose)
    if modality == "T1w":
        table[list(contrast.TISSUES["cortex"][0])] *= t1w_contrast / CONTRAST
    white = np.zeros(1000, np.float32)
    white[list(codes.WHITE)] = 1
    pattern = ndimage.gaussian_filter(rng.standard_normal(view.grid.shape, dtype=np.float32),
                                      TEXTURE_SD_MM / voxel_mm[0])
    clean = view.mean_signal(table)
    clean *= 1 + texture / pattern.std() * pattern * view.mean_signal(white)
    if modality != "T1w":
        thick = dose * SLICE_MM * site.slices
        clean = ndimage.gaussian_filter(clean, (0, 0, thick / 2.355 / voxel_mm[2]))
    clean += dose * GHOST * np.float32(rng.normal()) * np.roll(clean, clean.shape[1] // 3, 1)
    return contrast.scan_signal(
        clean, voxel_mm=voxel_mm, rng=rng, bias=shading * site.bias,
        noise=dose * site.noise * float((NOISE_MM / voxel_mm[0])**1.5))


def _within(labels: np.ndarray) -> np.ndarray:
    return np.where(labels < codes.SKULL, labels, 0)


def described(cohort: Cohort) -> dict[str, Any]:
    """The cohort as JSON has it, and what its anatomies come from."""
    folder = label_folder()
    return asdict(cohort) | {"sources": split_sources(folder, cohort.fold)}

