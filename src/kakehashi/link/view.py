"""The read-only view: the granted files at a path, for programs that know nothing of Kakehashi.

Run as ``python -m kakehashi.link.view``, a process of its own that the session wrapper starts
with two descriptors: ``/dev/fuse``, already mounted, and a socket on which it asks for channels
to the store. It is a face of the verified reader: a block that cannot be verified is EIO, and a
store out of reach is waiting, never a wrong byte or a short file.

Words on the channel socket (``SOCK_SEQPACKET``): ``b"c"`` asks for a channel, the answer is a
message with one descriptor, or ``b"n"`` if there are enough, or an empty one if the link is
closed; ``b"r"`` says once that the view is ready; ``b"e"`` and a text says why it cannot be.
When the socket closes, the view ends.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import os
import resource
import select
import signal
import socket
import stat
import sys
import threading
from typing import TYPE_CHECKING, Any, Final, NoReturn

from kakehashi.errors import KakehashiError, LinkClosedError, LinkError
from kakehashi.link.reader import File, Reader
from kakehashi.link.recorder import Recorder
from kakehashi.link.tally import VIEW_NAME, Tally

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_READ: Final = 1 << 20
"""Largest read in bytes; the mount's own option ``max_read`` must say the same."""

MANIFEST_PATH: Final = "/manifest.json"
TRAFFIC_PATH: Final = f"/{VIEW_NAME}"

_FUSE_THREADS = 64
_IDLE_THREADS = 8
_CACHE_S = 24 * 3600.0
# 2000-01-01: the files never change, and some archivers refuse times before 1980.
_MTIME_NS = 946_684_800 * 10**9
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_MAX_MESSAGE = 4000


class ChannelSocket:
    """The socket to the session wrapper, safe to use from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._lock = threading.Lock()

    def connect(self) -> socket.socket:
        """Ask for a channel to the store.

        Raises
        ------
        LinkClosedError
            The wrapper refuses, or is gone.
        LinkError
            The wrapper gives no further channel now, or its answer is not of the agreed form.
        """
        try:
            with self._lock:
                self._socket.sendall(b"c")
                data, descriptors, _, _ = socket.recv_fds(self._socket, 64, 4)
        except OSError as error:
            raise LinkClosedError(f"the session wrapper is gone: {error}") from error
        if len(descriptors) == 1:
            return socket.socket(fileno=descriptors[0])
        for descriptor in descriptors:
            os.close(descriptor)
        if data == b"n" and not descriptors:
            raise LinkError("the session wrapper gives no further channel to the store now")
        if descriptors or data:
            raise LinkError("the session wrapper's answer is not one channel; the link is broken")
        raise LinkClosedError("the link to the store is closed: the session is over or cut off")

    def say(self, message: bytes) -> None:
        """Send one message to the wrapper."""
        self._socket.sendall(message)

    def wait_for_end(self) -> None:
        """Return when the other side has closed the socket."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        poll.poll()


def _interrupted() -> bool:
    """Say whether the process that this thread reads for was interrupted."""
    import mfusepy  # noqa: PLC0415 - loads libfuse, which a node may lack: say so, don't crash

    return bool(mfusepy._libfuse.fuse_interrupted())


