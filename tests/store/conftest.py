"""A store in a temporary folder, and real series to put into it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
import sqlalchemy as sa

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


def program(name: str) -> str | None:
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), Path("/usr/local/bin")]
    return shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)


@pytest.fixture(scope="session")
def postgresql():
    """URL of a PostgreSQL of our own, on a socket in a temporary folder."""
    psycopg = pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    initdb, postgres = program("initdb"), program("postgres")
    if initdb is None or postgres is None:
        # scripts/install.sh has it; other Linux machines may not.
        pytest.skip("PostgreSQL is not installed")
    who = {}
    # Not under pytest's folder: other users cannot pass through that, and runs of pytest at
    # the same time tidy it.
    with tempfile.TemporaryDirectory(prefix="kakehashi-pg-") as folder:
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        data = f"{folder}/data"
        subprocess.run(
            [initdb, "-D", data, "-U", "test", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            **who,
        )
        with Path(folder, "log").open("wb") as log:
            options = ["-c", "listen_addresses=", "-c", "fsync=off"]
            server = subprocess.Popen(
                [postgres, "-D", data, "-k", folder, *options], cwd=folder, stderr=log, **who
            )
        try:
            deadline = time.monotonic() + 60
            while True:
                assert server.poll() is None, Path(folder, "log").read_text()
                try:
                    psycopg.connect(host=folder, user="test", dbname="postgres").close()
                    break
                except psycopg.OperationalError:
                    assert time.monotonic() < deadline, Path(folder, "log").read_text()
            yield f"postgresql+psycopg://test@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGQUIT)  # its immediate shutdown
            server.wait(60)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """Settings of a store on each of the databases, empty."""
    root = tmp_path / "root"
    root.mkdir()
    if request.param == "sqlite":
        return Config.model_validate(settings(root))
    url = request.getfixturevalue("postgresql")
    config = Config.model_validate(settings(root, database=url))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return config


@pytest.fixture
def catalogue(database):
    opened = Catalogue.open(database.need_store())
    yield opened
    opened.close()
