"""Session codes and their controls: second stages that are read through h.

``neurojepa code`` makes the first kind (neurojepa/downstream/sessions.py); the others ask what of
it matters:

    sparse   h = ReLU(.) of ``ATOMS``, decoded by atoms of length 1; ``L1`` times ||h||_1
    dense    h is the told mean itself: the control for sparsity
    wide     h = GELU(.) as wide as the sparse one, decoded alike, no penalty: the control for
             sparsity that has its aim, its network, its width and its time
    own      as sparse, of the scan's own token: a sparse autoencoder, the control for the session
    T1w      as own, of T1w scans alone: a session of one scan has no more than its own tokens
    split    h = ReLU(.) where it is above a threshold, such that ``top`` of a token's atoms are on
             average (Bussmann et al. 2024, BatchTopK), no penalty; these tell the mean, and
             ``own_top`` of ``own_atoms`` more tell what is left of the scan's own token

and, in the table of codes.py alone, JumpReLU (Rajamanoharan et al. 2024): h is x where it is above
a learnt threshold of its atom, else 0.  The penalty is on the number of active atoms, and shrinks
none of them: (their share / ``jump`` - 1)^2.

What is read of such a run is h, as tokens.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.config import RootConfig
from neurojepa.downstream import sessions
from neurojepa.downstream.embed import select_rows, tokens_in, views_of
from neurojepa.downstream.pooling import LEAST_SHARE as POOLED
from neurojepa.downstream.sessions import (
    L1,
    LEAST_SHARE,
    SCANS_AT_ONCE,
    drop_rare,
    learn,
    rows_of_sessions,
    session_tokens,
)
from neurojepa.feed.format import Feed
from neurojepa.model.averaged import Averaged
from neurojepa.model.session_code import SessionCode, keep_rows
from neurojepa.model.sparse import Decoder
from neurojepa.objective.views import Views
from neurojepa.storage import write_bytes
from tools.bench.common import spent_s

HIDDEN, ATOMS = 192, 384  # as the package has them for the width of size tiny; larger ones more
TOP_WARMUP = 300  # steps in which the number of active atoms falls from all
LOG_LEAST, LEAST_PACE, BANDWIDTH = -0.5, 5.0, 0.5  # of JumpReLU's thresholds
TOKENS_SEEN, PACE = 256, 0.1  # for thresholds, which follow by so much of the way in a step


@dataclass(frozen=True)
class Kind:
    """What a code is like."""

    own: bool = False  # it tells the scan's own token
    modality: str | None = None  # of which alone it learns; None: of all scans of a session
    atoms: int = ATOMS  # 0: h is what is told
    sparse: bool = True  # ReLU, without atoms that few use; or GELU
    l1: float = 0.0  # weight of the penalty
    jump: float = 0.0  # share of the atoms that JumpReLU is to leave active
    top: int = 0  # atoms active in a token, on average; 0: all that are above 0
    own_atoms: int = 0  # for what is left of the scan's own token
    own_top: int = 0


KINDS = {"sparse": Kind(l1=L1), "dense": Kind(atoms=0, sparse=False), "wide": Kind(sparse=False),
         "own": Kind(own=True, l1=L1), "T1w": Kind(own=True, modality="T1w", l1=L1),
         "split": Kind(top=16, own_atoms=192, own_top=8)}


class Code(SessionCode):
    """A session code of one of the kinds."""

    least_A: Tensor  # the threshold of each atom

    def __init__(self, dim: int, kind: Kind) -> None:
        shared = kind.atoms or dim  # of h, which tell the target
        hidden = max(HIDDEN, sessions.WIDER * dim)
        super().__init__(nn.Sequential(nn.Linear(dim, hidden), nn.GELU(),
                                       nn.Linear(hidden, shared + kind.own_atoms)),
                         Decoder(shared, dim))
        self.kind, self.active = kind, 1.0  # share of the atoms that are active in a token
        self.own_decoder = Decoder(kind.own_atoms, dim)
        self.own_offset = nn.Parameter(torch.zeros(dim))
        self.register_buffer("least_A", torch.zeros(shared + kind.own_atoms), persistent=False)
        self.log_least_A = nn.Parameter(torch.full((shared,), LOG_LEAST))  # as JumpReLU learns it
        self.step = 0  # of learning

    def forward(self, z: Tensor) -> Tensor:
        """h, [..., D] -> [..., A]"""
        h: Tensor = self.encode(z)
        if not self.kind.atoms:
            return h
        if self.kind.jump:
            jumped: Tensor = _Jump.apply(h, self.thresholds())[0]  # type: ignore[no-untyped-call]
            return jumped
        return F.relu(h) * (h > self.least_A) if self.kind.sparse else F.gelu(h)

    def told(self, h: Tensor) -> Tensor:
        """[..., D]"""
        if not self.kind.atoms:
            return h
        # a product of rows that do not lie together would take forty times as long
        found: Tensor = super().told(h[..., :self.atoms].contiguous())
        return found

    def rest(self, h: Tensor) -> Tensor:
        """[..., D]: what own atoms tell of what is left of the scan's own token."""
        found: Tensor = self.own_decoder(h[..., self.atoms:].contiguous())
        return found + self.own_offset

    def error(self, z_QD: Tensor, mean_QD: Tensor, l1: float) -> Tensor:
        """The loss of a step of learning: of tokens, and of what is told of them."""
        if self.kind.top:
            self.set_thresholds(z_QD[:TOKENS_SEEN], max(0.0, 1 - self.step / TOP_WARMUP), PACE)
        self.step += 1
        if self.kind.jump:
            h, active = _Jump.apply(self.encode(z_QD),  # type: ignore[no-untyped-call]
                                    self.thresholds())
            penalty = (active.mean() / self.kind.jump - 1).square()
        else:
            h = self(z_QD)
            penalty = h.abs().sum(-1).mean()
        told = self.told(h)
        loss = (told - mean_QD).square().mean() + l1 * penalty
        if self.kind.own_atoms:  # the shared atoms are not to tell of contrast
            loss = loss + (told.detach() + self.rest(h) - z_QD).square().mean()
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
                values = h[:, of].cpu().numpy().ravel()
                k = min(int((1 - share) * len(values)), len(values) - 1)
                least = float(np.partition(values, k)[k])
                self.least_A[of] += pace * (least - self.least_A[of])

    def keep(self, used_A: Tensor) -> None:
        """Drop all other atoms, shared and own; bool [A]."""
        shared_A, own_A = used_A.split([len(self.decoder.weight), len(self.own_decoder.weight)])
        keep_rows(self.encode[-1], used_A)
        keep_rows(self.decoder, shared_A)
        keep_rows(self.own_decoder, own_A)
        self.least_A = self.least_A[used_A]
        self.log_least_A = nn.Parameter(self.log_least_A[shared_A], requires_grad=False)

    def thresholds(self) -> Tensor:
        """[A] of JumpReLU."""
        return (LEAST_PACE * self.log_least_A).exp()


