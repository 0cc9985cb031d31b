"""What a notebook gets: real series, packed, through a session's socket, verified."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from kakehashi import Store
from kakehashi.errors import BlockMismatchError, LinkClosedError, LinkError, SessionError
from kakehashi.imaging.ozip import FileReader, open_pack
from kakehashi.link.manifest import NotInManifestError
from kakehashi.store.pack import pack_series
from tests.lab.hosts import wait_for
from tests.link.stores import Broker, StoreFolder

DATA = Path(__file__).parent.parent / "data"
SOURCES = {
    "ct_chest": "ct_chest/*.dcm",
    "ct_tilted": "ct_tilted/axial/*",
    "pet": "pet_uneven/*.dcm",
    "mr": "sts/MR_T1/image/*",
}


class Session:
    """A session's files and socket over a store with real series."""

    def __init__(self, base: Path) -> None:
        self.folder = StoreFolder(base / "store")
        self.uids: dict[str, str] = {}
        self.files: dict[str, list[Path]] = {}
        self.broker = Broker(base / "store.sock")
        self.path = base / "session.json"

    def add(self, name: str, packed: bytes, files: list[Path], **row: Any) -> None:
        head = pydicom.dcmread(files[0], stop_before_pixels=True)
        self.uids[name] = str(head.SeriesInstanceUID)
        self.files[name] = files
        self.folder.add(self.uids[name], packed, modality=str(head.Modality), **row)

    def write(self, **changes: Any) -> Path:
        self.path.write_text(
            json.dumps(
                {
                    "session": "ab" * 16,
                    "person": "hanako",
                    "project": "lung",
                    "site": "slurm",
                    "ends_at": "2031-01-31T12:00:00Z",
                    "manifest": {
                        "path": self.folder.manifest_path,
                        "sha256": self.folder.sha256,
                    },
                    "view": "/store",
                    "work": "/work",
                    "socket": str(self.broker.path),
                    "work_socket": "/run/kakehashi/work.sock",
                    "software": "0.1.0",
                }
                | changes
            ),
            encoding="utf-8",
        )
        return self.path


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, list[Path]]]:
    made = {}
    for name, pattern in SOURCES.items():
        files = sorted(DATA.glob(pattern))
        out = tmp_path_factory.mktemp(name) / "series.ozx"
        pack_series(files, out)
        made[name] = (out.read_bytes(), files)
    return made


@pytest.fixture
def session(tmp_path: Path, packs: dict[str, tuple[bytes, list[Path]]]) -> Iterator[Session]:
    session = Session(tmp_path)
    for name, (data, files) in packs.items():
        session.add(
            name, data, files, description=f"胸部 <b>{name}</b>", rows=7, columns=8, slices=9
        )
    session.write()
    yield session
    session.broker.close()


@pytest.fixture
def store(session: Session) -> Iterator[Store]:
    with Store(session=session.path) as store:
        yield store


def slices_of(files: list[Path]) -> dict[str, pydicom.Dataset]:
    return {str(ds.SOPInstanceUID): ds for ds in map(pydicom.dcmread, files)}


@pytest.mark.parametrize("name", list(SOURCES))
def test_array_and_affine_are_those_of_the_dicom_files(
    session: Session, store: Store, name: str
) -> None:
    series = store.series(session.uids[name])
    sources = slices_of(session.files[name])
    headers = series.headers()
    assert series.array.shape == series.shape == (len(headers), *series.array.shape[1:])
    for k, header in enumerate(headers):
        source = sources[str(header.SOPInstanceUID)]
        expected = source.pixel_array * float(getattr(source, "RescaleSlope", 1)) + float(
            getattr(source, "RescaleIntercept", 0)
        )
        np.testing.assert_array_equal(series.array[k], expected.astype(np.float32))
        assert "PixelData" not in header
        assert header.PatientID == source.PatientID
    # The corner voxel of the first slice, and one step along row and column, by the standard.
    first = sources[str(headers[0].SOPInstanceUID)]
    orientation = np.array(first.ImageOrientationPatient, dtype=float)
    rows, columns = (float(value) for value in first.PixelSpacing)
    corner = series.affine @ [0, 0, 0, 1]
    np.testing.assert_allclose(corner[:3], np.array(first.ImagePositionPatient, float), atol=0.05)
    np.testing.assert_allclose(series.affine[:3, 0], orientation[:3] * columns, atol=1e-4)
    np.testing.assert_allclose(series.affine[:3, 1], orientation[3:] * rows, atol=1e-4)
    last = sources[str(headers[-1].SOPInstanceUID)]
    end = series.affine @ [0, 0, len(headers) - 1, 1]
    np.testing.assert_allclose(end[:3], np.array(last.ImagePositionPatient, float), atol=0.1)
    assert series.spacing[1:] == pytest.approx((rows, columns))


