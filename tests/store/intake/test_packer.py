"""Pixels are decoded by a process that can do nothing else, and its packs are looked at."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numcodecs
import pydicom
import pytest

from kakehashi.errors import PackError
from kakehashi.imaging.ozip import HEADERS_MEMBER, PREAMBLE_MEMBER
from kakehashi.session.processes import descendants
from kakehashi.store.dicom import read_instance
from kakehashi.store.intake import Packer, child, packer
from kakehashi.store.intake.channel import Message
from kakehashi.store.layout import blocks_path
from kakehashi.store.pack import pack_instances
from kakehashi.store.repack import packed_instances

from ..conftest import files_of
from .test_parser import assert_walled, threads

# Never skipped in CI, which is root.
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")


@pytest.fixture
def root() -> Iterator[Path]:
    """A store's root that another account can reach, as a real one's is."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "staging").mkdir(mode=0o700)
        yield Path(folder)


@pytest.fixture
def packing(root) -> Iterator[Packer]:
    made = Packer(root, "nobody" if os.geteuid() == 0 else None)
    yield made
    made.close()


@pytest.mark.parametrize("name", ["ct_chest", "mr_jpeg2000", "ct_enhanced"])
def test_a_pack_is_what_it_would_be_without_the_child(packing, root, name):
    instances = [read_instance(path) for path in files_of(name)]
    here, there = root / "here.ozx", root / "there.ozx"
    expected = pack_instances(instances, here)
    assert packing(instances, there) == expected
    assert there.read_bytes() == here.read_bytes()
    assert blocks_path(there).read_bytes() == blocks_path(here).read_bytes()
    assert there.stat().st_uid == os.geteuid()
    assert not [path for path in (root / "staging").rglob("*") if path.is_file()]


@as_root
def test_who_decodes_is_not_root_and_has_no_way_to_what_is_beside(packing, root, monkeypatch):
    seen = []
    end = child.Child.end

    def look(self) -> None:
        folder = root / "staging" / packer.FOLDER
        for pid in descendants(os.getpid()):
            assert_walled(pid)
            (uids,) = {tuple(status["Uid"].split()) for status in threads(pid)}
            assert "0" not in uids
            assert (folder.stat().st_uid, (folder / "in").stat().st_uid) == (0, 0)
            assert (folder / "out").stat().st_uid == int(uids[0])
            limits = Path(f"/proc/{pid}/limits").read_text()
            line = next(line for line in limits.splitlines() if line.startswith("Max file size"))
            soft, hard = line.split()[3:5]
            assert soft == hard
            assert int(hard) < 1 << 30
            seen.append(pid)
        end(self)

    monkeypatch.setattr(child.Child, "end", look)
    packing([read_instance(path) for path in files_of("mr_adc")], root / "a.ozx")
    assert len(seen) == 1


def test_who_packed_one_series_is_not_there_for_the_next(packing, root, instances):
    packing(instances, root / "a.ozx")
    assert list(descendants(os.getpid())) == []
    packing(instances, root / "b.ozx")
    assert (root / "b.ozx").read_bytes() == (root / "a.ozx").read_bytes()


@as_root
def test_a_mask_for_new_files_keeps_nothing_from_the_child(packing, root, instances):
    before = os.umask(0o077)
    try:
        assert packing(instances, root / "a.ozx").facts.slices == 4
    finally:
        os.umask(before)


def test_a_series_that_takes_all_memory_is_kept_with_the_reason(hospital, monkeypatch):
    monkeypatch.setattr(packer, "MEMORY", 16 << 20)
    monkeypatch.setattr(packer, "COPIES", 0)
    hospital.send(files_of("ct_chest"))
    hospital.intake().once()
    kept = hospital.catalogue.list_kept()
    assert len(kept) == 12
    for one in kept:
        assert one.reason.startswith("cannot be packed: ")
    assert hospital.waiting() == 0


def test_a_frame_that_says_it_is_enormous_costs_its_series_alone(hospital):
    huge = [pydicom.dcmread(path) for path in files_of("mr_jpeg2000")]
    for dataset in huge:
        dataset.Rows = dataset.Columns = 65535
    hospital.send([*huge, *files_of("mr_adc")])
    hospital.intake().once()
    assert [row.slices for row in hospital.catalogue.list_series()] == [4]
    assert {one.series_uid for one in hospital.catalogue.list_kept()} == {
        hospital.deidentifier.uid(str(huge[0].SeriesInstanceUID))
    }


def test_a_packing_that_dies_is_a_reason(packing, root, instances, monkeypatch):
    real = child.hear

    def hear(*arguments, **others):
        heard = real(*arguments, **others)
        for pid in descendants(os.getpid()):
            os.kill(pid, 9)
        return heard

    monkeypatch.setattr(child, "hear", hear)
    with pytest.raises(PackError, match="killed by SIGKILL"):
        packing(instances, root / "a.ozx")
    monkeypatch.undo()
    assert packing(instances, root / "a.ozx").facts.slices == 4


