"""The answers about series: facets, pages, counts, one series, words, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kakehashi.errors import RefusedError
from kakehashi.store.query import Condition
from kakehashi.store.service import models
from kakehashi.store.service import thumbnail as pictures
from kakehashi.store.service.access import Scope, as_json, row_of
from kakehashi.store.service.call import scope_of
from kakehashi.store.service.reports import snippet, words_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kakehashi.store.catalogue import Kept, Series
    from kakehashi.store.service.call import Call
    from kakehashi.store.service.reports import Report

REPORTS_TIER = 2
"""A project of a lower tier sees no report: names may be left in free text."""

LINES, ARROW = "application/jsonl", "application/vnd.apache.arrow.stream"


async def facets(call: Call) -> models.FacetsAnswer:
    """Answer ``POST /v1/facets``."""
    asked = call.body(models.FacetsRequest)
    scope = scope_of(asked)
    call.take_place(asked.client)
    answer = await call.work(lambda: call.access.facets(scope, asked.columns))
    await call.audit("facets", scope, answer.count)
    return answer


async def page(call: Call) -> models.PageAnswer:
    """Answer ``POST /v1/page``."""
    asked = call.body(models.PageRequest)
    scope = scope_of(asked)
    answer = await call.work(lambda: call.access.page(scope, asked))
    await call.audit("page", scope, len(answer.rows))
    return answer


async def histogram(call: Call) -> models.HistogramAnswer:
    """Answer ``POST /v1/histogram``."""
    asked = call.body(models.HistogramRequest)
    scope = scope_of(asked)
    answer = await call.work(lambda: call.access.histogram(scope, asked.column, asked.bins))
    await call.audit("histogram", scope, answer.unknown + sum(one.count for one in answer.bins))
    return answer


async def pivot(call: Call) -> models.PivotAnswer:
    """Answer ``POST /v1/pivot``."""
    asked = call.body(models.PivotRequest)
    scope = scope_of(asked)
    answer = await call.work(lambda: call.access.pivot(scope, asked.rows, asked.columns))
    await call.audit("pivot", scope, sum(map(sum, answer.counts)))
    return answer


async def combinations(call: Call) -> models.CombinationsAnswer:
    """Answer ``POST /v1/combinations``."""
    asked = call.body(models.CombinationsRequest)
    scope = scope_of(asked)
    answer = await call.work(lambda: call.access.combinations(scope, asked.columns, asked.limit))
    await call.audit("combinations", scope, sum(one.count for one in answer.combinations))
    return answer


async def series(call: Call) -> models.SeriesAnswer:
    """Answer ``GET /v1/series/UID``."""
    row = await _permitted(call)
    kept = await call.work(lambda: _kept_about(call, row))
    reports = await call.work(lambda: _reports_of(call, row))
    await call.audit("series", None, 1)
    return models.SeriesAnswer(
        row=row_of(row),
        attachments=[
            models.Attachment(
                modality=one.modality, sop_uid=one.sop_uid, sha256=one.sha256, size=one.size
            )
            for one in kept
        ],
        reports=[report.text for report in reports],
    )


async def thumbnail(call: Call) -> None:
    """Answer ``GET /v1/series/UID/thumbnail``."""
    asked = call.parameters(models.ThumbnailQuery)
    row = await _permitted(call)
    path = call.parts.layout.absolute(row.path)
    picture = await call.work(lambda: pictures.thumbnail(path, row, asked.size))
    await _permitted(call)  # it may have got another row, with another tier, since the first look
    await call.audit("thumbnail", None, 1)
    call.handler.set_header("Content-Type", "image/png")
    call.handler.write(picture)


def _kept_about(call: Call, row: Series) -> list[Kept]:
    """Return what was kept beside a series, of the same person and within the project's tier."""
    # Whoever writes an object can have it refer to any series.
    return [
        kept
        for kept in call.parts.catalogue.kept_about_series(row.series_uid)
        if kept.tier <= call.project.tier and kept.patient_id == row.patient_id
    ]


