"""Pixels are decoded by a process that can do nothing else, and its packs are looked at."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest

from kakehashi.errors import PackError
from kakehashi.session.processes import descendants
from kakehashi.store.dicom import read_instance
from kakehashi.store.intake import Packer, child, packer
from kakehashi.store.intake.channel import Message
from kakehashi.store.layout import blocks_path
from kakehashi.store.pack import pack_instances

from ..conftest import files_of
from .test_parser import assert_walled, threads

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
def test_who_decodes_is_not_root_and_has_no_way_to_what_is_beside(packing, root):
    packing([read_instance(path) for path in files_of("mr_adc")], root / "a.ozx")
    (pid,) = descendants(os.getpid())
    assert_walled(pid)
    (uids,) = {tuple(status["Uid"].split()) for status in threads(pid)}
    assert "0" not in uids
    folder = root / "staging" / packer.FOLDER
    assert (folder.stat().st_uid, (folder / "in").stat().st_uid) == (0, 0)
    assert (folder / "out").stat().st_uid == int(uids[0])


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


def test_a_packing_that_dies_is_started_anew(packing, root):
    instances = [read_instance(path) for path in files_of("mr_adc")]
    first = packing(instances, root / "a.ozx")
    (pid,) = descendants(os.getpid())
    os.kill(pid, 9)
    assert packing(instances, root / "b.ozx") == first


@pytest.fixture
def instances():
    return [read_instance(path) for path in files_of("mr_adc")]


@pytest.mark.parametrize(
    "lie",
    [
        {"series_uid": "1.2.3"},
        {"patient_id": "another"},
        {"slices": "4"},
        {"slices": -1},
        {"slices": 1 << 40},
        {"usable_3d": 1},
        {"spacing_z": float("nan")},
        {"modality": None},
        {"modality": "a\0b"},
        {"modality": "\ud800"},
        {"description": "x" * 10_000},
        {"study_date": "tomorrow"},
        {"flags": "tilted"},
        {"path": "../../etc"},
    ],
)
def test_what_is_said_of_a_pack_is_not_believed(packing, root, instances, monkeypatch, lie):
    real = child.Child.ask
    packing(instances, root / "a.ozx")

    def ask(self, *arguments, **others):
        said = real(self, *arguments, **others)
        return Message(said.facts | {"facts": said.facts["facts"] | lie}, said.content)

    monkeypatch.setattr(child.Child, "ask", ask)
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


@pytest.mark.parametrize(
    "change", [none, other_bytes, link, pipe, of_another_series, of_fewer_files]
)
def test_a_pack_that_is_none_or_another_does_not_get_into_the_store(
    packing, root, instances, monkeypatch, change
):
    real = child.Child.ask

    def ask(self, *arguments, **others):
        said = real(self, *arguments, **others)
        change(root / "staging" / packer.FOLDER / "out" / "pack.ozx")
        return said

    monkeypatch.setattr(child.Child, "ask", ask)
    with pytest.raises(PackError, match=r"cannot be packed: .*pack"):
        packing(instances, root / "a.ozx")
    assert not list(root.glob("a.*"))
    assert not [path for path in (root / "staging").rglob("*") if path.is_file()]
