"""CIFTI: grayordinates land where their file says, and what has no place is refused by name."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis, ParcelsAxis, ScalarAxis, SeriesAxis

from data_prep.scan import ScanError
from data_prep.volumes.functional.cifti import Cifti, archive_maps, read_cifti
from data_prep.volumes.functional.grayordinates import GRID_AFFINE, GRID_SHAPE
from data_prep.volumes.pipeline import prepare_person
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.results import Prepared
from neurojepa.feed.format import ARCHIVE_GRID
from neurojepa.storage import write_bytes
from tests.helpers.synthetic_head import scan

VERTICES, CENTRE_MM, RADIUS_MM = 1200, 35.0, 28.0
SIDES = ("CORTEX_LEFT", "CORTEX_RIGHT")


def sphere(side: str) -> np.ndarray:
    """Evenly spread points on one hemisphere's sphere (Fibonacci), mm."""
    k = np.arange(VERTICES) + 0.5
    polar, turn = np.arccos(1 - 2 * k / VERTICES), np.pi * (1 + 5**0.5) * k
    unit = np.stack([np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn), np.cos(polar)], 1)
    return RADIUS_MM * unit + [CENTRE_MM if side == "CORTEX_RIGHT" else -CENTRE_MM, -17, 20]


def block() -> np.ndarray:
    """Voxels of the thalamus: 8 x 8 x 6 of 2 mm on the right, as the file stores them (LAS)."""
    mask = np.zeros(GRID_SHAPE, bool)
    mask[36:44, 50:58, 38:44] = True
    return mask


@pytest.fixture(scope="module")
def axis() -> BrainModelAxis:
    """Two hemispheres without a medial wall of 100 vertices, and a thalamus."""
    cortex = np.arange(VERTICES) >= 100
    left, right = (BrainModelAxis.from_mask(cortex, name=side) for side in SIDES)
    return left + right + BrainModelAxis.from_mask(block(), name="thalamus_right",
                                                   affine=GRID_AFFINE)


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, uris = tmp_path_factory.mktemp("surfaces"), []
    for side in SIDES:
        array = nib.gifti.GiftiDataArray(sphere(side).astype(np.float32), "NIFTI_INTENT_POINTSET")
        array.meta["AnatomicalStructurePrimary"] = {"CORTEX_LEFT": "CortexLeft",
                                                    "CORTEX_RIGHT": "CortexRight"}[side]
        uris.append(str(folder / f"{side}.surf.gii"))
        nib.save(nib.GiftiImage(darrays=[array]), uris[-1])
    return ";".join(uris)


def save(path: Path, first, axis, data: np.ndarray) -> str:
    nib.save(nib.Cifti2Image(data.astype(np.float32), (first, axis)), path)
    return str(path)


def dtseries(path: Path, axis, data: np.ndarray, step: float = 2.0, unit: str = "SECOND") -> str:
    return save(path, SeriesAxis(0, step, len(data), unit), axis, data)


def places(axis) -> np.ndarray:
    """World mm of every grayordinate [n, 3]."""
    points = np.concatenate([sphere(side)[100:] for side in SIDES])
    voxels = axis.voxel[axis.volume_mask] @ GRID_AFFINE[:3, :3].T + GRID_AFFINE[:3, 3]
    return np.concatenate([points, voxels])


def world(volume, index: np.ndarray) -> np.ndarray:
    return index @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def code(uri: str, *arguments, **more) -> str:
    with pytest.raises(ScanError) as caught:
        read_cifti(uri, *arguments, **more)
    assert uri.rsplit("/", 1)[-1].split(".")[0] in str(caught.value)
    return caught.value.code


# ---- places --------------------------------------------------------------------------------------

def test_voxels_are_scattered_by_the_files_affine(tmp_path, axis):
    x = places(axis)[:, 0]
    found = read_cifti(save(tmp_path / "a.dscalar.nii", ScalarAxis(["x"]), axis, x[None]))
    volume = found.maps["x"]
    np.testing.assert_allclose(np.diag(volume.affine), [2, 2, 2, 1])  # canonical
    index = np.argwhere(found.covered)
    assert len(index) == block().sum() and found.figures["cifti_painted_voxels"] == 0
    np.testing.assert_allclose(volume.data[found.covered], world(volume, index)[:, 0])
    assert (world(volume, index)[:, 0] > 0).all()  # right stays right
    assert not volume.data[~found.covered].any() and found.flags == []
    assert "no midthickness" in str(found.figures["cifti_cortex"])


