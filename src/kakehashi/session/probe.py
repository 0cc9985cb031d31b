"""The probe: run inside a payload's world, it tries what must not be possible there.

Each check names what it tried and what it saw. It imports the standard library and this package's
bare system calls only, and prints one JSON list.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import fnmatch
import json
import os
import platform
import pwd
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kakehashi.session import landlock, syscalls

if TYPE_CHECKING:
    from collections.abc import Callable

# Where a payload may write; nobody serves the two mounts yet, and looking would hang.
_SCRATCH = ("/tmp", "/var/tmp", "/dev/shm", "/home/session")  # noqa: S108 - names inside the payload
_WRITABLE = (*_SCRATCH, "/dev/pts")
_UNSERVED = ("/store", "/work")
_TOP = frozenset(
    {
        "bin",
        "dev",
        "etc",
        "home",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "mnt",
        "proc",
        "run",
        "sbin",
        "store",
        "sys",
        "tmp",
        "usr",
        "var",
        "work",
    }
)
_RUN = frozenset({"kakehashi", "user"})
_DEVICES = frozenset(
    {
        "fd",
        "full",
        "null",
        "ptmx",
        "pts",
        "random",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "tty",
        "urandom",
        "zero",
    }
)
_SEIZE = 0x4206
_NS_GET_PARENT = 0xB702
_MSG_FASTOPEN = 0x20000000
_AF_NETLINK, _AF_PACKET, _AF_ALG, _AF_VSOCK = 16, 17, 38, 40

_libc = ctypes.CDLL(None, use_errno=True)


class FoundError(Exception):
    """Something that must not be possible was; the text says what."""


def _must_fail(
    what: str, wanted: tuple[int, ...], attempt: Callable[..., object], *arguments: object
) -> None:
    """Try something that must be refused, for one of the wanted reasons (any, if none).

    Raises
    ------
    FoundError
        It was not refused, or in a way that shows it was merely unlucky.
    """
    try:
        attempt(*arguments)
    except OSError as error:
        if wanted and error.errno not in wanted:
            name = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise FoundError(f"{what}: refused for another reason than expected ({name})") from None
        return
    raise FoundError(f"{what}: was possible")


def _names(folder: str) -> list[str]:
    return os.listdir(folder)  # noqa: PTH208 - names, not paths


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


def _status() -> dict[str, str]:
    lines = (line.partition(":") for line in _lines("/proc/self/status"))
    return {name: value.strip() for name, _, value in lines}


def _processes(_: dict[str, Any]) -> str:
    seen = {int(name) for name in _names("/proc") if name.isdigit()}
    extra = seen - {1, os.getpid()}
    if extra or os.getpid() > 100:
        raise FoundError(f"processes of others are visible: {sorted(extra)[:8]}")
    return "only its own are visible"


def _attach(pid: int) -> None:
    # Unlike attaching, this does not stop a process that it was possible for; it is let go of
    # when this one ends.
    if _libc.ptrace(_SEIZE, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def _first(path: str) -> bytes:
    with Path(path).open("rb", buffering=0) as file:
        return file.read(1)


def _init(_: dict[str, Any]) -> str:
    denied = (errno.EPERM, errno.EACCES)
    _must_fail("tracing process 1", denied, _attach, 1)
    for name in ("environ", "mem", "maps"):
        _must_fail(f"reading /proc/1/{name}", denied, _first, f"/proc/1/{name}")
    for name in ("root", "cwd", "exe", "ns/mnt"):
        _must_fail(f"following /proc/1/{name}", denied, os.readlink, f"/proc/1/{name}")
    _must_fail("listing /proc/1/fd", denied, os.listdir, "/proc/1/fd")
    return "cannot be traced or read"


def _clone_user_namespace() -> None:
    flags = syscalls.CLONE_NEWUSER | signal.SIGCHLD
    nr = syscalls.number("clone")
    pid = _libc.syscall(ctypes.c_long(nr or 0), ctypes.c_ulong(flags), None, None, None, None)
    if pid == 0:
        os._exit(0)
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone")
    os.waitpid(pid, 0)


def _namespaces(_: dict[str, Any]) -> str:
    if _first("/proc/sys/user/max_user_namespaces") != b"0":
        raise FoundError("the number of user namespaces is not limited to 0")
    kinds = {
        "user": syscalls.CLONE_NEWUSER,
        "mount": syscalls.CLONE_NEWNS,
        "network": syscalls.CLONE_NEWNET,
        "pid": syscalls.CLONE_NEWPID,
        "ipc": syscalls.CLONE_NEWIPC,
    }
    for name, flag in kinds.items():
        _must_fail(f"a new {name} namespace", (), syscalls.unshare, flag)
    _must_fail("clone into a user namespace", (), _clone_user_namespace)
    return "no new ones"


def _entering(_: dict[str, Any]) -> str:
    for name in ("user", "mnt", "net", "pid"):
        handle = os.open(f"/proc/self/ns/{name}", os.O_RDONLY)
        try:
            _must_fail(f"setns to its own {name}", (), syscalls.setns, handle, 0)
            if name == "user":
                parent = "the parent of its user namespace"
                _must_fail(parent, (), fcntl.ioctl, handle, _NS_GET_PARENT)
        finally:
            os.close(handle)
    return "no namespace can be entered"


def _mounts(_: dict[str, Any]) -> str:
    denied, absent = (errno.EPERM,), (errno.EPERM, errno.ENOSYS)
    for target in ("/tmp", "/proc/sys", "/usr"):  # noqa: S108 - names inside the payload
        _must_fail(f"umount of {target}", denied, syscalls.unmount, target)
    remount = syscalls.MS_REMOUNT | syscalls.MS_BIND
    for target in ("/", "/usr", "/dev", "/run/kakehashi"):
        what = f"remount of {target} read-write"
        _must_fail(what, denied, syscalls.mount, "none", target, None, remount)
    _must_fail("a bind", denied, syscalls.mount, "/usr", "/mnt", None, syscalls.MS_BIND)
    _must_fail("a tmpfs", denied, syscalls.mount, "t", "/mnt", "tmpfs")
    _must_fail("fsopen", absent, syscalls.call, "fsopen", b"tmpfs", ctypes.c_ulong(0))
    tree = ("open_tree", ctypes.c_int(-100), b"/usr", ctypes.c_uint(1))
    _must_fail("open_tree", absent, syscalls.call, *tree)
    _must_fail("chroot", denied, os.chroot, "/tmp")  # noqa: S108 - a name inside the payload
    _must_fail("pivot_root", denied, syscalls.call, "pivot_root", b"/tmp", b"/tmp")
    return "cannot be changed"


def _write(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(fd, b"1")
    os.close(fd)
    Path(path).unlink()


def _writing(facts: dict[str, Any]) -> str:
    """Try to make and to change a file in each mount and each folder of note."""
    allowed = (*_WRITABLE, f"/run/user/{facts['uid']}")
    points = [line.split()[4].replace("\\040", " ") for line in _lines("/proc/self/mountinfo")]
    places = {*points, "/", "/usr", "/etc", "/run", "/run/kakehashi", "/var", "/home", "/dev"}
    denied = (errno.EROFS, errno.EPERM, errno.EACCES)
    tried = 0
    for place in sorted(places):
        if place in _UNSERVED or place in allowed or place.startswith(("/proc/", "/dev/")):
            continue
        tried += 1
        if Path(place).is_dir():
            _must_fail(f"a new file in {place}", (), _write, f"{place}/.kakehashi-probe")
            _must_fail(f"changing the times of {place}", denied, os.utime, place)
        else:
            _must_fail(f"changing the mode of {place}", (), os.chmod, place, 0o600)
    for place in ("/proc/sys/kernel/hostname", "/proc/sys/user/max_user_namespaces"):
        _must_fail(f"writing {place}", (), _write, place)
    for name in ("null", "zero", "tty"):
        _must_fail(f"changing /dev/{name}", (), os.chmod, f"/dev/{name}", 0o600)
    return f"refused in {tried} places"


def _network(facts: dict[str, Any]) -> str:
    names = {name for _, name in socket.if_nameindex()}
    if names != {"lo"}:
        raise FoundError(f"network interfaces are visible: {sorted(names)}")
    refused = (errno.ECONNREFUSED,)
    address = ("127.0.0.1", facts["port"])
    _must_fail("the node's own address", refused, socket.create_connection, address, 2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        out = ("192.0.2.1", 53)
        _must_fail("a packet outwards", (errno.ENETUNREACH,), datagram.connect, out)
    with socket.socket(socket.AF_UNIX) as local:
        name = "\0" + facts["abstract"]
        _must_fail("an abstract socket of the node", refused, local.connect, name)
    return "none but its own loopback"


def _families(_: dict[str, Any]) -> str:
    for name, family, kind, protocol in (
        ("vsock", _AF_VSOCK, socket.SOCK_STREAM, 0),
        ("packet", _AF_PACKET, socket.SOCK_RAW, 0),
        ("alg", _AF_ALG, socket.SOCK_SEQPACKET, 0),
        ("netlink (audit)", _AF_NETLINK, socket.SOCK_RAW, 9),
    ):
        what = f"a socket of the family {name}"
        _must_fail(what, (errno.EAFNOSUPPORT,), socket.socket, family, kind, protocol)
    return "unix, inet, interface lists only"


def _calls(_: dict[str, Any]) -> str:
    buffer = ctypes.create_string_buffer(256)
    zero, less = ctypes.c_ulong(0), ctypes.c_long(-1)
    ring = ("io_uring_setup", ctypes.c_uint(8), buffer)
    _must_fail("io_uring", (errno.ENOSYS,), syscalls.call, *ring)
    tries: tuple[tuple[object, ...], ...] = (
        ("keyctl", ctypes.c_int(0), ctypes.c_int(-3), zero),
        ("bpf", zero, zero, zero),
        ("perf_event_open", buffer, zero, less, less, zero),
        ("userfaultfd", zero),
        ("syslog", ctypes.c_int(3), buffer, ctypes.c_int(100)),
        ("open_by_handle_at", ctypes.c_int(-100), buffer, zero),
    )
    for one in tries:
        _must_fail(str(one[0]), (errno.EPERM,), syscalls.call, *one)
    return "refused"


def _privileges(_: dict[str, Any]) -> str:
    status = _status()
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status[name], 16):
            raise FoundError(f"there are capabilities: {name} {status[name]}")
    if status["NoNewPrivs"] != "1":
        raise FoundError("no_new_privs is not set")
    if status["Seccomp"] != "2":
        raise FoundError("there is no system call filter")
    if 0 in {os.getuid(), os.geteuid()}:
        raise FoundError("it runs as root")
    for line in _lines("/proc/self/mountinfo"):
        if "nosuid" not in line.split()[5].split(","):
            raise FoundError(f"set-uid programs would count in {line.split()[4]}")
    return "none"


def _limit_core(value: int) -> None:
    # A limit that may not be raised is a ValueError here, and a refusal all the same.
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (value, 1))
    except ValueError as error:
        raise OSError(errno.EPERM, str(error)) from None


def _core(_: dict[str, Any]) -> str:
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    if limits != (1, 1):
        # A limit of none that the job came with does as well, where no handler is piped to.
        piped = _first("/proc/sys/kernel/core_pattern") == b"|"
        if limits != (0, 0) or piped:
            raise FoundError(
                f"the limit is {limits}, not one byte; let jobs have a hard limit of 1"
            )
    if int(_lines("/proc/self/coredump_filter")[0], 16):
        raise FoundError("the filter of core dumps lets memory through")
    for value in {0, resource.RLIM_INFINITY} - {limits[0]}:
        _must_fail(f"a core limit of {value}", (errno.EPERM,), _limit_core, value)
    return "off by limit and filter"


def _descriptors(_: dict[str, Any]) -> str:
    kinds: dict[int, str] = {}
    for name in _names("/proc/self/fd"):
        with contextlib.suppress(OSError):
            kinds[int(name)] = str(Path("/proc/self/fd", name).readlink())
    # The one that lists them is closed again by now.
    if (
        kinds.keys() - {0, 1, 2}
        or kinds.get(0) != "/dev/null"
        or not kinds.get(1, "").startswith("pipe:")
    ):
        raise FoundError(f"unexpected open files: {kinds}")
    return "standard files only"


def _tree(facts: dict[str, Any]) -> str:
    shown = {path.split("/")[1] for path in facts["read_only"]}
    extra = set(_names("/")) - _TOP - shown
    if extra:
        raise FoundError(f"folders of the node are visible: {sorted(extra)}")
    for folder, known in (("/run", _RUN), ("/home", frozenset({"session"}))):
        allowed = {
            path.split("/")[2] for path in facts["read_only"] if path.startswith(f"{folder}/")
        }
        extra = set(_names(folder)) - known - allowed
        if extra:
            raise FoundError(f"the node's {folder} is visible: {sorted(extra)}")
    if platform.node() != "session":
        raise FoundError("the node's host name is visible")
    return "only what is allowed"


def _devices(facts: dict[str, Any]) -> str:
    for name in _names("/dev"):
        inside = any(
            fnmatch.fnmatch(f"/dev/{name}", pattern) or pattern.startswith(f"/dev/{name}/")
            for pattern in facts["devices"]
        )
        if name not in _DEVICES and not inside:
            raise FoundError(f"the device /dev/{name} is there")
    memory = os.makedev(1, 1)
    _must_fail("a device file", (errno.EPERM,), os.mknod, f"{_SCRATCH[0]}/.mem", 0o020600, memory)
    return "only what is allowed"


def _scratch(facts: dict[str, Any]) -> str:
    for place in (*_SCRATCH, f"/run/user/{facts['uid']}"):
        size = os.statvfs(place)
        megabytes = size.f_blocks * size.f_frsize >> 20
        if megabytes > facts["scratch_mb"]:
            raise FoundError(f"{place} holds {megabytes} MiB, not {facts['scratch_mb']} at most")
        try:
            _write(f"{place}/.kakehashi-probe")
        except OSError as error:
            raise FoundError(f"{place} cannot be written: {error.strerror}") from None
    for line in _lines("/proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        if left.split()[4] in _SCRATCH and right.split()[0] != "tmpfs":
            raise FoundError(f"{left.split()[4]} is not in memory")
    return f"in memory, {facts['scratch_mb']} MiB at most"


def _environment(_: dict[str, Any]) -> str:
    odd = [
        name
        for name in os.environ
        if name.startswith(("LD_", "SLURM", "SSH_", "DBUS_", "KAKEHASHI_KEEPER", "PYTHONPATH"))
    ]
    if odd or os.environ.get("HOME") != "/home/session":
        raise FoundError(f"the node's environment came in: {sorted(odd)}")
    return "its own"


def _account_files(facts: dict[str, Any]) -> str:
    """Without namespaces: what of the node's files the kernel keeps from the payload."""
    if facts["landlock"] < 1:
        return "NOT confined: this kernel has no Landlock"
    denied = (errno.EACCES,)
    tried = 0
    account = pwd.getpwuid(os.getuid()).pw_dir
    for place in ("/tmp", "/var/tmp", "/dev/shm", "/run/user", account, "/var/spool", "/"):  # noqa: S108 - must be refused
        if Path(place).is_dir():
            tried += 1
            _must_fail(f"listing {place}", denied, os.listdir, place)
            if os.access(place, os.W_OK):
                _must_fail(f"writing in {place}", denied, _write, f"{place}/.kakehashi-probe")
    for name in ("auth", "run"):
        _must_fail(f"writing in {name}", denied, _write, f"{facts['folder']}/{name}/probe")
    _must_fail("listing auth", denied, os.listdir, f"{facts['folder']}/auth")
    _must_fail("a coredump filter", denied, _write, "/proc/self/coredump_filter")
    return f"refused in {tried} places"


