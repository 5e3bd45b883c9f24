"""DICOM series: what converts, and what is refused before or after dcm2niix has seen it."""

from __future__ import annotations

import bz2
import gzip
import shutil
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from data_prep.scan import ScanError
from data_prep.volumes.reading import dicom
from data_prep.volumes.reading.dicom import to_nifti
from neurojepa.errors import DataError
from tests.helpers.dicom import slice_of, write_series

DEPTHS = [2.0 * number for number in range(8)]


def refused(folder: Path, code: str, says: str) -> None:
    with pytest.raises(ScanError, match=says) as caught:
        to_nifti(f"{folder}/")
    assert caught.value.code == code
    assert "Doe" not in str(caught.value) and "PID-4711" not in str(caught.value)


def test_series_becomes_one_image_with_its_geometry_and_facts(tmp_path: Path):
    folder = write_series(tmp_path / "s e r i é s", DEPTHS)
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "manifest.cvs").write_bytes(b"x")
    data, facts = to_nifti(f"{folder}/")
    image = nib.Nifti1Image.from_bytes(data)
    assert image.shape == (6, 5, 8)
    assert nib.affines.voxel_sizes(image.affine) == pytest.approx([1.5, 1, 2])
    # the first voxel of slice 5, patient position (-4, -3, 10) in LPS, is at (4, 3, 10) in RAS
    index = np.linalg.inv(image.affine) @ [4, 3, 10, 1]
    assert image.get_fdata()[tuple(np.rint(index[:3]).astype(int))] == 5
    assert facts == {"RepetitionTime": 2.3, "EchoTime": 0.0029, "SliceThickness": 2,
                     "MRAcquisitionType": "3D", "ImageType": ["ORIGINAL", "PRIMARY", "M"],
                     "Manufacturer": "Siemens", "ManufacturersModelName": "Prisma",
                     "MagneticFieldStrength": 3}
    assert b"Doe" not in data and b"PID-4711" not in data


def test_same_series_from_zip_tar_and_store(tmp_path: Path, s3):
    folder = write_series(tmp_path / "A" / "I1", DEPTHS)
    write_series(tmp_path / "A" / "I2", DEPTHS[:4], series="1.2.4")
    expected = to_nifti(f"{folder}/")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted((tmp_path / "A").rglob("*.dcm")):
            archive.write(file, file.relative_to(tmp_path))
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.add(tmp_path / "A", "./A")
    assert to_nifti(str(tmp_path / "a.zip"), "A/I1/") == expected
    assert to_nifti(str(tmp_path / "a.tgz"), "A/I1/") == expected
    with pytest.raises(ScanError) as caught:
        to_nifti(str(tmp_path / "a.zip"), "A/")
    assert caught.value.code == "missing"
    import s3fs

    s3fs.S3FileSystem().put(str(folder), f"{s3.uri}/dicom/I1", recursive=True)
    assert to_nifti(f"{s3.uri}/dicom/I1/") == expected


def test_names_and_endings_do_not_matter(tmp_path: Path):
    folder = write_series(tmp_path, DEPTHS)
    expected = to_nifti(f"{folder}/")
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"{9 - number}.{('nii', 'IMA', 'nii.gz')[number % 3]}")
    assert to_nifti(f"{folder}/") == expected


def test_mixed_series_is_refused(tmp_path: Path):
    folder = write_series(tmp_path, DEPTHS)
    slice_of(16, 8, series="1.2.4").save_as(folder / "other.dcm")
    refused(folder, "mixed_series", "files of 2 series")


def test_duplicates_are_dropped_only_where_bytes_are_equal(tmp_path: Path):
    folder = write_series(tmp_path, DEPTHS)
    expected = to_nifti(f"{folder}/")
    shutil.copy(folder / "a slice 3.dcm", folder / "copy of slice 3.dcm")
    assert to_nifti(f"{folder}/") == expected
    changed = slice_of(DEPTHS[3], 3)
    changed.PixelData = bytes(len(changed.PixelData))
    changed.save_as(folder / "copy of slice 3.dcm")
    refused(folder, "mixed_series", "same SOPInstanceUID")


@pytest.mark.parametrize(("depths", "code", "says"), [
    ([0, 2, 4, 8, 10, 12], "incomplete_series", "1 slices are missing"),
    ([0, 2, 4, 10, 12, 16], "incomplete_series", "3 slices are missing"),
    ([0, 2, 4, 7, 9, 11], "uneven_slices", "2.00 to 3.00 mm"),
    ([0, 2, 4, 5, 7, 9], "uneven_slices", "1.00 to 2.00 mm"),
    ([0, 2, 4, 6, 0, 2, 4], "incomplete_series", "some slices come 1 times, others 2 times"),
])
def test_gaps(tmp_path: Path, depths: list[float], code: str, says: str):
    refused(write_series(tmp_path, depths), code, says)


