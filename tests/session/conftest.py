from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.authority.real import RealStore
from tests.session.real import Person, Software, World

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def person() -> Iterator[Person]:
    made = Person()
    yield made
    made.remove()


@pytest.fixture(scope="session")
def software() -> Iterator[Software]:
    made = Software()
    yield made
    made.remove()


@pytest.fixture(scope="session")
def world(person: Person, software: Software) -> Iterator[World]:
    store = RealStore(sessions_per_person=64)
    try:
        store.start()
        yield World(store, person, software)
    finally:
        store.remove()
