"""segment: regions found in heads that taught nothing, from 3 and from 10 labelled ones.

Heads at 3 mm are those of register.py; two anatomies (with --quick one) are tested, others teach.
Rows: the atlas vote of ``segment``; its network, and that without a prior; the same network with
maps of an encoder's tokens at its bottleneck, pretrained (--weights DIR) and with the weights drawn
anew.  All networks have the same steps, windows and seed.  A second table has real people with a
truth (_segment_real.py), if they are at hand; with --quick from 3 labelled heads alone.  A third
has lesions (_segment_lesions.py), without --quick.  What is finished is kept in --work (default
build/bench-segment), in a folder of this code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from data_prep.synth.anatomy import anatomy_names
from neurojepa.downstream import warps
from neurojepa.downstream.images import laid, stripped
from neurojepa.downstream.segment import Recipe, highest, predict
from neurojepa.downstream.segment_atlas import Atlas, head_of
from neurojepa.downstream.segment_fit import Taught, fit, started, taught
from neurojepa.downstream.segment_score import SCORES, score
from neurojepa.storage import write_bytes
from tools.bench import _segment_lesions
from tools.bench._mixing import label_folder
from tools.bench._segment_real import measure, report_real
from tools.bench.common import ROOT, code_hash, machine, print_table
from tools.bench.register import Head, centred, kind_of, make_head

REGIONS = {2: "white matter", 3: "cortex", 4: "lateral ventricle", 7: "cerebellar white matter",
           8: "cerebellar cortex", 10: "thalamus", 11: "caudate", 12: "putamen",
           13: "pallidum", 17: "hippocampus", 18: "amygdala"}  # of the left; the right ones below
RIGHT = {2: 41, 3: 42, 4: 43, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52, 17: 53, 18: 54}
CODES = np.array(sorted([*REGIONS, *RIGHT.values(), 16]))  # and the brainstem
COMPONENTS, DRAWS = 8, 2000
RECIPE = Recipe(mm=3, window=32, filters=8, steps=200)
VOTE, BARE = "atlas vote", "network without a prior"
SCRATCH, TRAINED, DRAWN = "network", "network, tokens", "network, tokens of random weights"


@dataclass(frozen=True)
class Tokens:
    """Maps of an encoder's tokens of one head on its working grid, float32 [COMPONENTS, ...]."""

    maps: np.ndarray


def run(quick: bool, official: str | None, weights: str | None = None,
        work: str | None = None) -> dict[str, Any]:
    """Fit what is missing and print the table; returns it."""
    code = code_hash("neurojepa/downstream/segment*.py", "neurojepa/downstream/register.py",
                     "tools/bench/*segment*.py", "tools/bench/register.py")
    folder = Path(work or ROOT / "build" / "bench-segment") / (
        f"{'quick' if quick else 'full'}-{kind_of(weights)}-{code}")
    names = anatomy_names(label_folder())
    heads = [_with_regions(make_head(name, number)) for number, name in enumerate(names[:12])]
    tested, teachers = heads[:1 if quick else 2], heads[2:]
    people = [taught(head.image, head.labels, CODES, RECIPE.mm) for head in (*tested, *teachers)]
    tokens = {} if weights is None else _tokens(weights, [*tested, *teachers], people)
    found: dict[str, dict[str, Any]] = {}
    for count in (3, 10):
        for row in (VOTE, BARE, SCRATCH, *tokens):
            name = f"{count} {row}"
            found[name] = _kept(folder / f"{name}.json", lambda count=count, row=row, name=name: (
                _vote(tested, teachers[:count]) if row == VOTE else
                _network(tested, people, count, replace(RECIPE, prior=row != BARE),
                         tokens.get(row), str(folder / name))))
    real = measure((3,) if quick else (3, 10), folder, _kept)
    lesions = {} if quick else _segment_lesions.measure(folder, _kept)
    return {**_report(found, RECIPE, len(tested)), "real": report_real(real),
            "lesions": _segment_lesions.report(lesions)}


def _kept(file: Path, work: Callable[[], Any]) -> dict[str, Any]:
    """Scores and CPU seconds of a row, measured unless its file is there."""
    if not file.exists():
        start = time.process_time()
        scores = work()
        write_bytes(str(file), json.dumps(
            {"scores": scores, "cpu_s": time.process_time() - start}).encode())
        print(file.stem, flush=True)
    return json.loads(file.read_text())


def _with_regions(head: Head) -> Head:
    data = np.where(np.isin(head.labels.data, CODES), head.labels.data, 0)
    return replace(head, labels=replace(head.labels, data=data))


def _scores(found: np.ndarray, head: Head) -> dict[str, dict[str, float]]:
    scores = score(found, head.labels.data, CODES.tolist(), head.image.spacing)
    return {str(code): each for code, each in scores.items()}


def _vote(tested: list[Head], teachers: list[Head]) -> list[dict[str, dict[str, float]]]:
    atlas = Atlas([head_of(head.image, head.labels) for head in teachers], CODES.tolist(),
                  [str(code) for code in CODES])
    return [_scores(atlas.segment(head.image)[0], head) for head in tested]


# ---- networks ------------------------------------------------------------------------------------

