"""Builds the preloaded libraries: ``python -m kakehashi.session.build_libraries FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from kakehashi.compiling import compile_library
from kakehashi.errors import SessionError
from kakehashi.session.libraries import LIBRARIES, SOURCES

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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kakehashi.session.build_libraries FOLDER")
    try:
        build(Path(sys.argv[1]))
    except SessionError as error:
        sys.exit(f"kakehashi: {error}")