def _account_processes(facts: dict[str, Any]) -> str:
    denied = (errno.EPERM, errno.EACCES)
    warden = facts["warden"]
    _must_fail("tracing the warden", denied, _attach, warden)
    for name in ("environ", "mem", "maps"):
        _must_fail(f"reading the warden's {name}", denied, _first, f"/proc/{warden}/{name}")
    if facts["landlock"] >= landlock.SCOPE_ABI:
        _must_fail("a signal to the warden", denied, os.kill, warden, signal.SIGCONT)
        return "cannot be traced, read or signalled"
    return "cannot be traced or read; processes of the account CAN be signalled"


def _account_network(facts: dict[str, Any]) -> str:
    family = (errno.EAFNOSUPPORT,)
    for what, kind, protocol in (
        ("UDP", socket.SOCK_DGRAM, 0),
        ("SCTP", socket.SOCK_STREAM, 132),
        ("MPTCP", socket.SOCK_STREAM, 262),
    ):
        for version in (socket.AF_INET, socket.AF_INET6):
            _must_fail(f"a socket for {what}", family, socket.socket, version, kind, protocol)
    with socket.socket(socket.AF_INET) as quick:
        fast = (b"x", _MSG_FASTOPEN, ("127.0.0.1", 9))
        _must_fail("a fast open", (errno.EPERM,), quick.sendto, *fast)
    if facts["landlock"] < landlock.NETWORK_ABI:
        return "TCP is NOT confined: this kernel's Landlock does not cover it"
    used = (facts["port"], facts["hub_port"])
    other = next(port for port in range(1024, 65536) if port not in used)
    denied = (errno.EACCES,)
    _must_fail("a connection", denied, socket.create_connection, ("127.0.0.1", other), 2)
    with socket.socket(socket.AF_INET) as listener:
        _must_fail("listening on a port", denied, listener.bind, ("127.0.0.1", other))
    # The control: the port to the hub is there.
    socket.create_connection(("127.0.0.1", facts["hub_port"]), 2).close()
    return "TCP ports of the server and to the hub only"


