"""The hub against the people who use it, and the store against a hub in wrong hands."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from kakehashi import __version__
from tests.lab import look
from tests.lab import portal as services
from tests.lab.client import Client
from tests.lab.hosts import wait_for
from tests.lab.intruder import Keyring, ask_store, create, redeem
from tests.lab.lab import Lab
from tests.lab.test_attacks import WALLS, post_from_node, server_token

pytestmark = pytest.mark.lab

People = Callable[[str], Client]
PLAIN = {"site": "slurm", "queue": "gpu", "gpus": 0, "hours": 1.0, "project": "lung-ct"}
TANAKA, SUZUKI = "ka0001", "ka0002"
ACCOUNTS = "/var/lib/provider/accounts.json"
REFUSED = {401, 403, 404, 405, 422}

# What a person of the portal has no business with: method, path, body.
BEYOND = [
    ("GET", "/hub/api/users", None),
    ("POST", "/hub/api/users", {"usernames": ["mallory"]}),
    ("GET", "/hub/api/users/suzuki", None),
    ("PATCH", "/hub/api/users/suzuki", {"admin": True}),
    ("PATCH", "/hub/api/users/{name}", {"admin": True}),
    ("DELETE", "/hub/api/users/suzuki", None),
    ("POST", "/hub/api/users/suzuki/server", PLAIN),
    ("DELETE", "/hub/api/users/suzuki/server", None),
    ("GET", "/hub/api/users/suzuki/server/progress", None),
    ("POST", "/hub/api/users/suzuki/servers/other", PLAIN),
    ("POST", "/hub/api/users/{name}/servers/other", PLAIN),
    ("GET", "/hub/api/users/suzuki/tokens", None),
    ("POST", "/hub/api/users/suzuki/tokens", {}),
    ("POST", "/hub/api/users/suzuki/shares", {}),
    ("GET", "/hub/api/groups", None),
    ("POST", "/hub/api/groups/brain-mr", None),
    ("POST", "/hub/api/groups/brain-mr/users", {"users": ["{name}"]}),
    ("POST", "/hub/api/groups/portal-admins/users", {"users": ["{name}"]}),
    ("GET", "/hub/api/services", None),
    ("GET", "/hub/api/proxy", None),
    ("POST", "/hub/api/proxy", {}),
    ("PATCH", "/hub/api/proxy", {"port": 9999}),
    ("POST", "/hub/api/shutdown", {"proxy": True, "servers": True}),
    ("GET", "/hub/admin", None),
    ("POST", "/hub/api/kakehashi/enrol", {}),
    ("GET", "/hub/api/kakehashi/receipts/" + "0" * 32, None),
]
ROLES = [
    {"roles": ["admin"]},
    {"roles": ["server"]},
    {"roles": ["portal-operator"]},
    {"scopes": ["admin:users"]},
    {"scopes": ["access:servers"]},
    {"scopes": ["access:servers!user=suzuki"]},
    {"scopes": ["list:users", "self"]},
    {"scopes": ["tokens!user=suzuki"]},
    {"scopes": ["proxy"]},
    {"scopes": ["shutdown"]},
]


def with_token(lab: Lab, token: str, method: str, path: str, body: object) -> requests.Response:
    """Call the portal with a token and no cookie."""
    with requests.Session() as http:
        http.trust_env = False
        return http.request(
            method,
            lab.url + path,
            json=body,
            headers={"Authorization": f"token {token}"},
            verify=str(lab.ca_file),
            timeout=20,
            allow_redirects=False,
        )


def for_person(name: str, value: Any) -> Any:
    """Put a person's name where it belongs."""
    return json.loads(json.dumps(value).replace("{name}", name))


