"""neurojepa: pretraining of a 3D sparse JEPA on brain images.

Names of tensors end in their shape where they pass from one function to another: ``tokens_BNP`` is
[B, N, P].  In the whole package a letter means one thing:

    B  scans of a batch             n  patches of the grid          D  width of a token
    M  masks of a scan              N  tokens kept of a scan        d  width inside the predictor
    V  B * M                        C  context tokens of a mask     h  heads
    P  voxels of a patch            T  target tokens of a mask      c  channels of a head
    K  air and kinds of tissue      Q  tokens in one row, of any    p  pairs of these
    R  regions                         number of scans              H  hidden units of an expert
    G  blocks of masks              S  rows for the experts,        E  experts
    m  modalities                      k choices for each token     A  atoms of the sparse code
    W  strongest scans                                              F  atoms or experts
    L  layers

A number is an axis of that size; 3 is x, y, z in millimetres or voxels, in RAS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from neurojepa.downstream.api import Model
    from neurojepa.downstream.segmenter import Model as SegmentModel

__version__ = "0.2.0"


def load(weights: str | PathLike[str], device: str | None = None) -> Model:
    """Exported weights, ready to embed scans: ``neurojepa.load("weights").embed("t1.nii.gz")``.

    See ``neurojepa.downstream.api``.
    """
    from neurojepa.downstream.api import load_model

    return load_model(weights, device)


def load_segmenter(model: str | PathLike[str], device: str | None = None,
                   workers: int = 1) -> SegmentModel:
    """What ``neurojepa segment fit`` wrote: ``load_segmenter("model").segment("t1.nii.gz")``.

    A network runs on ``device``; of an atlas ``workers`` heads are laid over a scan at once.
    See ``neurojepa.downstream.segmenter``.
    """
    from os import fspath

    from neurojepa.downstream.api import device_named
    from neurojepa.downstream.segmenter import load_model

    return load_model(fspath(model), device_named(device), workers)
