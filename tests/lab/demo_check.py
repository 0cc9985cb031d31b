"""``make demo-check``: the whole way of a session in a real browser, on the demo.

Prints one JSON object, last on standard output: seconds of each step, what was compared, the
receipt, and ``ok``. Exit status 0 only where everything held.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.lab import demo, portal
from tests.lab.browser import Visitor, chromium, visitor
from tests.lab.dicom_truth import planes, windowed

PERSON = "tanaka"
NOTEBOOK = f"{PERSON}/01_first_look.ipynb"
VIEWER = ".kkh-viewer"
CANVAS = f"{VIEWER} canvas"


class Check:
    """Times steps and gathers what was found."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}
        self.failures: list[str] = []
        self.facts: dict[str, Any] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step; a failure names it."""
        started = time.monotonic()
        print(f"  {name} ...", file=sys.stderr, flush=True)
        try:
            yield
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
            raise
        finally:
            self.steps[name] = round(time.monotonic() - started, 2)

    def must(self, held: bool, what: str) -> None:
        """Remember what did not hold."""
        if not held:
            self.failures.append(what)


def compare_canvas(check: Check, person: Visitor, name: str) -> None:
    """Compare the viewer's pixels with the windowed slice of the original files."""
    root = person.page.locator(VIEWER).first
    uid, index = root.get_attribute("data-uid"), root.get_attribute("data-index")
    window, level = root.get_attribute("data-window"), root.get_attribute("data-level")
    assert uid
    assert index
    assert window
    assert level
    width, height, red = person.canvas(CANVAS)
    expected = windowed(planes(uid)[int(index)], float(window), float(level))
    shown = np.asarray(red).reshape(height, width)
    wrong = -1 if shown.shape != expected.shape else int(np.count_nonzero(shown != expected))
    # The control: the neighbouring slice must not pass for this one.
    neighbour = windowed(planes(uid)[int(index) - 1], float(window), float(level))
    check.facts[name] = {
        "series": uid,
        "index": int(index),
        "window": float(window),
        "level": float(level),
        "pixels": int(shown.size),
        "wrong": wrong,
        "greys": len(np.unique(shown)),
    }
    check.must(wrong == 0, f"{name}: {wrong} pixels differ from the original")
    check.must(bool(np.any(neighbour != expected)), f"{name}: the comparison cannot fail")
    check.must(len(np.unique(shown)) > 16, f"{name}: the canvas is nearly empty")


def walk(check: Check, person: Visitor) -> None:
    """Go the whole way of a session."""
    with check.step("log in"):
        person.log_in()
    with check.step("start the session"):
        person.spawn(project="lung-ct", site="local", queue="local")
    with check.step("open the notebook"):
        person.open_notebook(NOTEBOOK)
    with check.step("run the notebook"):
        person.run_all()
        check.must(not person.cell_errors(), f"notebook: {person.cell_errors()}")
    with check.step("widgets"):
        table = person.page.locator(".kkh-cohort").first
        table.scroll_into_view_if_needed()
        person.page.wait_for_selector(".kkh-cohort[data-state=ready]")
        person.shot("cohort")
        viewer = person.page.locator(VIEWER).first
        viewer.scroll_into_view_if_needed()
        person.page.wait_for_selector(f"{VIEWER}[data-state=ready]")
        compare_canvas(check, person, "canvas")
        before = viewer.get_attribute("data-index")
        person.page.locator(f"{VIEWER} .kkh-stage").first.focus()
        person.page.keyboard.press("ArrowUp")
        person.page.keyboard.press("2")
        person.page.wait_for_function(
            """([selector, before]) => {
              const root = document.querySelector(selector);
              return root.dataset.index !== before && root.dataset.state === 'ready'
                && root.dataset.window === '1500';
            }""",
            arg=[VIEWER, before],
        )
        compare_canvas(check, person, "canvas_after_scroll")
        person.shot("viewer")
    with check.step("stop the session"):
        person.stop()
    with check.step("log out"):
        person.log_out()


def receipt(running: demo.Demo) -> dict[str, Any]:
    """Return the last session's receipt, verified by the store's own command."""
    listed = portal.kakehashi(running.host, ["receipt", "list", "--json"]).stdout
    session = json.loads(listed)[-1]["session"]
    shown = portal.kakehashi(running.host, ["receipt", "show", session, "--json"]).stdout
    return dict(json.loads(shown))


def main() -> int:
    """Bring the demo up, go the whole way, stop, and tell."""
    check = Check()
    shots = Path(os.environ["KAKEHASHI_SHOTS"]) if "KAKEHASHI_SHOTS" in os.environ else None
    was_running = demo.status() is not None
    try:
        with check.step("bring the demo up"):
            running = demo.up()
        with chromium() as browser, visitor(browser, running.url, PERSON, shots=shots) as person:
            try:
                walk(check, person)
            except Exception:
                person.shot("failure")
                raise
            check.must(not person.outside, f"requests to the outside: {person.outside}")
            check.must(not person.errors, f"errors in the page: {person.errors}")
        with check.step("receipt and audit"):
            check.facts["receipt"] = receipt(running)
            portal.kakehashi(running.host, ["audit", "verify"])
    except Exception as error:
        if not check.failures:
            check.failures.append(f"{type(error).__name__}: {error}")
    finally:
        if not was_running:
            with check.step("stop the demo"):
                demo.down()
    ok = not check.failures
    print(
        json.dumps(
            {"ok": ok, "failures": check.failures, "seconds": check.steps, **check.facts},
            ensure_ascii=False,
            indent=2,
        )
    )
    return 0 if ok else 1
