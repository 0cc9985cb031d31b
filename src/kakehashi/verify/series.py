"""The canary's series: ``python -m kakehashi.verify.series PROJECT`` at the store.

It reads the pattern, masked, on standard input, makes a synthetic CT of a few slices whose pixels
repeat it, packs it into the store, and shows it to the project. Nobody's image: patient and
study are made up, and say so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from kakehashi.verify.pattern import INTERCEPT, PIXELS, SLOPE, Pattern, masked

SLICES, ROWS = 4, 32


def write(folder: Path, pattern: Pattern) -> str:
    """Write the series; returns its SeriesInstanceUID."""
    series, study, frame = generate_uid(None), generate_uid(None), generate_uid(None)
    row = np.asarray(pattern.values, dtype="<u2")
    # Every other row differs, so that the whole is an image and not one repeated word.
    pixels = np.stack([row if index % 2 == 0 else row[::-1] for index in range(ROWS)])
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(SLICES):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(None)
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID = CTImageStorage
        image.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.FrameOfReferenceUID = frame
        image.PatientName, image.PatientID = "Canary^Synthetic", "KAKEHASHI-CANARY"
        image.StudyDate, image.Modality = "20200101", "CT"
        image.SeriesDescription = "Kakehashi canary, synthetic"
        image.Manufacturer = "Kakehashi"
        image.ImageComments = pattern.plain.hex()
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.ImagePositionPatient = [0, 0, 5.0 * index]
        image.PixelSpacing, image.SliceThickness = [1, 1], 5
        image.InstanceNumber = index + 1
        image.Rows, image.Columns = ROWS, PIXELS
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
        image.PixelRepresentation = 0
        image.RescaleSlope, image.RescaleIntercept = SLOPE, INTERCEPT
        image.RescaleType = "HU"
        image.PixelData = pixels.tobytes()
        image.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return str(series)


def main() -> int:
    """Bring in the series that standard input asks for, and print its UID last."""
    request = json.loads(sys.stdin.read())
    plain = masked(bytes.fromhex(request["plain"]), bytes.fromhex(request["mask"]))
    values = tuple(int(value) for value in np.frombuffer(plain, dtype="<u2"))
    store = [sys.executable, "-m", "kakehashi.cli", "store"]
    with tempfile.TemporaryDirectory() as folder:
        uid = write(Path(folder), Pattern(values))
        subprocess.run([*store, "add", folder], check=True)
    subprocess.run([*store, "view", sys.argv[1]], check=True)
    sys.stdout.write(uid + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