def _reports_of(call: Call, row: Series) -> list[Report]:
    """Return the reports of a series' study, where the project's tier allows reports."""
    if call.project.tier < REPORTS_TIER:
        return []
    # A UID says nothing of who sent it: what another hospital says of the study is not of it.
    return [
        report
        for report in call.parts.reports.of_study(row.study_uid)
        if report.facility == row.facility
    ]


async def _permitted(call: Call) -> Series:
    uid = call.part("series")
    row = await call.work(lambda: call.access.series(uid))
    if row is None:
        # The same for one that there is not, and one that this project may not see.
        raise RefusedError("not-found", "there is no such series")
    return row


async def search(call: Call) -> models.SearchAnswer:
    """Answer ``POST /v1/search``."""
    asked = call.body(models.SearchRequest)
    words = words_of(asked.text)
    if not words:
        raise RefusedError("malformed", "text: must hold a word")
    scope = scope_of(asked)
    narrowed = scope.query
    for word in words:
        narrowed &= Condition("description", "contains", (word,))
    described = Scope(narrowed, scope.selections)
    found: list[models.Row] = []
    if not asked.after:
        first = models.PageRequest(limit=asked.limit)
        found = (await call.work(lambda: call.access.page(described, first))).rows
    hits, following = await call.work(lambda: _reports(call, scope, asked, words))
    await call.audit("search", described, len(found) + len(hits))
    return models.SearchAnswer(series=found, reports=hits, next=following)


def _reports(
    call: Call, scope: Scope, asked: models.SearchRequest, words: Sequence[str]
) -> tuple[list[models.ReportHit], str | None]:
    """Return reports of studies of which the project may see a series, and where to go on."""
    hits: list[models.ReportHit] = []
    if call.project.tier < REPORTS_TIER:
        return hits, None
    facilities = call.access.facilities(scope)
    for reports in call.parts.reports.search(
        words, facilities, asked.after, ended=call.job.is_over
    ):
        permitted = call.access.studies(scope, {report.study_uid for report in reports})
        for report in reports:
            series_uids = permitted.get((report.study_uid, report.facility))
            if series_uids is None:
                continue
            text, marks = snippet(report.text, words)
            hits.append(
                models.ReportHit(
                    study_uid=report.study_uid,
                    series=series_uids,
                    snippet=text,
                    marks=marks,
                )
            )
            if len(hits) == asked.limit:
                return hits, report.key
    return hits, None


async def export(call: Call) -> None:
    """Answer ``POST /v1/export``."""
    asked = call.body(models.ExportRequest)
    scope = scope_of(asked)
    kind = _kind(call.handler.request.headers.get("Accept", LINES))
    withdrawals = await call.work(call.parts.cohorts.withdrawals)
    count = await call.work(lambda: call.access.count(scope))
    if asked.limit is None and count > models.MOST_EXPORTED:
        raise RefusedError(
            "malformed",
            f"the query gives {count} series, and at most {models.MOST_EXPORTED} can be given at "
            "once; narrow it, or say a limit",
        )
    wanted = min(count, asked.limit or count)
    pieces: Iterator[bytes] = await call.work(
        lambda: (call.access.arrow if kind == ARROW else call.access.lines)(
            scope, asked.columns, wanted
        )
    )
    await call.audit("export", scope, wanted)
    call.handler.set_header("Content-Type", kind)

    def step() -> bytes | None:
        piece = next(pieces, None)
        # Whoever reads slowly would go on getting rows of the index as it was.
        if call.parts.cohorts.withdrawals() != withdrawals:
            raise RefusedError("changed", "a person withdrew meanwhile; export again")
        return piece

    while piece := await call.work(step):
        call.check_live()
        call.handler.write(piece)
        await call.handler.flush()


def _kind(accept: str) -> str:
    wanted = [part.partition(";")[0].strip() for part in accept.split(",")]
    for kind in wanted:
        if kind in {LINES, ARROW}:
            return kind
        if kind in {"*/*", "application/*"}:
            return LINES
    raise RefusedError("not-acceptable", f"rows are given as {LINES} or {ARROW}")


async def description(call: Call) -> None:
    """Answer ``GET /v1/openapi.json``."""
    from kakehashi.store.service.openapi import document  # noqa: PLC0415 - it lists this module

    call.handler.write(as_json(document()))
