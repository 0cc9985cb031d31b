"""Pictures of every page for docs/: ``python -m tests.lab.screenshots``, on the lab.

Those of what hospitals sent are taken on the demo, to whose store hospitals send.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser

from tests.lab import demo
from tests.lab import lab as real_lab
from tests.lab.browser import Visitor, chromium, visitor
from tests.lab.lab import Lab

SCHEMES: dict[Literal["light", "dark"], str] = {"light": "arrivals", "dark": "arrivals-dark"}
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "screenshots"


def walk(person: Visitor) -> None:
    """Go the whole way of a session, with a picture of each page."""
    person.log_in()
    person.spawn(project="lung-ct", site="slurm", queue="gpu", gpus=1, hours=4)
    person.open_notebook(f"{person.name}/01_first_look.ipynb")
    person.run_all()
    for name, selector in (("cohort", ".kkh-cohort"), ("viewer", ".kkh-viewer")):
        widget = person.page.locator(selector).first
        widget.scroll_into_view_if_needed()
        person.page.wait_for_selector(f"{selector}[data-state=ready]")
        person.shot(name)
    person.stop()
    person.page.locator("a.mono").first.click()
    person.page.wait_for_load_state()
    person.shot("receipt")
    person.log_out()


def without_project(lab: Lab, browser: Browser, language: str, folder: Path) -> None:
    """Take the page of a person who has no project."""
    with visitor(browser, lab.url, "kimura", language=language, shots=folder) as person:
        person.page.goto(f"{lab.url}/hub/login")
        person.page.click("#login")
        person.page.fill("input[name=login]", "kimura")
        person.page.fill("input[name=password]", "kimura-demo")
        person.page.click("button")
        person.page.wait_for_selector("main h1")
        person.shot("no-project")
        person.page.goto(f"{lab.url}/hub/nowhere")
        person.shot("error")


def arrivals(url: str, browser: Browser, language: str, folder: Path) -> None:
    """Take the operators' page of what came, light and dark, from top to bottom."""
    with visitor(browser, url, "yamada", language=language) as person:
        person.log_in()
        person.shots = folder  # from here: the pictures of the log-in are the lab's
        for scheme, name in SCHEMES.items():
            person.page.emulate_media(color_scheme=scheme)
            person.arrivals()
            person.shot(name, full_page=True)


def on_the_lab(browser: Browser) -> None:
    """Take what does not need hospitals."""
    was_running = real_lab.status() is not None
    lab = real_lab.up()
    try:
        for language, folder in folders():
            with visitor(browser, lab.url, "suzuki", language=language, shots=folder) as person:
                walk(person)
            without_project(lab, browser, language, folder)
    finally:
        if not was_running:
            real_lab.down()


def on_the_demo(browser: Browser) -> None:
    """Take what hospitals sent."""
    was_running = demo.status() is not None
    running = demo.up()
    try:
        for language, folder in folders():
            arrivals(running.url, browser, language, folder)
    finally:
        if not was_running:
            demo.down()


def folders() -> Iterator[tuple[str, Path]]:
    """Yield each language with its folder."""
    for language in ("en", "ja"):
        folder = FOLDER / language
        folder.mkdir(parents=True, exist_ok=True)
        yield language, folder


def main() -> int:
    """Take all pictures in both languages."""
    with chromium() as browser:
        on_the_lab(browser)
        on_the_demo(browser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
