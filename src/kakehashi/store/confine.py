"""What a process gives up, for good, before it looks at bytes from outside.

A hole in a parser or a decoder is then a hole into a process that has no right to anything: no
account that owns something, no files but software, no network, no socket, no other process.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.session import landlock, seccomp, syscalls
from kakehashi.store.authority.accounts import find_account

if TYPE_CHECKING:
    from collections.abc import Iterable

DESCRIPTORS = 64
"""Files that a confined process may have open at a time."""

# Besides what Python was started with; what is not there is left out.
_SOFTWARE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOWED, _DENIED = (_RETURN, 0, 0, 0x7FFF0000), (_RETURN, 0, 0, 0x00050000 | 13)
_CLONE_FLAGS, _CLONE_THREAD = (_LOAD, 0, 0, 16), 0x00010000


@dataclass(frozen=True, slots=True)
class Walls:
    """Which of the walls stand that not every machine has.

    Attributes
    ----------
    account, capabilities, network, files, calls : bool
        An account of its own; no capability that a program file could give back; an empty network
        of its own; Landlock; the filter of system calls.
    """

    account: bool
    capabilities: bool
    network: bool
    files: bool
    calls: bool

    def missing(self) -> list[str]:
        """Return what is not walled off, in words."""
        words = {
            "an account of its own": self.account,
            "an empty bounding set of capabilities": self.capabilities,
            "an empty network": self.network,
            "Landlock": self.files,
            "a filter of system calls": self.calls,
        }
        return [name for name, stands in words.items() if not stands]


def confine(
    account: str | None,
    *,
    read: Iterable[str] = (),
    write: Iterable[str] = (),
    largest: int = 0,
    threads: int = 0,
) -> Walls:
    """Give up every right but to compute, and to read software.

    Call it when all that is needed was imported, and before anything from outside was looked at;
    memory is limited by :func:`limit_memory`. The kernel builds most walls around one thread, and
    around those that it makes later: so this thread must be the only one.

    Parameters
    ----------
    account : str or None
        Who to be from now on. As another than root, or with None, this process stays who it is.
    read, write : iterable of str
        Folders to read in besides software, and to write in.
    largest : int
        Most bytes of a file that it writes.
    threads : int
        How many threads the account may have besides this one. Processes it makes none: they
        would be there when this one has ended.

    Returns
    -------
    Walls

    Raises
    ------
    ConfigError
        There is no such account.
    StoreError
        There would be a way back, or a thread outside the walls.
    OSError
        The kernel refused what every machine has.
    """
    # A library that counts in parallel may have made some when it was imported.
    if (tasks := len(list(Path("/proc/self/task").iterdir()))) != 1:
        raise StoreError(f"{tasks - 1} more threads run already, which no wall would be around")
    for number in (signal.SIGTERM, signal.SIGINT):
        # A service manager ends all processes of a service at once; the parent decides for us.
        signal.signal(number, signal.SIG_IGN)
    network = _alone_on_the_network()
    # With the account of root the right to do so goes too.
    capabilities = syscalls.drop_bounding_set()
    becomes = account is not None and os.geteuid() == 0
    if becomes and account is not None:
        _become(account)
        # Of an account that others use too, the limit would count their processes.
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
    # A change of account clears what was said about the parent's death before.
    syscalls.die_with_parent()
    # What lies in memory is identifiable.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    syscalls.drop_capabilities()
    syscalls.no_new_privileges()
    syscalls.set_dumpable(dumpable=False)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)
    software = (*_SOFTWARE, sys.prefix, sys.base_prefix, *filter(os.path.isabs, sys.path))
    landlock.restrict(landlock.Rules((*software, *read), tuple(write), (), (), ()))
    return Walls(becomes, capabilities, network, landlock.abi() > 0, _filter_calls())


def _become(name: str) -> None:
    """Be an account and nothing else, and see that root cannot be had back."""
    entry = find_account(name)
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    if entry.pw_uid == 0 or set(os.getresuid()) != {entry.pw_uid}:
        raise StoreError(f"the account {name!r} is root, or could be again")


def _alone_on_the_network() -> bool:
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC)
    except OSError:
        # Root of a container may be refused it. There is no socket to be had in any case.
        return False
    return True


def _filter_calls() -> bool:
    try:
        program = seccomp.build()
    except OSError:
        return False  # no table for this machine
    syscalls.install_filter(program)
    bodies = {
        # A named socket has no network that it belongs to, and anybody may open some of them.
        "socket": (_DENIED,),
        "fork": (_DENIED,),
        "vfork": (_DENIED,),
        # What makes a process makes a thread too; clone3 is absent already.
        "clone": (_CLONE_FLAGS, (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD), _DENIED, _ALLOWED),
    }
    steps = [(_LOAD, 0, 0, 0)]
    for name, body in bodies.items():
        number = syscalls.number(name)
        if number is not None:
            steps += [(_JUMP_EQUAL, 0, len(body), number), *body]
    steps.append(_ALLOWED)
    syscalls.install_filter(b"".join(struct.pack("HBBI", *step) for step in steps))
    return True


def memory_in_use() -> int:
    """Return the bytes of this process's address space."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


def limit_memory(now: int, ever: int) -> None:
    """Have an address space of so many bytes at most, and never more than that.

    Parameters
    ----------
    now : int
        The limit from here on.
    ever : int
        What it can be raised to again; it can never be more than it was before.
    """
    resource.setrlimit(resource.RLIMIT_AS, (now, ever))
