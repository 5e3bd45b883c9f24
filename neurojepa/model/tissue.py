"""A prior: a linear head that tells from a token what its patch consists of."""

from __future__ import annotations

from torch import Tensor, nn

from neurojepa.model.layers import INIT_STD
from neurojepa.model.linear import Linear
from neurojepa.objective.anatomy import TISSUES
from neurojepa.objective.losses import divergence, take, token_weights
from neurojepa.objective.views import Views


class TissueHead(Linear):
    """From a token to the logits of air and the tissues."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1 + len(TISSUES))
        nn.init.trunc_normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.bias)

    def error(self, views: Views, index_BMC: Tensor, latent_VCD: Tensor) -> Tensor:
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
