"""What embeddings tell of a label, beside what they must be compared with.

    embedding                    repeated nested cross-validation by person and family
    embedding, nearest people    by k-NN in place of a linear model
    embedding, attentive         by a head that attends to tokens (attending.py), where asked for
    embedding, adjusted          less what a line in the covariates to adjust for tells of it
    embedding, sites made alike  after ComBat, fitted on who teaches
    region volumes               of fluid, grey and white matter, where embed found them
    covariates alone             age, sex, volume of the brain, site
    covariates and embedding     both
    site alone, sites left out   whether it is the site that is told
    labels shuffled              what chance gives

Intervals resample families, then people within them.  Differences between rows are paired.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neurojepa.downstream.crossval import nearest, plan_folds, plan_sites
from neurojepa.downstream.features import adjusted, beside, design_of, harmonised, plain
from neurojepa.downstream.labels import People, suspected_codes
from neurojepa.downstream.scoring import Gain, Row, Runner
from neurojepa.downstream.stats import Score
from neurojepa.downstream.study_checks import (
    GROUPS,
    Group,
    groups_of,
    large_sites,
    shuffled,
    site_told,
)
from neurojepa.downstream.targets import Target, scorers, target_of
from neurojepa.downstream.tested import complete, may_test

if TYPE_CHECKING:
    from neurojepa.downstream.attending import Tokens  # with torch

WITH, WITHOUT, ALONE = "covariates and embedding", "covariates alone", "embedding"
LEFT_OUT, SITE, SHUFFLED = "embedding, sites left out", "site alone", "labels shuffled"
NEAREST, ALIKE, VOLUMES = ("embedding, nearest people", "embedding, sites made alike",
                           "region volumes")
ATTENTIVE = "embedding, attentive"
PAIRS = ((WITH, WITHOUT), (ALONE, VOLUMES), (ATTENTIVE, ALONE))  # of rows, whose difference is told
CHANCE = {"auroc": 0.5, "rank_correlation": 0.0, "r2": 0.0}  # of the first score of each kind
DROP = 0.1  # of the first score, from folds to sites left out, that is told


@dataclass(frozen=True)
class Study:
    """All about one label; n people have it."""

    target: Target
    people: People
    rows: dict[str, Row]
    gains: list[Gain]
    site_told: Score | None  # balanced accuracy of telling the site from the embedding
    site_told_alike: Score | None  # the same after ComBat
    num_sites: int  # told apart so
    covariates: tuple[str, ...]
    adjust: tuple[str, ...]
    warnings: list[str]
    notes: list[str]  # who was left out and why
    groups: list[Group]

    @property
    def metric(self) -> str:
        """The first score's name."""
        return next(iter(scorers(self.target.kind)))


@dataclass(frozen=True)
class Design:
    """How labels are studied, alike for all of them."""

    folds: int = 5
    repeats: int = 5
    adjust: tuple[str, ...] = ()
    site: str | None = None
    positive: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    allow_seen: bool = False

    @property
    def covariates(self) -> tuple[str, ...]:
        """Columns that alone are compared with the embedding."""
        return tuple(dict.fromkeys([*self.adjust, "brain_ml", *([self.site] if self.site else [])]))


def study(people: People, label: str, design: Design, tokens: Tokens | None = None) -> Study:
    """Study one label.

    Parameters
    ----------
    tokens : of the scans, for a row of an attentive readout

    Raises
    ------
    ConfigError
        A column is not there, or the positive class is not named.
    DataError
        One value alone, too few people of a class, or all of them were seen in pretraining.
    """
    people, notes = complete(people, [label, *design.covariates])
    target = target_of(label, people.column(label), design.positive, design.order)
    notes += suspected_codes(label, people.column(label))
    tested, warnings = may_test(people, f"label {label!r}", design.allow_seen)
    plan = plan_folds(target, people.family, design.folds, design.repeats).testing(tested)
    run = Runner(target, people, plan)
    rows = _rows(run, design)
    if tokens is not None:
        from neurojepa.downstream.attending import attentive, by_number

        rows[ATTENTIVE] = run(by_number(people), attentive(tokens, people))
    told, told_alike, sites = None, None, 0
    if design.site:
        site = people.column(design.site)
        sites = len(large_sites(people, site, design.folds))
        told, told_alike = (site_told(people, site, features, design.folds) for features in (
            plain(people.values), harmonised(people.values, site)))
        if len(set(site.tolist())) > 1:
            rows[SITE] = run(plain(design_of({design.site: site}, [design.site])))
            rows[LEFT_OUT] = Runner(target, people, plan_sites(
                site, people.family).testing(tested))(plain(people.values))
    rows[SHUFFLED] = shuffled(target, people, design.folds, tested)
    columns = [*dict.fromkeys([*GROUPS, *([design.site] if design.site else [])])]
    found = Study(target, people, rows, run.gains(rows, PAIRS), told, told_alike, sites,
                  design.covariates, design.adjust, warnings, notes,
                  groups_of(run, rows[ALONE].predicted,
                            [name for name in columns if name in people.columns]))
    warnings += _confounds(found)
    return found


def _rows(run: Runner, design: Design) -> dict[str, Row]:
    """What is compared, but for the site and shuffled labels."""
    people, values = run.people, run.people.values
    rows = {ALONE: run(plain(values)), NEAREST: run(plain(values), nearest)}
    to_adjust = (design_of({name: people.column(name) for name in design.adjust}, [design.site])
                 if design.adjust else None)
    if to_adjust is not None:
        rows[f"embedding, adjusted for {', '.join(design.adjust)}"] = run(
            adjusted(values, to_adjust))
    if design.site and len(set(people.column(design.site).tolist())) > 1:
        rows[ALIKE] = run(harmonised(values, people.column(design.site), to_adjust))
    if people.volumes is not None:
        rows[VOLUMES] = run(plain(people.volumes))
    covariates = design_of({name: people.column(name) for name in design.covariates},
                           [design.site])
    return rows | {WITHOUT: run(plain(covariates)), WITH: run(beside(values, covariates))}


def _confounds(found: Study) -> list[str]:
    """What speaks for the site, and not the label, being told."""
    told, metric = [], found.metric
    if SITE not in found.rows:
        return []
    alone, site, left_out = (found.rows[name].scores[metric] for name in (ALONE, SITE, LEFT_OUT))
    chance = CHANCE.get(metric, 0.5)
    if site.low > chance:
        is_read = found.site_told and found.site_told.low > 1 / found.num_sites
        read = (f", and the embedding tells the site (balanced accuracy {found.site_told})"
                if is_read else "")
        told.append(f"{found.target.name} goes with the site: the site alone gives {metric} "
                    f"{site}{read}")
    if not left_out.num_people:
        told.append("no site could be left out: families have people at all of them, or what the "
                    "others know has one value")
    if np.isfinite(left_out.value) and alone.value - left_out.value > DROP:
        told.append(f"on sites that taught nothing {metric} is {left_out}, within folds {alone}: "
                    "what is told may be the site")
    return told
