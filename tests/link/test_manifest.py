"""Parsing and fetching the manifest."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakehashi.errors import BlockMismatchError, LinkClosedError, LinkError
from kakehashi.link import Manifest
from kakehashi.link.manifest import NotInManifestError
from tests.link.stores import Server, StoreFolder

ROW = {"path": "series/1.2.3.ozx", "size": 5, "blocks": "a" * 64, "series": {"modality": "CT"}}
GOOD: dict[str, Any] = {
    "kakehashi_manifest": 1,
    "project": "lung",
    "cohort": {"version": 1, "sha256": "b" * 64},
    "block_size": 131072,
    "files": [ROW],
}


def parse(value: object) -> Manifest:
    raw = json.dumps(value).encode()
    return Manifest.parse(raw, hashlib.sha256(raw).hexdigest())


def test_a_good_manifest_says_what_there_is() -> None:
    manifest = parse(GOOD)
    assert (manifest.project, manifest.block_size) == ("lung", 131072)
    entry = manifest.entry("series/1.2.3.ozx")
    assert (entry.uid, entry.size, entry.series["modality"]) == ("1.2.3", 5, "CT")
    assert entry.blocks_path == "series/1.2.3.blocks"
    with pytest.raises(NotInManifestError, match="not in this session's manifest"):
        manifest.entry("series/1.2.4.ozx")
    with pytest.raises(TypeError):
        entry.series["modality"] = "MR"  # type: ignore[index]


def test_another_hash_is_refused_before_anything_is_parsed() -> None:
    with pytest.raises(BlockMismatchError, match="the grant names"):
        Manifest.parse(b"not even JSON", "0" * 64)


@pytest.mark.parametrize(
    "path",
    [
        "series/../1.2.ozx",
        "../series/1.2.ozx",
        "/series/1.2.ozx",
        "series//1.2.ozx",
        "series/1.2.ozx\n",
        "series/1.2.ozx/..",
        "series/a.ozx",
        "series/.ozx",
        "series/1..2.ozx",
        "series/1.2.blocks",
        "series/" + "1" * 65 + ".ozx",
        "series/1.2\0.ozx",
        "manifest.json",
        "",
        None,
        5,
    ],
)
def test_a_path_that_is_not_a_series_is_refused(path: object) -> None:
    with pytest.raises(LinkError, match=r"files\[0\]\.path"):
        parse(GOOD | {"files": [ROW | {"path": path}]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", -1),
        ("size", 1.5),
        ("size", True),
        ("size", "5"),
        ("size", 2**60),
        ("blocks", "A" * 64),
        ("blocks", "a" * 63),
        ("blocks", None),
        ("series", None),
        ("series", []),
    ],
)
def test_an_impossible_field_of_a_file_is_refused(key: str, value: object) -> None:
    with pytest.raises(LinkError, match=rf"files\[0\]\.{key}"):
        parse(GOOD | {"files": [ROW | {key: value}]})


@pytest.mark.parametrize(
    "change",
    [
        {"kakehashi_manifest": 2},
        {"project": None},
        {"cohort": None},
        {"block_size": 0},
        {"block_size": 131073},
        {"block_size": True},
        {"files": {}},
        {"files": [5]},
    ],
)
def test_an_impossible_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LinkError, match="manifest"):
        parse(GOOD | change)


def test_a_path_that_stands_there_twice_is_refused() -> None:
    with pytest.raises(LinkError, match="twice"):
        parse(GOOD | {"files": [ROW, ROW]})


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    st.one_of(
        st.binary(max_size=80),
        _json.map(lambda value: json.dumps(value).encode()),
        st.builds(
            lambda key, value: json.dumps(GOOD | {key: value}).encode(),
            st.sampled_from(sorted(GOOD)),
            _json,
        ),
        st.builds(
            lambda key, value: json.dumps(GOOD | {"files": [ROW | {key: value}]}).encode(),
            st.sampled_from(sorted(ROW)),
            _json,
        ),
    )
)
def test_any_text_is_a_manifest_or_an_error(raw: bytes) -> None:
    try:
        manifest = Manifest.parse(raw, hashlib.sha256(raw).hexdigest())
    except LinkError:
        return
    for path, entry in manifest.files.items():
        assert path == f"series/{entry.uid}.ozx"
        assert ".." not in path
        assert entry.size >= 0


def test_a_hundred_thousand_files_are_read_in_seconds() -> None:
    row = {"modality": "CT", "description": "胸部 単純", "manufacturer": "x", "rows": 512}
    files = [ROW | {"path": f"series/1.2.{n}.ozx", "series": row} for n in range(100_000)]
    raw = json.dumps(GOOD | {"files": files}).encode()
    sha256 = hashlib.sha256(raw).hexdigest()
    started = time.monotonic()
    assert len(Manifest.parse(raw, sha256).files) == 100_000
    assert time.monotonic() - started < 30, "on a busy machine; about 1 s on an idle one"


def test_it_is_fetched_from_the_store(folder: StoreFolder, server: Server) -> None:
    for number in range(200):
        folder.add(f"1.2.{number}", b"x", description="胸部" * 500)
    manifest = Manifest.fetch(server, folder.manifest_path, folder.sha256)
    assert len(manifest.raw) > 255 * 1024 * 2, "more than one read"
    assert manifest.raw == Path(folder.manifest_path).read_bytes()
    assert len(manifest.files) == 200


def test_a_cut_while_it_is_fetched_shows_as_nothing(folder: StoreFolder) -> None:
    for number in range(100):
        folder.add(f"1.2.{number}", b"x", description="x" * 5000)

    def cut(channel: int, at: int, piece: bytes) -> bytes | None:
        return None if channel < 2 and at > 100_000 else piece

    with closing(Server(cut)) as server:
        assert len(Manifest.fetch(server, folder.manifest_path, folder.sha256).files) == 100
        assert server.opened == 3


def test_a_missing_manifest_is_named(folder: StoreFolder, server: Server) -> None:
    with pytest.raises(LinkError, match="no manifest"):
        Manifest.fetch(server, folder.manifest_path, "0" * 64)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(LinkClosedError("over"), LinkClosedError), (ConnectionRefusedError(), LinkError)],
)
def test_a_store_out_of_reach_is_an_error_in_the_end(
    failure: Exception, expected: type[Exception]
) -> None:
    def connect() -> socket.socket:
        raise failure

    fetch: Callable[[], object] = lambda: Manifest.fetch(  # noqa: E731 - one call, under raises
        connect, "/manifest.json", "0" * 64, give_up_s=0.2
    )
    with pytest.raises(expected):
        fetch()
