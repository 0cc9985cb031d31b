"""What other libraries read through the verified reader: zarr, fsspec, and those on top."""

from __future__ import annotations

import asyncio
import errno
import io
import multiprocessing
import os
import pickle
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import zarr
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.testing.store import StoreTests

from kakehashi.errors import BlockMismatchError, StoreError
from kakehashi.link import Store, ZarrStore
from kakehashi.link.fs import _SHARED
from kakehashi.link.manifest import NotInManifestError
from kakehashi.link.processstore import ProcessStore
from kakehashi.store.pack import pack_series
from tests.link.volumes import Cohort, uid, voxels

SHAPES = [(20, 40, 36), (40, 32, 40), (16, 48, 32)]
DATA = Path(__file__).parent.parent / "data"


@pytest.fixture
def cohort(tmp_path: Path) -> Iterator[Cohort]:
    cohort = Cohort(tmp_path, SHAPES)
    yield cohort
    cohort.close()


@pytest.fixture(autouse=True)
def views() -> Iterator[None]:
    # File systems of one session share their channels for as long as the process lives.
    yield
    for view in _SHARED.values():
        view.stores.close()
    _SHARED.clear()


@pytest.fixture
def fs(cohort: Cohort) -> Any:
    return fsspec.filesystem("kakehashi", session=cohort.path)


# --- zarr --------------------------------------------------------------------------------------


class Filled(ZarrStore):
    """The store of a pack that zarr's own tests can fill, behind the store's back."""

    cohort: Cohort

    async def set(self, key: str, value: Buffer) -> None:
        fill(self, key, value)


def fill(store: Filled, key: str, value: Buffer) -> None:
    cohort = store.cohort
    path = f"series/{uid(0)}.ozx"
    with zipfile.ZipFile(io.BytesIO(cohort.folder.contents[path])) as old:
        members = {name: old.read(name) for name in old.namelist()}
    cohort.folder.add(uid(0), zipped(members | {key: value.to_bytes()}))
    cohort.write()
    store._stores.close()
    store._stores = ProcessStore(cohort.path)


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.anyio
class TestZarrStore(StoreTests[Filled, cpu.Buffer]):
    """zarr's own tests of stores, as far as they are about reading."""

    store_cls = Filled
    buffer_cls = cpu.Buffer

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    def store_kwargs(self, cohort: Cohort) -> dict[str, Any]:
        cohort.folder.add(uid(0), zipped({}))
        cohort.write()
        Filled.cohort = cohort
        return {"uid": uid(0), "session": cohort.path}

    @pytest.fixture
    def store(self, open_kwargs: dict[str, Any]) -> Iterator[Filled]:
        store = asyncio.run(Filled.open(**open_kwargs))
        yield store
        store.close()

    @pytest.fixture
    def store_not_open(self, store_kwargs: dict[str, Any]) -> Iterator[Filled]:
        store = Filled(**store_kwargs)
        yield store
        store.close()

    async def set(self, store: Filled, key: str, value: Buffer) -> None:
        fill(store, key, value)

    async def get(self, store: Filled, key: str) -> Buffer:
        raise NotImplementedError

    def test_store_repr(self, store: Filled) -> None:
        assert repr(store) == f"ZarrStore('{uid(0)}')"

    def test_store_supports_writes(self, store: Filled) -> None:
        assert not store.supports_writes

    def test_store_supports_listing(self, store: Filled) -> None:
        assert store.supports_listing

    def test_store_read_only(self, store: Filled) -> None:
        assert store.read_only
        with pytest.raises(AttributeError):
            store.read_only = False  # type: ignore[misc]

    @pytest.mark.parametrize("operation", ["set", "delete"])
    async def test_read_only_store_raises(self, cohort: Cohort, operation: str) -> None:
        store = ZarrStore(uid(1), cohort.path)
        argument = (self.buffer_cls.from_bytes(b"x"),) if operation == "set" else ()
        with pytest.raises(ValueError, match="read-only mode"):
            await getattr(store, operation)("zarr.json", *argument)
        store.close()

    # What would write, or say that it can.
    test_clear = test_delete = test_delete_dir = None
    test_delete_nonexistent_key_does_not_raise = test_is_empty = None
    test_set = test_set_if_not_exists = test_set_many = test_set_not_open = None
    test_get_sync = test_get_sync_missing = test_set_sync = None
    test_delete_sync = test_delete_sync_missing = None
    test_store_open_read_only = test_with_read_only_store = None
    # It does what these two do in an event loop of its own, which is not in this one.
    test_get_bytes_sync = test_get_json_sync = None


@pytest.fixture
def series(cohort: Cohort) -> Iterator[ZarrStore]:
    store = ZarrStore(uid(1), cohort.path)
    yield store
    store.close()


def test_zarr_opens_a_packed_series(series: ZarrStore) -> None:
    group = zarr.open(series, mode="r")
    assert isinstance(group, zarr.Group)
    assert group.attrs["kakehashi"]["series"] == uid(1)
    np.testing.assert_array_equal(np.asarray(group["0"][:]), voxels(1, SHAPES[1]))
    np.testing.assert_array_equal(
        np.asarray(group["0"][3, 4:9, 5]), voxels(1, SHAPES[1])[3, 4:9, 5]
    )


