"""What may tell the volumes of one series apart: the attributes, in the order they are tried.

Sources: DICOM PS3.3 C.7.6.16 (functional groups), C.8.9.4 (PET image), C.8.13.5 (enhanced MR);
for b-values that a sender wrote only privately: PS3.15 table E.3.10-1 (safe private attributes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydicom import datadict
from pydicom.multival import MultiValue

from kakehashi.store.dicom import DAMAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    import pydicom

# Senders round one and the same number in several ways.
_DIGITS = 6
_GE_FLAG = 100_000

Private = tuple[str, int, int]
"""Creator, group and element of a private attribute."""


@dataclass(frozen=True, slots=True)
class Trait:
    """An attribute by which volumes may differ.

    Attributes
    ----------
    name : str
        What a volume's label calls it.
    read : callable
        Takes the places where a frame's attributes stand, the most special first and the image
        itself last; returns its value, None if it has none.
    ranked : bool
        The value may differ from slice to slice: the first at each position belong to the
        first volume, and so on.
    clock : bool
        If ranked, each volume must have ended before the next one began.
    needs : str
        A trait that, where it varies, must be named too.
    """

    name: str
    read: Callable[[list[pydicom.Dataset]], Hashable]
    ranked: bool = False
    clock: bool = False
    needs: str = ""


def _first(scopes: list[pydicom.Dataset], places: Iterable[str | Private]) -> Any:
    """Return the first value that is there and not empty."""
    for scope in scopes:
        for place in places:
            value = _follow(scope, place)
            if value is not None and value != "":
                return value
    return None


def _follow(scope: pydicom.Dataset, place: str | Private) -> Any:
    try:
        return _value(scope, place)
    except (*DAMAGE, KeyError, TypeError):
        # What a sender wrote wrong is as good as not written: it tells nothing apart.
        return None


def _value(scope: pydicom.Dataset, place: str | Private) -> Any:
    if isinstance(place, tuple):
        creator, group, element = place
        return scope.private_block(group, creator)[element].value
    *path, last = place.split(".")
    for name in path:
        items = scope.get(name)
        if not items:
            return None
        scope = items[0]
    return scope.get(last)


def _floats(value: Any, digits: int = _DIGITS) -> tuple[float, ...] | None:
    if value is None or isinstance(value, bytes):
        return None
    parts = value if isinstance(value, (MultiValue, list, tuple)) else [value]
    try:
        numbers = tuple(float(f"{float(part):.{digits}g}") + 0.0 for part in parts)
    except (TypeError, ValueError):
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _number(*places: str | Private) -> Callable[[list[pydicom.Dataset]], Hashable]:
    def read(scopes: list[pydicom.Dataset]) -> float | None:
        numbers = _floats(_first(scopes, places))
        return numbers[0] if numbers else None

    return read


def _text(*places: str | Private) -> Callable[[list[pydicom.Dataset]], Hashable]:
    def read(scopes: list[pydicom.Dataset]) -> str | None:
        value = _first(scopes, places)
        if isinstance(value, MultiValue):
            value = "\\".join(str(part) for part in value)
        return None if value is None else str(value).strip()

    return read


def _b_value(scopes: list[pydicom.Dataset]) -> float | None:
    for place in (
        "DiffusionBValue",
        "MRDiffusionSequence.DiffusionBValue",
        ("SIEMENS MR HEADER", 0x0019, 0x0C),
        ("Philips Imaging DD 001", 0x2001, 0x03),
    ):
        if numbers := _floats(_first(scopes, (place,))):
            return numbers[0]
    # GE puts other information above the value.
    numbers = _floats(_first(scopes, (("GEMS_PARM_01", 0x0043, 0x39),)), digits=15)
    return numbers[0] % _GE_FLAG if numbers else None


def _gradient(scopes: list[pydicom.Dataset]) -> tuple[float, ...] | None:
    for place in (
        "DiffusionGradientOrientation",
        "MRDiffusionSequence.DiffusionGradientDirectionSequence.DiffusionGradientOrientation",
        ("SIEMENS MR HEADER", 0x0019, 0x0E),
    ):
        if numbers := _floats(_first(scopes, (place,))):
            return numbers
    parts = [_floats(_first(scopes, (("GEMS_ACQU_01", 0x0019, n),))) for n in (0xBB, 0xBC, 0xBD)]
    return tuple(part[0] for part in parts if part) if all(parts) else None


def _moment(
    frame: str, date: str, time: str, whole: str
) -> Callable[[list[pydicom.Dataset]], Hashable]:
    """Read a point in time as DICOM writes it: the date, where there is one, and the time."""
    of_frame, day, hour, of_image = _text(frame), _text(date), _text(time), _text(whole)

    def read(scopes: list[pydicom.Dataset]) -> Hashable:
        if (moment := of_frame(scopes)) is not None:
            return moment
        if (clock := hour(scopes)) is not None:
            return f"{day(scopes) or ''}{clock}"
        return of_image(scopes)

    return read


def _pet_frame(scopes: list[pydicom.Dataset]) -> float | None:
    """Return which frame or gate it is: images are numbered through, one frame after another."""
    index, slices = _number("ImageIndex")(scopes), _number("NumberOfSlices")(scopes)
    if not isinstance(index, float) or not isinstance(slices, float) or slices < 1:
        return None
    return (index - 1) // slices + 1


_trigger = _number("TriggerTime", "CardiacSynchronizationSequence.NominalCardiacTriggerDelayTime")
_acquired = _moment(
    "FrameContentSequence.FrameAcquisitionDateTime",
    "AcquisitionDate",
    "AcquisitionTime",
    "AcquisitionDateTime",
)
_made = _moment(
    "FrameContentSequence.FrameReferenceDateTime",
    "ContentDate",
    "ContentTime",
    "InstanceCreationTime",
)

TRAITS = (
    Trait(
        "image type",
        _text(
            "MRImageFrameTypeSequence.FrameType",
            "CTImageFrameTypeSequence.FrameType",
            "PETFrameTypeSequence.FrameType",
            "ImageType",
        ),
    ),
    Trait(
        "complex component",
        _text("MRImageFrameTypeSequence.ComplexImageComponent", "ComplexImageComponent"),
    ),
    Trait("b-value", _b_value),
    Trait("gradient direction", _gradient, needs="b-value"),
    Trait("echo time", _number("MREchoSequence.EffectiveEchoTime", "EchoTime")),
    Trait("echo number", _number("EchoNumbers")),
    Trait("inversion time", _number("MRModifierSequence.InversionTimes", "InversionTime")),
    Trait("flip angle", _number("MRTimingAndRelatedParametersSequence.FlipAngle", "FlipAngle")),
    Trait("tube voltage", _number("CTXRayDetailsSequence.KVP", "KVP")),
    Trait("kernel", _text("CTReconstructionSequence.ConvolutionKernel", "ConvolutionKernel")),
    Trait(
        "cardiac phase",
        _number(
            "CardiacSynchronizationSequence.NominalPercentageOfCardiacPhase",
            "NominalPercentageOfCardiacPhase",
        ),
    ),
    Trait(
        "respiratory phase",
        _number(
            "RespiratorySynchronizationSequence.NominalPercentageOfRespiratoryPhase",
            "NominalPercentageOfRespiratoryPhase",
        ),
    ),
    Trait("trigger time", _trigger),
    Trait(
        "temporal position",
        _number("FrameContentSequence.TemporalPositionIndex", "TemporalPositionIdentifier"),
    ),
    Trait("time offset", _number("TemporalPositionSequence.TemporalPositionTimeOffset")),
    Trait("frame reference time", _number("FrameReferenceTime")),
    Trait("PET frame", _pet_frame),
    Trait(
        "acquisition",
        _number("FrameContentSequence.FrameAcquisitionNumber", "AcquisitionNumber"),
    ),
    Trait("acquisition time", _acquired),
    Trait("content time", _made),
    Trait("trigger time", _trigger, ranked=True),
    Trait("acquisition time", _acquired, ranked=True, clock=True),
    Trait("content time", _made, ranked=True, clock=True),
)
"""What the image is comes before when it was made, so that labels say the former."""


def dimensions(datasets: Iterable[pydicom.Dataset]) -> tuple[Trait, ...]:
    """Return the dimensions by which multi-frame images number their frames, tried last."""
    places: dict[str, None] = {}
    for dataset in datasets:
        for item in dataset.get("DimensionIndexSequence") or []:
            if (pointer := item.get("DimensionIndexPointer")) is not None:
                places[_name_of(pointer)] = None
    return tuple(Trait(f"dimension {name}", _dimension(name)) for name in places)


def _name_of(pointer: int) -> str:
    return datadict.keyword_for_tag(pointer) or f"{pointer:08X}"


def _dimension(name: str) -> Callable[[list[pydicom.Dataset]], Hashable]:
    def read(scopes: list[pydicom.Dataset]) -> int | None:
        order = [
            _name_of(item.get("DimensionIndexPointer", 0))
            for item in scopes[-1].get("DimensionIndexSequence") or []
        ]
        values = _floats(_first(scopes, ("FrameContentSequence.DimensionIndexValues",)))
        if values is None or name not in order or len(values) != len(order):
            return None
        return int(values[order.index(name)])

    return read
