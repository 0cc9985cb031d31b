"""What lies in a pack is enough to make it again, and with more images what all of them give."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest

from kakehashi.errors import PackError
from kakehashi.store.dicom import read_instance
from kakehashi.store.pack import pack_instances, pack_series
from kakehashi.store.repack import packed_instances

from .conftest import SERIES, files_of
from .made import Slice, item, write, write_frames
from .test_pack import position


@pytest.mark.parametrize("name", sorted(SERIES))
def test_from_a_pack_the_same_pack_can_be_made_again(packed, tmp_path, name):
    series = packed(name)
    out = tmp_path / "again.ozx"
    with packed_instances(series.path) as instances:
        info = pack_instances(instances, out)
    assert out.read_bytes() == series.path.read_bytes()
    assert info == series.info


@pytest.mark.parametrize("name", ["ct_chest", "mr_adc"])
def test_a_part_from_a_pack_and_the_rest_from_files_give_what_all_files_give(
    packed, tmp_path, name
):
    whole = packed(name)
    files = sorted(files_of(name), key=position)
    part, out = tmp_path / "part.ozx", tmp_path / "late.ozx"
    for first in (files[: len(files) // 2], files[::-1][:2], files[::-1][:-1]):
        pack_series(first, part)
        rest = [read_instance(path) for path in files if path not in first]
        with packed_instances(part) as instances:
            info = pack_instances([*rest, *instances], out)
        assert out.read_bytes() == whole.path.read_bytes()
        assert info == whole.info


def phases(count: int, *, seeds: tuple[int, ...]) -> list[Slice]:
    return [
        Slice(
            k=k, seed=seed, attributes={"AcquisitionNumber": seed, "RescaleSlope": 1.0 + k + seed}
        )
        for seed in seeds
        for k in range(count)
    ]


def test_volumes_and_rescales_of_single_slices_come_back_from_a_pack(tmp_path):
    files = write(tmp_path / "in", phases(20, seeds=(1, 2, 3)))
    info = pack_series(files, tmp_path / "whole.ozx")
    assert info.facts.volumes == 3
    # A volume of its own at first, then one of three; slices lie in two rows of chunks.
    pack_series(files[20:40], tmp_path / "part.ozx")
    rest = [read_instance(path) for path in [*files[:20], *files[40:]]]
    with packed_instances(tmp_path / "part.ozx") as instances:
        assert pack_instances([*instances, *rest], tmp_path / "late.ozx") == info
    assert (tmp_path / "late.ozx").read_bytes() == (tmp_path / "whole.ozx").read_bytes()


def test_frames_of_one_image_come_back_from_a_pack(tmp_path):
    def groups(image: Slice, frame) -> None:
        frame.MREchoSequence = [item(EffectiveEchoTime=float(image.seed))]

    # The frames of two volumes take turns, so that order alone does not say where one is.
    slices = [Slice(k=k, seed=seed) for k in range(5) for seed in (1, 2)]
    path = write_frames(tmp_path / "0.dcm", slices, groups)
    info = pack_series([path], tmp_path / "x.ozx")
    assert info.facts.volumes == 2
    with packed_instances(tmp_path / "x.ozx") as (instance,):
        assert instance.pixel_bytes() == b"".join(one.pixels.tobytes() for one in slices)
        pack_instances([instance], tmp_path / "again.ozx")
    assert (tmp_path / "again.ozx").read_bytes() == (tmp_path / "x.ozx").read_bytes()


def test_an_instance_from_a_pack_can_go_to_another_process(packed):
    series = packed("mr_adc")
    with packed_instances(series.path) as instances:
        there = pickle.loads(pickle.dumps(instances))
        for one, other in zip(there, instances, strict=True):
            assert np.array_equal(one.stored(0), other.stored(0))
            assert one.sha256 == other.sha256


def test_a_pack_that_would_be_divided_in_another_way_today_is_not_taken_apart(packed, tmp_path):
    series = packed("mr_adc")
    other = tmp_path / "x.ozx"
    with zipfile.ZipFile(series.path) as archive, zipfile.ZipFile(other, "w") as out:
        for info in archive.infolist():
            data = archive.read(info)
            if info.filename == "zarr.json":
                data = data.replace(b'"volumes": 1', b'"volumes": 1, "label": []')
                assert b"label" in data
            out.writestr(info.filename, data)
    with (
        pytest.raises(PackError, match="not be divided as it is in its pack"),
        packed_instances(other),
    ):
        pass


def test_damaged_voxels_are_not_packed_again(packed, tmp_path):
    series = packed("ct_chest")
    with zipfile.ZipFile(series.path) as archive:
        info = archive.getinfo("0/c/0/0/0")
    raw = bytearray(series.path.read_bytes())
    raw[info.header_offset + 5000] ^= 1
    broken = tmp_path / "x.ozx"
    broken.write_bytes(raw)
    with (
        packed_instances(broken) as instances,
        pytest.raises(PackError, match="damaged"),
    ):
        pack_instances(instances, tmp_path / "again.ozx")
    assert not (tmp_path / "again.ozx").exists()
