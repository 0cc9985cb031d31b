"""What a portal sends is checked before any of it is used."""

from __future__ import annotations

import base64
import copy
import datetime as dt
import http.server
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.errors import RefusedError, SessionError
from kakehashi.secret import Secret
from kakehashi.session import keys
from kakehashi.session.hubclient import Grant, HubClient, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = keys.SigningKey()
SESSION = "a" * 32
BLOB = keys.pack(keys.CERTIFICATE_ALGORITHM.encode(), b"nonce", KEY.public)
GRANT: dict[str, Any] = {
    "session": SESSION,
    "person": "alice",
    "project": "lung",
    "serial": 7,
    "issued_at": "2099-01-01T00:00:00Z",
    "expires_at": "2099-01-01T00:15:00Z",
    "ends_at": "2099-01-01T08:00:00Z",
    "certificate": f"{keys.CERTIFICATE_ALGORITHM} {base64.b64encode(BLOB).decode()}",
    "store": {
        "address": "store.example",
        "further_addresses": ["10.1.0.1"],
        "port": 22,
        "host_ca": "ssh-ed25519 AAAA",
        "view_account": "kv-lung",
        "work_account": "kw-lung",
    },
    "manifest": {"path": "/manifest.json", "sha256": "0" * 64},
    "software": "0.1.0",
}


def changed(*path: str, to: object) -> dict[str, Any]:
    value = copy.deepcopy(GRANT)
    inner = value
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return value


def test_a_good_grant_is_taken() -> None:
    grant = Grant.parse(GRANT, SESSION, KEY.public)
    assert (grant.view_account, grant.work_account, grant.port) == ("kv-lung", "kw-lung", 22)
    assert grant.further_addresses == ("10.1.0.1",)
    assert grant.expires_at.tzinfo is not None


def test_times_of_the_store_count_from_when_they_were_heard() -> None:
    grant = Grant.parse(GRANT, SESSION, KEY.public)
    assert grant.lease_s == 15 * 60
    assert 8 * 3600 - 60 < grant.left_s <= 8 * 3600
    left = grant.by_own_clock(grant.ends_at) - dt.datetime.now(dt.UTC)
    assert left.total_seconds() == pytest.approx(grant.left_s, abs=1)


def test_a_store_that_replaces_its_host_ca_may_name_two() -> None:
    both = "ssh-ed25519 AAAA\nssh-ed25519 BBBB"
    value = changed("store", "host_ca", to=both)
    assert Grant.parse(value, SESSION, KEY.public).host_ca == both


@pytest.mark.parametrize(
    "value",
    [
        changed("session", to="b" * 32),
        changed("expires_at", to="2099-01-01T00:15:00"),
        changed("expires_at", to="2099-01-01T00:00:00Z"),
        changed("certificate", to="ssh-ed25519 AAAA"),
        changed("store", "address", to="-oProxyCommand=sh"),
        changed("store", "address", to="a b"),
        changed("store", "address", to="a\nb"),
        changed("store", "further_addresses", to=["10.1.0.1", "-oProxyCommand=sh"]),
        changed("store", "further_addresses", to="10.1.0.1"),
        changed("store", "further_addresses", to=[7]),
        changed("store", "port", to=0),
        changed("store", "port", to="22"),
        changed("store", "host_ca", to="ssh-ed25519 AAAA\n* ssh-rsa BBBB"),
        changed("store", "host_ca", to="ssh-ed25519 AAAA\n"),
        changed("store", "view_account", to="-x"),
        changed("store", "work_account", to="root@elsewhere"),
        changed("manifest", "sha256", to="../../x"),
        {},
        None,
        [],
    ],
)
def test_a_grant_that_is_not_one_is_refused(value: object) -> None:
    with pytest.raises(SessionError):
        Grant.parse(value, SESSION, KEY.public)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(sorted(GRANT)), inner),
    )
)
def test_any_value_is_taken_or_refused(value: object) -> None:
    with pytest.raises(SessionError):
        Grant.parse(value, SESSION, KEY.public)


@pytest.fixture
def portal() -> Iterator[tuple[str, dict[str, Any]]]:
    """A portal that answers whatever it is told to, as its word."""
    word: dict[str, Any] = {"status": 200, "body": b"{}"}

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            word["asked"] = word.get("asked", 0) + 1
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(word["status"])
            self.end_headers()
            self.wfile.write(word["body"])

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", word
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (410, b'{"error": "ended", "message": "over"}', RefusedError),
        (403, b"<html>no</html>", RefusedError),
        (404, b'{"error": "session", "message": "unknown here"}', RefusedError),
        (404, b"<html>no route</html>", UnreachableError),
        (500, b'{"error": "x", "message": "y"}', UnreachableError),
        (503, b"", UnreachableError),
        (429, b"{}", UnreachableError),
        (302, b"", UnreachableError),
        (200, b"not json", UnreachableError),
        (200, b"[]", UnreachableError),
        (200, b"{}", SessionError),
    ],
)
def test_answers_are_told_apart(
    portal: tuple[str, dict[str, Any]], status: int, body: bytes, kind: type[Exception]
) -> None:
    url, word = portal
    word |= {"status": status, "body": body}
    with pytest.raises(kind):
        HubClient(url, None, SESSION).renew(KEY, 1)


def test_a_ticket_is_sent_once_and_stays_out_of_messages(
    portal: tuple[str, dict[str, Any]],
) -> None:
    url, word = portal
    word |= {"status": 502, "body": b""}
    with pytest.raises(UnreachableError) as caught:
        HubClient(url, None, SESSION).enrol(Secret("sesame"), KEY, {})
    assert "sesame" not in str(caught.value)
    assert word["asked"] == 1


def test_nobody_there_is_said_so() -> None:
    with pytest.raises(UnreachableError, match="does not answer"):
        HubClient("http://127.0.0.1:1", None, SESSION).renew(KEY, 1)


def test_an_authority_that_is_no_certificate_is_refused() -> None:
    with pytest.raises(SessionError, match="portal_ca"):
        HubClient("https://portal.example", "not PEM", SESSION)
