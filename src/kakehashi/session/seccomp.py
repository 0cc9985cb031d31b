"""The payload's system call filter.

What a namespace without capabilities already refuses is refused here once more, so that a
flaw in one wall is not a way out; and what no namespace covers (virtual sockets, the kernel's
keyring, io_uring, core limits) is refused here alone. Without namespaces, what Landlock does not
cover is refused besides: memory and queues that outlive their processes, attributes of files,
and every kind of internet socket but plain TCP.
"""

from __future__ import annotations

import errno
import platform
import struct

from kakehashi.session import syscalls

_LOAD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_GREATER_EQUAL = 0x35
_JUMP_ANY_BIT = 0x45
_AND = 0x54
_RETURN = 0x06

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_NEW_NAMESPACES = 0x7E020000
_RLIMIT_CORE = 4
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_NETLINK_ROUTE = 0
_TYPE_BITS, _SOCK_STREAM, _TCP = 0xF, 1, 6
# Opens a connection without connect(2), past Landlock.
_MSG_FASTOPEN = 0x20000000

REFUSED = (
    "acct",
    "add_key",
    "bpf",
    "chroot",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "init_module",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mount",
    "mount_setattr",
    "move_mount",
    "name_to_handle_at",
    "open_by_handle_at",
    "open_tree",
    "open_tree_attr",
    "perf_event_open",
    "pivot_root",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "request_key",
    "setdomainname",
    "sethostname",
    "setns",
    "swapoff",
    "swapon",
    "syslog",
    "umount2",
    "unshare",
    "userfaultfd",
    "vhangup",
)
REFUSED_WITHOUT_NAMESPACES = (
    "fsetxattr",
    "lsetxattr",
    "mq_open",
    "msgget",
    "semget",
    "setxattr",
    "setxattrat",
    "shmget",
)
# "Not implemented" makes the C library and others fall back to calls that can be judged here.
ABSENT = ("clone3", "io_uring_enter", "io_uring_register", "io_uring_setup")

_Instruction = tuple[int, int, int, int]


def _refuse(code: int) -> _Instruction:
    return (_RETURN, 0, 0, _ERRNO | code)


_PASS: _Instruction = (_RETURN, 0, 0, _ALLOW)
_DENY = _refuse(errno.EPERM)
_NO_FAMILY = _refuse(errno.EAFNOSUPPORT)


def _low(argument: int) -> _Instruction:
    return (_LOAD, 0, 0, 16 + 8 * argument)


def _high(argument: int) -> _Instruction:
    return (_LOAD, 0, 0, 20 + 8 * argument)


# Each body ends in a return on every way through it, so the number needs no second load.
_JUDGED: dict[str, tuple[_Instruction, ...]] = {
    "clone": (_low(0), (_JUMP_ANY_BIT, 0, 1, _NEW_NAMESPACES), _DENY, _PASS),
    "socket": (
        _low(0),
        (_JUMP_EQUAL, 5, 0, _AF_UNIX),
        (_JUMP_EQUAL, 4, 0, _AF_INET),
        (_JUMP_EQUAL, 3, 0, _AF_INET6),
        (_JUMP_EQUAL, 0, 3, _AF_NETLINK),
        _low(2),
        # Interface lists (getifaddrs) come from here; other netlink protocols do more.
        (_JUMP_EQUAL, 0, 1, _NETLINK_ROUTE),
        _PASS,
        _NO_FAMILY,
    ),
    "socketpair": (_low(0), (_JUMP_EQUAL, 0, 1, _AF_UNIX), _PASS, _NO_FAMILY),
    # The core limit of one byte must stay: see payload.CORE_LIMIT.
    "setrlimit": (_low(0), (_JUMP_EQUAL, 0, 1, _RLIMIT_CORE), _DENY, _PASS),
    "prlimit64": (
        _low(1),
        (_JUMP_EQUAL, 0, 4, _RLIMIT_CORE),
        _low(2),
        (_JUMP_EQUAL, 0, 3, 0),
        _high(2),
        (_JUMP_EQUAL, 0, 1, 0),
        _PASS,
        _DENY,
    ),
}

_NO_FAST_OPEN = ((_JUMP_ANY_BIT, 0, 1, _MSG_FASTOPEN), _DENY, _PASS)
_JUDGED_WITHOUT_NAMESPACES: dict[str, tuple[_Instruction, ...]] = {
    "socket": (
        _low(0),
        (_JUMP_EQUAL, 11, 0, _AF_UNIX),
        (_JUMP_EQUAL, 4, 0, _AF_INET),
        (_JUMP_EQUAL, 3, 0, _AF_INET6),
        (_JUMP_EQUAL, 0, 9, _AF_NETLINK),
        _low(2),
        (_JUMP_EQUAL, 6, 7, _NETLINK_ROUTE),
        _low(1),
        (_AND, 0, 0, _TYPE_BITS),
        (_JUMP_EQUAL, 0, 4, _SOCK_STREAM),
        _low(2),
        (_JUMP_EQUAL, 1, 0, 0),
        (_JUMP_EQUAL, 0, 1, _TCP),
        _PASS,
        _NO_FAMILY,
    ),
    "sendmmsg": (_low(3), *_NO_FAST_OPEN),
    "sendmsg": (_low(2), *_NO_FAST_OPEN),
    "sendto": (_low(3), *_NO_FAST_OPEN),
}


def build(machine: str | None = None, *, namespaces: bool = True) -> bytes:
    """Return the filter's program.

    Parameters
    ----------
    machine : str, optional
        ``x86_64`` or ``aarch64``; this machine by default.
    namespaces : bool
        Whether the payload has namespaces of its own; more is refused if not.

    Returns
    -------
    bytes
        Packed ``struct sock_filter`` instructions, 8 bytes each.

    Raises
    ------
    OSError
        There is no table for the machine.
    """
    machine = machine or platform.machine()
    syscalls.number("mount", machine)
    program: list[_Instruction] = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        program += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), _refuse(errno.ENOSYS)]
    bodies: dict[str, tuple[_Instruction, ...]] = dict.fromkeys(REFUSED, (_DENY,))
    bodies |= dict.fromkeys(ABSENT, (_refuse(errno.ENOSYS),))
    bodies |= _JUDGED
    if not namespaces:
        bodies |= dict.fromkeys(REFUSED_WITHOUT_NAMESPACES, (_refuse(errno.EOPNOTSUPP),))
        bodies |= _JUDGED_WITHOUT_NAMESPACES
    for name, body in bodies.items():
        nr = syscalls.number(name, machine)
        if nr is not None:
            program += [(_JUMP_EQUAL, 0, len(body), nr), *body]
    program.append(_PASS)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