def test_a_person_does_at_the_hub_what_is_their_own_and_no_more(lab: Lab, person: People) -> None:
    tanaka, suzuki = person("tanaka"), person("suzuki")
    suzuki.start({**PLAIN, "project": "brain-mr"})
    tanaka.start(PLAIN)
    with tanaka.kernel() as kernel:
        of_server = server_token(kernel)
    made = tanaka.call("POST", "/hub/api/users/tanaka/tokens", {"expires_in": 600})
    assert made.status_code in {200, 201}, made.text
    own = made.json()["token"]
    calls = {
        "cookie": lambda method, path, body: tanaka.call(
            method, path, body, allow_redirects=False, timeout=20
        ),
        "token": lambda method, path, body: with_token(lab, own, method, path, body),
        "server": lambda method, path, body: with_token(lab, of_server, method, path, body),
    }
    for way, call in calls.items():
        for method, path, body in BEYOND:
            answer = call(method, path.format(name="tanaka"), for_person("tanaka", body))
            # Some lists answer, with oneself alone in them.
            if answer.status_code == 200 and method == "GET" and path == "/hub/api/users":
                assert [user["name"] for user in answer.json()] == ["tanaka"]
                continue
            assert answer.status_code in REFUSED | {400, 409, 302}, (way, method, path, answer.text)
            if answer.status_code == 302:
                assert "/hub/login" in answer.headers["Location"], (way, path)
        for role in ROLES:
            answer = call("POST", "/hub/api/users/tanaka/tokens", role)
            if answer.status_code == 201:
                # A token may carry less than its person may do, never more.
                scopes = answer.json()["scopes"]
                assert [one for one in scopes if "tanaka" not in one] == [], (way, role, scopes)
                assert role == {"roles": ["server"]}
            else:
                assert answer.status_code in {400, 403, 404}, (way, role, answer.text)
    # The server's token, which code in the session holds, starts and ends nothing and makes none.
    for method, path, body in (
        ("POST", "/hub/api/users/tanaka/server", PLAIN),
        ("DELETE", "/hub/api/users/tanaka/server", None),
        ("POST", "/hub/api/users/tanaka/tokens", {}),
        ("GET", "/hub/api/kakehashi/sites", None),
    ):
        answer = with_token(lab, of_server, method, path, body)
        assert answer.status_code in REFUSED, (method, path, answer.text)
    # The controls: all is as it was, and what is one's own is there.
    assert tanaka.server() is not None
    assert suzuki.server() is not None
    seen = with_token(lab, own, "GET", "/hub/api/user", None).json()
    assert seen["name"] == "tanaka"
    assert not seen.get("admin")
    assert seen["groups"] == ["lung-ct"]
    assert with_token(lab, own, "GET", "/hub/api/kakehashi/sites", None).status_code == 200


def test_one_persons_token_reaches_no_other_persons_server_or_grant(
    lab: Lab, person: People
) -> None:
    tanaka, suzuki = person("tanaka"), person("suzuki")
    tanaka.start(PLAIN)
    (session,) = look.open_sessions(lab)
    suzuki.start({**PLAIN, "project": "brain-mr"})
    with suzuki.kernel() as kernel:
        token = server_token(kernel)
    for path in ("/user/tanaka/api/contents", "/user/tanaka/lab", "/user/tanaka/api/kernels"):
        assert with_token(lab, token, "GET", path, None).status_code in {302, 403, 404}
    before = len(look.audit(lab))
    public = Keyring.new().public
    body = {"session": session, "ticket": token, "public_key": public, "port": 5555,
            "host": "node1", "job": "1", "software": __version__, "checks": [],
            **WALLS}  # fmt: skip
    for ticket in (token, secrets.token_urlsafe(32)):
        forged = {**body, "ticket": ticket}
        status, text = post_from_node(lab, "/hub/api/kakehashi/enrol", forged, token)
        assert status in {403, 422}, text
    message = json.dumps({"renew": session, "counter": 10**6})
    forged_signature = base64.b64encode(secrets.token_bytes(64)).decode()
    signed = {"session": session, "message": message, "signature": forged_signature}
    for path in ("renew", "leave"):
        status, text = post_from_node(lab, f"/hub/api/kakehashi/{path}", signed, token)
        assert status == 403, text
    wait_for(
        "all three refusals in the audit",
        lambda: (
            {"hub.enrol-refused", "hub.renew-refused", "hub.leave-refused"}
            <= {record["kind"] for record in look.audit(lab)[before:]}
        ),
    )
    # The control: the session of the other is untouched.
    assert session in look.open_sessions(lab)
    assert tanaka.server() is not None


