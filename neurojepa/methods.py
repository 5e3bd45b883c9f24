"""The ways of training, and all that the rest of the package asks about them.

A method is a file with a class and a line in ``METHODS``.  The line holds what the config and the
views need to know, and is read without torch; the class is imported when a model is built.  It is
an ``Averaged`` (model/averaged.py): an encoder with its moving average, a ``forward`` that returns
the loss of a micro-batch, its ``flops`` and, where it learns from some, its ``labels``.
"""

from __future__ import annotations

import importlib
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from neurojepa.model.averaged import Averaged


@dataclass(frozen=True)
class Method:
    """A line of the table."""

    model: str  # "module:Class"
    _: KW_ONLY
    about: str  # for the model card; {objective.x} is filled in from the config
    masks: Literal["blocks", "uniform"] = "uniform"  # of the scales and regions, or one a scan
    latents: bool = False  # it predicts latents: they may be of another scan (data.cross_modal)
    tissue_weight: float | None = None  # of the tissue head by default; None where it has none
    whole_volumes: bool = False  # it needs every token, so there is no token budget

    def load(self) -> type[Averaged]:
        """The class."""
        module, name = self.model.split(":")
        found: type[Averaged] = getattr(importlib.import_module(module), name)
        return found

    def describe(self, objective: Any) -> str:
        """``about`` for a config's ``objective``."""
        return self.about.format(objective=objective)


METHODS = {
    "jepa": Method("neurojepa.model.jepa:SparseJEPA",
                   about="prediction of latents through a {objective.sparse.code} code",
                   masks="blocks", latents=True, tissue_weight=1.0),
    "mae": Method("neurojepa.baselines.mae:MAE",
                  about="a masked autoencoder, voxels filled in", tissue_weight=0.0),
    "cnn": Method("neurojepa.baselines.cnn:CNN",
                  about="a network supervised by {objective.label}", whole_volumes=True),
}
