"""The addresses that nodes call, attacked from where a node stands: a real hub and proxy."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kakehashi import __version__
from kakehashi_spawners.endpoints import Enrolment
from tests.spawners.standins import Authority, Hub, Person, running_hub, serving, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the agent drops to other accounts")

SIGNATURE = base64.b64encode(b"s" * 64).decode()


class Node:
    """A session whose wrapper holds still, so that the test is its node."""

    def __init__(self, hub: Hub, person: Person) -> None:
        self.hub, self.person = hub, person
        self.session = person.last_session()
        self.document = hub.seen("document", self.session)
        self.facts = hub.seen("facts", self.session)

    def request(self, **changes: Any) -> dict[str, Any]:
        return {
            "session": self.session,
            "ticket": self.document["ticket"],
            "public_key": "ssh-ed25519 " + "A" * 68,
            "port": 40123,
            "host": "node1",
            "job": self.facts["environment"]["KAKEHASHI_JOB"],
            "walls": "namespaces",
            "hub_port": None,
            "software": __version__,
            "checks": [{"check": "namespaces", "result": "ok"}],
            **changes,
        }

    def enrol(self, **changes: Any) -> requests.Response:
        return self.hub.post("enrol", self.request(**changes))

    def signed(self, call: str) -> requests.Response:
        return self.hub.post(
            call, {"session": self.session, "message": "{}", "signature": SIGNATURE}
        )


@pytest.fixture
def node(hub: Hub) -> Iterator[Node]:
    hub.plan(mode="hold")
    alice = hub.login("alice")
    assert alice.spawn().ok
    yield Node(hub, alice)
    alice.call("DELETE", "api/users/alice/server")


def refused(answer: requests.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["error"]) == (status, code), answer.text


def test_a_node_enrols_once_and_a_second_time_ends_the_session(
    node: Node, authority: Authority
) -> None:
    first = node.enrol()
    assert first.status_code == 200, first.text
    assert set(first.json()) == {"grant", "server", "hub", "offline_max_s"}
    asked = authority.sessions[node.session]["grant"]
    assert asked["address"] == "127.0.0.1"
    assert asked["job"] == node.facts["environment"]["KAKEHASHI_JOB"]
    refused(node.enrol(port=40124), 409, "replayed")
    assert authority.sessions[node.session]["alarm"]
    until("the session's end", lambda: "ends" in authority.sessions[node.session])
    assert "second time" in authority.sessions[node.session]["ends"][0]["reason"]
    record = until("the record", lambda: authority.kinds("enrol-refused"))[-1]
    assert record["detail"]["code"] == "replayed"
    assert record["person"] == "alice"


def test_the_servers_certificate_is_for_where_the_node_is(node: Node) -> None:
    answer = node.enrol().json()
    pem = answer["server"]["files"]["server.crt"]
    assert pem.startswith("-----BEGIN CERTIFICATE-----")
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectAltName"],
        input=pem,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "IP Address:127.0.0.1" in text
    assert "DNS:localhost" in text


def test_what_a_sites_root_says_is_handed_on_and_strangers_are_refused(
    hub: Hub, authority: Authority
) -> None:
    said = {"site": "here", "message": '{"witness": "pending"}', "signature": SIGNATURE}
    answer = hub.post("witness", said)
    assert (answer.status_code, answer.json()) == (200, {"jobs": []})
    assert authority.said[-1] == said
    refused(hub.post("witness", {**said, "site": "elsewhere"}), 403, "address")
    assert until("the record", lambda: authority.kinds("witness-refused"))


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"ticket": "x" * 43}, 403, "ticket"),
    ({"session": "0" * 32}, 404, "session"),
    ({"job": "1-1"}, 403, "job-not-running"),
    ({"port": 80}, 422, "malformed"),
    ({"port": 1023}, 422, "malformed"),
    ({"port": 65536}, 422, "malformed"),
    ({"port": "40123"}, 422, "malformed"),
    ({"port": True}, 422, "malformed"),
    ({"port": 40123.0}, 422, "malformed"),
    ({"host": "node1; reboot"}, 422, "malformed"),
    ({"host": "node1\n"}, 422, "malformed"),
    ({"public_key": "ssh-ed25519 AAAA"}, 422, "malformed"),
    ({"public_key": "ssh-rsa " + "A" * 68}, 422, "malformed"),
    ({"exec_prefix": "id"}, 422, "malformed"),
    ({"checks": None}, 422, "malformed"),
    ({"session": "../../v1/audit"}, 422, "malformed"),
    # Last: it also ends the start, with words for the person.
    ({"software": "0.0.1"}, 403, "version"),
]


def test_what_is_not_right_is_refused_and_recorded(node: Node, authority: Authority) -> None:
    for changes, status, code in WRONG:
        before = len(authority.kinds("enrol-refused"))
        refused(node.enrol(**changes), status, code)
        assert "grant" not in authority.sessions[node.session], changes
        record = until(
            f"record of {changes}", lambda n=before: authority.kinds("enrol-refused")[n:]
        )
        assert record[0]["detail"]["code"] == code
    assert node.document["ticket"] not in json.dumps(authority.audit)


def test_an_ended_job_gets_no_grant(node: Node, authority: Authority) -> None:
    os.kill(node.facts["pid"], signal.SIGKILL)
    until("the process's end", lambda: not Path(f"/proc/{node.facts['pid']}").exists())
    answer = node.enrol()
    # The hub may meanwhile have seen the end itself, and have forgotten the session.
    assert answer.json()["error"] in {"job-not-running", "session"}, answer.text
    assert "grant" not in authority.sessions[node.session]


def test_a_silent_store_is_said_and_a_wrong_body_is_not_read(hub: Hub, node: Node) -> None:
    hub.authority.down = True
    refused(node.enrol(), 503, "silent")
    hub.authority.down = False
    refused(hub.post("enrol", b"{"), 422, "malformed")
    refused(hub.post("enrol", b"[" * 10_000), 422, "malformed")
    too_long = json.dumps(node.request(checks=[{"x": "y" * 70_000}])).encode()
    assert hub.post("enrol", too_long).status_code >= 400
    assert requests.get(f"{hub.url}/hub/api/", timeout=5).status_code == 200


def test_another_address_is_refused_whatever_it_says_of_itself(authority: Authority) -> None:
    with serving(Authority()) as own, running_hub(own, addresses="192.0.2.0/24") as hub:
        hub.plan(mode="hold")
        alice = hub.login("alice")
        alice.spawn()
        node = Node(hub, alice)
        for headers in (
            {},
            {"X-Forwarded-For": "192.0.2.5"},
            {"X-Real-Ip": "192.0.2.5"},
            {"X-Forwarded-For": "192.0.2.5", "X-Real-Ip": "192.0.2.5"},
            {"Forwarded": "for=192.0.2.5"},
        ):
            refused(hub.post("enrol", node.request(), **headers), 403, "address")
        for call in ("renew", "leave"):
            refused(node.signed(call), 403, "address")
        records = until("the records", lambda: own.kinds("enrol-refused")[4:])
        assert records[0]["detail"]["address"] == "127.0.0.1"
        # Straight to the hub's own interface, with a payload's certificate: no better.
        alice.call("DELETE", "api/users/alice/server")


def test_guessing_is_slowed_down(node: Node) -> None:
    for _ in range(20):
        refused(node.enrol(ticket="y" * 43), 403, "ticket")
    refused(node.enrol(ticket="y" * 43), 429, "limit")
    refused(node.enrol(), 429, "limit")


def post_from(address: str, hub: Hub, call: str, body: object) -> int:
    """Post from another loopback address, which the proxy passes on, and return the status."""
    elsewhere = http.client.HTTPConnection(
        "127.0.0.1", hub.port, timeout=60, source_address=(address, 0)
    )
    elsewhere.request("POST", f"/hub/api/kakehashi/{call}", json.dumps(body))
    status = elsewhere.getresponse().status
    elsewhere.close()
    return status


def test_guessing_elsewhere_does_not_stop_the_sessions_own_node(node: Node) -> None:
    """Colleagues know a session's name from the work folder; that must not be a way to end it."""
    wrong = node.request(ticket="y" * 43)
    statuses = [post_from("127.0.0.2", node.hub, "enrol", wrong) for _ in range(22)]
    assert statuses == [403] * 20 + [429] * 2
    assert node.enrol().status_code == 200
    assert node.signed("renew").status_code == 200


