"""What sessions may ask of the catalogue and what they get, checked and described from here."""

from __future__ import annotations

import datetime as dt
import unicodedata
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from kakehashi.errors import StoreError
from kakehashi.store.query import COLUMNS, MAX_LENGTH, column_named
from kakehashi.store.service.thumbnail import LARGEST, SMALLEST

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic.fields import FieldInfo

MAX_BODY = 256 * 1024
"""Bytes that a request may have at most."""

MOST_ROWS = 200
"""Rows of a page."""

MOST_EXPORTED = 1_000_000
"""Rows of an export."""

MOST_FROZEN = 200_000
"""Series of a frozen cohort."""


def _printable(text: str) -> str:
    if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text):
        raise ValueError("must not hold control characters")
    return text


def _one_of(names: Iterable[str]) -> tuple[AfterValidator, FieldInfo]:
    """Return what makes a text the name of one of some columns, for checks and description."""
    known = sorted(names)

    def check(text: str) -> str:
        if text not in known:
            try:
                column_named(text)
            except StoreError as error:
                raise ValueError(str(error)) from None  # it says what is near
            raise ValueError(f"must be one of: {', '.join(known)}")
        return text

    return AfterValidator(check), Field(json_schema_extra={"enum": list(known)})


_MEASURES = {"number", "integer", "date"}
ColumnName = Annotated[str, *_one_of(COLUMNS)]
FacetName = Annotated[str, *_one_of(name for name, one in COLUMNS.items() if one.facet)]
MeasureName = Annotated[str, *_one_of(n for n, one in COLUMNS.items() if one.kind in _MEASURES)]
OrderName = Annotated[
    str, *_one_of(n for n, one in COLUMNS.items() if one.kind not in {"flags", "identifier"})
]
GroupName = Annotated[
    str, *_one_of(n for n, one in COLUMNS.items() if one.facet and one.kind != "flags")
]

Value = str | bool | int | float | None
QueryText = Annotated[
    str, Field(max_length=MAX_LENGTH, description="An expression; empty means every series.")
]
Selections = Annotated[
    dict[FacetName, Annotated[list[Value], Field(min_length=1, max_length=500)]],
    Field(description="Values chosen of facets; null means unknown."),
]
Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
CohortId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Asked(_Request):
    """Which series are meant: those of a query, with the values chosen of facets."""

    query: QueryText = ""
    selections: Selections = {}


class FacetsRequest(Asked):
    """``POST /v1/facets``."""

    columns: Annotated[tuple[FacetName, ...], Field(max_length=len(COLUMNS))] | None = Field(
        default=None, description="All facets by default."
    )
    client: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = Field(
        default=None,
        description="A newer request of the same session and client ends an older one.",
    )


class FacetValue(_Answer):
    """One value of a facet, and how many series have it."""

    value: Value
    count: int


class FacetsAnswer(_Answer):
    """Each facet is counted without the values that are chosen of it itself."""

    count: int
    facets: dict[str, list[FacetValue]]


class PageRequest(Asked):
    """``POST /v1/page``."""

    order: OrderName = "study_date"
    descending: bool = True
    after: Annotated[int, Field(ge=0, lt=2**40)] = Field(
        default=0, description="Rows to pass over: what the page before gave as `next`."
    )
    limit: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 50


_TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": ["string", "null"]},
    "identifier": {"type": ["string", "null"]},
    "number": {"type": ["number", "null"]},
    "integer": {"type": ["integer", "null"]},
    "date": {"type": ["string", "null"], "format": "date"},
    "boolean": {"type": ["boolean", "null"]},
    "flags": {"type": "array", "items": {"type": "string"}},
}
Row = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "description": "One series; null means unknown.",
            "properties": {
                name: _TYPES[one.kind] | {"title": one.title} for name, one in COLUMNS.items()
            },
            "required": list(COLUMNS),
            "additionalProperties": False,
        }
    ),
]


class PageAnswer(_Answer):
    """``next`` leads to the page after this one; null on the last."""

    count: int
    rows: list[Row]
    next: int | None


class HistogramRequest(Asked):
    """``POST /v1/histogram``."""

    column: MeasureName
    bins: Annotated[int, Field(ge=1, le=200)] = 20


class Bin(_Answer):
    """Values from `low` to `high`; the last bin has its upper end, the others do not."""

    low: float | dt.date
    high: float | dt.date
    count: int


class HistogramAnswer(_Answer):
    """Series without a value are in `unknown`."""

    bins: list[Bin]
    unknown: int