def test_the_cortex_is_painted_near_its_surface(tmp_path, axis, surfaces):
    point = places(axis)
    uri = save(tmp_path / "a.dscalar.nii", ScalarAxis(["x", "y", "z"]), axis, point.T)
    found = read_cifti(uri, None, surfaces)
    assert found.notes == ["synthetic_grid"] and found.flags == []
    index = np.argwhere(found.covered)
    centre = world(found.maps["x"], index)
    value = np.stack([found.maps[name].data[found.covered] for name in "xyz"], axis=1)
    assert np.linalg.norm(centre - value, axis=1).max() <= 3.0 + 1e-4
    assert len(index) == block().sum() + found.figures["cifti_painted_voxels"]
    shell = np.abs(np.linalg.norm(centre - [CENTRE_MM, -17, 20], axis=1) - RADIUS_MM) < 3.01
    assert shell.sum() > 3000
    # what the file measures in a voxel is never painted over
    thalamus = np.all(np.abs(centre - centre.mean(0)) < 100, axis=1) & (
        np.linalg.norm(centre - value, axis=1) < 1e-4)
    assert thalamus.sum() >= block().sum()


def test_labels_keep_their_codes(tmp_path, axis, surfaces):
    codes = np.where(np.arange(len(axis)) < 1100, 7, 12)
    names = {0: ("none", (0, 0, 0, 0)), 7: ("left", (1, 0, 0, 1)), 12: ("right", (0, 1, 0, 1))}
    uri = save(tmp_path / "a.dlabel.nii", LabelAxis(["regions"], [names]), axis, codes[None])
    found = read_cifti(uri, None, surfaces)
    volume = found.maps["regions"]
    index = np.argwhere(found.covered)
    left = world(volume, index)[:, 0] < 0
    assert set(np.unique(volume.data)) == {0, 7, 12} and found.parcels is None
    np.testing.assert_array_equal(volume.data[found.covered] == 7, left)


def test_a_file_in_an_object_store_and_its_surfaces(tmp_path, axis, surfaces):
    uri = save(tmp_path / "a.dscalar.nii", ScalarAxis(["x"]), axis, places(axis)[None, :, 0])
    write_bytes("memory://cifti/a.dscalar.nii", Path(uri).read_bytes())
    remote = []
    for side in surfaces.split(";"):
        remote.append(f"memory://cifti/{Path(side).name}")
        write_bytes(remote[-1], Path(side).read_bytes())
    there, here = (read_cifti("memory://cifti/a.dscalar.nii", None, ";".join(remote)),
                   read_cifti(uri, None, surfaces))
    assert there.scan_id == here.scan_id
    np.testing.assert_array_equal(there.maps["x"].data, here.maps["x"].data)


# ---- series --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def series(axis) -> np.ndarray:
    """100 volumes of noise about 1000; the right thalamus and hemisphere have a slow wave."""
    rng = np.random.default_rng(0)
    data = rng.normal(1000, 5, (100, len(axis))).astype(np.float32)
    data[:, places(axis)[:, 0] > 0] += 20 * np.sin(2 * np.pi * 0.04 * 2.0 * np.arange(100))[:, None]
    return data


def test_a_series_gives_the_maps_of_bold(tmp_path, axis, series, surfaces):
    found = read_cifti(dtseries(tmp_path / "a.dtseries.nii", axis, series), None, surfaces,
                       processing="fix")
    assert set(found.maps) == {"BOLD", "tSNR", "ALFF", "fALFF"}
    assert found.notes == ["synthetic_grid"] and found.figures["bold_tr_s"] == 2.0
    centre = world(found.maps["ALFF"], np.argwhere(found.covered))
    alff, tsnr = (found.maps[name].data[found.covered] for name in ("ALFF", "tSNR"))
    assert np.median(alff[centre[:, 0] > 0]) > 2 * np.median(alff[centre[:, 0] < 0])
    assert np.median(tsnr[centre[:, 0] < 0]) == pytest.approx(200, rel=0.05)
    assert found.figures["qc_fd_mean"] is None and found.figures["qc_fd_reason"]


def test_parcels_are_means_of_structures_and_places(tmp_path, axis, series, surfaces):
    uri = dtseries(tmp_path / "a.dtseries.nii", axis, series)
    plain = read_cifti(uri, processing="fix")
    assert plain.names == ["CORTEX_LEFT:whole", "CORTEX_RIGHT:whole", "THALAMUS_RIGHT"]
    np.testing.assert_allclose(plain.parcels[2], series[:, 2200:].mean(1), rtol=1e-5)
    assert "whole hemispheres" in str(plain.figures["cifti_parcels"])
    fine = read_cifti(uri, None, surfaces, processing="fix")
    assert fine.parcels.shape == (201, 100) and fine.parcels.dtype == np.float32
    assert len(set(fine.names)) == 201 and "seed" in str(fine.figures["cifti_parcels"])
    right = np.array(["RIGHT" in name for name in fine.names])
    slow = fine.parcels.std(axis=1) > 8
    np.testing.assert_array_equal(slow, right)


