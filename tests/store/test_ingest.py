"""Adding: complete or not at all, again without harm, nothing lost and nothing overwritten."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pydicom
import pytest

from kakehashi.errors import StoreError
from kakehashi.imaging.ozip import FileReader, open_pack
from kakehashi.store.ingest import Origin, add
from kakehashi.store.layout import damaged_blocks

from .conftest import DATA, StoreUnderTest, edit, files_of

ADD = """
import sys
from pathlib import Path
from kakehashi.config import Config
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.ingest import add
store = Config.model_validate({"store": {"root": sys.argv[1], "address": "x"}}).need_store()
add(store, Catalogue.open(store), [Path(a) for a in sys.argv[2:]])
"""


def series_of(path: Path) -> str:
    return str(pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID)


def check_whole(store: StoreUnderTest) -> None:
    """Every row has its whole pack, every pack its row, and no part lies about."""
    rows = store.catalogue.list_series()
    for row in rows:
        path = store.root / row.path
        assert damaged_blocks(path, row.blocks) == []
        assert path.stat().st_size == row.size
        with FileReader(path) as reader:
            pack = open_pack(reader)
            volumes = [pack.volume(number) for number in range(pack.volumes)]
            assert sum(volume.shape[0] for volume in volumes) == row.slices
            assert pack.shape[1:] == (row.rows, row.columns)
    assert sorted(store.files("*.ozx")) == sorted(row.path for row in rows)
    assert sorted(store.files("*.dcm")) == sorted(k.path for k in store.catalogue.list_kept())
    assert store.files("*.part") == []


def test_all_test_data_end_up_packed_or_kept_with_a_reason(store):
    report = store.add(DATA)
    check_whole(store)
    assert sorted((row.modality, row.slices, *row.flags) for row in report.packed) == [
        ("CT", 2),
        ("CT", 4, "tilted"),
        ("CT", 12),
        ("CT", 48),
        ("MR", 4, "spaced-slices"),
        ("MR", 35),
        ("PT", 18, "uneven-spacing"),
        ("PT", 48),
    ]
    reasons: dict[str, int] = {}
    for kept in store.catalogue.list_kept():
        assert (store.root / kept.path).stat().st_size == kept.size
        key = kept.reason.split(":")[0]
        reasons[key] = reasons.get(key, 0) + 1
    assert reasons.pop("not DICOM") >= 5
    assert reasons == {
        "RT Structure Set Storage": 3,
        "Secondary Capture Image Storage": 4,
        "Segmentation Storage": 4,
        "gap": 4,
        "localizer": 1,
        "two files have the same SOPInstanceUID and other content": 2,
    }


def test_facts_of_a_series_are_in_its_row(store):
    (row,) = store.add(DATA / "ct_chest", origin=Origin("F07", 2)).packed
    assert store.catalogue.series(row.series_uid) == row
    assert row.as_json() | {"path": "", "size": 0, "blocks": "", "added_at": ""} == {
        "series_uid": series_of(files_of("ct_chest")[0]),
        "study_uid": "1.3.6.1.4.1.14519.5.2.1.9203.8273.319461848560755521018609264462",
        "patient_id": "CRLM-CT-1004",
        "modality": "CT",
        "body_part": None,
        "facility": "F07",
        "tier": 2,
        "manufacturer": "GE MEDICAL SYSTEMS",
        "vendor": "GE",
        "model": "LightSpeed16",
        "kernel": "STANDARD",
        "description": "CT CH/AB/PEL",
        "study_date": "1994-11-22",
        "rows": 512,
        "columns": 512,
        "slices": 12,
        "volumes": 1,
        "usable_3d": False,
        "spacing_z": 5.0,
        "spacing_y": 0.796875,
        "spacing_x": 0.796875,
        "thickness": 5.0,
        "orientation": "axial",
        "kvp": 120.0,
        "exposure": 42.0,
        "contrast": True,
        "sex": "M",
        "age": 38.0,
        "transfer_syntax": "1.2.840.10008.1.2.1",
        "flags": [],
        "path": "",
        "size": 0,
        "blocks": "",
        "added_at": "",
    }


@pytest.mark.parametrize("what", ["CT", "MR_T1", "PET"])
def test_a_structure_set_is_linked_to_its_series(store, what):
    store.add(DATA / "sts")
    series = series_of(next((DATA / "sts" / what / "image").iterdir()))
    (kept,) = store.catalogue.kept_about_series(series)
    assert kept.modality == "RTSTRUCT"
    assert kept.refers_to == (series,)
    assert (store.root / kept.path).read_bytes() == (
        DATA / "sts" / what / "mask/RS.dcm"
    ).read_bytes()


def test_segmentations_are_linked_to_a_series_that_was_kept(store):
    store.add(DATA / "ct_tiny", DATA / "seg_tiny")
    about = store.catalogue.kept_about_series(series_of(DATA / "ct_tiny" / "17106"))
    assert sorted(kept.modality or "" for kept in about) == ["CT"] * 4 + ["SEG"] * 4


def test_an_object_that_names_instances_only_is_linked_to_their_series(store, copies, tmp_path):
    files = copies("ct_tilted")
    capture = Path(shutil.copy(DATA / "ct_tilted/secondary/I10", tmp_path / "in" / "capture"))
    wanted = pydicom.dcmread(files[0])

    def refer(dataset: pydicom.Dataset) -> None:
        item = pydicom.Dataset()
        item.ReferencedSOPClassUID = wanted.SOPClassUID
        item.ReferencedSOPInstanceUID = wanted.SOPInstanceUID
        dataset.SourceImageSequence = [item]

    edit(capture, refer)
    assert pydicom.dcmread(capture).StudyInstanceUID == wanted.StudyInstanceUID
    (kept,) = store.add(tmp_path / "in").kept
    assert kept.refers_to == (wanted.SeriesInstanceUID,)


def test_adding_again_changes_nothing(store):
    first = store.add(DATA)
    before = {name: (store.root / name).stat() for name in store.files()}
    again = store.add(DATA)
    assert again.packed == []
    assert sorted(again.unchanged) == sorted(row.series_uid for row in first.packed)
    assert {k.sha256 for k in again.kept} == {k.sha256 for k in first.kept}
    after = {name: (store.root / name).stat() for name in store.files()}
    assert {n: (s.st_ino, s.st_mtime_ns) for n, s in before.items()} == {
        n: (s.st_ino, s.st_mtime_ns) for n, s in after.items()
    }


def test_a_part_of_what_is_there_is_a_repetition_too(store):
    store.add(DATA / "ct_chest")
    report = store.add(files_of("ct_chest")[3])
    assert (report.packed, report.kept) == ([], [])
    assert len(report.unchanged) == 1


def test_other_content_under_the_same_uid_is_refused_and_kept(store, copies):
    store.add(*files_of("ct_chest"))
    (row,) = store.catalogue.list_series()
    pack = (store.root / row.path).read_bytes()
    files = copies("ct_chest")
    edit(files[2], lambda ds: setattr(ds, "PatientName", "Other^Content"))
    report = store.add(*files)
    (kept,) = report.kept
    assert "other content under the same UID is refused" in kept.reason
    assert (store.root / kept.path).read_bytes() == files[2].read_bytes()
    assert store.catalogue.list_series() == [row]
    assert (store.root / row.path).read_bytes() == pack
    assert store.add(*files).kept == [kept]
    check_whole(store)


def test_two_other_contents_under_one_uid_are_both_kept(store, copies):
    store.add(*files_of("ct_chest"))
    for name in ("One", "Two"):
        files = copies("ct_chest", name)
        edit(files[2], lambda ds, name=name: setattr(ds, "PatientName", name))
        store.add(files[2])
    assert len(store.files("*.dcm")) == 2
    check_whole(store)


def test_a_series_that_came_in_parts_is_packed_when_it_is_whole(store):
    files = files_of("ct_chest")
    store.add(*files[:4], *files[6:])
    assert [k.reason.split(":")[0] for k in store.catalogue.list_kept()] == ["gap"] * 10
    assert store.catalogue.list_series() == []
    report = store.add(*files[4:6])
    assert [row.slices for row in report.packed] == [12]
    assert store.catalogue.list_kept() == []
    check_whole(store)


def test_a_truncated_image_holds_its_series_back_until_it_comes_intact(store, copies):
    files = copies("ct_chest")
    whole = files[-1].read_bytes()
    files[-1].write_bytes(whole[: len(whole) // 2])
    report = store.add(*files)
    assert report.packed == []
    reasons = {kept.reason for kept in report.kept}
    assert len(reasons) == 2
    assert any(reason.startswith("truncated: ") for reason in reasons)
    assert any(
        reason.startswith("1 of 12 images of the series cannot be read") for reason in reasons
    )
    files[-1].write_bytes(whole)
    report = store.add(files[-1])
    assert [row.slices for row in report.packed] == [12]
    (kept,) = store.catalogue.list_kept()
    assert kept.reason.startswith("truncated: ")
    check_whole(store)


def test_an_image_cut_within_its_header_holds_its_series_back(store, copies):
    files = copies("ct_chest")
    files[0].write_bytes(files[0].read_bytes()[:2900])
    report = store.add(*files)
    assert report.packed == []
    assert len(report.kept) == 12
    check_whole(store)


def test_a_localizer_within_a_series_is_kept_and_the_rest_packed(store, copies):
    files = copies("ct_chest")

    def change(dataset: pydicom.Dataset) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    edit(files[-1], change)
    edit(files[-1], lambda ds: setattr(ds, "SOPInstanceUID", "1.2.3"))
    report = store.add(*files)
    assert [kept.reason for kept in report.kept] == ["localizer"]
    assert [row.slices for row in report.packed] == [11]
    assert store.catalogue.kept_about_series(report.packed[0].series_uid) == report.kept


def test_the_same_file_twice_is_one(store, copies, tmp_path):
    copies("ct_chest", "one")
    copies("ct_chest", "two")
    report = store.add(tmp_path / "one", tmp_path / "two")
    assert [row.slices for row in report.packed] == [12]
    assert report.kept == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_uid_that_is_a_path_stays_within_the_store(store, copies, tmp_path):
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        (file,) = copies("mr_rle", name)
        edit(file, lambda ds, name=name: setattr(ds, name, "../../../../escaped-uid"))
        (kept,) = store.add(file).kept
        assert name in kept.reason
        assert kept.path.startswith("kept/")
        assert ".." not in kept.path
    assert not list(tmp_path.parent.rglob("*escaped-uid*"))


def test_links_and_devices_are_not_followed(store, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link").symlink_to(files_of("mr_rle")[0])
    os.mkfifo(folder / "fifo")
    report = store.add(folder)
    assert sorted(path.name for path in report.skipped) == ["fifo", "link"]
    assert store.files() == []


def test_a_missing_source_is_a_clear_error(store, tmp_path):
    with pytest.raises(StoreError, match="nowhere is not there"):
        store.add(tmp_path / "nowhere")


def test_two_runs_at_once_are_refused(store):
    started, go_on = threading.Event(), threading.Event()

    class Waiting:
        def files(self, done: int, total: int) -> None:
            started.set()
            assert go_on.wait(60)

        def series(self, done: int, total: int) -> None: ...
        def slices(self, done: int, total: int) -> None: ...

    source = files_of("mr_rle")
    first = threading.Thread(
        target=add, args=(store.config.need_store(), store.catalogue, source, Waiting())
    )
    first.start()
    try:
        assert started.wait(60)
        with pytest.raises(StoreError, match="another process holds"):
            store.add(*source)
    finally:
        go_on.set()
        first.join(60)
    assert len(store.add(*source).unchanged) == 1


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 6, 12])
def test_an_interrupted_run_leaves_nothing_half_done(store, after):
    class Interrupting:
        def files(self, done: int, total: int) -> None: ...
        def series(self, done: int, total: int) -> None: ...

        def slices(self, done: int, total: int) -> None:
            if done == after:
                raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        add(store.config.need_store(), store.catalogue, files_of("ct_chest"), Interrupting())
    assert store.files() == []
    store.add(*files_of("ct_chest"))
    check_whole(store)


def killed_when(root: Path, condition) -> int:
    """Add the test data in a process of its own and kill it once the condition holds."""
    process = subprocess.Popen([sys.executable, "-c", ADD, str(root), str(DATA)])
    deadline = time.monotonic() + 60
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    return process.wait()


def test_a_killed_run_leaves_no_torn_pack_and_a_repetition_finishes(store):
    def part_of_a_pack() -> bool:
        return any(
            p.stat().st_size > 0 for p in store.root.glob("packs/*/*.ozx.part") if p.exists()
        )

    def packs(count: int):
        return lambda: len(list(store.root.glob("packs/*/*.ozx"))) >= count

    def kept() -> bool:
        return bool(list(store.root.glob("kept/*/*.dcm")))

    killed = []
    for condition in (part_of_a_pack, packs(1), packs(3), packs(5), kept):
        try:
            killed.append(killed_when(store.root, condition))
        except FileNotFoundError:  # the part was renamed between listing and looking
            killed.append(0)
        for row in store.catalogue.list_series():
            assert damaged_blocks(store.root / row.path, row.blocks) == []
        for path in store.root.glob("packs/*/*.ozx"):
            with FileReader(path) as reader:
                open_pack(reader).values()
    assert killed.count(-signal.SIGKILL) >= 4
    store.add(DATA)
    check_whole(store)
    assert len(store.catalogue.list_series()) == 8


def test_what_a_killed_run_left_of_another_series_is_tidied(store):
    store.add(*files_of("mr_rle"))
    for name in ("packs", "kept"):
        folder = store.root / name / "zz"
        folder.mkdir()
        (folder / "1.2.3.ozx.part").write_bytes(b"half")
    store.add(*files_of("mr_rle"))
    check_whole(store)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to a group")
def test_packs_are_closed_to_others(store):
    store.add(DATA / "mr_adc")
    for name in store.files("packs/*/*") + store.files("kept/*/*"):
        stat = (store.root / name).stat()
        assert stat.st_uid == 0
        assert stat.st_mode & 0o7777 == 0o640
    assert (store.root / "catalogue.sqlite").stat().st_mode & 0o7777 == 0o640