def test_a_ticket_is_worth_nothing_before_its_job_runs_or_beside_it(
    lab: Lab, person: People
) -> None:
    tanaka = person("tanaka")
    drained = "nodename=node[1-2]"
    lab["head"].run(["scontrol", "update", drained, "state=drain", "reason=test"])
    try:
        answer = tanaka.call("POST", "/hub/api/users/tanaka/server", PLAIN)
        assert answer.status_code in {201, 202}
        wait_for("the job", lambda: bool(queued(lab)), 30)
        job = queued(lab)
        # Another account may not read the script; the account itself may.
        show = ["scontrol", "write", "batch_script", job, "-"]
        assert "ticket" not in lab["login"].run(show, user=SUZUKI, check=False).stdout
        script = lab["login"].run(show, user=TANAKA).stdout
        document = json.loads(next(line for line in script.splitlines() if line[:1] == "{"))
        body = {"session": document["session"], "ticket": document["ticket"],
                "public_key": Keyring.new().public, "port": 5555, "host": "node1", "job": job,
                "software": __version__, "checks": [],
            **WALLS}  # fmt: skip
        before = len(look.audit(lab))
        status, text = post_from_node(lab, "/hub/api/kakehashi/enrol", body)
        assert (status, json.loads(text)["error"]) == (403, "job-not-running")
        status, text = post_from_node(lab, "/hub/api/kakehashi/enrol", {**body, "job": "1"})
        assert (status, json.loads(text)["error"]) == (403, "job-not-running")
        wait_for(
            "the refusals in the audit",
            lambda: (
                [record["kind"] for record in look.audit(lab)[before:]].count("hub.enrol-refused")
                == 2
            ),
        )
    finally:
        lab["head"].run(["scontrol", "update", drained, "state=resume"])
    # The control: the ticket was not spent by that.
    tanaka.wait_ready()


def queued(lab: Lab) -> str:
    """Return the job of the person under test."""
    done = lab["login"].run(["squeue", "--noheader", "--user", TANAKA, "--format=%i"])
    return done.stdout.strip()


# A hub in wrong hands


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"hours": 24 * 7 + 1}, 403, "limit"),
        ({"project": "unheard-of"}, 403, "no-project"),
        ({"project": "brain-mr"}, 403, "no-project"),
        ({"groups": []}, 403, "no-project"),
        ({"site": "mallory"}, 403, "no-site"),
        ({"software": "9.9"}, 403, "software"),
        ({"kind": "batch"}, 422, "malformed"),
        ({"hours": -1}, 422, "malformed"),
        ({"project": "../lung-ct"}, 422, "malformed"),
        ({"project": "lung-ct\n#SBATCH --account=root"}, 422, "malformed"),
        ({"person": "tanaka\nsession.granted"}, 422, "malformed"),
        ({"lease_minutes": 999}, 422, "malformed"),
    ],
)
def test_a_hub_gets_no_session_beyond_the_stores_own_rules(
    lab: Lab, change: dict[str, object], status: int, code: str
) -> None:
    before = len(look.audit(lab))
    refused = create(lab, **change)
    assert (refused.status, refused.body["error"]) == ({"limit": 429}.get(code, status), code)
    assert not look.open_sessions(lab)
    records = [r for r in look.audit(lab)[before:] if r["kind"] == "refused"]
    assert [r["detail"]["code"] for r in records] == [code]


