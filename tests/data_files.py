"""Small sites on disk, made by the tests."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from fedseg.datamodules import FolderDataModule


def square(height: int = 20, width: int = 24, label: int = 1) -> np.ndarray:
    """A mask with one 8 x 8 square off the centre."""
    mask = np.zeros((height, width), np.uint8)
    mask[2:10, 3:11] = label
    return mask


def picture(number: int, height: int = 20, width: int = 24, channels: int = 3) -> np.ndarray:
    """A random picture, another one for every number."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def save_volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def make_site(
    root: Path,
    site: str,
    count: int = 6,
    *,
    channels: int = 3,
    first: int = 0,
    mask: Callable[[int], np.ndarray] = lambda number: square(),
    size: tuple[int, int] = (20, 24),
) -> None:
    for number in range(first, first + count):
        save(root / site / "images" / f"case_{number:02d}.png", picture(number, *size, channels=channels))
        save(root / site / "masks" / f"case_{number:02d}.png", mask(number))


def make_sites(root: Path, *sites: str, count: int = 6) -> Path:
    for number, site in enumerate(sites):
        make_site(root, site, count, first=100 * number)
    return root


def write_manifest(path: Path, rows: Sequence[dict[str, str]], separator: str = ",", encoding: str = "utf-8") -> Path:
    columns = list(rows[0])
    lines = [separator.join(columns), *(separator.join(row[name] for name in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def folder(root: Path, **knobs: Any) -> FolderDataModule:
    """A prepared data module over a folder."""
    data = FolderDataModule(root=str(root), **{"size": [20, 24], "batch_size": 4, "augment": "none"} | knobs)
    data.setup()
    return data


PATIENT = "Planted^Name^Of^Somebody"


def save_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray | None = None,
    change: Callable[[int, Any], None] = lambda number, head: None,
) -> Path:
    """A DICOM series of an array (x, y, z) with a RAS affine, in files whose names say nothing of their order.

    Args:
        folder: Created when missing.
        array: Whole numbers of at most 16 bits.
        affine: From voxels to the patient.
        change: Told the number of every slice and its data set, to spoil it.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ (np.eye(4) if affine is None else affine)
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    series, study, frame = (generate_uid(entropy_srcs=[str(folder), of]) for of in ("series", "study", "frame"))
    for number in range(array.shape[2]):
        uid = generate_uid(entropy_srcs=[str(folder), str(number)])
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = uid
        head = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        head.SOPClassUID, head.SOPInstanceUID, head.Modality = CTImageStorage, uid, "CT"
        head.SeriesInstanceUID, head.StudyInstanceUID, head.FrameOfReferenceUID = series, study, frame
        head.PatientName, head.PatientID, head.PatientBirthDate, head.PatientSex = PATIENT, "ID-4711", "19700101", "O"
        head.PatientAddress, head.OtherPatientNames, head.PatientComments = "Planted Street 1", PATIENT, f"of {PATIENT}"
        head.StudyDescription, head.InstitutionName, head.OperatorsName = f"of {PATIENT}", "Planted Clinic", PATIENT
        head.StudyID, head.AccessionNumber, head.StudyDate, head.StudyTime = "7", "A7", "20200102", "101112"
        head.ReferringPhysicianName, head.SeriesNumber, head.InstanceNumber = "Planted^Physician", 3, number + 1
        head.ImageType, head.SamplesPerPixel, head.PhotometricInterpretation = ["ORIGINAL"], 1, "MONOCHROME2"
        head.ImagePositionPatient = [f"{one:.8f}" for one in lps[:3, 3] + number * lps[:3, 2]]
        head.ImageOrientationPatient = [f"{one:.9f}" for axis in (0, 1) for one in lps[:3, axis] / sizes[axis]]
        head.PixelSpacing, head.SliceThickness = [f"{sizes[axis]:.10g}" for axis in (1, 0)], f"{sizes[2]:.10g}"
        head.Rows, head.Columns = array.shape[1], array.shape[0]
        head.BitsAllocated = head.BitsStored = 8 * array.itemsize
        head.HighBit, head.PixelRepresentation = 8 * array.itemsize - 1, int(array.dtype.kind == "i")
        head.PixelData = np.ascontiguousarray(array[..., number].T).tobytes()
        head.PixelData += b"\0" * (len(head.PixelData) % 2)
        change(number, head)
        head.save_as(folder / f"{hashlib.sha1(uid.encode()).hexdigest()[:8]}.dcm")
    return folder


def save_enhanced(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray | None = None,
    change: Callable[[int, Any], None] = lambda number, item: None,
    spoil: Callable[[Any], None] = lambda head: None,
) -> Path:
    """An enhanced MR image of an array (x, y, z) with a RAS affine: one file, frames in no order of their places.

    Args:
        path: The file; its folder is made when missing.
        array: As of `save_series`.
        affine: As of `save_series`.
        change: Told the number of every slice and the groups of its frame, to spoil them.
        spoil: Told the whole data set.
    """
    import pydicom
    from pydicom import Dataset
    from pydicom.uid import EnhancedMRImageStorage

    series = save_series(path.parent / f".{path.stem}", array, affine)
    slices = sorted((pydicom.dcmread(file) for file in series.iterdir()), key=lambda head: int(head.InstanceNumber))
    shutil.rmtree(series)
    order = np.random.default_rng(7).permutation(len(slices)).tolist()
    head, frames = slices[0].copy(), []
    head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = EnhancedMRImageStorage
    head.NumberOfFrames, head.Modality, head.PixelData = len(slices), "MR", b""
    for number in order:
        one, item = slices[number], Dataset()
        for group, tags in {
            "PlanePositionSequence": ("ImagePositionPatient",),
            "PlaneOrientationSequence": ("ImageOrientationPatient",),
            "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
            "PixelValueTransformationSequence": (),
            "FrameContentSequence": (),
            "MREchoSequence": (),
            "MRImageFrameTypeSequence": (),
        }.items():
            setattr(item, group, [Dataset()])
            for tag in tags:
                item[group][0].add(one[tag])
        item.PixelValueTransformationSequence[0].RescaleSlope = "2"
        item.PixelValueTransformationSequence[0].RescaleIntercept = "-10"
        item.FrameContentSequence[0].StackID = "1"
        item.FrameContentSequence[0].FrameComments = f"of {PATIENT}"
        item.MREchoSequence[0].EffectiveEchoTime = 30.0
        item.MRImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
        change(number, item)
        frames.append(item)
    shared = Dataset()  # what all frames have the same stands once
    shared.PlaneOrientationSequence = frames[0].PlaneOrientationSequence
    if all(item.PlaneOrientationSequence == shared.PlaneOrientationSequence for item in frames):
        for item in frames:
            del item.PlaneOrientationSequence
    head.SharedFunctionalGroupsSequence, head.PerFrameFunctionalGroupsSequence = [shared], frames
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(head, tag)
    head.PixelData = b"".join(np.ascontiguousarray(array[..., number].T).tobytes() for number in order)
    head.PixelData += b"\0" * (len(head.PixelData) % 2)
    spoil(head)
    path.parent.mkdir(parents=True, exist_ok=True)
    head.save_as(path)
    return path


def save_segmentation(path: Path, series: Path, masks: np.ndarray, kind: str = "BINARY", **knobs: Any) -> Path:
    """A DICOM segmentation as highdicom writes it.

    Args:
        path: The file.
        series: The folder of the series that it is of.
        masks: (x, y, z, segments) of 0 and 1 in the order of the series' numbers; for LABELMAP (x, y, z) numbers.
        kind: BINARY, FRACTIONAL or LABELMAP.
        knobs: What else highdicom is told.
    """
    import highdicom
    import pydicom
    from pydicom.sr.codedict import codes

    source = sorted((pydicom.dcmread(file) for file in series.iterdir()), key=lambda head: int(head.InstanceNumber))
    count = masks.shape[3] if masks.ndim == 4 else int(masks.max())
    told = highdicom.AlgorithmIdentificationSequence("by hand", codes.DCM.ArtificialIntelligence, "1")
    segments = [
        highdicom.seg.SegmentDescription(
            number + 1, f"s{number + 1}", codes.SCT.Tissue, codes.SCT.Tissue, "AUTOMATIC", algorithm_identification=told
        )
        for number in range(count)
    ]
    uids = [highdicom.UID() for _ in range(2)]
    order = (2, 1, 0, 3) if masks.ndim == 4 else (2, 1, 0)
    pixels = np.ascontiguousarray(masks.transpose(order))
    seg = highdicom.seg.Segmentation(
        source, pixels, kind, segments, uids[0], 1, uids[1], 1, "maker", "model", "1", "none", **knobs
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)
    return path
