"""``make test``: all tests in groups at once, each group as if alone on the machine.

Most of the time the tests wait, for schedulers, leases and browsers, so that groups at once take
hardly longer than the longest one. Each gets private namespaces: its processes, hosts, networks,
accounts and run folder are then out of the others' sight.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[1]
LAB = "tests/lab"
# Of about equal length; with more of them than these, processors are what is short.
FAULTS = [f"{LAB}/test_{name}.py" for name in ("endings", "faults", "verify", "clocks")]
# pytest's exit status for that; any other one means that a run did not come to its end.
TESTS_FAILED = 1
# If more fail than these, it is not for want of a processor.
MOST_AGAIN = 3
LINK = [f"tests/{name}" for name in ("audit", "authority", "imaging", "link")]
STORE = "tests/store"
PRIVATE = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child",
           "--mount-proc", "--propagation", "private"]  # fmt: skip
# A lab that this machine runs already must not be seen: it stays as it is. Accounts are made and
# removed under locks that name processes, which other namespaces do not know. The shell stays, to
# reap what is orphaned.
SETTING = """
ip link set lo up
mount -t tmpfs -o mode=0755 none /run
mount -t tmpfs -o mode=1777 none /dev/shm
mkdir -p /run/sshd /run/lock /run/user /run/etc/upper /run/etc/work
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work none /etc
"$@"; exit
"""


def pytest(arguments: Sequence[str]) -> list[str]:
    """Return the argument list of one run."""
    return [sys.executable, "-m", "pytest", *arguments]


def group(arguments: Sequence[str]) -> list[str]:
    """Return the argument list of one run in namespaces of its own."""
    return [*PRIVATE, "bash", "-ec", SETTING, "group", *pytest(arguments)]


def without(*paths: str) -> list[str]:
    """Return the arguments that leave paths out."""
    return [f"--ignore={path}" for path in paths]


def start(argv: Sequence[str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)


def remembering(cache: Path) -> list[str]:
    """Return the arguments of a run that notes what failed."""
    return ["-o", f"cache_dir={cache}"]


def failed(cache: Path) -> list[str]:
    """Return which tests failed in the last run with a cache, or files that cannot be read."""
    noted = cache / "v/cache/lastfailed"
    return sorted(json.loads(noted.read_text())) if noted.exists() else []


def settle(name: str, status: int, arguments: Sequence[str], cache: Path) -> int:
    """Return what a group's run comes to: where hardly anything failed, what it does alone.

    Beside three other groups a test may be without a processor for longer than it waits. That is
    no word on the portal; so it has one more turn, and this says so, for who looks into it.
    """
    found = failed(cache) if status == TESTS_FAILED else []
    if not found or len(found) > MOST_AGAIN:
        return status
    print(f"\nFailed beside others, of {name}; once more, alone:", *found, sep="\n  ", flush=True)
    words = [*arguments, *remembering(cache), "--last-failed", "--last-failed-no-failures=none"]
    return start(group(words), None).wait()


def main() -> int:
    """Run all tests; returns the worst of the exit statuses."""
    if os.geteuid() != 0:
        return start(pytest([]), None).wait()
    groups = {
        # Whatever is new and in none of the others is in this one.
        "the portal's parts": without(LAB, STORE, *LINK),
        "authority and link": LINK,
        "the store": [STORE],
        "sessions and attackers in the lab": [LAB, *without(*FAULTS)],
        "endings and faults in the lab": FAULTS,
    }
    with contextlib.ExitStack() as stack:
        outputs: dict[str, IO[bytes] | None] = {
            name: stack.enter_context(tempfile.TemporaryFile()) for name in groups
        }
        # One is seen while it runs.
        outputs["the portal's parts"] = None
        caches = {name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for name in groups}
        running = {
            name: start(group([*words, *remembering(caches[name])]), outputs[name])
            for name, words in groups.items()
        }
        for process in running.values():
            # Its first process is that of the namespace: with it all hosts end.
            stack.callback(process.wait)
            stack.callback(process.kill)
        statuses = {}
        for name, process in running.items():
            output = outputs[name]
            if output is not None:
                print(f"\nBeside these have run the tests of {name}:", flush=True)
            statuses[name] = process.wait()
            if output is not None:
                output.seek(0)
                sys.stdout.buffer.write(output.read())
                sys.stdout.flush()
        return max(
            abs(settle(name, status, groups[name], caches[name]))
            for name, status in statuses.items()
        )


if __name__ == "__main__":
    sys.exit(main())