def test_parcels_of_one_name_lie_alike_in_two_people(tmp_path, axis, surfaces):
    point = places(axis)
    uri = save(tmp_path / "a.dscalar.nii", ScalarAxis(["x", "y", "z"]), axis, point.T)
    other = []
    for side, path in zip(SIDES, surfaces.split(";"), strict=True):
        image = nib.load(path)
        image.darrays[0].data = (sphere(side) * 0.9 + [0, 1, 2]).astype(np.float32)
        other.append(str(tmp_path / f"{side}.surf.gii"))
        nib.save(image, other[-1])
    first, second = (read_cifti(uri, None, s) for s in (surfaces, ";".join(other)))
    assert first.names == second.names
    assert np.linalg.norm(first.parcels - second.parcels, axis=1).max() < 3


def test_a_given_parcellation_is_used(tmp_path, axis, series):
    codes = np.where(np.arange(len(axis)) % 2, 3, 0)
    names = {0: ("none", (0, 0, 0, 0)), 3: ("odd", (1, 0, 0, 1))}
    labels = save(tmp_path / "b.dlabel.nii", LabelAxis(["regions"], [names]), axis, codes[None])
    found = read_cifti(dtseries(tmp_path / "a.dtseries.nii", axis, series), processing="fix",
                       parcellation_uri=labels)
    assert found.names == ["CORTEX_LEFT:odd", "CORTEX_RIGHT:odd", "THALAMUS_RIGHT"]
    np.testing.assert_allclose(found.parcels[0], series[:, 1:1100:2].mean(1), rtol=1e-5)


@pytest.mark.parametrize(("count", "step", "unit", "names", "flag"), [
    (10, 2.0, "SECOND", {"BOLD"}, "short_series"),
    (60, 0.0, "SECOND", {"BOLD", "tSNR"}, "no_tr"),
    (60, 2.0, "HERTZ", {"BOLD", "tSNR"}, "no_tr"),
])
def test_series_that_are_short_or_know_no_time(tmp_path, axis, series, count, step, unit, names,
                                               flag):
    found = read_cifti(dtseries(tmp_path / "a.dtseries.nii", axis, series[:count], step, unit))
    assert set(found.maps) == names
    assert found.flags == [flag] and found.notes == ["minimal"]


def test_the_sidecars_time_and_the_motion_table_are_used(tmp_path, axis, series):
    table = "\n".join(["framewise_displacement", "n/a", *["0.2"] * 98, "0.9"]).encode()
    found = read_cifti(dtseries(tmp_path / "a.dtseries.nii", axis, series), processing="xcp_d",
                       facts={"RepetitionTime": 0.8}, confounds=table)
    assert found.flags == ["tr_disagrees"] and found.figures["bold_tr_s"] == 0.8
    assert found.figures["qc_fd_max"] == 0.9 and found.figures["qc_fd_share"] == 1 / 99


def test_volume_timing_gives_no_alff_from_the_headers_time(tmp_path, axis, series):
    found = read_cifti(dtseries(tmp_path / "a.dtseries.nii", axis, series, 2.0),
                       facts={"VolumeTiming": [0, 2, 9]})
    assert set(found.maps) == {"BOLD", "tSNR"} and found.figures["bold_tr_s"] is None
    assert set(found.flags) == {"volume_timing", "no_tr"}
    assert found.figures["alff_reason"] == "no repetition time that holds for all volumes"


# ---- the archive grid ----------------------------------------------------------------------------

def test_maps_reach_the_archive_where_they_lie(tmp_path, axis, series, surfaces):
    uri = dtseries(tmp_path / "a.dtseries.nii", axis, series)
    found = read_cifti(uri, None, surfaces, processing="fix")
    images, mask = archive_maps(found, "BOLD")
    assert set(images) == {"BOLD", "tSNR", "ALFF", "fALFF"}
    assert mask.shape == ARCHIVE_GRID.shape and set(np.unique(mask)) == {0, 1, 2}
    thalamus = world(found.maps["ALFF"], np.argwhere(found.covered & (
        found.maps["ALFF"].data > 0)))  # by the file's own affine
    volume_ml = found.covered.sum() * 8 / 1000
    assert (mask == 1).sum() / 1000 == pytest.approx(volume_ml, rel=0.05)
    centre = np.argwhere(mask == 1).mean(0) + ARCHIVE_GRID.affine[:3, 3]
    np.testing.assert_allclose(centre, thalamus.mean(0), atol=1)
    # noise alone has tSNR 200, the top of the range, everywhere on the left: also at its edges
    left = np.argwhere(mask == 1)[:, 0] + ARCHIVE_GRID.affine[0, 3] < -2
    assert np.median(images["tSNR"][mask == 1][left]) > 0.9
    assert (images["tSNR"][mask == 1][left] > 0.6).all()
    assert not images["ALFF"][mask != 1].any()


