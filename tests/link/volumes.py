"""A session over a store of small made-up CT series, each with its own voxels."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from kakehashi.store.pack import pack_series
from tests.link.stores import Broker, StoreFolder

ROOT = "1.2.826.0.1.3680043.10.1"


def voxels(number: int, shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """Return what series `number` holds, in HU: an organ brighter than its noisy surroundings."""
    z, y, x = np.indices(shape)
    centre = [(0.3 + 0.05 * (number % 8)) * size for size in shape]
    away = sum(((at - c) / size) ** 2 for at, c, size in zip((z, y, x), centre, shape, strict=True))
    noise = np.random.default_rng(number).normal(0, 20, shape)
    return np.where(away < 0.05, 120 + noise, noise - 80).astype(np.int16)


@cache
def packed(number: int, shape: tuple[int, int, int]) -> bytes:
    values = voxels(number, shape)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = []
        for k, plane in enumerate(values):
            ds = pydicom.Dataset()
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
            ds.SOPInstanceUID = f"{ROOT}.{number}.1.{k}"
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.SeriesInstanceUID = uid(number)
            ds.StudyInstanceUID = f"{ROOT}.{number}.0"
            ds.FrameOfReferenceUID = f"{ROOT}.{number}.2"
            ds.PatientID, ds.PatientName = f"P{number}", "Test"
            ds.Modality, ds.InstanceNumber = "CT", k + 1
            ds.ImagePositionPatient = [-50.0, 10.0, 2.5 * k]
            ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            ds.PixelSpacing, ds.SliceThickness = [0.7, 0.9], 2.5
            ds.Rows, ds.Columns = plane.shape
            ds.BitsAllocated = ds.BitsStored = 16
            ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 15, 1, 1
            ds.PhotometricInterpretation = "MONOCHROME2"
            ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0, "HU"
            ds.PixelData = plane.tobytes()
            file = folder / f"{k}.dcm"
            ds.save_as(file, enforce_file_format=True)
            files.append(file)
        pack_series(files, folder / "series.ozx")
        return (folder / "series.ozx").read_bytes()


def uid(number: int) -> str:
    return f"{ROOT}.{number}"


class Cohort:
    """A session's files and socket over a store of made-up series."""

    def __init__(self, base: Path, shapes: list[tuple[int, int, int]]) -> None:
        base.mkdir(exist_ok=True)
        self.folder = StoreFolder(base / "store")
        self.shapes = shapes
        for number, shape in enumerate(shapes):
            self.folder.add(uid(number), packed(number, shape), modality="CT", slices=shape[0])
        self.uids = [uid(number) for number in range(len(shapes))]
        self.broker = Broker(base / "store.sock")
        self.path = base / "session.json"
        self.write()

    def write(self, **changes: Any) -> None:
        session = {
            "session": "ab" * 16,
            "person": "hanako",
            "project": "lung",
            "site": "slurm",
            "ends_at": "2031-01-31T12:00:00Z",
            "manifest": {"path": self.folder.manifest_path, "sha256": self.folder.sha256},
            "view": None,
            "work": None,
            "socket": str(self.broker.path),
            "work_socket": "/run/kakehashi/work.sock",
            "software": "0.1.0",
        }
        self.path.write_text(json.dumps(session | changes), encoding="utf-8")

    def close(self) -> None:
        self.broker.close()