class View:
    """The file system's operations, as mfusepy calls them: by position.

    Parameters
    ----------
    reader : Reader
        Where bytes come from.
    uid, gid : int
        Owner that the files are shown with; nobody else may read them.
    channel : ChannelSocket
        Is told once when the kernel and the view have agreed.
    """

    use_ns = True

    def __init__(self, reader: Reader, uid: int, gid: int, channel: ChannelSocket) -> None:
        self._reader = reader
        self._recorder = Recorder(Tally())
        self._recorder.watch(reader.pulse)
        self._channel = channel
        self._owner = {"st_uid": uid, "st_gid": gid}
        self._owner |= dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), _MTIME_NS)
        self._manifest = reader.manifest.raw
        self._names = [path.removeprefix("series/") for path in reader.manifest.files]
        self._files: dict[int, File | Tally | bytes] = {}
        self._handles = itertools.count(1)

    def init_with_config(self, conn: Any, config: Any) -> None:
        """Agree on sizes and caching; everything here is constant, so it may be kept long."""
        conn.max_read = MAX_READ
        conn.max_readahead = MAX_READ
        conn.max_background = _FUSE_THREADS
        conn.congestion_threshold = _FUSE_THREADS * 3 // 4
        config.kernel_cache = 1
        config.entry_timeout = config.attr_timeout = config.negative_timeout = _CACHE_S
        self._channel.say(b"r")

    def getattr(self, path: str, _fi: Any = None) -> dict[str, Any]:
        """Return what ``stat`` shows."""
        if path in ("/", "/series"):
            links = 3 if path == "/" else 2
            return {"st_mode": stat.S_IFDIR | 0o500, "st_nlink": links} | self._owner
        size = self._size(path)
        return {
            "st_mode": stat.S_IFREG | 0o400,
            "st_nlink": 1,
            "st_size": size,
            "st_blocks": -(-size // 512),
        } | self._owner

    def readdir(self, path: str, _fh: int) -> list[tuple[str, int, int]]:
        """Return the names in a folder, each with its type."""
        folders, files = [".", ".."], []
        if path == "/":
            folders.append("series")
            files = [MANIFEST_PATH.removeprefix("/")]
        elif path == "/series":
            files = self._names
        else:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return [(name, stat.S_IFDIR, 0) for name in folders] + [
            (name, stat.S_IFREG, 0) for name in files
        ]

    def open(self, path: str, fi: Any) -> int:
        """Open a file for reading; its list of block hashes is checked here."""
        if fi.flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND):
            self._refuse()
        self._size(path)
        file: File | Tally | bytes
        if path == MANIFEST_PATH:
            file = self._manifest
        elif path == TRAFFIC_PATH:
            self._recorder.note()
            file = self._recorder.tally
            # It changes all the time; the kernel is to keep nothing of it.
            fi.direct_io = 1
        else:
            try:
                file = self._reader.open(path.removeprefix("/"), interrupted=_interrupted)
            except LinkError as error:
                raise _input_output_error() from error
        fi.fh = next(self._handles)
        self._files[fi.fh] = file
        return 0

    def read(self, _path: str, size: int, offset: int, fi: Any) -> bytes:
        """Return verified bytes, or fail with EIO."""
        file = self._files[fi.fh]
        if isinstance(file, bytes):
            return file[offset : offset + size]
        if isinstance(file, Tally):
            return file.raw(offset, size)
        try:
            return file.read(offset, size, interrupted=_interrupted)
        except LinkError as error:
            raise _input_output_error() from error

    def release(self, _path: str, fi: Any) -> int:
        """Forget an open file."""
        self._files.pop(fi.fh, None)
        return 0

    def statfs(self, _path: str) -> dict[str, int]:
        """Return the sum of all files as the size; nothing is free."""
        entries = self._reader.manifest.files.values()
        return {
            "f_bsize": 4096,
            "f_frsize": 4096,
            "f_blocks": sum(-(-entry.size // 4096) for entry in entries),
            "f_files": len(entries),
            "f_namemax": 255,
        }

    def _size(self, path: str) -> int:
        if path == MANIFEST_PATH:
            return len(self._manifest)
        if path == TRAFFIC_PATH:
            return 0
        entry = self._reader.manifest.files.get(path.removeprefix("/"))
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return entry.size

    @staticmethod
    def _refuse(*_: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    chmod = chown = create = link = mkdir = mknod = removexattr = rename = rmdir = _refuse
    setxattr = symlink = truncate = unlink = utimens = write = fallocate = _refuse


def _input_output_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def _harden() -> None:
    """Close this process to others of the same account, and tie it to its parent's life."""
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_DUMPABLE, 0), (_PR_SET_PDEATHSIG, signal.SIGKILL)):
        if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"prctl({option}) failed: {os.strerror(code)}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The wrapper ends the view by closing the socket; until then a stray signal must not.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


def _end_with(channel: ChannelSocket) -> None:
    channel.wait_for_end()
    # With the process the last descriptor of /dev/fuse goes, and with it whoever waits in it.
    os._exit(0)


def _serve(options: argparse.Namespace, channel: ChannelSocket) -> None:
    try:
        import mfusepy  # noqa: PLC0415 - loads libfuse, which a node may lack: say so, don't crash
    except (ImportError, OSError, AttributeError) as error:
        raise LinkError(
            f"this node cannot serve the view: {error}; install mfusepy and libfuse3"
        ) from error
    if mfusepy.fuse_version_major != 3:
        raise LinkError("this node has libfuse 2 only; the view needs libfuse3.so.3")
    reader = Reader.connect(
        channel.connect, manifest_path=options.manifest_path, sha256=options.manifest_sha256
    )
    # libfuse has this option since 3.12; older ones refuse it, and have no such limit.
    limits = {"max_idle_threads": _IDLE_THREADS}
    if mfusepy.fuse_version_minor >= 12:
        limits["max_threads"] = _FUSE_THREADS
    with reader:
        mfusepy.FUSE(
            View(reader, options.uid, options.gid, channel),
            f"/dev/fd/{options.fuse_fd}",
            foreground=True,
            raw_fi=True,
            fsname="kakehashi",
            max_read=MAX_READ,
            **limits,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kakehashi.link.view", description=__doc__)
    parser.add_argument("--fuse-fd", type=int, required=True, help="/dev/fuse, mounted")
    parser.add_argument("--channel-fd", type=int, required=True, help="socket for channels")
    parser.add_argument("--manifest-sha256", required=True, help="hash that the grant names")
    parser.add_argument("--manifest-path", default=MANIFEST_PATH, help="path at the store")
    parser.add_argument("--uid", type=int, required=True, help="owner of what is shown")
    parser.add_argument("--gid", type=int, required=True, help="group of what is shown")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the view until the channel socket closes or the view is unmounted.

    Returns
    -------
    int
        Exit status: 0, or 1 if the view could not begin (the reason went to the socket).
    """
    _harden()
    options = _parser().parse_args(arguments)
    channel = ChannelSocket(options.channel_fd)
    threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
    try:
        _serve(options, channel)
    except (KakehashiError, RuntimeError, OSError) as error:
        channel.say(b"e" + str(error).encode()[:_MAX_MESSAGE])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
