"""codes: how sparse a code of a session may be, and what it costs; on the weights of compare.

Codes are learnt on the tokens of the first of the finished first stages of `compare` (MAE with the
head at three quarters of the budget), as its second stages are, and read on people of val alone, so
that the key of compare stays unread.  The table has a row a code:

    active         share of its atoms that are active in a token of brain
    variance told  share of the variance of its target between these tokens
    age ... T2w    probes from T1w on T1w, learnt on the people that the code was learnt on
    retrieval      the T2w scan of the same session among 100 of val
    same atoms     mean over atoms of the highest correlation with any atom of a code that was
                   learnt from another seed: on the same tokens, and on those of the second first
                   stage, at the same patches of the same scans

`own` is a sparse autoencoder after the fact.  Latents of scans are kept beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurojepa.config import RootConfig, load_config
from neurojepa.downstream.embed import describe, tokens_in, views_of
from neurojepa.downstream.pooling import Places, Tokens
from neurojepa.downstream.probe import probe
from neurojepa.downstream.sessions import PEOPLE, SCANS_AT_ONCE
from neurojepa.downstream.stats import auroc, r_squared
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Feed, open_feed
from neurojepa.objective.views import patch_centres_mm
from neurojepa.storage import write_bytes
from neurojepa.weights import load
from tools.bench import _session
from tools.bench._compare_run import labels_of, retrieved
from tools.bench._session import KINDS, Code, Kind
from tools.bench.common import ROOT, machine, print_table

CODES: dict[str, Kind] = {
    "wide dense": KINDS["wide"],
    **{f"session, L1 {l1:g}": Kind(l1=l1) for l1 in (1e-3, 2e-3, 4e-3, 1e-2)},
    **{f"session, top {top}": Kind(top=top) for top in (8, 16, 32)},
    **{f"session, jump {share:g}": Kind(l1=0.1, jump=share) for share in (0.05, 0.1)},
    "split, top 16 and 8": KINDS["split"],
    "own, L1 0.002": KINDS["own"],
    "own, top 16": Kind(own=True, top=16)}
COLUMNS = {"age R2": ("age", "T1w"), "diagnosis AUROC": ("diagnosis", "T1w"),
           "lesions R2": ("lesion_ml", "T1w"), "contrast R2": ("t1w_contrast", "T1w"),
           "age R2 to T2w": ("age", "T2w")}
OTHER = "same atoms, other encoder"
COMPARED = 20_000  # tokens on which atoms are compared


def run(quick: bool, official: str | None, work: str | None = None) -> dict[str, Any]:
    """Learn and read what is missing, and print the table; returns it."""
    folder = Path(work or ROOT / "build" / "bench-compare")
    runs = folder / ("quick" if quick else "full") / "runs"
    first = [folder for folder in sorted(runs.glob("first-stage-*"))
             if (folder / "weights" / "config.json").exists()]
    if not first:
        raise ConfigError(f"--work {folder}: no finished first stage in {runs}; run compare there")
    print(machine())
    if missing := [name for name in CODES if not file_of(first[0], name).exists()]:
        made = Encoded.of(first[0])
        for name in missing:
            found = made.read(made.learnt(CODES[name]))
            write_bytes(str(file_of(first[0], name)), json.dumps(found).encode())
            print(f"{name}: {found}", flush=True)
    return table(first[0], agreed(runs / "same-atoms.json", first[:2]))


def file_of(folder: Path, name: str) -> Path:
    return folder / f"code-{name.replace(' ', '-').replace(',', '')}.json"


def table(folder: Path, same: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Print and return what was read on the tokens of a first stage."""
    rows = {name: json.loads(file_of(folder, name).read_text()) | same.get(name, {})
            for name in CODES}
    titles = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"\npeople of val, tokens of {folder.name}")
    print_table(("", *titles), [(name, *(row.get(key) for key in titles))
                                for name, row in rows.items()])
    return {"codes": rows}


