"""What a readout reads in a scan: a map for each scan, and whether the maps are the model's.

    embeddings + table -> a linear readout of the label, taught by all but the scan's own family
    scan -> what each of its voxels adds to the score (saliency.py) -> NIfTI (native.py), by region

The first scans' maps are made again with the encoder's weights drawn anew, block by block: maps of
the model change, maps of the image do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from neurojepa.downstream.labels import People
from neurojepa.downstream.native import Shown, shown
from neurojepa.downstream.readout import Readout, readout
from neurojepa.downstream.regions import Regions
from neurojepa.downstream.saliency import ALL, Explainer, rank_correlation
from neurojepa.downstream.scans import Scans
from neurojepa.downstream.table import vectors
from neurojepa.downstream.targets import Target, target_of
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import MODALITIES, Feed, is_brain
from neurojepa.feed.loader import SampleReader
from neurojepa.objective.anatomy import by_patch
from neurojepa.weights import Weights

CHECKED = 2  # scans whose maps are made again with other weights
FOLLOWS_IMAGE = 0.5  # mean size of rank correlations with random encoders' maps that is told
LEAST_TAUGHT = 10  # people
SAME = 1e-3  # of the largest feature: how far an embedding may lie from the stored one
SHARE = 0.05  # of the difference of scores, by which a map may miss it


@dataclass(frozen=True)
class OfScan:
    """The map of a scan, on the feed's grid."""

    who: Shown
    codes: np.ndarray  # uint8 [X, Y, Z], the scan
    map: np.ndarray  # float32 [X, Y, Z]
    score: float
    usual: float
    error: float
    region_R: np.ndarray  # sum of the map in each region
    size_R: np.ndarray  # mean absolute value in each region over that in the whole brain
    taught: int  # people


@dataclass(frozen=True)
class Check:
    """How a map changes when part of the encoder is drawn anew; see saliency.py."""

    who: Shown
    part: str
    rank: float
    rank_of_size: float


@dataclass(frozen=True)
class Explained:
    target: Target
    regions: Regions
    scans: list[OfScan]
    checks: list[Check]
    warnings: list[str]

    @property
    def unit(self) -> str:
        """Of scores and maps."""
        return (f"log odds of {self.target.classes[1]}" if self.target.kind == "binary"
                else self.target.name)


@dataclass(frozen=True)
class Teachers:
    """People whose embeddings and labels teach a readout, and the scans that these are of."""

    people: People
    target: Target
    scans: pa.Table  # embeddings, as table.read_embeddings gives them

    @classmethod
    def of(cls, people: People, label: str, positive: tuple[str, ...],
           scans: pa.Table) -> Teachers:
        """Those who have the label.

        Raises
        ------
        ConfigError, DataError
            As ``target_of``.
        """
        people = people.take(people.column(label) != "")
        return cls(people, target_of(label, people.column(label), positive), scans)

    def without(self, scan_id: str, participant: str, family: str) -> tuple[Readout, int]:
        """A readout taught by others than a scan's own person and family, and by how many.

        Raises
        ------
        DataError
            Too few are left, or one class is.
        """
        scan, person, kind = (np.array(self.scans[name].to_pylist())
                              for name in ("scan_id", "participant", "family"))
        same = (scan == scan_id) | (person == participant)
        own, kin = {participant, *person[same].tolist()}, {family, *kind[same].tolist()}
        others = ~np.isin(self.people.participant, list(own)) & ~np.isin(
            self.people.family, list(kin))
        count = len(set(self.people.participant[others].tolist()))
        truth = self.target.truth[others]
        if count < LEAST_TAUGHT or not np.ptp(truth):
            raise DataError(f"label {self.target.name!r}: {count} people teach the readout "
                            f"{'' if count < LEAST_TAUGHT else 'and all have one value '}where "
                            f"the family of scan {scan_id} is left out; {LEAST_TAUGHT} and two "
                            "values are needed")
        part = Target(self.target.name, self.target.kind, truth, self.target.classes)
        return readout(part, self.people.values[others].astype(float),
                       self.people.family[others]), count


