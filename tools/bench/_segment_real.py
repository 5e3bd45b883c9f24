"""Real heads for segment: regions that three protocols share, in two people with a truth.

    label map of a head (FreeSurfer's codes) --T1w drawn from it, 1 mm--> labelled heads
    IXI012, truth by DLMUSE (automatic), and Colin27, truth by AAL (drawn by hand) --> tested

Protocols draw borders each in their own way, so even a perfect method does not reach Dice 1 here;
rows of one person are to be compared with each other.  The third kind of row has the other real
person as its one labelled head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.synth.anatomy import anatomy_names
from neurojepa.downstream.images import Image, read_image, read_labels
from neurojepa.downstream.segment import Recipe, Segmenter
from neurojepa.downstream.segment_atlas import Atlas, head_of
from neurojepa.downstream.segment_fit import fit, started, taught
from neurojepa.downstream.segment_score import SCORES, score
from tools.bench._mixing import label_folder
from tools.bench.common import print_table
from tools.bench.register import Head, make_head

MM, TESTED_MM = 1, 2  # of the heads that teach, and of the synthetic ones that are tested
TESTED = 2  # anatomies that teach nothing
RECIPE = Recipe(steps=1000)  # what the command does, but for half its steps
# name: codes of FreeSurfer, of MUSE and of AAL; those of a side are its left and right ones
SIDED = {
    "lateral ventricle": (([4, 5], [43, 44]), ([50, 52], [49, 51]), ([], [])),
    "thalamus": (([10], [49]), ([60], [59]), ([77], [78])),
    "caudate": (([11], [50]), ([37], [36]), ([71], [72])),
    "putamen": (([12], [51]), ([58], [57]), ([73], [74])),
    "pallidum": (([13], [52]), ([56], [55]), ([75], [76])),
    "hippocampus": (([17], [53]), ([48], [47]), ([37], [38])),
    "amygdala": (([18], [54]), ([32], [31]), ([41], [42])),
    "accumbens": (([26], [58]), ([30], [23]), ([], [])),
    "white matter": (([2], [41]), ([*range(82, 95, 2)], [*range(81, 94, 2)]), ([], [])),
    "cortex": (([3], [42]), ([*range(101, 208, 2)], [*range(100, 207, 2)]), ([], [])),
}
MIDDLE = {
    "third ventricle": ([14], [4], []), "fourth ventricle": ([15], [11], []),
    "brainstem": ([16], [35], []),
    "cerebellum": ([7, 8, 46, 47], [38, 39, 40, 41, 71, 72, 73], [*range(91, 117)]),
}
REGIONS = [*(f"{side} {name}" for name in SIDED for side in ("left", "right")), *MIDDLE]
CODES = list(range(1, len(REGIONS) + 1))
FREESURFER, MUSE, AAL = range(3)


def codes_of(protocol: int) -> list[list[int]]:
    """The protocol's codes of each of REGIONS; none of those that it does not have."""
    return [side for each in SIDED.values() for side in each[protocol]] + [
        each[protocol] for each in MIDDLE.values()]


def shared(labels: Image, protocol: int) -> Image:
    """A label map with the codes of REGIONS."""
    table = np.zeros(int(labels.data.max()) + 1, np.int32)
    for rank, codes in zip(CODES, codes_of(protocol), strict=True):
        table[[code for code in codes if code < len(table)]] = rank
    return replace(labels, data=table[labels.data])


def real_heads() -> dict[str, Head]:
    """Both people, or none where the scans are not at hand."""
    folder = label_folder()
    files = {} if folder is None else {
        "IXI012": (folder.parent / "ixi/IXI012_T1w.nii.gz",
                   folder.parent / "ixi/IXI012_desc-dlmuse_dseg.nii.gz", MUSE),
        "Colin27": (folder.parent / "colin27/ch2bet.nii.gz",
                    folder.parent / "colin27/aal.nii.gz", AAL)}
    if not files or not all(path.exists() for scan, labels, _ in files.values()
                            for path in (scan, labels)):
        return {}
    return {name: Head(read_image(str(scan)), shared(read_labels(str(labels)), protocol))
            for name, (scan, labels, protocol) in files.items()}


