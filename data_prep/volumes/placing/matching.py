"""What all registrations share: images made comparable, a metric, one optimiser.

Every registration runs on one thread with a fixed sampling, so that it is repeatable to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from data_prep.volumes.placing.geometry import to_itk, to_matrix

SetMetric = Callable[[sitk.ImageRegistrationMethod], None]
SEED = 20240


def dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * float((a & b).sum()) / total if total else 0.0


def stripped(data: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The brain alone, clipped at its 99.5th percentile and scaled to [0, 1]; float32."""
    high = np.percentile(data[mask], 99.5)
    low = min(0.0, float(np.percentile(data[mask], 0.5)))
    return np.where(mask, np.clip((data - low) / max(high - low, 1e-6), 0, 1), 0).astype(np.float32)


def shrunk(data: np.ndarray, affine: np.ndarray, mm: float) -> sitk.Image:
    """Block means of an image, at most about ``mm`` apart: faster, and no aliasing."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    factors = np.clip(np.round(mm / spacing), 1, None).astype(int).tolist()
    return sitk.BinShrink(to_itk(data.astype(np.float32), affine), factors)


def mutual_information(method: sitk.ImageRegistrationMethod) -> None:
    method.SetMetricAsMattesMutualInformation(32)


class Registered(NamedTuple):
    matrix: np.ndarray  # [4, 4], fixed mm to moving mm
    start_value: float  # of the metric, lower is better
    value: float


def register(fixed: sitk.Image, moving: sitk.Image, start: sitk.Transform, *,
              shrink: tuple[int, ...], sampling: float,
              set_metric: SetMetric,
              step_mm: float = 2.0, mask: sitk.Image | None = None) -> Registered:
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # sums over threads are not repeatable
    set_metric(method)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(sampling, SEED)
    if mask is not None:
        method.SetMetricFixedMask(mask)
    method.SetOptimizerAsRegularStepGradientDescent(step_mm, 1e-3, 200, 0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(list(shrink))
    method.SetSmoothingSigmasPerLevel([s / 2 for s in shrink])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(start, inPlace=False)
    start_value = method.MetricEvaluate(fixed, moving)
    matrix = to_matrix(method.Execute(fixed, moving))
    return Registered(matrix, start_value, method.GetMetricValue())
