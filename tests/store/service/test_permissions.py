"""What a project has no grant for it cannot see, count, or learn the existence of."""

from __future__ import annotations

import datetime as dt
import http.client
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from kakehashi.config import Config
from kakehashi.store.catalogue import Kept
from kakehashi.store.facets import FACETS
from kakehashi.store.permission import permission
from kakehashi.store.query import (
    COLUMNS,
    FALSE,
    TRUE,
    Condition,
    Query,
    any_of,
    matches,
    value_of,
)
from kakehashi.store.service import access, models
from kakehashi.store.service.access import Access
from tests.store.conftest import settings

from .serving import PROJECTS, TODAY, Asker, Service, running, series

QUERIES = 1000
OTHERS = 0.4
"""Share of the queries that go to one of the other addresses, too."""


class Draw:
    """Random queries over the values that are there, and some that are not."""

    def __init__(self, rows: list[Any], seed: int) -> None:
        self.random = random.Random(seed)
        self.values = {
            name: sorted({value for row in rows for value in self._each(row, name)}, key=str)
            for name in COLUMNS
        }

    @staticmethod
    def _each(row: Any, name: str) -> tuple[Any, ...]:
        value = value_of(row, name)
        return value or () if COLUMNS[name].kind == "flags" else (value,)

    def condition(self) -> Query:
        name = self.random.choice(list(COLUMNS))
        kind = COLUMNS[name].kind
        known = [value for value in self.values[name] if value is not None]
        some = known or ["x"]
        if kind == "flags":
            return Condition(name, "contains", (self.random.choice([*some, "none"]),))
        if kind == "text" and self.random.random() < 0.4:
            text = self.random.choice([*some, "秘", "ct", "%", "m'"])
            return Condition(name, "contains", (text[: self.random.randint(1, len(text))],))
        if kind in {"number", "integer", "date", "text"} and self.random.random() < 0.4:
            return Condition(
                name, self.random.choice(["<", "<=", ">", ">="]), (self.random.choice(some),)
            )
        many = self.random.sample(self.values[name], min(len(self.values[name]), 3))
        return Condition(name, self.random.choice(["in", "not in"]), tuple(many))

    def query(self, depth: int = 3) -> Query:
        kind = self.random.random()
        if depth == 0 or kind < 0.4:
            return self.condition() if kind > 0.02 else TRUE
        if kind < 0.55:
            return ~self.query(depth - 1)
        one, two = self.query(depth - 1), self.query(depth - 1)
        return one & two if self.random.random() < 0.5 else one | two

    def selections(self) -> dict[str, list[Any]]:
        chosen = self.random.sample(FACETS, self.random.choice([0, 0, 1, 2]))
        return {
            name: self.random.sample(self.values[name], min(2, len(self.values[name])))
            for name in chosen
            if self.values[name]
        }


class Truth:
    """The answers, by looking at every row."""

    def __init__(self, rows: list[Any], granted: Query) -> None:
        self.rows = [row for row in rows if matches(granted, row)]

    def met(self, query: Query, selections: dict[str, list[Any]], but: str = "") -> list[Any]:
        asked = query
        for name, values in selections.items():
            if name != but:
                asked &= any_of(name, values)
        return [row for row in self.rows if matches(asked, row)]

    def facets(self, query: Query, selections: dict[str, list[Any]]) -> dict[str, Any]:
        every = self.met(query, selections)
        found = {}
        for name in FACETS:
            rows = self.met(query, selections, name) if name in selections else every
            counter: Counter[Any] = Counter()
            for row in rows:
                value = value_of(row, name)
                counter.update((value or (None,)) if COLUMNS[name].kind == "flags" else (value,))
            found[name] = counter
        return {"count": len(every), "facets": found}


def counters(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "count": answer["count"],
        "facets": {
            name: Counter({one["value"]: one["count"] for one in values})
            for name, values in answer["facets"].items()
        },
    }


def lines(asker: Asker, body: dict[str, Any], *columns: str) -> list[dict[str, Any]]:
    answer = asker.post("export", **body, columns=columns)
    assert answer.status == 200, answer.body
    return [json.loads(line) for line in answer.body.splitlines()]