class _Jump(torch.autograd.Function):
    """x [..., A] where it is above thresholds [A], else 0, and 1 where it is, else 0.

    The thresholds' gradients are the pseudo-derivatives of the paper: as if the steps were ramps of
    ``BANDWIDTH``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, least_A: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, least_A)
        active = (x > least_A).to(x)
        return x * active, active

    @staticmethod
    def backward(ctx: Any, of_h: Tensor, of_active: Tensor) -> tuple[Tensor, Tensor]:
        x, least_A = ctx.saved_tensors
        near = ((x - least_A).abs() < BANDWIDTH / 2).to(x) / BANDWIDTH
        of_least = -(near * (least_A * of_h + of_active)).flatten(0, -2).sum(0)
        return of_h * (x > least_A), of_least


def fit(model: Averaged, config: RootConfig, feed: Feed, kind: Kind) -> Code:
    """A code of the model's tokens, learnt from sessions of split train with several scans."""
    z_QD, mean_QD, share_Q = taught(model, config, feed, kind.modality)
    if kind.atoms:
        kind = replace(kind, atoms=max(kind.atoms, sessions.ATOMS * z_QD.shape[1]))
    code = learnt(z_QD, z_QD if kind.own else mean_QD, kind, config.train.seed,
                  next(model.parameters()).device)
    return without_rare(code, z_QD[share_Q >= POOLED]) if kind.sparse else code


def taught(model: Averaged, config: RootConfig, feed: Feed, modality: str | None = None
           ) -> tuple[Tensor, Tensor, Tensor]:
    """``session_tokens`` of the people that codes learn from; or of their scans of a modality,
    with their own tokens for means."""
    rows = rows_of_sessions(feed, select_rows(feed, None, None, "train"))
    if modality is None:
        return session_tokens(model, config, feed, rows)
    rows = np.intersect1d(rows, select_rows(feed, modality, None, "train"))
    parts = [tokens_in(model, config, feed, views)
             for views in views_of(model, config, feed, rows, batch_size=SCANS_AT_ONCE)]
    z_QD, share_Q = (torch.cat([getattr(part, name).flatten(0, 1) for part in parts]).cpu()
                     for name in ("z_BND", "share_BN"))
    used_Q = share_Q >= LEAST_SHARE
    return z_QD[used_Q], z_QD[used_Q], share_Q[used_Q]


def learnt(z_QD: Tensor, target_QD: Tensor, kind: Kind, seed: int,
           device: torch.device | str = "cpu") -> Code:
    """A code that tells targets of tokens."""
    return learn(lambda: Code(z_QD.shape[1], kind).to(device), z_QD, target_QD, l1=kind.l1,
                 seed=seed)


def without_rare(code: Code, z_QD: Tensor) -> Code:
    """The code without atoms that few of the tokens use."""
    code.active = drop_rare(code, z_QD)
    return code


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
            return torch.from_numpy(np.stack([each["z_ND"] for each in found])).to(
                views.tokens_BNP.device)
        began = spent_s()
        z_BND = self.latents(views)
        spent = (spent_s() - began) / len(files)
        for file, z_ND in zip(files, z_BND, strict=True):
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, z_ND=z_ND.cpu().numpy(), cpu_s=np.array(spent))
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
    data = b"".join(value.cpu().numpy().tobytes() for value in values)
    return hashlib.sha256(data).hexdigest()[:32]
