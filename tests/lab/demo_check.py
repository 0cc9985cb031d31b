"""``make demo-check``: the whole way of a session in a real browser, on the demo.

Before the session the operator's page has to show what the hospitals sent; in it the cohort
notebook has to find what of that the project was granted.

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

from tests.lab import demo, hospitals, portal
from tests.lab.browser import Visitor, chromium, visitor
from tests.lab.dicom_truth import planes, windowed
from tests.lab.hosts import wait_for

PERSON, OPERATOR = "tanaka", "yamada"
NOTEBOOK = f"{PERSON}/01_first_look.ipynb"
COHORT = f"{PERSON}/02_cohort.ipynb"
COHORT_RESULT = f"{portal.STORE}/work/lung-ct/work/{PERSON}/cohort.json"
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


def compare_arrivals(check: Check, person: Visitor, sent: hospitals.Sent) -> None:
    """Compare the operator's page with what each hospital sent."""
    shown = person.arrivals()
    check.facts["arrivals"] = shown
    check.must(set(shown) == set(sent.hospitals), f"arrivals: the hospitals are {sorted(shown)}")
    for name, one in sent.hospitals.items():
        expected = {
            "received": one.sent,
            "expected": one.expected,
            "missing": one.missing,
            "stopped": one.stopped,
            "held": one.held,
        }
        check.must(
            shown.get(name) == expected,
            f"arrivals: {name} is shown as {shown.get(name)}, and sent {expected}",
        )


def compare_cohort(check: Check, running: demo.Demo) -> None:
    """Compare what the cohort notebook found with what was sent, and granted."""
    result = json.loads(running.host.path(COHORT_RESULT).read_text())
    check.facts["cohort"] = result
    found = dict(result["facility"])
    samples = found.pop(demo.SAMPLES, 0)
    granted = {name: one.seen for name, one in running.sent.hospitals.items() if one.seen}
    check.must(found == granted, f"cohort: found {found}, where {granted} are granted")
    check.must(samples > 0, "cohort: the sample data is not there")
    check.must(result["series"] == samples + sum(granted.values()), "cohort: the sum is wrong")
    frozen = result["frozen"]["series"]
    check.must(0 < frozen == sum(result["split"]), "cohort: the split loses series")
    check.must(result["readable"] == frozen, "cohort: not all of it can be read")


def hub_faults(check: Check, running: demo.Demo) -> None:
    """See that the hub has logged no exception that nobody caught."""
    lines = running.host.log("hub").read_text(errors="replace").splitlines()
    check.facts["hub_faults"] = [line for line in lines if "Uncaught exception" in line]
    check.must(not check.facts["hub_faults"], "the hub logged exceptions that nobody caught")


def late(check: Check, running: demo.Demo) -> None:
    """See that the running intake took over what came while the session ran."""
    name = hospitals.ABSENT

    def there() -> bool:
        listed = portal.kakehashi(running.host, ["store", "list", "--json"]).stdout
        count = sum(row["facility"] == name for row in json.loads(listed))
        check.facts["late"] = {name: count}
        return count == running.sent.hospitals[name].late

    wait_for(f"the series of {name}", there, 120)


def walk(check: Check, person: Visitor, running: demo.Demo) -> None:
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
    with check.step("run the cohort notebook"):
        person.open_notebook(COHORT)
        person.run_all()
        check.must(not person.cell_errors(), f"cohort notebook: {person.cell_errors()}")
        compare_cohort(check, running)
        person.shot("cohort-notebook")
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
        with chromium() as browser:
            with (
                check.step("arrivals"),
                visitor(browser, running.url, OPERATOR, shots=shots) as operator,
            ):
                operator.log_in()
                compare_arrivals(check, operator, running.sent)
                operator.log_out()
            if not was_running:
                with check.step("send another study"):
                    hospitals.send_absent(running.host)
            with visitor(browser, running.url, PERSON, shots=shots) as person:
                try:
                    walk(check, person, running)
                except Exception:
                    person.shot("failure")
                    raise
                check.must(not person.outside, f"requests to the outside: {person.outside}")
                check.must(not person.errors, f"errors in the page: {person.errors}")
        if not was_running:
            with check.step("the other study in the catalogue"):
                late(check, running)
        with check.step("receipt and audit"):
            check.facts["receipt"] = receipt(running)
            portal.kakehashi(running.host, ["audit", "verify"])
            hub_faults(check, running)
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
