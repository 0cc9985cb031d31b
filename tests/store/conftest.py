"""A store in a temporary folder, and real series to put into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest

from kakehashi.config import Config
from kakehashi.imaging.ozip import FileReader, Pack, open_pack
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.ingest import AddReport, Origin, add
from kakehashi.store.pack import PackInfo, pack_series

DATA = Path(__file__).parent.parent / "data"
UNSAID = Origin()

SERIES = {
    "ct_chest": "ct_chest/*.dcm",
    "ct_tilted": "ct_tilted/axial/*",
    "ct_enhanced": "ct_enhanced/*.dcm",
    "mr_adc": "mr_adc/*.dcm",
    "mr_rle": "mr_small/*RLE.dcm",
    "mr_jpeg2000": "mr_small/*jp2klossless.dcm",
    "pet_uneven": "pet_uneven/*.dcm",
    "sts_ct": "sts/CT/image/*",
    "sts_mr": "sts/MR_T1/image/*",
    "sts_pet": "sts/PET/image/*",
}
"""Every series of the test data that can be packed."""


def files_of(name: str) -> list[Path]:
    found = sorted(DATA.glob(SERIES[name]))
    assert found
    return found


@dataclass
class Packed:
    files: list[Path]
    path: Path
    info: PackInfo
    pack: Pack


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Iterator[Callable[[str], Packed]]:
    """Give a series of the test data as a pack, made once."""
    made: dict[str, Packed] = {}
    readers: list[FileReader] = []

    def get(name: str) -> Packed:
        if name not in made:
            path = tmp_path_factory.mktemp(name) / "series.ozx"
            info = pack_series(files_of(name), path)
            readers.append(FileReader(path))
            made[name] = Packed(files_of(name), path, info, open_pack(readers[-1]))
        return made[name]

    yield get
    for reader in readers:
        reader.close()


@dataclass
class StoreUnderTest:
    """A store with its settings; ``add`` is what the command does."""

    config: Config
    catalogue: Catalogue
    root: Path

    def add(self, *sources: Path, origin: Origin = UNSAID) -> AddReport:
        return add(self.config.need_store(), self.catalogue, sources, origin=origin)

    def files(self, pattern: str = "*") -> list[str]:
        """All files under the store's folder, but the database and locks."""
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob(pattern)
            if path.is_file() and path.name not in {".lock", "catalogue.sqlite"}
        )


def settings(root: Path, **store: object) -> dict[str, object]:
    def project(name: str, **cohort: list[str]) -> dict[str, object]:
        return {
            "id": name,
            "title": name,
            "purpose": "test",
            "approval": "1",
            "expires": "2099-01-01",
            "groups": ["g"],
            "sites": ["s"],
            "cohort": cohort,
        }

    return {
        "store": {"root": str(root), "address": "store.example", **store},
        "projects": [
            project("ct", modality=["CT"]),
            project("everything"),
            project("none", body_part=["TOE"]),
        ],
    }


@pytest.fixture
def store(tmp_path) -> Iterator[StoreUnderTest]:
    root = tmp_path / "store"
    root.mkdir()
    config = Config.model_validate(settings(root))
    catalogue = Catalogue.open(config.need_store())
    yield StoreUnderTest(config, catalogue, root)
    catalogue.close()


@pytest.fixture
def copies(tmp_path) -> Callable[[str], list[Path]]:
    """Give own copies of a series' files, to be changed by a test."""

    def get(name: str, folder: str = "in") -> list[Path]:
        target = tmp_path / folder
        target.mkdir(exist_ok=True)
        return [Path(shutil.copy(path, target / path.name)) for path in files_of(name)]

    return get


def edit(path: Path, change: Callable[[pydicom.Dataset], object]) -> None:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
