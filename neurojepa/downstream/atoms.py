"""Where in the brain each atom of the sparse code fires, and which places each expert gets.

Scans without augmentation go through the whole model, each with masks of its own.  Listeners before
the code and before the target encoder's experts see what passes there:

    activations of the code [token, atom]           at the places that were predicted; of a
                                                    session code, which reads whole scans, at all
                                                    places of brain
    1 / k for each of k experts chosen [token, expert], per layer, at all places

A ``Tally`` adds such features up by patch of the grid, by modality and by scan; ``summary`` turns
it into figures by region.  Places are MNI millimetres; heads keep their own size unless the feed
was prepared otherwise, so a place is as exact as rigid alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neurojepa.config import RootConfig
from neurojepa.downstream.embed import batches, without_augmentation
from neurojepa.downstream.regions import Regions
from neurojepa.downstream.sessions import LEAST_SHARE
from neurojepa.errors import ConfigError
from neurojepa.feed.format import MODALITIES, Feed, Grid
from neurojepa.methods import METHODS
from neurojepa.model.averaged import Averaged
from neurojepa.model.moe import MoE
from neurojepa.model.sparse import SparseCode, sparse_code
from neurojepa.objective.losses import take
from neurojepa.objective.views import Views, make_views, patch_centres_mm, patch_numbers

STRONGEST = 5  # scans told for each feature
RARE = 0.1  # of the most often seen patch's tokens; places seen less are left out of maps


@dataclass
class Tally:
    """Sums over tokens of F features that are never negative.  n patches, m modalities."""

    total_nF: Tensor
    tokens_n: Tensor
    by_modality_mF: Tensor
    tokens_m: Tensor
    active_F: Tensor  # tokens above 0
    top_WF: Tensor  # the strongest scans' largest values, descending
    top_scan_WF: Tensor  # int64, row in the feed's index
    top_patch_WF: Tensor  # int64

    @classmethod
    def empty(cls, num_patches: int, num_features: int, device: torch.device) -> Tally:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        top = STRONGEST, num_features
        return cls(zeros(num_patches, num_features), zeros(num_patches),
                   zeros(len(MODALITIES), num_features), zeros(len(MODALITIES)),
                   zeros(num_features), zeros(*top), zeros(*top, dtype=torch.int64),
                   zeros(*top, dtype=torch.int64))

    def add(self, value_QF: Tensor, patch_Q: Tensor, modality: int, scan: int) -> None:
        """Take up the tokens of one scan; it may have none, as a thin slab has."""
        if not len(value_QF):
            return
        self.total_nF.index_add_(0, patch_Q, value_QF)
        self.tokens_n.index_add_(0, patch_Q, torch.ones_like(patch_Q, dtype=torch.float32))
        self.by_modality_mF[modality] += value_QF.sum(0)
        self.tokens_m[modality] += len(value_QF)
        self.active_F += (value_QF > 0).sum(0)
        largest_F, where_F = value_QF.max(0)
        values = torch.cat([self.top_WF, largest_F[None]])
        self.top_WF, chosen_WF = values.topk(STRONGEST, 0)
        for name, new_F in (("top_scan_WF", torch.full_like(where_F, scan)),
                            ("top_patch_WF", patch_Q[where_F])):
            joined = torch.cat([getattr(self, name), new_F[None]])
            setattr(self, name, joined.gather(0, chosen_WF))

    def mean_map(self) -> np.ndarray:
        """[n, F] mean at each patch; 0 where few tokens were seen."""
        often_n1 = (self.tokens_n > RARE * self.tokens_n.max())[:, None]
        return (often_n1 * self.total_nF / self.tokens_n.clamp(min=1)[:, None]).cpu().numpy()


@dataclass(frozen=True)
class Anatomy:
    """What a feed's scans showed; ``atoms`` is None for a dense code."""

    atoms: Tally | None
    experts: list[Tally]  # of each MoE layer
    layers: list[int]  # their blocks' numbers


@torch.no_grad()
def observe(model: Averaged, config: RootConfig, feed: Feed, rows: np.ndarray,
            batch_size: int = 8, progress: Callable[[int], None] = lambda done: None) -> Anatomy:
    """Tally a feed's scans.

    Parameters
    ----------
    rows : [n] row numbers of ``feed.index``.
    progress : called with the number of scans done.

    Raises
    ------
    ConfigError
        The model has neither sparse code nor experts.
    """
    code, session, experts = sparse_code(model), model.session_code, _expert_layers(model)
    if session is None and not (METHODS[config.objective.method].latents and (code or experts)):
        raise ConfigError(f"objective.method = {config.objective.method}, objective.sparse.code = "
                          f"{config.objective.sparse.code}, model.moe = {config.model.moe}: there "
                          "are no atoms and no experts to show; train a JEPA with one of them, or "
                          "learn a session code (neurojepa code)")
    model.eval()
    config, device = without_augmentation(config), next(model.parameters()).device
    num_patches = len(patch_centres_mm(feed.grid, config.model.patch_voxels))
    num_atoms = session.atoms if session else code.encode.out_features if code else 0
    seen = Anatomy(
        Tally.empty(num_patches, num_atoms, device) if num_atoms else None,
        [Tally.empty(num_patches, len(layer.router), device) for layer in experts.values()],
        list(experts))
    for start, batch in zip(range(0, len(rows), batch_size), batches(feed, rows, batch_size),
                            strict=True):
        part = rows[start:start + batch_size]
        batch = replace(batch, position=torch.from_numpy(part))  # so that masks differ
        views = make_views(batch.to(device), config, feed.grid, config.train.seed)
        patch_BN = patch_numbers(views.coords_BN3, feed.grid, config.model.patch_voxels)
        with _listening(None if session else code, experts) as heard:
            h_BNA = model.latents(views) if session else model(views, 0.0)
        for b, row in enumerate(part.tolist()):
            modality = int(batch.modality[b])
            if seen.atoms and session:
                seen.atoms.add(*_brain(h_BNA[b], views, patch_BN, b), modality, row)
            elif seen.atoms and code:
                seen.atoms.add(*_predicted(heard[code], views, patch_BN, b), modality, row)
            for layer, tally in zip(experts.values(), seen.experts, strict=True):
                valid_N = views.valid_BN[b]
                tally.add(heard[layer][b][valid_N], patch_BN[b][valid_N], modality, row)
        progress(start + len(part))
    return seen