def test_parts_equal_the_whole(session: Session, store: Store) -> None:
    for name in ("ct_chest", "pet"):
        series = store.series(session.uids[name])
        whole = series.array
        slices, rows, columns = whole.shape
        np.testing.assert_array_equal(series.slice(2), whole[2])
        np.testing.assert_array_equal(series.slice(-1), whole[-1])
        box = ((1, 3), (5, rows - 3), (2, columns - 7))
        np.testing.assert_array_equal(series.crop(*box), whole[1:3, 5 : rows - 3, 2 : columns - 7])
        np.testing.assert_array_equal(series.crop(z=(0, 1)), whole[:1])
        for wrong in ((0, slices + 1), (-1, 2), (2, 2)):
            with pytest.raises(IndexError, match="the series has shape"):
                series.crop(z=wrong)
        with pytest.raises(IndexError, match=f"slices 0 to {slices - 1}"):
            series.slice(slices)


def test_a_box_reads_a_part_of_the_file_only(session: Session, store: Store) -> None:
    series = store.series(session.uids["ct_chest"])
    size = len(session.folder.contents[f"series/{series.uid}.ozx"])
    series.crop(y=(0, 100), x=(0, 100))
    part = store.stats().bytes
    assert part < size * 0.6
    _ = series.array
    assert store.stats().bytes > part


def test_nibabel_gets_the_same_voxels_at_the_same_places(session: Session, store: Store) -> None:
    series = store.series(session.uids["ct_tilted"])
    image: Any = series.to_nibabel()
    values = np.asarray(image.dataobj)
    assert values[3, 5, 1] == series.array[1, 5, 3]
    voxel = np.array([3, 5, 1, 1])
    x, y, z, _ = series.affine @ voxel
    np.testing.assert_allclose((image.affine @ voxel)[:3], [-x, -y, z])
    np.testing.assert_allclose(image.affine, series.affine_ras)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_the_store_says_who_and_what(session: Session, store: Store) -> None:
    assert (store.project, store.person) == ("lung", "hanako")
    assert len(store.cohort) == len(SOURCES)
    assert [series.uid for series in store.cohort] == list(session.uids.values())
    assert store.cohort[-1].uid == store.cohort[1:][-1].uid
    assert store.cohort.version == 1
    assert "4 series" in repr(store)
    assert "4 series" in repr(store.cohort)
    series = store.cohort[0]
    assert series.uid in repr(series)
    assert series.path == Path(f"/store/series/{series.uid}.ozx")
    assert series.unit == "HU"
    assert store.table()[0]["uid"] == series.uid
    assert store.table()[0]["modality"] == "CT"
    changed = series.affine
    changed[0, 0] = 99
    assert series.affine[0, 0] != 99


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_table_in_a_notebook_is_escaped_and_keeps_japanese(store: Store) -> None:
    cells = Cells()
    cells.feed(store.cohort._repr_html_())
    assert set(cells.tags) <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert "胸部 <b>ct_chest</b>" in cells.text
    assert "8 x 7 x 9" in cells.text
    assert cells.tags.count("tr") == 1 + len(SOURCES)


