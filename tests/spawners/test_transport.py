"""The way to a site's agent: whatever goes wrong on it is one kind of error."""

from __future__ import annotations

import asyncio
import asyncio.subprocess
import contextlib
import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from kakehashi.errors import SiteError
from kakehashi_spawners.transport import LocalTransport

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


def hang(file: Path, *, refused: bool) -> None:
    """Call an agent that hangs, and end it where the transport might not."""
    transport = LocalTransport((sys.executable, "-I", "-c", HANG, str(file)), 1)

    async def wait() -> None:
        try:
            with pytest.raises(SiteError, match="no answer within"):
                await transport.call({"verb": "resources"})
        finally:
            pid = number(file)
            assert alive(pid) or not refused
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(10):
                while alive(pid):  # noqa: ASYNC110 - there is no event of it
                    await asyncio.sleep(0.01)
            # The loop hears of the end after the kernel.
            await asyncio.sleep(0.05)

    asyncio.run(wait())


def number(file: Path) -> int:
    return int(file.read_text())


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_an_agent_that_hangs_is_an_error(tmp_path: Path) -> None:
    hang(tmp_path / "pid", refused=False)


def test_an_agent_that_may_not_be_ended_is_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under sudo the agent is root's; only the kernel's refusal is laid into its mouth here."""

    def refuse(_process: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(asyncio.subprocess.Process, "kill", refuse)
    hang(tmp_path / "pid", refused=True)
