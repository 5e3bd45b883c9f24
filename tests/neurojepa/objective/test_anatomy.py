"""Anatomical priors: regions of patches, masks of whole regions, tissue shares and their head."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from nilearn import datasets

from neurojepa.config import MaskConfig
from neurojepa.downstream.embed import without_augmentation
from neurojepa.errors import ConfigError
from neurojepa.feed.format import TRAINING_GRIDS, Grid
from neurojepa.model.build import build_model
from neurojepa.objective import anatomy
from neurojepa.objective.anatomy import patch_regions, priors_on, tissue_shares
from neurojepa.objective.masks import draw_masks
from neurojepa.objective.views import make_views, patch_counts, patchify
from tests.helpers.batches import GRID, make_batch, make_config, part
from tests.helpers.kernels import NoSyncNoAtomics

BRAIN = TRAINING_GRIDS["3mm"]  # 9 x 11 x 9 patches of 6 voxels
PATCH = 6


def centres(grid: Grid, patch: int) -> np.ndarray:
    return anatomy._centres_mm(grid, patch)


# ---- regions -------------------------------------------------------------------------------------

def test_parcels_of_the_template_keep_hemispheres_apart_and_mirror_each_other() -> None:
    region = patch_regions(BRAIN, PATCH)
    x = centres(BRAIN, PATCH)[:, 0].reshape(9, 11, 9)
    assert region.shape == (891,) and set(region) == set(range(region.max() + 1))
    assert 2 * anatomy.PARCELS < region.max() + 1 <= 3 * anatomy.PARCELS
    cube = region.reshape(9, 11, 9)
    assert not set(cube[x < -1]) & set(cube[x > 1])  # left, right
    assert not set(cube[4].ravel()) & set(cube[x != 0])  # and astride the midline
    brain = anatomy._majority(anatomy._parcels(BRAIN), PATCH).reshape(cube.shape) >= 0
    pairs = set(zip(cube[brain], cube[::-1][brain], strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def atlas(path: Path, data: np.ndarray, corner: tuple[float, float, float] = (-60, -80, -40),
          spacing: float = 2.0) -> str:
    affine = np.diag([-spacing, spacing, spacing, 1.0])  # x runs to the left, as in many files
    affine[:3, 3] = (-corner[0], *corner[1:])
    nib.save(nib.Nifti1Image(data, affine), path)
    return str(path)


def test_an_atlas_by_path_gives_each_patch_its_most_frequent_label(tmp_path: Path) -> None:
    """Labels 7 and 300 left and right of x = 10 mm; whoever is outside belongs to the nearest."""
    data = np.full((61, 61, 61), 7, np.int16)
    x = 60 - 2 * np.arange(61)
    data[x > 10] = 300
    data[:, :, :10] = 0
    region = patch_regions(BRAIN, PATCH, atlas(tmp_path / "atlas.nii.gz", data))
    assert np.array_equal(region, (centres(BRAIN, PATCH)[:, 0] > 10).astype(int))


@pytest.mark.parametrize(("data", "words"), [
    (np.ones((5, 5, 5, 2), np.int16), "has shape (5, 5, 5, 2)"),
    (np.full((5, 5, 5), 0.25, np.float32), "values that are no labels, from 0.25 to 0.25"),
    (np.ones((61, 61, 61), np.int16), "1 region(s) in the 891 patches of grid '3mm'"),
    (None, "cannot be read as an image"),
], ids=["4d", "probabilities", "one label", "missing"])
def test_an_atlas_that_does_not_fit_is_refused(tmp_path: Path, data: np.ndarray | None,
                                               words: str) -> None:
    path = str(tmp_path / "atlas.nii") if data is None else atlas(tmp_path / "atlas.nii", data)
    config = make_config(objective={"regions": path, "masks": {"region_share": 0.5}},
                         model={"size": "tiny", "patch_voxels": PATCH})
    with pytest.raises(ConfigError) as caught:
        anatomy.check_anatomy(config, BRAIN)
    assert f"objective.regions = {path}" in str(caught.value) and words in str(caught.value)


def test_an_atlas_elsewhere_is_refused(tmp_path: Path) -> None:
    path = atlas(tmp_path / "far.nii", np.arange(27, dtype=np.int16).reshape(3, 3, 3),
                 corner=(900, 0, 0))
    with pytest.raises(ConfigError, match=r"0 region\(s\).*spans -81 to 81, -116 to 82, -75 to 87"):
        patch_regions(BRAIN, PATCH, path)


def test_the_fingerprint_is_that_of_the_regions_not_of_the_path(tmp_path: Path) -> None:
    def fingerprint(name: str, first: int) -> str:
        data = np.full((61, 61, 61), 7, np.int16)
        data[:first] = 9
        masks = {"region_share": 0.5}
        return anatomy.check_anatomy(make_config(
            objective={"regions": atlas(tmp_path / name, data), "masks": masks},
            model={"size": "tiny", "patch_voxels": PATCH}), BRAIN)

    first = fingerprint("a.nii", 20)
    assert first == fingerprint("copy.nii", 20) and first != fingerprint("other.nii", 30)
    assert anatomy.check_anatomy(make_config(), BRAIN) == ""


def test_options_that_nothing_uses_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.regions a\.nii: no mask uses them"):
        make_config(objective={"regions": "a.nii"})
    with pytest.raises(ConfigError, match=r"masks\.region_share .*objective.method mae"):
        make_config(objective={"method": "mae", "masks": {"region_share": 1}})


# ---- masks ---------------------------------------------------------------------------------------

def draw(share: float, num: int = 40, background: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each patch [num, M, n] is a target, and the regions [n]."""
    region = torch.from_numpy(patch_regions(BRAIN, PATCH))
    n = len(region)
    keep = torch.arange(n).expand(num, n)
    foreground, valid = torch.ones(num, n), torch.ones(num, n, dtype=torch.bool)
    foreground[:, :background] = 0
    context, target = draw_masks(
        keep, patch_counts(BRAIN, PATCH), foreground_BN=foreground, valid_BN=valid,
        masks=MaskConfig(region_share=share), seed=0, position_B=torch.arange(num),
        regions=(region, int(region.max()) + 1))
    assert target.shape == (num, 3, round(0.75 * n)) and context.shape[2] + target.shape[2] == n
    return torch.zeros(num, 3, n, dtype=torch.bool).scatter_(2, target, True), region


