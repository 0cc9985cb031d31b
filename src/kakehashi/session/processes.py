"""The processes of this machine, as far as one of them needs to know."""

from __future__ import annotations

import os
from pathlib import Path


def descendants(root: int) -> dict[int, str]:
    """Return the processes that descend from one, with their names.

    Those of private pid namespaces count too: they have numbers in every namespace above.
    """
    parents: dict[int, tuple[int, str]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names, not paths
        if entry.isdigit():
            try:
                text = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            name = text[text.index("(") + 1 : text.rindex(")")]
            state, parent = text[text.rindex(")") + 2 :].split()[:2]
            if state not in "ZX":
                parents[int(entry)] = (int(parent), name)
    found: dict[int, str] = {}
    frontier = {root}
    while frontier:
        frontier = {
            pid for pid, (parent, _) in parents.items() if parent in frontier and pid not in found
        }
        found |= {pid: parents[pid][1] for pid in frontier}
    return found


def descends(pid: int, root: int) -> bool:
    """Tell whether a process is another, or comes from it."""
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        if pid == root:
            return True
        seen.add(pid)
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        pid = int(text[text.rindex(")") + 2 :].split()[1])
    return False