def test_a_scalar_is_the_map_that_the_scan_says(tmp_path, axis, surfaces):
    values = np.random.default_rng(0).uniform(200, 400, (1, len(axis)))
    uri = save(tmp_path / "a.dscalar.nii", ScalarAxis(["alff"]), axis, values)
    images, mask = archive_maps(read_cifti(uri, None, surfaces), "ALFF")
    assert set(images) == {"ALFF"}
    assert images["ALFF"][mask == 1].mean() == pytest.approx(1 / 4, rel=0.02)
    with pytest.raises(ScanError) as caught:
        archive_maps(read_cifti(uri, None, surfaces), "BOLD")
    assert caught.value.code == "cifti_maps"


def test_a_person_with_a_series_of_grayordinates_is_prepared(tmp_path, axis, series, surfaces):
    uri = dtseries(tmp_path / "a.dtseries.nii", axis, series)
    kept = [scan(uri, "BOLD", surface_uri=surfaces, processing="fix"), scan(
        str(tmp_path / "none.dtseries.nii"), "BOLD")]
    results = prepare_person(kept, PRESETS["quick"])
    by_name = {result.scan.modality: result for result in results if isinstance(result, Prepared)}
    assert set(by_name) == {"BOLD", "tSNR", "ALFF", "fALFF"} and len(results) == 5
    assert by_name["BOLD"].parcels is not None and by_name["BOLD"].parcels.shape == (201, 100)
    assert str(by_name["BOLD"].figures["cifti_parcel_names"]).endswith(";THALAMUS_RIGHT")
    assert by_name["ALFF"].parcels is None and by_name["ALFF"].scan_id.endswith("-ALFF")
    assert [r.reason for r in results if not isinstance(r, Prepared)] == ["missing"]


# ---- refusals ------------------------------------------------------------------------------------

def test_kinds_without_samples_are_refused_by_name(tmp_path, axis):
    regions = ParcelsAxis.from_brain_models([("a", axis[:1100]), ("b", axis[1100:2200])])
    series, scalar = SeriesAxis(0, 1, 3), ScalarAxis(["a"])
    for name, axes, shape in (("ptseries", (series, regions), (3, 2)),
                              ("pconn", (regions, regions), (2, 2)),
                              ("pscalar", (scalar, regions), (1, 2))):
        path = tmp_path / f"a.{name}.nii"
        nib.save(nib.Cifti2Image(np.ones(shape, np.float32), axes), path)
        with pytest.raises(ScanError, match=name) as caught:
            read_cifti(str(path))
        assert caught.value.code == "cifti_kind"


def test_what_has_no_place_or_no_content_is_refused(tmp_path, axis, surfaces):
    x = places(axis)[None, :, 0]
    scalar = ScalarAxis(["x"])
    cortex = save(tmp_path / "cortex.dscalar.nii", scalar, axis[:2200], x[:, :2200])
    assert code(cortex) == "no_voxels"
    assert code(save(tmp_path / "ones.dscalar.nii", scalar, axis, x * 0 + 1)) == "constant"
    invalid = np.where(np.arange(len(axis)) < 100, np.nan, x)
    assert code(save(tmp_path / "nan.dscalar.nii", scalar, axis, invalid)) == "non_finite"
    whole = Path(save(tmp_path / "whole.dscalar.nii", scalar, axis, x)).read_bytes()
    (tmp_path / "cut.dscalar.nii").write_bytes(whole[:-2000])
    assert code(str(tmp_path / "cut.dscalar.nii")) == "truncated"
    assert code(str(tmp_path / "whole.dscalar.nii"), None,
                ";".join(reversed(surfaces.split(";")))) == "surface_mismatch"
    assert code(str(tmp_path / "whole.dscalar.nii"), None,
                str(tmp_path / "whole.dscalar.nii")) == "not_gifti"


