"""A child process that looks at bytes from outside for the intake; see `kakehashi.store.confine`.

It is a program of its own that is started anew, so that nothing of the parent's memory (the
database's password, say) is in its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kakehashi.errors import StoreError
from kakehashi.store.confine import Walls, confine, limit_memory, memory_in_use
from kakehashi.store.intake.channel import GONE, TOO_LONG, Message, Silence, hear, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

START_S = 60.0
"""Seconds that a child gets to start; it imports much."""

ROOM = 2 << 30
"""Bytes beyond its own that a child can never exceed, unless one is started for a larger object."""

_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    # Each arena of the C library takes 64 MB of addresses, which are limited.
    "MALLOC_ARENA_MAX": "2",
    # A thread that is made while numpy is imported would stay outside of all walls.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}

_log = logging.getLogger("kakehashi.intake")


class Ended(Exception):  # noqa: N818 - what became of a child; the text is a reason for people
    """A child ended, or was ended; the text says why, and names nobody."""


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    room: int
    largest: int


class Child:
    """A confined child, started on first use and replaced when it ended.

    Parameters
    ----------
    what : str
        What it is, for messages: ``parser``.
    module : str
        The program.
    account : str or None
        Who it shall be.
    first : dict
        What it is told before anything else; here secrets are in place, on a command line and in
        an environment they are not.
    """

    def __init__(self, what: str, module: str, account: str | None, first: dict[str, Any]) -> None:
        self._what = what
        self._module = module
        self._first = first | {"account": account}
        self._running: _Running | None = None
        self._warned = False

    def ask(
        self,
        facts: dict[str, Any],
        *,
        memory: int,
        seconds: float,
        longest: int = 0,
        largest: int = 0,
        descriptors: Sequence[int] = (),
    ) -> Message:
        """Ask something, and return the answer.

        A child that ends over it, and was there before, is started anew and asked once more: what
        it was asked before may have brought it to where it was.

        Parameters
        ----------
        facts : dict
        memory : int
            Bytes that it may take beyond what it has by itself.
        seconds : float
            How long it may take.
        longest : int
            Most bytes of the answer's content.
        largest : int
            Most bytes of a file that it writes.
        descriptors : sequence of int
            Open files to hand over; they stay open here.

        Raises
        ------
        Ended
            It ended, or had to be ended.
        StoreError
            It does not start.
        """
        ask = partial(
            self._ask,
            facts,
            descriptors,
            memory=memory,
            seconds=seconds,
            longest=longest,
            largest=largest,
        )
        before = self._running
        try:
            return ask()
        except Ended:
            if before is None:
                raise
        return ask()

    def _ask(
        self,
        facts: dict[str, Any],
        descriptors: Sequence[int],
        *,
        memory: int,
        seconds: float,
        longest: int,
        largest: int,
    ) -> Message:
        running = self._running
        if running is None or memory > running.room or largest > running.largest:
            self.end()
            # In powers of two, so that objects that grow a little do not start it each time.
            room = max(ROOM, 1 << (memory - 1).bit_length())
            running = self._running = self._start(room, largest)
        until = time.monotonic() + seconds
        try:
            running.channel.settimeout(seconds)
            say(running.channel, facts | {"memory": memory}, descriptors=descriptors)
            answer = hear(running.channel, longest=longest, until=until)
        except Silence as silence:
            why = self._why(running.process, str(silence), memory, seconds)
            raise Ended(f"its {self._what} ended: {why}") from silence
        except BaseException:
            # What it would answer is not to be taken for the answer to something else.
            self.end()
            raise
        if answer.facts.get("memory") is True:
            self.end()
            raise Ended(f"its {self._what} ended: more than {memory >> 20} MB of memory")
        return answer

    def end(self) -> None:
        """End it; the next question starts another."""
        running, self._running = self._running, None
        if running is not None:
            _end(running.process, running.channel)

    def _why(
        self, process: subprocess.Popen[bytes], silence: str, memory: int, seconds: float
    ) -> str:
        if silence == GONE:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        status = process.poll()
        self.end()
        if status is None:
            why = f"more than {seconds:.0f} s" if silence == TOO_LONG else silence
        elif status < 0:
            why = f"killed by {_signal(-status)}, with {memory >> 20} MB of memory allowed"
        else:
            why = f"it ended itself with status {status}"
        _log.warning("the %s is started anew: %s", self._what, why)
        return why

    def _start(self, room: int, largest: int) -> _Running:
        ours, theirs = socket.socketpair()
        # Without -I the folder it is started in could give it other modules.
        command = [sys.executable, "-I", "-m", self._module, str(theirs.fileno())]
        with theirs:
            try:
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    cwd="/",
                    env=_ENVIRONMENT,
                    stdin=subprocess.DEVNULL,
                )
            except OSError as error:
                ours.close()
                raise StoreError(f"the {self._what} does not start ({error.strerror})") from error
        try:
            say(ours, self._first | {"room": room, "largest": largest})
            told = hear(ours, until=time.monotonic() + START_S).facts
        except Silence as error:
            told = {"failed": str(error)}
        if "failed" in told:
            _end(process, ours)
            raise StoreError(
                f"the {self._what} does not start ({told['failed']}). Its account must be there "
                "(`kakehashi store init`), and able to read the software"
            )
        missing = Walls(**told).missing()
        if missing and not self._warned:
            _log.warning("the %s runs without %s", self._what, ", ".join(missing))
            self._warned = True
        return _Running(process, ours, room, largest)


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    process.kill()
    process.wait()


def serve(
    prepare: Callable[[dict[str, Any]], Callable[[Message], tuple[dict[str, Any], bytes]]],
    *,
    read: Sequence[str] = (),
    write: Sequence[str] = (),
    threads: int = 0,
) -> None:
    """Be a child: get ready, give up all rights, and answer until the parent is gone.

    Parameters
    ----------
    prepare : callable
        Gets what was said first, and gives what answers a message; it is called when all rights
        are given up already.
    read, write, threads
        See :func:`kakehashi.store.confine.confine`.
    """
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        first = hear(channel).facts
        try:
            own = memory_in_use()
            if "folder" in first:
                # Later it has no right to the folders above.
                os.chdir(first["folder"])
            walls = confine(
                first["account"],
                read=read,
                write=write,
                largest=first["largest"],
                threads=threads,
            )
            answer = prepare(first)
        except Exception as error:
            # Nothing from outside was looked at yet; standard error may be gone already.
            say(channel, {"failed": f"{type(error).__name__}: {error}"})
            return
        say(channel, {name: getattr(walls, name) for name in Walls.__slots__})
        while True:
            message = hear(channel, files=True)
            try:
                limit_memory(own + message.facts["memory"], own + first["room"])
                facts, content = answer(message)
            except MemoryError:
                facts, content = {"memory": True}, b""
            finally:
                if message.descriptor is not None:
                    os.close(message.descriptor)
            say(channel, facts, content)
            del message, content
    except Silence:
        return


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
