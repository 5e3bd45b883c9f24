"""A prior: a linear head that tells from a token what its patch consists of.

Any method with an encoder of tokens may have it: ``objective.tissue_weight`` says how much it
counts.  Evaluation has no truth for it, and so no error.
"""

from __future__ import annotations

from torch import Tensor, nn

from neurojepa.config import ObjectiveConfig
from neurojepa.model.layers import INIT_STD
from neurojepa.model.linear import Linear
from neurojepa.objective.anatomy import TISSUES
from neurojepa.objective.losses import divergence, take, token_weights
from neurojepa.objective.views import Views


class TissueHead(Linear):
    """From a token to the logits of air and the tissues; ``weighs`` is its part in the loss."""

    def __init__(self, dim: int, weighs: float) -> None:
        super().__init__(dim, 1 + len(TISSUES))
        self.weighs = weighs
        nn.init.trunc_normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.bias)

    def error(self, views: Views, *, index_BMC: Tensor, latent_VCD: Tensor) -> Tensor:
        """float32 [B]: divergence of what tokens tell from the shares in their patches.

        Parameters
        ----------
        index_BMC : the tokens, of M masks a scan.
        latent_VCD : their latents, V = B M; tokens weigh by their share of brain.
        """
        share_BMCK = take(views.tissue_BNK, index_BMC)
        weight_BMC = token_weights(take(views.foreground_BN, index_BMC),
                                   take(views.valid_BN, index_BMC), 0.0)
        told_BMC = divergence(share_BMCK, self(latent_VCD).view_as(share_BMCK))
        return (weight_BMC * told_BMC).sum(-1).mean(1)


def tissue_head(objective: ObjectiveConfig, dim: int) -> TissueHead | None:
    """The head on latents of width ``dim``, where the config gives it a weight."""
    return TissueHead(dim, objective.tissue) if objective.tissue else None


def with_tissue(head: TissueHead | None, loss_B: Tensor, views: Views, *, index_BMC: Tensor,
                latent_VCD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with what the head adds to it, and the head's error [B] for the metrics.

    Without a head, or where the views have no truth for it, the loss as it was and nothing.
    """
    if head is None or not views.tissue_BNK.shape[-1]:
        return loss_B, {}
    error_B = head.error(views, index_BMC=index_BMC, latent_VCD=latent_VCD)
    return loss_B + head.weighs * error_B, {"tissue": error_B}