def explain(weights: Weights, feed: Feed, rows: np.ndarray, scans: Scans | None,
            teachers: Teachers, regions: Regions,
            progress: Callable[[int], None] = lambda done: None) -> Explained:
    """Explain what is read from some scans of a feed.

    Parameters
    ----------
    rows : [n] row numbers of ``feed.index``
    scans : what became of raw scans, where the feed was made of them

    Raises
    ------
    ConfigError
        A CNN, weights without what is usual of tokens, embeddings of other weights.
    DataError
        Too few people teach the readout.
    """
    check_weights(weights, teachers.people.values.shape[1])
    reader, found, checks, warnings = SampleReader(feed), [], [], list[str]()
    stored = dict(zip(teachers.scans["scan_id"].to_pylist(), vectors(teachers.scans), strict=True))
    for number, row in enumerate(rows.tolist()):
        who, codes = shown(feed, row, scans), reader.image(row)
        read, count = teachers.without(who.scan_id, *(
            feed.index[name][row].as_py() for name in ("participant", "family")))
        explainer, modality = Explainer(weights, read), MODALITIES.index(who.modality)
        if who.scan_id in stored:
            _check_same(who, explainer.embedding(codes, modality), stored[who.scan_id])
        made = explainer(codes, modality)
        found.append(OfScan(who, codes, made.map, made.score, made.usual, made.error,
                            *_by_region(made.map, is_brain(codes), regions, weights), count))
        if abs(made.error) > SHARE * max(abs(made.score - made.usual), 0.1):
            warnings.append(f"the map of {who.participant} ({who.modality}, visit {who.session}) "
                            f"adds up to {made.error + made.score - made.usual:.3g}, the score "
                            f"differs by {made.score - made.usual:.3g} from the usual scan's")
        if number < CHECKED:
            checks += _checks(explainer, found[-1], modality)
        progress(number + 1)
    if (alike := like_random(checks)) > FOLLOWS_IMAGE:
        warnings.append("maps follow the image rather than the weights: with maps of encoders all "
                        f"of whose weights were drawn anew, their rank correlation is {alike:.2f} "
                        "on average, whatever its sign")
    return Explained(teachers.target, regions, found, checks, warnings)


def like_random(checks: Sequence[Check]) -> float:
    """Mean size of the rank correlation with maps of wholly random encoders, whose sign is chance.
    """
    return float(np.mean([abs(each.rank) for each in checks if each.part == ALL]))


def check_weights(weights: Weights, width: int) -> None:
    """Raise ConfigError where weights cannot be explained with embeddings of this width."""
    if weights.config.objective.method == "cnn":
        raise ConfigError("objective.method = cnn: its embedding is no mean over tokens; explain "
                          "knows token encoders alone")
    if weights.places is None:
        raise ConfigError("the weights were exported without what is usual of tokens at each "
                          "place; export them again, with their feed")
    if weights.places.width != width:
        raise ConfigError(f"the embeddings have {width} features, the weights give "
                          f"{weights.places.width}; embed again with these weights, without "
                          "--atoms")


def _check_same(who: Shown, own: np.ndarray, stored: np.ndarray) -> None:
    """Raise ConfigError where a scan's stored embedding is not of these weights."""
    if np.abs(own - stored).max() > SAME * np.abs(stored).max():
        raise ConfigError(f"scan {who.scan_id} of {who.participant}: these weights do not give its "
                          "stored embedding; embed again with the weights that are to be explained")


def _by_region(volume: np.ndarray, brain: np.ndarray, regions: Regions,
               weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Sum in each region, and mean absolute value there over that in the brain; nan without
    brain."""
    patch = weights.config.model.patch_voxels
    total_n, size_n, brain_n = (by_patch(each, patch).sum(1, dtype=np.float64) for each in (
        volume, np.abs(volume), brain.astype(np.float64)))
    share = regions.share_nR
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_R = (share.T @ size_n) / (share.T @ brain_n)
        return share.T @ total_n, mean_R / (size_n.sum() / brain_n.sum())


def _checks(explainer: Explainer, of: OfScan, modality: int) -> list[Check]:
    brain = is_brain(of.codes)
    own, checks = of.map[brain], []
    for part, other in explainer.randomised():
        again = other(of.codes, modality).map[brain]
        checks.append(Check(of.who, part, rank_correlation(own, again),
                            rank_correlation(np.abs(own), np.abs(again))))
    return checks