class PivotRequest(Asked):
    """``POST /v1/pivot``."""

    rows: GroupName
    columns: GroupName


class PivotAnswer(_Answer):
    """``counts[i][j]`` belongs to ``rows[i]`` and ``columns[j]``."""

    rows: list[Value]
    columns: list[Value]
    counts: list[list[int]]


class CombinationsRequest(Asked):
    """``POST /v1/combinations``."""

    columns: Annotated[tuple[GroupName, ...], Field(min_length=1, max_length=4)]
    limit: Annotated[int, Field(ge=1, le=5000)] = 1000


class Combination(_Answer):
    """Values in the order of the columns asked for."""

    values: list[Value]
    count: int


class CombinationsAnswer(_Answer):
    """The most frequent first; `total` is how many different ones there are."""

    combinations: list[Combination]
    total: int


class Attachment(_Answer):
    """An object that belongs to a series and was kept as it came, e.g. a segmentation."""

    modality: str | None
    sop_uid: str | None
    sha256: str
    size: int


class SeriesAnswer(_Answer):
    """``GET /v1/series/UID``."""

    row: Row
    attachments: list[Attachment]
    reports: list[str]


class ThumbnailQuery(_Request):
    """Parameters of ``GET /v1/series/UID/thumbnail``."""

    model_config = ConfigDict(strict=False)

    size: Annotated[int, Field(ge=SMALLEST, le=LARGEST)] = 128


class SearchRequest(Asked):
    """``POST /v1/search``."""

    text: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
    after: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = Field(
        default="", description="What the page of reports before gave as `next`."
    )
    limit: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 20


class ReportHit(_Answer):
    """A report in which every word stands; `marks` are begin and end of words in the snippet."""

    study_uid: str
    series: list[str]
    snippet: str
    marks: list[tuple[int, int]]


class SearchAnswer(_Answer):
    """Series whose description, and reports whose text has every word."""

    series: list[Row]
    reports: list[ReportHit]
    next: Sha256 | None


class ExportRequest(Asked):
    """``POST /v1/export``."""

    columns: Annotated[tuple[ColumnName, ...], Field(min_length=1, max_length=len(COLUMNS))]
    limit: Annotated[int, Field(ge=1, le=MOST_EXPORTED)] | None = Field(
        default=None, description="Rows at most; without it, more than can be given are refused."
    )


class SaveRequest(Asked):
    """``POST /v1/cohorts``."""

    name: Name


class ShareRequest(_Request):
    """``POST /v1/cohorts/ID/share``: for all people of the project to see."""


class FreezeRequest(_Request):
    """``POST /v1/cohorts/ID/freeze``."""


class VersionFacts(_Answer):
    """A fixed list of series: what a paper needs, but the list."""

    version: int
    query: str
    selections: dict[str, list[Value]]
    sha256: Sha256
    tombstones: int = Field(description="Series whose people withdrew since.")
    frozen_by: str
    frozen_at: str


class CohortFacts(_Answer):
    """A query under a name."""

    id: CohortId
    name: str
    owner: str
    query: str
    selections: dict[str, list[Value]]
    shared: bool
    created_at: str


class CohortsAnswer(_Answer):
    """``GET /v1/cohorts``."""

    cohorts: list[CohortFacts]


class CohortAnswer(CohortFacts):
    """``GET /v1/cohorts/ID``; `count` is that of the query now."""

    count: int
    versions: list[VersionFacts]


class FrozenAnswer(VersionFacts):
    """``POST /v1/cohorts/ID/freeze``; `count` is what the project may see of the list now."""

    count: int


class VersionAnswer(FrozenAnswer):
    """``GET /v1/cohorts/ID/versions/N``; the manifest is as a project's view has one.

    Series that were packed anew since, and are thus others than those that were frozen, are not in
    the list, but among the changed.
    """

    series: list[str]
    changed: list[str]
    manifest: dict[str, Any]


class DiffQuery(_Request):
    """Parameters of ``GET /v1/cohorts/ID/diff``."""

    model_config = ConfigDict(strict=False)

    a: Annotated[int, Field(ge=1, le=10**6)]
    b: Annotated[int, Field(ge=1, le=10**6)]


class DiffAnswer(_Answer):
    """What stands in one of two versions only."""

    only_a: list[str]
    only_b: list[str]
    both: int


class Problem(_Answer):
    """Why there is no answer."""

    error: str
    message: str
