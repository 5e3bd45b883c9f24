"""Which voxels move a readout's score: integrated gradients against what is usual in their place.

    scan -> the usual scan: of each tissue as bright as here, mixed as the template has them
    straight line from the usual scan to this one -> gradient of the score along it (Captum)
    -> times the difference: what each voxel adds to the score
    -> smoothed within the brain by half a patch

The sum over voxels is the score less that of the usual scan (completeness, Sundararajan et al.
2017).  Along the line each token stays with the experts that the scan sends it to: a score that
jumps where a token changes its expert has no gradient there.  The usual scan is a least-squares fit
of the scan by the template's smoothed tissues, so it needs no other scan and no knowledge of the
contrast.  What a baseline hides, no map can show (Sturmfels et al. 2020).

A token is one product of all voxels of its patch with weights of either sign, so single voxels
tell little: on planted spots, smoothing lifts the area under the ROC curve of what voxels add from
.58 to .93, while that of a random encoder falls from .50 to .42 (docs/results/explain.md).  It
leaves the sum.

A map that looks right may show the image and not the model.  So the encoder's weights are drawn
anew, block after block from the last to the first, and each map is compared with the true one
(Adebayo et al. 2018): ``rank`` is the rank correlation of values with their sign, ``rank_of_size``
that of absolute values.  The latter stays above 0 by itself, since both are large where the scan is
unusual.  What random weights make of a scan has a sign by chance, and neighbouring voxels have much
in common: with eight wholly random encoders ``rank`` of one scan was between -.76 and .59.  So all
weights are drawn several times, and the mean size of ``rank`` counts (explain.like_random).

Shape letters: B scans, N tokens, P voxels of a patch, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from neurojepa.downstream.embed import with_all_brain, without_augmentation
from neurojepa.downstream.pooling import Tokens
from neurojepa.downstream.readout import Readout
from neurojepa.feed.format import Grid, is_brain
from neurojepa.feed.loader import Batch
from neurojepa.model.build import build_model
from neurojepa.model.moe import MoE
from neurojepa.objective.anatomy import tissue_priors
from neurojepa.objective.views import Views, make_views, patch_counts, patch_numbers
from neurojepa.weights import Weights

STEPS = 16  # of the integral (Gauss-Legendre); the error is told with every map
SMOOTH = 0.5  # of a patch's edge, sd
AT_ONCE = 4  # steps that go through the encoder together
DRAWN = 5  # times that all weights are drawn anew
ALL = "all of it"  # what is drawn anew then


@dataclass(frozen=True)
class Saliency:
    """What the voxels of a scan add to a score."""

    map: np.ndarray  # float32 [X, Y, Z], on the feed's grid
    score: float
    usual: float  # the score of the usual scan
    error: float  # sum of the map less (score - usual)


class Explainer:
    """Maps of one readout of exported weights."""

    def __init__(self, weights: Weights, readout: Readout) -> None:
        assert weights.places is not None
        self.model, self.readout, self.grid = weights.model, readout, weights.grid
        self.config = without_augmentation(weights.config)
        self.device = next(weights.model.parameters()).device
        self.places = weights.places.to(self.device)
        self.priors = tissue_priors(self.grid)

    def __call__(self, codes: np.ndarray, modality: int) -> Saliency:
        """The map of a scan [X, Y, Z] of codes; ``modality`` is an index into MODALITIES."""
        from captum.attr import IntegratedGradients

        here, usual = (self.views(each, modality) for each in (
            codes, usual_scan(codes, self.priors)))

        def scores_B(tokens_BNP: Tensor) -> Tensor:
            return self._scores(here, tokens_BNP)

        with _holding_experts(self.model) as listening:
            with torch.no_grad(), listening:
                score = float(scores_B(here.tokens_BNP))
            with torch.no_grad():
                plain = float(scores_B(usual.tokens_BNP))
            found = IntegratedGradients(scores_B).attribute(
                here.tokens_BNP, usual.tokens_BNP, n_steps=STEPS, internal_batch_size=AT_ONCE)
        volume = _unpatched(found[0].float(), patch_numbers(
            here.coords_BN3, self.grid, self.config.model.patch_voxels)[0], self.grid,
            self.config.model.patch_voxels)
        smooth = smoothed(volume, is_brain(codes), SMOOTH * self.config.model.patch_voxels)
        return Saliency(smooth, score, plain, float(smooth.sum(dtype=np.float64)) - score + plain)

    def embedding(self, codes: np.ndarray, modality: int) -> np.ndarray:
        """float32 [D], as ``embed`` gives it."""
        with torch.no_grad():
            views = self.views(codes, modality)
            return self.places.pool(self.tokens(views, views.tokens_BNP))[0].cpu().numpy()

    def randomised(self) -> Iterator[tuple[str, Explainer]]:
        """The same with ever more of the encoder drawn anew, from the last block to the first; then
        with all of it drawn anew, again and again."""
        for draw in range(1, DRAWN + 1):
            other = build_model(self.config.model_copy(update={
                "train": self.config.train.model_copy(update={
                    "seed": self.config.train.seed + draw})}), self.grid)
            changed = copy.copy(self)
            changed.model = copy.deepcopy(self.model)
            _take(changed.model, other, "norm")
            blocks = list(other.target.get_submodule("blocks").children())
            for number in reversed(range(len(blocks))):
                _take(changed.model, other, f"blocks.{number}")
                if draw == 1:
                    yield f"from block {number}", changed
            _take(changed.model, other, "patch")
            yield ALL, changed

    def views(self, codes: np.ndarray, modality: int) -> Views:
        """A scan [X, Y, Z] of codes with all its brain."""
        voxels = torch.from_numpy(np.ascontiguousarray(codes))[None]
        batch = Batch(voxels=voxels, modality=torch.tensor([modality]),
                      position=torch.zeros(1, dtype=torch.int64), weight=torch.ones(1),
                      scan_ids=[""]).to(self.device)
        return make_views(batch, with_all_brain(self.config, batch.voxels), self.grid,
                          self.config.train.seed)

    def tokens(self, views: Views, tokens_BNP: Tensor) -> Tokens:
        """What the encoder makes of voxels that take the place of the views' own."""
        B = len(tokens_BNP)
        many = replace(views, tokens_BNP=tokens_BNP, **{
            name: getattr(views, name).expand(B, *getattr(views, name).shape[1:])
            for name in ("coords_BN3", "valid_BN", "foreground_BN", "modality_B")})
        patch_BN = patch_numbers(many.coords_BN3, self.grid, self.config.model.patch_voxels)
        return Tokens(self.model.latents_with_gradient(many), patch_BN, many.foreground_BN,
                      many.modality_B)

    def _scores(self, views: Views, tokens_BNP: Tensor) -> Tensor:
        pooled_BD = self.places.pool(self.tokens(views, tokens_BNP))
        weight_D = torch.from_numpy(self.readout.weight_D).to(pooled_BD)
        return pooled_BD @ weight_D + self.readout.constant


