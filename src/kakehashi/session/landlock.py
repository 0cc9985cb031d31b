"""Landlock: what a program of an account may reach, given up by itself and for good.

The kernel's own wall for sites without user namespaces (linux/landlock.h, documented in the
kernel's userspace-api/landlock). It covers the opening and making of files, TCP ports, and from
newer kernels on signals and abstract sockets. It does not cover: modes and times of files, UDP,
named Unix sockets, which host a permitted port is on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.session import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterable

NETWORK_ABI = 4
"""First version that covers TCP ports (Linux 6.7)."""

SCOPE_ABI = 6
"""First version that covers signals and abstract sockets (Linux 6.12)."""

_VERSION_FLAG = 1
_PATH_BENEATH, _NET_PORT = 1, 2

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_ABSTRACT_SOCKET, _SIGNAL = 1 << 0, 1 << 1

_READ = _EXECUTE | _READ_FILE | _READ_DIR
# All of the first version but device files.
_FIRST = (1 << 13) - 1
_DEVICE_FILES = 1 << 6 | 1 << 11
# Rights that a rule may give for what is no folder.
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV


@dataclass(frozen=True)
class Rules:
    """What stays possible.

    Attributes
    ----------
    read : tuple of str
        Files and folders to read and to run programs from; what is not there is left out.
    write : tuple of str
        Folders to do anything in but to make device files.
    devices : tuple of str
        Device files to read, write and control.
    bind, connect : tuple of int
        TCP ports to listen on, and to connect to (on whatever host).
    """

    read: tuple[str, ...]
    write: tuple[str, ...]
    devices: tuple[str, ...]
    bind: tuple[int, ...]
    connect: tuple[int, ...]


def abi() -> int:
    """Return the version of Landlock that this kernel has switched on, 0 for none."""
    try:
        return syscalls.call(
            "landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION_FLAG)
        )
    except OSError:
        return 0


def missing(version: int) -> tuple[str, ...]:
    """Return what a version of Landlock does not cover and a newer one does."""
    gaps = (
        (1, "files"),
        (NETWORK_ABI, "TCP ports"),
        (SCOPE_ABI, "signals and abstract sockets"),
    )
    return tuple(words for since, words in gaps if version < since)


def restrict(rules: Rules) -> None:
    """Confine this process, and all that come from it, to the rules.

    Needs ``no_new_privs``. What this kernel's version does not cover is not confined; see
    :func:`missing`.

    Raises
    ------
    OSError
        The kernel refused, or a folder to write in is not there.
    """
    version = abi()
    if version == 0:
        return
    files = _FIRST
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        files |= right if version >= since else 0
    ports = _BIND_TCP | _CONNECT_TCP if version >= NETWORK_ABI else 0
    scopes = _ABSTRACT_SOCKET | _SIGNAL if version >= SCOPE_ABI else 0
    attributes = struct.pack("QQQ", files, ports, scopes)
    # An older kernel refuses a structure that is longer than it knows.
    size = 8 if version < NETWORK_ABI else 16 if version < SCOPE_ABI else 24
    ruleset = syscalls.call(
        "landlock_create_ruleset", attributes, ctypes.c_size_t(size), ctypes.c_uint(0)
    )
    try:
        for path in rules.read:
            with contextlib.suppress(FileNotFoundError):
                _allow(ruleset, path, _READ & files)
        for path in rules.write:
            _allow(ruleset, path, files & ~_DEVICE_FILES)
        for path in rules.devices:
            _allow(ruleset, path, (_READ_FILE | _WRITE_FILE | _READ_DIR | _IOCTL_DEV) & files)
        if ports:
            _allow_ports(ruleset, rules.bind, _BIND_TCP)
            _allow_ports(ruleset, rules.connect, _CONNECT_TCP)
        syscalls.call("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_FILES
        # The structure is packed: no filling after the descriptor.
        _add(ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, place))
    finally:
        os.close(place)


def _allow_ports(ruleset: int, ports: Iterable[int], right: int) -> None:
    for port in ports:
        _add(ruleset, _NET_PORT, struct.pack("QQ", right, port))


def _add(ruleset: int, kind: int, rule: bytes) -> None:
    syscalls.call(
        "landlock_add_rule", ctypes.c_int(ruleset), ctypes.c_int(kind), rule, ctypes.c_uint(0)
    )
