"""Learn to complete a modality from another, and test it on people who taught nothing.

Rows of the table, all on the same people's voxels:

    mean map                   the target's mean over who teaches
    polynomial                 a cubic in the source's intensity
    polynomial and mean map    both, with their product
    network                    on top of that (completion.py)
    network with latents       the same, which also sees the predicted latents

The two networks begin alike and see the same crops.  The one that is better on val is kept.
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
from neurojepa.downstream.stats import Score, difference, of_people
from neurojepa.downstream.teacher import Pairs, Teacher
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Feed
from neurojepa.weights import Weights

GUESSES = {"mean map": "mean map", "polynomial": "cubic",
           "polynomial and mean map": "first guess"}
PLAIN, LATENT = "network", "network with latents"
PAIRS = ((PLAIN, "polynomial and mean map"), (LATENT, PLAIN), (LATENT, "polynomial"))


@dataclass(frozen=True)
class Row:
    """Of the people tested: a score each [n of test], and their means."""

    psnr: np.ndarray
    ssim: np.ndarray
    scores: dict[str, Score]


@dataclass(frozen=True)
class Found:
    """A completion, tested."""

    completion: Completion
    latents: bool  # whether the network that is kept sees them
    pairs: Pairs
    rows: dict[str, Row]
    gains: list[Gain]
    latent_scores: dict[str, Score]  # shares told
    losses: dict[str, list[float]]  # of val, by network and epoch
    shown: dict[str, np.ndarray]  # volumes of one person tested
    warnings: list[str]


def learn(weights: Weights, places: Places, feed: Feed, pairs: Pairs, *, epochs: int,
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
    teacher = Teacher(weights, places, feed, pairs, keep,
                      settings | {"people": pairs.fingerprint(), "epochs": epochs})
    teacher.begin()
    nets, losses = {}, {}
    for name, latents in ((PLAIN, False), (LATENT, True)):
        nets[name], losses[name] = teacher.fit_network(latents, epochs)
        print(f"{name}: error on val {min(losses[name]):.5f} (first guess {losses[name][0]:.5f})",
              flush=True)
    kept = min(nets, key=lambda name: min(losses[name]))
    test = pairs.of("test")

    def images(name: str) -> Iterator[np.ndarray]:
        if name in nets:
            yield from teacher.completed(nets[name], name == LATENT, test)
        else:
            for k in test:
                yield teacher.completion.guess(teacher.volumes(k)[0], GUESSES[name])

    rows, shown = {}, {}
    for name in (*GUESSES, *nets):
        rows[name], shown[name] = _row(teacher, test, images(name))
    source, target = teacher.volumes(int(test[0]))
    shown |= {"source": source.value_XYZ, "true": target.value_XYZ}
    return Found(nets[kept], kept == LATENT, pairs, rows, _gains(pairs, test, rows),
                 teacher.latent_scores(), losses, shown, list(warnings))


def _row(teacher: Teacher, test: np.ndarray, images: Iterator[np.ndarray]
         ) -> tuple[Row, np.ndarray]:
    """Scores of completed images, and the first one."""
    ratio, alike, first = [], [], None
    for k, told in zip(test, images, strict=True):
        source, target = teacher.volumes(k)
        where = source.brain_XYZ & target.brain_XYZ
        ratio.append(psnr(target.value_XYZ, told, where))
        alike.append(ssim(np.where(where, target.value_XYZ, 0), np.where(where, told, 0), where))
        first = told if first is None else first
    assert first is not None
    scores = {name: of_people(partial(_mean, np.array(each)), np.arange(len(test)),
                              teacher.pairs.participant[test], teacher.pairs.family[test])
              for name, each in (("psnr", ratio), ("ssim", alike))}
    return Row(np.array(ratio), np.array(alike), scores), first


def _gains(pairs: Pairs, test: np.ndarray, rows: dict[str, Row]) -> list[Gain]:
    found = []
    for row, over in PAIRS:
        found.append(Gain(row, over, *difference(
            partial(_mean, rows[row].psnr - rows[over].psnr), np.arange(len(test)),
            pairs.participant[test], pairs.family[test])))
    return found


def _mean(values: np.ndarray, drawn: np.ndarray) -> float:
    return float(values[drawn].mean())
