"""Tickets, grants, leases, limits and endings, on a clock of the test's own."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    load_ssh_public_identity,
)
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.errors import RefusedError
from kakehashi.store.authority.authority import MAX_REPORTS, Authority
from kakehashi.store.authority.ca import PublicKey
from tests.authority.desk import START, Desk, project

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def refused(code: str) -> Any:
    return pytest.raises(RefusedError, check=lambda error: error.code == code)


def certificate(grant: dict[str, Any]) -> SSHCertificate:
    found = load_ssh_public_identity(grant["certificate"].encode())
    assert isinstance(found, SSHCertificate)
    found.verify_cert_signature()
    return found


# Sessions


def test_projects_are_those_of_the_groups_and_unexpired(desk: Desk) -> None:
    groups = frozenset({"g-lung", "g-old", "g-brief"})
    (lung, brief) = desk.authority.projects(groups)
    assert (lung["id"], lung["series"], lung["sites"]) == ("lung", 2, ["here", "scanned"])
    assert brief["id"] == "brief"
    assert desk.authority.projects(frozenset({"g-none"})) == []
    # The last day belongs to the project; the day after does not.
    desk.now = START + 16 * 3600
    assert [p["id"] for p in desk.authority.projects(groups)] == ["lung"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"project": "brain"}, "no-project"),
        ({"project": "nothing"}, "no-project"),
        ({"project": "old"}, "project-expired"),
        ({"site": "elsewhere"}, "no-site"),
        ({"hours": 24 * 7 + 0.1}, "limit"),
        ({"software": "0.0.1"}, "software"),
    ],
)
def test_what_may_not_be_had_is_refused_and_recorded(
    desk: Desk, changes: dict[str, Any], code: str
) -> None:
    with refused(code):
        desk.create(**changes)
    (record,) = desk.records()
    assert (record.kind, record.detail["code"], record.person) == ("refused", code, "alice")


def test_sessions_of_one_person_are_counted(tmp_path: Path) -> None:
    desk = Desk(tmp_path, sessions_per_person=2)
    first, _ = desk.create(), desk.create()
    with refused("limit"):
        desk.create()
    desk.create(person="bob")
    desk.authority.end("hub", first["session"], "done", None)
    desk.create()


def test_ticket_is_kept_nowhere(desk: Desk) -> None:
    created = desk.create()
    desk.grant(created)
    for path in desk.layout.root.rglob("*"):
        if path.is_file():
            assert created["ticket"].encode() not in path.read_bytes(), path
    # The control: the session's name is found in this way.
    assert created["session"].encode() in desk.layout.audit.read_bytes()


# Grants


def test_certificate_says_what_was_granted_and_no_more(desk: Desk) -> None:
    created = desk.create()
    grant = desk.grant(created)
    cert = certificate(grant)
    assert cert.key_id == f"{created['session']}:{cert.serial}".encode()
    assert cert.serial == grant["serial"]
    assert cert.valid_principals == [b"kv-lung", b"kw-lung"]
    assert (cert.valid_after, cert.valid_before) == (START - 60, START + 900)
    assert cert.extensions == {}
    assert cert.critical_options == {b"source-address": b"192.0.2.1/32"}
    assert grant["expires_at"] == "2027-01-15T08:15:00Z"
    assert grant["ends_at"] == "2027-01-15T09:00:00Z"
    assert grant["store"]["view_account"] == "kv-lung"
    assert len(grant["manifest"]["sha256"]) == 64


def test_ends_at_counts_from_the_redemption(desk: Desk) -> None:
    created = desk.create()
    desk.now += 5 * 3600
    assert desk.grant(created)["ends_at"] == "2027-01-15T14:00:00Z"
    assert created["ends_at"] == "2027-01-16T09:00:00Z"


def test_nothing_outlasts_its_project(desk: Desk) -> None:
    created = desk.create(project="brief", hours=100)
    assert created["ends_at"] == "2027-01-16T00:00:00Z"
    desk.now = START + 16 * 3600 - 30
    grant = desk.grant(created)
    assert grant["expires_at"] == grant["ends_at"] == "2027-01-16T00:00:00Z"
    desk.now += 31
    with refused("ended"):
        desk.renew(created["session"], 1)


def test_second_redemption_ends_the_session(desk: Desk) -> None:
    created = desk.create()
    desk.grant(created)
    for _ in range(2):
        with refused("replayed"):
            desk.grant(created)
    assert desk.kinds(created["session"]) == [
        "session.created",
        "session.granted",
        "ticket.replayed",
        "session.ended",
        "ticket.replayed",
    ]
    with refused("ended"):
        desk.renew(created["session"], 1)


def test_of_many_redemptions_at_once_one_is_granted(desk: Desk) -> None:
    created = desk.create()
    # Each with an own view of the book, as two processes would have.
    desks = [Authority(desk.config, lambda: START) for _ in range(6)]
    results: list[str] = []
    ready = threading.Barrier(len(desks))

    def redeem(authority: Authority) -> None:
        mine = Desk.__new__(Desk)
        mine.authority, mine.key = authority, Ed25519PrivateKey.generate()
        ready.wait()
        try:
            mine.grant(created)
        except RefusedError as error:
            results.append(error.code)
        else:
            results.append("granted")

    threads = [threading.Thread(target=redeem, args=(authority,)) for authority in desks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["granted", *["replayed"] * 5]
    assert desk.kinds(created["session"]).count("session.granted") == 1
    assert desk.kinds(created["session"]).count("session.ended") == 1


def test_wrong_ticket_spends_nothing(desk: Desk) -> None:
    created, other = desk.create(), desk.create()
    for ticket in ("", "x" * 43, other["ticket"]):
        with refused("ticket"):
            desk.grant({**created, "ticket": ticket})
    desk.grant(created)


def test_late_ticket_is_refused_and_its_session_ends(desk: Desk) -> None:
    created = desk.create()
    desk.now += 24 * 3600
    with refused("ticket-expired"):
        desk.grant(created)
    desk.authority.sweep(4)
    with refused("ended"):
        desk.grant(created)
    assert desk.records(created["session"])[2].detail == {"reason": "never started"}


def test_another_hubs_session_is_unknown(desk: Desk) -> None:
    created = desk.create()
    with refused("unknown-session"):
        desk.grant(created, hub="other")
    desk.grant(created)
    with refused("unknown-session"):
        desk.renew(created["session"], 1, hub="other")
    with refused("unknown-session"):
        desk.authority.end("other", created["session"], "x", None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 AAAA",
        "ssh-ed25519 " + "A" * 68,
        'command="x" ssh-ed25519 ' + "A" * 68,
        "ssh-ed25519 " + "A" * 68 + "\nssh-ed25519 " + "A" * 68,
        "ssh-rsa "
        + generate_private_key(65537, 2048)
        .public_key()
        .public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        .decode()
        .split()[1],
    ],
)
def test_only_plain_ed25519_keys_are_signed(desk: Desk, text: str) -> None:
    with refused("malformed"):
        desk.grant(desk.create(), public_key=text)


@given(st.text(max_size=200))
def test_no_text_breaks_the_key_parser(text: str) -> None:
    for candidate in (text, f"ssh-ed25519 {text}"):
        with refused("malformed"):
            PublicKey.parse(candidate)


def test_project_without_a_view_is_refused(desk: Desk) -> None:
    created = desk.create()
    manifest = desk.layout.view("lung") / "manifest.json"
    text = manifest.read_text()
    for broken in (None, "", "[]", '{"files": 3}', "{"):
        manifest.unlink(missing_ok=True)
        if broken is not None:
            manifest.write_text(broken)
        with refused("no-view"):
            desk.grant(created)
    manifest.write_text(text)
    desk.grant(created)


def test_manifest_is_read_anew_when_it_was_replaced(desk: Desk) -> None:
    session = desk.granted()
    before = desk.renew(session, 1)["manifest"]["sha256"]
    assert desk.renew(session, 2)["manifest"]["sha256"] == before
    new = desk.layout.view("lung") / "manifest.new"
    new.write_text('{"files": []}')
    new.rename(desk.layout.view("lung") / "manifest.json")
    assert desk.renew(session, 3)["manifest"]["sha256"] != before


def test_address_must_be_the_sites(desk: Desk) -> None:
    site = {"addresses": ["10.1.0.0/16", "10.2.0.1/32"]}
    desk.configure(sites={"here": site})
    created = desk.create()
    with refused("address"):
        desk.grant(created, address="192.0.2.1")
    grant = desk.grant(created, address="::ffff:10.1.2.3")
    options = certificate(grant).critical_options
    assert options == {b"source-address": b"10.1.0.0/16,10.2.0.1/32"}


# Leases


def test_renewal_moves_the_lease_but_never_past_the_end(desk: Desk) -> None:
    session = desk.granted()
    serials = set()
    for counter in range(1, 5):
        desk.now += 14 * 60
        grant = desk.renew(session, counter)
        serials.add(grant["serial"])
        assert certificate(grant).valid_before <= START + 3600
    assert grant["expires_at"] == grant["ends_at"] == "2027-01-15T09:00:00Z"
    assert len(serials) == 4
    desk.now = START + 3600
    with refused("ended"):
        desk.renew(session, 9)


def test_counter_must_rise(desk: Desk) -> None:
    session = desk.granted()
    desk.renew(session, 5)
    for counter in (5, 4, 1):
        with refused("stale"):
            desk.renew(session, counter)
    desk.renew(session, 6)
    assert desk.kinds(session).count("lease.renewed") == 2
    assert desk.kinds(session).count("refused") == 3


def test_only_the_sessions_key_renews(desk: Desk) -> None:
    session = desk.granted()
    message = {"renew": session, "counter": 1}
    text, good = desk.signed(message)
    with refused("signature"):
        desk.authority.renew("hub", session, *desk.signed(message, Ed25519PrivateKey.generate()))
    for signature in ("", "????", good[:-4], good + "AAAA"):
        with refused("signature"):
            desk.authority.renew("hub", session, text, signature)
    with refused("signature"):
        desk.authority.renew("hub", session, text + " ", good)
    desk.authority.renew("hub", session, text, good)


@pytest.mark.parametrize(
    "message",
    [
        "{}",
        "[]",
        "no JSON",
        '{"renew": "S"}',
        '{"renew": "S", "counter": "1"}',
        '{"renew": "S", "counter": 1.5}',
        '{"renew": "S", "counter": true}',
        '{"renew": "S", "counter": 0}',
        '{"renew": "S", "counter": 9223372036854775808}',
        '{"renew": "S", "counter": 1, "more": 1}',
    ],
)
def test_malformed_renewals(desk: Desk, message: str) -> None:
    session = desk.granted()
    with refused("malformed"):
        desk.authority.renew("hub", session, *desk.signed(message.replace("S", session)))


def test_message_of_another_session_renews_nothing(desk: Desk) -> None:
    mine, other = desk.granted(), desk.granted()
    with refused("signature"):
        desk.authority.renew("hub", mine, *desk.signed({"renew": other, "counter": 1}))
    # Nor does a report pass for a renewal.
    report = {"report": mine, "items": [{"item": "x", "result": "gone", "detail": ""}]}
    with refused("malformed"):
        desk.authority.renew("hub", mine, *desk.signed(report))


def test_right_that_was_lost_is_not_renewed(desk: Desk) -> None:
    session = desk.granted()
    desk.configure(projects=[project("brain", "2099-01-01")])
    with refused("no-project"):
        desk.renew(session, 1)
    desk.configure(projects=[project("lung", "2099-01-01", sites=("elsewhere",))])
    with refused("no-site"):
        desk.renew(session, 1)
    desk.configure(projects=[project("lung", "2027-01-14")])
    with refused("project-expired"):
        desk.renew(session, 1)


def test_renewal_before_the_grant_is_refused(desk: Desk) -> None:
    session = desk.create()["session"]
    with refused("not-granted"):
        desk.renew(session, 1)


# Endings and receipts


def test_each_step_writes_one_record(desk: Desk) -> None:
    session = desk.granted()
    desk.renew(session, 1)
    items = [{"item": "mounts", "result": "gone", "detail": "none in\nthe namespace"}]
    desk.authority.report_wrapper("hub", session, *desk.signed({"report": session, "items": items}))
    for _ in range(2):
        desk.authority.end("hub", session, "stopped", {"state": "ended"})
        desk.authority.write_receipt(session)
    assert desk.kinds(session) == [
        "session.created",
        "session.granted",
        "lease.renewed",
        "session.reported",
        "session.ended",
        "receipt.written",
    ]


def test_ending_twice_gives_the_same_receipt(desk: Desk) -> None:
    session = desk.granted()
    desk.authority.end("hub", session, "stopped", {"state": "ended"})
    first = desk.authority.write_receipt(session)
    desk.now += 100
    desk.authority.end("hub", session, "again", {"state": "other"})
    desk.authority.sweep(0)
    assert desk.authority.write_receipt(session) == first
    assert desk.authority.receipt("hub", session) == first
    assert first["reason"] == "stopped"


def test_overdue_sessions_end_by_themselves(desk: Desk) -> None:
    session = desk.granted()
    desk.now += 3599
    desk.authority.sweep(0)
    assert desk.authority.receipt("hub", session) is None
    desk.now += 1
    desk.authority.sweep(0)
    receipt = desk.authority.receipt("hub", session)
    assert receipt is not None
    assert receipt["reason"] == "time is over"


def test_receipt_names_the_witness_of_each_item(desk: Desk) -> None:
    session = desk.granted()
    items = [{"item": "key", "result": "gone", "detail": "wiped"}]
    desk.authority.report_wrapper("hub", session, *desk.signed({"report": session, "items": items}))
    desk.authority.end("hub", session, "stopped", {"state": "ended", "exit": 0})
    receipt = desk.authority.write_receipt(session)
    found = {item["item"]: (item["witness"], item["result"]) for item in receipt["items"]}
    assert found == {
        "ticket": ("store", "gone"),
        "certificates": ("store", "gone"),
        "connections": ("store", "gone"),
        "key": ("wrapper", "gone"),
        "report of the site's root": ("none", "unknown"),
        "job": ("scheduler", "seen"),
        "GPU memory": ("none", "unknown"),
        "swap": ("none", "unknown"),
    }
    assert "claimed by the wrapper" in str(receipt["items"])


def seen(job: str | None = "7", **changes: object) -> dict[str, object]:
    items = [{"item": "/tmp", "result": "gone", "detail": "clean"}]
    message = {"witness": "site", "site": "scanned", "host": "node1", "job": job, "items": items}
    return {**message, **changes}


def test_a_receipt_waits_for_the_sites_root_where_the_site_has_an_epilog(desk: Desk) -> None:
    desk.with_epilog()
    session = desk.granted(site="scanned")
    desk.authority.end("hub", session, "node died", None)
    first = desk.authority.write_receipt(session)
    assert first["state"] == "pending"
    (said,) = [item for item in first["items"] if item["item"] == "report of the site's root"]
    assert "pending: root of the site 'scanned' has to scan the node 'node1'" in said["detail"]
    asked = desk.witness({"witness": "pending", "site": "scanned", "host": "node1"})
    assert asked == {"jobs": [{"job": "7", "session": session}]}
    desk.witness(seen())
    second = desk.authority.receipt("hub", session)
    assert second is not None
    assert (second["revision"], second["state"]) == (2, "complete")
    assert {"item": "/tmp", "witness": "site", "result": "gone", "detail": "clean"} in second[
        "items"
    ]
    asked = desk.witness({"witness": "pending", "site": "scanned", "host": "node1"})
    assert asked == {"jobs": []}


def test_a_session_that_never_reached_a_node_waits_for_nobody(desk: Desk) -> None:
    desk.with_epilog()
    session = desk.create(site="scanned")["session"]
    desk.authority.end("hub", session, "given up", None)
    assert desk.authority.write_receipt(session)["state"] == "complete"


@pytest.mark.parametrize(
    ("message", "site", "code"),
    [
        (seen(job="8"), "scanned", "unknown-job"),
        (seen(host="node2"), "scanned", "unknown-job"),
        (seen(items=None), "scanned", "malformed"),
        (seen(job=None), "scanned", "malformed"),
        (seen(site="here"), "scanned", "signature"),
        (seen(site="here"), "here", "witness"),
        (seen(site="nowhere"), "nowhere", "witness"),
    ],
)
def test_a_sites_root_speaks_of_its_own_jobs_only(
    desk: Desk, message: dict[str, object], site: str, code: str
) -> None:
    desk.with_epilog()
    desk.granted(site="scanned")
    with refused(code):
        desk.witness(message, site=site)
    assert desk.kinds()[-1] == "refused"


def test_nobody_but_the_sites_root_speaks_for_it(desk: Desk) -> None:
    desk.with_epilog()
    desk.granted(site="scanned")
    for key in (Ed25519PrivateKey.generate(), desk.key):
        with refused("signature"):
            desk.witness(seen(), key)
    assert "session.reported" not in desk.kinds()


def test_an_announced_end_comes_by_itself_and_cannot_be_renewed_away(desk: Desk) -> None:
    session = desk.granted()
    desk.authority.announce_end("hub", session, "stopped", 15)
    grant = desk.renew(session, 1)
    assert grant["expires_at"] <= "2027-01-15T08:00:17Z"
    desk.now += 17
    desk.authority.sweep(0)
    state = desk.authority.states("hub", frozenset({session, "0" * 32}))
    assert state == {session: {"state": "ended", "reason": "stopped"}}
    assert desk.authority.states("another hub", frozenset({session})) == {}


def test_a_project_that_has_not_begun_opens_nothing(desk: Desk) -> None:
    early = {**project("lung", "2099-01-01"), "starts": "2027-01-16"}
    session = desk.granted()
    desk.configure(projects=[early])
    assert desk.authority.projects(frozenset({"g-lung"})) == []
    with refused("project-not-begun"):
        desk.create()
    with refused("project-not-begun"):
        desk.renew(session, 1)
    desk.authority.sweep(0)
    assert desk.authority.states("hub", frozenset({session}))[session]["state"] == "ended"
    desk.now += 24 * 3600
    desk.create()


def test_reports_are_bounded(desk: Desk) -> None:
    session = desk.granted()
    report = desk.signed({"report": session, "items": [{"item": "x", "result": "gone"}]})
    for _ in range(MAX_REPORTS):
        desk.authority.report_wrapper("hub", session, *report)
    with refused("limit"):
        desk.authority.report_wrapper("hub", session, *report)


def test_a_wrapper_that_talks_much_does_not_silence_the_sites_root(desk: Desk) -> None:
    desk.with_epilog()
    session = desk.granted(site="scanned")
    report = desk.signed({"report": session, "items": [{"item": "x", "result": "gone"}]})
    for _ in range(MAX_REPORTS):
        desk.authority.report_wrapper("hub", session, *report)
    desk.witness(seen(items=[{"item": "/tmp", "result": "left", "detail": "a file"}]))
    desk.authority.end("hub", session, "done", None)
    items = desk.authority.write_receipt(session)["items"]
    assert {"item": "/tmp", "witness": "site", "result": "left", "detail": "a file"} in items


def test_forged_report_is_refused(desk: Desk) -> None:
    session, other = desk.granted(), desk.granted()
    report = {"report": session, "items": [{"item": "x", "result": "gone", "detail": ""}]}
    text, signature = desk.signed(report, Ed25519PrivateKey.generate())
    with refused("signature"):
        desk.authority.report_wrapper("hub", session, text, signature)
    with refused("signature"):
        desk.authority.report_wrapper("hub", other, *desk.signed(report))
    assert "session.reported" not in desk.kinds()


def test_running_session_has_no_receipt(desk: Desk) -> None:
    session = desk.granted()
    with refused("not-ended"):
        desk.authority.write_receipt(session)
    assert desk.authority.receipt("hub", session) is None


def test_revocation_of_an_ended_session_changes_nothing(desk: Desk) -> None:
    session = desk.granted()
    desk.authority.end("hub", session, "stopped", None)
    receipt = desk.authority.write_receipt(session)
    desk.authority.revoke("hub", session, "admin", "late")
    assert desk.authority.write_receipt(session) == receipt
    assert desk.kinds(session)[-1] == "session.revoked"


def test_nothing_is_granted_that_cannot_be_recorded(desk: Desk) -> None:
    from kakehashi.errors import AuditError

    created = desk.create()
    desk.layout.audit.write_bytes(desk.layout.audit.read_bytes()[:-9] + b"tampered\n")
    with pytest.raises(AuditError):
        desk.grant(created)
    kept = desk.authority._book.session(created["session"])
    assert kept is not None
    assert kept.state == "created"


def test_hubs_word_cannot_pass_for_the_stores(desk: Desk) -> None:
    desk.authority.record("hub", "session.granted", "alice", {"x": 1})
    (record,) = desk.records()
    assert record.kind == "hub.session.granted"
    assert record.session is None
    assert json.dumps(record.detail) == '{"detail": {"x": 1}, "hub": "hub"}'