def others(asker: Asker, body: dict[str, Any], draw: random.Random) -> Iterator[tuple[str, Any]]:
    """Ask one of the other addresses for the same, and give what it said, to be compared."""
    match draw.randrange(7):
        case 0:
            order = draw.choice(["study_date", "slices", "description", "contrast"])
            after, uids, count = 0, [], None
            while after is not None:
                page = asker.post("page", **body, order=order, after=after, limit=100).ok()
                uids += [row["series_uid"] for row in page["rows"]]
                assert count in {None, page["count"]}
                after, count = page["next"], page["count"]
            assert count == len(uids)
            yield "uids", sorted(uids)
        case 1:
            column = draw.choice(["slices", "age", "study_date", "kvp"])
            found = asker.post("histogram", **body, column=column, bins=7).ok()
            yield "count", found["unknown"] + sum(one["count"] for one in found["bins"])
        case 2:
            found = asker.post("pivot", **body, rows="vendor", columns="facility").ok()
            yield "count", sum(map(sum, found["counts"]))
            yield "facilities", sorted(found["columns"])
        case 3:
            names = ["vendor", "model", "kernel"]
            found = asker.post("combinations", **body, columns=names).ok()
            yield "count", sum(one["count"] for one in found["combinations"])
        case 4:
            yield "uids", sorted(row["series_uid"] for row in lines(asker, body, "series_uid"))
        case 5:
            saved = asker.post("cohorts", **body, name="fuzz").ok()
            yield "count", asker.get(f"cohorts/{saved['id']}").ok()["count"]
            frozen = asker.post(f"cohorts/{saved['id']}/freeze").ok()
            yield "count", frozen["count"]
            found = asker.get(f"cohorts/{saved['id']}/versions/{frozen['version']}").ok()
            yield "uids", found["series"]
        case 6:
            found = asker.post("search", **body, text="極秘", limit=200).ok()
            yield "described", sorted(row["series_uid"] for row in found["series"])
            yield "reported", {hit["study_uid"]: hit["series"] for hit in found["reports"]}


def expected(what: str, rows: list[Any]) -> Any:
    match what:
        case "uids":
            return sorted(row.series_uid for row in rows)
        case "count":
            return len(rows)
        case "facilities":
            return sorted({row.facility for row in rows})
        case "described":
            return sorted(r.series_uid for r in rows if "極秘" in (r.description or ""))
        case "reported":
            found: dict[str, list[str]] = {}
            for row in rows:
                found.setdefault(row.study_uid, []).append(row.series_uid)
            return {study: sorted(uids) for study, uids in found.items()}
    raise AssertionError(what)


def fuzz(service: Service, projects: dict[str, Query], queries: int, seed: int) -> None:
    """Compare what projects are answered with what every row says."""
    for study in {row.study_uid: row for row in service.rows}.values():
        service.reports.add(study.study_uid, study.facility, "極秘の所見", patient_id="p")
    askers = {name: service.asker(name) for name in projects}
    truths = {name: Truth(service.rows, granted) for name, granted in projects.items()}
    draw = Draw(service.rows, seed)
    for _ in range(queries):
        query, selections = draw.query(), draw.selections()
        body = {"query": query.canonical(), "selections": selections}
        way = draw.random.random()
        for name, asker in askers.items():
            truth = truths[name]
            answer = counters(asker.post("facets", **body).ok())
            assert answer == truth.facets(query, selections), (name, body)
            if way > OTHERS:
                continue
            rows = truth.met(query, selections)
            for what, said in others(asker, body, random.Random(way)):
                assert said == expected(what, rows), (name, what, body)


def test_a_thousand_random_queries_give_what_the_grant_allows_and_no_more(on_both):
    granted = {name: permission(PROJECTS[name], TODAY) for name in ("none", "part")}
    fuzz(on_both, granted, QUERIES, seed=1)
    # The check is worth something: the one sees a good part of the rows, the other none.
    seen = {name: len(Truth(on_both.rows, one).rows) for name, one in granted.items()}
    assert seen["none"] == 0
    assert 20 <= seen["part"] < len(on_both.rows) / 2


@pytest.mark.parametrize("opened", ["none", "part"])
def test_the_check_turns_red_when_permissions_are_not_looked_at(tmp_path, opened):
    """Positive control: with everything permitted the same comparison must fail."""
    granted = {opened: permission(PROJECTS[opened], TODAY)}
    config = Config.model_validate(settings(tmp_path))
    with (
        running(config, series(60), permission=lambda _project, _today: TRUE) as open_to_all,
        pytest.raises(AssertionError),
    ):
        fuzz(open_to_all, granted, 20, seed=2)


