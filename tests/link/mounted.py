"""A view mounted as the session wrapper does it, in a mount namespace of its own.

As a program (``python mounted.py MOUNTPOINT SOCKET_FD``) it enters a private mount namespace,
mounts FUSE there, hands the descriptor over and holds the namespace until its standard input
closes. The tests reach the mount through ``/proc/PID/root``.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

CLONE_NEWNS = 0x20000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 1 << 18


def hold(mountpoint: str, descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = (
        f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,max_read=1048576,"
        "default_permissions"
    )
    check(
        libc.mount(
            b"kakehashi",
            mountpoint.encode(),
            b"fuse.kakehashi",
            MS_NOSUID | MS_NODEV,
            options.encode(),
        )
    )
    with socket.socket(fileno=descriptor) as out:
        socket.send_fds(out, [b"f"], [fuse])
    os.close(fuse)
    sys.stdin.read()


class MountedView:
    """A view process, its mount and the broker that gives it channels."""

    def __init__(
        self,
        mountpoint: Path,
        connect: Callable[[], socket.socket | None],
        manifest_path: str,
        sha256: str,
        prefix: tuple[str, ...],
    ) -> None:
        self._connect = connect
        self.channels = 0
        self.words: list[bytes] = []
        self._told = threading.Event()
        mine, theirs = socket.socketpair()
        with mine, theirs:
            self._holder = subprocess.Popen(
                [sys.executable, __file__, str(mountpoint), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,
            )
            theirs.close()
            _, descriptors, _, _ = socket.recv_fds(mine, 1, 1)
        assert descriptors, "the mount failed, see the holder's traceback"
        self.root = Path(f"/proc/{self._holder.pid}/root{mountpoint}")
        self.control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [
                *prefix,
                *(sys.executable, "-I", "-m", "kakehashi.link.view"),
                *("--fuse-fd", str(descriptors[0]), "--channel-fd", str(far.fileno())),
                *("--manifest-sha256", sha256, "--manifest-path", manifest_path),
                *("--uid", "0", "--gid", "0"),
            ],
            pass_fds=[descriptors[0], far.fileno()],
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        )
        far.close()
        os.close(descriptors[0])
        self._thread = threading.Thread(target=self._broker, daemon=True)
        self._thread.start()

    @property
    def holder_pid(self) -> int:
        return self._holder.pid

    def ready(self) -> None:
        assert self._told.wait(30), "the view said nothing"
        assert self.words == [b"r"], self.words

    def failure(self) -> str:
        assert self._told.wait(30), "the view said nothing"
        assert self.words[0][:1] == b"e", self.words
        return self.words[0][1:].decode()

    def _broker(self) -> None:
        with contextlib.suppress(OSError):
            while word := self.control.recv(8192):
                if word != b"c":
                    self.words.append(word)
                    self._told.set()
                    continue
                self.channels += 1
                channel = self._connect()
                if channel is None:
                    self.control.sendmsg([b""])
                    continue
                with channel:
                    rights = array.array("i", [channel.fileno()])
                    self.control.sendmsg([b"c"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        self._told.set()

    def close_control(self) -> None:
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=10)
        self.control.close()

    def close(self) -> None:
        self.close_control()
        try:
            self.process.wait(timeout=10)
        finally:
            self.process.kill()
            self.process.wait(timeout=10)
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            self._holder.wait(timeout=10)


if __name__ == "__main__":
    hold(sys.argv[1], int(sys.argv[2]))