def test_without_a_mounted_view_a_series_has_pixels_and_no_path(session: Session) -> None:
    with Store(session=session.write(view=None, work=None)) as store:
        series = store.series(session.uids["mr"])
        assert series.slice(0).shape == series.shape[1:]
        with pytest.raises(SessionError, match="no mounted view"):
            _ = series.path


def test_the_table_of_a_long_cohort_is_cut_and_says_so(tmp_path: Path) -> None:
    session = Session(tmp_path)
    for number in range(60):
        session.folder.contents[f"series/1.{number}.ozx"] = b""
        session.folder.rows[f"series/1.{number}.ozx"] = {}
    (session.folder.root / "series").mkdir(parents=True)
    for path in session.folder.contents:
        (session.folder.root / path).with_suffix(".blocks").write_bytes(b"")
    session.folder.publish()
    with Store(session.write()) as store:
        assert "and 10 more" in store.cohort._repr_html_()
    session.broker.close()


def test_a_series_that_waits_for_its_bytes_holds_up_no_other(
    session: Session, store: Store, tmp_path_factory: pytest.TempPathFactory
) -> None:
    uid = session.uids["ct_chest"]
    silent = Broker(tmp_path_factory.mktemp("silent") / "store.sock", ["/bin/sleep", "1000"])
    path = session.write(socket=str(silent.path))
    try:
        with (
            Store(path, manifest=store.reader.manifest) as hanging,
            ThreadPoolExecutor() as threads,
        ):
            waiting = threads.submit(lambda: hanging.series(uid).array)
            wait_for("it to ask", lambda: hanging.reader._pool.pulse(0).asked)
            read = threads.submit(lambda: store.series(uid).array)
            assert read.result(timeout=30).shape == store.series(uid).shape
            assert not waiting.done(), "the control: it does wait"
            hanging.close()
            with pytest.raises(LinkClosedError):
                waiting.result(timeout=30)
    finally:
        silent.close()


def test_a_series_outside_of_the_cohort_is_refused(store: Store) -> None:
    for uid in ("9.9.9", "../manifest", ""):
        with pytest.raises(NotInManifestError, match="not in this session's cohort"):
            store.series(uid)


def test_a_pack_changed_at_the_store_is_never_shown(session: Session, store: Store) -> None:
    uid = session.uids["ct_chest"]
    file = session.folder.root / f"series/{uid}.ozx"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert open_pack(FileReader(file)), "the pack still opens: only the hashes know"
    with pytest.raises(BlockMismatchError):
        _ = store.series(uid).array


def test_it_works_inside_a_running_event_loop(session: Session, store: Store) -> None:
    async def cell() -> float:
        return float(store.series(session.uids["ct_chest"]).slice(0).mean())

    assert asyncio.run(cell()) == pytest.approx(
        store.series(session.uids["ct_chest"]).array[0].mean(), rel=1e-5
    )


def test_outside_of_a_session_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="only available inside a Kakehashi session"):
        Store(session=tmp_path / "session.json")


def test_another_endpoint_of_the_store_takes_over(session: Session, tmp_path: Path) -> None:
    second = Broker(tmp_path / "second.sock")
    missing = str(tmp_path / "missing.sock")
    path = session.write(replicas=[missing, str(second.path)])
    session.broker._command = ["/bin/false"]
    with contextlib.closing(second), Store(session=path) as store:
        series = store.series(session.uids["ct_chest"])
        assert series.read_packed() == session.folder.contents[f"series/{series.uid}.ozx"]
        assert [one.bytes > 0 for one in store.stats().replicas] == [False, False, True]


def test_after_the_session_it_says_so(session: Session) -> None:
    session.broker.close()
    with pytest.raises(LinkClosedError, match="the session has ended"):
        Store(session=session.path)


def test_another_manifest_than_the_grants_is_refused(session: Session) -> None:
    manifest = Path(session.folder.manifest_path)
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(LinkError, match="the grant names"):
        Store(session=session.path)
