"""Grants in wrong hands, the whole way from a node: refused, and written down by the store."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kakehashi.store.authority.ca import Keys, PublicKey
from tests.lab import look
from tests.lab import portal as services
from tests.lab.hosts import wait_for
from tests.lab.intruder import GATEWAY, Intruder, Keyring, ask_store, create, redeem
from tests.lab.lab import PLATFORM, Lab

pytestmark = pytest.mark.lab

VIEW, WORK = "kv-lung-ct", "kw-lung-ct"
TANAKA, SUZUKI = "ka0001", "ka0002"
HOUR_S = 3600


@dataclass(frozen=True)
class Stolen:
    """A real grant, with its key, outside of any session."""

    session: str
    keyring: Keyring


@pytest.fixture
def stolen(lab: Lab) -> Iterator[Stolen]:
    """Open a session by the hub's own credential, and redeem its ticket by hand."""
    created = create(lab).body
    keyring = Keyring.new()
    granted = redeem(lab, created, keyring.public)
    assert granted.status == 200, granted.body
    keyring.take(granted.body)
    yield Stolen(created["session"], keyring)
    end(lab, created["session"])


def end(lab: Lab, session: str) -> None:
    """End a session as the hub does."""
    body = {"reason": "test is over"}
    assert ask_store(lab, "POST", f"/v1/sessions/{session}/end", body).status == 200


def denied(lab: Lab, session: str) -> list[tuple[str, str]]:
    """Return what the store wrote down of refused log-ins: account and reason."""
    return [
        (record["detail"]["account"], record["detail"]["reason"])
        for record in look.audit(lab)
        if record["kind"] == "connection.refused" and record.get("session") == session
    ]


def wait_denied(lab: Lab, session: str, account: str, reason: str) -> None:
    """Wait until the store has written down that it refused somebody."""
    wait_for(
        f"a record of {account}: {reason}",
        lambda: any(a == account and reason in r for a, r in denied(lab, session)),
        10,
    )


def by_sshd(lab: Lab, since: int) -> list[dict[str, Any]]:
    """Return what sshd refused by itself after so many records: their detail, and the session."""
    return [
        {**record["detail"], "session": record.get("session")}
        for record in look.audit(lab)[since:]
        if record["kind"] == "sshd.refused"
    ]


def wait_by_sshd(lab: Lab, since: int, **expected: object) -> None:
    """Wait until the store has written down that its sshd refused somebody."""
    wait_for(
        f"a record of {expected}",
        lambda: any(expected.items() <= detail.items() for detail in by_sshd(lab, since)),
        10,
    )


def test_a_grant_is_good_where_it_belongs(lab: Lab, stolen: Stolen) -> None:
    """The control of all that follow."""
    before = len(look.audit(lab))
    holder = Intruder(lab, "node1", TANAKA, stolen.keyring)
    assert "manifest.json" in holder.sftp(VIEW, "ls -1 /").stdout
    assert holder.sftp(WORK, "ls /work").returncode == 0
    assert denied(lab, stolen.session) == []
    # What comes later is read later: nothing of the log-ins before it was passed over.
    assert not Intruder(lab, "login", "root", stolen.keyring).admitted("root")
    wait_by_sshd(lab, before, reason="account", address=PLATFORM["login"], account="root")
    assert [found["account"] for found in by_sshd(lab, before)] == ["root"]


def test_a_grant_from_outside_of_its_site_is_refused(lab: Lab, stolen: Stolen) -> None:
    for host in ("login", "provider"):
        before = len(look.audit(lab))
        assert not Intruder(lab, host, "root", stolen.keyring).admitted(VIEW)
        wait_by_sshd(
            lab, before, reason="address", session=stolen.session, address=PLATFORM[host],
            account=VIEW,
        )  # fmt: skip
    assert Intruder(lab, "node1", TANAKA, stolen.keyring).admitted(VIEW)