def test_zarr_fetches_only_the_ranges_that_it_needs(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path, [(96, 256, 256)])
    store = ZarrStore(uid(0), cohort.path)
    array = zarr.open_array(store, path="0", mode="r")
    _ = array[0, :100, :100]
    size = len(cohort.folder.contents[f"series/{uid(0)}.ozx"])
    assert store._stores.get().stats().bytes < size / 3
    store.close()
    cohort.close()


def test_a_series_that_was_not_granted_or_was_changed_is_an_error_by_name(
    cohort: Cohort, series: ZarrStore
) -> None:
    with pytest.raises(NotInManifestError, match=r"9\.9"):
        ZarrStore("9.9", cohort.path)
    path = cohort.folder.root / f"series/{uid(1)}.ozx"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(BlockMismatchError, match=uid(1)):
        zarr.open(series, mode="r")


def test_zarr_writes_nothing(series: ZarrStore) -> None:
    for mode in ("w", "a"):
        with pytest.raises((ValueError, StoreError)):
            zarr.open_group(series, mode=mode).create_group("x")


def first_value(store: ZarrStore, answer: Any) -> None:
    array = zarr.open_array(store, path="0", mode="r")
    answer.put(int(array[3, 4, 5]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_goes_to_other_processes(series: ZarrStore, method: str) -> None:
    assert pickle.loads(pickle.dumps(series)) == series
    expected = int(voxels(1, SHAPES[1])[3, 4, 5])
    array = zarr.open_array(series, path="0", mode="r")
    assert int(array[3, 4, 5]) == expected
    context = multiprocessing.get_context(method)
    answer = context.Queue()
    child = context.Process(target=first_value, args=(series, answer))
    child.start()
    assert answer.get(timeout=30) == expected
    child.join(30)
    assert child.exitcode == 0
    assert int(array[3, 4, 6]) == int(voxels(1, SHAPES[1])[3, 4, 6])


def test_zarr_reads_on_through_resets(cohort: Cohort, series: ZarrStore) -> None:
    array = zarr.open_array(series, path="0", mode="r")
    for k in range(SHAPES[1][0]):
        cohort.broker.send(signal.SIGKILL)
        series._stores.get().reader._blocks.clear()
        np.testing.assert_array_equal(np.asarray(array[k]), voxels(1, SHAPES[1])[k])
    assert series._stores.get().stats().reconnects > 5


# --- fsspec ------------------------------------------------------------------------------------


def test_it_lists_what_the_manifest_names_without_the_link(cohort: Cohort, fs: Any) -> None:
    assert fs.ls("", detail=False) == ["manifest.json", "cohort.csv", "series", "nifti", "dicom"]
    before = cohort.broker.connections
    cohort.broker.send(signal.SIGSTOP)
    assert fs.ls("kakehashi://series", detail=False) == [f"series/{uid(n)}.ozx" for n in range(3)]
    assert fs.ls("nifti", detail=False) == [f"nifti/{uid(n)}.nii" for n in range(3)]
    assert fs.isdir(f"dicom/{uid(0)}")
    assert not fs.exists("dicom/9.9")
    assert not fs.exists("dicom/9.9/1.dcm")
    assert fs.size(f"series/{uid(0)}.ozx") == len(cohort.folder.contents[f"series/{uid(0)}.ozx"])
    assert fs.glob("series/*.ozx") == fs.ls("series", detail=False)
    assert cohort.broker.connections == before
    cohort.broker.send(signal.SIGCONT)


def test_files_are_those_of_the_store(cohort: Cohort, fs: Any) -> None:
    assert fs.cat("manifest.json") == Path(cohort.folder.manifest_path).read_bytes()
    path = f"series/{uid(0)}.ozx"
    data = cohort.folder.contents[path]
    assert fs.cat(path) == data
    assert fs.cat_file(path, 100, 200) == data[100:200]
    assert fs.tail(path, 50) == data[-50:]
    with fsspec.open(f"kakehashi://{path}", session=cohort.path) as file:
        file.seek(-22, os.SEEK_END)
        assert file.read() == data[-22:]
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
    with fsspec.open(
        f"zip://zarr.json::kakehashi://{path}", kakehashi={"session": cohort.path}
    ) as f:
        assert b"kakehashi" in f.read()


def test_pandas_reads_the_cohort(cohort: Cohort) -> None:
    table = pd.read_csv(
        "kakehashi://cohort.csv", storage_options={"session": cohort.path}, dtype={"uid": str}
    )
    assert list(table["uid"]) == cohort.uids
    assert list(table["slices"]) == [shape[0] for shape in SHAPES]


def test_nibabel_reads_a_volume(cohort: Cohort, fs: Any) -> None:
    with fs.open(f"nifti/{uid(1)}.nii") as file:
        image: Any = nibabel.Nifti1Image.from_stream(file)
        values = np.asarray(image.dataobj)
    np.testing.assert_array_equal(values, voxels(1, SHAPES[1]).transpose(2, 1, 0))
    with Store(cohort.path) as store:
        expected: Any = store.series(uid(1)).to_nibabel()
    # The format keeps it in single precision.
    np.testing.assert_allclose(image.affine, expected.affine, rtol=1e-6)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert fs.size(f"nifti/{uid(1)}.nii") == 352 + 4 * values.size
    whole = fs.cat(f"nifti/{uid(1)}.nii")
    for start, stop in ((0, 400), (340, 360), (5000, 90000), (len(whole) - 3, len(whole) + 9)):
        assert fs.cat_file(f"nifti/{uid(1)}.nii", start, stop) == whole[start:stop]


def test_pydicom_reads_the_images_as_they_were_received(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path / "cohort", [])
    sources = {}
    for pattern in ("ct_chest/*.dcm", "sts/MR_T1/image/*", "ct_enhanced/*.dcm"):
        files = sorted(DATA.glob(pattern))
        head = pydicom.dcmread(files[0], stop_before_pixels=True)
        out = tmp_path / "series.ozx"
        pack_series(files, out)
        cohort.folder.add(str(head.SeriesInstanceUID), out.read_bytes())
        for file in files:
            sop = str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID)
            sources[f"dicom/{head.SeriesInstanceUID}/{sop}.dcm"] = file.read_bytes()
    cohort.write()
    fs = fsspec.filesystem("kakehashi", session=cohort.path)
    found = [path for path in fs.find("dicom") if path.endswith(".dcm")]
    assert sorted(found) == sorted(sources)
    exact = 0
    for path, data in sources.items():
        assert fs.size(path) == len(data)
        if "NumberOfFrames" in pydicom.dcmread(io.BytesIO(data)):
            with pytest.raises(StoreError, match="frames in another order"):
                fs.cat(path)
            continue
        assert fs.cat(path) == data
        exact += 1
        with fs.open(path) as file:
            assert pydicom.dcmread(file).pixel_array.size
    assert exact == len(sources) - 1
    cohort.close()


def test_what_is_not_there_or_would_write_is_refused(fs: Any, tmp_path: Path) -> None:
    for path in ("series/9.9.ozx", "nifti/9.9.nii", f"dicom/{uid(0)}/9.dcm", "x", "nifti/x"):
        assert not fs.exists(path)
        with pytest.raises(FileNotFoundError):
            fs.cat_file(path)
    with pytest.raises(IsADirectoryError):
        fs.open("series")
    here = tmp_path / "x"
    here.write_bytes(b"x")
    attempts = (
        lambda: fs.open("x", "wb"),
        lambda: fs.pipe("x", b"data"),
        lambda: fs.rm(f"series/{uid(0)}.ozx"),
        lambda: fs.mv("manifest.json", "y"),
        lambda: fs.cp_file("manifest.json", "y"),
        lambda: fs.mkdir("z"),
        lambda: fs.makedirs("z"),
        lambda: fs.rmdir("series"),
        lambda: fs.touch("x"),
        lambda: fs.put_file(str(here), "x"),
        lambda: fs.copy("manifest.json", "y"),
        lambda: fs.put(str(here), "x"),
    )
    for attempt in attempts:
        with pytest.raises(OSError, match="read-only") as caught:
            attempt()
        assert caught.value.errno == errno.EROFS


def test_bytes_that_were_changed_at_the_store_are_never_given(cohort: Cohort, fs: Any) -> None:
    path = cohort.folder.root / f"series/{uid(0)}.ozx"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BlockMismatchError, match=uid(0)):
        fs.cat_file(f"series/{uid(0)}.ozx")
    with pytest.raises(BlockMismatchError, match=uid(0)):
        fs.cat_file(f"nifti/{uid(0)}.nii")


def read_all(session: Path, answer: Any) -> None:
    other = fsspec.filesystem("kakehashi", session=session)
    answer.put(other.cat(f"nifti/{uid(0)}.nii"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_have_their_own_channels(cohort: Cohort, fs: Any, method: str) -> None:
    expected = fs.cat(f"nifti/{uid(0)}.nii")
    _ = fs.ls(f"dicom/{uid(0)}")
    before = cohort.broker.connections
    context = multiprocessing.get_context(method)
    answer = context.Queue()
    child = context.Process(target=read_all, args=(cohort.path, answer))
    child.start()
    assert answer.get(timeout=60) == expected
    child.join(30)
    assert cohort.broker.connections > before
    assert fs.cat(f"series/{uid(1)}.ozx") == cohort.folder.contents[f"series/{uid(1)}.ozx"]
    assert pickle.loads(pickle.dumps(fs)).cat("manifest.json") == fs.cat("manifest.json")


def test_asking_in_an_event_loop_works(series: ZarrStore) -> None:
    async def cell() -> bytes:
        found = await series.get("zarr.json", default_buffer_prototype())
        assert found is not None
        return found.to_bytes()

    assert b"kakehashi" in asyncio.run(cell())