def test_a_project_without_the_grant_is_offered_no_value(service):
    for name in ("none", "over"):
        answer = service.asker(name).post("facets").ok()
        assert answer["count"] == 0
        assert set(answer["facets"]) == set(FACETS)
        assert not any(answer["facets"].values())


def test_values_outside_the_grant_are_not_listed(service):
    part = service.asker("part").post("facets", selections={"facility": ["F04"]}).ok()
    values = {one["value"] for one in part["facets"]["facility"]}
    assert values <= {"F01", "F02", "F03"}
    assert {one["value"] for one in part["facets"]["modality"]} <= {"CT", "MR"}
    assert part["count"] == 0


def test_one_that_may_not_be_seen_answers_as_one_that_there_is_not(service):
    granted = permission(PROJECTS["part"], TODAY)
    hidden = next(row for row in service.rows if not matches(granted, row))
    shown = next(row for row in service.rows if matches(granted, row))
    asker = service.asker("part")
    assert asker.get(f"series/{shown.series_uid}").ok()["row"]["series_uid"] == shown.series_uid
    for tail in ("", "/thumbnail", "/thumbnail?size=64"):
        answers = [
            asker.get(f"series/{uid}{tail}")
            for uid in (hidden.series_uid, "1.2.3.4", "nonsense", "9" * 70, "%00", "..")
        ]
        assert {(answer.status, answer.body) for answer in answers} == {
            (404, b'{"error":"not-found","message":"there is no such series"}')
        }
        kept = [{k: v for k, v in answer.headers.items() if k != "Date"} for answer in answers]
        assert all(one == kept[0] for one in kept)


def test_one_that_may_not_be_seen_takes_the_same_steps(service, monkeypatch):
    looked_at: list[object] = []

    def counted(query, row):
        looked_at.append(row)
        return matches(query, row)

    monkeypatch.setattr(access, "matches", counted)
    granted = permission(PROJECTS["part"], TODAY)
    hidden = next(row for row in service.rows if not matches(granted, row))
    asker = service.asker("part")
    for uid in (hidden.series_uid, "1.2.3.4"):
        looked_at.clear()
        assert asker.get(f"series/{uid}").status == 404
        assert len(looked_at) == 1


def test_a_search_finds_reports_of_permitted_series_only(service):
    granted = permission(PROJECTS["part"], TODAY)
    studies: dict[str, list[Any]] = {}
    for row in service.rows:
        studies.setdefault(row.study_uid, []).append(row)
    for study, rows in studies.items():
        service.reports.add(study, rows[0].facility, f"所見 {study}: 結節", patient_id="p")
    hits = service.asker("part").post("search", text="結節", limit=200).ok()
    expect = {
        study: sorted(row.series_uid for row in rows if matches(granted, row))
        for study, rows in studies.items()
        if any(matches(granted, row) for row in rows)
    }
    assert {hit["study_uid"]: hit["series"] for hit in hits["reports"]} == expect
    nothing = service.asker("none").post("search", text="結節").ok()
    assert nothing == {"series": [], "reports": [], "next": None}


def test_pages_of_reports_say_nothing_of_how_many_there_are(service):
    for number, row in enumerate(service.rows):
        service.reports.add(row.study_uid, row.facility, f"結節 {number}", patient_id="p")
    asker, found, after = service.asker("part"), [], ""
    while after is not None:
        page = asker.post("search", text="結節", limit=3, after=after).ok()
        found += [hit["snippet"] for hit in page["reports"]]
        after = page["next"]
        assert after is None or len(after) == 64
    assert len(found) == len(set(found)) > 5
    whole = asker.post("search", text="結節", limit=200).ok()
    assert sorted(found) == sorted(hit["snippet"] for hit in whole["reports"])


def test_what_is_withdrawn_is_gone_from_every_answer(service):
    asker = service.asker("all")
    gone = service.rows[7]
    assert asker.get(f"series/{gone.series_uid}").status == 200
    before = asker.post("facets", columns=[]).ok()["count"]
    same = [row.series_uid for row in service.rows if row.patient_id == gone.patient_id]
    service.catalogue.withdraw(gone.patient_id, "operator", "wish")
    service.index.withdraw(same)
    assert asker.get(f"series/{gone.series_uid}").status == 404
    assert asker.post("facets", columns=[]).ok()["count"] == before - len(same)


def test_a_tier_above_the_projects_is_not_there(service):
    rows = {row.tier: row for row in service.rows}
    asker = service.asker("part")
    assert asker.get(f"series/{rows[3].series_uid}/thumbnail").status == 404
    assert {one["value"] for one in asker.post("facets").ok()["facets"]["tier"]} <= {1, 2}


