"""What images add to what a clinic knows already, and the other way round.

    image               embeddings alone
    tables              all blocks and covariates (blocks.py)
    image and tables    both
    ... without X       both, less one block: what that block adds
    X alone             one block
    gaps alone          what is missing, by itself
    labels shuffled     what chance gives

All rows are of the same people and folds: repeated nested cross-validation by person and family.
Whoever lacks a block stays; differences between rows are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from neurojepa.downstream.blocks import Block, block_of, filled, gaps_alone
from neurojepa.downstream.crossval import plan_folds
from neurojepa.downstream.features import design_of, plain
from neurojepa.downstream.labels import People
from neurojepa.downstream.scoring import Gain, Row, Runner, known
from neurojepa.downstream.stats import Score
from neurojepa.downstream.study_checks import enough, group_metric, shuffled
from neurojepa.downstream.targets import Target, scorers, target_of
from neurojepa.downstream.tested import complete, may_test
from neurojepa.errors import ConfigError

IMAGE, TABLES, BOTH, GAPS, SHUFFLED = ("image", "tables", "image and tables", "gaps alone",
                                       "labels shuffled")
CHANCE = {"auroc": 0.5, "rank_correlation": 0.0, "r2": 0.0}  # of the first score of each kind


def without(name: str) -> str:
    """The row of everything but a block."""
    return f"{BOTH} without {name}"


def alone(name: str) -> str:
    """The row of a block."""
    return f"{name} alone"


@dataclass(frozen=True)
class Among:
    """Scores among those who have a block, and those who lack it; None: too few."""

    block: str
    there: bool
    people: int
    scores: dict[str, Score | None]  # by row


@dataclass(frozen=True)
class Fusion:
    target: Target
    people: People
    blocks: list[Block]
    rows: dict[str, Row]
    gains: list[Gain]
    among: list[Among]
    covariates: tuple[str, ...]
    warnings: list[str]
    notes: list[str]

    @property
    def metric(self) -> str:
        """The first score's name."""
        return next(iter(scorers(self.target.kind)))


def fuse(people: People, label: str, blocks: Mapping[str, Sequence[str]], *,
         adjust: tuple[str, ...] = (), positive: tuple[str, ...] = (), order: tuple[str, ...] = (),
         folds: int = 5, repeats: int = 5, allow_seen: bool = False) -> Fusion:
    """Study how a label is told from images and blocks of a table.

    Parameters
    ----------
    blocks : columns by the name of their block
    adjust : covariates, which everyone must have; the volume of the brain is one, too

    Raises
    ------
    ConfigError
        A column is not there, or is the label; the positive class is not named.
    DataError
        A block that nobody has, one value alone, too few people of a class.
    """
    covariates = tuple(dict.fromkeys([*adjust, "brain_ml"]))
    if label in covariates:
        raise ConfigError(f"--adjust {label}: is the label itself; leave it out there")
    for name, columns in blocks.items():
        if label in columns or set(columns) & set(covariates):
            raise ConfigError(f"block {name!r}: has the label or a covariate among its columns "
                              f"({', '.join(columns)}); each can be only one of these")
    people, notes = complete(people, [label, *covariates])
    target = target_of(label, people.column(label), positive, order)
    found = [block_of(people, name, columns) for name, columns in blocks.items()]
    notes += [f"{int((~block.known).sum())} of {len(block.known)} without {block.name}: they stay"
              for block in found if not block.known.all()]
    tested, warnings = may_test(people, f"label {label!r}", allow_seen)
    plan = plan_folds(target, people.family, folds, repeats).testing(tested)
    run = Runner(target, people, plan)
    base = Block("covariates", covariates, design_of(
        {name: people.column(name) for name in covariates}))
    rows = _rows(run, base, found)
    rows[SHUFFLED] = shuffled(target, people, folds, tested)
    pairs = [(BOTH, TABLES), (BOTH, IMAGE), (TABLES, IMAGE)]
    if len(found) > 1:
        pairs += [(BOTH, without(block.name)) for block in found]
    fusion = Fusion(target, people, found, rows, run.gains(rows, pairs), _among(run, rows, found),
                    covariates, warnings, notes)
    warnings += _told_by_gaps(fusion)
    return fusion


def _rows(run: Runner, base: Block, blocks: list[Block]) -> dict[str, Row]:
    image = run.people.values
    rows = {IMAGE: run(plain(image)), TABLES: run(filled([base, *blocks])),
            BOTH: run(filled([base, *blocks], image))}
    for block in blocks if len(blocks) > 1 else []:
        rest = [each for each in blocks if each is not block]
        rows[without(block.name)] = run(filled([base, *rest], image))
    rows |= {alone(block.name): run(filled([block])) for block in (base, *blocks)}
    if (gaps := gaps_alone(blocks)) is not None:
        rows[GAPS] = run(gaps)
    return rows


def _among(run: Runner, rows: dict[str, Row], blocks: list[Block]) -> list[Among]:
    found, metric = [], group_metric(run.target.kind)
    for block in blocks:
        for there in (True, False):
            whom = np.flatnonzero((block.known == there) & known(rows[BOTH].predicted))
            if block.known.all():
                continue
            scores = {name: run.score(partial(run.value, metric, rows[name].predicted), whom)
                      if enough(run.target, whom) else None for name in (IMAGE, TABLES, BOTH)}
            found.append(Among(block.name, there, len(set(run.people.participant[whom])), scores))
    return found


def _told_by_gaps(found: Fusion) -> list[str]:
    """Whether what is missing tells the label."""
    if GAPS not in found.rows:
        return []
    score = found.rows[GAPS].scores[found.metric]
    if not score.low > CHANCE.get(found.metric, 0.5):
        return []
    return [f"gaps alone tell {found.target.name}: {found.metric} {score}; what tables give may "
            "come from who was measured, and would be lost where others decide that"]
