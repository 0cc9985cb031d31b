"""The authority's interface for hubs, over real HTTP."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import ssl
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

from kakehashi import __version__
from kakehashi.config import StoreHost
from kakehashi.errors import ConfigError
from kakehashi.store.authority import hubs
from kakehashi.store.authority.accounts import acting_as
from kakehashi.store.authority.models import MAX_BODY
from kakehashi.store.authority.service import tls
from tests.authority.real import Hub

if TYPE_CHECKING:
    from pathlib import Path

    from tests.authority.real import RealStore

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")


@needs_root
def test_version(store: RealStore) -> None:
    assert store.hub.call("GET", "/v1/version").ok() == {"software": __version__, "api": 1}


@needs_root
def test_only_hubs_are_answered(store: RealStore) -> None:
    for token in ("", "x", secrets.token_urlsafe(32), store.hub.token + "x", "é", "x" * 300):
        connection = http.client.HTTPConnection("127.0.0.1", store.http_port, timeout=10)
        for path in ("/v1/version", "/v1/sessions", "/nowhere"):
            value = f"Bearer {token}".encode()
            connection.request("GET", path, headers={b"Authorization": value})  # type: ignore[dict-item]
            answer = connection.getresponse()
            assert answer.status == 401
            assert json.loads(answer.read())["error"] == "credential"
        connection.close()
    assert store.hub.call("GET", "/v1/version").status == 200


@needs_root
def test_new_credential_voids_the_old_one_at_once(store: RealStore) -> None:
    with acting_as(store.account):
        old = Hub(store.http_port, hubs.add(store.layout.hubs, "second").reveal())
        assert old.call("GET", "/v1/version").status == 200
        new = Hub(store.http_port, hubs.add(store.layout.hubs, "second").reveal())
    assert old.call("GET", "/v1/version").status == 401
    assert new.call("GET", "/v1/version").status == 200


@needs_root
def test_whole_session_over_http(store: RealStore) -> None:
    hub = store.hub
    projects = hub.call("POST", "/v1/projects", {"groups": ["g-lung", "g-old"]}).ok()["projects"]
    assert [project["id"] for project in projects] == ["lung"]
    session, node, created = store.session(hours=2)
    assert node.grant["ends_at"] < created["ends_at"]
    hub.renew(session, node, 1).ok()
    hub.renew(session, node, 1).refused(403, "stale")
    hub.renew(session, node, 2, signer=store.node()).refused(403, "signature")
    hub.call("GET", f"/v1/sessions/{session}/receipt").refused(404, "no-receipt")
    items = [{"item": "mounts", "result": "gone", "detail": ""}]
    message = json.dumps({"report": session, "items": items})
    report = {"witness": "wrapper", "message": message, "signature": node.sign(message)}
    hub.call("POST", f"/v1/sessions/{session}/report", report).ok()
    states = hub.call("POST", "/v1/sessions/states", {"sessions": [session]}).ok()["states"]
    assert states == {session: {"state": "granted", "reason": None}}
    receipt = hub.end(session).ok()
    assert hub.end(session, "again").ok() == receipt
    assert hub.call("GET", f"/v1/sessions/{session}/receipt").ok() == receipt
    witnesses = [i["witness"] for i in receipt["items"] if i["item"] == "mounts"]
    assert witnesses == ["wrapper"]
    strange = {"site": "here", "message": "{}", "signature": "x"}
    hub.call("POST", "/v1/witness", strange).refused(403, "witness")
    audit = {"kind": "login.refused", "person": "eve", "detail": {"why": "no group"}}
    seq = hub.call("POST", "/v1/audit", audit).ok()["seq"]
    (record,) = [record for record in store.records() if record.seq == seq]
    assert (record.kind, record.person) == ("hub.login.refused", "eve")


@needs_root
@pytest.mark.parametrize(
    "changes",
    [
        {"person": ""},
        {"person": "a\nb"},
        {"person": 7},
        {"person": "x" * 129},
        {"groups": "g-lung"},
        {"project": "../lung"},
        {"kind": "batch"},
        {"hours": 0},
        {"hours": -1},
        {"hours": "1"},
        {"hours": 1e400},
        {"more": 1},
        {"software": None},
    ],
)
def test_malformed_sessions(store: RealStore, changes: dict[str, object]) -> None:
    store.hub.create(**changes).refused(422, "malformed")


@needs_root
@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"hours": 24 * 7 + 1}, 429, "limit"),
        ({"site": "elsewhere"}, 403, "no-site"),
        ({"groups": ["g-brain"]}, 403, "no-project"),
        ({"groups": []}, 403, "no-project"),
        ({"project": "old", "groups": ["g-old"]}, 403, "project-expired"),
        ({"lease_minutes": 60}, 422, "malformed"),
        ({"view_account": "root"}, 422, "malformed"),
    ],
)
def test_hub_that_asks_for_more_is_refused_and_written_down(
    store: RealStore, changes: dict[str, object], status: int, code: str
) -> None:
    before = len(store.records(kind="refused"))
    store.hub.create(**changes).refused(status, code)
    (record,) = store.records(kind="refused")[before:]
    assert (record.detail["hub"], record.detail["code"]) == ("hub", code)


@needs_root
def test_grants_and_ends_of_a_hub_that_asks_for_more(store: RealStore) -> None:
    created = store.hub.create().ok()
    node = store.node()
    for more in ({"expires_at": "2099-01-01T00:00:00Z"}, {"accounts": ["root"]}):
        store.hub.grant(created, node, **more).refused(422, "malformed")
    node.take(store.hub.grant(created, node).ok())
    path = f"/v1/sessions/{created['session']}/ending"
    for grace in (61, -1, 1e400, "1"):
        store.hub.call("POST", path, {"reason": "x", "grace_s": grace}).refused(422, "malformed")
    assert store.records()[-1].detail["path"] == path
    store.hub.renew(created["session"], node, 1).ok()


@needs_root
def test_bodies_that_are_no_requests(store: RealStore) -> None:
    for body in (b"", b"[]", b"null", b"{", b"\xff", b"[" * 5000, b'{"groups": "\\ud800"}'):
        for path in ("/v1/sessions", "/v1/grants", "/v1/leases", "/v1/audit", "/v1/projects"):
            store.hub.send("POST", path, body).refused(422, "malformed")
        path = f"/v1/sessions/{'0' * 32}/report"
        store.hub.send("POST", path, body).refused(422, "malformed")
    store.hub.call("GET", f"/v1/sessions/{'0' * 32}/receipt").refused(404, "unknown-session")
    store.hub.call("GET", "/v1/else").refused(404, "not-found")
    assert store.hub.call("GET", "/v1/sessions").status == 405


@needs_root
def test_too_large_a_body_is_not_read(store: RealStore) -> None:
    with socket.create_connection(("127.0.0.1", store.http_port), timeout=10) as link:
        link.sendall(
            f"POST /v1/audit HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {store.hub.token}\r\n"
            f"Content-Length: {MAX_BODY + 1}\r\n\r\n".encode()
        )
        answer = link.recv(65536)
        assert b" 200 " not in answer
    assert store.hub.call("GET", "/v1/version").status == 200


@needs_root
def test_no_secret_reaches_a_log(store: RealStore) -> None:
    created = store.hub.create().ok()
    node = store.node()
    store.hub.grant(created, node, address="not an address").refused(422, "malformed")
    store.hub.grant(created, node, more=1).refused(422, "malformed")
    store.hub.grant({**created, "ticket": "w" * 43}, node).refused(403, "ticket")
    store.hub.grant(created, node).ok()
    logs = store.logs() + "".join(path.read_text() for path in store.layout.log.glob("*.log"))
    assert "/v1/grants" in logs
    for secret in (created["ticket"], "w" * 43, store.hub.token):
        assert secret not in logs


@needs_root
def test_one_of_many_grants_at_once(store: RealStore) -> None:
    created = store.hub.create().ok()
    statuses: list[int] = []

    def redeem() -> None:
        statuses.append(store.hub.grant(created, store.node()).status)

    threads = [threading.Thread(target=redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, *[409] * 7]


def test_without_tls_it_listens_on_loopback_only() -> None:
    store: dict[str, Any] = {"address": "store", "authority_bind": "127.0.0.1"}
    assert tls(StoreHost.model_validate(store)) is None
    with pytest.raises(ConfigError, match="loopback"):
        tls(StoreHost.model_validate({**store, "authority_bind": "0.0.0.0"}))


def test_tls_key_is_used_or_named(tmp_path: Path) -> None:
    key, cert = tmp_path / "key", tmp_path / "cert"
    arguments = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=x"]
    arguments += ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(arguments, check=True, capture_output=True)
    store = {"address": "store", "authority_bind": "0.0.0.0"}
    paths = {"authority_tls_key": key, "authority_tls_cert": cert}
    context = tls(StoreHost.model_validate({**store, **paths}))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    key.write_text("no key")
    with pytest.raises(ConfigError, match=str(key)):
        tls(StoreHost.model_validate({**store, **paths}))
