"""``kakehashi store init``, ``hub-add``, ``revoke``, ``audit`` and ``receipt``."""

from __future__ import annotations

import json
import os
import pwd
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kakehashi.config import Config
from kakehashi.errors import ConfigError, StoreError
from kakehashi.store.authority import sshd
from kakehashi.store.authority.layout import Names
from tests.authority.real import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.authority.real import RealStore

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")


def kakehashi(store: RealStore, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kakehashi.cli", *arguments],
        env={"KAKEHASHI_CONFIG": str(store.config_path), "COLUMNS": "300", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# init


@needs_root
def test_everything_has_its_owner_and_mode(store: RealStore) -> None:
    layout, authority = store.layout, store.account
    expected = {
        layout.root: ("root", 0o755),
        layout.root / "views": ("root", 0o755),
        layout.view("lung"): ("root", 0o750),
        layout.work("lung"): ("root", 0o750),
        layout.work("lung") / "work": (store.work(), 0o700),
        layout.principals: ("root", 0o755),
        layout.sshd / "sshd_config": ("root", 0o644),
        layout.sshd / "host_key": ("root", 0o600),
        layout.log: ("root", 0o710),
        layout.sshd_log: ("root", 0o640),
        layout.authority: (authority, 0o700),
        layout.keys / "user_ca": (authority, 0o600),
        layout.keys / "host_ca": (authority, 0o600),
        layout.keys / "receipt": (authority, 0o600),
        layout.hubs / "hub": (authority, 0o600),
        layout.book: (authority, 0o600),
        layout.audit: (authority, 0o600),
    }
    for path, (owner, mode) in expected.items():
        status = path.stat()
        assert pwd.getpwuid(status.st_uid).pw_name == owner, path
        assert stat.S_IMODE(status.st_mode) == mode, path


@needs_root
def test_init_again_keeps_keys_book_and_sessions(store: RealStore) -> None:
    session, node, _ = store.session()
    kept = [
        store.layout.keys / "user_ca",
        store.layout.sshd / "host_key",
        store.layout.hubs / "hub",
    ]
    before = [path.read_bytes() for path in kept]
    again = kakehashi(store, "store", "init")
    assert again.returncode == 0, again.stderr
    assert [path.read_bytes() for path in kept] == before
    assert node.admitted(store.view())
    store.hub.renew(session, node, 1).ok()


@needs_root
def test_accounts_have_no_password_and_no_shell(store: RealStore) -> None:
    for name in (store.account, store.view(), store.work()):
        assert pwd.getpwnam(name).pw_shell == "/usr/sbin/nologin"
        shadow = subprocess.run(
            ["getent", "shadow", name], capture_output=True, text=True, check=True
        )
        assert shadow.stdout.split(":")[1] == "*"


@needs_root
def test_foreign_account_of_the_name_is_left_alone(store: RealStore) -> None:
    changed = Config.model_validate(
        {
            **store.config.model_dump(),
            "store": {**store.config.need_store().model_dump(), "root": store.home / "other"},
        }
    )
    with pytest.raises(StoreError, match="belongs to something else"):
        sshd.initialise(changed)


@needs_root
def test_root_where_others_may_write_is_refused(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"store": {"root": tmp_path / "s", "address": "x", "account_prefix": "tnever"}}
    )
    with pytest.raises(ConfigError, match=r"store\.root lies under"):
        sshd.initialise(config)
    assert not (tmp_path / "s").exists()
    with pytest.raises(KeyError):
        pwd.getpwnam("tneverauthority")


def test_names_that_linux_would_not_take_are_refused_in_time() -> None:
    assert Names("k").view("x" * 28) == "kv-" + "x" * 28
    with pytest.raises(ConfigError, match="Shorten"):
        Names("k123").view("x" * 28)


@needs_root
def test_sshd_takes_the_configuration(store: RealStore) -> None:
    path = store.layout.sshd / "sshd_config"
    good = subprocess.run(["/usr/sbin/sshd", "-t", "-f", str(path)], check=False)
    assert good.returncode == 0
    who = f"user={store.view()},host=x,addr=127.0.0.1"
    shown = subprocess.run(
        ["/usr/sbin/sshd", "-T", "-f", str(path), "-C", who],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in (
        "forcecommand internal-sftp -R",
        "chrootdirectory %h",
        "disableforwarding yes",
        "permittty no",
        "authorizedkeysfile none",
        "passwordauthentication no",
        "usepam no",
        "permitrootlogin no",
    ):
        assert line in shown, line


# hub-add and revoke


@needs_root
def test_hub_add_prints_a_credential_that_works(store: RealStore) -> None:
    made = kakehashi(store, "store", "hub-add", "third")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert len(token) >= 43
    assert token not in (store.layout.hubs / "third").read_text()
    store.hub.__class__(store.http_port, token).call("GET", "/v1/version").ok()
    assert kakehashi(store, "store", "hub-add", "../evil").returncode == 1


@needs_root
def test_revocation_by_hand_works_with_the_authority_dead(store: RealStore) -> None:
    session, node, _ = store.session()
    authority = store.pid("authority")
    os.kill(authority, signal.SIGSTOP)
    try:
        with node.connected(store.view()) as link:
            arguments = ["revoke", "--session", session, "--by", "admin", "--reason", "left"]
            done = kakehashi(store, *arguments)
            assert done.returncode == 0, done.stderr
            # It waits until the store has seen them closed.
            assert "1 session(s) and 1 connection(s) ended in " in done.stdout
            assert "; 0 of their connections still stand" in done.stdout
            link.closed_after(2)
    finally:
        os.kill(authority, signal.SIGCONT)
    (record,) = store.records(session, "session.revoked")
    assert record.detail == {"by": "admin", "reason": "left"}
    unknown = kakehashi(store, "revoke", "--session", "0" * 32, "--by", "a", "--reason", "b")
    assert unknown.returncode == 1
    assert "no such session" in unknown.stderr
    for words in ([], ["--person", "alice", "--all"]):
        assert kakehashi(store, "revoke", *words, "--by", "a", "--reason", "b").returncode == 2


@needs_root
@pytest.mark.parametrize(
    ("words", "others"),
    [(["--person", "alice"], True), (["--site", "here"], False), (["--all"], False)],
)
def test_kill_switches_cut_at_once_and_hold_until_lifted(
    store: RealStore, words: list[str], others: bool
) -> None:
    session, node, _ = store.session(person="alice")
    another, elsewhere, _ = store.session(person="bob")
    operator = ["--by", "admin", "--reason", "stolen laptop"]
    with node.connected(store.view()) as link, elsewhere.connected(store.view()) as second:
        done = kakehashi(store, "revoke", *words, *operator)
        assert done.returncode == 0, done.stderr
        link.closed_after(2)
        if others:
            second.ask()
            store.hub.renew(another, elsewhere, 1).ok()
        else:
            second.closed_after(2)
    try:
        store.hub.renew(session, node, 1).refused(410, "ended")
        refused = store.hub.create(person="alice")
        refused.refused(403, "blocked")
        assert "stolen laptop" in refused.body["message"]
        (listed,) = json.loads(kakehashi(store, "blocks", "--json").stdout)
        assert (listed["by"], listed["reason"]) == ("admin", "stolen laptop")
    finally:
        lifted = kakehashi(store, "allow", *words, "--by", "admin")
    assert lifted.returncode == 0, lifted.stderr
    store.hub.create(person="alice").ok()
    assert kakehashi(store, "allow", *words, "--by", "admin").returncode == 1
    assert [record.detail["by"] for record in store.records(kind="right.allowed")][-1] == "admin"


# audit and receipt


@needs_root
def test_audit_verify_and_show(store: RealStore) -> None:
    session, _, _ = store.session(person="[bold]花子")
    store.hub.end(session).ok()
    good = kakehashi(store, "audit", "verify", "--json")
    assert good.returncode == 0, good.stdout
    verdict = json.loads(good.stdout)
    assert verdict["ok"] is True
    assert verdict["anchored"] >= verdict["lines"] - 2
    shown = kakehashi(store, "audit", "show", "--session", session)
    assert shown.returncode == 0, shown.stderr
    assert "session.granted" in shown.stdout
    assert "[bold]花子" in shown.stdout
    last = kakehashi(store, "audit", "show", "--tail", "1").stdout
    assert len([line for line in last.splitlines() if "T" in line and "Z" in line]) == 1


@needs_root
def test_audit_verify_names_the_changed_line(fresh: RealStore) -> None:
    session, _, _ = fresh.session()
    fresh.hub.end(session).ok()
    fresh.stop()
    whole = fresh.layout.audit.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert kakehashi(fresh, "audit", "verify").returncode == 0

    fresh.layout.audit.write_bytes(whole.replace(b'"person":"alice"', b'"person":"mallo"', 1))
    changed = kakehashi(fresh, "audit", "verify", "--json")
    assert changed.returncode == 1
    assert [p["line"] for p in json.loads(changed.stdout)["problems"]] == [2]

    # Cut off behind the anchor: the head in the receipt tells.
    fresh.layout.audit.write_bytes(b"".join(lines[:3]))
    cut = kakehashi(fresh, "audit", "verify")
    assert cut.returncode == 1
    assert "cut off" in cut.stdout

    fresh.layout.audit.write_bytes(whole)
    (fresh.home / "elsewhere" / "anchor").unlink()
    missing = kakehashi(fresh, "audit", "verify")
    assert missing.returncode == 1
    assert "anchor" in missing.stdout


@needs_root
def test_receipt_show_and_list(store: RealStore) -> None:
    session, node, _ = store.session(person="花子")
    with node.connected(store.work()):
        store.hub.end(session).ok()
    shown = kakehashi(store, "receipt", "show", session)
    assert shown.returncode == 0, shown.stderr
    for text in ("花子", "not observable", "the store itself", "by the store", "did not report"):
        assert text in shown.stdout, text
    listed = kakehashi(store, "receipt", "list")
    assert session in listed.stdout
    document = json.loads(kakehashi(store, "receipt", "show", session, "--json").stdout)
    assert document["state"] == "complete"

    path = store.layout.receipts / f"{session}.json"
    whole = path.read_text()
    path.write_text(whole.replace('"gone"', '"left"', 1))
    forged = kakehashi(store, "receipt", "show", session)
    assert forged.returncode == 1
    assert "signature" in forged.stderr
    assert kakehashi(store, "audit", "verify").returncode == 1
    path.write_text(whole)
    assert kakehashi(store, "receipt", "show", session).returncode == 0
    assert kakehashi(store, "receipt", "show", "../../etc/passwd").returncode == 1
    assert kakehashi(store, "receipt", "show", "0" * 32).returncode == 1


@needs_root
def test_receipt_is_pending_until_the_closing_was_seen(store: RealStore) -> None:
    session, node, _ = store.session()
    with node.connected(store.view()) as link:
        guard = store.pid("guard")
        os.kill(guard, signal.SIGSTOP)
        try:
            pending = store.hub.end(session).ok()
        finally:
            os.kill(guard, signal.SIGCONT)
        assert pending["state"] == "pending"
        assert {"item": "connections", "result": "left"}.items() <= pending["items"][2].items()
        link.closed_after(2)
    path = f"/v1/sessions/{session}/receipt"
    until(
        lambda: store.hub.call("GET", path).ok()["state"] == "complete",
        what="the completed receipt",
    )
    assert store.hub.end(session).ok()["revision"] == 2
