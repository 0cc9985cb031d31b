"""Series made for a test: small images with any attributes, single files or one with frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
CLASSES = {
    "CT": uid.CTImageStorage,
    "MR": uid.MRImageStorage,
    "PT": uid.PositronEmissionTomographyImageStorage,
}
ENHANCED = {
    "CT": uid.EnhancedCTImageStorage,
    "MR": uid.EnhancedMRImageStorage,
    "PT": uid.EnhancedPETImageStorage,
}


@dataclass
class Slice:
    """One image to be written; without an ``image`` it is noise, of the seed's."""

    k: int
    attributes: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Dataset], object] | None = None
    orientation: tuple[float, ...] = AXIAL
    origin: tuple[float, float, float] = (-10.0, -20.0, -30.0)
    step_mm: float = 2.5
    spacing: tuple[float, float] = (0.75, 0.5)
    size: tuple[int, int] = (6, 8)
    seed: int = 0
    image: np.ndarray | None = None

    @property
    def position(self) -> list[float]:
        row, column = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        where = np.array(self.origin) + self.k * self.step_mm * np.cross(row, column)
        return [float(x) for x in where]

    @property
    def pixels(self) -> np.ndarray:
        if self.image is not None:
            return self.image
        chance = np.random.default_rng([self.seed, self.k + 1000])
        return chance.integers(-1000, 1000, self.size, dtype=np.int16)


def stack(count: int = 4, **common: Any) -> list[Slice]:
    return [Slice(k=k, **common) for k in range(count)]


def write(
    folder: Path, slices: Iterable[Slice], modality: str = "MR", order: Sequence[int] | None = None
) -> list[Path]:
    """Write single-frame files; ``order`` shuffles their UIDs and names."""
    folder.mkdir(parents=True, exist_ok=True)
    images = list(slices)
    paths = []
    for index, image in enumerate(images):
        number = index if order is None else order[index]
        dataset = _common(modality, CLASSES[modality], number, image.size)
        dataset.ImagePositionPatient = image.position
        dataset.ImageOrientationPatient = list(image.orientation)
        dataset.PixelSpacing = list(image.spacing)
        dataset.SliceThickness = image.step_mm
        dataset.PixelData = image.pixels.tobytes()
        for name, value in image.attributes.items():
            setattr(dataset, name, value)
        if image.change is not None:
            image.change(dataset)
        paths.append(folder / f"{number:04}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_frames(
    path: Path,
    slices: Sequence[Slice],
    groups: Callable[[Slice, Dataset], object],
    modality: str = "MR",
    change: Callable[[Dataset], object] | None = None,
) -> Path:
    """Write one multi-frame file; ``groups`` adds functional groups to a frame's item."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = _common(modality, ENHANCED[modality], int(path.stem), slices[0].size)
    dataset.NumberOfFrames = len(slices)
    dataset.SharedFunctionalGroupsSequence = [
        item(
            PlaneOrientationSequence=[item(ImageOrientationPatient=list(slices[0].orientation))],
            PixelMeasuresSequence=[
                item(PixelSpacing=list(slices[0].spacing), SliceThickness=slices[0].step_mm)
            ],
        )
    ]
    frames = []
    for image in slices:
        frame = item(PlanePositionSequence=[item(ImagePositionPatient=image.position)])
        groups(image, frame)
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.PixelData = b"".join(image.pixels.tobytes() for image in slices)
    if change is not None:
        change(dataset)
    dataset.save_as(path, enforce_file_format=True)
    return path


def item(**values: Any) -> Dataset:
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def _common(modality: str, sop_class: uid.UID, number: int, size: tuple[int, int]) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    instance = uid.UID(f"1.2.9.{number + 1}")
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = instance
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "1.2.9", "1.2.8"
    dataset.FrameOfReferenceUID = "1.2.7"
    dataset.PatientID, dataset.Modality = "P1", modality
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = size
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    return dataset
