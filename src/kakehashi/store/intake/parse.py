"""The program that reads and de-identifies what hospitals sent, without any right of its own.

Started by :class:`kakehashi.store.intake.parser.Parser` alone.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from kakehashi.secret import Secret
from kakehashi.store.deidentify import Deidentifier, residue
from kakehashi.store.dicom import tolerant
from kakehashi.store.intake.child import serve
from kakehashi.store.intake.reports import report_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.store.intake.channel import Message


def prepare(first: dict[str, Any]) -> Callable[[Message], tuple[dict[str, Any], bytes]]:
    """Return what answers with an object's facts and its de-identified form.

    An object of our own goes through it first: what cannot work here must not be laid at the
    door of what hospitals sent.
    """
    deidentifier = Deidentifier(Secret(first["key"]))

    def answer(message: Message) -> tuple[dict[str, Any], bytes]:
        descriptor = -1 if message.descriptor is None else message.descriptor
        # A parser before this one may have been at it.
        os.lseek(descriptor, 0, os.SEEK_SET)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            try:
                return _deidentified(file, deidentifier, message.facts["facility"])
            except MemoryError:
                raise
            except Exception as error:
                # A file from outside can break a parser in any way.
                return {"refused": f"{type(error).__name__}: {error}"}, b""

    _deidentified(_own_object(), deidentifier, "")
    return answer


def _deidentified(
    file: io.BufferedIOBase, deidentifier: Deidentifier, facility: str
) -> tuple[dict[str, Any], bytes]:
    dataset = pydicom.dcmread(file)
    outcome = deidentifier.object(dataset, facility=facility)
    written = io.BytesIO()
    outcome.write(written)
    found = {
        name: str(outcome.dataset.get(keyword) or "")
        for name, keyword in (
            ("series", "SeriesInstanceUID"),
            ("sop", "SOPInstanceUID"),
            ("study", "StudyInstanceUID"),
            ("patient", "PatientID"),
        )
    }
    return found | {
        "tier": outcome.tier,
        "held": outcome.held or "",
        "left": len(residue(outcome, outcome.names)),
        "report": report_of(outcome.dataset),
    }, written.getvalue()


def _own_object() -> io.BytesIO:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    dataset.StudyInstanceUID = dataset.SeriesInstanceUID = "1.2.3"
    dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    dataset.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    dataset.PatientID = "1"
    written = io.BytesIO()
    pydicom.dcmwrite(written, dataset, enforce_file_format=True)
    written.seek(0)
    return written


if __name__ == "__main__":
    with tolerant():
        serve(prepare)
