"""The answers about cohorts: saved queries, and lists that are frozen from them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kakehashi.errors import RefusedError
from kakehashi.store.cohorts import (
    TooManyCohortsError,
    TooMuchFrozenError,
    WithdrawnMeanwhileError,
)
from kakehashi.store.layout import BLOCK_SIZE
from kakehashi.store.service import models
from kakehashi.store.service.call import scope, scope_of

if TYPE_CHECKING:
    from kakehashi.store.catalogue import Series
    from kakehashi.store.cohorts import Frozen, Member, SavedCohort, Version
    from kakehashi.store.service.call import Call

_VERSION = re.compile("[1-9][0-9]{0,8}")


async def save(call: Call) -> models.CohortFacts:
    """Answer ``POST /v1/cohorts``."""
    asked = call.body(models.SaveRequest)
    meant = scope_of(asked)
    await call.audit("save", meant, await call.work(lambda: call.access.count(meant)))
    try:
        saved = await call.work(
            lambda: call.parts.cohorts.save(
                project=call.claims.project,
                owner=call.claims.person,
                name=asked.name,
                query=meant.query.canonical(),
                selections=meant.selections,
            )
        )
    except TooManyCohortsError as error:
        raise RefusedError("full", str(error)) from None
    return _facts(saved)


async def visible(call: Call) -> models.CohortsAnswer:
    """Answer ``GET /v1/cohorts``."""
    claims = call.claims
    found = await call.work(lambda: call.parts.cohorts.visible(claims.project, claims.person))
    call.check_live()
    return models.CohortsAnswer(cohorts=[_facts(saved) for saved in found])


async def show(call: Call) -> models.CohortAnswer:
    """Answer ``GET /v1/cohorts/ID``."""
    saved = await _find(call)
    meant = scope(saved.query, saved.selections)
    count = await call.work(lambda: call.access.count(meant))
    versions = await call.work(lambda: call.parts.cohorts.versions(saved.id))
    await call.audit("cohort", meant, count)
    return models.CohortAnswer(
        **_facts(saved).model_dump(), count=count, versions=[_version(one) for one in versions]
    )


async def share(call: Call) -> models.CohortFacts:
    """Answer ``POST /v1/cohorts/ID/share``."""
    call.body(models.ShareRequest)
    saved = await _find(call)
    call.check_live()
    if not await call.work(lambda: call.parts.cohorts.share(saved.id, call.claims.person)):
        raise RefusedError("not-owner", "only a cohort's owner can share it")
    return _facts(await _find(call))


async def freeze(call: Call) -> models.FrozenAnswer:
    """Answer ``POST /v1/cohorts/ID/freeze``."""
    call.body(models.FreezeRequest)
    saved = await _find(call)
    meant = scope(saved.query, saved.selections)

    def listed() -> tuple[list[Member], int]:
        seen = call.parts.cohorts.withdrawals()
        # Counted first: the list of a whole catalogue would not fit in memory.
        count = call.access.count(meant)
        if count > models.MOST_FROZEN:
            raise RefusedError(
                "malformed",
                f"the cohort has {count} series, and at most {models.MOST_FROZEN} can be "
                "frozen; narrow its query",
            )
        rows = call.access.records(call.access.uids(meant))
        return [(row.series_uid, row.blocks) for row in rows], seen

    members, seen = await call.work(listed)
    # Before the list is written: no version is there that does not stand in the trail.
    await call.audit("freeze", meant, len(members))
    call.check_live()  # the trail may have been waited for
    try:
        frozen = await call.work(
            lambda: call.parts.cohorts.freeze(
                saved, members, by=call.claims.person, withdrawals=seen
            )
        )
    except WithdrawnMeanwhileError as error:
        raise RefusedError("changed", str(error)) from None
    except TooMuchFrozenError as error:
        raise RefusedError("full", str(error)) from None
    return models.FrozenAnswer(**_version(frozen).model_dump(), count=len(frozen.members))


async def version(call: Call) -> None:
    """Answer ``GET /v1/cohorts/ID/versions/N``."""
    saved = await _find(call)
    number = call.part("version")
    frozen = await _frozen(call, saved, int(number) if _VERSION.fullmatch(number) else 0)

    def step() -> tuple[int, str]:
        rows, changed = _now(call, frozen)
        answer = models.VersionAnswer(
            **_version(frozen).model_dump(),
            count=len(rows),
            series=[row.series_uid for row in rows],
            changed=changed,
            manifest=_manifest(saved, frozen, rows),
        )
        return len(rows), answer.model_dump_json()

    count, text = await call.work(step)  # long lists are written here, and hold up nobody
    await call.audit("version", None, count)
    call.handler.write(text)


async def diff(call: Call) -> models.DiffAnswer:
    """Answer ``GET /v1/cohorts/ID/diff``."""
    asked = call.parameters(models.DiffQuery)
    saved = await _find(call)
    a, b = [await _uids(call, await _frozen(call, saved, number)) for number in (asked.a, asked.b)]
    await call.audit("diff", None, len(a | b))
    return models.DiffAnswer(only_a=sorted(a - b), only_b=sorted(b - a), both=len(a & b))


async def _find(call: Call) -> SavedCohort:
    claims, cohort = call.claims, call.part("cohort")
    saved = await call.work(lambda: call.parts.cohorts.find(cohort, claims.project, claims.person))
    if saved is None:
        raise RefusedError("not-found", "there is no such cohort")
    return saved


async def _frozen(call: Call, saved: SavedCohort, number: int) -> Frozen:
    frozen = await call.work(lambda: call.parts.cohorts.frozen(saved.id, number))
    if frozen is None:
        raise RefusedError("not-found", "there is no such version of the cohort")
    return frozen


def _now(call: Call, frozen: Frozen) -> tuple[list[Series], list[str]]:
    """Return what of a fixed list is there and permitted now, as it was when it was fixed.

    Apart from these, the series that are permitted, and were packed anew since.
    """
    blocks = dict(frozen.members)
    rows = list(call.access.records(blocks))
    same = [row for row in rows if row.blocks == blocks[row.series_uid]]
    return same, [row.series_uid for row in rows if row.blocks != blocks[row.series_uid]]


async def _uids(call: Call, frozen: Frozen) -> set[str]:
    rows, _ = await call.work(lambda: _now(call, frozen))
    return {row.series_uid for row in rows}


def _facts(saved: SavedCohort) -> models.CohortFacts:
    return models.CohortFacts(
        id=saved.id,
        name=saved.name,
        owner=saved.owner,
        query=saved.query,
        selections=saved.selections,
        shared=saved.shared,
        created_at=saved.created_at,
    )


def _version(frozen: Version) -> models.VersionFacts:
    return models.VersionFacts(
        version=frozen.version,
        query=frozen.query,
        selections=frozen.selections,
        sha256=frozen.sha256,
        tombstones=frozen.tombstones,
        frozen_by=frozen.frozen_by,
        frozen_at=frozen.frozen_at,
    )


def _manifest(saved: SavedCohort, frozen: Frozen, rows: list[Series]) -> dict[str, Any]:
    files = []
    for row in rows:
        facts = row.as_json()
        del facts["path"]
        files.append(
            {
                "path": f"series/{row.series_uid}.ozx",
                "size": row.size,
                "blocks": row.blocks,
                "series": facts,
            }
        )
    return {
        "kakehashi_manifest": 1,
        "project": saved.project,
        "cohort": {"version": frozen.version, "sha256": frozen.sha256},
        "block_size": BLOCK_SIZE,
        "files": files,
    }