def _account_calls(_: dict[str, Any]) -> str:
    key, size, mode = ctypes.c_int(0), ctypes.c_size_t(4096), ctypes.c_int(0o600)
    refused = (errno.EOPNOTSUPP,)
    _must_fail("System V memory", refused, syscalls.call, "shmget", key, size, mode)
    _must_fail("System V semaphores", refused, syscalls.call, "semget", key, ctypes.c_int(1), mode)
    _must_fail("System V queues", refused, syscalls.call, "msgget", key, mode)
    place = f"{os.environ['TMPDIR']}/.kakehashi-probe"
    _write(place)
    _must_fail("an attribute of a file", refused, os.setxattr, place, "user.probe", b"1")
    return "refused"


def _account_namespaces(_: dict[str, Any]) -> str:
    for flag in (syscalls.CLONE_NEWUSER, syscalls.CLONE_NEWNS, syscalls.CLONE_NEWNET):
        _must_fail("a new namespace", (errno.EPERM,), syscalls.unshare, flag)
    _must_fail("clone into a user namespace", (errno.EPERM,), _clone_user_namespace)
    return "no new ones"


def _account_privileges(_: dict[str, Any]) -> str:
    status = _status()
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        if int(status[name], 16):
            raise FoundError(f"there are capabilities: {name} {status[name]}")
    if status["NoNewPrivs"] != "1":
        raise FoundError("no_new_privs is not set")
    if status["Seccomp"] != "2":
        raise FoundError("there is no system call filter")
    if 0 in {os.getuid(), os.geteuid()}:
        raise FoundError("it runs as root")
    return "none"