def test_a_certificate_without_its_key_opens_nothing(lab: Lab, stolen: Stolen) -> None:
    """From another host and account behind the same gateway, which share their address."""
    before = len(look.audit(lab))
    thief = Keyring.new()
    thief.certificate, thief.host_ca = stolen.keyring.certificate, stolen.keyring.host_ca
    assert not Intruder(lab, "node2", SUZUKI, thief).admitted(VIEW)
    wait_by_sshd(lab, before, reason="plain-key", address=GATEWAY)
    # A key with no certificate is no better, and no password is asked for.
    before = len(look.audit(lab))
    thief.certificate = ""
    refused = Intruder(lab, "node2", SUZUKI, thief).sftp(VIEW, "pwd")
    assert refused.returncode != 0
    assert "Permission denied (publickey)" in refused.stderr
    wait_by_sshd(lab, before, reason="plain-key", address=GATEWAY)


def test_a_key_that_was_copied_too_works_behind_the_gateway_until_its_session_ends(
    lab: Lab, stolen: Stolen
) -> None:
    """What is not promised: nothing but the key tells hosts of one address apart.

    That is why it never leaves the keeper's memory. What the store does hold is the end.
    """
    thief = Intruder(lab, "node2", SUZUKI, stolen.keyring)
    assert thief.admitted(VIEW)
    end(lab, stolen.session)
    assert not thief.admitted(VIEW)
    wait_denied(lab, stolen.session, VIEW, "session is ended")
    # And no renewal either.
    message = json.dumps({"renew": stolen.session, "counter": 7})
    signed = {"session": stolen.session, "message": message, "signature": sign(stolen, message)}
    refused = ask_store(lab, "POST", "/v1/leases", signed)
    assert (refused.status, refused.body["error"]) == (410, "ended")


def sign(stolen: Stolen, message: str) -> str:
    """Sign as the session's keeper does."""
    return base64.b64encode(stolen.keyring.private.sign(message.encode())).decode()


def test_a_connection_that_is_open_is_closed_with_its_session(lab: Lab, stolen: Stolen) -> None:
    folder = stolen.keyring.lay(lab["node1"], TANAKA)
    link = lab["node1"].popen(
        ["ssh", "-F", "none", "-i", f"{folder}/key", "-o", "IdentitiesOnly=yes", "-o",
         f"CertificateFile={folder}/key-cert.pub", "-o", f"UserKnownHostsFile={folder}/known",
         "-s", f"{VIEW}@store", "sftp"],
        user=TANAKA, stdin=-1, stdout=-1, stderr=-1,
    )  # fmt: skip
    wait_for("the connection", lambda: len(look.store_connections(lab)) == 1)
    started = time.monotonic()
    ask_store(lab, "POST", f"/v1/sessions/{stolen.session}/revoke", {"by": "a", "reason": "b"})
    wait_for("its end", lambda: link.poll() is not None, 5)
    assert time.monotonic() - started < 5
    link.communicate()


def test_another_project_stays_closed(lab: Lab, stolen: Stolen) -> None:
    intruder = Intruder(lab, "node1", TANAKA, stolen.keyring)
    for account in ("kv-brain-mr", "kw-brain-mr", "kv-sarcoma"):
        assert not intruder.admitted(account)
        wait_denied(lab, stolen.session, account, "another project")
    before = len(look.audit(lab))
    for account in ("root", "kakehashi", TANAKA):
        assert not intruder.admitted(account)
        wait_by_sshd(lab, before, reason="account", address=GATEWAY, account=account)
    # Nor does a way lead there from within the own one.
    assert intruder.sftp(VIEW, "ls ../../brain-mr").returncode != 0
    assert intruder.sftp(VIEW, "ls /srv/kakehashi/views/brain-mr").returncode != 0
    assert intruder.admitted(VIEW)


