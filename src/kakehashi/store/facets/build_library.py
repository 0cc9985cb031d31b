"""Builds the scan in C: ``python -m kakehashi.store.facets.build_library FOLDER``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kakehashi.errors import StoreError
from kakehashi.store.facets.library import NAME, SOURCE

COMPILER = (
    *("cc", "-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror"),
    *("-fPIC", "-shared", "-pthread"),
)


def build(folder: Path) -> Path:
    """Compile the library and return where it lies.

    Parameters
    ----------
    folder : Path
        The folder to write to; it is made if it is missing.

    Raises
    ------
    StoreError
        There is no C compiler, or it failed; the message holds what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / NAME
    part = library.with_name(library.name + ".part")
    try:
        done = subprocess.run(
            [*COMPILER, "-o", str(part), str(SOURCE)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise StoreError(
            f"{NAME}: no C compiler (cc) found; install gcc, or copy the file from a machine of "
            "the same kind"
        ) from None
    if done.returncode != 0:
        raise StoreError(f"{NAME}: the compiler failed:\n{done.stderr}")
    part.replace(library)
    return library


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kakehashi.store.facets.build_library FOLDER")
    try:
        build(Path(sys.argv[1]))
    except StoreError as error:
        sys.exit(f"kakehashi: {error}")
