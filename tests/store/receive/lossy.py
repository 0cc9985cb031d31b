"""A file system that loses what was not fsynced: data with the file's, names with the folder's.

It keeps two states: what processes see, and what is on the disk. A power cut makes the second
the first. What was not synced may by chance be on the disk all the same, whole folders' names and
parts of files' data, in no order: a file system may write early, but owes nothing.

Extended attributes set on its root steer it (see :class:`Disk`).
"""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    mode: int = 0o600


@dataclass
class Folder:
    names: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    mode: int = 0o700


def _missing() -> OSError:
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT))


class Lossy:
    """Operations as mfusepy calls them."""

    use_ns = True

    def __init__(self) -> None:
        self._root = Folder()
        self._open: dict[int, File | Folder] = {}
        self._last = 0
        self._lies = False
        self._victim, self._left, self._chance = 0, 0, random.Random(0)

    # --- steering ---

    def setxattr(self, _path: str, name: str, value: bytes, _options: int, _position: int = 0):
        values = [int(text) for text in value.split()]
        if name == "user.cut":
            self._cut(self._root, random.Random(values[0]))
        elif name == "user.lie":
            self._lies = bool(values[0])
        elif name == "user.kill":
            self._victim, self._left = values[:2]
            self._chance = random.Random(values[2])
        return 0

    def _cut(self, folder: Folder, chance: random.Random) -> None:
        if chance.random() < 0.3:
            folder.synced = dict(folder.names)
        folder.names = dict(folder.synced)
        for node in folder.names.values():
            if isinstance(node, Folder):
                self._cut(node, chance)
            elif bytes(node.data) != node.synced:
                luck = chance.random()
                if luck < 0.2:
                    node.synced = bytes(node.data)
                elif luck < 0.4:
                    # The beginning was synced, and stays.
                    least = min(len(node.synced), len(node.data))
                    node.synced = bytes(node.data[: chance.randint(least, len(node.data))])
                node.data = bytearray(node.synced)

    def _strike(self) -> None:
        """Count an operation that changes something, and kill before or after it."""
        if self._left:
            self._left -= 1
            if self._left == 0:
                os.kill(self._victim, signal.SIGKILL)
                if self._chance.random() < 0.5:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))

    # --- the tree ---

    def _node(self, path: str) -> File | Folder:
        node: File | Folder = self._root
        for name in path.split("/")[1:]:
            if name:
                if not isinstance(node, Folder) or name not in node.names:
                    raise _missing()
                node = node.names[name]
        return node

    def _place(self, path: str) -> tuple[Folder, str]:
        parent, name = os.path.split(path)
        folder = self._node(parent)
        assert isinstance(folder, Folder)
        return folder, name

    def _handle(self, node: File | Folder) -> int:
        self._last += 1
        self._open[self._last] = node
        return self._last

    def getattr(self, path: str, _fh: int | None = None):
        node = self._node(path)
        common = {"st_uid": os.getuid(), "st_gid": os.getgid()}
        common |= dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), 10**18)
        if isinstance(node, Folder):
            return {"st_mode": stat.S_IFDIR | node.mode, "st_nlink": 2, **common}
        size = len(node.data)
        return {"st_mode": stat.S_IFREG | node.mode, "st_nlink": 1, "st_size": size, **common}

    def chmod(self, path: str, mode: int) -> int:
        self._node(path).mode = stat.S_IMODE(mode)
        return 0

    def readdir(self, path: str, _fh: int):
        node = self._node(path)
        assert isinstance(node, Folder)
        return [".", "..", *node.names]

    def mkdir(self, path: str, mode: int) -> int:
        self._strike()
        folder, name = self._place(path)
        folder.names[name] = Folder(mode=stat.S_IMODE(mode))
        return 0

    def create(self, path: str, mode: int) -> int:
        self._strike()
        folder, name = self._place(path)
        node = folder.names[name] = File(mode=stat.S_IMODE(mode))
        return self._handle(node)

    def rename(self, old: str, new: str) -> int:
        self._strike()
        folder, name = self._place(old)
        target, other = self._place(new)
        if name not in folder.names:
            raise _missing()
        target.names[other] = folder.names.pop(name)
        return 0

    def unlink(self, path: str) -> int:
        self._strike()
        folder, name = self._place(path)
        if name not in folder.names:
            raise _missing()
        del folder.names[name]
        return 0

    # --- files ---

    def open(self, path: str, flags: int) -> int:
        node = self._node(path)
        if flags & os.O_TRUNC and isinstance(node, File):
            node.data = bytearray()
        return self._handle(node)

    def release(self, _path: str, fh: int) -> int:
        self._open.pop(fh, None)
        return 0

    def _file(self, fh: int) -> File:
        node = self._open[fh]
        assert isinstance(node, File)
        return node

    def read(self, _path: str, size: int, offset: int, fh: int) -> bytes:
        return bytes(self._file(fh).data[offset : offset + size])

    def write(self, _path: str, data: bytes, offset: int, fh: int) -> int:
        self._strike()
        held = self._file(fh).data
        if len(held) < offset:
            held += bytes(offset - len(held))
        held[offset : offset + len(data)] = data
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        self._strike()
        node = self._node(path)
        assert isinstance(node, File)
        del node.data[length:]
        node.data += bytes(length - len(node.data))
        return 0

    def fsync(self, _path: str, _data_only: int, fh: int) -> int:
        self._strike()
        if not self._lies:
            node = self._file(fh)
            node.synced = bytes(node.data)
        return 0

    def fsyncdir(self, path: str, _data_only: int, _fh: int) -> int:
        self._strike()
        if not self._lies:
            node = self._node(path)
            assert isinstance(node, Folder)
            node.synced = dict(node.names)
        return 0

    def statfs(self, _path: str):
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 1 << 20, "f_bavail": 1 << 20}


@dataclass(frozen=True)
class Disk:
    """A mounted lossy file system."""

    path: Path

    def cut_power(self, seed: int) -> None:
        """Lose what was not synced; chance decides what is there all the same."""
        os.setxattr(self.path, "user.cut", b"%d" % seed)

    def lie(self, lies: bool) -> None:
        """Do nothing on fsync, and say that it was done."""
        os.setxattr(self.path, "user.lie", b"%d" % lies)

    def kill_at(self, pid: int, operation: int, seed: int = 0) -> None:
        """Kill a process at the n-th operation from now; 0 for none."""
        os.setxattr(self.path, "user.kill", b"%d %d %d" % (pid, operation, seed))


@contextmanager
def mounted(path: Path) -> Iterator[Disk]:
    """Mount one, empty."""
    path.mkdir()
    process = subprocess.Popen([sys.executable, __file__, str(path)])
    try:
        while not path.is_mount():
            assert process.poll() is None, "the file system did not start"
        yield Disk(path)
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(path)], check=False)
        process.kill()
        process.wait()


if __name__ == "__main__":
    import mfusepy

    mfusepy.FUSE(
        Lossy(),
        sys.argv[1],
        foreground=True,
        nothreads=True,
        hard_remove=True,
        direct_io=True,
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
    )
