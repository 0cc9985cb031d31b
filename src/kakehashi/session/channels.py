"""The programs that the keeper starts: ``ssh``, ``sshfs`` and the view.

All run in the node's own namespaces, so that they count as the node's processes and not as a
namespace's, whose owner could trace them. They are closed to other processes of the same user
from their first instruction: the kernel makes a process that runs an unreadable program file
not dumpable, and the preloaded library keeps it so.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kakehashi.errors import SessionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kakehashi.session.hubclient import Grant

# Numbers that the descriptors have inside the programs.
_FOLDER, _FUSE, _CHANNEL = 3, 4, 5
_FIRST_FREE = 64
# The first is the fastest by measurement.
CIPHERS = "aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com"
_ELF = b"\x7fELF"
SEALED_PROGRAMS = ("ssh", "sshfs")
PROGRAM_PATH = "/usr/bin:/bin:/usr/local/bin"


def find_program(name: str) -> Path | None:
    """Return where a program of the node lies, None if it is missing."""
    found = shutil.which(name, path=PROGRAM_PATH)
    return Path(found) if found else None


def is_native(program: Path) -> bool:
    """Tell whether a program is machine code, which runs without being readable."""
    with program.open("rb") as file:
        return file.read(len(_ELF)) == _ELF


def seal_programs(folder: int) -> None:
    """Copy ``ssh`` and ``sshfs`` into the private folder, executable but not readable.

    Parameters
    ----------
    folder : int
        Descriptor of the warden's private folder.

    Raises
    ------
    SessionError
        A program is missing.
    """
    for name in SEALED_PROGRAMS:
        source = find_program(name)
        if source is None:
            raise SessionError(f"{name} is not installed on this node")
        data = source.read_bytes()
        target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700, dir_fd=folder)
        with os.fdopen(target, "wb") as file:
            file.write(data)
        # Executable and unreadable is the very point.
        os.chmod(name, stat.S_IXUSR, dir_fd=folder)


def write_private(folder: int, name: str, text: str) -> None:
    """Write a file into a private folder, whole or not at all."""
    part = f"{name}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with os.fdopen(os.open(part, flags, 0o600, dir_fd=folder), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)


@dataclass(frozen=True)
class Programs:
    """Starts programs on behalf of one session.

    Call it from one thread that lives as long as the keeper: the kernel kills what a thread
    has started when that thread ends.

    Attributes
    ----------
    folder : int
        The private folder: sealed programs, ``agent``, ``id.pub``, ``cert``, ``known_hosts``.
    library : Path
        ``nodump.so``.
    complaints : int
        Where their standard error goes.
    """

    folder: int
    library: Path
    complaints: int

    def ssh(self, grant: Grant, account: str, address: str, stdio: int) -> int:
        """Start one SFTP channel to an account, and return the process id.

        Parameters
        ----------
        grant : Grant
        account : str
            One of the grant's accounts at the store.
        address : str
            One of the grant's addresses of the store.
        stdio : int
            A connected socket; it becomes the channel's standard input and output.
        """
        argv = [
            *self._ssh_command(grant),
            "-s",
            f"{account}@{address}",
            "sftp",
        ]
        return self._start(argv, stdio, {_FOLDER: self.folder})

    def sshfs(self, grant: Grant, fuse: int, *, view: bool) -> int:
        """Serve a FUSE mount by ``sshfs``, and return the process id.

        Parameters
        ----------
        grant : Grant
        fuse : int
            Descriptor of the mount.
        view : bool
            The read-only view (the fallback for nodes that cannot run ours) instead of the
            work folder.
        """
        account, folder = (grant.view_account, "/") if view else (grant.work_account, "/work")
        host = f"[{grant.address}]" if ":" in grant.address else grant.address
        options = [
            # A bare comma would end the option.
            "ssh_command=" + " ".join(self._ssh_command(grant)).replace(",", "\\,"),
            f"uid={os.getuid()}",
            f"gid={os.getgid()}",
            "reconnect",
            # What is saved through a channel is to be seen here soon, and in its full length.
            *(["ro"] if view else ["dcache_timeout=1", "attr_timeout=0"]),
        ]
        argv = [
            f"/proc/self/fd/{_FOLDER}/sshfs",
            f"{account}@{host}:{folder}",
            f"/dev/fd/{_FUSE}",
            "-f",
            *(part for option in options for part in ("-o", option)),
        ]
        return self._start(argv, None, {_FOLDER: self.folder, _FUSE: fuse})

    def view(self, grant: Grant, software: str, interpreter: str, fuse: int, channel: int) -> int:
        """Serve the read-only view from verified blocks, and return the process id.

        Parameters
        ----------
        grant : Grant
        software : str
            The site's ``node.software``.
        interpreter : str
            Python to use where that has none of its own.
        fuse, channel : int
            Descriptors of the mount, and of the socket on which it asks for channels.
        """
        own = Path(software, ".venv/bin/python")
        argv = [
            str(own) if own.exists() else interpreter,
            *("-I", "-m", "kakehashi.link.view"),
            *("--fuse-fd", str(_FUSE), "--channel-fd", str(_CHANNEL)),
            *("--manifest-sha256", grant.manifest["sha256"]),
            *("--uid", str(os.getuid()), "--gid", str(os.getgid())),
        ]
        return self._start(argv, None, {_FUSE: fuse, _CHANNEL: channel})

    def _ssh_command(self, grant: Grant) -> list[str]:
        options = {
            "BatchMode": "yes",
            "CertificateFile": "cert",
            "CheckHostIP": "no",
            "Ciphers": CIPHERS,
            "ClearAllForwardings": "yes",
            "Compression": "no",
            "ConnectTimeout": "15",
            "ControlMaster": "no",
            "ControlPath": "none",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "GlobalKnownHostsFile": "/dev/null",
            # At each of its addresses the store shows one certificate, which names the first.
            "HostKeyAlias": grant.address,
            "IdentitiesOnly": "yes",
            "IdentityAgent": "agent",
            "IdentityFile": "id.pub",
            "LogLevel": "ERROR",
            "PermitLocalCommand": "no",
            "PreferredAuthentications": "publickey",
            "ServerAliveCountMax": "6",
            "ServerAliveInterval": "20",
            "StrictHostKeyChecking": "yes",
            "UpdateHostKeys": "no",
            "UserKnownHostsFile": "known_hosts",
        }
        return [
            f"/proc/self/fd/{_FOLDER}/ssh",
            *("-F", "none", "-T", "-p", str(grant.port)),
            *(part for name, value in options.items() for part in ("-o", f"{name}={value}")),
        ]

    def _start(self, argv: Sequence[str], stdio: int | None, files: dict[int, int]) -> int:
        env = {
            "PATH": PROGRAM_PATH,
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LD_PRELOAD": str(self.library),
            "KAKEHASHI_KEEPER": str(os.getpid()),
        }
        if _FOLDER in files:
            env["KAKEHASHI_FOLDER"] = str(_FOLDER)
        nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        sources = {
            0: nothing if stdio is None else stdio,
            1: nothing if stdio is None else stdio,
            2: self.complaints,
            **files,
        }
        # Moved out of the way first: a source must not be overwritten before its turn.
        high = {
            target: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
            for target, source in sources.items()
        }
        try:
            return os.posix_spawn(
                argv[0],
                list(argv),
                env,
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in high.items()],
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGCHLD),
            )
        except OSError as error:
            raise SessionError(f"{argv[0]} cannot be started ({error.strerror})") from error
        finally:
            for fd in (nothing, *high.values()):
                os.close(fd)