def test_rubbish_does_not_fill_the_trail(hub: Hub, authority: Authority) -> None:
    before = len(authority.kinds("leave-refused"))
    statuses = [post_from("127.0.0.3", hub, "leave", {"rubbish": 1}) for _ in range(40)]
    assert statuses == [422] * 20 + [429] * 20
    post_from("127.0.0.4", hub, "leave", {"session": "0" * 32})
    until("the last record", lambda: authority.audit[-1]["detail"].get("address") == "127.0.0.4")
    assert len(authority.kinds("leave-refused")) == before + 21


def test_renewal_and_report_are_passed_on_to_the_store(node: Node, authority: Authority) -> None:
    assert node.enrol().status_code == 200
    renewed = node.signed("renew")
    assert renewed.json()["expires_at"]
    assert node.signed("leave").json() == {}
    assert authority.sessions[node.session]["report"]["witness"] == "wrapper"
    refused(
        node.hub.post("renew", {"session": node.session, "message": "{}", "signature": "AAAA"}),
        422,
        "malformed",
    )


def test_a_refusal_needs_the_ticket(node: Node, authority: Authority) -> None:
    body = {
        "session": node.session,
        "ticket": "z" * 43,
        "failures": [{"check": "fuse", "message": "no /dev/fuse"}],
    }
    refused(node.hub.post("refuse", body), 403, "ticket")
    assert "ends" not in authority.sessions[node.session]
    assert node.hub.post("refuse", {**body, "ticket": node.document["ticket"]}).json() == {}
    until("the session's end", lambda: "ends" in authority.sessions[node.session])