@pytest.fixture
def opened(lab: Lab) -> Iterator[dict[str, Any]]:
    """Open a session at the store as the hub does."""
    created = create(lab)
    assert created.status == 200
    yield created.body
    ask_store(lab, "POST", f"/v1/sessions/{created.body['session']}/end", {"reason": "test"})


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"address": "192.0.2.9"}, "address"),
        ({"address": "10.77.1.10"}, "address"),
        ({"ticket": "A" * 43}, "ticket"),
        ({"public_key": "ssh-rsa AAAAB3NzaC1yc2E="}, "malformed"),
        ({"software": "9.9"}, "software"),
    ],
)
def test_a_hub_gets_no_grant_beyond_the_stores_own_rules(
    lab: Lab, opened: dict[str, Any], change: dict[str, object], code: str
) -> None:
    change, before = dict(change), len(look.audit(lab))
    key = str(change.pop("public_key", Keyring.new().public))
    refused = redeem(lab, opened, key, **change)
    assert refused.body["error"] == code, refused.body
    assert "certificate" not in refused.body
    records = [r for r in look.audit(lab)[before:] if r["kind"] == "refused"]
    assert [r["detail"]["code"] for r in records] == [code]
    # The control: without that change it is a grant, and none lasts longer than the limit.
    granted = redeem(lab, opened, Keyring.new().public)
    assert granted.status == 200, granted.body


def test_a_hub_opens_no_more_sessions_for_a_person_than_allowed(lab: Lab) -> None:
    opened = []
    try:
        for _ in range(4):
            created = create(lab)
            assert created.status == 200, created.body
            opened.append(created.body["session"])
        refused = create(lab)
        assert (refused.status, refused.body["error"]) == (429, "limit")
    finally:
        for session in opened:
            ask_store(lab, "POST", f"/v1/sessions/{session}/end", {"reason": "test"})


def test_a_hub_cannot_write_the_stores_words_or_touch_another_hubs_sessions(
    lab: Lab, opened: dict[str, Any]
) -> None:
    forged = {"kind": "session.granted", "person": "tanaka", "detail": {"serial": 1}}
    seq = ask_store(lab, "POST", "/v1/audit", forged).body["seq"]
    record = next(r for r in look.audit(lab) if r["seq"] == seq)
    assert record["kind"] == "hub.session.granted"
    # Nor speak for a site's root: it has not the key.
    said = {"witness": "site", "site": "slurm", "host": "node1", "job": "1", "items": []}
    word = {"site": "slurm", "message": json.dumps(said), "signature": secrets.token_urlsafe(48)}
    refused = ask_store(lab, "POST", "/v1/witness", word)
    assert (refused.status, refused.body["error"]) == (403, "signature")
    # A second hub: the first one's session is as one that never was.
    token = services.kakehashi(lab["store"], ["store", "hub-add", "second"]).stdout.split()[-1]
    for path, body in (
        (f"/v1/sessions/{opened['session']}/end", {"reason": "x"}),
        (f"/v1/sessions/{opened['session']}/revoke", {"by": "x", "reason": "x"}),
        (f"/v1/sessions/{opened['session']}/ending", {"reason": "x", "grace_s": 0}),
    ):
        answer = ask_store(lab, "POST", path, body, token=token)
        assert (answer.status, answer.body["error"]) == (404, "unknown-session"), path
    assert opened["session"] in look.open_sessions(lab)
    nobody = ask_store(lab, "GET", "/v1/version", token=secrets.token_urlsafe(32))
    assert (nobody.status, nobody.body["error"]) == (401, "credential")


# A hostile provider


HOSTILE_GROUPS = [
    "../lung-ct",
    "lung-ct\n",
    "lung-ct' OR '1'='1",
    "lung-ct\n#SBATCH --partition=other",
    "<script>alert(1)</script>",
    "LUNG-CT",
    "portal-admins ",
    "role:admin",
    "\u202elung-ct",
    "x" * 5000,
]