def _account_scratch(facts: dict[str, Any]) -> str:
    for place in ("home", "tmp", "rt", "shm"):
        try:
            _write(f"{facts['folder']}/{place}/.kakehashi-probe")
        except OSError as error:
            raise FoundError(f"{place} cannot be written: {error.strerror}") from None
    return "in memory, limited by the job's memory alone"


def _account_environment(facts: dict[str, Any]) -> str:
    names = ("SLURM", "SSH_", "DBUS_", "KAKEHASHI_KEEPER", "PYTHONPATH")
    odd = [name for name in os.environ if name.startswith(names)]
    if odd or os.environ.get("HOME") != f"{facts['folder']}/home":
        raise FoundError(f"the node's environment came in: {sorted(odd)}")
    return "its own"


CHECKS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("payload: processes", _processes),
    ("payload: init", _init),
    ("payload: new namespaces", _namespaces),
    ("payload: entering namespaces", _entering),
    ("payload: mounts", _mounts),
    ("payload: writing", _writing),
    ("payload: network", _network),
    ("payload: socket families", _families),
    ("payload: system calls", _calls),
    ("payload: privileges", _privileges),
    ("payload: core dumps", _core),
    ("payload: open files", _descriptors),
    ("payload: tree", _tree),
    ("payload: devices", _devices),
    ("payload: scratch", _scratch),
    ("payload: environment", _environment),
)


CHECKS_WITHOUT_NAMESPACES: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("payload: files", _account_files),
    ("payload: processes", _account_processes),
    ("payload: new namespaces", _account_namespaces),
    ("payload: network", _account_network),
    ("payload: socket families", _families),
    ("payload: system calls", _calls),
    ("payload: what outlives", _account_calls),
    ("payload: privileges", _account_privileges),
    ("payload: core dumps", _core),
    ("payload: open files", _descriptors),
    ("payload: scratch", _account_scratch),
    ("payload: environment", _account_environment),
)


def main(facts_text: str) -> None:
    """Run every check and print the results."""
    facts = json.loads(facts_text)
    results = []
    for name, check in CHECKS_WITHOUT_NAMESPACES if "folder" in facts else CHECKS:
        try:
            message, ok = check(facts), True
        except FoundError as found:
            message, ok = str(found), False
        except Exception as error:  # what cannot be judged is not well
            message, ok = f"cannot be judged: {type(error).__name__}: {error}", False
        results.append({"check": name, "ok": ok, "message": message})
    sys.stdout.write(json.dumps(results))
