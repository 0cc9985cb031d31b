from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.spawners.standins import Authority, Hub, running_hub, serving


@pytest.fixture(scope="module")
def authority() -> Iterator[Authority]:
    with serving(Authority()) as one:
        yield one


@pytest.fixture(scope="module")
def whole_hub(authority: Authority) -> Iterator[Hub]:
    with running_hub(authority) as one:
        yield one


@pytest.fixture
def hub(whole_hub: Hub) -> Iterator[Hub]:
    yield whole_hub
    whole_hub.settle()
