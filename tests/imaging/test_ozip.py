"""The zip store: right bytes or an error, with few reads, whatever the file is."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from kakehashi.errors import StoreError
from kakehashi.imaging.ozip import FileReader, ZipStore, open_pack

PROTOTYPE = default_buffer_prototype()


class MemoryReader:
    """Bytes in memory; counts what is read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return self.data[offset : offset + length]


def make_zip(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def get(store: ZipStore, key: str, part=None) -> bytes | None:
    buffer = asyncio.run(store.get(key, PROTOTYPE, part))
    return None if buffer is None else buffer.to_bytes()


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0\\", exclude_categories=("Cs",)),
    min_size=1,
    max_size=20,
)
archives = st.dictionaries(names, st.binary(max_size=300), max_size=8)


@given(archives, st.data())
def test_members_and_their_parts_come_back(members, data):
    store = ZipStore(MemoryReader(make_zip(members)))
    assert list(store.names()) == list(members)
    assert get(store, "no such member") is None
    for name, content in members.items():
        assert get(store, name) == store.member(name) == content
        first = data.draw(st.integers(0, len(content)))
        last = data.draw(st.integers(first, len(content)))
        assert get(store, name, RangeByteRequest(first, last)) == content[first:last]
        assert get(store, name, OffsetByteRequest(first)) == content[first:]
        suffix = data.draw(st.integers(0, len(content) + 9))
        assert get(store, name, SuffixByteRequest(suffix)) == content[len(content) - suffix :] or (
            suffix >= len(content) and get(store, name, SuffixByteRequest(suffix)) == content
        )
        with pytest.raises(StoreError, match="asked for"):
            get(store, name, RangeByteRequest(0, len(content) + 1))


@given(archives, st.data())
def test_a_changed_byte_gives_the_right_bytes_or_an_error(members, data):
    raw = bytearray(make_zip(members))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        store = ZipStore(MemoryReader(bytes(raw)))
        found = {name: store.member(name) for name in store.names()}
    except StoreError:
        return
    # A changed name or a changed CRC of the directory alone is all that may differ.
    assert all(content in members.values() for content in found.values())


@given(archives, st.data())
def test_a_cut_file_is_an_error(members, data):
    raw = make_zip(members)
    with pytest.raises(StoreError):
        ZipStore(MemoryReader(raw[: data.draw(st.integers(0, len(raw) - 1))]))


@given(st.binary(max_size=400))
def test_any_bytes_are_an_error_not_a_crash(raw):
    with pytest.raises(StoreError):
        ZipStore(MemoryReader(raw))


def test_compressed_members_are_refused():
    with pytest.raises(StoreError, match="'a' is compressed"):
        ZipStore(MemoryReader(make_zip({"a": b"x" * 99}, zipfile.ZIP_DEFLATED)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members_are_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    with pytest.raises(StoreError, match="'a' is there twice"):
        ZipStore(MemoryReader(file.getvalue()))


def test_a_local_header_with_other_extra_fields_is_read_right():
    """The directory's extra fields may be others than those before the data."""
    name, content = b"a", b"content"
    extra = b"\x34\x12\x04\x00abcd"
    common = (20, 0, 0, 0, 33, zlib.crc32(content), len(content), len(content), len(name))
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", *common, len(extra)) + name + extra + content
    central = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, *common, 0, 0, 0, 0, 0, 0) + name
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local), 0)
    assert ZipStore(MemoryReader(local + central + end)).member("a") == content


def test_a_reader_that_gives_too_little_is_an_error():
    class Short(MemoryReader):
        def read(self, offset: int, length: int) -> bytes:
            return super().read(offset, length)[:-1]

    with pytest.raises(StoreError, match="short read"):
        ZipStore(Short(make_zip({"a": b"1"})))


def test_a_store_is_read_only():
    store = ZipStore(MemoryReader(make_zip({"a": b"1"})))
    with pytest.raises(StoreError, match="read-only"):
        asyncio.run(store.set("b", PROTOTYPE.buffer.from_bytes(b"2")))
    with pytest.raises(StoreError, match="read-only"):
        asyncio.run(store.delete("a"))


