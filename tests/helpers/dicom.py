"""DICOM series of a few small slices, complete enough for dcm2niix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from pydicom.uid import PositronEmissionTomographyImageStorage as PETImageStorage


def slice_of(depth: float, number: int, series: str = "1.2.3", **tags: object) -> FileDataset:
    """One axial slice of 6 x 5 voxels of 1.5 x 1 mm whose first voxel holds its number."""
    meta = FileMetaDataset()
    pet = tags.get("Modality") == "PT"
    meta.MediaStorageSOPClassUID = PETImageStorage if pet else MRImageStorage
    meta.MediaStorageSOPInstanceUID = f"1.2.9.{number + 1}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    one.SOPClassUID, one.SOPInstanceUID = meta.MediaStorageSOPClassUID, f"1.2.9.{number + 1}"
    one.StudyInstanceUID, one.SeriesInstanceUID, one.SeriesNumber = "1.2.1", series, 3
    one.Modality, one.InstanceNumber, one.ImageType = "MR", number + 1, ["ORIGINAL", "PRIMARY", "M"]
    one.PatientName, one.PatientID, one.SeriesDescription = "Doe^Jane", "PID-4711", "MPRAGE"
    one.AcquisitionNumber, one.EchoTime, one.RepetitionTime = 1, 2.9, 2300.0
    one.MRAcquisitionType, one.SliceThickness, one.MagneticFieldStrength = "3D", 2.0, 3.0
    one.Manufacturer, one.ManufacturerModelName = "SIEMENS", "Prisma"
    one.ImagePositionPatient, one.ImageOrientationPatient = [-4, -3, depth], [1, 0, 0, 0, 1, 0]
    one.Rows, one.Columns, one.PixelSpacing = 5, 6, [1.0, 1.5]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
    pixels = np.full((5, 6), 100, np.int16)
    pixels[0, 0] = number
    one.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(one, name, value)
    return one


def write_series(folder: Path, depths: list[float], **tags: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, depth in enumerate(depths):
        slice_of(depth, number, **tags).save_as(folder / f"a slice {number}.dcm")
    return folder
