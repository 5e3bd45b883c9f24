"""Which sample stands at which position: a pure function of (index, seed, position).

Positions 0, 1, 2, ... are the samples a run sees, in order.  Nothing here knows ranks, workers or
batches, so any world size follows the same samples and the whole data state of a run is a number.

Samples form groups, one per 'cohort/modality'; a group's share of the positions is its weight in
the config or follows from its size by ``data.balance``.  Positions come in blocks of BLOCK; in each
block a group owns a fixed number of slots at places shuffled by (seed, block), and the k-th slot of
a group takes the k-th sample of an endless sequence of that group's epochs, each epoch sorted by a
hash of (seed, epoch, scan_id).

With ``data.cross_modal`` a position may have partners: scans of its sample's session in other
modalities, one of which gives the targets.

A step takes the positions that follow the step before, but for windows that a rollback stepped
over: ``first_position``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import pyarrow as pa

from neurojepa.config import DataConfig
from neurojepa.errors import ConfigError

BLOCK = 1000
# row -> rows of its session in other modalities, if any, and the hashes of their ids
Partners = dict[int, tuple[np.ndarray, np.ndarray]]
Window = tuple[int, int]  # (from_step, shift): from this step on, so many steps' samples later


def first_position(step: int, global_batch: int, windows: Iterable[Window]) -> int:
    """The first of the ``global_batch`` positions of a step (counted from 0)."""
    return (step + sum(shift for start, shift in windows if start <= step)) * global_batch


class Order:
    """The order of a feed's samples under a data config and a seed.

    Raises
    ------
    ConfigError
        No sample is left by the split and modality filters, a weight names no group, there are
        more groups than slots, or cross-modal targets are asked for and no session has two
        modalities.
    """

    def __init__(self, index: pa.Table, data: DataConfig, seed: int) -> None:
        self.seed = seed
        keep = np.array(index["split"].to_pylist()) == data.split
        modality = np.array(index["modality"].to_pylist())
        if data.modalities is not None:
            keep &= np.isin(modality, data.modalities)
        rows = np.flatnonzero(keep)
        if not len(rows):
            raise ConfigError(
                f"data.split = {data.split!r}, data.modalities = {data.modalities}: none of the "
                f"feed's {index.num_rows} samples is left; the feed has splits "
                f"{sorted(set(index['split'].to_pylist()))} and modalities "
                f"{sorted(set(modality.tolist()))}")
        scan_ids = np.array(index["scan_id"].to_pylist())
        self._groups, self._slots = _group(index, rows, data)
        self._keys = [np.array([_hash(name) for name in scan_ids[group]], dtype=np.uint64)
                      for group in self._groups]
        self.num_samples = sum(map(len, self._groups))
        self._cross_modal, self._partners = data.cross_modal, Partners()
        if data.cross_modal:
            self._partners = _partners(index, scan_ids, np.concatenate(self._groups))
        self.fingerprint = _fingerprint(scan_ids, self._groups, self._slots, seed,
                                        data.cross_modal, self._partners)
        self._epoch = lru_cache(maxsize=2 * len(self._groups))(self._sorted_epoch)
        self._pattern = lru_cache(maxsize=4)(self._shuffled_pattern)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Row numbers of the feed's index at the given positions, shape [n] -> [n]."""
        return np.array([self.row(int(position)) for position in positions], dtype=np.int64)

    def row(self, position: int, ahead: int = 0) -> int:
        """The row at a position, or the one so many places ahead in its group's epoch."""
        block, place = divmod(position, BLOCK)
        group_of, rank_of = self._pattern(block)
        group = int(group_of[place])
        turn = block * self._slots[group] + int(rank_of[place])
        epoch, within = divmod(turn, len(self._groups[group]))
        members = self._epoch(group, epoch)
        return int(members[(within + ahead) % len(members)])

    def partners(self, row: int, position: int) -> list[int]:
        """Rows that the targets may come from, the first choice first; [] for the sample itself.

        They share the session of ``row`` (the sample at the position, or what stands in for it)
        and have another modality.
        """
        if row not in self._partners:
            return []
        salt = np.array([_hash(f"{self.seed}/partner/{position}")], np.uint64)
        if float(_mix(salt)[0]) >= self._cross_modal * 2.0**64:
            return []
        rows, keys = self._partners[row]
        return rows[np.argsort(_mix(keys ^ salt), kind="stable")].tolist()

    def _sorted_epoch(self, group: int, epoch: int) -> np.ndarray:
        salt = np.uint64(_hash(f"{self.seed}/{group}/{epoch}"))
        return self._groups[group][np.argsort(_mix(self._keys[group] ^ salt), kind="stable")]

    def _shuffled_pattern(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """[BLOCK] group at each place of the block, and its how-manieth slot in the block."""
        pattern = np.repeat(np.arange(len(self._slots)), self._slots)
        salt = np.uint64(_hash(f"{self.seed}/block/{block}"))
        if len(self._slots) > 1:
            pattern = pattern[np.argsort(_mix(np.arange(BLOCK, dtype=np.uint64) ^ salt))]
        rank = np.empty(BLOCK, dtype=np.int64)
        for group, count in enumerate(self._slots):
            rank[pattern == group] = np.arange(count)
        return pattern, rank


def _group(index: pa.Table, rows: np.ndarray,
           data: DataConfig) -> tuple[list[np.ndarray], list[int]]:
    """Rows of each group, and how many of the BLOCK slots of a block it owns."""
    if not data.weights and data.balance == 1:
        return [rows], [BLOCK]  # by counts, exactly
    names = np.array([f"{cohort}/{modality}" for cohort, modality in zip(
        index["cohort"].to_pylist(), index["modality"].to_pylist(), strict=True)])[rows]
    members = {name: rows[names == name] for name in sorted(data.weights or set(names.tolist()))}
    if data.weights:
        return list(members.values()), _weighted_slots(members, data.weights, set(names.tolist()))
    if len(members) > BLOCK:
        raise ConfigError(f"data.balance = {data.balance}: the feed has {len(members)} groups of "
                          f"cohort and modality, of {BLOCK} that can be balanced; set it to 1")
    sizes = np.array([len(group) for group in members.values()], dtype=float) ** data.balance
    # a slot each first: no group, however small, never comes up
    return list(members.values()), _apportion(
        1 + (BLOCK - len(members)) * sizes / sizes.sum())


def _weighted_slots(members: dict[str, np.ndarray], weights: dict[str, float],
                    known: set[str]) -> list[int]:
    for name, rows in members.items():
        if not len(rows) or weights[name] <= 0:
            raise ConfigError(f"data.weights[{name!r}] = {weights[name]}: a weight is positive "
                              f"and names one of {sorted(known)}")
    total = sum(weights.values())
    slots = _apportion(np.array([weights[name] / total * BLOCK for name in members]))
    if min(slots) == 0:
        raise ConfigError(f"data.weights: a share below 1/{BLOCK} of the total never comes up; "
                          "raise it or leave it out")
    return slots


def _apportion(shares: np.ndarray) -> list[int]:
    """Whole numbers nearest to shares that sum to BLOCK, by largest remainders."""
    slots = shares.astype(int)
    slots[np.argsort(slots - shares, kind="stable")[: BLOCK - slots.sum()]] += 1
    return slots.tolist()


def _partners(index: pa.Table, scan_ids: np.ndarray,
              rows: np.ndarray) -> Partners:
    columns = [index[name].to_pylist() for name in ("cohort", "participant", "session", "modality")]
    sessions: dict[tuple[str, ...], list[int]] = {}
    for row in sorted(rows.tolist(), key=lambda row: scan_ids[row]):
        sessions.setdefault(tuple(column[row] for column in columns[:3]), []).append(row)
    found, modality = Partners(), columns[3]
    for members in sessions.values():
        for row in members:
            others = [other for other in members if modality[other] != modality[row]]
            if others:
                found[row] = (np.array(others), np.array([_hash(scan_ids[other])
                                                          for other in others], dtype=np.uint64))
    if not found:
        raise ConfigError(f"data.cross_modal > 0: of {len(rows)} scans in {len(sessions)} sessions "
                          "none has a scan of another modality in its session; set it to 0, or "
                          "let data.modalities and data.weights keep more modalities")
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele et al. 2014): a bijection of uint64 that scatters bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _fingerprint(scan_ids: np.ndarray, groups: list[np.ndarray], slots: list[int], seed: int,
                 cross_modal: float, partners: Partners) -> str:
    digest = hashlib.sha256(f"{seed} {slots}".encode())
    for group in groups:
        digest.update("\n".join(sorted(scan_ids[group].tolist())).encode() + b"\0")
    if partners:
        pairs = sorted(f"{scan_ids[row]} {' '.join(scan_ids[others])}"
                       for row, (others, _) in partners.items())
        digest.update("\n".join([repr(cross_modal), *pairs]).encode())
    return digest.hexdigest()[:16]