def _predicted(h_VTA: Tensor, views: Views, patch_BN: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Activations [Q, A] and patches [Q] where scan b was predicted."""
    target_BMT = views.target_BMT
    valid_Q = take(views.valid_BN, target_BMT)[b].flatten()
    h_QA = h_VTA.unflatten(0, target_BMT.shape[:2])[b].flatten(0, 1)
    return h_QA[valid_Q], take(patch_BN, target_BMT)[b].flatten()[valid_Q]


def _brain(h_NA: Tensor, views: Views, patch_BN: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Those of scan b's tokens that a session code learns from."""
    brain_N = views.foreground_BN[b] >= LEAST_SHARE
    return h_NA[brain_N], patch_BN[b, brain_N]


def _expert_layers(model: nn.Module) -> dict[int, MoE]:
    """The target encoder's MoE layers by the number of their block."""
    return {i: block.mlp for i, block in enumerate(getattr(model.target, "blocks", []))
            if isinstance(block.mlp, MoE)}


@contextmanager
def _listening(code: SparseCode | None,
               experts: dict[int, MoE]) -> Iterator[dict[nn.Module, Tensor]]:
    """What code [V, T, A] and experts [B, N, E] do during a forward, by module."""
    heard: dict[nn.Module, Tensor] = {}

    def hear_code(module: Any, inputs: tuple[Tensor, ...]) -> None:
        # a code that visible tokens share is called for them too, after the predictions
        heard.setdefault(module, module.activations(inputs[0])[0].float())

    def hear_experts(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x_BND = inputs[0]
        expert_Qk = module.route(x_BND.flatten(0, 1))[1]
        one_hot_QE = nn.functional.one_hot(expert_Qk, len(module.router)).float().mean(1)
        heard[module] = one_hot_QE.unflatten(0, x_BND.shape[:2])

    hooks = [layer.register_forward_pre_hook(hear_experts) for layer in experts.values()]
    if code:
        hooks.append(code.register_forward_pre_hook(hear_code))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


# ---- figures -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Summary:
    """Figures of F features.  R regions, m modalities that occur, n patches."""

    share_F: np.ndarray  # of tokens in which a feature is active
    mean_F: np.ndarray  # value where it is active
    map_nF: np.ndarray  # Tally.mean_map
    region_RF: np.ndarray  # mean value in each region; nan where none of its tokens was seen
    selectivity_RF: np.ndarray  # (in - out) / (in + out), -1 to 1
    modality_mF: np.ndarray  # mean value
    modalities: list[str]
    strongest: list[list[dict[str, Any]]]  # of each feature: scan_id, modality, mm, value


def summary(tally: Tally, regions: Regions, feed: Feed, patch: int) -> Summary:
    """Means of a tally by place, region and modality, and its strongest scans.

    A region's mean weighs each patch by its tokens and by its share in the region; ``out`` is the
    mean over all other regions.
    """
    total_nF, tokens_n = tally.total_nF.cpu().numpy(), tally.tokens_n.cpu().numpy()
    sums_RF, weights_R = regions.share_nR.T @ total_nF, regions.share_nR.T @ tokens_n
    inside_RF = _ratio(sums_RF, weights_R[:, None])
    outside_RF = _ratio(sums_RF.sum(0) - sums_RF, (weights_R.sum() - weights_R)[:, None])
    occurring = tally.tokens_m.cpu().numpy() > 0
    by_modality = tally.by_modality_mF.cpu().numpy() / np.maximum(
        tally.tokens_m.cpu().numpy(), 1)[:, None]
    active_F = tally.active_F.cpu().numpy()
    return Summary(
        active_F / tokens_n.sum(), total_nF.sum(0) / np.maximum(active_F, 1), tally.mean_map(),
        inside_RF,
        _ratio(inside_RF - outside_RF, inside_RF + outside_RF), by_modality[occurring],
        [name for name, occurs in zip(MODALITIES, occurring, strict=True) if occurs],
        _strongest(tally, feed, patch))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, nan where b is 0."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def _strongest(tally: Tally, feed: Feed, patch: int) -> list[list[dict[str, Any]]]:
    ids, modalities = (feed.index[name].to_pylist() for name in ("scan_id", "modality"))
    places = patch_places_mm(feed.grid, patch)
    columns = [each.cpu().numpy().T for each in (tally.top_WF, tally.top_scan_WF,
                                                 tally.top_patch_WF)]
    return [[{"scan_id": ids[scan], "modality": modalities[scan], "mm": places[at].tolist(),
              "value": float(value)}
             for value, scan, at in zip(*of_feature, strict=True) if value > 0]
            for of_feature in zip(*columns, strict=True)]


def patch_places_mm(grid: Grid, patch: int) -> np.ndarray:
    """[n, 3] centres of patches in MNI mm."""
    return np.round(patch_centres_mm(grid, patch).numpy() + np.array(grid.centre_mm), 1)
