"""What a certificate opens at the real sshd, and what it does not."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from kakehashi.store.authority.ca import Keys, PublicKey, load_private
from tests.authority.real import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.authority.real import RealStore

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")


def test_view_is_seen_and_cannot_be_changed(store: RealStore, tmp_path: Path) -> None:
    _, node, grant = store.session()
    local = tmp_path / "local"
    local.write_text("mine")
    seen = node.sftp(store.view(), "ls -1 /", "ls -1 /series")
    assert "/manifest.json" in seen.stdout
    assert "/series/1.2.ozx" in seen.stdout
    assert node.sftp(store.view(), f"get /series/1.2.ozx {tmp_path}/got").returncode == 0
    assert (tmp_path / "got").read_bytes() == b"lung" * 100
    for attempt in (
        f"put {local} /x",
        "rm /manifest.json",
        "mkdir /d",
        "rename /manifest.json /m",
        "chmod 777 /manifest.json",
        "symlink /manifest.json /s",
    ):
        assert node.sftp(store.view(), attempt).returncode != 0, attempt
    del grant


def test_view_stays_closed_even_where_the_folder_is_open_to_all(
    store: RealStore, tmp_path: Path
) -> None:
    _, node, _ = store.session()
    folder = store.layout.view("lung") / "open"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    (tmp_path / "local").write_text("mine")
    assert node.sftp(store.view(), f"put {tmp_path}/local /open/x").returncode != 0
    assert list(folder.iterdir()) == []


def test_chroot_hides_the_machine(store: RealStore) -> None:
    _, node, _ = store.session()
    for account in (store.view(), store.work()):
        assert node.sftp(account, "ls /").returncode == 0
        for outside in ("/etc/passwd", "/../etc/passwd", "/proc/self", str(store.layout.book)):
            assert node.sftp(account, f"ls {outside}").returncode != 0


def test_work_folder_takes_files_for_the_project_alone(store: RealStore, tmp_path: Path) -> None:
    _, node, _ = store.session()
    (tmp_path / "local").write_text("mine")
    assert node.sftp(store.work(), f"put {tmp_path}/local /work/x").returncode == 0
    written = store.layout.work("lung") / "work" / "x"
    assert written.read_text() == "mine"
    assert stat.S_IMODE(written.stat().st_mode) & 0o007 == 0
    assert node.sftp(store.work(), f"put {tmp_path}/local /beside").returncode != 0


def test_nothing_but_sftp(store: RealStore) -> None:
    _, node, _ = store.session()
    for account in (store.view(), store.work()):
        shell = node.ssh(account, command=("id",), data=b"id\n")
        assert b"uid=" not in shell.stdout
        terminal = node.ssh(account, "-tt", data=b"id\n")
        assert b"PTY allocation request failed" in terminal.stderr
        assert b"uid=" not in terminal.stdout
        forward = node.ssh(
            account, "-W", f"127.0.0.1:{store.http_port}", data=b"GET / HTTP/1.0\n\n"
        )
        assert b"administratively prohibited" in forward.stderr
        remote = node.ssh(account, "-N", "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1")
        assert remote.returncode != 0
        assert b"remote port forwarding failed" in remote.stderr


def test_another_projects_accounts_stay_closed(store: RealStore) -> None:
    _, node, _ = store.session()
    assert node.admitted(store.view("lung"))
    for account in (store.view("brain"), store.work("brain"), "root", store.account):
        assert not node.admitted(account), account


def test_another_key_with_this_certificate_is_refused(store: RealStore) -> None:
    _, node, _ = store.session()
    thief = store.node()
    thief.take(node.grant)
    assert node.admitted(store.view())
    assert not thief.admitted(store.view())


def test_certificate_of_another_ca_is_refused(store: RealStore, tmp_path: Path) -> None:
    session, node, _ = store.session()
    assert node.admitted(store.view())
    Keys.create(tmp_path)
    forged = Keys(tmp_path).sign_user(
        PublicKey.parse(node.public),
        session=session,
        accounts=(store.view(), store.work()),
        now=1000,
        expires_at=2**40,
    )
    node.take({**node.grant, "certificate": forged.certificate})
    assert not node.admitted(store.view())


def test_genuine_certificate_that_the_book_does_not_know_is_refused(store: RealStore) -> None:
    # As after a restore of an older book, or a signature made behind the authority's back.
    session, node, _ = store.session()
    unknown = Keys(store.layout.keys).sign_user(
        PublicKey.parse(node.public),
        session=session,
        accounts=(store.view(), store.work()),
        now=1000,
        expires_at=2**40,
    )
    node.take({**node.grant, "certificate": unknown.certificate})
    assert not node.admitted(store.view())


def test_over_long_certificate_with_a_serial_of_the_book_opens_no_more_than_the_book_says(
    store: RealStore,
) -> None:
    session, node, _ = store.session()
    accounts = (store.view(), store.work(), store.view("brain"), store.work("brain"))
    thief = store.thief(node, load_private(store.layout.keys / "user_ca"), *accounts)
    # The control: the certificate is one that the book stands behind.
    assert thief.admitted(store.view())
    for account in (store.view("brain"), store.work("brain")):
        assert not thief.admitted(account), account
    store.hub.end(session).ok()
    assert not thief.admitted(store.view())
    refused = until(
        lambda: [r.detail["reason"] for r in store.records(session, "connection.refused")][2:],
        what="the refusals' records",
    )
    assert refused[-1] == "session is ended"
    assert "another project's account" in str(store.records(session, "connection.refused"))


def test_the_node_knows_the_store(store: RealStore) -> None:
    _, node, _ = store.session()
    impostor = store.node()
    node.take(
        {**node.grant, "store": {**node.grant["store"], "host_ca": impostor.public}},
    )
    refused = node.sftp(store.view(), "pwd")
    assert refused.returncode != 0
    assert "Host key verification failed" in refused.stderr


def test_source_address_of_the_grant_is_enforced(store: RealStore) -> None:
    created = store.hub.create().ok()
    node = store.node()
    node.take(store.hub.grant(created, node, address="192.0.2.7").ok())
    assert not node.admitted(store.view())
