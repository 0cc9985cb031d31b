"""What an association's process gives up, for good, before it hears its caller.

It stays the receiver's account, to which inbox and journal belong, and which may end the listener.
So it keeps its connection, its channel to the listener and the folder of what arrives, and cannot
reach anything else of that account: no other file, no other process.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
from typing import TYPE_CHECKING

from kakehashi.session import landlock, seccomp, syscalls

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_FIRST = 3
"""Number of the first descriptor behind those of the log."""

_SOFTWARE = ("/usr", "/lib", "/lib64", "/etc/localtime")
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 13
_REFUSED = (
    # Other processes, and new ones: they would not end with this one.
    *("clone", "execve", "execveat", "fork", "vfork"),
    *("pidfd_send_signal", "process_vm_readv", "process_vm_writev", "ptrace"),
    *("rt_sigqueueinfo", "rt_tgsigqueueinfo", "tkill"),
    *("ioprio_set", "sched_setaffinity", "sched_setattr", "sched_setparam"),
    *("sched_setscheduler", "setpriority"),
    # Other connections.
    *("bind", "connect", "socket"),
    # What Landlock does not cover, or its first version did not.
    *("chmod", "chown", "fchmod", "fchmodat", "fchmodat2", "fchown", "fchownat", "lchown"),
    *("fsetxattr", "lsetxattr", "setxattr", "setxattrat", "truncate"),
    *("futimesat", "utime", "utimensat", "utimes"),
    # Names for files that are not its own.
    *("link", "linkat", "mknod", "mknodat", "symlink", "symlinkat"),
)
# By these a socket sends signals to whom one likes: F_SETOWN, F_SETSIG and F_SETOWN_EX;
# FIOSETOWN and SIOCSPGRP.
_BY_COMMAND = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902)}

_Step = tuple[int, int, int, int]


def missing() -> list[str]:
    """Return which walls cannot be had on this machine, in words."""
    gaps = [] if landlock.abi() else ["Landlock"]
    try:
        seccomp.build()
    except OSError:
        gaps.append("a filter of system calls")
    return gaps


def enclose(folder: Path, keep: Collection[int]) -> None:
    """Give up all but some descriptors, standard ones among them, and a folder to write in.

    Parameters
    ----------
    folder : Path
    keep : collection of int
        Descriptors.

    Raises
    ------
    OSError
        The kernel refused what this machine has; see :func:`missing`.
    """
    # Landlock does not look at what is open: the journal is.
    start = _FIRST
    for number in sorted(keep):
        os.closerange(start, number)
        start = number + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))
    # What lies in memory is identifiable.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    syscalls.drop_capabilities()
    syscalls.no_new_privileges()
    syscalls.set_dumpable(dumpable=False)
    software = (*_SOFTWARE, sys.prefix, sys.base_prefix, *filter(os.path.isabs, sys.path))
    landlock.restrict(landlock.Rules(software, (str(folder),), (), (), ()))
    try:
        program = seccomp.build()
    except OSError:
        return  # no table for this machine
    syscalls.install_filter(program)
    syscalls.install_filter(_program(os.getpid()))


def _program(pid: int) -> bytes:
    """Return the filter that goes beyond that of sessions."""
    refuse: _Step = (_RETURN, 0, 0, _REFUSE)
    allow: _Step = (_RETURN, 0, 0, _ALLOW)
    bodies: dict[str, tuple[_Step, ...]] = dict.fromkeys(_REFUSED, (refuse,))
    own = ((_LOAD, 0, 0, 16), (_JUMP_EQUAL, 1, 0, pid), (_JUMP_EQUAL, 0, 1, 0), allow, refuse)
    # Nought is this process for limits, and all of its group for signals.
    bodies["prlimit64"] = own
    bodies |= dict.fromkeys(("kill", "tgkill"), (own[0], (_JUMP_EQUAL, 0, 1, pid), allow, refuse))
    for name, commands in _BY_COMMAND.items():
        among = tuple(step for one in commands for step in ((_JUMP_EQUAL, 0, 1, one), refuse))
        bodies[name] = ((_LOAD, 0, 0, 24), *among, allow)
    program: list[_Step] = [(_LOAD, 0, 0, 0)]
    for name, body in bodies.items():
        number = syscalls.number(name)
        if number is not None:
            program += [(_JUMP_EQUAL, 0, len(body), number), *body]
    program.append(allow)
    return b"".join(struct.pack("HBBI", *step) for step in program)
