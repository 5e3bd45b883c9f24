"""A second stage on trial: a code of a frozen encoder's tokens that tells the session's mean.

    token z of a scan -> linear, GELU, linear -> h -> decoder -> mean over the session's scans of
                                                               their tokens at the same patch

A T1w scan and a T2w scan of one visit show one head, so what the code can tell of their mean is
anatomy, and contrast is left out.  Kinds of code:

    sparse   h = ReLU(.) of ``ATOMS``, decoded by atoms of length 1; ``L1`` times ||h||_1
    dense    h is the told mean itself: the control for sparsity
    own      as sparse, of the scan's own token: a sparse autoencoder, the control for the session

What is read of such a run is h, as tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.config import RootConfig
from neurojepa.downstream.embed import select_rows, tokens_in, views_of
from neurojepa.downstream.pooling import LEAST_SHARE as POOLED
from neurojepa.downstream.pooling import Tokens
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed
from neurojepa.model.averaged import Averaged
from neurojepa.model.sparse import Decoder
from neurojepa.objective.views import Views

PEOPLE = 200  # of train, whose scans are encoded
LEAST_SHARE = 0.5  # of a patch that must be brain
LEAST_USE = 0.01  # of these tokens, for an atom to stay
HIDDEN, ATOMS = 192, 384
L1, STEPS = 2e-3, 600  # as val people chose at seed 0, see docs/results/compare.md
RATE, BATCH = 2e-3, 1024
L1_WARMUP, COOLDOWN = 200, 180  # steps
SCANS_AT_ONCE = 8
NO_SESSION = "no two scans of a session have a patch in common"


class Code(nn.Module):
    """h of tokens, and what it tells."""

    def __init__(self, dim: int, sparse: bool) -> None:
        super().__init__()
        self.sparse, self.active = sparse, 1.0  # share of the atoms that are active in a token
        self.encode = nn.Sequential(nn.Linear(dim, HIDDEN), nn.GELU(),
                                    nn.Linear(HIDDEN, ATOMS if sparse else dim))
        self.decoder = Decoder(ATOMS, dim)
        self.offset = nn.Parameter(torch.zeros(dim))

    def forward(self, z: Tensor) -> Tensor:
        """h, [..., D] -> [..., A]; of a dense code [..., D]."""
        h: Tensor = self.encode(z)
        return F.relu(h) if self.sparse else h

    def told(self, h: Tensor) -> Tensor:
        """[..., D]"""
        return self.decoder(h) + self.offset if self.sparse else h


def fit(model: Averaged, config: RootConfig, feed: Feed, kind: str) -> Code:
    """A code of the model's tokens, learnt from sessions of split train with several scans."""
    z_QD, mean_QD, share_Q = session_tokens(model, config, feed)
    code = learnt(z_QD, z_QD if kind == "own" else mean_QD, kind != "dense", config.train.seed)
    return without_rare(code, z_QD[share_Q >= POOLED]) if code.sparse else code


def learnt(z_QD: Tensor, target_QD: Tensor, sparse: bool, seed: int) -> Code:
    """A code that tells targets of tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        code = Code(z_QD.shape[1], sparse)
        optimizer = torch.optim.Adam(code.parameters(), RATE)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * min(1, (STEPS - step) / COOLDOWN)
            drawn = torch.randint(len(z_QD), (BATCH,))
            h = code(z_QD[drawn])
            loss = (code.told(h) - target_QD[drawn]).square().mean()
            if sparse:
                loss = loss + L1 * min(1, step / L1_WARMUP) * h.sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return code.requires_grad_(False)


def without_rare(code: Code, z_QD: Tensor) -> Code:
    """The code without atoms that few of the tokens use, which are those that embeddings pool.

    People's means of such atoms are noise with long tails, which a probe takes for signal.
    """
    use_A = (code(z_QD) > 0).float().mean(0)
    used_A = use_A >= LEAST_USE
    code.active = float(use_A[used_A].mean())
    last = code.encode[-1]
    for layer, name in ((last, "weight"), (last, "bias"), (code.decoder, "weight")):
        setattr(layer, name, nn.Parameter(getattr(layer, name)[used_A], requires_grad=False))
    return code


def session_tokens(model: Averaged, config: RootConfig, feed: Feed
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """``means_of_sessions`` of the first ``PEOPLE`` of split train by name.

    Raises
    ------
    DataError
        No two scans of a session have a patch in common.
    """
    rows = select_rows(feed, None, None, "train")
    person, session = (np.array(feed.index[name].to_pylist()) for name in ("participant",
                                                                           "session"))
    rows = rows[np.isin(person[rows], np.unique(person[rows])[:PEOPLE])]
    of_session = np.char.add(np.char.add(person, "/"), session)[rows]
    tokens = [tokens_in(model, config, feed, views) for views in
              views_of(model, config, feed, rows, batch_size=SCANS_AT_ONCE)]
    whole = Tokens(*(torch.cat([getattr(each, name) for each in tokens])
                     for name in ("z_BND", "patch_BN", "share_BN", "modality_B")))
    found = means_of_sessions(whole, np.unique(of_session, return_inverse=True)[1])
    if not len(found[0]):
        raise DataError(f"{feed.uri}: {NO_SESSION} in split train, so no code tells what they have "
                        "in common; such a way needs a second modality")
    return found


def means_of_sessions(tokens: Tokens, session_B: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of brain [Q, D], the means [Q, D] over all scans of their session at their patch, and
    their share of brain [Q]; of the patches that two scans or more have."""
    patches = int(tokens.patch_BN.max()) + 1
    cell_Q = (torch.from_numpy(session_B)[:, None] * patches + tokens.patch_BN).flatten()
    z_QD = tokens.z_BND.flatten(0, 1)
    sum_CD = z_QD.new_zeros(int(cell_Q.max()) + 1, z_QD.shape[1]).index_add_(0, cell_Q, z_QD)
    count_C = torch.bincount(cell_Q, minlength=len(sum_CD))
    used_Q = (count_C[cell_Q] > 1) & (tokens.share_BN.flatten() >= LEAST_SHARE)
    mean_QD = (sum_CD / count_C.clamp(min=1)[:, None])[cell_Q[used_Q]]
    return z_QD[used_Q], mean_QD, tokens.share_BN.flatten()[used_Q]


def read_through(model: Averaged, code: Code) -> None:
    """Let the model's ``latents`` be h."""
    latents: Callable[[Views], Tensor] = model.latents

    @torch.no_grad()
    def coded(views: Views) -> Tensor:
        h: Tensor = code(latents(views))
        return h

    model.latents = coded  # type: ignore[method-assign]
