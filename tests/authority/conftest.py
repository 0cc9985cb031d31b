from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.authority.real import RealStore

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def store() -> Iterator[RealStore]:
    """A running store with long leases."""
    real = RealStore(sessions_per_person=64)
    try:
        real.start()
        yield real
    finally:
        real.remove()


@pytest.fixture
def fresh() -> Iterator[RealStore]:
    """A running store of this test alone, with leases of three seconds."""
    real = RealStore(lease_minutes=0.05)
    try:
        real.start()
        yield real
    finally:
        real.remove()


@pytest.fixture
def alone() -> Iterator[RealStore]:
    """A running store of this test alone, with leases that outlast it."""
    real = RealStore()
    try:
        real.start()
        yield real
    finally:
        real.remove()
