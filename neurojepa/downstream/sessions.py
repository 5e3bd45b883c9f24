"""Learn a session code (model/session_code.py) on frozen weights, from split train of a feed.

    sessions with two scans or more -> tokens of the encoder, and their mean at each patch
    -> a code that tells the mean from any one scan's token -> without atoms that few tokens use

docs/results/compare.md compares it with other ways; its settings were chosen there.

Shape letters: B scans, N tokens of a scan, Q tokens of all scans, C patches of sessions, D width,
A atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from neurojepa.config import RootConfig
from neurojepa.downstream.embed import tokens_in, views_of
from neurojepa.downstream.pooling import LEAST_SHARE as POOLED
from neurojepa.downstream.pooling import Tokens
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed
from neurojepa.model.averaged import Averaged
from neurojepa.model.session_code import SessionCode

PEOPLE = 200  # whose scans are encoded
LEAST_SHARE = 0.5  # of a patch that must be brain
LEAST_USE = 0.01  # of the tokens that embeddings pool, for an atom to stay
WIDER, ATOMS = 2, 4  # hidden layer and atoms, in widths of the encoder
L1, STEPS = 2e-3, 600
RATE, BATCH = 2e-3, 1024
L1_WARMUP, COOLDOWN = 200, 180  # steps
SCANS_AT_ONCE = 8
NO_SESSION = "no two scans of a session have a patch in common"

Code = TypeVar("Code", bound=SessionCode)
Progress = Callable[[int, int], None]  # done, of so many


def _silent(done: int, of: int) -> None:
    pass


def session_code(model: Averaged, config: RootConfig, feed: Feed, rows: np.ndarray, *,
                 l1: float = L1, seed: int = 0, encoded: Progress = _silent,
                 learnt: Progress = _silent) -> tuple[SessionCode, float]:
    """A code of the model's tokens, and the share of its atoms that are active in a token.

    Parameters
    ----------
    rows : [n] of the feed, as ``rows_of_sessions`` gives them
    l1 : weight of ||h||_1
    encoded, learnt : called with the number of scans, or steps, that are done, and of all

    Raises
    ------
    DataError
        No two scans of a session have a patch in common, or no atom is used.
    """
    z_QD, mean_QD, share_Q = session_tokens(model, config, feed, rows, encoded)
    dim = z_QD.shape[1]
    code = learn(lambda: SessionCode.sized(dim, WIDER * dim, ATOMS * dim).to(
        next(model.parameters()).device), z_QD, mean_QD, l1=l1, seed=seed, progress=learnt)
    return code, drop_rare(code, z_QD[share_Q >= POOLED])


def rows_of_sessions(feed: Feed, rows: np.ndarray, people: int = PEOPLE) -> np.ndarray:
    """Those of ``rows`` whose session has another one among them, of the first people by name."""
    person = np.array(feed.index["participant"].to_pylist())[rows]
    _, which, count = np.unique(_sessions(feed, rows), return_inverse=True, return_counts=True)
    several = count[which] > 1
    return rows[several & np.isin(person, np.unique(person[several])[:people])]


def session_tokens(model: Averaged, config: RootConfig, feed: Feed, rows: np.ndarray,
                   progress: Progress = _silent) -> tuple[Tensor, Tensor, Tensor]:
    """``means_of_sessions`` of these rows of the feed, on the CPU.

    Raises
    ------
    DataError
        No two scans of a session have a patch in common.
    """
    parts: list[Tokens] = []
    for views in views_of(model, config, feed, rows, batch_size=SCANS_AT_ONCE):
        found = tokens_in(model, config, feed, views)
        parts.append(Tokens(*(value.cpu() for value in vars(found).values())))
        progress(min(SCANS_AT_ONCE * len(parts), len(rows)), len(rows))
    if parts:
        whole = Tokens(*(torch.cat([getattr(part, name) for part in parts])
                         for name in vars(parts[0])))
        tokens = means_of_sessions(whole, np.unique(_sessions(feed, rows), return_inverse=True)[1])
        if len(tokens[0]):
            return tokens
    raise DataError(f"{feed.uri}: {NO_SESSION} in split train, so no code tells what they have in "
                    "common; pack a feed with a second modality, or with rescans")


def _sessions(feed: Feed, rows: np.ndarray) -> np.ndarray:
    """str [n]: a name for the session of each row."""
    person, session = (np.array(feed.index[name].to_pylist())[rows]
                       for name in ("participant", "session"))
    return np.char.add(np.char.add(person, "/"), session)


def means_of_sessions(tokens: Tokens, session_B: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of brain [Q, D], the means [Q, D] over the scans of their session at their patch, and
    their share of brain [Q]; of the patches where two scans or more show brain.

    A scan that ends before a patch has a token there too, of no voxels: it counts in no mean.
    """
    patches = int(tokens.patch_BN.max()) + 1
    cell_Q = (torch.from_numpy(session_B)[:, None] * patches + tokens.patch_BN).flatten()
    share_Q = tokens.share_BN.flatten()
    shown_Q = share_Q > 0
    cell_Q, share_Q, z_QD = cell_Q[shown_Q], share_Q[shown_Q], tokens.z_BND.flatten(0, 1)[shown_Q]
    count_C = torch.bincount(cell_Q)
    sum_CD = z_QD.new_zeros(len(count_C), z_QD.shape[1]).index_add_(0, cell_Q, z_QD)
    used_Q = (count_C[cell_Q] > 1) & (share_Q >= LEAST_SHARE)
    mean_QD = (sum_CD / count_C.clamp(min=1)[:, None])[cell_Q[used_Q]]
    return z_QD[used_Q], mean_QD, share_Q[used_Q]


def learn(make: Callable[[], Code], z_QD: Tensor, target_QD: Tensor, *, l1: float, seed: int,
          progress: Progress = _silent) -> Code:
    """A code that tells targets of tokens, on the device where it was made."""
    with torch.random.fork_rng(devices=[]):  # draws are the CPU's on any device
        torch.manual_seed(seed)
        code = make()
        device = code.offset.device
        optimizer = torch.optim.Adam(code.parameters(), RATE)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * min(1, (STEPS - step) / COOLDOWN)
            drawn = torch.randint(len(z_QD), (BATCH,))
            loss = code.error(z_QD[drawn].to(device), target_QD[drawn].to(device),
                              l1 * min(1, step / L1_WARMUP))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress(step + 1, STEPS)
    return code.requires_grad_(False)


@torch.no_grad()
def drop_rare(code: SessionCode, z_QD: Tensor) -> float:
    """Drop atoms that few of the tokens use, which are those that embeddings pool; returns the
    share of the others that are active in a token.

    People's means of such atoms are noise with long tails, which a probe takes for signal.

    Raises
    ------
    DataError
        No atom is left.
    """
    use_A = torch.stack([(code(z.to(code.offset.device)) > 0).float().sum(0)
                         for z in z_QD.split(10_000)]).sum(0) / len(z_QD)
    used_A = use_A >= LEAST_USE
    if not used_A.any():
        raise DataError(f"no atom of the code is active in {LEAST_USE:.0%} of the {len(z_QD)} "
                        "tokens that are wholly brain; lower the penalty (--l1)")
    code.keep(used_A)
    return float(use_A[used_A].mean())
