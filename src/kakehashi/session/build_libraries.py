"""Builds the preloaded libraries: ``python -m kakehashi.session.build_libraries FOLDER``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kakehashi.errors import SessionError

SOURCES = Path(__file__).parent
NODUMP = "nodump.so"
SHM = "shm.so"
LIBRARIES = (NODUMP, SHM)

COMPILER = ("cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
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
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(_compile(folder / name) for name in LIBRARIES)


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


def _compile(library: Path) -> Path:
    source = (SOURCES / library.name).with_suffix(".c")
    part = library.with_name(library.name + ".part")
    try:
        done = subprocess.run(
            [*COMPILER, "-o", str(part), str(source), *SYSTEM],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise SessionError(
            f"{library.name}: no C compiler (cc) found; install gcc, or copy the file from a "
            "node of the same kind"
        ) from None
    if done.returncode != 0:
        raise SessionError(f"{library.name}: the compiler failed:\n{done.stderr}")
    part.replace(library)
    return library


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kakehashi.session.build_libraries FOLDER")
    try:
        build(Path(sys.argv[1]))
    except SessionError as error:
        sys.exit(f"kakehashi: {error}")
