"""Deformable registration of two scans of one modality, without training.

    brains --affine by correlation--> laid over one another --diffeomorphic demons--> displacement

The affine is that of preparation.  Demons compose updates that are exponentials of smooth
velocities (Vercauteren et al., NeuroImage 2009; SimpleITK's filter), coarse to fine on a grid of
2 mm (of coarser scans up to 4) around the fixed brain, on brains whose local contrast has been
evened out: they compare intensities, and scanners give tissues different ones.  The inverse is
found by fixed-point iteration.  Tokens of the encoder as further channels were measured and bring
nothing (docs/results/register.md), so there are none.  One thread, no random numbers: repeatable
to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neurojepa.downstream import warps
from neurojepa.downstream.images import (
    Image,
    affine_between,
    around_brain,
    itk_array,
    itk_image,
    laid,
    smoothed,
    stripped,
)
from neurojepa.errors import DataError

if TYPE_CHECKING:
    import SimpleITK as sitk

WORK_MM = (2.0, 4.0)  # finest and coarsest working grid; between them the coarser scan's voxel
MARGIN_MM = 14.0  # of the working grid around the fixed brain
EVENED = 3.0  # sd of the window in which mean and sd become one, voxels of the working grid
LEAST_SD = 0.02  # added to the local sd, so that noise is not blown up; images are in [0, 1]
LEVELS = ((4, 60), (2, 60), (1, 60))  # shrinking of the working grid, iterations
SMOOTH = 1.0  # sd of the displacement after each update, voxels of its level
STEP = 2.0  # longest update, voxels
MIN_DICE = 0.7  # of the brains after the affine; of any two whole brains it is .9 and more
MIN_CORRELATION = 0.15  # within both brains; two T1w scans have .5 and more, T1w and T2w below 0


@dataclass(frozen=True)
class Grid:
    """The working grid: fixed's axes, isotropic voxels, around its brain."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    mm: float


@dataclass(frozen=True)
class Registration:
    """Two scans, and how the fixed one's points are found in the moving one."""

    fixed: Image
    moving: Image
    matrix: np.ndarray  # [4, 4] affine, fixed mm to moving mm
    grid: Grid
    field: np.ndarray  # float32 [x, y, z, 3] on the working grid, RAS mm; before the affine
    inverse: np.ndarray  # the same, of its inverse
    dice: tuple[float, float]  # of the brains after the affine, and after all
    correlation: tuple[float, float]  # of intensities within both brains, likewise

    def warp(self) -> np.ndarray:
        """[x, y, z, 3] RAS mm on the fixed grid: the moving scan is read at x + d(x)."""
        return warps.total(self.field, self.grid.affine, self.fixed, self.matrix)

    def inverse_warp(self) -> np.ndarray:
        """[x, y, z, 3] RAS mm on the moving grid: the fixed scan is read at x + d(x)."""
        return warps.inverse_total(self.inverse, self.grid.affine, self.moving, self.matrix)

    def inverse_error_mm(self) -> np.ndarray:
        """[n] mm by which points of the fixed brain, there and back, miss themselves."""
        assert self.fixed.brain is not None
        points = warps.points_of(self.grid.shape, self.grid.affine)
        inside = warps.sample(self.fixed.brain.astype(np.float32), self.fixed.affine, points) > 0.5
        gone = (points + self.field)[inside]
        back = np.stack([warps.sample(self.inverse[..., axis], self.grid.affine, gone)
                         for axis in range(3)], -1)
        return np.linalg.norm(gone + back - points[inside], axis=-1)


def register(moving: Image, fixed: Image, evened: bool = True) -> Registration:
    """Find the deformation that lays the moving scan over the fixed one.

    Parameters
    ----------
    evened : demons see local contrast alone, so that scanners may give tissues another contrast
        (docs/results/segment.md); without, intensities as they are

    Raises
    ------
    DataError
        The brains do not come to lie over one another, or their intensities have nothing to do with
        each other, as those of two modalities.
    """
    import SimpleITK as sitk

    # as in preparation: the affine's last bits depend on the number of threads
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    matrix = affine_between(fixed, moving)
    grid = _grid(fixed, moving)
    target = _soft(fixed, grid, np.eye(4))
    source = _soft(moving, grid, matrix)
    own, other = _brain(fixed, grid, np.eye(4)), _brain(moving, grid, matrix)
    dice, correlation = _alike(own, other, target, source)
    _check(fixed, moving, dice, correlation)
    seen = [_evened(each) if evened else each for each in (target, source)]
    field = _demons(*(itk_image(each, grid.affine) for each in seen))
    inverse = sitk.InvertDisplacementField(
        sitk.Cast(field, sitk.sitkVectorFloat64), maximumNumberOfIterations=50,
        maxErrorToleranceThreshold=0.05, meanErrorToleranceThreshold=0.001,
        enforceBoundaryCondition=False)
    displacement = itk_array(field).astype(np.float32)
    read = warps.read_through(Image("", source, grid.affine), displacement, grid.affine)
    brain = warps.read_through(Image("", other.astype(np.float32), grid.affine), displacement,
                               grid.affine) > 0.5
    after = _alike(own, brain, target, read)
    return Registration(fixed, moving, matrix, grid, displacement,
                        itk_array(inverse).astype(np.float32), (dice, after[0]),
                        (correlation, after[1]))


