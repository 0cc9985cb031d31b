"""Log-in and the right to a session, with the real authenticator.

The provider stands at the outermost edge and does what RFC 6749 and 7636 ask: codes bound to a
verifier, refresh tokens good for one use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.spawners.standins import Authority, Hub, Provider, providing, running_hub, serving, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the agent drops to other accounts")


@dataclass
class House:
    hub: Hub
    authority: Authority
    provider: Provider


@pytest.fixture(scope="module")
def whole_house() -> Iterator[House]:
    with (
        serving(Authority()) as authority,
        providing(Provider()) as provider,
        running_hub(authority, provider=provider, right_s=0) as hub,
    ):
        yield House(hub, authority, provider)


@pytest.fixture
def house(whole_house: House) -> Iterator[House]:
    provider = whole_house.provider
    provider.groups = {"alice": ["lung-study"], "dave": ["strangers"], "root": ["administrators"]}
    provider.blocked, provider.down, provider.amr = set(), False, []
    yield whole_house
    provider.groups["alice"], provider.down = ["lung-study"], False
    provider.blocked = set()
    person, _ = whole_house.hub.login_oidc("alice", provider)
    if person.server():
        person.stop()


def session_of(house: House) -> str:
    house.hub.plan(mode="serve")
    alice, back = house.hub.login_oidc("alice", house.provider)
    assert back.status_code == 302, back.text
    assert alice.spawn().ok
    alice.ready()
    return alice.last_session()


def test_who_has_a_project_gets_in_and_it_is_recorded(house: House) -> None:
    alice, back = house.hub.login_oidc("alice", house.provider)
    assert back.status_code == 302
    assert alice.browser.get(f"{house.hub.url}/hub/home", timeout=10).status_code == 200
    mine = alice.call("GET", "api/kakehashi/sites").json()
    assert [project["id"] for project in mine["projects"]] == ["lung"]
    record = until("the record", lambda: house.authority.kinds("log-in"))[-1]
    assert record["person"] == "alice"
    assert record["detail"]["groups"] == ["lung-study"]
    alice.browser.get(f"{house.hub.url}/hub/logout", timeout=10, allow_redirects=False)
    until("the record", lambda: house.authority.kinds("log-out"))
    page = alice.browser.get(f"{house.hub.url}/hub/home", timeout=10, allow_redirects=False)
    assert page.status_code == 302


def test_who_has_no_project_gets_a_page_that_says_what_to_do(house: House) -> None:
    dave, back = house.hub.login_oidc("dave", house.provider)
    assert back.status_code == 403
    assert "dave" in back.text
    assert "strangers" in back.text
    page = dave.browser.get(f"{house.hub.url}/hub/home", timeout=10, allow_redirects=False)
    assert page.status_code == 302, "not logged in"
    assert until("the record", lambda: house.authority.kinds("log-in-refused"))


def test_an_operator_needs_no_project_and_enters_no_session(house: House) -> None:
    root, back = house.hub.login_oidc("root", house.provider)
    assert back.status_code == 302
    house.hub.login_oidc("alice", house.provider)
    # The control: what an operator is there for is allowed.
    listed = root.call("GET", "api/users")
    assert listed.status_code == 200
    assert {"alice", "root"} <= {user["name"] for user in listed.json()}
    assert not any(user.get("admin") for user in listed.json())
    for body in ({"scopes": ["access:servers!user=alice"]}, {}):
        assert root.call("POST", "api/users/alice/tokens", json=body).status_code in {400, 403, 404}
    own = root.call("POST", "api/users/root/tokens", json={"scopes": ["access:servers!user=alice"]})
    assert own.status_code in {400, 403}
    assert root.call("PATCH", "api/users/root", json={"admin": True}).status_code in {403, 404}
    assert root.call("POST", "api/users/alice/server", json={}).status_code in {403, 404}


def test_a_stolen_code_is_worth_nothing_without_its_verifier(house: House) -> None:
    thief, _ = house.hub.login_oidc("dave", house.provider)
    code = "stolen"
    house.provider.codes[code] = ("alice", "challenge-of-another-browser")
    away = thief.browser.get(f"{house.hub.url}/hub/oauth_login", timeout=10, allow_redirects=False)
    state = away.headers["Location"].split("state=")[1].split("&")[0]
    back = thief.browser.get(
        f"{house.hub.url}/hub/oauth_callback?code={code}&state={state}",
        timeout=10,
        allow_redirects=False,
    )
    assert back.status_code == 403


def test_a_silent_store_lets_nobody_in(house: House) -> None:
    house.authority.down = True
    try:
        _, back = house.hub.login_oidc("alice", house.provider)
        assert back.status_code == 503
    finally:
        house.authority.down = False


def test_a_session_goes_on_while_the_provider_is_away(house: House) -> None:
    session = session_of(house)
    marks = house.hub.log().count("gave no answer")
    house.provider.down = True
    until("silence", lambda: house.hub.log().count("gave no answer") >= marks + 3)
    assert "ends" not in house.authority.sessions[session]
    house.provider.down = False


def test_a_blocked_person_loses_the_session_and_the_log_in(house: House) -> None:
    session = session_of(house)
    house.provider.blocked.add("alice")
    until("the revocation", lambda: session in house.authority.revoked)
    until("the end", lambda: "ends" in house.authority.sessions[session])
    assert "right lost" in house.authority.sessions[session]["ends"][0]["reason"]


def test_a_lost_group_ends_the_session_of_its_project(house: House) -> None:
    session = session_of(house)
    house.provider.groups["alice"] = ["brain-study"]
    until("the revocation", lambda: session in house.authority.revoked)
    until("the end", lambda: "ends" in house.authority.sessions[session])


def test_expired_access_is_renewed_with_each_refresh_token_used_once(house: House) -> None:
    session = session_of(house)
    for _ in range(3):
        asked = house.provider.asked
        house.provider.access.clear()
        until("new questions", lambda asked=asked: house.provider.asked > asked + 2)
    assert house.provider.reused == 0
    assert "ends" not in house.authority.sessions[session]


def test_a_log_in_without_the_second_factor_is_refused_where_it_is_required() -> None:
    claim = 'require_claim = { name = "amr", value = "mfa" }'
    with (
        serving(Authority()) as authority,
        providing(Provider()) as provider,
        running_hub(authority, provider=provider, claim=claim) as hub,
    ):
        provider.amr = ["pwd"]
        _, back = hub.login_oidc("alice", provider)
        assert back.status_code == 403
        assert "amr" in back.text
        provider.amr = ["pwd", "mfa"]
        # Clocks ten minutes apart; an ID token that is old in earnest proves nothing.
        for ahead_s, status in ((0.0, 302), (600.0, 302), (-600.0, 302), (-7200.0, 403)):
            provider.ahead_s = ahead_s
            _, back = hub.login_oidc("alice", provider)
            assert back.status_code == status
