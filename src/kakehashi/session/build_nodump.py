"""Builds ``nodump.so``: ``python -m kakehashi.session.build_nodump DEST``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kakehashi.errors import SessionError

SOURCE = Path(__file__).with_name("nodump.c")
LIBRARY = "nodump.so"


def build(destination: Path) -> Path:
    """Compile the library and return where it lies.

    Parameters
    ----------
    destination : Path
        The file to write; its folder is made if it is missing.

    Raises
    ------
    SessionError
        There is no C compiler, or it failed; the message holds what it said.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(destination.name + ".part")
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    try:
        done = subprocess.run(
            [*command, "-o", str(part), str(SOURCE)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise SessionError(
            "nodump.so: no C compiler (cc) found; install gcc, or copy the file from a node "
            "of the same kind"
        ) from None
    if done.returncode != 0:
        raise SessionError(f"nodump.so: the compiler failed:\n{done.stderr}")
    part.replace(destination)
    return destination


def find(software: str) -> Path | None:
    """Return the built library of an installation, None if there is none.

    Parameters
    ----------
    software : str
        The site's ``node.software``; the package's own folder is looked at next.
    """
    for path in (Path(software, "libexec", LIBRARY), SOURCE.with_name(LIBRARY)):
        if path.is_file():
            return path
    return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kakehashi.session.build_nodump DEST")
    try:
        build(Path(sys.argv[1]))
    except SessionError as error:
        sys.exit(f"kakehashi: {error}")
