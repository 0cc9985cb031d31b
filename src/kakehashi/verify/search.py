"""Search a host for the canary, as root: ``python -I -m kakehashi.verify.search``.

One JSON object on standard input asks, one on standard output answers. Searched are the files of
every mount of every mount namespace that changed since the marker, files that are deleted but
open, System V memory of every IPC namespace, swap, and what processes show of their command
lines and environments. What cannot be looked at is named. Standard library only.

Request: ``{"mask": HEX, "needles": {NAME: HEX, masked}, "since_ns": N, "skip": [PATH, ..]}``, or
``{"marker": true}`` for the ``since_ns`` of this host's own clock.
Answer: ``{"findings": [{"place","path","encoding"}], "looked": {PLACE: COUNT}, "unseen":
[{"place","reason"}], "live": {"mounts": [..], "processes": [..]}}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import sys
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kakehashi.verify.pattern import masked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHUNK = 1 << 20
PACKED_MOST = 256 << 20
"""Bytes that are unpacked of one packed stream at most."""

# A gzip member, and zlib streams of all usual levels.
MAGICS = (b"\x1f\x8b\x08", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
PSEUDO = frozenset(
    {"proc", "sysfs", "devpts", "cgroup", "cgroup2", "mqueue", "securityfs", "debugfs", "tracefs",
     "bpf", "configfs", "fusectl", "pstore", "efivarfs", "autofs", "binfmt_misc", "nsfs",
     "devtmpfs", "hugetlbfs", "rpc_pipefs", "selinuxfs"}
)  # fmt: skip
OURS = ("kakehashi", "sshfs")
CLONE_NEWIPC = 0x08000000
SHM_RDONLY = 0o10000


class Needles:
    """Finds each form of the pattern in a stream, whole or packed."""

    def __init__(self, needles: dict[str, bytes]) -> None:
        self._needles = needles
        self._overlap = max(len(needle) for needle in needles.values()) - 1

    def inside(self, stream: BinaryIO) -> set[str]:
        """Return the forms that a stream holds, read from where it stands."""
        found: set[str] = set()
        tail = b""
        offset = 0
        starts: list[int] = []
        while data := stream.read(CHUNK):
            window = tail + data
            found |= self._plain(window)
            base = offset - len(tail)
            starts += [base + at for at in _magics(window) if base + at not in starts[-16:]]
            tail = window[-self._overlap :]
            offset += len(data)
        if starts and stream.seekable():
            for start in starts:
                stream.seek(start)
                found |= {f"packed, {form}" for form in self._unpacked(stream)}
        return found

    def of(self, data: bytes) -> set[str]:
        """Return the forms that a few bytes hold."""
        return self._plain(data)

    def _plain(self, window: bytes) -> set[str]:
        return {name for name, needle in self._needles.items() if needle in window}

    def _unpacked(self, stream: BinaryIO) -> set[str]:
        """Unpack one gzip or zlib stream as far as it is one."""
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
        found: set[str] = set()
        tail = b""
        total, size = 0, 4096
        with contextlib.suppress(zlib.error):
            while not unpacker.eof and total < PACKED_MOST:
                # Little at first: most of what looks like a beginning is none.
                data, size = stream.read(size), CHUNK // 4
                if not data:
                    break
                while data:
                    plain = unpacker.decompress(data, CHUNK)
                    total += len(plain)
                    found |= self._plain(tail + plain)
                    tail = (tail + plain)[-self._overlap :]
                    data = unpacker.unconsumed_tail
        return found


def _magics(window: bytes) -> list[int]:
    found = []
    for magic in MAGICS:
        at = window.find(magic)
        while at >= 0:
            found.append(at)
            at = window.find(magic, at + 1)
    return sorted(found)


@dataclass
class Search:
    """One search of one host."""

    needles: Needles
    since_ns: int
    skip: frozenset[str]
    findings: list[dict[str, str]] = field(default_factory=list)
    looked: Counter[str] = field(default_factory=Counter)
    unseen: list[dict[str, str]] = field(default_factory=list)
    live_mounts: set[str] = field(default_factory=set)
    live_processes: list[str] = field(default_factory=list)
    _walked: set[tuple[str, str]] = field(default_factory=set)

    def run(self) -> dict[str, Any]:
        """Look everywhere and return the answer."""
        for pid in _namespaces("mnt"):
            self._mounts_of(pid)
        for pid in _namespaces("ipc"):
            self._system_v_of(pid)
        for pid in _pids():
            self._process(pid)
        self._swap()
        return self._answer()

    def folders(self, folders: Sequence[str]) -> dict[str, Any]:
        """Look into these folders and nowhere else, and return the answer."""
        for folder in folders:
            self._walk(folder, "", folder, set())
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        return {
            "findings": self.findings,
            "looked": dict(self.looked),
            "unseen": self.unseen,
            "live": {"mounts": sorted(self.live_mounts), "processes": self.live_processes},
        }

    # Files

    def _mounts_of(self, pid: int) -> None:
        """Walk each mount of a process's namespace that was not walked yet."""
        try:
            lines = Path(f"/proc/{pid}/mountinfo").read_text(errors="replace").splitlines()
        except OSError:
            return
        mounts = [_mount(line) for line in lines]
        points = {mount[2] for mount in mounts}
        for device, inner, point, kind in mounts:
            if any(name in kind for name in OURS) and kind.startswith("fuse"):
                self.live_mounts.add(f"{kind} at {point} of process {pid}")
                continue
            if kind in PSEUDO or self._is_known(device, inner) or self._is_skipped(point):
                continue
            self._walked.add((device, inner))
            root = f"/proc/{pid}/root"
            place = f"{kind} {point}" + ("" if pid == os.getpid() else f" of process {pid}")
            if kind.startswith("fuse"):
                self.unseen.append({"place": place, "reason": f"a {kind} file system"})
                continue
            self._walk(place, root, point, points - {point})

    def _is_known(self, device: str, inner: str) -> bool:
        """Tell whether a part of a file system was walked, by itself or with what holds it."""
        return any(
            device == known and (inner == top or inner.startswith(f"{top.rstrip('/')}/"))
            for known, top in self._walked
        )

    def _is_skipped(self, path: str) -> bool:
        return any(path == one or path.startswith(f"{one}/") for one in self.skip)

    def _walk(self, place: str, root: str, point: str, points: set[str]) -> None:
        stack = [point]
        while stack:
            folder = stack.pop()
            try:
                with os.scandir(f"{root}{folder}") as entries:
                    for entry in entries:
                        path = f"{folder.rstrip('/')}/{entry.name}"
                        if path in points or path in self.skip:
                            continue
                        self._entry(place, path, entry, stack)
            except NotADirectoryError:
                # A bind of one file.
                self._file(place, folder, f"{root}{folder}")
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    self.unseen.append({"place": folder, "reason": str(error.strerror)})

    def _entry(self, place: str, path: str, entry: os.DirEntry[str], stack: list[str]) -> None:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            return
        if self.needles.of(os.fsencode(entry.name)):
            self._found(place, path, {"name"})
        if stat.S_ISDIR(status.st_mode):
            stack.append(path)
        elif stat.S_ISREG(status.st_mode) and status.st_ctime_ns >= self.since_ns:
            self._file(place, path, entry.path)

    def _file(self, place: str, path: str, real: str) -> None:
        self.looked[place] += 1
        try:
            with open(real, "rb", buffering=0) as stream:  # noqa: PTH123 - a plain descriptor, unbuffered
                self._found(place, path, self.needles.inside(stream))
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self.unseen.append({"place": path, "reason": str(error.strerror)})

    def _found(self, place: str, path: str, encodings: set[str]) -> None:
        self.findings += [
            {"place": place, "path": path, "encoding": one} for one in sorted(encodings)
        ]

    # Processes

    def _process(self, pid: int) -> None:
        folder = f"/proc/{pid}"
        with contextlib.suppress(OSError):
            command = Path(folder, "cmdline").read_bytes()
            for name, data in (
                ("command line", command),
                ("environment", Path(folder, "environ").read_bytes()),
            ):
                self.looked[name] += 1
                self._found(f"{name} of process {pid}", folder, self.needles.of(data))
            if b"kakehashi.session." in command or b"kakehashi.link." in command:
                words = command.replace(b"\0", b" ").decode(errors="replace").strip()
                self.live_processes.append(f"{pid} {words[:120]}")
        with contextlib.suppress(OSError):
            for name in os.listdir(f"{folder}/fd"):  # noqa: PTH208 - names, not paths
                self._open_file(folder, name)

    def _open_file(self, folder: str, name: str) -> None:
        path = f"{folder}/fd/{name}"
        with contextlib.suppress(OSError):
            target = os.readlink(path)  # noqa: PTH115 - a magic link, whose text is no path
            if not target.endswith("(deleted)") and not target.startswith("/memfd:"):
                return
            if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - as above
                self._file("deleted, but open", f"{target} of {folder}", path)

    # Memory

    def _system_v_of(self, pid: int) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                if pid != os.getpid():
                    namespace = os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY)
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(namespace, CLONE_NEWIPC):
                        raise OSError(ctypes.get_errno(), "setns")
                os.write(writing, json.dumps(self._segments()).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            text = stream.read()
        _, status = os.waitpid(child, 0)
        place = "System V memory" + ("" if pid == os.getpid() else f" of process {pid}")
        if status or not text:
            self.unseen.append({"place": place, "reason": "its namespace cannot be entered"})
            return
        segments = json.loads(text)
        self.looked["System V memory"] += len(segments)
        for number, found in segments.items():
            self._found(place, f"segment {number}", set(found))

    def _segments(self) -> dict[str, list[str]]:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.shmat.restype = ctypes.c_void_p
        found: dict[str, list[str]] = {}
        for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
            number, size = int(line.split()[1]), int(line.split()[3])
            address = libc.shmat(number, None, SHM_RDONLY)
            if address in {None, ctypes.c_void_p(-1).value}:
                continue
            found[str(number)] = sorted(self.needles.of(ctypes.string_at(address, size)))
            libc.shmdt(ctypes.c_void_p(address))
        return found

    def _swap(self) -> None:
        for line in Path("/proc/swaps").read_text().splitlines()[1:]:
            area = line.split()[0]
            try:
                with open(area, "rb", buffering=0) as stream:  # noqa: PTH123 - as above
                    self.looked["swap"] += 1
                    self._found("swap", area, self.needles.inside(stream))
            except OSError as error:
                self.unseen.append({"place": f"swap {area}", "reason": str(error.strerror)})


def _mount(line: str) -> tuple[str, str, str, str]:
    """Return device, root inside of it, mount point and type."""
    place, _, kind = line.partition(" - ")
    fields = place.split()
    return fields[2], _plain(fields[3]), _plain(fields[4]), kind.split()[0]


def _plain(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - names, not paths
        if name.isdigit() and int(name) != os.getpid():
            yield int(name)


def _namespaces(kind: str) -> list[int]:
    """Return one process of each namespace of a kind; this one first, for its own."""
    first: dict[int, int] = {}
    for pid in [os.getpid(), *_pids()]:
        with contextlib.suppress(OSError):
            first.setdefault(Path(f"/proc/{pid}/ns/{kind}").stat().st_ino, pid)
    return list(first.values())


def marker() -> int:
    """Return the time by this host's own clock, as its file systems write it."""
    with tempfile.NamedTemporaryFile() as file:
        return os.fstat(file.fileno()).st_ctime_ns


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request."""
    if request.get("marker"):
        return {"since_ns": marker()}
    mask = bytes.fromhex(request["mask"])
    needles = {name: masked(bytes.fromhex(text), mask) for name, text in request["needles"].items()}
    search = Search(Needles(needles), int(request["since_ns"]), frozenset(request["skip"]))
    return search.run()


def main() -> int:
    """Read the request, search, print the answer."""
    json.dump(answer(json.loads(sys.stdin.read())), sys.stdout)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
