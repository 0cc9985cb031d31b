"""The lease is renewed in time, also where the node's clock is wrong."""

from __future__ import annotations

import datetime as dt
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kakehashi.session import keys, watch
from kakehashi.session.hubclient import Grant
from tests.session.test_hubclient import GRANT, KEY, SESSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kakehashi.session.hubclient import HubClient


class Portal:
    """Renews a lease, for as long as it is told to, by a clock that need not be the node's."""

    def __init__(self, lease: dt.timedelta) -> None:
        self.lease = lease
        self.asked = threading.Semaphore(0)

    def grant(self) -> Grant:
        first = Grant.parse(GRANT, SESSION, KEY.public)
        return replace(first, expires_at=dt.datetime.now(dt.UTC) + self.lease)

    def renew(self, _key: keys.SigningKey, _counter: int) -> Grant:
        self.asked.release()
        return self.grant()


@pytest.fixture
def renewing(request: pytest.FixtureRequest) -> Iterator[Portal]:
    portal = Portal(dt.timedelta(seconds=request.param))
    told: list[Any] = []
    renewer = watch.Renewer(
        cast("HubClient", portal), KEY, portal.grant(), offline_max_s=60, tell=told.append
    )
    renewer.start()
    yield portal
    renewer.stop()


@pytest.mark.parametrize("renewing", [0.9], indirect=True)
def test_a_lease_is_renewed_before_it_lapses(renewing: Portal) -> None:
    for _ in range(3):
        assert renewing.asked.acquire(timeout=5)


@pytest.mark.parametrize("renewing", [0.0, -3600.0], indirect=True)
def test_a_clock_ahead_does_not_flood_the_portal(renewing: Portal) -> None:
    assert not renewing.asked.acquire(timeout=1)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WRONG_CLOCK_S", 0.1)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("renewing", [7200.0, -7200.0], indirect=True)
def test_a_wrong_clock_does_not_let_the_lease_lapse(renewing: Portal) -> None:
    for _ in range(3):
        assert renewing.asked.acquire(timeout=5)
