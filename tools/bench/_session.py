"""A second stage on trial: a code of a frozen encoder's tokens that tells the session's mean.

    token z of a scan -> linear, GELU, linear -> h -> decoder -> mean over the session's scans of
                                                               their tokens at the same patch

A T1w scan and a T2w scan of one visit show one head, so what the code can tell of their mean is
anatomy, and contrast is left out.  Kinds of code:

    sparse   h = ReLU(.) of ``ATOMS``, decoded by atoms of length 1; ``L1`` times ||h||_1
    dense    h is the told mean itself: the control for sparsity
    wide     h = GELU(.) as wide as the sparse one, decoded alike, no penalty: the control for
             sparsity that has its aim, its network, its width and its time
    own      as sparse, of the scan's own token: a sparse autoencoder, the control for the session
    split    h = ReLU(.) where it is above a threshold, such that ``top`` of a token's atoms are on
             average (Bussmann et al. 2024, BatchTopK), no penalty; these tell the mean, and
             ``own_top`` of ``own_atoms`` more tell what is left of the scan's own token

What is read of such a run is h, as tokens.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from neurojepa.storage import write_bytes

PEOPLE = 200  # of train, whose scans are encoded
LEAST_SHARE = 0.5  # of a patch that must be brain
LEAST_USE = 0.01  # of these tokens, for an atom to stay
HIDDEN, ATOMS = 192, 384
L1, STEPS = 2e-3, 600  # as val people chose at seed 0, see docs/results/compare.md
RATE, BATCH = 2e-3, 1024
L1_WARMUP, COOLDOWN = 200, 180  # steps
TOP_WARMUP = 300  # steps in which the number of active atoms falls from all
TOKENS_SEEN, PACE = 256, 0.1  # for thresholds, which follow by so much of the way in a step
SCANS_AT_ONCE = 8
NO_SESSION = "no two scans of a session have a patch in common"


@dataclass(frozen=True)
class Kind:
    """What a code is like."""

    own: bool = False  # it tells the scan's own token
    atoms: int = ATOMS  # 0: h is what is told
    sparse: bool = True  # ReLU, without atoms that few use; or GELU
    l1: float = 0.0
    top: int = 0  # atoms active in a token, on average; 0: all that are above 0
    own_atoms: int = 0  # for what is left of the scan's own token
    own_top: int = 0


KINDS = {"sparse": Kind(l1=L1), "dense": Kind(atoms=0, sparse=False), "wide": Kind(sparse=False),
         "own": Kind(own=True, l1=L1), "split": Kind(top=16, own_atoms=192, own_top=8)}


class Code(nn.Module):
    """h of tokens, and what it tells."""

    def __init__(self, dim: int, kind: Kind) -> None:
        super().__init__()
        self.kind, self.active = kind, 1.0  # share of the atoms that are active in a token
        self.num_shared = kind.atoms or dim  # of h, which tell the target
        self.encode = nn.Sequential(nn.Linear(dim, HIDDEN), nn.GELU(),
                                    nn.Linear(HIDDEN, self.num_shared + kind.own_atoms))
        self.decoder = Decoder(self.num_shared, dim)
        self.offset = nn.Parameter(torch.zeros(dim))
        self.own_decoder = Decoder(kind.own_atoms, dim)
        self.own_offset = nn.Parameter(torch.zeros(dim))
        self.least_A = torch.zeros(self.num_shared + kind.own_atoms)  # the threshold of each atom

    def forward(self, z: Tensor) -> Tensor:
        """h, [..., D] -> [..., A]"""
        h: Tensor = self.encode(z)
        if not self.kind.atoms:
            return h
        return F.relu(h) * (h > self.least_A) if self.kind.sparse else F.gelu(h)

    def told(self, h: Tensor) -> Tensor:
        """[..., D]"""
        if not self.kind.atoms:
            return h
        # a product of rows that do not lie together would take forty times as long
        return self.decoder(h[..., :self.num_shared].contiguous()) + self.offset

    def rest(self, h: Tensor) -> Tensor:
        """[..., D]: what own atoms tell of what is left of the scan's own token."""
        return self.own_decoder(h[..., self.num_shared:].contiguous()) + self.own_offset

    def error(self, z: Tensor, target: Tensor, l1: float) -> Tensor:
        """The loss of tokens [Q, D]."""
        h = self(z)
        told = self.told(h)
        loss = (told - target).square().mean() + l1 * h.abs().sum(-1).mean()
        if self.kind.own_atoms:  # the shared atoms are not to tell of contrast
            loss = loss + (told.detach() + self.rest(h) - z).square().mean()
        return loss

    @torch.no_grad()
    def set_thresholds(self, z: Tensor, all_share: float, pace: float) -> None:
        """Move thresholds to where ``top`` atoms of a token in [Q, D] are active on average; while
        ``all_share`` falls from 1 to 0, from all atoms to ``top``."""
        kind, h = self.kind, F.relu(self.encode(z))
        for of, num, top in ((slice(kind.atoms), kind.atoms, kind.top),
                             (slice(kind.atoms, None), kind.own_atoms, kind.own_top)):
            if top:
                share = (top + all_share * (num - top)) / num
                values = h[:, of].numpy().ravel()
                k = min(int((1 - share) * len(values)), len(values) - 1)
                least = float(np.partition(values, k)[k])
                self.least_A[of] += pace * (least - self.least_A[of])


