"""The preloaded libraries, and where they lie; `build_libraries` compiles them."""

from __future__ import annotations

from pathlib import Path

SOURCES = Path(__file__).parent
NODUMP = "nodump.so"
SHM = "shm.so"
LIBRARIES = (NODUMP, SHM)


def find(software: str, name: str) -> Path | None:
    """Return a built library of an installation, None if there is none.

    Parameters
    ----------
    software : str
        The site's ``node.software``; the package's own folder is looked at next.
    name : str
        One of `LIBRARIES`.
    """
    for path in (Path(software, "libexec", name), SOURCES / name):
        if path.is_file():
            return path
    return None