@dataclass
class Encoded:
    """The tokens of a first stage: to learn codes from, and of the people who are read."""

    config: RootConfig
    feed: Feed
    rows: np.ndarray  # of the scans read: T1w and T2w of those that teach, and of val
    tokens: list[Tokens]
    z_QD: Tensor  # tokens to learn from, the means of their sessions, their share of brain
    mean_QD: Tensor
    share_Q: Tensor

    @classmethod
    def of(cls, folder: Path) -> Encoded:
        config = load_config(folder / "recipe.yaml")
        feed = open_feed(config.data.feed)
        model = load(str(folder / "weights")).model
        _session.remember(model, folder / "latents")
        taught = _session.taught(model, config, feed)
        rows = rows_read(feed)
        with torch.no_grad():
            tokens = [tokens_in(model, config, feed, views) for views in
                      views_of(model, config, feed, rows, batch_size=SCANS_AT_ONCE)]
        return cls(config, feed, rows, tokens, *taught)

    def learnt(self, kind: Kind, seed: int | None = None) -> Code:
        """As ``_session.fit`` learns it."""
        code = _session.learnt(self.z_QD, self.z_QD if kind.own else self.mean_QD, kind,
                               self.config.train.seed if seed is None else seed)
        brain_QD = self.z_QD[self.share_Q >= _session.POOLED]
        return _session.without_rare(code, brain_QD) if kind.sparse else code

    def read(self, code: Code) -> dict[str, float]:
        """What the code says of people of val."""
        coded = [replace(each, z_BND=code(each.z_BND)) for each in self.tokens]
        column = {name: np.array(self.feed.index[name].to_pylist())[self.rows]
                  for name in ("split", "modality")}
        num_patches = len(patch_centres_mm(self.feed.grid, self.config.model.patch_voxels))
        places = Places.fit(lambda: list(only(coded, column["split"] == "train")), num_patches)
        embeddings = describe(self.feed, self.rows,
                              torch.cat([places.pool(each) for each in coded]).numpy())
        labels = labels_of(embeddings, self.feed)
        target_QD = self.z_QD if code.kind.own else self.mean_QD
        left = (code.told(code(self.z_QD)) - target_QD).square().mean()
        scores = {"atoms": float(coded[0].z_BND.shape[-1]),
                  "active": code.active,
                  "variance told": 1 - float(left / target_QD.var(0, correction=0).mean())}
        for title, (name, modality) in COLUMNS.items():
            if name in labels and modality in column["modality"]:
                found = probe(embeddings, name, labels[name][0], "val", "T1w", modality)
                metric = r_squared if found.kind == "regression" else auroc
                scores[title] = float(metric(found.truth, found.predicted))
        as_test = replace(embeddings, split=np.where(embeddings.split == "val", "test",
                                                     embeddings.split))
        found_again = retrieved(as_test)
        return scores | ({"retrieval": float(found_again["retrieval/predicted"].mean())}
                         if found_again else {})

    def placed(self) -> dict[tuple[int, int], Tensor]:
        """Tokens of brain of val by scan and patch."""
        split = np.array(self.feed.index["split"].to_pylist())[self.rows]
        whole = [(b, tokens) for tokens in self.tokens for b in range(len(tokens.z_BND))]
        return {(scan, int(tokens.patch_BN[b, n])): tokens.z_BND[b, n]
                for scan, (b, tokens) in enumerate(whole) if split[scan] == "val"
                for n in torch.nonzero(tokens.brain_BN()[b])[:, 0].tolist()}


def rows_read(feed: Feed) -> np.ndarray:
    """T1w and T2w scans of the people that codes are learnt from, and of val."""
    person, split, modality = (np.array(feed.index[name].to_pylist())
                               for name in ("participant", "split", "modality"))
    taught = np.unique(person[split == "train"])[:PEOPLE]
    chosen = np.isin(person, taught) | (split == "val")
    return np.flatnonzero(chosen & np.isin(modality, ("T1w", "T2w")))


def only(tokens: list[Tokens], chosen: np.ndarray) -> Iterator[Tokens]:
    """Scans of batches, by bool over all scans."""
    at = 0
    for each in tokens:
        of_batch = torch.from_numpy(chosen[at:at + len(each.z_BND)])
        at += len(each.z_BND)
        if of_batch.any():
            yield Tokens(*(value[of_batch] for value in vars(each).values()))


# ---- the same atoms from another seed ------------------------------------------------------------

def agreed(file: Path, first: list[Path]) -> dict[str, dict[str, float]]:
    """``agreements`` as the file has them; made anew where there is another encoder since."""
    found = json.loads(file.read_text()) if file.exists() else {}
    if not found or (len(first) > 1 and not all(OTHER in row for row in found.values())):
        found = agreements(first)
        write_bytes(str(file), json.dumps(found).encode())
    return found


def agreements(first: list[Path]) -> dict[str, dict[str, float]]:
    """``same_atoms`` of a session's code and of a sparse autoencoder, of the first encoder and of
    others."""
    made = [Encoded.of(folder) for folder in first]
    placed = [each.placed() for each in made]
    both = sorted(set.intersection(*(set(each) for each in placed)))
    drawn = np.random.default_rng(0).permutation(len(both))[:COMPARED]
    z_QD = [torch.stack([each[both[k]] for k in drawn.tolist()]) for each in placed]
    found: dict[str, dict[str, float]] = {}
    for name in ("session, L1 0.002", "own, L1 0.002"):
        kind = CODES[name]
        h = made[0].learnt(kind)(z_QD[0])
        found[name] = {"same atoms, other draw": same_atoms(
            h, made[0].learnt(kind, made[0].config.train.seed + 100)(z_QD[0]))}
        if len(made) > 1:
            found[name][OTHER] = same_atoms(
                h, made[1].learnt(kind)(z_QD[1]))
    return found


def same_atoms(ours_QA: Tensor, theirs_QB: Tensor) -> float:
    """Mean over atoms of the highest correlation with any atom of the other code."""
    ours, theirs = (h[:, h.std(0) > 0] for h in (ours_QA, theirs_QB))
    ours, theirs = ((h - h.mean(0)) / h.std(0, correction=0) for h in (ours, theirs))
    return float((ours.T @ theirs / len(ours)).max(1).values.mean())
