"""The page of what hospitals sent: who sees it, what it says, and how it stays fresh."""

from __future__ import annotations

import contextvars
import datetime as dt
import http.cookiejar
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.store import arrivals_summary
from kakehashi.store.arrivals_summary import Arrivals, public_reason
from kakehashi_spawners import i18n
from kakehashi_spawners.arrivals import DAYS, Cell, Reason, lay_out, reason
from tests.pages.conftest import Hub, Visit
from tests.pages.summaries import TODAY, ago, day, nothing, summary

browser = pytest.mark.browser
NOON = dt.datetime(2026, 11, 20, 3, 0, tzinfo=dt.UTC)
PAGE = "kakehashi/arrivals"


def read(document: dict[str, Any]) -> Arrivals:
    return Arrivals.model_validate(document)


def one_hospital(*days: dict[str, Any], written_at: dt.datetime = NOON) -> Arrivals:
    facilities = [{"facility": "F01", "days": list(days)}]
    return read({**nothing(), "written_at": written_at.isoformat(), "facilities": facilities})


def fetch(hub: Hub, person: str | None) -> tuple[int, str, str]:
    """Ask for the page without a browser: status, address at the end, text."""
    jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
    opener = urllib.request.build_opener(jar)
    if person:
        opener.open(f"{hub.url}stand-in?person={person}", timeout=10).close()
    try:
        with opener.open(hub.url + PAGE, timeout=20) as response:
            return response.status, response.url, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.url or "", error.read().decode()


# ---- Who sees it


def test_the_store_is_asked_with_the_hubs_credential_for_an_operator(hub: Hub) -> None:
    hub.store.answer = 200, summary()
    hub.store.asked.clear()
    status, _, text = fetch(hub, "operator")
    assert status == 200
    assert "11,800" in text
    assert hub.store.asked == [("/v1/arrivals", "Bearer of-this-hub")]


def test_nobody_else_sees_it_and_the_store_is_not_even_asked(hub: Hub) -> None:
    hub.store.answer = 200, summary()
    hub.store.asked.clear()
    status, _, text = fetch(hub, "researcher")
    assert status == 403
    assert "11,800" not in text
    status, url, text = fetch(hub, None)
    assert "next=%2Fhub%2Fkakehashi%2Farrivals" in url
    assert "11,800" not in text
    assert hub.store.asked == []


