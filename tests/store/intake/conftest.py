"""An intake on a real inbox, fed as the receiver feeds it."""

from __future__ import annotations

import datetime as dt
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
import pytest

from kakehashi.config import Config
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.deidentify import Deidentifier, load_key
from kakehashi.store.dicom import tolerant
from kakehashi.store.indexing import opened
from kakehashi.store.intake import Intake, Packer, Parser
from kakehashi.store.receive import Inbox
from kakehashi.store.receive.entry import Receipt
from kakehashi.store.receive.offer import Offer, Verdict
from kakehashi.store.receive.part import Part
from kakehashi.store.service.reports import Reports

from ..conftest import settings

KEY = Path("secrets", "deidentification")
_NUMBERS = itertools.count(1)


def send(inbox: Inbox, source: Path | pydicom.Dataset, facility: str = "F01") -> Verdict:
    """Put an object into the inbox, as an association's process does."""
    if isinstance(source, pydicom.Dataset):
        buffer = io.BytesIO()
        with tolerant():
            pydicom.dcmwrite(buffer, source, enforce_file_format=True)
        raw = buffer.getvalue()
    else:
        raw = source.read_bytes()
    with tolerant():
        meta = pydicom.dcmread(io.BytesIO(raw), stop_before_pixels=True).file_meta
    start = 128 + 4 + 12 + meta.FileMetaInformationGroupLength
    part = Part(inbox.folders.incoming / f"{next(_NUMBERS)}-1.part")
    part.write(memoryview(raw)[start:])
    receipt = Receipt(
        received_at=dt.datetime.now(dt.UTC),
        facility=facility,
        calling="SCANNER",
        address="127.0.0.1",
        sop_class=str(meta.MediaStorageSOPClassUID),
        sop=str(meta.MediaStorageSOPInstanceUID),
        transfer_syntax=str(meta.TransferSyntaxUID),
        study="",
        series="",
        size=0,
        sha256="",
    )
    receipt, reason = part.seal(receipt)
    (verdict,) = inbox.admit([Offer(part.path.name, receipt, reason)])
    return verdict


@dataclass
class Hospital:
    """A store with its intake, and everything that is needed to look at it."""

    config: Config
    catalogue: Catalogue
    inbox: Inbox
    deidentifier: Deidentifier
    reports: Reports
    parsers: list[Parser] = field(default_factory=list)
    packers: list[Packer] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.config.need_store().root

    def intake(self, **others: Any) -> Intake:
        """An intake as a process that was started just now has it."""
        self.parsers.append(Parser(load_key(self.root / KEY), None))
        self.packers.append(Packer(self.root, None))
        return Intake(
            self.config.need_store(),
            self.catalogue,
            inbox=self.inbox,
            deidentifier=self.deidentifier,
            parser=self.parsers[-1],
            packer=self.packers[-1],
            reports=self.reports,
            index=opened(self.config.need_store()),
            **others,
        )

    def close(self) -> None:
        for child in [*self.parsers, *self.packers]:
            child.close()
        self.reports.close()
        self.catalogue.close()

    def send(self, sources: Iterable[Path | pydicom.Dataset], facility: str = "F01") -> None:
        for source in sources:
            assert send(self.inbox, source, facility) in {Verdict.STORED, Verdict.AGAIN}

    def waiting(self) -> int:
        return len(list(self.inbox.entries()))

    def reasons(self) -> list[str]:
        return [held.reason for held in self.inbox.held.list()]


def open_hospital(config: Config) -> Hospital:
    root = config.need_store().root
    (root / "service").mkdir(exist_ok=True)
    (root / "secrets").mkdir(exist_ok=True)
    return Hospital(
        config,
        Catalogue.open(config.need_store()),
        Inbox(root),
        Deidentifier(load_key(root / KEY, create=True)),
        Reports.open(config.need_store()),
    )


@pytest.fixture
def hospital(tmp_path) -> Iterator[Hospital]:
    root = tmp_path / "store"
    root.mkdir()
    config = Config.model_validate(settings(root))
    made = open_hospital(config)
    yield made
    made.close()
