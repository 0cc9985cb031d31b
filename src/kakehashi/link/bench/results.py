"""What was measured, as it leaves the session: figures, and what they were measured on."""

from __future__ import annotations

import os
import platform
import re
import statistics
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

WAITING = "waiting for data"
"""What figures of a training's waits are called, behind the training's name."""

Part = Literal["line", "reader", "ranges", "write", "loop", "networks", "segmentation"]
PARTS: tuple[Part, ...] = (
    "line", "reader", "ranges", "write", "loop", "networks", "segmentation",
)  # fmt: skip

# Whoever reads a report that came out of a session takes nothing longer for a figure's words.
_Words = Annotated[str, Field(max_length=300)]
_Values = Annotated[tuple[float, ...], Field(max_length=1000)]

_UID = re.compile(r"\d+(?:\.\d+){3,}")


class _Model(BaseModel):
    # What is computed here is written with the rest, and computed anew when it is read.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Figure(_Model):
    """One quantity over its rounds.

    Attributes
    ----------
    part : str
        What it belongs to.
    name, unit : str
    values : tuple of float
        One a round.
    local : tuple of float
        The same from this node's own memory, in turn with the others: one a round; empty
        where there is no such thing.
    better : {"higher", "lower"}
    """

    part: Part
    name: _Words
    unit: Annotated[str, Field(max_length=20)]
    values: Annotated[_Values, Field(min_length=1)]
    local: _Values = ()
    better: Literal["higher", "lower"] = "higher"

    @computed_field  # type: ignore[prop-decorator] # pydantic's own way, which mypy lacks
    @property
    def median(self) -> float:
        """The median of its rounds."""
        return statistics.median(self.values)

    @computed_field  # type: ignore[prop-decorator] # as above
    @property
    def ratio(self) -> float | None:
        """What it is of local, round by round: the median of the ratios."""
        pairs = [(one, two) for one, two in zip(self.values, self.local, strict=False) if two]
        return statistics.median(one / two for one, two in pairs) if pairs else None


class NotMeasured(_Model):
    """Something that is not among the figures, and why."""

    what: _Words
    why: _Words


class Machine(_Model):
    """What the figures were measured on."""

    processor: _Words
    cores: int
    memory_gib: float
    accelerators: tuple[_Words, ...]
    kernel: _Words
    versions: dict[_Words, _Words]


class Cohort(_Model):
    """How much there was to read, and how much of it was read again and again."""

    series: int
    bytes: int
    series_used: int
    bytes_used: int


class Report(_Model):
    """All figures of one session."""

    kakehashi_link_bench: Literal[1] = 1
    site: _Words
    measured_at: _Words
    seconds: float
    quick: bool
    complete: bool
    stopped: _Words = ""
    machine: Machine
    cohort: Cohort
    ssh: dict[_Words, _Words]
    figures: Annotated[tuple[Figure, ...], Field(max_length=1000)]
    not_measured: Annotated[tuple[NotMeasured, ...], Field(max_length=1000)]

    def figure(self, name: str) -> Figure | None:
        """Return the figure of a name."""
        return next((one for one in self.figures if one.name == name), None)


def without_names(text: str) -> str:
    """Return an error's words without the series that it is about: their names stay inside."""
    return _UID.sub("(a series)", " ".join(text.split()))[:250]


def machine(accelerators: tuple[str, ...] = ()) -> Machine:
    """Describe this node."""
    processor = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    versions = {"python": platform.python_version()}
    for name in ("kakehashi", "numpy", "zarr", "torch", "monai"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(
        processor=processor,
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory, 1),
        accelerators=accelerators,
        kernel=platform.release(),
        versions=versions,
    )
