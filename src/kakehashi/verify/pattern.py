"""The canary's pattern, and every form in which it might turn up. Standard library only."""

from __future__ import annotations

import base64
import os
import struct
from dataclasses import dataclass

PIXELS = 32
"""Values of the pattern, one pixel each; 12 bits of chance each, as a CT has."""

SLOPE, INTERCEPT = 1, -1024
"""Rescale of the canary's series."""


@dataclass(frozen=True)
class Pattern:
    """Pixel values that occur nowhere else.

    Attributes
    ----------
    values : tuple of int
        Stored values, 0 to 4095, as they stand in a row of each slice of the canary's series.
    """

    values: tuple[int, ...]

    @classmethod
    def new(cls) -> Pattern:
        """Make one by chance."""
        data = os.getrandom(2 * PIXELS)
        return cls(tuple(value & 0x0FFF for value in struct.unpack(f"<{PIXELS}H", data)))

    @property
    def plain(self) -> bytes:
        """The stored values, int16, little-endian."""
        return struct.pack(f"<{PIXELS}h", *self.values)

    def needles(self) -> dict[str, bytes]:
        """Return what has to be searched for, by the name of the form.

        gzip and zlib are not among them: the search unpacks what it finds packed.
        """
        decoded = [value * SLOPE + INTERCEPT for value in self.values]
        texts = {
            "hexadecimal": self.plain.hex(),
            **{f"base64, at {shift}": base64_core(self.plain, shift) for shift in range(3)},
        }
        return {
            "plain": self.plain,
            "pixels (int16)": struct.pack(f"<{PIXELS}h", *decoded),
            "pixels (float32)": struct.pack(f"<{PIXELS}f", *decoded),
            "pixels (float64)": struct.pack(f"<{PIXELS}d", *decoded),
            **{name: text.encode() for name, text in texts.items()},
            # As browsers and other programs keep texts.
            **{f"{name}, UTF-16": text.encode("utf-16-le") for name, text in texts.items()},
        }


def base64_core(data: bytes, shift: int) -> str:
    """Return the part of a base64 text that depends on ``data`` alone.

    Parameters
    ----------
    data : bytes
        What stands somewhere in the text.
    shift : int
        How many bytes past a multiple of three it begins there.
    """
    padded = base64.b64encode(b"\0" * shift + data)
    # The first group holds what stood before, and the last one what comes after.
    first = 4 if shift else 0
    whole = (shift + len(data)) // 3 * 4
    return padded[first:whole].decode()


def masked(data: bytes, mask: bytes) -> bytes:
    """Cover or uncover bytes, so that what asks for the pattern does not hold it."""
    return bytes(one ^ mask[index % len(mask)] for index, one in enumerate(data))