class WithTokens(torch.nn.Module):
    """The same network, to whose bottleneck a projection of token maps is added."""

    def __init__(self, guided: Any, channels: int) -> None:
        super().__init__()
        self.guided = guided
        self.project = torch.nn.Conv3d(COMPONENTS, channels, 1)

    def forward(self, x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        network = self.guided.network
        deep, down = network.encode(x)
        shape = deep.shape[2:]
        maps = F.adaptive_avg_pool3d(maps, tuple(shape))
        return network.decode(deep + self.project(maps), down[::-1]) + self.guided.expected(x)


def _network(tested: list[Head], people: list[Taught], count: int, recipe: Recipe,
             tokens: list[Tokens] | None, kept: str) -> list[dict[str, dict[str, float]]]:
    """Scores of each tested head; ``people`` and ``tokens`` are of the tested ones, then of those
    who teach.  A fit that was stopped goes on from ``kept``."""
    taught_ones = people[len(tested):len(tested) + count]
    network = started(taught_ones, recipe, len(CODES))
    if tokens is None:
        fit(network, taught_ones, recipe, kept)
        calls: list[Any] = [None] * len(tested)
    else:
        both = WithTokens(network, recipe.filters * 4)
        own = tokens[len(tested):]

        def cut(maps: np.ndarray, corner: np.ndarray) -> torch.Tensor:
            box = maps[:, *(slice(c, c + recipe.window) for c in corner)]
            pad = [(0, recipe.window - n) for n in box.shape[1:]]
            return torch.from_numpy(np.pad(box, [(0, 0), *pad]))[None]

        fit(both, taught_ones, recipe, kept, call=lambda x, where: both(
            x, torch.cat([cut(own[number].maps, corner) for number, corner in where])))
        network = both
        calls = [lambda x, corner, maps=each.maps: both(x, cut(maps, corner))
                 for each in tokens[:len(tested)]]
    results = []
    for head, person, call in zip(tested, people, calls, strict=False):
        maps = predict(network, person.scan, recipe, call)
        ranks = highest(maps, person.scan.affine, head.image)
        results.append(_scores(np.array([0, *CODES])[ranks], head))
    return results


def _tokens(uri: str, heads: list[Head], people: list[Taught]) -> dict[str, list[Tokens]]:
    """Of each head, maps of the encoder's tokens, trained and untrained, on its working grid."""
    from neurojepa.weights import load, untrained
    from tools.bench._register_tokens import token_maps

    trained = load(uri)
    grid, found = trained.grid, {}
    for name, weights in ((TRAINED, trained), (DRAWN, untrained(trained.config, trained.grid))):
        brains, places = [], []
        for head in heads:
            places.append(centred(grid, head.image))
            brains.append(laid(stripped(head.image), head.image.affine, grid.shape, places[-1]))
        found[name] = [
            Tokens(np.stack([warps.sample(channel, place, warps.points_of(
                person.target.shape, person.scan.affine)) for channel in maps]).astype(np.float32))
            for maps, place, person in zip(token_maps(weights, brains, COMPONENTS), places, people,
                                           strict=True)]
    return found


# ---- table ---------------------------------------------------------------------------------------

def _report(found: dict[str, dict[str, Any]], recipe: Recipe, tested: int) -> dict[str, Any]:
    source = "real label maps" if label_folder() else "anatomies built from the template"
    print(f"{machine()}\n{source} at 3 mm, {len(CODES)} regions, {tested} tested, "
          f"{recipe.steps} steps of {recipe.batch} windows")
    table, lines = {}, []
    for name, each in found.items():
        means = {metric: float(np.nanmean([region[metric] for person in each["scores"]
                                           for region in person.values()])) for metric in SCORES}
        table[name] = {**means, "cpu_s": each["cpu_s"]}
        count, row = name.split(" ", 1)
        lines.append([row, count, *(f"{means[metric]:.3f}" for metric in SCORES),
                      f"{each['cpu_s']:.0f}"])
    print_table(["", "labelled", "Dice", "HD95, mm", "surface Dice", "volume bias, %", "CPU s"],
                lines)
    gains = {}
    for count in (3, 10):
        for row in (TRAINED, DRAWN):
            if f"{count} {row}" in found:
                gains[f"{count} {row}"] = _gain(found[f"{count} {row}"],
                                                found[f"{count} {SCRATCH}"])
                print(f"{count} labelled, {row} less network: "
                      "{value:+.3f} [{low:+.3f}, {high:+.3f}] Dice".format(
                          **gains[f"{count} {row}"]))
    return {"table": table, "gains": gains}


def _gain(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Paired difference in Dice; regions are resampled, as one or two people are too few to be."""
    codes = sorted(set.intersection(*(set(person) for person in one["scores"])))
    difference = np.array([[a[code]["dice"] - b[code]["dice"] for code in codes]
                           for a, b in zip(one["scores"], other["scores"], strict=True)]).mean(0)
    drawn = np.random.default_rng(0).integers(0, len(codes), (DRAWS, len(codes)))
    low, high = np.percentile(difference[drawn].mean(1), [2.5, 97.5])
    return {"value": float(difference.mean()), "low": float(low), "high": float(high)}
