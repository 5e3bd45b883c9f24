"""Learn to complete a modality from others, and test it on people who taught nothing.

Rows of the table, all on the same people's voxels:

    mean map                   the target's mean over who teaches
    polynomial                 a cubic in the intensity of each source
    polynomial and mean map    both, with their product
    network                    on top of that (completion.py)
    network with latents       the same, which also sees the predicted latents

The two networks begin alike and see the same crops.  The one that is better on val is kept.  From
several sources, it is tested with each of them alone, too, as visits may have no other.
Latents are scored apart: how much of what differs from place and head size is told, token by token
and of a scan's embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from neurojepa.downstream.completion import Completion, psnr, ssim
from neurojepa.downstream.pooling import Places
from neurojepa.downstream.scoring import Gain
from neurojepa.downstream.sources import Visits
from neurojepa.downstream.stats import Score, difference, of_people
from neurojepa.downstream.teacher import Teacher
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Feed
from neurojepa.weights import Weights

GUESSES = {"mean map": "mean map", "polynomial": "cubic",
           "polynomial and mean map": "first guess"}
PLAIN, LATENT = "network", "network with latents"
PAIRS = ((PLAIN, "polynomial and mean map"), (LATENT, PLAIN), (LATENT, "polynomial"))


@dataclass(frozen=True)
class Row:
    """Of the visits tested: a score each [n of test], nan where it was not tested, and means."""

    psnr: np.ndarray
    ssim: np.ndarray
    scores: dict[str, Score]


@dataclass(frozen=True)
class Found:
    """A completion, tested."""

    completion: Completion
    latents: bool  # whether the network that is kept sees them
    visits: Visits
    rows: dict[str, Row]
    gains: list[Gain]
    latent_scores: dict[str, Score]  # shares told
    losses: dict[str, list[float]]  # of val, by network and epoch
    shown: dict[str, np.ndarray]  # volumes of one visit tested, sources by their names
    warnings: list[str]


def learn(weights: Weights, places: Places, feed: Feed, visits: Visits, *, epochs: int,
          keep: str, settings: dict[str, Any], warnings: Sequence[str] = ()) -> Found:
    """Fit on train, choose on val, score on test.

    Parameters
    ----------
    keep, settings : as of ``Teacher``

    Raises
    ------
    ConfigError
        Fewer epochs than 1, or states of a fit with other settings.
    DataError
        A scan or a state cannot be read.
    """
    if epochs < 1:
        raise ConfigError(f"--epochs {epochs}: take 1 or more")
    teacher = Teacher(weights, places, feed, visits, keep,
                      settings | {"people": visits.fingerprint(), "epochs": epochs})
    teacher.begin()
    nets, losses = {}, {}
    for name, latents in ((PLAIN, False), (LATENT, True)):
        nets[name], losses[name] = teacher.fit_network(latents, epochs)
        print(f"{name}: error on val {min(losses[name]):.5f} (first guess {losses[name][0]:.5f})",
              flush=True)
    kept = min(nets, key=lambda name: min(losses[name]))
    test = visits.of("test")
    whole = visits.whole("test")  # there is one at least
    rows, shown = {}, dict(zip(visits.names, (
        each.value_XYZ for each in teacher.images(visits.sources[whole[0]])), strict=True))

    def images(name: str, rows: np.ndarray) -> Iterator[np.ndarray]:
        if name in nets:
            yield from teacher.completed(nets[name], name == LATENT, rows)
        else:
            for row in rows:
                yield teacher.completion.guess(teacher.images(row), GUESSES[name])

    for name in (*GUESSES, *nets):
        rows[name], shown[name] = _row(teacher, whole[0], images(name, visits.sources[test]))
    if len(visits.names) > 1:
        for number, name in enumerate(visits.names):
            made = images(kept, _alone(visits, number))
            rows[f"{kept}, {name} alone"], _ = _row(teacher, whole[0], made,
                                                    visits.sources[test, number] >= 0)
    shown["true"] = teacher.target(int(whole[0])).value_XYZ
    pairs = [*PAIRS, *((kept, name) for name in rows if name.endswith(" alone"))]
    return Found(nets[kept], kept == LATENT, visits, rows, _gains(visits, rows, pairs),
                 teacher.latent_scores(), losses, shown, list(warnings))


def _alone(visits: Visits, number: int) -> np.ndarray:
    """Rows [m, K] of the visits tested that have a source, without the others."""
    found = np.full_like(visits.sources, -1)
    found[:, number] = visits.sources[:, number]
    return found[(visits.parts == "test") & (found[:, number] >= 0)]


def _row(teacher: Teacher, show: int, images: Iterator[np.ndarray],
         tested: np.ndarray | None = None) -> tuple[Row, np.ndarray]:
    """Scores of completed images, and that of the visit to ``show``.

    Parameters
    ----------
    tested : bool [n of test], of which visits ``images`` are; None: of all
    """
    test = teacher.visits.of("test")
    ratio, alike = np.full(len(test), np.nan), np.full(len(test), np.nan)
    shown = np.zeros(0)
    numbers = np.arange(len(test)) if tested is None else np.flatnonzero(tested)
    for number, told in zip(numbers, images, strict=True):
        sources, target = teacher.volumes(test[number])
        where = target.brain_XYZ & np.all([
            each.brain_XYZ for each, row in zip(sources, teacher.visits.sources[test[number]],
                                                strict=True) if row >= 0], 0)
        ratio[number] = psnr(target.value_XYZ, told, where)
        alike[number] = ssim(np.where(where, target.value_XYZ, 0), np.where(where, told, 0), where)
        shown = told if test[number] == show else shown
    people = teacher.visits.participant[test], teacher.visits.family[test]
    scores = {name: of_people(partial(_mean, each), numbers, *people)
              for name, each in (("psnr", ratio), ("ssim", alike))}
    return Row(ratio, alike, scores), shown


def _gains(visits: Visits, rows: dict[str, Row], pairs: Sequence[tuple[str, str]]) -> list[Gain]:
    """Paired differences, of visits that have all sources where single ones are compared with."""
    found, test = [], visits.of("test")
    whole = np.isin(test, visits.whole("test"))
    for row, over in pairs:
        of = whole if (row, over) not in PAIRS else np.ones(len(test), bool)
        found.append(Gain(row, over, *difference(
            partial(_mean, rows[row].psnr - rows[over].psnr), np.flatnonzero(of),
            visits.participant[test], visits.family[test])))
    return found


def _mean(values: np.ndarray, drawn: np.ndarray) -> float:
    return float(values[drawn].mean())
