from __future__ import annotations

import pytest

from kakehashi.secret import Secret
from kakehashi.store.deidentify import Deidentifier


@pytest.fixture(scope="session")
def deidentifier() -> Deidentifier:
    return Deidentifier(Secret("5a" * 32))
