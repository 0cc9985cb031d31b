"""Compiles a C source of ours into a library: on the nodes, and at the store."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kakehashi.errors import KakehashiError

_COMPILER = ("cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")


def compile_library(
    source: Path,
    library: Path,
    *,
    options: Sequence[str],
    linked: Sequence[str] = (),
    error: type[KakehashiError],
) -> Path:
    """Compile a library, whole or not at all, and return where it lies.

    Parameters
    ----------
    source, library : Path
        The library's folder is made if it is missing.
    options, linked : sequence of str
        For the compiler, before the source and behind it.
    error : type of KakehashiError
        What is raised if there is no C compiler, or it failed; the message holds what it said.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    part = library.with_name(library.name + ".part")
    command = [*_COMPILER, *options, "-o", str(part), str(source), *linked]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise error(
            f"{library.name}: no C compiler (cc) found; install gcc, or copy the file from a "
            "machine of the same kind"
        ) from None
    if done.returncode != 0:
        raise error(f"{library.name}: the compiler failed:\n{done.stderr}")
    part.replace(library)
    return library
