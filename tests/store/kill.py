"""Kill -9 a piece of work at its n-th change of a name, so that every moment is met once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_CHANGES = {"os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def killed(below: Path, number: int, work: Callable[[], object]) -> bool:
    """Work in another process, and kill that before its n-th change below a path.

    Returns whether it was killed; else it came to its end.
    """
    child = os.fork()
    if child == 0:
        left = number

        def hook(name: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            # A link's own name is the second; a whole folder is removed by relative names.
            if name in _CHANGES and any(
                (isinstance(one, str | Path) and not str(one).startswith("/"))
                or str(one).startswith(str(below))
                for one in arguments[:2]
            ):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0
