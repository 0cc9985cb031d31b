"""Rights that are lost: at the identity provider, and by the store's kill switches."""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab import look
from tests.lab import portal as services
from tests.lab.client import Client
from tests.lab.hosts import wait_for
from tests.lab.lab import Lab

pytestmark = pytest.mark.lab

People = Callable[[str], Client]
PLAIN = {"site": "slurm", "queue": "gpu", "gpus": 0, "hours": 1.0, "project": "lung-ct"}
ACCOUNTS = "/var/lib/provider/accounts.json"
HUB_S, STORE_S, SWITCH_S = 45.0, 5.0, 10.0
OPERATOR = ["--by", "operator", "--reason", "drill"]


def crowding() -> float:
    """Return by how much this machine is overloaded, 1 if it is not.

    What is promised in seconds is promised for hosts that have no more to do than they can.
    """
    return max(1.0, os.getloadavg()[0] / (2 * (os.cpu_count() or 1)))


@pytest.fixture
def provider(lab: Lab) -> Iterator[Callable[[str, dict[str, Any]], float]]:
    """Change a person at the identity provider; gives the time at which it was done."""
    host = lab["provider"]
    text = host.path(ACCOUNTS).read_text()

    def change(person: str, change: dict[str, Any]) -> float:
        accounts = json.loads(host.path(ACCOUNTS).read_text())
        accounts[person] |= change
        host.write(ACCOUNTS, json.dumps(accounts, ensure_ascii=False))
        return time.time()

    yield change
    host.write(ACCOUNTS, text)


def running(lab: Lab, client: Client) -> str:
    before = set(look.open_sessions(lab))
    client.start(PLAIN)
    (session,) = set(look.open_sessions(lab)) - before
    return session


def recorded(lab: Lab, session: str, kind: str) -> float | None:
    """Return when the store wrote a record of a session, in seconds since 1970."""
    times = [one["time"] for one in look.audit(lab)
             if one.get("session") == session and one["kind"] == kind]  # fmt: skip
    return dt.datetime.fromisoformat(times[0]).timestamp() if times else None


@pytest.mark.parametrize(
    "change",
    [{"groups": []}, {"groups": ["sarcoma-review"]}, {"blocked": True}],
    ids=["no group", "another group", "blocked"],
)
def test_who_loses_the_right_at_the_provider_loses_the_session_unasked(
    lab: Lab,
    person: People,
    provider: Callable[[str, dict[str, Any]], float],
    change: dict[str, Any],
) -> None:
    tanaka, suzuki = person("tanaka"), person("suzuki")
    session, other = running(lab, tanaka), running(lab, suzuki)
    changed = provider("tanaka", change)
    # Nobody clicks anywhere: the hub asks by itself, tells the store, and the store cuts.
    wait_for("the revocation", lambda: recorded(lab, session, "session.revoked") is not None, 60)
    revoked = recorded(lab, session, "session.revoked")
    assert revoked is not None
    assert revoked - changed < HUB_S
    wait_for("closed connections", lambda: not connections(lab, session), STORE_S)
    wait_for("the job's end", lambda: not look.processes(lab["node1"], "ka0001"), 60)
    # The control: whoever kept the right is not touched.
    assert other in look.open_sessions(lab)
    assert connections(lab, other)


def connections(lab: Lab, session: str) -> int:
    """Return how many connections of a session stand."""
    told = json.loads(services.kakehashi(lab["store"], ["sessions", "--json"]).stdout)
    found = look.store_book(
        lab, f"SELECT count(*) FROM connections WHERE closed_at IS NULL AND session = '{session}'"
    )
    listed = [one["connections"] for one in told if one["session"] == session]
    assert listed in ([], [int(found)])
    return int(found)


@pytest.mark.parametrize("words", [["--person", "tanaka"], ["--site", "slurm"], ["--all"]],
                         ids=["person", "site", "all"])  # fmt: skip
def test_a_kill_switch_works_within_ten_seconds_and_holds(
    lab: Lab, person: People, words: list[str]
) -> None:
    tanaka, suzuki = person("tanaka"), person("suzuki")
    session, other = running(lab, tanaka), running(lab, suzuki)
    began = time.monotonic()
    done = services.kakehashi(lab["store"], ["revoke", *words, *OPERATOR])
    assert "0 of their connections still stand" in done.stdout
    try:
        assert not connections(lab, session)
        wait_for("the job's end", lambda: not look.processes(lab["node1"], "ka0001"), 60)
        assert time.monotonic() - began < SWITCH_S * crowding()
        if words == ["--person", "tanaka"]:
            assert other in look.open_sessions(lab)
            assert connections(lab, other)
        else:
            assert not look.open_sessions(lab)
        wait_for("the hub's notice", lambda: tanaka.server() is None, 60)
        refused = tanaka.call("POST", "/hub/api/users/tanaka/server", PLAIN)
        assert refused.status_code == 403, refused.text
        assert "drill" in refused.text
    finally:
        services.kakehashi(lab["store"], ["allow", *words, "--by", "operator"])
    tanaka.start(PLAIN)


def test_one_session_is_revoked_and_the_person_may_begin_anew(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    session = running(lab, tanaka)
    services.kakehashi(lab["store"], ["revoke", "--session", session, *OPERATOR])
    wait_for("the hub's notice", lambda: tanaka.server() is None, 60)
    assert look.receipt(lab, session)["reason"] == "revoked"
    tanaka.start(PLAIN)
