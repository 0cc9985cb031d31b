"""The traffic widget in a real JupyterLab: what it draws is read back and compared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Locator

from tests.lab.hosts import wait_for
from tests.widgets.browser import Notebook
from tests.widgets.conftest import Shore
from tests.widgets.lab import Lab

# Made-up seconds, as another process of the session would have written them: 80 MB/s, a cut of
# ten seconds a minute ago, then 40 MB/s.
FILL = """
import os, time
from pathlib import Path
from kakehashi.link import Session, tally
from kakehashi.link.tally import Moment
session = Session.current()
made = tally.begin(tally.shared_folder(session.session))
START = int(time.time()) - 100
for number in range(95):
    cut = 30 <= number < 40
    made.add(Moment(
        START + number, bytes=0 if cut else 80_000_000 if number < 30 else 40_000_000,
        steps=0 if cut else 4, channels=6, asked_s=1, stalled_s=float(cut),
        waited_s=1.0 if cut else 0.1, reconnects=6 if number == 40 else 0, rtt_s=0.0102))
"""
FIRST_CELL = """
import shutil
from kakehashi.link import Session, tally
shutil.rmtree(tally.shared_folder(Session.current().session), ignore_errors=True)
"""
SHOW = "from kakehashi_widgets import Traffic\ntraffic = Traffic(); traffic"
Open = Callable[..., Notebook]


def view(book: Notebook) -> Locator:
    root = book.page.locator(".kkh-traffic")
    book.wait_state(root, state="ready")
    root.scroll_into_view_if_needed()
    return root


def figure(root: Locator, name: str) -> str:
    return root.locator(f"[data-figure={name}]").inner_text()


def number(text: str) -> float:
    return float(text.split(maxsplit=1)[0].replace(",", ""))


def outage(root: Locator) -> int:
    """Seconds that the drawn outage has lasted."""
    shades = root.locator(".kkh-outage").evaluate_all("all => all.map(one => one.dataset.seconds)")
    return sum(map(int, shades))


def drawn(root: Locator, plot: str, seconds: int = 300) -> dict[int, float]:
    """The values of a plot's seconds, from the end backwards, as its pixels and axis give them."""
    group = root.locator(f".kkh-plot-{plot}")
    path = group.locator("path").first.get_attribute("d") or ""
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    marks = [
        (float(mark.get_attribute("data-value") or "nan"), float(mark.get_attribute("y") or "nan"))
        for mark in group.locator(".kkh-tick").all()
    ]
    (low, low_y), (high, high_y) = marks[0], marks[-1]
    rule = group.locator(".kkh-rule").first
    left, right = (float(rule.get_attribute(name) or "nan") for name in ("x1", "x2"))
    second = (right - left) / seconds
    values: dict[int, float] = {}
    for (x, y), (to, same) in itertools.pairwise(points):
        if y == same and abs(to - x - second) < second / 10:
            # The axis' text stands 4 pixels below its line.
            value = low + (y + 4 - low_y) / (high_y - low_y) * (high - low)
            values[round((right - x) / second)] = value
    return values


def test_what_is_drawn_is_what_was_read(notebook: Open) -> None:
    book = notebook(FILL, SHOW)
    root = view(book)
    assert figure(root, "best") == "80 MB/s"
    assert figure(root, "mean") == "48.4 MB/s"
    assert figure(root, "read") == "4.6 GB"
    assert figure(root, "rtt") == "10.2 ms"
    assert figure(root, "steps") == "340"
    assert figure(root, "outages") == "1 (10 s)"
    assert figure(root, "lost") == "6"
    end, start = int(root.get_attribute("data-end") or 0), book.kernel("START")
    values = drawn(root, "rate")
    expected = {end - start - n: (80.0 if n < 30 else 40.0) for n in range(95)} | {
        end - start - n: 0.0 for n in range(30, 40)
    }
    seen = {at: round(value, 3) for at, value in values.items() if at in expected}
    assert seen == expected
    assert {round(v, 2) for v in drawn(root, "steps").values()} >= {0.0, 4.0}
    assert {round(v, 1) for v in drawn(root, "wait").values()} >= {10.0, 100.0}
    cut = root.locator(".kkh-outage")
    assert cut.get_attribute("data-seconds") == "10"
    assert root.locator(".kkh-lost").count() == 1
    assert root.locator(".kkh-plot-rate .kkh-unit").inner_html() == "MB/s"


def test_it_moves_while_a_cell_runs(notebook: Open, shore: Shore) -> None:
    book = notebook(
        SHOW,
        "from kakehashi import Store\n"
        f"store = Store(); series = store.series({shore.ct!r})\n"
        "import threading; gate = threading.Event()",
    )
    root = view(book)
    assert figure(root, "read") == "0 MB"
    # The kernel is busy from here on, and could not answer a comm of its own.
    book.page.evaluate(
        """() => {
          const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
          kernel.requestExecute({code: 'series.read_packed(); import time; time.sleep(6)'});
        }"""
    )
    size = (shore.store.root / "series" / f"{shore.ct}.ozx").stat().st_size

    def moved() -> bool:
        return number(figure(root, "read")) >= round(size / 1e6, 1)

    wait_for("the bytes in the widget", moved, seconds=30)
    status = "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"
    assert book.page.evaluate(status) == "busy"
    # A kernel that is shut down while it is busy leaves a complaint in the server's log.
    assert book.kernel("1") == 1


