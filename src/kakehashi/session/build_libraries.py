"""Builds the preloaded libraries: ``python -m kakehashi.session.build_libraries FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from kakehashi.compiling import compile_library
from kakehashi.errors import SessionError

SOURCES = Path(__file__).parent
NODUMP = "nodump.so"
SHM = "shm.so"
LIBRARIES = (NODUMP, SHM)

# Before glibc 2.34 what shm.c hands on to lives in libraries of their own; later they are empty.
SYSTEM = ("-Wl,--no-as-needed", "-lpthread", "-lrt", "-ldl")


def build(folder: Path) -> tuple[Path, ...]:
    """Compile all libraries and return where they lie.

    Parameters
    ----------
    folder : Path
        The folder to write to; it is made if it is missing.

    Raises
    ------
    SessionError
        There is no C compiler, or it failed; the message holds what it said.
    """
    return tuple(
        compile_library(
            (SOURCES / name).with_suffix(".c"),
            folder / name,
            options=("-O2",),
            linked=SYSTEM,
            error=SessionError,
        )
        for name in LIBRARIES
    )


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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kakehashi.session.build_libraries FOLDER")
    try:
        build(Path(sys.argv[1]))
    except SessionError as error:
        sys.exit(f"kakehashi: {error}")
