"""What root sees of a session on its node after the job, and takes away.

Each item says what was found, by root of the site; ``left`` is what could not be removed.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kakehashi.session import check
from kakehashi.session.plan import FOLDER_PREFIX, JOB_FILE, MEMORY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

KILL_PATIENCE_S = 3.0
GPU_TIMEOUT_S = 3.0
LISTED = 12
MNT_DETACH = 2
# Where a session's own file lies, seen through the root of a process: the payload's world, and
# that of the warden.
SESSION_FILES = ("run/kakehashi/session.json", "dev/shm/run/session.json")
# Of a session without namespaces: in its folder, the job that it belongs to.
JOB_LIMIT = 64
PROGRAMS = (b"kakehashi.session.", b"kakehashi.link.view")
SYSV = {"shm": "-m", "sem": "-s", "msg": "-q"}


@dataclass(frozen=True)
class Ended:
    """A job that has ended on this node.

    Attributes
    ----------
    job : str
        Its id.
    uid : int
        Of the account that it ran as.
    alone : bool
        Whether that account has no other job here, so that whatever is its own may go.
    """

    job: str
    uid: int
    alone: bool


@dataclass(frozen=True)
class Process:
    """A process as root sees it."""

    pid: int
    parent: int
    uids: frozenset[int]
    job: str | None
    command: bytes
    mounts: int
    in_session: bool
    confined: bool

    @property
    def name(self) -> str:
        """Return words for a report."""
        command = self.command.replace(b"\0", b" ").decode(errors="replace").strip()
        return f"{command[:60] or '?'} ({self.pid})"


def look(ended: Ended, tidy: Sequence[str]) -> list[dict[str, str]]:
    """Scan for what an ended job has left on this node, and take it away.

    Parameters
    ----------
    ended : Ended
    tidy : sequence of str
        Folders of this node's own; entries of the account go, where no job of it runs here.

    Returns
    -------
    list of dict
        The items of the report.
    """
    # Processes first: with them go their namespaces, mounts and memory folders.
    return [
        _end_processes(ended),
        _unmount(ended),
        _session_folders(ended),
        *_files(ended, tidy),
        _system_v(ended),
        _core_dumps(ended),
        _swap(),
        _gpu_memory(),
    ]


def _item(name: str, result: str, detail: str) -> dict[str, str]:
    return {"item": name, "result": result, "detail": detail[:1900]}


def _names(names: Iterable[str]) -> str:
    known = list(names)
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return ", ".join(known[:LISTED]) + more


# Processes


def processes() -> dict[int, Process]:
    """Return all processes of this node."""
    found = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names, not paths
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError):
                found[int(entry)] = _process(int(entry))
    return found


def _process(pid: int) -> Process:
    folder = Path("/proc", str(pid))
    status = dict(
        line.split(":", 1)
        for line in (folder / "status").read_text(errors="replace").splitlines()
        if ":" in line
    )
    environment = (folder / "environ").read_bytes().split(b"\0")
    job = next((one[13:] for one in environment if one.startswith(b"SLURM_JOB_ID=")), None)
    return Process(
        pid=pid,
        parent=int(status["PPid"]),
        uids=frozenset(int(one) for one in status["Uid"].split()),
        job=None if job is None else job.decode(errors="replace"),
        command=(folder / "cmdline").read_bytes(),
        mounts=(folder / "ns/mnt").stat().st_ino,
        in_session=any((folder / "root" / name).exists() for name in SESSION_FILES),
        confined=status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2",
    )


def remains(ended: Ended, table: dict[int, Process]) -> list[Process]:
    """Return the processes that are an ended job's, or sit in its session's namespaces.

    A process of the same account that was started outside and entered a session's namespaces
    keeps them alive; it is told by the session's own file, seen through its root. One that got
    away from a session without namespaces is told by the filter that it cannot take off. What
    belongs to another job of the account, and the namespaces of that job's session, is left alone.
    """
    mine = {pid: process for pid, process in table.items() if ended.uid in process.uids}
    others = {
        pid
        for pid, process in mine.items()
        if any(one.job not in {None, ended.job} for one in _line(process, table))
    }
    spared = {mine[pid].mounts for pid in others if mine[pid].in_session}
    return [
        process
        for pid, process in mine.items()
        if pid not in others
        and (
            any(one.job == ended.job for one in _line(process, table))
            or (process.in_session and process.mounts not in spared)
            or (process.confined and ended.alone)
            or any(program in process.command for program in PROGRAMS)
        )
    ]


def _line(process: Process, table: dict[int, Process]) -> Iterator[Process]:
    """Give a process and those that it descends from."""
    seen = set()
    current: Process | None = process
    while current is not None and current.pid not in seen:
        yield current
        seen.add(current.pid)
        current = table.get(current.parent)


def _end_processes(ended: Ended) -> dict[str, str]:
    killed: dict[int, str] = {}
    deadline = time.monotonic() + KILL_PATIENCE_S
    while left := remains(ended, processes()):
        for process in left:
            killed[process.pid] = process.name
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return _item(
                "processes", "left", f"cannot be killed: {_names(one.name for one in left)}"
            )
        time.sleep(0.02)
    if killed:
        return _item("processes", "gone", f"found and killed: {_names(killed.values())}")
    return _item(
        "processes", "gone", "none of the job or in a session's namespaces on the whole node"
    )


# Mounts


def _unmount(ended: Ended) -> dict[str, str]:
    own = _fuse_mounts(ended.uid)
    if not ended.alone:
        others = f"; other jobs of the account have {_names(own)}" if own else ""
        return _item("mounts", "seen" if own else "gone", f"none of a session's{others}")
    libc = ctypes.CDLL(None, use_errno=True)
    for place in own:
        libc.umount2(place.encode(), MNT_DETACH)
    left = _fuse_mounts(ended.uid)
    if left:
        return _item("mounts", "left", f"cannot be unmounted: {_names(left)}")
    found = f"found and unmounted: {_names(own)}" if own else "no mount of the account on the node"
    return _item("mounts", "gone", found)


def _fuse_mounts(uid: int) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    found = []
    for line in lines:
        place, _, kind = line.partition(" - ")
        if kind.startswith("fuse") and f"user_id={uid}" in kind.replace(" ", ",").split(","):
            found.append(place.split()[4].replace("\\040", " "))
    return found


# Files


def _session_folders(ended: Ended) -> dict[str, str]:
    """Take away the folders of sessions without namespaces, by the job that each names."""
    name = "session folders"
    try:
        memory = os.open(MEMORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        return _item(name, "unknown", f"{MEMORY}: {error.strerror}")
    try:
        found = [one for one in _folders_of(memory, ended.uid) if _is_of(memory, one, ended)]
        for one in found:
            with contextlib.suppress(OSError):
                shutil.rmtree(one, dir_fd=memory)
        left = set(found) & set(_folders_of(memory, ended.uid))
        others = [one for one in _folders_of(memory, ended.uid) if one not in left]
    finally:
        os.close(memory)
    if left:
        return _item(name, "left", f"cannot be removed: {_names(sorted(left))}")
    if others:
        return _item(name, "seen", f"of other jobs of the account: {_names(others)}")
    return _item(name, "gone", f"found and removed: {_names(found)}" if found else "none")


def _folders_of(memory: int, uid: int) -> list[str]:
    own = _owned(memory, uid)
    return [one for one, is_folder in own.items() if is_folder and one.startswith(FOLDER_PREFIX)]


def _is_of(memory: int, folder: str, ended: Ended) -> bool:
    if ended.alone:
        return True
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with os.fdopen(os.open(f"{folder}/{JOB_FILE}", flags, dir_fd=memory), "rb") as file:
            return file.read(JOB_LIMIT) == ended.job.encode()
    except OSError:
        return False


def _files(ended: Ended, tidy: Sequence[str]) -> list[dict[str, str]]:
    items = []
    for folder in tidy:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            items.append(_item(f"files in {folder}", "unknown", str(error.strerror)))
            continue
        try:
            items.append(_tidy(folder, descriptor, ended))
        finally:
            os.close(descriptor)
    return items


def _owned(folder: int, uid: int) -> dict[str, bool]:
    """Return the entries of an account, and whether each is a folder."""
    found = {}
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if status.st_uid == uid:
                found[name] = (status.st_mode & 0o170000) == 0o040000
    return found


def _tidy(folder: str, descriptor: int, ended: Ended) -> dict[str, str]:
    name = f"files in {folder}"
    own = _owned(descriptor, ended.uid)
    if not own:
        return _item(name, "gone", "none of the account")
    if not ended.alone:
        return _item(name, "seen", f"other jobs of the account may own them: {_names(own)}")
    for entry, is_folder in own.items():
        # By descriptor, and never through a link: the account may swap names meanwhile.
        with contextlib.suppress(OSError):
            if is_folder:
                shutil.rmtree(entry, dir_fd=descriptor)
            else:
                os.unlink(entry, dir_fd=descriptor)
    left = _owned(descriptor, ended.uid)
    if left:
        return _item(name, "left", f"cannot be removed: {_names(left)}")
    return _item(name, "gone", f"found and removed: {_names(own)}")


# Memory


def _system_v(ended: Ended) -> dict[str, str]:
    name = "System V memory"
    own = _system_v_of(ended.uid)
    if own and not ended.alone:
        return _item(name, "seen", f"other jobs of the account may own them: {_names(own)}")
    for entry in own:
        kind, _, number = entry.partition(" ")
        subprocess.run(["/usr/bin/ipcrm", SYSV[kind], number], capture_output=True, check=False)
    left = _system_v_of(ended.uid)
    if left:
        return _item(name, "left", f"cannot be removed: {_names(left)}")
    return _item(name, "gone", f"found and removed: {_names(own)}" if own else "none")


def _system_v_of(uid: int) -> list[str]:
    found = []
    for kind in SYSV:
        with contextlib.suppress(OSError):
            lines = Path("/proc/sysvipc", kind).read_text().splitlines()
            head = lines[0].split()
            number, owner = 1, head.index("uid")
            found += [
                f"{kind} {line.split()[number]}"
                for line in lines[1:]
                if line.split()[owner] == str(uid)
            ]
    return found


def _core_dumps(ended: Ended) -> dict[str, str]:
    name, pattern = "core dumps", check.core_pattern()
    if pattern.startswith("|"):
        return _item(
            name, "unknown", f"taken by a program, {pattern[:80]!r}; sessions make none of content"
        )
    folder = Path(pattern).parent
    if not folder.is_absolute():
        return _item(name, "gone", f"the pattern {pattern!r} leads into a process's own folder")
    own = [one.name for one in folder.iterdir() if one.lstat().st_uid == ended.uid]
    return _item(
        name,
        "left" if own else "gone",
        f"in {folder}: {_names(own)}" if own else f"none of the account in {folder}",
    )


def _swap() -> dict[str, str]:
    plain, areas = check.swap_areas()
    if plain:
        return _item("swap", "unknown", f"not encrypted: {_names(plain)}")
    return _item("swap", "gone", f"encrypted or in memory: {_names(areas)}" if areas else "none")


def _gpu_memory() -> dict[str, str]:
    name = "GPU memory"
    program = shutil.which("nvidia-smi", path="/usr/bin:/bin:/usr/local/bin")
    if program is None:
        return _item(name, "unknown", "not observable: the node has no nvidia-smi")
    query = ["--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=GPU_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return _item(name, "unknown", "not observable: nvidia-smi gives no answer")
    holders = done.stdout.strip().splitlines()
    if done.returncode:
        return _item(name, "unknown", "not observable: nvidia-smi failed")
    if holders:
        return _item(name, "seen", f"held by other processes: {_names(holders)}")
    return _item(name, "unknown", "no process holds any; what is in it is not observable")