def _check(fixed: Image, moving: Image, dice: float, correlation: float) -> None:
    if dice < MIN_DICE:
        raise DataError(f"{moving.name}: its brain does not come to lie over that of {fixed.name} "
                        f"(Dice {dice:.2f} after the affine, {MIN_DICE} is needed); are both whole "
                        "heads?")
    if not correlation >= MIN_CORRELATION:  # NaN: one of them is the same everywhere
        raise DataError(f"{moving.name}: within the brain its intensities do not go with those of "
                        f"{fixed.name} (correlation {correlation:.2f}, {MIN_CORRELATION} is "
                        "needed); register scans of one modality")


def _grid(fixed: Image, moving: Image) -> Grid:
    mm = float(np.clip(max(np.cbrt(np.prod(each.spacing)) for each in (fixed, moving)), *WORK_MM))
    affine, extent = around_brain(fixed, mm, MARGIN_MM)
    x, y, z = (np.ceil(extent / mm) + 1).astype(int).tolist()
    return Grid((x, y, z), affine, mm)


def _soft(image: Image, grid: Grid, matrix: np.ndarray) -> np.ndarray:
    """The stripped brain on the working grid, smoothed to its voxels; float32 [x, y, z]."""
    return laid(smoothed(stripped(image), image.spacing, grid.mm), image.affine, grid.shape,
                grid.affine, matrix)


def _brain(image: Image, grid: Grid, matrix: np.ndarray) -> np.ndarray:
    assert image.brain is not None
    return laid(image.brain, image.affine, grid.shape, grid.affine, matrix) > 0.5


def _alike(brain: np.ndarray, other: np.ndarray, image: np.ndarray,
           read: np.ndarray) -> tuple[float, float]:
    """Dice of two brains, and the correlation of two images within both."""
    both = brain & other
    dice = 2 * both.sum() / max(brain.sum() + other.sum(), 1)
    if not both.any():
        return 0.0, 0.0
    return float(dice), float(np.corrcoef(image[both], read[both])[0, 1])


def _evened(image: np.ndarray) -> np.ndarray:
    """Float32 [x, y, z]: the brain with a mean of .6 and an sd of .15 around each place."""
    from scipy import ndimage

    inside = image > 0
    share = ndimage.gaussian_filter(inside.astype(np.float32), EVENED) + 1e-3
    less = (image - ndimage.gaussian_filter(image, EVENED) / share) * inside
    sd = np.sqrt(ndimage.gaussian_filter(less * less, EVENED) / share) + LEAST_SD
    return np.where(inside, np.clip(0.6 + 0.15 * less / sd, 0.05, 1.2), 0).astype(np.float32)


def _demons(fixed: sitk.Image, moving: sitk.Image) -> sitk.Image:
    import SimpleITK as sitk

    moving = sitk.HistogramMatching(moving, fixed, 256, 15, True)
    field: sitk.Image | None = None
    for factor, iterations in LEVELS:
        target, source = (_shrunk(each, factor) for each in (fixed, moving))
        demons = sitk.DiffeomorphicDemonsRegistrationFilter()
        demons.SetNumberOfIterations(iterations)
        demons.SetStandardDeviations(SMOOTH)
        demons.SmoothDisplacementFieldOn()
        demons.SmoothUpdateFieldOff()
        demons.SetMaximumUpdateStepLength(STEP)
        start = () if field is None else (sitk.Resample(
            field, target, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkVectorFloat64, True),)
        field = demons.Execute(target, source, *start)
    assert field is not None
    return field


def _shrunk(image: sitk.Image, factor: int) -> sitk.Image:
    import SimpleITK as sitk

    if factor == 1:
        return image
    width = factor * image.GetSpacing()[0] / 2
    return sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, width), [factor] * 3)
