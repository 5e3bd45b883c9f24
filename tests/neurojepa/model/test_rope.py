"""Positions: rotations are relative, and coordinates are right on non-cubic grids."""

from __future__ import annotations

import pytest
import torch

from neurojepa.feed.format import Grid
from neurojepa.model.rope import rotate, rotation
from neurojepa.objective.views import patch_centres_mm, patchify

GRIDS = [Grid("8x9x8", (24, 27, 24), 2.0), Grid("9x11x9", (27, 33, 27), 1.5)]


def scores(coords_N3: torch.Tensor, head_dim: int = 32) -> torch.Tensor:
    """Query-key products of one query and one key placed at every pair of coordinates."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, head_dim).expand(2, 1, len(coords_N3), 1, head_dim)
    turn = rotation(coords_N3[None], head_dim)
    return rotate(q, turn)[0, :, 0] @ rotate(k, turn)[0, :, 0].T


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("axis", range(3))
def test_neighbours_differ_by_one_patch_in_their_axis(grid: Grid, axis: int):
    patch = 3
    counts = [size // patch for size in grid.shape]
    coords = patch_centres_mm(grid, patch).view(*counts, 3)
    steps = coords.diff(dim=axis)
    expected = torch.zeros(3)
    expected[axis] = patch * grid.spacing_mm
    torch.testing.assert_close(steps, expected.expand_as(steps))
    torch.testing.assert_close(coords.mean((0, 1, 2)), torch.zeros(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("axis", range(3))
def test_patches_hold_the_voxels_of_their_coordinates(grid: Grid, axis: int):
    """Voxels that carry their own coordinate: a patch's mean is its centre, in patchify's order."""
    positions = ((torch.arange(grid.shape[axis]) + 0.5) - grid.shape[axis] / 2) * grid.spacing_mm
    shape = [1, 1, 1]
    shape[axis] = -1
    volume = positions.view(shape).expand(grid.shape)[None].contiguous()
    torch.testing.assert_close(patchify(volume, 3).mean(-1)[0],
                               patch_centres_mm(grid, 3)[:, axis], atol=1e-4, rtol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("axis", range(3))
def test_scores_depend_on_differences_only(grid: Grid, axis: int):
    coords = patch_centres_mm(grid, 3)
    shift = torch.zeros(3)
    shift[axis] = 37.0
    torch.testing.assert_close(scores(coords), scores(coords + shift), atol=2e-4, rtol=0)
    # and they do depend on them: the axes are told apart
    origin = torch.zeros(1, 3)
    moved = torch.cat([origin, origin + shift])
    other = torch.cat([origin, origin + shift.roll(1)])
    assert (scores(moved) - scores(other)).abs().max() > 0.05


def test_scores_follow_a_subset_and_a_permutation():
    coords = patch_centres_mm(GRIDS[0], 3)
    chosen = torch.randperm(len(coords), generator=torch.Generator().manual_seed(1))[:100]
    torch.testing.assert_close(scores(coords[chosen]), scores(coords)[chosen][:, chosen])


@pytest.mark.parametrize("head_dim", [24, 32, 40, 64, 80])
def test_rotation_keeps_norms(head_dim: int):
    x = torch.randn(1, 576, 2, head_dim)
    turned = rotate(x, rotation(patch_centres_mm(GRIDS[0], 3)[None], head_dim))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_neighbouring_patches_never_alias():
    """One training patch (18 mm) left and right must look different in every axis."""
    for axis in range(3):
        step = torch.zeros(1, 3)
        step[0, axis] = 18.0
        left_right = scores(torch.cat([-step, torch.zeros(1, 3), step]))
        assert (left_right[1, 0] - left_right[1, 2]).abs() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_and_real_arithmetic_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(2, 50, 3, 32).to(dtype)
    turn = rotation(200 * torch.randn(2, 50, 3), 32)
    with_complex = rotate(x, turn)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, turn), with_complex)
