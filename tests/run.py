"""``make test``: the lab's tests beside all others, each as if alone on the machine.

Most of the time the tests wait, for schedulers, leases and browsers, so that two groups at
once take hardly longer than the longer one. The lab's group gets private namespaces: its hosts,
networks and run folder are then out of the others' sight.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[1]
LAB = "tests/lab"
PRIVATE = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child",
           "--mount-proc", "--propagation", "private"]  # fmt: skip
# A lab that this machine runs already must not be seen: it stays as it is.
SETTING = """
ip link set lo up
mount -t tmpfs -o mode=0755 none /run
mount -t tmpfs -o mode=1777 none /dev/shm
mkdir -p /run/sshd /run/lock /run/user
exec "$@"
"""


def pytest(arguments: Sequence[str]) -> list[str]:
    """Return the argument list of one run."""
    return [sys.executable, "-m", "pytest", *arguments]


def start(argv: Sequence[str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)


def main() -> int:
    """Run all tests; returns the worse of both exit statuses."""
    if os.geteuid() != 0:
        return start(pytest([]), None).wait()
    with tempfile.TemporaryFile() as kept:
        lab = start([*PRIVATE, "bash", "-ec", SETTING, "lab", *pytest([LAB])], kept)
        try:
            others = start(pytest([f"--ignore={LAB}"]), None).wait()
            sys.stdout.write("\nThe lab's tests have run beside these; their turn:\n")
            sys.stdout.flush()
            status = lab.wait()
        finally:
            # Its first process is that of the namespace: with it all hosts end.
            lab.kill()
            lab.wait()
        kept.seek(0)
        sys.stdout.buffer.write(kept.read())
        sys.stdout.flush()
    return max(abs(others), abs(status))


if __name__ == "__main__":
    sys.exit(main())