def test_listing_is_that_of_folders():
    store = ZipStore(MemoryReader(make_zip({"zarr.json": b"", "0/c/1": b"", "0/zarr.json": b""})))

    async def collect(iterator):
        return [name async for name in iterator]

    assert asyncio.run(collect(store.list_dir(""))) == ["zarr.json", "0"]
    assert asyncio.run(collect(store.list_dir("0"))) == ["c", "zarr.json"]
    assert asyncio.run(collect(store.list_prefix("0/c"))) == ["0/c/1"]


@pytest.fixture(scope="module")
def array_file(tmp_path_factory):
    """A sharded array in a zip, 64 MB of values that do not compress."""
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    values = np.random.default_rng(1).integers(-1000, 1000, (64, 512, 512), dtype=np.int16)
    with zarr.storage.ZipStore(path, mode="w") as store:
        zarr.create_array(
            store, name="0", data=values, chunks=(16, 256, 256), shards=(64, 512, 512)
        )
    return path, values


def test_a_slice_reads_a_small_part_of_the_file_once(array_file):
    path, values = array_file
    reader = MemoryReader(path.read_bytes())
    array = zarr.open_array(ZipStore(reader), path="0", mode="r")
    reader.reads.clear()
    assert np.array_equal(array[40], values[40])
    bytes_read = sum(length for _, length in reader.reads)
    assert bytes_read < reader.size / 3
    assert len(reader.reads) <= 8


def test_a_pickled_store_reads_on(array_file):
    path, values = array_file
    with FileReader(path) as reader:
        copy = pickle.loads(pickle.dumps(ZipStore(reader)))
    assert np.array_equal(zarr.open_array(copy, path="0", mode="r")[3], values[3])


def test_a_zip_that_is_no_pack_is_refused(array_file):
    path, _ = array_file
    with FileReader(path) as reader, pytest.raises(StoreError, match="not a packed series"):
        open_pack(reader)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"{", "broken"),
        (b"[]", "broken"),
        (b'{"attributes": {"kakehashi": {}}}', "broken"),
        (b'{"attributes": {"kakehashi": {"pack": 2}}}', "broken"),
        (b'{"attributes": {"kakehashi": {"pack": 3}}}', "format version 3"),
        (b'{"attributes": {"kakehashi": {"pack": [1]}}}', "format version"),
        (
            b"""{"attributes": {"kakehashi": {"pack": 1, "affine_lps": [[1]],
            "spacing_mm": [1, 1, 1], "rescale": {"slope": 1, "intercept": 0, "unit": ""}}}}""",
            "broken",
        ),
    ],
)
def test_a_pack_with_a_wrong_description_is_refused(document, reason):
    with pytest.raises(StoreError, match=reason):
        open_pack(MemoryReader(make_zip({"zarr.json": document})))


def test_a_missing_file_is_a_clear_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be opened"):
        FileReader(tmp_path / "none.ozx")


GRID = {
    "affine_lps": np.eye(4).tolist(),
    "spacing_mm": [1, 1, 1],
    "rescale": {"slope": 1, "intercept": 0, "unit": ""},
    "instances": [],
}


@pytest.mark.parametrize(
    "second", [7, None, "text", [], GRID | {"rescale": {}}, GRID | {"affine_lps": [[1]]}]
)
def test_a_volume_with_a_wrong_description_is_refused(second):
    meta = {"pack": 2, "series": "1", "modality": "MR", "volumes": 2, **GRID}
    document = {"attributes": {"kakehashi": meta | {"grids": [GRID, second]}}}
    raw = make_zip({"zarr.json": json.dumps(document).encode()})
    with pytest.raises(StoreError, match="broken"):
        open_pack(MemoryReader(raw)).volume(1)
    document["attributes"]["kakehashi"]["grids"][1] = GRID
    raw = make_zip({"zarr.json": json.dumps(document).encode()})
    assert open_pack(MemoryReader(raw)).volume(1).label == ()


def test_a_pack_that_lists_other_volumes_than_it_counts_is_refused():
    meta = {"pack": 2, "series": "1", "modality": "MR", **GRID, "grids": [GRID]}
    for count in (2, 0, None):
        document = {"attributes": {"kakehashi": meta | {"volumes": count}}}
        raw = make_zip({"zarr.json": json.dumps(document).encode()})
        with pytest.raises(StoreError, match="broken"):
            open_pack(MemoryReader(raw))
