"""Builds the scan in C: ``python -m kakehashi.store.facets.build_library FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from kakehashi.compiling import compile_library
from kakehashi.errors import StoreError
from kakehashi.store.facets.library import NAME, SOURCE


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
    return compile_library(SOURCE, folder / NAME, options=("-O3", "-pthread"), error=StoreError)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kakehashi.store.facets.build_library FOLDER")
    try:
        build(Path(sys.argv[1]))
    except StoreError as error:
        sys.exit(f"kakehashi: {error}")
