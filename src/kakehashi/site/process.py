"""Scheduler ``none``: a session is one detached process on the host of the agent.

For a single machine without a scheduler. The wrapper keeps the session's time limit itself.
"""

from __future__ import annotations

import os
import re
import select
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kakehashi.site.job import Job, JobState, QueueState, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

JOB_ID = re.compile(r"([1-9][0-9]{0,9})-([0-9]{1,20})")
HOST = "127.0.0.1"
# The time between SIGTERM and SIGKILL; a wrapper leaves in well under a second.
GRACE_S = 10.0


@dataclass(frozen=True)
class ProcessScheduler:
    """Start, find and end wrappers of one account.

    Attributes
    ----------
    software : str
        The installation whose wrapper is started.
    queues : frozenset of str
        Names that the site's file gives to this host.
    environment : mapping
        The whole environment of the wrapper.
    """

    software: str
    queues: frozenset[str]
    environment: Mapping[str, str]

    def submit(self, job: Job) -> str:
        """Start the wrapper and return ``PID-STARTTIME``, which is never used twice."""
        python = f"{self.software}/.venv/bin/python"
        if not os.access(python, os.X_OK):
            raise RequestError("scheduler", f"{python} is missing or not executable")
        answer_end, child_end = os.pipe()
        middle = os.fork()
        if middle == 0:
            self._detach(python, job.document, child_end)
        os.close(child_end)
        os.waitpid(middle, 0)
        with os.fdopen(answer_end, "rb") as answer:
            job_id = answer.read(64).decode("ascii", "replace")
        if not JOB_ID.fullmatch(job_id):
            raise RequestError("scheduler", "the wrapper could not be started")
        return job_id

    def _detach(self, python: str, document: str, answer: int) -> None:
        """Become a daemon in a forked process; never returns."""
        try:
            os.setsid()
            pid = os.fork()
            if pid:
                os._exit(0)
            found = _stat(os.getpid())
            job_id = f"{os.getpid()}-{found[1] if found else 0}"
            os.write(answer, job_id.encode())
            document_end, write_end = os.pipe()
            # A document is at most half of what a pipe holds, so this does not block.
            os.write(write_end, document.encode("ascii") + b"\n")
            nothing = os.open("/dev/null", os.O_RDWR)
            os.dup2(document_end, 0)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            os.closerange(3, 4096)
            os.execve(  # noqa: S606 - an argument list, and no shell is what is wanted
                python,
                [python, "-I", "-m", "kakehashi.session.enter"],
                {**self.environment, "KAKEHASHI_JOB": job_id},
            )
        finally:
            os._exit(127)

    def query(self, job_id: str) -> JobState:
        """Look for the process."""
        pid, start = _parse(job_id)
        try:
            found = _stat(pid)
        except OSError as error:
            return JobState("unknown", reason=f"/proc cannot be read ({error.strerror})")
        if found is None or found[1] != start or found[0] in "ZX":
            return JobState("ended", reason="the process has ended")
        return JobState("running", hosts=(HOST,), reason="RUNNING")

    def cancel(self, job_id: str) -> None:
        """Send SIGTERM, and SIGKILL where the process is still there after the grace."""
        pid, _ = _parse(job_id)
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            # Checked after the handle is open: the number may have passed to another process.
            if self.query(job_id).state != "running":
                return
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            if not select.select([handle], [], [], GRACE_S)[0]:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                select.select([handle], [], [], GRACE_S)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise RequestError("scheduler", "the process belongs to another account") from error
        finally:
            os.close(handle)

    def resources(self) -> tuple[QueueState, ...]:
        """Name the queues; a host without a scheduler counts no GPUs."""
        return tuple(QueueState(name, 0, 0) for name in sorted(self.queues))


def _parse(job_id: str) -> tuple[int, int]:
    match = JOB_ID.fullmatch(job_id)
    if match is None:
        raise RequestError("malformed", "job: expected PID-STARTTIME")
    return int(match[1]), int(match[2])


def _stat(pid: int) -> tuple[str, int] | None:
    """Return state letter and start time (clock ticks since boot), or None where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold blanks and parentheses itself.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])