def hidden_shares(is_target: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """[num, M, R]: share of each region's patches that are targets."""
    member = torch.nn.functional.one_hot(region).float()
    return is_target.float() @ member / member.sum(0)


def test_a_region_is_masked_whole_and_only_one_is_cut_for_the_exact_count() -> None:
    is_target, region = draw(1.0)
    shares = hidden_shares(is_target, region)
    assert (((shares > 0) & (shares < 1)).sum(-1) <= 1).all()
    assert ((shares == 1).sum(-1) > 0.6 * shares.shape[-1]).all()
    # every region is hidden about as often, and not with its mirror image
    often = (shares == 1).float().mean((0, 1))
    assert often.min() > 0.55 and often.max() < 0.92
    cube = region.view(9, 11, 9)
    left, right = cube[1, 5, 4], cube[7, 5, 4]
    both = (shares[..., left] == 1) == (shares[..., right] == 1)
    assert 0.4 < both.float().mean() < 0.85  # 0.625 where drawn apart


def test_brain_and_background_of_a_region_are_counted_apart() -> None:
    is_target, region = draw(1.0, background=300)
    shares = hidden_shares(is_target[..., 300:], region[300:])
    assert (((shares > 0) & (shares < 1)).sum(-1) <= 1).all()


def test_the_share_of_region_masks_is_kept_and_other_masks_stay_as_they_were() -> None:
    blocks, whole, half = (draw(share, num=300)[0] for share in (0.0, 1.0, 0.3))
    is_whole = (half == whole).all(-1)
    assert torch.equal(is_whole, ~(half == blocks).all(-1))
    assert is_whole.float().mean() == pytest.approx(0.3, abs=0.05)
    assert is_whole.float().mean(0).tolist() == pytest.approx([0.3] * 3, abs=0.1)  # of every scale


def test_region_masks_depend_on_seed_and_position_only() -> None:
    batch = make_batch(5)
    config = make_config(objective={"masks": {"region_share": 0.5}})
    whole = make_views(batch, config, GRID, seed=7)
    split = make_views(part(batch, [4, 1]), config, GRID, seed=7)
    assert torch.equal(split.target_BMT, whole.target_BMT[[4, 1]])
    assert not torch.equal(make_views(batch, config, GRID, seed=8).target_BMT, whole.target_BMT)
    with NoSyncNoAtomics():
        make_views(batch, config, GRID, seed=7)


def test_the_template_is_the_one_that_nilearn_loads() -> None:
    origin, *ours = anatomy.template()
    theirs = (datasets.load_mni152_brain_mask(resolution=1),
              datasets.load_mni152_gm_template(resolution=1),
              datasets.load_mni152_wm_template(resolution=1))
    for mine, image in zip(ours, theirs, strict=True):
        assert mine.dtype == np.float32 and (mine == image.get_fdata(dtype=np.float32)).all()
        assert (image.affine[:3, 3] == origin).all() and (image.affine[:3, :3] == np.eye(3)).all()


# ---- tissue --------------------------------------------------------------------------------------

CONTRASTS = {"T1w": (40, 120, 200), "T2w": (220, 130, 60)}  # codes of fluid, grey, white


def brain_of(contrast: str, atrophy: bool) -> tuple[torch.Tensor, np.ndarray]:
    """Codes [1, X, Y, Z] of the template at a contrast, and its tissues 0..2, -1 in air.

    With ``atrophy`` a block of the left hemisphere is filled with fluid.
    """
    origin, brain, grey, white = anatomy.template()
    where = anatomy.grid_mm(BRAIN)
    parts = [anatomy.values_at(each, origin=origin, where=where) for each in (brain, grey, white)]
    tissue = np.stack([parts[0] - parts[1] - parts[2], parts[1], parts[2]]).argmax(0)
    tissue[parts[0] < 0.5] = -1
    if atrophy:
        block = tissue[12:24, 24:36, 24:36]
        block[block >= 0] = 0
    codes = np.array(CONTRASTS[contrast])[tissue] + np.random.default_rng(0).normal(
        0, 8, tissue.shape)
    return torch.from_numpy(np.where(tissue < 0, 0, codes.clip(1, 254)).astype(np.uint8))[None], \
        tissue


def shares_of(voxels: torch.Tensor) -> torch.Tensor:
    keep = torch.arange(891).expand(len(voxels), -1)
    return tissue_shares(patchify(voxels, PATCH), keep,
                         priors_on(voxels.device, BRAIN, PATCH))


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_tissue_is_told_from_the_scans_own_intensities_at_any_contrast(contrast: str) -> None:
    voxels, tissue = brain_of(contrast, atrophy=True)
    found = shares_of(voxels)[0].numpy()
    patches = anatomy.by_patch(tissue, PATCH)
    true = np.stack([(patches == code).mean(1) for code in (-1, 0, 1, 2)], 1)
    assert np.abs(found - true).mean() < 0.02
    assert np.abs(found.sum(1) - 1).max() < 1e-5
    # what the template says of the block is wrong for this brain
    _, healthy = brain_of(contrast, atrophy=False)
    usual = anatomy.by_patch(healthy, PATCH)
    changed = ((patches == 0).mean(1) - (usual == 0).mean(1)) > 0.5
    assert changed.sum() >= 4 and np.abs(found - true)[changed].mean() < 0.05


def test_tissue_depends_on_the_scan_alone_and_the_unscanned_part_is_left_out() -> None:
    batch = torch.cat([brain_of("T1w", True)[0], brain_of("T2w", False)[0]])
    assert torch.equal(shares_of(batch)[1], shares_of(batch[1:])[0])
    batch[1, :, :, 30:] = 255  # five of nine layers of patches
    halved = shares_of(batch)[1].view(9, 11, 9, 4)
    assert not halved[:, :, 5:].any()
    assert (halved[:, :, :5].sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(("method", "none"), [("jepa", 0.0), ("mae", None)])
def test_the_head_learns_tissue_beside_the_prediction_and_is_absent_when_off(
        method: str, none: float | None) -> None:
    voxels = torch.cat([brain_of("T1w", True)[0], brain_of("T2w", False)[0]])
    batch = SimpleNamespace(voxels=voxels, modality=torch.tensor([0, 1]), weight=torch.ones(2),
                            position=torch.arange(2), target_voxels=None,
                            target_modality=None, all_scanned=False)
    model_of = {"size": "tiny", "patch_voxels": PATCH, "token_budget": 128}
    on, off = (make_config(model=model_of, objective={"method": method, "tissue_weight": weight})
               for weight in (0.5, none))
    plain, model = build_model(off, BRAIN), build_model(on, BRAIN)
    new = set(dict(model.named_parameters())) - set(dict(plain.named_parameters()))
    assert new == {"tissue.weight", "tissue.bias"}
    views = make_views(batch, on, BRAIN, 0)
    loss, metrics = model(views, 1e-3)
    base, known = plain(make_views(batch, off, BRAIN, 0), 1e-3)
    torch.testing.assert_close(loss, base + 0.5 * metrics["tissue"])
    assert "tissue" not in known and 0.3 < metrics["tissue"] / 2 < 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(views, 1e-3)[0].backward()
        optimizer.step()
    assert model(views, 1e-3)[1]["tissue"] < 0.5 * metrics["tissue"]
    with NoSyncNoAtomics():
        model(make_views(batch, on, BRAIN, 0), torch.tensor(1e-3))[0].backward()


def test_an_embedding_needs_no_atlas() -> None:
    config = make_config(objective={"regions": "gone.nii", "masks": {"region_share": 1},
                                    "tissue_weight": 0.1})
    model = build_model(config, GRID)
    views = make_views(make_batch(2), without_augmentation(config), GRID, 0)
    assert model.embed(views).shape == (2, 96)