def _take(model: nn.Module, other: nn.Module, name: str) -> None:
    """Copy a part of another model's encoders; routing follows the trained one, so both."""
    for side in ("encoder", "target"):
        part = getattr(model, side).get_submodule(name)
        part.load_state_dict(getattr(other, side).get_submodule(name).state_dict())


@contextmanager
def _holding_experts(model: nn.Module) -> Iterator[AbstractContextManager[None]]:
    """While this lasts, tokens go to the experts that they went to within the context given."""
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    held: dict[MoE, Tensor] = {}

    def hear(layer: MoE) -> Callable[[Tensor], Tensor]:
        def choose(score_QE: Tensor) -> Tensor:
            held[layer] = MoE.choose(layer, score_QE)
            return held[layer]
        return choose

    def hold(layer: MoE) -> Callable[[Tensor], Tensor]:
        return lambda score_QE: held[layer].repeat(len(score_QE) // len(held[layer]), 1)

    @contextmanager
    def listening() -> Iterator[None]:
        for layer in layers:
            vars(layer)["choose"] = hear(layer)
        yield
        for layer in layers:
            vars(layer)["choose"] = hold(layer)

    try:
        yield listening()
    finally:
        for layer in layers:
            vars(layer).pop("choose", None)


def usual_scan(codes: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """uint8 codes of the scan that the template alone would lead one to expect.

    Parameters
    ----------
    codes : uint8 [X, Y, Z]; what is not brain stays as it is
    priors : [K, X, Y, Z], as ``tissue_priors`` has them
    """
    brain = is_brain(codes)
    design = priors[:, brain].T
    bright = np.linalg.lstsq(design, codes[brain].astype(float), rcond=None)[0]
    found = codes.copy()
    found[brain] = np.clip(np.rint(design @ bright), 1, 254)
    return found


def smoothed(volume: np.ndarray, brain: np.ndarray, sd: float) -> np.ndarray:
    """float32: a map [X, Y, Z] smoothed within the brain by a Gaussian of ``sd`` voxels; its sum
    stays."""
    from scipy.ndimage import gaussian_filter

    weight = gaussian_filter(brain.astype(np.float64), sd, mode="constant")
    spread = np.divide(volume, weight, out=np.zeros(volume.shape), where=brain)
    return (brain * gaussian_filter(spread, sd, mode="constant")).astype(np.float32)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of two maps' values; 0 where one of them does not vary."""
    from scipy.stats import rankdata

    if not np.ptp(one) or not np.ptp(other):
        return 0.0
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def _unpatched(value_NP: Tensor, patch_N: Tensor, grid: Grid, patch: int) -> np.ndarray:
    """[X, Y, Z] of the values of some patches, 0 elsewhere."""
    x, y, z = patch_counts(grid, patch)
    all_nP = value_NP.new_zeros(x * y * z, value_NP.shape[1])
    all_nP[patch_N] = value_NP
    split = all_nP.view(x, y, z, patch, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return split.reshape(grid.shape).cpu().numpy()
