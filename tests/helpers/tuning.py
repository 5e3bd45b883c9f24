"""A feed of people with two scans each, some missing, whose label their scans show; weights that
were exported without training; and the table and key that belong to them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.torch import save

from data_prep.identity import pseudonym
from neurojepa.downstream.embed import fit_places, teaching_rows
from neurojepa.feed.format import INDEX_SCHEMA, LABELS_SCHEMA, commit_feed, is_brain, open_feed
from neurojepa.storage import sha256
from neurojepa.weights import hashed, untrained
from tests.helpers.embedded import KEY
from tests.helpers.feeds import GRID, tiny_config, write_feed


def write_tuning(folder: Path, people: int = 30, without: int = 5) -> None:
    """``feed``, ``weights``, ``my.csv`` and ``key`` in a folder.

    ``level`` makes T1w scans brighter and T2w scans darker; ``dx`` is AD for the upper 40 % and
    ``three`` a, b or c by thirds.  The first ``without`` people have no T2w scan, the next
    ``without`` no T1w scan.
    """
    level = np.random.default_rng(5).permutation(np.linspace(-1, 1, people))

    def alter(number: int, codes: np.ndarray) -> np.ndarray:
        shift = 60 * level[number // 2] * (-1 if number % 2 else 1)
        return np.where(is_brain(codes), np.clip(codes + shift, 1, 254), codes).astype(np.uint8)

    raw = open_feed(write_feed(str(folder / "feed"), 2 * people, per_session=2, alter=alter))
    rows = raw.index.to_pylist()
    for number, row in enumerate(rows):
        row["cohort"] = "clinic"
        row["participant"] = row["family"] = pseudonym(KEY, "clinic", f"P{number // 2:02d}")
    missing = {2 * n + 1 for n in range(without)} | {2 * n for n in range(without, 2 * without)}
    commit_feed(str(folder / "feed"), GRID, labels=LABELS_SCHEMA.empty_table(),
                rows=pa.Table.from_pylist([row for number, row in enumerate(rows)
                                           if number not in missing], schema=INDEX_SCHEMA))
    rank = level.argsort().argsort()
    lines = [f"P{n:02d},{'AD' if rank[n] >= 0.6 * people else 'CN'},{'abc'[3 * rank[n] // people]},"
             f"{70 + 10 * level[n]:.2f}" for n in range(people)]
    (folder / "my.csv").write_text("participant_id,dx,three,level\n" + "\n".join(lines) + "\n")
    (folder / "key").write_bytes(KEY)
    (folder / "key").chmod(0o600)
    write_weights(folder / "weights", str(folder / "feed"))


def write_weights(out: Path, uri: str, seen: tuple[str, ...] = ()) -> None:
    """An export of an untrained encoder, which has seen people of these pseudonyms."""
    out.mkdir()
    feed, config = open_feed(uri), tiny_config(uri, "unused")
    weights = untrained(config, feed.grid)
    files = {
        "model.safetensors": save({name: each.contiguous() for name, each
                                   in weights.model.state_dict().items()}),
        "pooling.safetensors": save(fit_places(weights.model, config, feed,
                                               teaching_rows(feed)).tensors()),
        "seen.json": json.dumps([hashed(name) for name in seen]).encode()}
    for name, data in files.items():
        (out / name).write_bytes(data)
    (out / "config.json").write_text(json.dumps({
        "step": 0, "grid": asdict(feed.grid), "feed": feed.fingerprint,
        "config": config.model_dump(mode="json"), "sha256": sha256(files["model.safetensors"]),
        "pooling": {"sha256": sha256(files["pooling.safetensors"]), "scans": {}},
        "seen": {"sha256": sha256(files["seen.json"])}}))
