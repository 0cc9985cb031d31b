"""Volumes of one series come apart right, or the series is refused with the reason."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from kakehashi.errors import PackError, StoreError
from kakehashi.imaging.geometry import to_patient
from kakehashi.imaging.ozip import FileReader, Pack, open_pack
from kakehashi.store.catalogue import SeriesFacts
from kakehashi.store.pack import pack_series

from .conftest import edit, files_of
from .made import AXIAL, CORONAL, SAGITTAL, Slice, item, stack, write, write_frames


def opened(files: list[Path], out: Path) -> tuple[SeriesFacts, Pack]:
    facts = pack_series(files, out).facts
    return facts, open_pack(FileReader(out))


def labels(pack: Pack) -> list[dict[str, Any]]:
    return [
        {part["by"]: part["value"] for part in pack.volume(index).label}
        for index in range(pack.volumes)
    ]


def check(pack: Pack, expected: list[list[Slice]]) -> None:
    """Every slice of each volume is where its input was, with its pixels."""
    assert pack.volumes == len(expected)
    for index, slices in enumerate(expected):
        volume = pack.volume(index)
        stored = volume.array()[...]
        assert stored.shape == (len(slices), *slices[0].size)
        row, column = np.array(slices[0].orientation[:3]), np.array(slices[0].orientation[3:])
        normal = np.cross(row, column)
        in_order = sorted(slices, key=lambda one: float(np.dot(one.position, normal)))
        for k, image in enumerate(in_order):
            assert np.array_equal(stored[k], image.pixels)
            corner = [float(x) for x in image.position]
            assert np.allclose(to_patient(volume.affine_lps, (0, 0, k)), corner, atol=1e-6)
            right = np.array(corner) + row * image.spacing[1]
            assert np.allclose(to_patient(volume.affine_lps, (1, 0, k)), right, atol=1e-6)
            down = np.array(corner) + column * image.spacing[0]
            assert np.allclose(to_patient(volume.affine_lps, (0, 1, k)), down, atol=1e-6)


def put_private(creator: str, group: int, element: int, vr: str) -> Callable[..., Any]:
    def of(value: Any) -> Callable[[Dataset], object]:
        def change(dataset: Dataset) -> None:
            dataset.private_block(group, creator, create=True).add_new(element, vr, value)

        return change

    return of


def attribute(name: str) -> Callable[[Any], Callable[[Dataset], object]]:
    return lambda value: lambda dataset: setattr(dataset, name, value)


CLASSIC = {
    "image type": (attribute("ImageType"), [["DERIVED", "PRIMARY", "W"], ["ORIGINAL", "PRIMARY"]]),
    "complex component": (attribute("ComplexImageComponent"), ["MAGNITUDE", "PHASE"]),
    "b-value": (attribute("DiffusionBValue"), [0.0, 500.0, 1000.0]),
    "b-value: siemens": (put_private("SIEMENS MR HEADER", 0x19, 0x0C, "IS"), [0, 50, 800]),
    "b-value: ge": (
        put_private("GEMS_PARM_01", 0x43, 0x39, "IS"),
        [[0, 8, 0, 0], [1000000800, 8, 0, 0]],
    ),
    "b-value: philips": (put_private("Philips Imaging DD 001", 0x2001, 0x03, "FL"), [0.0, 1000.0]),
    "gradient direction": (
        attribute("DiffusionGradientOrientation"),
        [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]],
    ),
    "gradient direction: siemens": (
        put_private("SIEMENS MR HEADER", 0x19, 0x0E, "FD"),
        [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]],
    ),
    "echo time": (attribute("EchoTime"), [4.92, 7.38]),
    "echo number": (attribute("EchoNumbers"), [1, 2]),
    "inversion time": (attribute("InversionTime"), [100, 2500]),
    "flip angle": (attribute("FlipAngle"), [5, 15]),
    "tube voltage": (attribute("KVP"), [80, 140]),
    "kernel": (attribute("ConvolutionKernel"), ["FC08", "FC51"]),
    "cardiac phase": (attribute("NominalPercentageOfCardiacPhase"), [30.0, 75.0]),
    "respiratory phase": (attribute("NominalPercentageOfRespiratoryPhase"), [0.0, 50.0]),
    "trigger time": (attribute("TriggerTime"), [0, 33.3, 66.6]),
    "temporal position": (attribute("TemporalPositionIdentifier"), [1, 2, 10]),
    "frame reference time": (attribute("FrameReferenceTime"), [2500, 30000]),
    "acquisition": (attribute("AcquisitionNumber"), [2, 10]),
    "acquisition time": (attribute("AcquisitionTime"), ["091000", "091030.5"]),
    "content time": (attribute("ContentTime"), ["235900", "235959"]),
}


@pytest.mark.parametrize("name", CLASSIC)
def test_volumes_come_apart_by_each_attribute_of_the_list(tmp_path, name):
    make, values = CLASSIC[name]
    volumes = [stack(4, change=make(value), seed=number) for number, value in enumerate(values)]
    # Files come slice by slice, the last volume first.
    files = write(tmp_path / "in", [v[k] for k in range(4) for v in reversed(volumes)])
    facts, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    by = name.split(":")[0]
    assert [list(label) for label in labels(pack)] == [[by]] * len(values)
    found = [label[by] for label in labels(pack)]
    if by == "b-value":
        assert found == [0, *[v[0] % 100000 if isinstance(v, list) else v for v in values[1:]]]
    elif by == "image type":
        assert found == ["DERIVED\\PRIMARY\\W", "ORIGINAL\\PRIMARY"]
    else:
        assert found == values
    assert (facts.volumes, facts.slices) == (len(values), 4 * len(values))


def test_pet_frames_come_apart_by_the_number_of_the_image(tmp_path):
    volumes = [
        [
            Slice(k, {"ImageIndex": frame * 4 + k + 1, "NumberOfSlices": 4}, seed=frame)
            for k in range(4)
        ]
        for frame in range(3)
    ]
    files = write(tmp_path / "in", [one for volume in volumes for one in volume], "PT")
    _, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    assert labels(pack) == [{"PET frame": n} for n in (1, 2, 3)]


FRAMES: dict[str, tuple[Callable[[Any], dict[str, Any]], list[Any]]] = {
    "image type": (
        lambda v: {"MRImageFrameTypeSequence": [item(FrameType=v)]},
        [["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]],
    ),
    "complex component": (
        lambda v: {"MRImageFrameTypeSequence": [item(ComplexImageComponent=v)]},
        ["MAGNITUDE", "PHASE"],
    ),
    "b-value": (lambda v: {"MRDiffusionSequence": [item(DiffusionBValue=v)]}, [0.0, 1000.0]),
    "gradient direction": (
        lambda v: {
            "MRDiffusionSequence": [
                item(
                    DiffusionGradientDirectionSequence=[item(DiffusionGradientOrientation=list(v))]
                )
            ]
        },
        [[0.0, 0.6, 0.8], [1.0, 0.0, 0.0]],
    ),
    "echo time": (lambda v: {"MREchoSequence": [item(EffectiveEchoTime=v)]}, [2.3, 4.6]),
    "inversion time": (lambda v: {"MRModifierSequence": [item(InversionTimes=[v])]}, [50.0, 900.0]),
    "flip angle": (
        lambda v: {"MRTimingAndRelatedParametersSequence": [item(FlipAngle=v)]},
        [3.0, 20.0],
    ),
    "tube voltage": (lambda v: {"CTXRayDetailsSequence": [item(KVP=v)]}, [80.0, 140.0]),
    "kernel": (lambda v: {"CTReconstructionSequence": [item(ConvolutionKernel=v)]}, ["A", "B"]),
    "cardiac phase": (
        lambda v: {"CardiacSynchronizationSequence": [item(NominalPercentageOfCardiacPhase=v)]},
        [0.0, 40.0],
    ),
    "respiratory phase": (
        lambda v: {
            "RespiratorySynchronizationSequence": [item(NominalPercentageOfRespiratoryPhase=v)]
        },
        [0.0, 50.0],
    ),
    "trigger time": (
        lambda v: {"CardiacSynchronizationSequence": [item(NominalCardiacTriggerDelayTime=v)]},
        [0.0, 31.5],
    ),
    "temporal position": (
        lambda v: {"FrameContentSequence": [item(TemporalPositionIndex=v)]},
        [1, 2],
    ),
    "time offset": (
        lambda v: {"TemporalPositionSequence": [item(TemporalPositionTimeOffset=v)]},
        [0.0, 4.5],
    ),
    "acquisition": (lambda v: {"FrameContentSequence": [item(FrameAcquisitionNumber=v)]}, [1, 2]),
    "acquisition time": (
        lambda v: {"FrameContentSequence": [item(FrameAcquisitionDateTime=v)]},
        ["20260101120000", "20260101120100"],
    ),
    "content time": (
        lambda v: {"FrameContentSequence": [item(FrameReferenceDateTime=v)]},
        ["20260101120000", "20260101120100"],
    ),
    "echo time: converted": (
        lambda v: {"UnassignedPerFrameConvertedAttributesSequence": [item(EchoTime=v)]},
        [2.3, 4.6],
    ),
    "dimension RRIntervalTimeNominal": (
        lambda v: {"FrameContentSequence": [item(DimensionIndexValues=[1, v])]},
        [1, 2],
    ),
}


def indexed(dataset: Dataset) -> None:
    dataset.ContentTime = "120000"
    dataset.DimensionIndexSequence = [
        item(DimensionIndexPointer=0x00209057),
        item(DimensionIndexPointer=0x00209251),
    ]


@pytest.mark.parametrize("name", FRAMES)
def test_frames_of_one_image_come_apart_by_each_functional_group(tmp_path, name):
    make, values = FRAMES[name]
    volumes = [stack(3, attributes=make(value), seed=number) for number, value in enumerate(values)]

    def groups(image: Slice, frame: Dataset) -> None:
        for keyword, value in image.attributes.items():
            setattr(frame, keyword, value)

    path = tmp_path / "in" / "0.dcm"
    frames = [v[k] for k in (2, 0, 1) for v in reversed(volumes)]
    write_frames(path, frames, groups, change=indexed)
    facts, pack = opened([path], tmp_path / "x.ozx")
    check(pack, volumes)
    by = name.split(":")[0]
    expected = ["\\".join(v) for v in values] if by == "image type" else values
    assert labels(pack) == [{by: value} for value in expected]
    assert facts.volumes == 2
    assert pack.instances == pack.volume(1).instances == ("1.2.9.1",)
    assert len(pack.headers()) == len(pack.volume(1).headers()) == 1


def test_several_multi_frame_images_are_a_volume_each(tmp_path):
    volumes = [stack(3, seed=number) for number in range(2)]
    files = [
        write_frames(
            tmp_path / "in" / f"{number}.dcm",
            volume,
            lambda _image, _frame: None,
            change=lambda ds, number=number: setattr(ds, "AcquisitionNumber", number),
        )
        for number, volume in enumerate(volumes)
    ]
    _, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    assert [pack.volume(n).instances for n in (0, 1)] == [("1.2.9.1",), ("1.2.9.2",)]


SHAPES: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "orientation": (
        [{"orientation": SAGITTAL}, {"orientation": CORONAL}, {"orientation": AXIAL}],
        [list(SAGITTAL), list(CORONAL), list(AXIAL)],
    ),
    "matrix": ([{"size": (4, 8)}, {"size": (6, 8)}], [[4, 8], [6, 8]]),
    "pixel spacing": (
        [{"spacing": (0.5, 0.5)}, {"spacing": (0.75, 0.75)}],
        [[0.5, 0.5], [0.75, 0.75]],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_slices_of_other_shapes_come_apart(tmp_path, name):
    kinds, values = SHAPES[name]
    volumes = [stack(3 + number, **kind, seed=number) for number, kind in enumerate(kinds)]
    files = write(tmp_path / "in", [one for volume in reversed(volumes) for one in volume])
    facts, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    assert labels(pack) == [{name: value} for value in values]
    assert facts.slices == sum(len(volume) for volume in volumes)


def test_shapes_and_attributes_part_together(tmp_path):
    """Three planes, of which one was taken twice."""
    volumes = [
        stack(3, orientation=CORONAL, seed=1),
        stack(4, orientation=AXIAL, attributes={"EchoTime": 2}, seed=2),
        stack(4, orientation=AXIAL, attributes={"EchoTime": 4}, seed=3),
    ]
    files = write(tmp_path / "in", [one for volume in volumes for one in volume])
    _, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    assert labels(pack) == [
        {"orientation": list(CORONAL)},
        {"orientation": list(AXIAL), "echo time": 2},
        {"orientation": list(AXIAL), "echo time": 4},
    ]


def test_the_meaning_of_an_image_names_its_volume_before_its_time(tmp_path):
    volumes = [
        stack(
            attributes={
                "DiffusionBValue": float(b),
                "AcquisitionNumber": 9 - n,
                "ContentTime": "12",
            },
            seed=n,
        )
        for n, b in enumerate((0, 800))
    ]
    files = write(tmp_path / "in", volumes[0] + volumes[1])
    _, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    assert labels(pack) == [{"b-value": 0}, {"b-value": 800}]


def diffusion(b: float, direction: list[float] | None) -> dict[str, Any]:
    values: dict[str, Any] = {"DiffusionBValue": b}
    if direction is not None:
        values["DiffusionGradientOrientation"] = direction
    return values


def test_diffusion_directions_are_named_with_their_b_values(tmp_path):
    """Also where the direction alone would do: none stands for b = 0."""
    kinds = [(0.0, None), (1000.0, [0.0, 0.0, 1.0]), (1000.0, [1.0, 0.0, 0.0])]
    volumes = [stack(attributes=diffusion(*kind), seed=n) for n, kind in enumerate(kinds)]
    files = write(tmp_path / "in", [one for volume in reversed(volumes) for one in volume])
    _, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    assert labels(pack) == [{"b-value": b, "gradient direction": d} for b, d in kinds]


def test_three_attributes_together_part_a_series(tmp_path):
    kinds = [(b, e, n) for b in (0.0, 500.0) for e in (50, 90) for n in (1, 2)]
    volumes = [
        stack(
            attributes={"DiffusionBValue": b, "EchoTime": e, "TemporalPositionIdentifier": n},
            seed=number,
        )
        for number, (b, e, n) in enumerate(kinds)
    ]
    files = write(tmp_path / "in", [one for volume in reversed(volumes) for one in volume])
    _, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    assert labels(pack) == [
        {"b-value": b, "echo time": e, "temporal position": n} for b, e, n in kinds
    ]


def test_phase_images_of_another_sign_and_unit_are_a_volume_of_their_own(tmp_path):
    def phase(dataset: Dataset) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "P"]
        dataset.RescaleSlope, dataset.RescaleIntercept = 2, -4096
        dataset.RescaleType, dataset.BitsStored = "mrad", 12
        dataset.HighBit = 11
        dataset.PixelData = np.full((6, 8), 7, np.int16).tobytes()

    files = write(tmp_path / "in", stack(seed=1) + stack(change=phase, seed=2))
    _, pack = opened(files, tmp_path / "x.ozx")
    assert [pack.volume(n).unit for n in (0, 1)] == ["", "mrad"]
    assert np.array_equal(pack.volume(1).values(np.int16), np.full((4, 6, 8), 14 - 4096))
    assert np.array_equal(pack.volume(1).slice(2), pack.volume(1).values()[2])
    check(pack.volume(0), [stack(seed=1)])


def beats(jitter: bool) -> list[list[Slice]]:
    """Phases of a beating heart; each slice was taken in beats of another length."""
    return [
        [
            Slice(
                k,
                {"TriggerTime": phase * (30 + (3 * k if jitter else 0)), "ContentTime": "12"},
                seed=phase,
            )
            for k in range(4)
        ]
        for phase in range(5)
    ]


def test_phases_whose_trigger_times_differ_from_slice_to_slice_come_apart(tmp_path):
    volumes = beats(jitter=True)
    files = write(tmp_path / "in", [v[k] for k in range(4) for v in volumes])
    _, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    assert labels(pack) == [{"trigger time": 30 * phase} for phase in range(5)]


@pytest.mark.parametrize(
    ("name", "by"), [("AcquisitionTime", "acquisition time"), ("ContentTime", "content time")]
)
def test_phases_one_after_the_other_come_apart_though_each_slice_has_its_own_time(
    tmp_path, name, by
):
    # Across midnight: the date counts.
    date = name.replace("Time", "Date")
    times = [
        [("20251231", f"2359{10 + k}") for k in range(5)],
        [("20260101", f"0001{10 + 4 - k}") for k in range(5)],
    ]
    volumes = [
        [
            Slice(k, {date: times[phase][k][0], name: times[phase][k][1]}, seed=phase)
            for k in range(5)
        ]
        for phase in range(2)
    ]
    files = write(tmp_path / "in", volumes[1] + volumes[0])
    _, pack = opened(files, tmp_path / "x.ozx")
    check(pack, volumes)
    assert labels(pack) == [{by: "20251231235910"}, {by: "20260101000110"}]


def interlaced_in_time(tmp_path) -> list[Path]:
    slices = [
        Slice(k, {"ContentTime": f"12{k:02}{n:02}"}, seed=n) for n in range(2) for k in range(4)
    ]
    return write(tmp_path / "in", slices)


def one_more(tmp_path) -> list[Path]:
    """Each slice has its own time, and one came twice."""
    slices = [Slice(k, {"ContentTime": f"1200{k:02}"}) for k in range(6)]
    slices.append(Slice(3, {"ContentTime": "120059"}, seed=9))
    return write(tmp_path / "in", slices)


def in_pairs(tmp_path) -> list[Path]:
    """Two slices a rotation; groups of the same time are grids, but not volumes."""
    slices = [
        Slice(k, {"AcquisitionNumber": 1 + k // 2 + 3 * n}, seed=n)
        for n in range(2)
        for k in range(6)
    ]
    return write(tmp_path / "in", slices)


def with_a_gap(tmp_path) -> list[Path]:
    first = stack(6, attributes={"AcquisitionNumber": 1})
    second = stack(6, attributes={"AcquisitionNumber": 2}, seed=1)
    return write(tmp_path / "in", first + second[:3] + second[4:])


def a_retake(tmp_path) -> list[Path]:
    again = Slice(2, {"AcquisitionNumber": 2}, seed=4)
    return write(tmp_path / "in", [*stack(5, attributes={"AcquisitionNumber": 1}), again])


def copied(tmp_path) -> list[Path]:
    return write(tmp_path / "in", [*stack(5), Slice(1), Slice(2, seed=8)])


def unlike(tmp_path) -> list[Path]:
    return write(tmp_path / "in", [*stack(5), Slice(5, orientation=CORONAL)])


def another_size(tmp_path) -> list[Path]:
    return write(tmp_path / "in", [*stack(5), Slice(5, size=(4, 4))])


def gap_in_one_plane(tmp_path) -> list[Path]:
    axial = stack(6)
    return write(tmp_path / "in", axial[:2] + axial[3:] + stack(4, orientation=SAGITTAL))


def mixed_bits(tmp_path) -> list[Path]:
    odd = Slice(3, {"BitsStored": 12, "HighBit": 11})
    return write(tmp_path / "in", [*stack(3), odd, Slice(4)])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            interlaced_in_time,
            (
                r"4 of 8 slices are at the position of another one, at -30\.0, -27\.5, -25\.0, "
                r"-22\.5 mm along the normal; 0 of these 4 have the same pixels.*what differs "
                r"\(content time\) does not part them into 2"
            ),
        ),
        (one_more, r"repeated slices: 1 of 7 .* at -22\.5 mm"),
        (in_pairs, r"what differs \(acquisition\) does not part them into 2"),
        (
            with_a_gap,
            (
                r"parted by acquisition they are no volumes either: gap: 5\.000 mm between "
                r"slices 3 and 4 of 5 .*: 1 slice is missing"
            ),
        ),
        (
            a_retake,
            (
                r"a lone slice at \(-10\.0, -20\.0, -25\.0\) mm, acquisition 2, is no volume "
                "beside one of 5 slices"
            ),
        ),
        (copied, r"2 of 7 slices .* 1 of these 2 have the same pixels.*differs \(nothing\)"),
        (unlike, r"1 of 6 slices are not parallel to the first; a lone slice at .*orientation \["),
        (another_size, r"mixed images .*4x4 .*8x6.*; a lone slice at .* matrix \[4, 4\]"),
        (
            gap_in_one_plane,
            (
                r"not parallel to the first; of those that go together by orientation \[1, 0, 0, "
                r"0, 1, 0\]: gap: 5\.000 mm between slices 2 and 3 of 5"
            ),
        ),
        (mixed_bits, "mixed images in one series: 8x6 int16"),
    ],
)
def test_what_cannot_be_parted_is_refused_in_words_and_numbers(tmp_path, make, reason):
    files = make(tmp_path)
    said = set()
    for seed in range(3):
        random.Random(seed).shuffle(files)
        with pytest.raises(PackError, match=reason) as caught:
            pack_series(files, tmp_path / "x.ozx")
        said.add(str(caught.value))
    assert len(said) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_slices_that_lie_on_one_grid_are_one_volume_whatever_differs(tmp_path):
    """Odd and even slices of an interleaved acquisition."""
    slices = [
        Slice(
            k, {"AcquisitionNumber": 1 + k % 2, "EchoTime": 2 + k % 2, "ContentTime": f"12{k:04}"}
        )
        for k in range(8)
    ]
    facts, pack = opened(write(tmp_path / "in", slices), tmp_path / "x.ozx")
    check(pack, [slices])
    assert (facts.volumes, pack.label, pack.meta["pack"]) == (1, (), 1)
    assert "grids" not in pack.meta
    assert pack.volume(0) is pack
    with pytest.raises(StoreError, match="volume 1 asked for; the pack has 1"):
        pack.volume(1)


@st.composite
def interleaved(draw: st.DrawFn) -> tuple[list[list[Slice]], list[int], list[int]]:
    """Volumes told apart by one or two attributes; each may begin and end elsewhere."""
    names = draw(
        st.lists(
            st.sampled_from(
                ["EchoTime", "TemporalPositionIdentifier", "FlipAngle", "InversionTime"]
            ),
            min_size=1,
            max_size=2,
            unique=True,
        )
    )
    first = draw(st.integers(2, 4 if len(names) == 1 else 3))
    keys = [(n,) for n in range(first)]
    if len(names) == 2:
        keys = [(n, m) for n in range(first) for m in range(2)]
    orientation = draw(st.sampled_from([AXIAL, CORONAL, SAGITTAL, (0.6, 0.8, 0, -0.8, 0.6, 0)]))
    volumes = []
    for number, key in enumerate(keys):
        # All of them have the slices 2 and 3.
        start, stop = draw(st.integers(0, 2)), draw(st.integers(4, 6))
        values = dict(zip(names, (10 * (part + 1) for part in key), strict=True))
        common: dict[str, Any] = {"attributes": values, "orientation": orientation, "seed": number}
        volumes.append([Slice(k, **common) for k in range(start, stop)])
    listed = ["EchoTime", "InversionTime", "FlipAngle", "TemporalPositionIdentifier"]
    volumes.sort(
        key=lambda v: [v[0].attributes[name] for name in listed if name in v[0].attributes]
    )
    count = sum(len(volume) for volume in volumes)
    return volumes, draw(st.permutations(range(count))), draw(st.permutations(range(count)))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(interleaved())
def test_interleaved_volumes_in_any_order_come_apart_right(tmp_path, case):
    volumes, numbers, order = case
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    files = write(tmp_path / "in", [one for volume in volumes for one in volume], order=numbers)
    out, again = tmp_path / "x.ozx", tmp_path / "y.ozx"
    facts, pack = opened([files[index] for index in order], out)
    check(pack, volumes)
    assert facts.volumes == len(volumes)
    assert pack_series(files, again).facts == facts
    assert again.read_bytes() == out.read_bytes()
    for index, volume in enumerate(volumes):
        part = pack.volume(index)
        assert len(part.instances) == len(volume)
        assert [header.SOPInstanceUID for header in part.headers()] == list(part.instances)


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A real series, with another one made of it: later, half as bright, one slice shorter."""
    folder = tmp_path_factory.mktemp("twice")
    files = [Path(shutil.copy(path, folder / path.name)) for path in files_of("sts_mr")]
    later = []

    def change(dataset: Dataset) -> None:
        dataset.AcquisitionNumber = 2
        dataset.SOPInstanceUID = f"1.2.3.{dataset.InstanceNumber}"
        dataset.PixelData = (dataset.pixel_array // 2).astype("<i2").tobytes()

    for path in files[1:]:
        later.append(path.with_name(f"later-{path.name}"))
        shutil.copy(path, later[-1])
        edit(later[-1], change)
    out = folder / "x.ozx"
    facts = pack_series([*later, *files], out).facts
    with FileReader(out) as reader:
        yield facts, open_pack(reader), files, later, out


def along(path: Path) -> float:
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    cosines = np.array(dataset.ImageOrientationPatient, dtype=float)
    return float(np.cross(cosines[:3], cosines[3:]) @ np.array(dataset.ImagePositionPatient))


def test_a_real_series_with_two_acquisitions_comes_apart(twice):
    facts, pack, files, later, _ = twice
    assert labels(pack) == [{"acquisition": 1}, {"acquisition": 2}]
    assert facts.slices == 35 + 34
    assert "repeated-volume" not in facts.flags
    for index, paths in enumerate((files, later)):
        members = sorted(paths, key=along)
        volume = pack.volume(index)
        stored = volume.array()[...]
        datasets = [pydicom.dcmread(path) for path in members]
        assert np.array_equal(stored, [dataset.pixel_array for dataset in datasets])
        got = to_patient(volume.affine_lps, [(0, 0, k) for k in range(len(members))])
        assert np.allclose(got, [d.ImagePositionPatient for d in datasets], atol=1e-4)
        assert list(volume.instances) == [d.SOPInstanceUID for d in datasets]
        headers = volume.headers()
        for header, dataset in zip(headers, datasets, strict=True):
            del dataset.PixelData
            assert header == dataset
        assert [m["00080018"]["Value"][0] for m in volume.json_headers()] == list(volume.instances)
        for level in (1, 2):
            assert volume.array(level).shape[0] == -(-len(members) // 2**level)
            assert volume.slice(1, level).shape == volume.array(level).shape[1:]


def test_a_pack_stands_for_its_series_and_shows_its_first_volume(twice):
    _, pack, files, later, _ = twice
    first = pack.volume(0)
    assert pack.volumes == 2
    assert first.volumes == pack.volume(1).volumes == 1
    assert np.array_equal(pack.values(), first.values())
    assert pack.affine_lps.tolist() == first.affine_lps.tolist()
    assert pack.label == first.label == ({"by": "acquisition", "value": 1.0},)
    assert pack.shape == first.shape == (35, *pack.volume(1).shape[1:])
    assert pack.series == pack.volume(1).series
    assert pack.instances == (*first.instances, *pack.volume(1).instances)
    hashes = {entry["sha256"] for entry, _ in pack.original_headers()}
    assert len(hashes) == len(pack.headers()) == len(files) + len(later)
    with pytest.raises(StoreError, match="volume 2 asked for; the pack has 2"):
        pack.volume(2)
    with pytest.raises(StoreError, match="volume -1"):
        pack.volume(-1)


def test_each_volume_is_an_ome_zarr_group_that_others_can_open(twice):
    _, pack, _, _, out = twice
    with zipfile.ZipFile(out) as archive:
        names = archive.namelist()
        root = json.loads(archive.read("zarr.json"))["attributes"]
    documents = [name for name in names if name.endswith("zarr.json")]
    assert documents == names[: len(documents)]
    assert documents[4:] == [
        "volumes/zarr.json",
        *(f"volumes/1/{name}zarr.json" for name in ("", "0/", "1/", "2/")),
    ]
    assert root["kakehashi"]["pack"] == 2
    assert root["kakehashi"]["volumes"] == len(root["kakehashi"]["grids"]) == 2
    group = zarr.open_group(pack.store, path="volumes/1", mode="r")
    scales = group.attrs["ome"]["multiscales"][0]
    assert [d["path"] for d in scales["datasets"]] == ["0", "1", "2"]
    spacing = list(pack.volume(1).spacing_mm)
    assert scales["datasets"][0]["coordinateTransformations"][0]["scale"] == spacing
    assert np.array_equal(group["0"][...], pack.volume(1).array()[...])
    tree = zarr.open_group(pack.store, mode="r")
    assert sorted(tree.group_keys()) == ["volumes"]


def test_two_volumes_with_the_same_pixels_are_flagged(tmp_path):
    first, second = (stack(attributes={"AcquisitionNumber": n}, seed=1) for n in (1, 2))
    facts, _ = opened(write(tmp_path / "in", first + second), tmp_path / "x.ozx")
    assert facts.flags == ("repeated-volume",)


def test_progress_counts_the_slices_of_all_volumes(tmp_path):
    files = write(
        tmp_path / "in", [s for n in (1, 2) for s in stack(3, attributes={"EchoTime": n}, seed=n)]
    )
    seen: list[tuple[int, int]] = []
    pack_series(files, tmp_path / "x.ozx", on_slice=lambda *counts: seen.append(counts))
    assert seen == [(n, 6) for n in range(1, 7)]


def test_a_dynamic_series_of_one_slice_is_a_volume_each_time(tmp_path):
    volumes = [[Slice(0, {"TemporalPositionIdentifier": n}, seed=n)] for n in range(1, 13)]
    facts, pack = opened(
        write(tmp_path / "in", [slices[0] for slices in volumes]), tmp_path / "x.ozx"
    )
    check(pack, volumes)
    assert facts.flags == ("single-slice",)
    assert not facts.usable_3d


def test_use_in_3d_asks_for_enough_slices_in_one_volume(tmp_path):
    halves = [s for n in (1, 2) for s in stack(31, attributes={"EchoTime": n}, seed=n)]
    facts, _ = opened(write(tmp_path / "in", halves), tmp_path / "x.ozx")
    assert (facts.slices, facts.usable_3d) == (62, False)
    slices = [*halves, Slice(31, {"EchoTime": 2})]
    facts, _ = opened(write(tmp_path / "more", slices), tmp_path / "y.ozx")
    assert (facts.slices, facts.usable_3d) == (63, True)


ODD_VALUES = {
    "AcquisitionNumber": [b"ab", b"1\\2"],
    "EchoTime": [b"nan", b"inf", b"1e999", b" "],
    "ContentTime": [b"\xff\xfe", b"\\"],
    "DiffusionBValue": [b"1234", b""],
    "ImageType": [b"\\\\"],
}


@pytest.mark.parametrize("name", ODD_VALUES)
@pytest.mark.filterwarnings("ignore")
def test_values_that_break_the_rules_of_dicom_tell_nothing_apart_and_break_nothing(tmp_path, name):
    for number, odd in enumerate(ODD_VALUES[name]):
        folder = tmp_path / str(number)
        good = stack(attributes={"FlipAngle": 5, "ContentTime": "12", "EchoTime": 3}, seed=1)
        other = stack(attributes={"FlipAngle": 9, "ContentTime": "12", "EchoTime": 3}, seed=2)
        files = write(folder, good + other)
        for path in files[::2]:
            dataset = pydicom.dcmread(path)
            tag = pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(name))
            vr = pydicom.datadict.dictionary_VR(tag)
            raw = pydicom.dataelem.RawDataElement(tag, vr, len(odd), odd, 0, False, True)
            dataset._dict[tag] = raw
            dataset.save_as(path)
        _, pack = opened(files, tmp_path / f"{number}.ozx")
        check(pack, [good, other])
        assert labels(pack) == [{"flip angle": 5}, {"flip angle": 9}]
