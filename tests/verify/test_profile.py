"""The search of a browser's profile, with a real Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from kakehashi.verify import profile
from kakehashi.verify.pattern import Pattern
from kakehashi.verify.profile import BrowserError, Control, PersonsBrowser, search
from tests.lab.browser import FLAGS

PORTAL = "https://portal.example.ac.jp"


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Control, str]]:
    """Give the profile of a browser that has seen the control's page, and where that was."""
    folder, control = tmp_path_factory.mktemp("browser"), Control()
    with control.serving(f"{PORTAL}/user/canary/lab", "canary") as address:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch_persistent_context(
                folder, executable_path="/usr/bin/chromium", args=list(FLAGS)
            )
            page = browser.new_page()
            page.goto(address)
            page.locator("#state", has_text="hold the control").wait_for()
            assert page.locator("a").get_attribute("href") == f"{PORTAL}/user/canary/lab"
            browser.close()
        yield folder, control, address.rstrip("/")


def test_what_a_browser_keeps_is_found_in_each_of_its_stores(
    visited: tuple[Path, Control, str],
) -> None:
    folder, control, _ = visited
    answer = search([folder], 0, Pattern.new(), control, PORTAL)
    assert answer["findings"] == []
    assert answer["control"].keys() == {"cache", "cache, packed", "storage"}
    assert all(answer["control"].values())
    stored = search([folder], 0, control.patterns["storage"], control, PORTAL)
    places = {Path(one["path"]).relative_to(folder).parts[1] for one in stored["findings"]}
    assert {"IndexedDB", "Local Storage", "Session Storage"} <= places
    packed = search([folder], 0, control.patterns["cache, packed"], control, PORTAL)
    assert {one["encoding"] for one in packed["findings"]} == {"packed, hexadecimal"}


def test_a_fresh_profile_has_no_control(tmp_path: Path) -> None:
    answer = search([tmp_path], 0, Pattern.new(), Control(), PORTAL)
    assert not any(answer["control"].values())


def test_an_answer_that_was_kept_is_told_by_its_address(visited: tuple[Path, Control, str]) -> None:
    """Whatever it was packed by; static files may be kept, and what others answer."""
    folder, control, address = visited
    answer = search([folder], 0, Pattern.new(), control, address)
    told = {one["path"] for one in answer["findings"]}
    assert told >= {"/plain", "/packed"}
    assert not told & {"/", "/control.js"}
    below = search([folder], 0, Pattern.new(), control, f"{address}/portal")
    assert below["findings"] == []


def test_a_profile_in_use_is_known(tmp_path: Path) -> None:
    kept = tmp_path / "History"
    with kept.open("w"):
        assert profile.in_use(tmp_path)
    assert not profile.in_use(tmp_path)


def test_a_person_is_told_what_to_do_and_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = PersonsBrowser(tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    asked = iter([False, True])
    monkeypatch.setattr(profile.time, "sleep", lambda _: None)
    with browser.visiting("http://127.0.0.1:1/", lambda: next(asked)):
        assert f"http://127.0.0.1:1/ in the browser with the profile {tmp_path}" in (
            capsys.readouterr().err
        )
        os.close(descriptor)
    assert "close that browser" in capsys.readouterr().err
    monkeypatch.setattr(profile, "PERSON_S", -1)
    with (
        pytest.raises(BrowserError, match="not run and saved"),
        browser.visiting("", lambda: False),
    ):
        pass
