"""Loads the scan in C, which build_library.py makes."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from kakehashi.errors import StoreError

SOURCE = Path(__file__).with_name("scan.c")
NAME = "facets.so"
ABI = 1
"""Of the structures that both sides share; ``FACETS_ABI`` in the source."""


def places() -> tuple[Path, ...]:
    """Return where the library may lie: ``libexec`` of the installation, or beside the source."""
    return (SOURCE.parents[4] / "libexec" / NAME, SOURCE.with_name(NAME))


def load() -> ctypes.CDLL:
    """Return the library.

    Raises
    ------
    StoreError
        It is not built, or of another release.
    """
    for path in places():
        if path.is_file():
            return _load(path)
    raise StoreError(
        f"{NAME} is not built; run: python -m kakehashi.store.facets.build_library "
        f"{places()[0].parent}"
    )


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.facets_abi.restype = ctypes.c_int64
        abi = library.facets_abi()
    except (OSError, AttributeError) as error:
        raise StoreError(f"{path} cannot be loaded ({error}); build it anew") from error
    if abi != ABI:
        raise StoreError(
            f"{path} is of another release (interface {abi}, expected {ABI}); run: python -m "
            f"kakehashi.store.facets.build_library {path.parent}"
        )
    pointer = ctypes.c_void_p
    number = ctypes.c_int64
    library.facets_count.argtypes = [pointer, pointer, number]
    library.facets_cells.argtypes = [pointer, pointer, number, pointer, pointer, number]
    library.facets_rows.argtypes = [pointer, pointer, number, pointer, number]
    for function in (library.facets_count, library.facets_cells, library.facets_rows):
        function.restype = number
    library.facets_uid_keys.argtypes = [pointer, pointer, number, pointer, pointer]
    library.facets_uid_text.argtypes = [pointer, number, pointer, pointer]
    library.facets_uid_keys.restype = library.facets_uid_text.restype = None
    return library
