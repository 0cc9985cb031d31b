"""Who looks at much stands in the audit trail, and who only clicks does not fill it."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from kakehashi.audit import Audit
from kakehashi.config import Config
from kakehashi.errors import AuditError
from kakehashi.store.service.notes import MOST_UNSAID, SEARCH_S, Notes
from kakehashi.store.service.parts import AuditEvent
from tests.store.conftest import settings

from .serving import running, series

PAGE = AuditEvent("page", "a" * 32, "ct", "sato", "d1", 200, 1000)
SEARCH = replace(PAGE, kind="search", count=3)


class Trail:
    """A trail with notes, and a clock that a test sets."""

    def __init__(self, path) -> None:
        self.now = 0.0
        self.audit = Audit(path)
        self.notes = Notes(self.audit, clock=lambda: self.now)

    def records(self) -> list[tuple[str, dict[str, object]]]:
        return [(one.kind, one.detail) for one in self.audit.records()]


@pytest.fixture
def trail(tmp_path):
    return Trail(tmp_path / "audit.jsonl")


def looked(**seen: int) -> tuple[str, dict[str, object]]:
    return (
        "catalogue.looked",
        {"project": "ct", "rows": 0, "series": 0, "thumbnails": 0, **seen},
    )


def test_lists_stand_in_the_trail_one_by_one(trail):
    for kind in ("export", "freeze", "version", "diff"):
        trail.notes.add(replace(PAGE, kind=kind))
    assert [kind for kind, _ in trail.records()] == [
        "catalogue.export",
        "catalogue.freeze",
        "catalogue.version",
        "catalogue.diff",
    ]
    assert trail.records()[0][1] == {"project": "ct", "series": 200, "query_digest": "d1"}


@pytest.mark.parametrize(
    ("kind", "each", "name"),
    [("page", 200, "rows"), ("series", 1, "series"), ("thumbnail", 1, "thumbnails")],
)
def test_a_harvest_shows_while_it_goes_on(trail, kind, each, name):
    for _ in range(2 * MOST_UNSAID[kind] // each - 1):
        trail.notes.add(replace(PAGE, kind=kind, count=each))
    assert trail.records() == [looked(**{name: MOST_UNSAID[kind]})]
    trail.notes.add(replace(PAGE, kind=kind, count=each))
    assert trail.records() == 2 * [looked(**{name: MOST_UNSAID[kind]})]


def test_what_is_left_stands_there_when_the_token_is_over(trail):
    trail.notes.add(PAGE)
    trail.notes.add(replace(PAGE, kind="thumbnail", count=1))
    trail.notes.add(replace(PAGE, kind="facets", count=10**6))
    trail.now = 999.0
    trail.notes.flush()
    assert trail.records() == []
    trail.notes.add(replace(PAGE, kind="series", count=1, expires=1500))  # a newer token
    trail.now = 1499.0
    trail.notes.flush()
    assert trail.records() == []
    trail.now = 1500.0
    trail.notes.flush()
    trail.notes.flush()
    assert trail.records() == [looked(rows=200, series=1, thumbnails=1)]


def test_sessions_are_counted_apart(trail):
    trail.notes.add(PAGE)
    trail.notes.add(replace(PAGE, session="b" * 32, person="ito", count=7))
    trail.notes.flush(everything=True)
    found = [(one.session, one.person, one.detail["rows"]) for one in trail.audit.records()]
    assert found == [("a" * 32, "sato", 200), ("b" * 32, "ito", 7)]


def test_words_as_they_are_typed_are_two_records_a_minute(trail):
    for number in range(60):
        trail.now = float(number)
        trail.notes.add(replace(SEARCH, query_digest=f"d{number % 30}"))
        trail.notes.flush()
    first = {"project": "ct", "searches": 1, "series": 3, "query_digests": ["d0"]}
    assert trail.records() == [("catalogue.search", first)]
    trail.now = SEARCH_S
    trail.notes.flush()
    (_, rest) = trail.records()[1]
    assert (rest["searches"], rest["series"]) == (59, 177)
    assert set(rest["query_digests"]) == {f"d{number}" for number in range(30)}
    trail.now += 3 * SEARCH_S
    trail.notes.flush()
    assert len(trail.records()) == 2
    trail.notes.add(SEARCH)
    assert len(trail.records()) == 3


def test_a_trail_that_cannot_be_written_loses_nothing_and_gives_nothing(trail):
    trail.notes.add(replace(PAGE, count=900))
    trail.audit.path.mkdir()
    with pytest.raises(AuditError):
        trail.notes.add(PAGE)
    with pytest.raises(AuditError):
        trail.notes.add(SEARCH)
    with pytest.raises(AuditError):
        trail.notes.flush(everything=True)
    trail.audit.path.rmdir()
    trail.notes.flush(everything=True)
    assert [kind for kind, _ in trail.records()] == ["catalogue.search", "catalogue.looked"]
    assert trail.records()[1] == looked(rows=1100)


def test_no_search_is_given_while_an_earlier_one_could_not_be_written(trail):
    trail.audit.path.mkdir()
    for _ in range(3):
        with pytest.raises(AuditError):
            trail.notes.add(SEARCH)
    trail.audit.path.rmdir()
    trail.notes.add(SEARCH)
    ((kind, detail),) = trail.records()
    assert (kind, detail["searches"], detail["series"]) == ("catalogue.search", 4, 12)


def test_when_a_minutes_searches_cannot_be_written_the_next_are_not_given(trail):
    trail.notes.add(SEARCH)
    trail.notes.add(SEARCH)
    trail.now = SEARCH_S
    kept = trail.audit.path.rename(trail.audit.path.with_name("kept"))
    trail.audit.path.mkdir()
    for _ in range(2):
        with pytest.raises(AuditError):
            trail.notes.flush()
        with pytest.raises(AuditError):
            trail.notes.add(SEARCH)
    trail.audit.path.rmdir()
    kept.rename(trail.audit.path)
    trail.notes.flush()
    assert [detail["searches"] for _, detail in trail.records()] == [1, 3]


def test_who_searches_fast_leaves_no_more_rows_unsaid_than_who_turns_pages(trail):
    most = MOST_UNSAID["search"]
    for number in range(2 * most // 200):
        trail.notes.add(replace(SEARCH, count=200, query_digest=f"d{number}"))
    said = sum(int(detail["series"]) for _, detail in trail.records())
    assert 200 + most <= said <= 2 * most
    assert [detail["searches"] for _, detail in trail.records()] == [1, most // 200]


def test_who_waits_for_the_disk_holds_up_nobody_else(tmp_path):
    going_on, waiting = threading.Event(), threading.Event()

    def slow(event: AuditEvent) -> None:
        if event.kind == "search":
            waiting.set()
            assert going_on.wait(10)

    with running(Config.model_validate(settings(tmp_path)), series(6), audit=slow) as service:
        one, other = service.asker("all"), service.asker("all")
        found: list[int] = []
        thread = threading.Thread(
            target=lambda: found.append(one.post("search", text="造影").status)
        )
        thread.start()
        assert waiting.wait(10)
        assert other.post("facets").ok()["count"] == 6
        assert found == []  # and nothing is given before it is noted
        going_on.set()
        thread.join(10)
        assert found == [200]


def test_a_name_that_was_sought_is_not_to_be_guessed_from_its_digest(service):
    """Whoever reads log or trail can hash a list of names too; the key they have not."""
    import hashlib

    service.asker("all").post("search", text="山田").ok()
    (event,) = service.events
    for text in ("山田", "'山田' in description"):
        assert event.query_digest != hashlib.sha256(text.encode()).hexdigest()
    assert event.query_digest == service.parts.tokens.digest("'山田' in description")
