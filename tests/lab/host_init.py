"""First process of a host of the lab: builds its root, then reaps what dies.

Started as pid 1 of new mount, pid, uts and ipc (and mostly network) namespaces with one JSON
document on standard input. Its root is an overlay of the machine's operating system with the
upper layer in memory, so that a host may add accounts and files as a real one would, and all
of it is gone with the host. What a host changed can be listed in its upper layer. What else lies
on the machine is no host's: a search of all its files is then as long as on a real one.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import stat
import sys
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE, RDONLY, REMOUNT = 2, 4, 8, 4096, 16384, 1 << 18, 1, 32
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9),
           "tty": (5, 0), "fuse": (10, 229)}  # fmt: skip

SYSTEM = {"bin", "etc", "lib", "lib32", "lib64", "libx32", "sbin", "usr", "var"}


def mount(source: str, target: Path, kind: str | None, flags: int = 0, data: str = "") -> None:
    kind_bytes = kind.encode() if kind else None
    if LIBC.mount(source.encode(), bytes(target), kind_bytes, ctypes.c_ulong(flags), data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"mount {source} on {target}")


def node(path: Path, major: int, minor: int) -> None:
    os.mknod(path, 0o020666, os.makedev(major, minor))
    path.chmod(0o666)


def build_devices(dev: Path, extra: list[str], *, fuse: bool) -> None:
    mount("tmpfs", dev, "tmpfs", NOSUID | NOEXEC, "mode=755,size=1m")
    for name, (major, minor) in DEVICES.items():
        if fuse or name != "fuse":
            node(dev / name, major, minor)
    for name in extra:
        # Made-up GPUs: the scheduler counts device files and asks no driver.
        node(dev / name, 1, 3)
    for name in ("pts", "shm"):
        (dev / name).mkdir()
    mount("devpts", dev / "pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    mount("tmpfs", dev / "shm", "tmpfs", NOSUID | NODEV, "mode=1777")
    (dev / "ptmx").symlink_to("pts/ptmx")
    (dev / "fd").symlink_to("/proc/self/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        (dev / name).symlink_to(f"/proc/self/fd/{number}")


def build_root(spec: dict[str, object]) -> None:
    base = Path(str(spec["base"]))
    root, upper, work = base / "root", base / "upper", base / "work"
    for folder in (root, upper, work):
        folder.mkdir(parents=True, exist_ok=True)
    for folder in Path("/").iterdir():
        if folder.name not in SYSTEM and folder.is_dir() and not folder.is_symlink():
            empty = upper / folder.name
            empty.mkdir(exist_ok=True)
            empty.chmod(stat.S_IMODE(folder.stat().st_mode))
            os.setxattr(empty, "trusted.overlay.opaque", b"y")
    mount("none", Path("/"), None, REC | PRIVATE)
    mount("overlay", root, "overlay", 0, f"lowerdir=/,upperdir={upper},workdir={work}")
    for source, target, writable in spec["binds"]:  # type: ignore[attr-defined]
        place = root / str(target).lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        mount(source, place, None, BIND)
        if not writable:
            mount("none", place, None, BIND | REMOUNT | RDONLY | NOSUID | NODEV)
    mount("proc", root / "proc", "proc", NOSUID | NODEV | NOEXEC)
    mount("sysfs", root / "sys", "sysfs", NOSUID | NODEV | NOEXEC)
    for place, mode in (("tmp", "1777"), ("var/tmp", "1777"), ("run", "755")):
        mount("tmpfs", root / place, "tmpfs", NOSUID | NODEV, f"mode={mode}")
    devices = list(spec["devices"])  # type: ignore[call-overload]
    build_devices(root / "dev", devices, fuse=bool(spec["fuse"]))
    for name, text in spec["files"].items():  # type: ignore[attr-defined]
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    os.chdir(root)
    if LIBC.syscall(ctypes.c_long(155), b".", b"."):
        raise OSError(ctypes.get_errno(), "pivot_root")
    if LIBC.umount2(b".", 2):
        raise OSError(ctypes.get_errno(), "umount old root")
    os.chdir("/")


def main() -> None:
    spec = json.loads(sys.stdin.read())
    socket.sethostname(spec["hostname"])
    build_root(spec)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("ready", flush=True)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    # Blocked and waited for: an ignored SIGCHLD would hide the deaths from the tests.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        signal.sigwait({signal.SIGCHLD})
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break


main()
