"""``make test``: all tests in groups at once, each group as if alone on the machine.

Most of the time the tests wait, for schedulers, leases and browsers, so that groups at once take
hardly longer than the longest one. Each gets private namespaces: its processes, hosts, networks,
accounts and run folder are then out of the others' sight.
"""

from __future__ import annotations

import contextlib
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
STORE = [f"tests/{name}" for name in ("audit", "authority", "imaging", "link", "store")]
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


def main() -> int:
    """Run all tests; returns the worst of the exit statuses."""
    if os.geteuid() != 0:
        return start(pytest([]), None).wait()
    groups = {
        "store and link": STORE,
        "sessions and attackers in the lab": [LAB, *without(*FAULTS)],
        "endings and faults in the lab": FAULTS,
    }
    # Whatever is new and in none of these is here.
    rest = without(LAB, *STORE)
    with contextlib.ExitStack() as stack:
        outputs = {name: stack.enter_context(tempfile.TemporaryFile()) for name in groups}
        running = {name: start(group(words), outputs[name]) for name, words in groups.items()}
        for process in running.values():
            # Its first process is that of the namespace: with it all hosts end.
            stack.callback(process.wait)
            stack.callback(process.kill)
        statuses = [start(group(rest), None).wait()]
        for name, process in running.items():
            sys.stdout.write(f"\nBeside these have run the tests of {name}:\n")
            sys.stdout.flush()
            statuses.append(process.wait())
            outputs[name].seek(0)
            sys.stdout.buffer.write(outputs[name].read())
            sys.stdout.flush()
    return max(abs(status) for status in statuses)


if __name__ == "__main__":
    sys.exit(main())