def test_no_shell_no_forward_no_write(lab: Lab, stolen: Stolen) -> None:
    before = len(look.audit(lab))
    intruder = Intruder(lab, "node1", TANAKA, stolen.keyring)
    for account in (VIEW, WORK):
        for options in ([], ["-tt"]):
            shell = intruder.ssh(account, options, ["id"], "id\n")
            assert "uid=" not in shell.stdout
        for target in ("127.0.0.1:8470", "10.77.1.10:8000", "10.77.1.30:9400"):
            forward = intruder.ssh(account, ["-W", target], [], "GET / HTTP/1.0\r\n\r\n")
            assert forward.returncode != 0
            assert "administratively prohibited" in forward.stderr
        reverse = ["-N", "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:22"]
        assert intruder.ssh(account, reverse, []).returncode != 0
    for attempt in ("put /etc/hostname /x", "rm /manifest.json", "mkdir /x", "chmod 777 /series",
                    "rename /manifest.json /m", "symlink /etc/passwd /x"):  # fmt: skip
        assert intruder.sftp(VIEW, attempt).returncode != 0, attempt
    # The control: what is meant to be written can be.
    name = secrets.token_hex(4)
    done = intruder.sftp(WORK, f"put /etc/hostname /work/{name}", f"rm /work/{name}")
    assert done.returncode == 0, done.stderr
    for account in (VIEW, WORK):
        for reason in ("command", "terminal", "forward", "reverse-forward"):
            wait_by_sshd(
                lab, before, reason=reason, session=stolen.session, account=account,
                address=GATEWAY,
            )  # fmt: skip


def certificate(folder: Path, stolen: Stolen, *, begins: float, ends: int) -> str:
    """Sign the stolen key with some authority's key."""
    signed = Keys(folder).sign_user(
        PublicKey.parse(stolen.keyring.public),
        session=stolen.session,
        accounts=(VIEW, WORK),
        now=begins,
        expires_at=ends,
        sources=(f"{GATEWAY}/32",),
    )
    return signed.certificate


@pytest.mark.parametrize("kind", ["forged", "expired", "over-long", "from elsewhere"])
def test_a_certificate_that_the_store_did_not_give_is_refused(
    lab: Lab, stolen: Stolen, tmp_path: Path, kind: str
) -> None:
    # Only a forger has a key of their own; the others stand for the authority's key in wrong hands.
    folder = lab["store"].path("/srv/kakehashi/authority/keys")
    now = time.time()
    if kind == "forged":
        Keys.create(tmp_path)
        folder = tmp_path
    begins, ends = {
        "forged": (now, int(now) + HOUR_S),
        "expired": (now - 2 * HOUR_S, int(now) - 1),
        "over-long": (now, int(now) + 10 * 365 * 24 * HOUR_S),
        "from elsewhere": (now, int(now) + HOUR_S),
    }[kind]
    before = len(look.audit(lab))
    real = stolen.keyring.certificate
    stolen.keyring.certificate = certificate(folder, stolen, begins=begins, ends=ends)
    host = "login" if kind == "from elsewhere" else "node1"
    user = "root" if kind == "from elsewhere" else TANAKA
    assert not Intruder(lab, host, user, stolen.keyring).admitted(VIEW)
    # Only what somebody else signed is no word of the authority; the book has heard of none.
    wait_by_sshd(
        lab, before, reason="authority" if kind == "forged" else "lease", account=VIEW,
        address=PLATFORM["login"] if kind == "from elsewhere" else GATEWAY,
    )  # fmt: skip
    if kind == "over-long":
        # sshd itself would have let it in.
        wait_denied(lab, stolen.session, VIEW, "unknown certificate")
    stolen.keyring.certificate = real
    assert Intruder(lab, "node1", TANAKA, stolen.keyring).admitted(VIEW)


def test_a_revoked_certificate_is_refused_though_it_has_not_expired(
    lab: Lab, stolen: Stolen
) -> None:
    assert Intruder(lab, "node1", TANAKA, stolen.keyring).admitted(VIEW)
    services.kakehashi(
        lab["store"],
        ["revoke", "--session", stolen.session, "--by", "operator", "--reason", "rehearsal"],
    )
    assert not Intruder(lab, "node1", TANAKA, stolen.keyring).admitted(VIEW)
    wait_denied(lab, stolen.session, VIEW, "session is ended")
    kinds = [r["kind"] for r in look.audit(lab) if r.get("session") == stolen.session]
    assert "session.revoked" in kinds
