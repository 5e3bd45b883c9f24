"""Groups of label codes: FreeSurfer's inside the skull, those of SynthSeg outside it."""

from __future__ import annotations

import numpy as np

SKULL = 256  # codes below are inside of it, 0 is air
VENTRICLES, HIPPOCAMPI = (4, 43), (17, 53)  # left, right; lateral ventricles
CORTEX, WHITE = (3, 42), (2, 41)
FLUID = 24  # cerebrospinal fluid outside the ventricles
LESION = 77  # white-matter hypointensity
DEEP_GREY = (10, 49, 11, 50, 12, 51, 13, 52, 18, 54, 26, 58)
GREY = (*CORTEX, 8, 47, *HIPPOCAMPI, *DEEP_GREY, 136, 137, 163, 164)
CEREBELLUM = (7, 46, 8, 47)
MARKER = 999


def inside(labels: np.ndarray) -> np.ndarray:
    """Mask of what is inside the skull."""
    return (labels > 0) & (labels < SKULL)