def test_a_real_cut_is_seen_while_it_lasts(notebook: Open, shore: Shore) -> None:
    book = notebook(
        "import threading\nfrom kakehashi import Store\nfrom kakehashi.link import step\n"
        "over = threading.Event()\n"
        "def train():\n"
        "    with Store() as store:\n"
        "        while not over.wait(0.15):\n"
        "            with step():\n"
        "                for _ in store.reader.read_many(store.reader.manifest.files):\n"
        "                    pass\n"
        "thread = threading.Thread(target=train)\nthread.start()",
        SHOW.replace("Traffic()", "Traffic(1)"),
    )
    root = view(book)
    wait_for("some batches", lambda: number(figure(root, "steps")) >= 25, seconds=60)
    assert figure(root, "outages") == "0 (0 s)"

    with shore.broker.silence():
        wait_for("an outage that grows", lambda: outage(root) >= 6, seconds=60)
        assert number(figure(root, "now")) == 0
        before = number(figure(root, "steps"))
    wait_for("more batches", lambda: number(figure(root, "steps")) >= before + 25, seconds=60)
    waits = drawn(root, "wait", seconds=60)
    assert sum(value == pytest.approx(100, abs=2) for value in waits.values()) >= 5
    book.kernel("[over.set(), thread.join()][1]")


def test_it_asks_nothing_while_another_tab_is_shown(notebook: Open) -> None:
    book = notebook(FILL, SHOW)
    view(book)
    asked: list[str] = []
    book.page.on("request", lambda request: asked.append(request.url))
    book.page.evaluate("async () => await jupyterapp.commands.execute('launcher:create')")
    book.page.locator(".kkh-traffic").wait_for(state="hidden")
    asked.clear()
    book.page.wait_for_timeout(3000)
    assert [url for url in asked if "kakehashi/traffic" in url] == []
    with book.page.expect_request("**/kakehashi/traffic*"):
        book.page.evaluate(
            "() => jupyterapp.shell.activateById([...jupyterapp.shell.widgets('main')]"
            ".find(one => one.title.label.endsWith('.ipynb')).id)"
        )


def test_it_asks_once_a_second_and_not_after_it_was_closed(notebook: Open) -> None:
    book = notebook(FILL, SHOW)
    asked: list[float] = []
    root = view(book)
    book.page.on(
        "request",
        lambda request: asked.append(1) if "kakehashi/traffic" in request.url else None,
    )
    book.page.wait_for_timeout(4000)
    assert 2 <= len(asked) <= 5
    book.kernel("traffic.close()")
    root.wait_for(state="detached")
    asked.clear()
    book.page.wait_for_timeout(2500)
    assert asked == []


def test_a_notebook_is_saved_without_the_figures(notebook: Open, lab: Lab) -> None:
    book = notebook(FILL, SHOW)
    view(book)
    book.page.evaluate("async () => await jupyterapp.commands.execute('docmanager:save')")
    saved = (lab.work / "test_a_notebook_is_saved_without_the_figures.ipynb").read_text()
    assert "kkh-" not in saved
    assert "80000000" not in saved.replace("80_000_000", "")
    assert len(saved) < 20_000


def test_the_time_shown_is_chosen_by_buttons_and_in_python(notebook: Open) -> None:
    book = notebook(FILL, SHOW)
    root = view(book)
    root.get_by_role("button", name="15 min").click()
    book.wait_kernel("traffic.minutes", lambda value: value == 15)
    book.kernel("setattr(traffic, 'minutes', 1)")
    pressed = root.locator("[aria-pressed=true]")
    wait_for("the button", lambda: pressed.inner_text() == "1 min")


def test_words_in_japanese(notebook: Open) -> None:
    root = view(notebook(FILL, SHOW, locale="ja-JP"))
    assert root.locator(".kkh-title").inner_text() == "ストアからの読み込み"
    assert figure(root, "outages") == "1 回 (10 秒)"


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_both_themes_can_be_read(notebook: Open, theme: str) -> None:
    root = view(notebook(FILL, SHOW, theme=theme))
    ink, paper = (
        sum(map(int, re.findall(r"\d+", root.evaluate(f"e => getComputedStyle(e).{name}"))[:3]))
        for name in ("color", "backgroundColor")
    )
    assert (ink > paper) == (theme == "JupyterLab Dark")
    text = root.locator(".kkh-tick").first.evaluate("e => getComputedStyle(e).fill")
    assert abs(sum(map(int, re.findall(r"\d+", text)[:3])) - paper) > 200


def test_the_picture_is_saved_where_it_is_asked_for(notebook: Open, lab: Lab) -> None:
    notebook(FILL, SHOW, "traffic.save_png('alice/traffic.png')")
    assert (lab.work / "alice" / "traffic.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", ["x", "-1", "1e3", "9999999999"])
def test_a_strange_question_is_refused(lab: Lab, wrong: str) -> None:
    assert lab.get(f"kakehashi/traffic?seconds={wrong}").status_code == 400
    answer = lab.get("kakehashi/traffic?seconds=5")
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert lab.get("kakehashi/traffic", headers={"Authorization": ""}).status_code in (302, 403)


def test_looking_is_not_being_active(lab: Lab) -> None:
    def active() -> str:
        return str(lab.get("api/status?no_track_activity=1").json()["last_activity"])

    before = active()
    for _ in range(3):
        assert lab.get("kakehashi/traffic").ok
    assert active() == before
    # The control: another request of the extension is activity.
    assert lab.get("kakehashi/session").ok
    assert active() != before