def test_batchspawners_endpoint_is_gone_and_the_attempt_is_recorded(
    hub: Hub, authority: Authority
) -> None:
    hub.plan(mode="serve")
    alice = hub.login("alice")
    alice.spawn()
    alice.ready()
    answer = hub.seen("answer", alice.last_session())
    token = answer["server"]["environment"]["JUPYTERHUB_API_TOKEN"]
    mark = hub.folder / "owned"
    before = len(authority.kinds("attack"))
    for address in (f"{hub.url}/hub/api/batchspawner", f"{hub.url}/hub/api/batchspawner/"):
        attempt = requests.post(
            address,
            json={"exec_prefix": f"touch {mark};", "port": 1, "job_id": "1", "cmd": ["id"]},
            headers={"Authorization": f"token {token}"},
            timeout=10,
        )
        assert attempt.status_code == 404
    record = until("the record", lambda: authority.kinds("attack")[before:])[0]
    assert record["person"] == "alice"
    # Several polls go by, at each of which batchspawner would have run it.
    seen = hub.log().count("GET /user/alice/api") + 1
    assert seen
    assert alice.server()["ready"]
    assert not mark.exists()


def test_batchspawner_alone_would_have_registered_it() -> None:
    program = (
        "import batchspawner, jupyterhub.apihandlers as a\n"
        "print([h[1].__name__ for h in a.default_handlers if 'batchspawner' in h[0]])\n"
        "import kakehashi_spawners.spawner, kakehashi_spawners.endpoints\n"
        "print([h[1].__name__ for h in a.default_handlers if 'batchspawner' in h[0]])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert out == ["['BatchSpawnerAPIHandler']", "['RetiredHandler']"]


def test_a_persons_token_ends_by_itself(hub: Hub) -> None:
    made = hub.login("alice").call("POST", "api/users/alice/tokens", json={"note": "script"})
    assert made.status_code == 201, made.text
    assert made.json()["expires_at"]


def test_a_servers_token_is_no_persons(hub: Hub, authority: Authority) -> None:
    hub.plan(mode="serve")
    alice = hub.login("alice")
    alice.spawn()
    alice.ready()
    session = alice.last_session()
    token = hub.seen("answer", session)["server"]["environment"]["JUPYTERHUB_API_TOKEN"]
    for path in ("sites", f"receipts/{session}"):
        answer = requests.get(
            f"{hub.url}/hub/api/kakehashi/{path}",
            headers={"Authorization": f"token {token}"},
            timeout=10,
        )
        assert answer.status_code == 403, answer.text
    assert requests.get(f"{hub.url}/hub/api/kakehashi/sites", timeout=10).status_code == 403
    # To have another key signed, a renewal needs the session's key, and an enrolment the ticket.
    bad = requests.post(
        f"{hub.url}/hub/api/kakehashi/enrol",
        json={"session": session, "token": token},
        headers={"Authorization": f"token {token}"},
        timeout=10,
    )
    refused(bad, 422, "malformed")
    alice.stop()
    bob = hub.login("bob")
    assert alice.call("GET", f"api/kakehashi/receipts/{session}").json()["person"] == "alice"
    refused(bob.call("GET", f"api/kakehashi/receipts/{session}"), 404, "session")


def test_the_choices_are_the_persons_own(hub: Hub) -> None:
    mine = hub.login("alice").call("GET", "api/kakehashi/sites").json()
    assert [project["id"] for project in mine["projects"]] == ["lung"]
    assert list(mine["sites"]) == ["here"]
    assert {queue["name"] for queue in mine["sites"]["here"]["queues"]} == {"local", "gone"}
    theirs = hub.login("bob").call("GET", "api/kakehashi/sites").json()
    assert [project["id"] for project in theirs["projects"]] == ["brain"]
    # The agent there does not answer: no figure, and no error either.
    assert theirs["sites"]["elsewhere"]["queues"][0]["free_gpus"] is None


def test_the_hubs_own_interface_asks_for_a_certificate(hub: Hub) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", hub.hub_port), 5) as plain,
        pytest.raises((ssl.SSLError, ConnectionResetError)),
    ):
        speak(context.wrap_socket(plain))


def speak(secured: ssl.SSLSocket) -> None:
    secured.sendall(b"GET /hub/api/ HTTP/1.0\r\n\r\n")
    assert secured.recv(100) == b"", "the hub spoke to a stranger"


def test_the_hub_imports_nothing_heavy() -> None:
    program = (
        "import sys, kakehashi_spawners.configure\n"
        "print([name for name in ('numpy', 'torch', 'pandas', 'zarr') if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "[]"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(list(Enrolment.model_fields)) | st.text(), json_values))
def test_no_body_makes_the_parser_fail_otherwise(body: dict[str, Any]) -> None:
    try:
        Enrolment.model_validate_json(json.dumps(body))
    except ValidationError:
        pass
    else:
        assert type(body["port"]) is int
        assert 1024 <= body["port"] <= 65535