@pytest.fixture
def accounts(lab: Lab) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Give a way to change what the identity provider says of somebody."""
    path = lab["provider"].path(ACCOUNTS)
    whole = path.read_text()

    def change(name: str, values: dict[str, Any]) -> None:
        known = json.loads(path.read_text())
        known[name] = {**known["kimura"], **values}
        part = path.with_name("accounts.part")
        part.write_text(json.dumps(known))
        part.rename(path)

    yield change
    path.write_text(whole)


def test_a_providers_hostile_groups_open_no_project(
    lab: Lab, accounts: Callable[[str, dict[str, Any]], None]
) -> None:
    before = len(look.audit(lab))
    accounts("kimura", {"groups": HOSTILE_GROUPS})
    kimura = Client(lab.url, "kimura", str(lab.ca_file))
    page = kimura.log_in()
    assert page.status_code == 403
    assert "<script>alert(1)" not in page.text
    assert kimura.call("GET", "/hub/api/user").status_code in {401, 403}
    wait_for(
        "the refusal in the audit",
        lambda: any("refused" in record["kind"] for record in look.audit(lab)[before:]),
    )
    # The control: with the right group among them the same person has that project alone.
    accounts("kimura", {"groups": [*HOSTILE_GROUPS, "lung-ct"]})
    kimura = Client(lab.url, "kimura", str(lab.ca_file))
    assert kimura.log_in().status_code == 200
    seen = kimura.call("GET", "/hub/api/user").json()
    assert not seen.get("admin")
    assert "list:users" not in seen.get("scopes", [])
    choices = kimura.call("GET", "/hub/api/kakehashi/sites").json()
    # Without an account at a site there is nothing to choose, but nothing foreign either.
    assert [project["id"] for project in choices["projects"]] in ([], ["lung-ct"])


@pytest.mark.parametrize(
    "name", ["../suzuki", "a b", "tanaka\nsuzuki", "<b>tanaka</b>", "-rf", "ta;id", "x" * 65]
)
def test_a_providers_hostile_name_is_nobody_here(
    lab: Lab, accounts: Callable[[str, dict[str, Any]], None], name: str
) -> None:
    accounts(name, {"password": "known", "groups": ["lung-ct"]})
    mallory = Client(lab.url, name, str(lab.ca_file))
    page = mallory.log_in("known")
    assert page.status_code in {400, 403}, page.text[:300]
    assert f"{name}" not in page.text or "<" not in name
    assert mallory.call("GET", "/hub/api/user").status_code in {401, 403}


# Names of series


SERIES = [
    "..%2f..%2fetc%2fpasswd",
    "..",
    "1.2.3%00",
    "1.2.3%0a%23SBATCH",
    "'%20OR%20'1'='1",
    "%2e%2e%2f%2e%2e%2fbrain-mr",
]


def test_tricks_in_the_names_of_series_read_nothing(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    tanaka.start(PLAIN)
    tanaka.enter_lab()
    for name in SERIES:
        answer = tanaka.call("GET", f"/user/tanaka/kakehashi/series/{name}")
        assert answer.status_code in {400, 403, 404}, (name, answer.text[:200])
        assert "root:" not in answer.text
    with tanaka.kernel() as kernel:
        for name in ("../../etc/passwd", "1.2\n#SBATCH", "'", '"', "/etc/passwd", "..", ""):
            ran = kernel.run(f"__import__('kakehashi').Store().series({name!r}).array[0]")
            assert ran.error is not None, name
            ran = kernel.run(f"open('/store/series/' + {name!r} + '/../../../etc/shadow').read()")
            assert ran.error is not None, name
        # The control: a name of the cohort is read.
        assert kernel.value(
            "(lambda s: s.series(s.cohort[0].uid).array.size)(__import__('kakehashi').Store())"
        )