def measure(counts: Sequence[int], folder: Path,
            kept: Callable[[Path, Callable[[], Any]], Any]) -> dict[str, Any]:
    """Scores {row: {person: {region: scores}, "cpu_s": of all}}; what is finished is ``kept``."""
    real = real_heads()
    if not real:
        print("real heads: left out, for there are none in $NEUROJEPA_SCANS or ../shared/data")
        return {}
    names = anatomy_names(label_folder())[:TESTED + max(counts)]
    drawn = [replace(head, labels=shared(head.labels, FREESURFER)) for head in (
        make_head(name, number, TESTED_MM if number < TESTED else MM)
        for number, name in enumerate(names))]
    teachers = drawn[TESTED:]
    people = real | {f"synthetic {number + 1}": head
                     for number, head in enumerate(drawn[:TESTED])}
    rows: dict[str, Callable[[], Any]] = {}
    for count in counts:
        rows[f"{count} atlas"] = lambda count=count: _vote(people, teachers[:count])
        rows[f"{count} network"] = lambda count=count: _network(
            people, teachers[:count], str(folder / f"{count} real network"))
    rows["1 atlas, the other real head"] = lambda: _of_each_other(real)
    return {name: kept(folder / f"real {name}.json", work) for name, work in rows.items()}


def _vote(people: dict[str, Head], teachers: Sequence[Head]) -> dict[str, Any]:
    atlas = Atlas([head_of(head.image, head.labels) for head in teachers], CODES, REGIONS)
    return _scored(people, lambda scan: atlas.segment(scan)[0])


def _of_each_other(people: dict[str, Head]) -> dict[str, Any]:
    one, other = people
    found = {}
    for name, teacher in ((one, other), (other, one)):
        found |= _vote({name: people[name]}, [people[teacher]])
    return found


def _network(people: dict[str, Head], teachers: Sequence[Head], kept: str) -> dict[str, Any]:
    learnt = [taught(head.image, head.labels, np.array(CODES), RECIPE.mm) for head in teachers]
    network = started(learnt, RECIPE, len(CODES))
    fit(network, learnt, RECIPE, kept)
    return _scored(people, Segmenter(network, RECIPE, CODES, REGIONS).segment)


def _scored(people: dict[str, Head], segment: Callable[[Image], np.ndarray]) -> dict[str, Any]:
    return {name: {REGIONS[code - 1]: each for code, each in score(
        segment(head.image), head.labels.data, CODES, head.image.spacing).items()}
        for name, head in people.items()}


def report_real(rows: dict[str, Any]) -> dict[str, Any]:
    """Print each row's means over regions of each person, and Dice of each region."""
    table: dict[str, Any] = {}
    lines = []
    for name, each in rows.items():
        for person, regions in each["scores"].items():
            means = {metric: float(np.nanmean([one[metric] for one in regions.values()]))
                     for metric in SCORES}
            table.setdefault(name, {})[person] = {**means, "regions": {
                region: one["dice"] for region, one in regions.items()}}
            lines.append([person, name, str(len(regions)),
                          *(f"{means[metric]:.3f}" for metric in SCORES), f"{each['cpu_s']:.0f}"])
    if lines:
        print_table(["real head", "labelled, method", "regions", "Dice", "HD95, mm",
                     "surface Dice", "volume bias, %", "CPU s"], sorted(lines))
        columns = [(name, person) for name, people in table.items() for person in people]
        print_table(["Dice", *(f"{person}: {name}" for name, person in columns)], [
            [region, *(f"{found:.2f}" if (found := table[name][person]["regions"].get(region))
                       is not None else "-" for name, person in columns)] for region in REGIONS])
    return table
