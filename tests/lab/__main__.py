"""Start, show and stop the lab or the demo: ``python -m tests.lab lab|demo up|status|down``."""

from __future__ import annotations

import sys
import time

from tests.lab import demo, lab
from tests.lab.hosts import LabError
from tests.lab.people import PEOPLE

USAGE = "usage: python -m tests.lab lab|demo up|status|down, or: demo check|shell"


def show(url: str) -> None:
    """Print where the portal is and who may log in."""
    print(f"\n  portal   {url}\n")
    for person in PEOPLE:
        print(f"  account  {person.name:8} password {person.password:14} {person.shows}")
    print()


def main() -> int:
    """Run one command."""
    if len(sys.argv) != 3 or sys.argv[1] not in {"lab", "demo"}:
        print(USAGE, file=sys.stderr)
        return 2
    what, verb = sys.argv[1:]
    part = lab if what == "lab" else demo
    try:
        if verb == "up":
            started = time.monotonic()
            show(part.up().url)
            print(
                f"  {what} is up after {time.monotonic() - started:.0f} s; make {what}-stop ends it"
            )
        elif verb == "status":
            running = part.status()
            if running is None:
                print(f"the {what} is not running")
                return 1
            show(running.url)
        elif verb == "down":
            part.down()
        elif verb == "check" and what == "demo":
            from tests.lab import demo_check

            return demo_check.main()
        elif verb == "shell" and what == "demo":
            return demo.shell()
        else:
            print(USAGE, file=sys.stderr)
            return 2
    except LabError as error:
        print(f"{what}: {error}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