@browser
def test_only_who_may_see_it_finds_a_link(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.log_in("researcher")
    assert person.page.locator(f'a[href$="{PAGE}"]').count() == 0
    assert person.go(PAGE) == 403
    assert person.page.locator("h1").inner_text() == "You may not do this"
    operator = visit()
    operator.hub.store.answer = 200, summary()
    operator.log_in("operator")
    operator.page.get_by_role("link", name="Arrivals").click()
    operator.page.locator("#arrivals-days").wait_for()
    assert operator.page.locator(".bar-nav [aria-current]").inner_text() == "Arrivals"
    operator.go("admin")
    operator.page.locator(f'main a[href$="{PAGE}"]').click()
    operator.page.locator("#arrivals-days").wait_for()


# ---- What it says


@browser
def test_each_state_is_said_in_words_and_by_a_mark(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.hub.store.answer = 200, summary(NOON)
    person.log_in("operator")
    person.go(PAGE)
    page = person.page

    def said(hospital: str, column: int) -> str:
        cell = page.locator("tbody tr", has=page.locator("th", has_text=hospital))
        return " ".join(cell.locator("td").nth(1 + column).inner_text().split())

    assert said("F01", 0) == "9,000 of 9,000 complete"
    assert said("F02", 0) == "11,800 of 12,000 200 missing"
    assert said("F03", 1) == "0 of 8,412 nothing came"
    assert said("F04", 0) == "4,100 no list"
    assert said("F01", 5) == "nothing expected, nothing came"
    assert said("F06", 2) == "1,284,000 of 1,284,001 1 missing"
    marks = page.eval_on_selector_all(
        ".arrival-legend path", "paths => paths.map((one) => one.getAttribute('d'))"
    )
    assert len(set(marks)) == 5
    assert (
        page.locator("tbody tr").nth(1).locator(".arrival-bar > span").nth(1).get_attribute("style")
        == "width: 98%"
    )
    assert page.locator("thead th").nth(2).inner_text().split() == ["Nov", "20", "Fri"]


@browser
def test_quarantine_and_what_is_held_back_stand_apart(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.hub.store.answer = 200, summary()
    person.log_in("operator")
    person.go(PAGE)
    page = person.page
    stopped = page.locator("#arrivals-stopped").inner_text()
    held = page.locator("#arrivals-held").inner_text()
    assert "InvalidDicomError" in stopped
    assert "InvalidDicomError" not in held
    assert "burned-in text" in held
    assert "burned-in text" not in stopped
    facts = " ".join(page.locator(".facts").first.inner_text().split())
    assert "In quarantine 20" in facts
    assert "Held back 1,417" in facts
    assert "120 objects in 4 series" in facts
    assert page.get_by_text("kakehashi store quarantine").count() == 1
    assert page.get_by_text("kakehashi store arrivals").count() == 1


def test_words_of_hospitals_are_escaped_and_what_a_reason_quotes_is_left_out(hub: Hub) -> None:
    document = summary()
    document["quarantine"][0]["reason"] = "cannot be read: ValueError: 'YAMADA^TARO' 19600101"
    hub.store.answer = 200, document
    _, _, text = fetch(hub, "operator")
    assert "&lt;b&gt;with a long name&lt;/b&gt;" in text
    assert "<script>alert" not in text
    assert "cannot be read: ValueError<" in text
    assert "YAMADA" not in text
    assert "19600101" not in text


def test_a_reason_is_said_in_the_pages_language_as_far_as_the_words_have_it() -> None:
    capture = "a secondary capture: text in the pixels may name the patient"

    def said(text: str, language: i18n.Language) -> Reason:
        def ask() -> Reason:
            i18n.set_current(i18n.Choice(language, known=True))
            return reason(text)

        return contextvars.copy_context().run(ask)

    known = Reason(i18n.translate("arrivals.reason-capture", "ja"), "ja")
    assert said(f"held back: {capture}", "ja") == known
    assert said(f"held back: {capture}", "en") == Reason(capture, "en")
    unknown = "cannot be read: ValueError"
    assert said(unknown, "ja") == Reason(unknown, "en")


def test_the_reasons_that_have_words_are_those_that_the_store_gives() -> None:
    folder = Path(arrivals_summary.__file__).parent
    source = "".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    source = re.sub(r'"\s*\n\s*"', "", source)
    given = source + "".join(
        source.replace("{name}", f"{level}InstanceUID") for level in ("Series", "Study")
    )
    words = i18n.catalogue("en")
    texts = [words[key] for key in words if key.startswith("arrivals.reason-")]
    assert len(texts) > 5
    assert [text for text in texts if text not in given] == []
    assert [text for text in texts if public_reason(text) != text] == []


@pytest.mark.parametrize(("minutes", "old"), [(14, False), (16, True), (-5, False)])
def test_old_figures_are_called_old(hub: Hub, minutes: int, old: bool) -> None:
    written = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=minutes)
    hub.store.answer = 200, summary(written)
    status, _, text = fetch(hub, "operator")
    assert status == 200
    assert ('id="arrivals-old"' in text) == old


@pytest.mark.parametrize(
    "answer",
    [
        None,
        (500, {"error": "internal", "message": "the authority failed"}),
        (401, {"error": "credential", "message": "this is not the credential of a hub"}),
        (200, {"kakehashi_arrivals": 2}),
        (200, {**nothing(), "patient": "YAMADA^TARO"}),
        (200, []),
    ],
)
def test_a_store_that_says_nothing_useful_is_called_silent(
    hub: Hub, answer: tuple[int, object] | None
) -> None:
    hub.store.answer = answer
    status, _, text = fetch(hub, "operator")
    assert status == 503
    assert 'id="arrivals-silent"' in text
    assert "kakehashi store arrivals" in text
    assert "YAMADA" not in text


# ---- How it stays fresh


@browser
def test_it_refreshes_itself_and_nobody_loses_their_place(visit: Callable[..., Visit]) -> None:
    person = visit(viewport={"width": 640, "height": 450})
    person.hub.store.answer = 200, summary(NOON)
    person.log_in("operator")
    person.page.clock.install()
    person.go(PAGE)
    page = person.page
    where = (
        "[scrollY, document.activeElement.id, document.querySelector('#arrivals-days').scrollLeft]"
    )
    page.locator("#arrivals-days").focus()
    page.evaluate("document.querySelector('#arrivals-days').scrollLeft = 150; scrollTo(0, 700)")
    place = page.evaluate(where)
    assert place == [700, "arrivals-days", 150]
    document = summary(NOON)
    document["facilities"][1]["days"][0] |= {"received": 11_900, "missing": 100}
    person.hub.store.answer = 200, document
    page.clock.run_for(60_500)
    page.get_by_text("11,900").wait_for()
    assert page.get_by_text("11,800").count() == 0
    assert page.evaluate(where) == place
    assert page.locator("thead th").nth(2).inner_text().split() == ["Nov", "20", "Fri"]


@browser
def test_figures_stay_when_the_store_falls_silent_and_are_called_old(
    visit: Callable[..., Visit],
) -> None:
    person = visit()
    person.hub.store.answer = 200, summary(NOON)
    person.log_in("operator")
    person.page.clock.install()
    person.go(PAGE)
    page = person.page
    person.hub.store.answer = None
    page.clock.run_for(60_500)
    page.locator("#arrivals-stale:not([hidden])").wait_for()
    assert "out of reach" in page.locator("#arrivals-stale").inner_text()
    assert page.get_by_text("11,800").count() == 1
    person.hub.store.answer = 200, summary(NOON)
    page.clock.run_for(60_500)
    page.locator("#arrivals-stale").wait_for(state="hidden")


@browser
def test_a_page_that_began_without_figures_gets_them(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.hub.store.answer = None
    person.log_in("operator")
    person.page.clock.install()
    assert person.go(PAGE) == 503
    person.hub.store.answer = 200, summary()
    person.page.clock.run_for(60_500)
    person.page.locator("#arrivals-days").wait_for()
    assert person.page.locator("#arrivals-silent").count() == 0


@browser
def test_who_was_logged_out_meanwhile_is_asked_to_log_in(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.hub.store.answer = 200, summary()
    person.log_in("operator")
    person.page.clock.install()
    person.go(PAGE)
    person.page.context.clear_cookies()
    person.page.clock.run_for(60_500)
    person.page.wait_for_url("**/login?next=**")


@browser
def test_it_says_everything_without_scripts_too(visit: Callable[..., Visit]) -> None:
    person = visit(java_script_enabled=False)
    person.hub.store.answer = 200, summary(NOON)
    person.log_in("operator")
    person.go(PAGE)
    text = person.page.locator("main").inner_text()
    for part in ("2026-11-20 03:00 UTC", "11-20", "11,800", "200 missing", "burned-in text"):
        assert part in text
    assert person.page.locator('meta[http-equiv="refresh"]').get_attribute("content") == "60"


@browser
@pytest.mark.parametrize("language", ["en", "ja"])
def test_at_twice_the_size_nothing_is_cut_off(visit: Callable[..., Visit], language: str) -> None:
    person = visit(language, viewport={"width": 640, "height": 450}, device_scale_factor=2)
    person.hub.store.answer = 200, summary()
    person.log_in("operator")
    person.go(PAGE)
    page = person.page
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    page.locator("#arrivals-days").focus()
    page.locator("tfoot td").last.scroll_into_view_if_needed()
    # The name of the hospital stays in sight.
    assert page.locator("tfoot th").bounding_box() is not None
    assert page.locator("tfoot th").evaluate("one => one.getBoundingClientRect().left >= 0")


# ---- Rows and columns


def test_columns_are_the_last_fortnight_newest_first() -> None:
    table = lay_out(one_hospital(day(0, 5, 5), day(13, 7, 7), day(14, 9, 9)), NOON)
    assert table.days[0] == TODAY
    assert table.days == tuple(sorted(table.days, reverse=True))
    assert len(table.days) == DAYS
    assert table.total.received == 12


def test_the_stores_day_may_be_ahead_of_utc_but_not_by_two() -> None:
    late = NOON.replace(hour=20)
    tomorrow = {**day(0, 5), "day": "2026-11-21"}
    assert lay_out(one_hospital(tomorrow, written_at=late), late).days[0].day == 21
    never = {**day(0, 5), "day": "2026-11-22"}
    assert lay_out(one_hospital(never, written_at=late), late).days[0].day == 20


def test_a_list_of_which_all_came_on_other_days_is_complete() -> None:
    (row,) = lay_out(one_hospital(day(0, 0, 300, 0)), NOON).rows
    assert (row.cells[0].state, row.cells[0].share) == ("complete", 100)


def test_one_missing_object_of_a_million_is_not_a_full_bar() -> None:
    (row,) = lay_out(one_hospital(day(0, 10**6 - 1, 10**6, 1)), NOON).rows
    assert (row.cells[0].state, row.cells[0].share) == ("missing", 99)


def test_nothing_came_only_where_nothing_of_the_list_did() -> None:
    days = [day(0, 0, 10, 10), day(1, 0, 10, 4), day(2, 3, 10, 10)]
    (row,) = lay_out(one_hospital(*days), NOON).rows
    assert [cell.state for cell in row.cells[:4]] == ["nothing", "missing", "missing", "quiet"]


def test_a_sum_with_a_day_without_list_is_not_called_complete() -> None:
    (row,) = lay_out(one_hospital(day(0, 10, 10), day(1, 7)), NOON).rows
    assert row.total.state == "unlisted"
    assert (row.total.expected, row.total.listed, row.total.unlisted) == (None, 1, 1)
    assert row.total.share is None


def test_what_was_stopped_without_anything_received_is_no_quiet_day() -> None:
    (row,) = lay_out(one_hospital({**day(0, 0), "quarantined": 3}), NOON).rows
    assert row.cells[0].state == "unlisted"


@pytest.mark.parametrize(
    ("amount", "said"),
    [(0, "0 B"), (999, "999 B"), (6_200_000_000, "6.2 GB"), (5 * 10**15, "5,000 TB")],
)
def test_sizes_are_short(amount: int, said: str) -> None:
    assert Cell(bytes=amount).size == said


counts = st.integers(0, 10**7)


@st.composite
def days_of_a_hospital(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = []
    for back in draw(st.sets(st.integers(0, 20))):
        expected = draw(st.none() | counts)
        missing = 0 if expected is None else draw(st.integers(0, expected))
        quarantined = {"quarantined": draw(st.integers(0, 5))}
        made.append({**day(back, draw(counts), expected, missing), **quarantined})
    return made


@given(hospitals=st.lists(days_of_a_hospital(), max_size=4))
def test_sums_agree_by_row_and_by_column(hospitals: list[list[dict[str, Any]]]) -> None:
    facilities = [{"facility": f"F{n}", "days": days} for n, days in enumerate(hospitals)]
    table = lay_out(
        read({**nothing(), "written_at": NOON.isoformat(), "facilities": facilities}), NOON
    )
    inside = [one for days in hospitals for one in days if one["day"] > ago(DAYS)]
    for field in ("received", "quarantined", "bytes", "missing", "studies_missing"):
        wanted = sum(one[field] or 0 for one in inside)
        assert getattr(table.total, field) == wanted
        assert sum(getattr(row.total, field) for row in table.rows) == wanted
        assert sum(getattr(cell, field) for cell in table.totals) == wanted
    for row in table.rows:
        assert len(row.cells) == DAYS
        for cell in (*row.cells, row.total):
            assert (cell.state == "complete") <= (cell.missing == 0 and not cell.unlisted)
            assert (cell.state == "quiet") <= (cell.received == cell.missing == 0)
            assert cell.share is None or (cell.share == 100) == (cell.missing == 0)
