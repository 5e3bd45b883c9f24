"""Axial rotary position embedding in millimetres.

Each head's channels are split into pairs, the pairs evenly among the axes x, y, z (what does not
divide stays unrotated).  A pair of axis a turns by 2 pi * coordinate_a / wavelength, so a query and
a key meet at an angle that depends on their difference in space only.  Wavelengths are fixed in
millimetres: grid, patch size and token order may change, and the meaning stays.
(RoFormer, Su et al. 2021; axial form as in V-JEPA 2, with correct pairing.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# From about three patches of the training grid, so that neighbours never alias, to several heads.
SHORTEST_MM, LONGEST_MM = 60.0, 1000.0


def rotation(coords_BN3: Tensor, head_dim: int) -> Tensor:
    """The turn of every token's pairs, for all blocks and heads.

    Parameters
    ----------
    coords_BN3 : token centres, mm.
    head_dim : channels of a head, even.

    Returns
    -------
    float32 [B, N, 1, head_dim / 2, 2]: cosine and sine, to pass to ``rotate``
    """
    pairs, per_axis = head_dim // 2, head_dim // 2 // 3
    steps = torch.arange(per_axis, device=coords_BN3.device) / max(per_axis - 1, 1)
    wavelength_mm = SHORTEST_MM * (LONGEST_MM / SHORTEST_MM) ** steps
    angle = (2 * math.pi * coords_BN3.float()[..., None] / wavelength_mm).flatten(-2)
    angle = torch.nn.functional.pad(angle, (0, pairs - 3 * per_axis))[:, :, None]
    return torch.stack([angle.cos(), angle.sin()], -1)


def rotate(x_BNhc: Tensor, turn_BN1p2: Tensor) -> Tensor:
    """Turn channel pairs (2i, 2i + 1) of queries or keys; computed in float32."""
    pairs_BNhp2 = x_BNhc.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # it has no complex numbers, and joins all this to one kernel
        (a, b), (cos, sin) = pairs_BNhp2.unbind(-1), turn_BN1p2.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:  # one kernel instead of six
        turned = torch.view_as_real(torch.view_as_complex(pairs_BNhp2)
                                    * torch.view_as_complex(turn_BN1p2))
    return turned.flatten(-2).to(x_BNhc.dtype)
