"""How the login server reaches a site's agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

from kakehashi.errors import SiteError

# An agent may wait for a process to leave before it kills it; see kakehashi.site.process.
DEFAULT_TIMEOUT_S = 45.0
MAX_ANSWER = 1 << 20


class Transport(Protocol):
    """One call: a request to the agent, and its answer."""

    async def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer, whether ``ok`` or not.

        Raises
        ------
        SiteError
            No answer, or none that can be understood.
        """


@dataclass(frozen=True)
class LocalTransport:
    """Runs the agent on the login server itself, e.g. through sudo.

    Attributes
    ----------
    argv : tuple of str
        Argument list of the agent; no shell is between.
    timeout_s : float
        Seconds until a silent agent is killed.
    """

    argv: tuple[str, ...]
    timeout_s: float = DEFAULT_TIMEOUT_S

    async def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start an agent, write the request to it, and read its answer."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd="/",
                # The hub's own environment holds the proxy's token and the like.
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
                limit=MAX_ANSWER,
            )
        except OSError as error:
            raise SiteError(
                f"the site's agent {self.argv[0]!r} cannot be started ({error.strerror})"
            ) from error
        try:
            async with asyncio.timeout(self.timeout_s):
                out, err = await process.communicate(json.dumps(request).encode())
        except TimeoutError:
            raise SiteError(
                f"the site's agent gave no answer within {self.timeout_s:.0f} s"
            ) from None
        finally:
            if process.returncode is None:
                # An agent that sudo has started is root's, and not ours to kill: its own limits
                # of time end it. That is still silence, and must not be another kind of error.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    process.kill()
        return _answer(out, err)


def _answer(out: bytes, err: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(out)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("ok"), bool):
        said = " ".join(err.decode("utf-8", "replace").split())[-200:]
        raise SiteError(f"the site's agent answered nothing that can be understood: {said!r}")
    return answer
