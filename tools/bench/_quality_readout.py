"""What a run's embeddings say of people, under the pooling that users get and the plain mean.

The plain mean over all tokens, air and edges among them, is how embeddings were made at first.  It
stays here as the control: beside each person-level column the table shows what it was under it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from neurojepa.config import RootConfig
from neurojepa.downstream.embed import (
    Embeddings,
    describe,
    reference_rows,
    select_rows,
    tokens_in,
    views_of,
)
from neurojepa.downstream.pooling import Places, Tokens
from neurojepa.downstream.stats import participation_ratio
from neurojepa.feed.format import Feed
from neurojepa.model.averaged import Averaged
from neurojepa.objective.views import Views, patch_centres_mm
from tools.bench._quality_table import PLAIN, Arrays

BATCH = 8  # scans at a time, with the token budget of training
Read = Callable[[Averaged, RootConfig, Feed, Views], Tokens]
Probed = Callable[[Embeddings, str], Arrays]  # predictions, their names beginning with a prefix


@torch.no_grad()
def read_out(model: Averaged, config: RootConfig, feed: Feed, modalities: tuple[str, ...],
             probed: Probed, read: Read = tokens_in) -> Arrays:
    """Predictions and figures under both poolings; modalities begin with the one for figures."""
    rows = np.concatenate([select_rows(feed, modality, None) for modality in modalities])
    known = np.isin(rows, reference_rows(feed, rows))
    tokens, plain, taught = [], [], []  # each scan is encoded once
    for views in views_of(model, config, feed, rows, batch_size=BATCH):
        each = Tokens(*(value.cpu() for value in vars(read(model, config, feed, views)).values()))
        valid_BN1 = views.valid_BN.cpu()[..., None].float()
        plain.append((each.z_BND * valid_BN1).sum(1) / valid_BN1.sum(1).clamp(min=1))
        known_B = torch.from_numpy(known[sum(map(len, plain[:-1])):][:len(each.z_BND)])
        if known_B.any():
            taught.append(Tokens(*(value[known_B] for value in vars(each).values())))
        tokens.append(each)
    num_patches = len(patch_centres_mm(feed.grid, config.model.patch_voxels))
    places = Places.fit(lambda: taught, num_patches)
    size = np.array(feed.index["num_foreground"].to_pylist())[rows]
    scores: Arrays = {}
    for prefix, parts in (("", [places.pool(each) for each in tokens]), (PLAIN, plain)):
        embeddings = describe(feed, rows, torch.cat(parts).numpy())
        scores |= probed(embeddings, prefix)
        scores |= {f"{prefix}{name}": np.array(value) for name, value in
                   between_people(embeddings, size, modalities[0]).items()}
        if not prefix:
            scores |= {name: np.array(value) for name, value in
                       gates(places, tokens, embeddings.values, known).items()}
    return scores


def between_people(embeddings: Embeddings, size: np.ndarray, modality: str) -> dict[str, float]:
    """How people differ, by the first scan of each: the share of variance that the first principal
    component holds, its correlation with the size of the head, and the participation ratio."""
    found = np.flatnonzero(embeddings.modality == modality)
    first = found[np.unique(embeddings.participant[found], return_index=True)[1]]
    figures = {}
    for name, chosen in (("", first), (" (test)", first[embeddings.split[first] == "test"])):
        if len(chosen) < 3:
            continue
        values = embeddings.values[chosen] - embeddings.values[chosen].mean(0)
        people, spectrum, _ = np.linalg.svd(values.astype(np.float64), full_matrices=False)
        figures |= {
            f"first component{name}": float(spectrum[0]**2 / (spectrum**2).sum()),
            f"participation{name}": participation_ratio(values),
            f"size{name}": abs(float(np.corrcoef(people[:, 0], size[chosen])[0, 1]))}
    return figures


def gates(places: Places, tokens: list[Tokens], pooled: np.ndarray,
          known: np.ndarray) -> dict[str, float]:
    """Shares of the variance of tokens of brain that place, place and modality, and the scan's own
    embedding explain, and the participation ratio between these tokens; of the scans that
    ``places`` come from.

    ``pooled`` and ``known``, which these scans are, have the order of ``tokens``.
    """
    total, place, modality = places.variance()
    used = torch.cat([each.brain_BN() for each in tokens])[known]
    of_scan = (used.sum(1).numpy() * np.square(pooled.astype(np.float64)).sum(1)[known]).sum()
    values = torch.cat([each.z_BND for each in tokens])[known][used].double().numpy()
    return {"place": place / total, "place and modality": modality / total,
            "scan": of_scan / total, "participation of tokens": participation_ratio(values)}
