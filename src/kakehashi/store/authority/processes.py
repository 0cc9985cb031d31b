"""What ``/proc`` says about processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Process:
    """A live process; pid and start time together name it for good.

    Attributes
    ----------
    pid, parent : int
    start_time : int
        Clock ticks since the machine started.
    name : str
        What it calls itself, at most 15 characters.
    """

    pid: int
    parent: int
    start_time: int
    name: str


def processes(proc: Path = Path("/proc")) -> dict[int, Process]:
    """Return the processes of this pid namespace, without those that are dead already."""
    found = {}
    for folder in proc.iterdir():
        if folder.name.isdigit() and (process := _read(folder)):
            found[process.pid] = process
    return found


def tree(root: int, table: Mapping[int, Process]) -> list[Process]:
    """Return a process and all its descendants, the deepest last."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    order = [table[root]] if root in table else []
    for process in order:
        order += children.get(process.pid, [])
    return order


def uptime() -> float:
    """Return the seconds since the machine started."""
    return float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])


def _read(folder: Path) -> Process | None:
    try:
        text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        # It ended between listing and reading.
        return None
    head, _, rest = text.rpartition(")")
    pid, _, name = head.partition(" (")
    fields = rest.split()
    if fields[0] in {"Z", "X"}:
        return None
    return Process(int(pid), int(fields[1]), int(fields[19]), name)