def test_today_decides(service):
    assert permission(PROJECTS["over"], TODAY) == FALSE
    for address in ("facets", "page"):
        assert service.asker("over").post(address).ok()["count"] == 0


def test_what_another_hospital_says_of_a_study_is_not_found_with_it(service):
    """A UID says nothing of who sent it; the project has grants for both hospitals."""
    granted = permission(PROJECTS["part"], TODAY)
    shown = [row for row in service.rows if matches(granted, row)]
    row = shown[0]
    (other, *_) = sorted({one.facility for one in shown} - {row.facility})
    service.reports.add(row.study_uid, other, "結節 elsewhere", patient_id="p")
    service.reports.add(row.study_uid, row.facility, "結節 here", patient_id="p")
    for name in ("part", "all"):
        hits = service.asker(name).post("search", text="結節").ok()["reports"]
        assert [hit["snippet"] for hit in hits] == ["結節 here"]


def test_what_belongs_to_a_series_is_not_shown_above_the_projects_tier_or_of_others(service):
    granted = permission(PROJECTS["part"], TODAY)
    row = next(row for row in service.rows if matches(granted, row))
    for number, (tier, patient) in enumerate(
        [(2, row.patient_id), (3, row.patient_id), (1, "somebody else"), (1, None)]
    ):
        service.catalogue.add_kept(
            Kept(
                sha256=f"{number:064x}",
                sop_uid=f"1.2.{number}",
                series_uid="1.9",
                study_uid=row.study_uid,
                patient_id=patient,
                tier=tier,
                modality="SR",
                reason="not an image",
                path=f"kept/aa/{number}.dcm",
                size=7,
                added_at="2026-01-01T00:00:00Z",
                refers_to=(row.series_uid,),
            )
        )
    for name, seen in (("part", ["1.2.0"]), ("all", ["1.2.0", "1.2.1"])):
        found = service.asker(name).get(f"series/{row.series_uid}").ok()["attachments"]
        assert [one["sop_uid"] for one in found] == seen


def test_what_was_asked_before_a_session_was_revoked_is_not_answered_after(service, monkeypatch):
    asker = service.asker("all")
    row = service.rows[0]
    assert asker.post("page").status == 200
    page, find = type(service.index).page, type(service.catalogue).select

    def revoked(step):
        def run(*arguments, **options):
            found = step(*arguments, **options)
            service.live.clear()
            return found

        return run

    monkeypatch.setattr(type(service.index), "page", revoked(page))
    monkeypatch.setattr(type(service.catalogue), "select", revoked(find))
    live = set(service.live)
    for answer in (
        lambda: asker.post("page"),
        lambda: asker.post("search", text="造影"),
        lambda: asker.get(f"series/{row.series_uid}"),
    ):
        service.live |= live
        service.events.clear()
        assert answer().status == 403
        assert service.events == []


@pytest.mark.parametrize("what", ["withdrawn", "midnight"])
def test_an_export_ends_when_a_person_withdraws_or_the_projects_last_day_is_over(
    service, monkeypatch, what
):
    monkeypatch.setattr(access, "_PIECE", 5)
    today = [TODAY]
    object.__setattr__(service.parts, "today", lambda: today[0])  # the parts are frozen
    asker = service.asker("last")
    whole = asker.post("export", columns=["series_uid"])
    assert len(whole.body.splitlines()) == len(service.rows)
    pieces = Access._pieces

    def changing(*arguments):
        for number, piece in enumerate(pieces(*arguments)):
            if number == 2 and what == "withdrawn":
                service.cohorts.withdraw([])
            if number == 2 and what == "midnight":
                today[0] += dt.timedelta(1)
            yield piece

    monkeypatch.setattr(Access, "_pieces", changing)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        asker.post("export", columns=["series_uid"])


def test_a_list_too_long_to_be_frozen_is_not_made(service, monkeypatch):
    monkeypatch.setattr(models, "MOST_FROZEN", len(service.rows) - 1)
    asker = service.asker("all")
    saved = asker.post("cohorts", name="everything").ok()
    made: list[str] = []
    monkeypatch.setattr(Access, "uids", lambda *_: made.append("all") or [])
    answer = asker.post(f"cohorts/{saved['id']}/freeze")
    assert answer.status == 422
    assert f"{len(service.rows)} series" in answer.json["message"]
    assert made == []
