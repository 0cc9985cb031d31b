"""The way to a site's agent: whatever goes wrong on it is one kind of error."""

from __future__ import annotations

import asyncio
import asyncio.subprocess
import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from kakehashi.errors import SiteError
from kakehashi_spawners.transport import LocalTransport
from tests.spawners.standins import until

ANSWER = "import sys; sys.stdin.read(); print('{\"ok\": true}')"
HANG = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"


def call(script: str, *arguments: str, timeout_s: float = 30) -> dict[str, object]:
    transport = LocalTransport((sys.executable, "-I", "-c", script, *arguments), timeout_s)
    return asyncio.run(transport.call({"verb": "resources"}))


def test_an_answer_is_returned() -> None:
    assert call(ANSWER) == {"ok": True}


@pytest.mark.parametrize("said", ["", "not json", "[]", "{}", '{"ok": 1}'])
def test_what_is_no_answer_is_an_error(said: str) -> None:
    with pytest.raises(SiteError):
        call(f"print({said!r})")


def test_an_agent_that_hangs_is_an_error_and_is_ended(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="no answer within"):
        call(HANG, str(tmp_path / "pid"), timeout_s=1)
    folder = Path("/proc", (tmp_path / "pid").read_text())
    until("the agent's end", lambda: not folder.exists())


def test_an_agent_that_may_not_be_ended_is_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under sudo the agent is root's; only the kernel's refusal is laid into its mouth here."""
    file = tmp_path / "pid"
    transport = LocalTransport((sys.executable, "-I", "-c", HANG, str(file)), 1)

    def refuse(_process: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    async def hang() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.subprocess.Process, "kill", refuse)
            with pytest.raises(SiteError, match="no answer within"):
                await transport.call({"verb": "resources"})
        os.kill(int(file.read_text()), signal.SIGKILL)
        async with asyncio.timeout(10):
            while Path("/proc", file.read_text()).exists():  # noqa: ASYNC110 - no event of it
                await asyncio.sleep(0.01)

    asyncio.run(hang())