def fit(model: Averaged, config: RootConfig, feed: Feed, kind: Kind) -> Code:
    """A code of the model's tokens, learnt from sessions of split train with several scans."""
    z_QD, mean_QD, share_Q = session_tokens(model, config, feed)
    code = learnt(z_QD, z_QD if kind.own else mean_QD, kind, config.train.seed)
    return without_rare(code, z_QD[share_Q >= POOLED]) if kind.sparse else code


def learnt(z_QD: Tensor, target_QD: Tensor, kind: Kind, seed: int) -> Code:
    """A code that tells targets of tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        code = Code(z_QD.shape[1], kind)
        optimizer = torch.optim.Adam(code.parameters(), RATE)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * min(1, (STEPS - step) / COOLDOWN)
            drawn = torch.randint(len(z_QD), (BATCH,))
            if kind.top:
                code.set_thresholds(z_QD[drawn[:TOKENS_SEEN]], max(0.0, 1 - step / TOP_WARMUP),
                                    PACE)
            loss = code.error(z_QD[drawn], target_QD[drawn], kind.l1 * min(1, step / L1_WARMUP))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return code.requires_grad_(False)


@torch.no_grad()
def without_rare(code: Code, z_QD: Tensor) -> Code:
    """The code without atoms that few of the tokens use, which are those that embeddings pool.

    People's means of such atoms are noise with long tails, which a probe takes for signal.
    """
    use_A = torch.stack([(code(z) > 0).float().sum(0) for z in z_QD.split(10_000)]).sum(0)
    use_A /= len(z_QD)
    used_A = use_A >= LEAST_USE
    code.active, last = float(use_A[used_A].mean()), code.encode[-1]
    shared_A, own_A = used_A.split([code.kind.atoms, code.kind.own_atoms])
    for layer, name, kept_A in ((last, "weight", used_A), (last, "bias", used_A),
                                (code.decoder, "weight", shared_A),
                                (code.own_decoder, "weight", own_A)):
        setattr(layer, name, nn.Parameter(getattr(layer, name)[kept_A], requires_grad=False))
    code.least_A, code.num_shared = code.least_A[used_A], int(shared_A.sum())
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


@dataclass
class Remembered:
    """Latents that are kept in a folder, a file a scan, for other codes of the same weights."""

    folder: Path
    latents: Callable[[Views], Tensor]
    saved_s: float = 0.0  # CPU seconds that latents found here took when they were made

    def __call__(self, views: Views) -> Tensor:
        files = [self.folder / f"{digest(*scan)}.npz"
                 for scan in zip(views.tokens_BNP, views.coords_BN3, strict=True)]
        if all(file.exists() for file in files):
            found = [np.load(file, allow_pickle=False) for file in files]
            self.saved_s += sum(float(each["cpu_s"]) for each in found)
            return torch.from_numpy(np.stack([each["z_ND"] for each in found]))
        began = time.process_time()
        z_BND = self.latents(views)
        spent = (time.process_time() - began) / len(files)
        for file, z_ND in zip(files, z_BND, strict=True):
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, z_ND=z_ND.numpy(), cpu_s=np.array(spent))
            write_bytes(str(file), buffer.getvalue())
        return z_BND


def remember(model: Averaged, folder: Path) -> Remembered:
    """Let the model's ``latents`` be kept in ``folder``."""
    folder.mkdir(exist_ok=True)
    store = Remembered(folder, model.latents)
    model.latents = store  # type: ignore[method-assign]
    return store


def digest(*values: Tensor) -> str:
    """A name for what tensors hold."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()[:32]
