"""The end: what is looked at on the node before the report goes out.

Each item says what was seen, by this wrapper only; what cannot be looked at is ``unknown``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kakehashi.session import check
from kakehashi.session.processes import descendants

if TYPE_CHECKING:
    from collections.abc import Sequence

# Where a program of this user could have left a file on the node.
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run/user/{uid}", "{home}")  # noqa: S108 - looked at, never written

WEAKER = (
    "account: the site has no namespaces for its sessions; programs were confined to a folder in "
    "memory by the kernel's Landlock as far as the node has it, and share the node's network and "
    "process table"
)


@dataclass(frozen=True)
class Before:
    """What the node looked like when the session began."""

    entries: dict[str, frozenset[str]]
    mounts: frozenset[str]


def look_before(home: str) -> Before:
    """Note the entries of the temporary folders, and the mounts of the node."""
    return Before(
        {place: names for place in _places(home) if (names := _entries(place)) is not None},
        _mounts(),
    )


def _places(home: str) -> list[str]:
    return [place.format(uid=os.getuid(), home=home) for place in PLACES]


def _entries(place: str) -> frozenset[str] | None:
    try:
        return frozenset(os.listdir(place))  # noqa: PTH208 - names, not paths
    except OSError:
        return None


def _mounts() -> frozenset[str]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    # Number, device and place; options may change without a new mount.
    return frozenset(" ".join(line.split()[i] for i in (0, 2, 4)) for line in lines.splitlines())


def look_after(
    before: Before,
    home: str,
    *,
    walls: str,
    started: int,
    refused: Sequence[str],
    key_expires: str,
) -> list[dict[str, str]]:
    """Return the items of the report.

    Parameters
    ----------
    before : Before
    home : str
        The person's home folder on the node.
    walls : str
        ``namespaces`` or ``account``.
    started : int
        How many programs this session had started.
    refused : sequence of str
        Strangers that had asked the key agent.
    key_expires : str
        When the last certificate for the key ends.
    """
    items = [_processes(started), _mount_item(before), *_files(before, home), _core(), _swap()]
    if walls == "account":
        items.append({"item": "walls", "result": "seen", "detail": WEAKER})
    items.append(
        {
            "item": "key",
            "result": "unknown",
            "detail": "in this process's memory until it has signed this report, then wiped; "
            f"its last certificate ends at {key_expires}",
        }
    )
    if refused:
        items.append(
            {
                "item": "key agent",
                "result": "seen",
                "detail": f"{len(refused)} strange requests, all refused: "
                + "; ".join(refused[:8]),
            }
        )
    return items


def _item(name: str, left: Sequence[str], seen: str) -> dict[str, str]:
    if left:
        return {"item": name, "result": "left", "detail": ", ".join(left[:16])}
    return {"item": name, "result": "gone", "detail": seen}


def _processes(started: int) -> dict[str, str]:
    left = [f"{name} ({pid})" for pid, name in sorted(descendants(os.getpid()).items())]
    return _item(
        "processes",
        left,
        f"no process of the session is left: payload, mounts and {started} programs have ended, "
        "and with the last of them its memory folders",
    )


def _mount_item(before: Before) -> dict[str, str]:
    new = [mount.split()[-1] for mount in sorted(_mounts() - before.mounts)]
    ours = [place for place in new if "kakehashi" in place]
    return _item(
        "mounts",
        ours,
        "none of the session in the node's table; its own table ended with its processes",
    )


def _files(before: Before, home: str) -> list[dict[str, str]]:
    """Tell of entries of this user that appeared; other jobs of the person may have made them."""
    new: list[str] = []
    unseen: list[str] = []
    for place in _places(home):
        names = _entries(place)
        known = before.entries.get(place)
        if names is None or known is None:
            if Path(place).exists():
                unseen.append(place)
            continue
        for name in sorted(names - known):
            path = Path(place, name)
            try:
                if path.lstat().st_uid == os.getuid():
                    new.append(str(path))
            except OSError:
                continue
    if new:
        detail = "appeared during the session, from it or another job: " + ", ".join(new[:16])
        return [{"item": "files", "result": "seen", "detail": detail}]
    if unseen:
        detail = f"cannot be listed: {', '.join(unseen)}"
        return [{"item": "files", "result": "unknown", "detail": detail}]
    return [
        {
            "item": "files",
            "result": "gone",
            "detail": "no new entry of this user in " + ", ".join(before.entries),
        }
    ]


def _core() -> dict[str, str]:
    return {
        "item": "core dumps",
        "result": "gone",
        "detail": f"switched off for every process of the session; the node's pattern is "
        f"{check.core_pattern()!r}",
    }


def _swap() -> dict[str, str]:
    plain, areas = check.swap_areas()
    if plain:
        return {
            "item": "swap",
            "result": "unknown",
            "detail": f"allowed by the site, and not encrypted: {', '.join(plain)}",
        }
    detail = f"all of it encrypted or in memory: {', '.join(areas)}" if areas else "none in use"
    return {"item": "swap", "result": "gone", "detail": detail}
