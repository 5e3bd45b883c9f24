"""The sparse JEPA: predict the latents of hidden tokens from the visible ones.

    context tokens -> encoder -> predictor -> code h -> Decoder(h)
    all tokens -> target encoder -> layer norm -> z, which Decoder(h) is to match

With ``objective.sparse.visible`` the code is one dictionary for all tokens.  Predictions are
brought to the width of latents, and the visible tokens' own latents go through the same code:

    prediction, or layer-normed visible latent -> code h -> Decoder(h) ~ z of the same place

Then the penalty shapes the encoder, and ``atoms`` reads h from the tokens of any scan.

A linear head may tell from each context latent how much air, fluid, grey and white matter its patch
holds (objective/anatomy.py).

z may be of another scan of the session: the encoder is told no modality, the predictor is told the
target's.

The target encoder is a copy of the encoder that gets no gradient; the trainer moves it by an
exponential moving average.  Its output is layer-normed without affine, so the encoder cannot lower
the loss by shrinking its latents.  It could by making them alike: that costs ``crowding``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from neurojepa.config import RootConfig
from neurojepa.feed.format import Grid
from neurojepa.model.averaged import Averaged
from neurojepa.model.flops import encoder_flops, predictor_flops, tokens_per_volume
from neurojepa.model.linear import Linear
from neurojepa.model.predictor import Predictor
from neurojepa.model.sizes import SIZES
from neurojepa.model.sparse import Coded, SparseCode
from neurojepa.model.tissue import tissue_head, with_tissue
from neurojepa.objective.losses import crowding, sample_sums, take, token_weights
from neurojepa.objective.views import Views


class SparseJEPA(Averaged):
    """Encoder, its frozen target copy, predictor and sparse code."""

    def __init__(self, config: RootConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        size = SIZES[config.model.size]
        self.background_weight = config.objective.background_weight
        self.predictor = Predictor(size)
        self.visible = config.objective.sparse.visible
        self.widen = Linear(size.predictor_dim, size.dim, bias=False) if self.visible else None
        self.code = SparseCode(config.objective.sparse, dim=size.dim,
                               input_dim=size.dim if self.visible else size.predictor_dim)
        self.spread = config.objective.spread
        self.tissue = tissue_head(config.objective, size.dim)

    def forward(self, views: Views, l1: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch.

        Parameters
        ----------
        views : from ``make_views``.
        l1 : weight of ||h||_1, as the schedule has it now.

        Returns
        -------
        loss : sum over samples of weight * loss, float32.
        metrics : detached scalars, each summed with the samples' weights: divide by ``weight``
            after adding up micro-batches and ranks.  ``loss/T1w`` and ``weight/T1w`` (one pair per
            modality of the targets, and ``cross`` for targets from another scan) are the parts
            that such samples contribute.
        """
        z_BND = self.targets(views)
        predicted_VTd, y_VCD = self._predict(views)
        # a scalar on the device: as a number of Python each value would be compiled anew
        return self.losses(views, z_BND=z_BND, y_VCD=y_VCD, predicted_VTd=predicted_VTd,
                           l1=torch.full((), l1, device=z_BND.device)
                           if isinstance(l1, float) else l1)

    def losses(self, views: Views, *, z_BND: Tensor, y_VCD: Tensor, predicted_VTd: Tensor,
               l1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``forward`` returns, of target latents, context latents and predictions."""
        z_VTD = take(z_BND, views.target_BMT).flatten(0, 1)
        valid_VT = take(views.target_valid_BN, views.target_BMT).flatten(0, 1)
        if self.widen is not None:
            # not layer-normed: what cannot be told must be free to shrink
            predicted_VTd = self.widen(predicted_VTd)
        coded = self.code(predicted_VTd, z_VTD, valid_VT)
        weight_BMT = token_weights(take(views.target_foreground_BN, views.target_BMT),
                                   take(views.target_valid_BN, views.target_BMT),
                                   self.background_weight)

        def per_sample(value_VT: Tensor) -> Tensor:
            return (weight_BMT * value_VT.view_as(weight_BMT)).sum(-1).mean(1)

        parts = {"prediction": per_sample(coded.error), "sparsity": l1 * per_sample(coded.penalty)}
        if coded.gate_error is not None:
            parts["gate"] = per_sample(coded.gate_error)
        if self.visible:
            parts["visible"] = self.visible * self._visible_cost(views, z_BND, y_VCD, l1)
        total_B, shown = torch.stack(list(parts.values())).sum(0), {}
        if self.spread:
            B = len(views.weight_B)
            shown["crowding"] = crowding(
                y_VCD.reshape(B, -1, y_VCD.shape[-1]),
                take(views.valid_BN, views.context_BMC).reshape(B, -1))
            total_B = total_B + self.spread * shown["crowding"]
        total_B, told = with_tissue(self.tissue, total_B, views, index_BMC=views.context_BMC,
                                    latent_VCD=y_VCD)
        loss_B = views.weight_B * total_B
        metrics = sample_sums(views, loss_B.detach(), {
            **parts, **shown, **told, "l0": per_sample(coded.num_active)})
        weight_VT = (views.weight_B[:, None, None] * weight_BMT).flatten(0, 1)
        whole = {**_batch_metrics(coded, z_VTD, weight_VT), "dead_atoms": self.code.dead_share()}
        metrics |= {name: value * metrics["weight"] for name, value in whole.items()}
        return loss_B.sum(), metrics

    @staticmethod
    def flops(config: RootConfig, grid: Grid) -> tuple[float, float]:
        """As ``Averaged.flops``; the target encoder, which sees all tokens, has no backward."""
        size, masks, sparse = (SIZES[config.model.size], config.objective.masks,
                               config.objective.sparse)
        tokens = tokens_per_volume(config, grid)
        targets = round(tokens * masks.target_share)
        atoms = (sparse.atoms or 4 * size.dim) if sparse.code != "identity" else 0
        decodings = 2 if sparse.code == "gated" else 1  # its second has half a backward: a trifle
        head = 2 * targets * (size.predictor_dim * (atoms or size.dim)
                              + decodings * atoms * size.dim)
        predictor = predictor_flops(config.model, tokens=tokens, targets=targets)
        if sparse.visible:  # predictions are widened, and the context has its codes too
            wide = 2 * size.dim * atoms * (1 + decodings)
            head = targets * (2 * size.predictor_dim * size.dim + wide) + (tokens - targets) * wide
        trained = len(masks.scales) * (encoder_flops(config.model, tokens - targets)
                                       + predictor + head)
        return encoder_flops(config.model, tokens) + trained, trained

    def _visible_cost(self, views: Views, z_BND: Tensor, y_VCD: Tensor, l1: Tensor) -> Tensor:
        """float32 [B]: the code's loss on the latents of visible tokens, all its parts."""
        context_BMC = views.context_BMC
        valid_BMC = take(views.target_valid_BN, context_BMC)
        y_VCD = F.layer_norm(y_VCD, y_VCD.shape[-1:])
        coded = self.code(y_VCD, take(z_BND, context_BMC).flatten(0, 1),
                          valid_BMC.flatten(0, 1))
        cost_VC = coded.error + l1 * coded.penalty
        if coded.gate_error is not None:
            cost_VC = cost_VC + coded.gate_error
        weight_BMC = token_weights(take(views.target_foreground_BN, context_BMC), valid_BMC,
                                   self.background_weight)
        return (weight_BMC * cost_VC.view_as(weight_BMC)).sum(-1).mean(1)

    @torch.no_grad()
    def atoms(self, views: Views) -> Tensor:
        """float32 [B, N, A]: the code of every token, as ``latents`` has them.

        Only where one code acts on all tokens (``objective.sparse.visible``).
        """
        assert self.visible
        latents_BND = self.latents(views).to(self.code.encode.weight.dtype)
        return self.code.activations(latents_BND)[0].float()

    def targets(self, views: Views) -> Tensor:
        """float32 [B, N, D]: what is to be predicted, for every token."""
        return self.latents(views.of_targets())

    def _predict(self, views: Views) -> tuple[Tensor, Tensor]:
        """The predictor's output for all masks [V, T, d], latents of the context [V, C, D]."""
        context_BMC, masks = views.context_BMC, views.context_BMC.shape[1]
        order_BMN = torch.cat([context_BMC, views.target_BMT], -1)
        coords_VN3 = take(views.coords_BN3, order_BMN).flatten(0, 1)
        valid_VN = torch.cat([take(views.valid_BN, context_BMC),
                              take(views.target_valid_BN, views.target_BMT)], -1).flatten(0, 1)
        C = context_BMC.shape[-1]
        y_VCD = self.encoder(take(views.tokens_BNP, context_BMC).flatten(0, 1),
                             coords_VN3[:, :C], valid_VN[:, :C], views.all_scanned)
        modality_V = views.target_modality_B[:, None].expand(-1, masks).flatten()
        return self.predictor(y_VCD, coords_VN3, valid_VN, modality_V, views.all_scanned), y_VCD


@torch.no_grad()
def _batch_metrics(coded: Coded, z_VTD: Tensor, weight_VT: Tensor) -> dict[str, Tensor]:
    """How much of the targets is predicted, and whether they still differ from each other.

    ``target_std`` is the mean over dimensions of the targets' standard deviation;
    ``effective_rank`` is the participation ratio tr(C)^2 / tr(C^2) of their covariance: RankMe's
    (Garrido et al. 2023) exponential of the spectrum's entropy, of order two, which needs no
    decomposition and so no wait for the device.
    """
    weight_Q = weight_VT.flatten() / weight_VT.sum().clamp(min=1e-6)
    z_QD = z_VTD.flatten(0, 1)
    residual = (weight_Q[:, None] * (coded.predicted.flatten(0, 1) - z_QD).square()).sum()
    centred_QD = z_QD - (weight_Q[:, None] * z_QD).sum(0)
    covariance_DD = (weight_Q[:, None] * centred_QD).T @ centred_QD
    variance = covariance_DD.trace()
    return {
        "explained_variance": 1 - residual / variance.clamp(min=1e-12),
        "target_std": covariance_DD.diagonal().clamp(min=0).sqrt().mean(),
        "effective_rank": variance.square() / covariance_DD.square().sum().clamp(min=1e-12),
    }