def test_localiser_and_derived_images(tmp_path: Path):
    refused(write_series(tmp_path / "mpr", DEPTHS, ImageType=["DERIVED", "PRIMARY", "MPR"]),
            "derived_image", "MPR")
    scout = write_series(tmp_path / "scout", DEPTHS)
    slice_of(3, 20, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]).save_as(scout / "sagittal.dcm")
    refused(scout, "mixed_series", "several directions")


def test_several_echoes_are_no_single_image(tmp_path: Path):
    folder = write_series(tmp_path, DEPTHS)
    for number, depth in enumerate(DEPTHS, 8):
        slice_of(depth, number, EchoTime=5.8, EchoNumbers="2").save_as(folder / f"b{number}.dcm")
    refused(folder, "mixed_series", "dcm2niix made image_e2.*nii, image_e2.nii")


def test_what_is_no_dicom(tmp_path: Path):
    folder = write_series(tmp_path / "one", DEPTHS)
    (folder / "zz.dcm").write_bytes(b"<html>not found</html>")
    refused(folder, "not_dicom", "zz.dcm")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "missing", "no file")
    refused(tmp_path / "none", "missing", "not found")
    annexed = write_series(tmp_path / "annex", DEPTHS)
    (annexed / "zz.dcm").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(annexed, "not_downloaded", "zz.dcm")


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "NumberOfFrames"])
def test_a_damaged_number_is_refused_by_name(tmp_path: Path, tag: str):
    number = 12345678  # eight digits, to be found in the file
    folder = write_series(tmp_path, DEPTHS[:1], **{tag: [number] * 3 if "Position" in tag
                                                   else number})
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes().replace(b"12345678", b"nonsense"))
    refused(folder, "not_dicom", f"{tag} is nonsense")


def test_the_scanner_of_bytes_that_are_no_slice_is_unknown(tmp_path: Path):
    unknown = {"scanner": None, "field_strength": None}
    for number, content in enumerate((b"", b"text", bytes(range(256)) * 4, b"\x1f\x8b\x08cut")):
        (tmp_path / f"{number}.dcm").write_bytes(content)
        assert dicom.scanner_of(str(tmp_path / f"{number}.dcm")) == unknown
    odd = write_series(tmp_path / "odd", DEPTHS[:1], MagneticFieldStrength=[3, 7])
    assert dicom.scanner_of(str(next(odd.iterdir())))["field_strength"] is None
    with pytest.raises(DataError, match=r"none\.dcm"):
        dicom.scanner_of(str(tmp_path / "none.dcm"))


def test_damaged_slice_is_no_silent_loss(tmp_path: Path):
    folder = write_series(tmp_path, DEPTHS)
    file = folder / "a slice 7.dcm"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ScanError) as caught:
        to_nifti(f"{folder}/")
    assert caught.value.code == "conversion_failed", caught.value


def test_every_slice_must_be_in_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_series(tmp_path, DEPTHS)

    def lossy(source: str, target: str, name: str) -> None:
        nib.save(nib.Nifti1Image(np.ones((6, 5, 7), np.int16), np.eye(4)), f"{target}/image.nii")

    monkeypatch.setattr(dicom, "_convert", lossy)
    refused(folder, "incomplete_series", r"8 frames became an image of shape \(6, 5, 7\)")


def test_size_and_time_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_series(tmp_path, DEPTHS)
    monkeypatch.setattr(dicom, "MAX_SECONDS", 1e-9)
    refused(folder, "conversion_failed", "was ended")
    monkeypatch.setattr(dicom, "MAX_SERIES_BYTES", 1000)
    refused(folder, "too_large", "the limits are")


def test_pet_frames_and_facts(tmp_path: Path):
    dose = Dataset()
    dose.RadionuclideTotalDose, dose.RadionuclideHalfLife = 3.7e8, 6586.2
    tags = {"Modality": "PT", "ImageType": ["ORIGINAL", "PRIMARY"], "Units": "BQML",
            "NumberOfSlices": 4, "NumberOfTimeSlices": 2, "PatientWeight": 70,
            "RadiopharmaceuticalInformationSequence": [dose], "ActualFrameDuration": 300000,
            "SeriesTime": "100000"}
    folder = write_series(tmp_path, DEPTHS[:4], AcquisitionTime="100000", **tags)
    for number, depth in enumerate(DEPTHS[:4], 4):
        slice_of(depth, number, AcquisitionTime="100500",
                 **tags).save_as(folder / f"b{number}.dcm")
    data, facts = to_nifti(f"{folder}/")
    assert nib.Nifti1Image.from_bytes(data).shape == (6, 5, 4, 2)
    assert facts["Units"] == "Bq/mL" and facts["BodyWeight"] == 70
    assert (facts["InjectedRadioactivity"], facts["InjectedRadioactivityUnits"]) == (370, "MBq")
    assert facts["RadionuclideHalfLife"] == 6586.2
    assert (facts["FrameDuration"], facts["FrameTimesStart"]) == ([300, 300], [0, 300])
    for file in folder.glob("b*.dcm"):
        file.unlink()
    refused(folder, "incomplete_series", "4 frames, the header promises 8")