def test_a_volume_and_a_header_that_claims_too_much_are_refused(tmp_path, axis):
    plain = tmp_path / "plain.nii"
    nib.save(nib.Nifti2Image(np.ones((4, 4, 4), np.float32), np.eye(4)), plain)
    assert code(str(plain)) == "not_cifti"
    header = nib.Nifti2Header()
    header.set_data_shape((1, 1, 1, 1, 100_000, 1_000_000))
    header.set_intent(3002)
    header["magic"], header["vox_offset"] = b"n+2", 544
    (tmp_path / "huge.dtseries.nii").write_bytes(header.binaryblock + bytes(4))
    assert code(str(tmp_path / "huge.dtseries.nii")) == "too_large"


# ---- files as studies deliver them ---------------------------------------------------------------

@pytest.fixture(params=["made", "real"])
def unusable(request, tmp_path, axis) -> dict[str, str]:
    """Files by why they are refused: parcels, surfaces alone (three kinds), and all ones."""
    if request.param == "real":
        folder = request.getfixturevalue("shared_data") / "cifti"
        conte = f"{folder}/Conte69.MyelinAndCorrThickness.32k_fs_LR"
        return {f"{conte}.ptseries.nii": "cifti_kind", f"{conte}.dscalar.nii": "no_voxels",
                f"{conte}.dtseries.nii": "no_voxels",
                f"{folder}/Conte69.parcellations_VGD11b.32k_fs_LR.dlabel.nii": "no_voxels",
                f"{folder}/ones.dscalar.nii": "constant"}
    cortex = axis[axis.surface_mask]
    parcels = ParcelsAxis.from_brain_models([("left", cortex[:50]), ("right", cortex[-50:])])
    two, maps = SeriesAxis(0, 1, 2), ScalarAxis(["myelin", "thickness"])
    labels = LabelAxis(["areas"], {1: ("V1", (1, 0, 0, 1)), 2: ("V2", (0, 1, 0, 1))})
    rows = np.random.default_rng(0).random((2, len(cortex)), np.float32)
    made = {"p.ptseries": (two, parcels, rows[:, :2], "cifti_kind"),
            "s.dscalar": (maps, cortex, rows, "no_voxels"),
            "s.dtseries": (two, cortex, rows, "no_voxels"),
            "l.dlabel": (labels, cortex, 1 + (rows[:1] > 0.5), "no_voxels"),
            "ones.dscalar": (maps, axis, np.ones((2, len(axis)), np.float32), "constant")}
    for name, (along, across, data, _) in made.items():
        nib.save(nib.Cifti2Image(data.astype(np.float32), (along, across)),
                 tmp_path / f"{name}.nii")
    return {f"{tmp_path}/{name}.nii": reason for name, (*_, reason) in made.items()}


def test_files_without_a_series_in_voxels_are_refused_by_kind(unusable):
    assert {uri: code(uri) for uri in unusable} == unusable


# as CIFTI calls them; with the two sides of the cortex they are HCP's 21 structures
SUBCORTICAL = ("ACCUMBENS", "AMYGDALA", "CAUDATE", "CEREBELLUM", "DIENCEPHALON_VENTRAL",
               "HIPPOCAMPUS", "PALLIDUM", "PUTAMEN", "THALAMUS")


@pytest.fixture(params=["made", "real"])
def layout(request, axis) -> BrainModelAxis:
    """The structures of HCP, ABCD and UK Biobank: both cortices and 19 of voxels."""
    if request.param == "real":
        path = request.getfixturevalue("shared_data") / "cifti/ones.dscalar.nii"
        return nib.load(path).header.get_axis(1)
    names = ["BRAIN_STEM", *(f"{name}_{side}" for name in SUBCORTICAL
                             for side in ("LEFT", "RIGHT"))]
    whole = axis[axis.surface_mask]
    for number, name in enumerate(names):
        mask = np.zeros(GRID_SHAPE, bool)
        mask[20:50, 30 + 3 * number:32 + 3 * number, 30:40] = True
        whole += BrainModelAxis.from_mask(mask, name=name, affine=GRID_AFFINE)
    return whole


def test_a_series_on_the_axis_of_hcp_abcd_and_ukb(layout, tmp_path):
    data = np.random.default_rng(0).normal(100, 2, (60, len(layout))).astype(np.float32)
    found: Cifti = read_cifti(dtseries(tmp_path / "a.dtseries.nii", layout, data, step=1.2),
                              processing="fix")
    assert found.covered.sum() == layout.volume_mask.sum() and found.parcels.shape == (21, 60)
    assert found.maps["tSNR"].data[found.covered].mean() == pytest.approx(51, rel=0.03)
    amygdala = data[:, layout.name == "CIFTI_STRUCTURE_AMYGDALA_LEFT"].mean(1)
    np.testing.assert_allclose(found.parcels[found.names.index("AMYGDALA_LEFT")], amygdala,
                               rtol=1e-5)