@pytest.fixture
def instances():
    return [read_instance(path) for path in files_of("mr_adc")]


@pytest.mark.parametrize("lie", [{"repeated": 1}, {"repeated": None}, {"refused": 1}])
def test_what_is_said_of_a_pack_is_not_believed(packing, root, instances, monkeypatch, lie):
    packing(instances, root / "a.ozx")
    monkeypatch.setattr(child.Child, "ask", lambda *_, **__: Message(lie, bytearray()))
    with pytest.raises(PackError, match="cannot be packed: what is said of it"):
        packing(instances, root / "b.ozx")
    assert not list(root.glob("b.*"))


def none(path: Path) -> None:
    path.unlink()


def other_bytes(path: Path) -> None:
    path.write_bytes(b"PK" + bytes(1000))


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def of_another_series(path: Path) -> None:
    path.unlink()
    pack_instances([read_instance(one) for one in files_of("ct_chest")], path)


def of_fewer_files(path: Path) -> None:
    path.unlink()
    pack_instances([read_instance(one) for one in files_of("mr_adc")[:3]], path)


def rewritten(path: Path, changes: dict[str, bytes]) -> None:
    """Write a pack anew with other members, or further ones."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()} | changes
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, content in members.items():
            new.writestr(name, content)


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def another_header(path: Path) -> None:
    """Change one byte of a header, with the hashes left as they are."""
    blob = bytes(numcodecs.Zstd().decode(members_of(path)[PREAMBLE_MEMBER]))
    changed = blob.replace(b"PT", b"CT").replace(b"MR", b"CT")
    assert changed != blob
    rewritten(path, {PREAMBLE_MEMBER: bytes(numcodecs.Zstd(level=9).encode(changed))})


def another_model(path: Path) -> None:
    rewritten(path, {HEADERS_MEMBER: bytes(numcodecs.Zstd().encode(b"[]"))})


def a_second_frame(path: Path) -> None:
    zeros = bytes(numcodecs.Zstd().encode(bytes(400 << 20)))
    rewritten(path, {PREAMBLE_MEMBER: members_of(path)[PREAMBLE_MEMBER] + zeros})


def a_large_description(path: Path) -> None:
    raw = members_of(path)["zarr.json"].rstrip()
    rewritten(path, {"zarr.json": raw[:-1] + b',"x":[' + b"{}," * 5_000_000 + b"{}]}"})


def another_place(path: Path) -> None:
    raw = json.loads(members_of(path)["zarr.json"])
    raw["attributes"]["kakehashi"]["affine_lps"][0][3] += 10.0
    rewritten(path, {"zarr.json": json.dumps(raw).encode()})


def a_member_more(path: Path) -> None:
    rewritten(path, {"0/c/0/0/99": b"x"})


def many_members(path: Path) -> None:
    rewritten(path, {f"{number:04d}" + "x" * 60_000: b"" for number in range(1000)})


def sparse(path: Path) -> None:
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    "change",
    [
        none,
        other_bytes,
        link,
        pipe,
        of_another_series,
        of_fewer_files,
        another_header,
        another_model,
        a_second_frame,
        a_large_description,
        another_place,
        a_member_more,
        many_members,
        sparse,
    ],
)
def test_a_pack_that_is_none_or_another_does_not_get_into_the_store(
    packing, root, instances, monkeypatch, change
):
    real = child.Child.ask
    path = root / "staging" / packer.FOLDER / "out" / "pack.ozx"

    def ask(self, *arguments, **others):
        said = real(self, *arguments, **others)
        change(path)
        return said

    monkeypatch.setattr(child.Child, "ask", ask)
    with pytest.raises(PackError, match=r"cannot be packed: .*pack"):
        packing(instances, root / "a.ozx")
    assert not list(root.glob("a.*"))
    assert not [path for path in (root / "staging").rglob("*") if path.is_file()]


def test_a_pack_that_was_only_written_in_another_way_is_taken(
    packing, root, instances, monkeypatch
):
    real = child.Child.ask

    def ask(self, *arguments, **others):
        said = real(self, *arguments, **others)
        rewritten(root / "staging" / packer.FOLDER / "out" / "pack.ozx", {})
        return said

    monkeypatch.setattr(child.Child, "ask", ask)
    assert packing(instances, root / "a.ozx").facts.slices == 4


def test_what_came_late_is_packed_with_the_pack_that_is_there(packing, root, instances):
    packing(instances, root / "whole.ozx")
    packing(instances[:3], root / "old.ozx")
    with packed_instances(root / "old.ozx") as before:
        packing([*before, instances[3]], root / "new.ozx")
    assert (root / "new.ozx").read_bytes() == (root / "whole.ozx").read_bytes()