def test_multi_frame_file(tmp_path: Path):
    one = slice_of(0, 0)
    del one.ImagePositionPatient, one.ImageOrientationPatient
    assert dicom._check([one], "x") == 1  # nothing to judge
    one.NumberOfFrames = 3
    one.PerFrameFunctionalGroupsSequence = []
    shared, axes = Dataset(), Dataset()
    axes.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PlaneOrientationSequence = [axes]
    one.SharedFunctionalGroupsSequence = [shared]
    for depth in (0, 2, 6):
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, depth]
        frame.PlanePositionSequence = [position]
        one.PerFrameFunctionalGroupsSequence.append(frame)
    with pytest.raises(ScanError) as caught:
        dicom._check([one], "x")
    assert caught.value.code == "incomplete_series"


def test_mosaic_keeps_its_slices_to_itself():
    volumes = [slice_of(depth, number, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])
               for number, depth in enumerate((0, 0.3, 7))]  # positions of tiles mean nothing
    assert dicom._check(volumes, "x") is None


def test_packed_slices(tmp_path: Path):
    folder = write_series(tmp_path / "plain", DEPTHS)
    expected = to_nifti(f"{folder}/")
    packed = tmp_path / "MPRAGE [ND] #1"
    packed.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        pack = (gzip.compress, bz2.compress, bytes)[number % 3]
        (packed / f"{file.name}.gz").write_bytes(pack(file.read_bytes()))
    assert to_nifti(f"{packed}/") == expected
    shutil.copy(folder / "a slice 0.dcm", packed / "again.dcm")  # the same file, once unpacked
    assert to_nifti(f"{packed}/") == expected
    assert dicom.scanner_of(str(packed / "a slice 0.dcm.gz")) == {
        "scanner": "SIEMENS Prisma", "field_strength": 3}
    cut = packed / "a slice 1.dcm.gz"
    cut.write_bytes(gzip.compress((folder / "a slice 1.dcm").read_bytes())[:-20])
    refused(packed, "truncated", "a slice 1.dcm.gz: damaged gzip stream")


@pytest.mark.parametrize("tags", [
    {"ImageType": ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE", "ND", "MOSAIC"]},
    {"ImageType": ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"]}, {"DiffusionBValue": 1000.0}])
def test_a_diffusion_series_is_called_that(tmp_path: Path, tags: dict[str, object]):
    refused(write_series(tmp_path, DEPTHS, **tags), "diffusion_series", "diffusion-weighted")


def test_a_b_value_of_zero_makes_no_diffusion_series(tmp_path: Path):
    data, _ = to_nifti(f"{write_series(tmp_path, DEPTHS, DiffusionBValue=0.0)}/")
    assert nib.Nifti1Image.from_bytes(data).shape == (6, 5, 8)


def test_b_values_that_only_the_converter_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def with_b_values(source: str, target: str, name: str) -> None:
        for file in ("image.nii", "image.bval", "image.bvec", "image.json"):
            Path(target, file).write_bytes(b"")

    monkeypatch.setattr(dicom, "_convert", with_b_values)
    refused(write_series(tmp_path, DEPTHS), "diffusion_series", "diffusion-weighted")


def test_real_series(shared_data: Path):
    data, facts = to_nifti(f"{shared_data}/dicom/t1_excerpt/")
    image = nib.Nifti1Image.from_bytes(data)
    assert image.shape == (274, 384, 6)  # whole in itself; read_scan finds too few slices
    first = pydicom.dcmread(sorted((shared_data / "dicom/t1_excerpt").iterdir())[0])
    assert np.isin(first.pixel_array[200], image.get_fdata()).all()
    data, facts = to_nifti(f"{shared_data}/dicom/bold_2vols/")
    image = nib.Nifti1Image.from_bytes(data)
    assert image.shape == (80, 80, 35, 2)
    assert facts["RepetitionTime"] == 2 and image.header.get_zooms()[3] == pytest.approx(2)
