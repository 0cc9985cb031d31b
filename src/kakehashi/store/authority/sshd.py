"""The store's sshd: what it may do, and making everything that it and the authority need."""

from __future__ import annotations

import os
import shutil
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kakehashi.audit import Anchors, Audit
from kakehashi.audit.trail import FIRST_PREV
from kakehashi.errors import ConfigError, StoreError
from kakehashi.store.authority import principals, rotation
from kakehashi.store.authority.accounts import (
    acting_as,
    check_runnable,
    ensure_account,
    ensure_group,
    find_account,
)
from kakehashi.store.authority.book import Book
from kakehashi.store.authority.ca import CAS, Keys, write_key
from kakehashi.store.authority.guard import LOGIN_GRACE_S
from kakehashi.store.authority.layout import Layout, Names, names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kakehashi.config import Config

PRIVSEP = Path("/run/sshd")
"""Folder that Debian's sshd needs to exist."""


def configuration(config: Config) -> str:
    """Return the store's ``sshd_config``."""
    store = config.need_store()
    layout, accounts = Layout(store.root), names(store)
    views, works = f"{store.account_prefix}v-*", f"{store.account_prefix}w-*"
    return f"""\
# Written by `kakehashi store init`; a change by hand is lost at the next one.
Port {store.bind_port}
ListenAddress {store.bind}
PidFile {layout.run / "sshd.pid"}
HostKey {layout.sshd / "host_key"}
HostCertificate {layout.host_certificate}
LogLevel VERBOSE
# What somebody asks for who was let in; the audit trail's sshd.refused is made of it.
LogVerbose *:server_input_channel_open*,*:server_input_global_request*,*:session_input_channel_req*

# Only a certificate of the authority opens an account, and only while its lease lives: the
# command looks each one up in the book, so that a lease taken back is refused at once.
AuthenticationMethods publickey
PubkeyAuthentication yes
PubkeyAcceptedAlgorithms ssh-ed25519-cert-v01@openssh.com
CASignatureAlgorithms ssh-ed25519
TrustedUserCAKeys {layout.keys / CAS["user-ca"].trusted}
AuthorizedPrincipalsCommand {layout.principals} %i %s %u %f
AuthorizedPrincipalsCommandUser {accounts.authority}
AuthorizedKeysFile none
AuthorizedKeysCommand none
PasswordAuthentication no
KbdInteractiveAuthentication no
HostbasedAuthentication no
GSSAPIAuthentication no
UsePAM no
PermitRootLogin no
PermitEmptyPasswords no
StrictModes yes
AllowUsers {views} {works}
AllowGroups {accounts.view_group} {accounts.work_group}

LoginGraceTime {LOGIN_GRACE_S}
MaxAuthTries 4
MaxStartups 64:30:256
MaxSessions 64
ClientAliveInterval 15
ClientAliveCountMax 4
UseDNS no
Compression no

DisableForwarding yes
PermitTTY no
PermitTunnel no
PermitUserRC no
PermitUserEnvironment no
PrintMotd no
Banner none
VersionAddendum none
# For whoever should come through without one of the two blocks below: nothing.
ChrootDirectory /var/empty
ForceCommand /bin/false
Subsystem sftp internal-sftp

Match User {views}
    ChrootDirectory %h
    ForceCommand internal-sftp -R

Match User {works}
    ChrootDirectory %h
    ForceCommand internal-sftp -u 0007
"""


def initialise(config: Config) -> list[str]:
    """Make accounts, folders, keys, book and sshd's configuration; repeat it as you like.

    What exists is kept (keys, book, audit trail) or brought to what it must be (owners, modes,
    configuration). Run it again after projects were added.

    Returns
    -------
    list of str
        What the operator should know, one line each.

    Raises
    ------
    ConfigError
        Not run as root, or the root of the store lies where others than root may write.
    StoreError
        An account or folder cannot be made.
    """
    if os.geteuid() != 0:
        raise ConfigError("`kakehashi store init` makes accounts and must be run as root")
    store = config.need_store()
    layout, accounts = Layout(store.root), names(store)
    projects = [project.id for project in config.projects]
    for project in projects:
        # Refuses a name that is too long before anything is made.
        accounts.view(project)
        accounts.work(project)

    _check_path(layout.root)
    ensure_group(accounts.view_group)
    ensure_group(accounts.work_group)
    ensure_group(accounts.authority)
    # It hashes manifests, so it has to see the views; whoever signs for them may see them.
    ensure_account(
        accounts.authority,
        home=layout.authority,
        group=accounts.authority,
        others=(accounts.view_group,),
    )
    # It reads what comes over the network, and has a right to nothing else.
    ensure_group(accounts.receiver)
    ensure_account(accounts.receiver, home=layout.receive, group=accounts.receiver)
    # What reads their objects and decodes their pixels has none at all.
    ensure_group(accounts.intake)
    ensure_account(accounts.intake, home=Path("/nonexistent"), group=accounts.intake)
    check_runnable(find_account(accounts.authority))
    _folders(layout, accounts)
    for project in projects:
        _project(layout, accounts, project)

    if not (layout.sshd / "host_key").exists():
        write_key(layout.sshd / "host_key", Ed25519PrivateKey.generate())
    with acting_as(accounts.authority):
        Keys.create(layout.keys)
        keys = Keys(layout.keys)
        Book.create(layout.book).close()
        # While the host CA is being replaced not every node knows the new one yet.
        if not rotation.replacing(layout, "host-ca"):
            rotation.present(store)
    _install(layout.sshd / "sshd_config", configuration(config).encode(), 0o644)
    _install(layout.principals, Path(principals.__file__).read_bytes(), 0o755)
    for anchor in store.audit_anchors:
        _anchor(anchor, accounts.authority)
    with acting_as(accounts.authority):
        audit = Audit(layout.audit)
        first = audit.head()[1] == FIRST_PREV
        audit.append("store.initialised", detail={"projects": sorted(projects), "first": first})
        Anchors(audit, store.audit_anchors, keys.receipt, time.time).write()
    told = [
        f"accounts: {', '.join([accounts.authority, *_accounts(config)])}",
        f"host CA, for the nodes: {keys.public('host-ca')}",
        f"receipts and audit heads are signed by: {layout.keys / 'receipt.pub'}",
    ]
    if not store.audit_anchors:
        told.append(
            "store.audit_anchors is empty: a shortened audit trail would not be found. Name a "
            "file on another machine's storage"
        )
    return told


def _accounts(config: Config) -> Iterable[str]:
    accounts = names(config.need_store())
    for project in config.projects:
        yield accounts.view(project.id)
        yield accounts.work(project.id)


def _folders(layout: Layout, accounts: Names) -> None:
    authority, receiver = accounts.authority, accounts.receiver
    layout.root.mkdir(parents=True, exist_ok=True)
    _own(layout.root, "root", "root", 0o755)
    for folder in (layout.root / "views", layout.root / "work", layout.principals.parent):
        folder.mkdir(exist_ok=True)
        _own(folder, "root", "root", 0o755)
    for folder in (layout.sshd, layout.run):
        folder.mkdir(exist_ok=True)
        _own(folder, "root", "root", 0o755)
    layout.log.mkdir(exist_ok=True)
    # The authority reads sshd's log, by its name; the others are root's.
    _own(layout.log, "root", authority, 0o710)
    for folder in (layout.authority, layout.keys, layout.hubs, layout.receipts, layout.service):
        folder.mkdir(exist_ok=True)
        _own(folder, authority, authority, 0o700)

    layout.receive.mkdir(exist_ok=True)
    _own(layout.receive, receiver, receiver, 0o700)


def _project(layout: Layout, accounts: Names, project: str) -> None:
    view, work = layout.view(project), layout.work(project)
    for folder in (view, work, work / "work"):
        folder.mkdir(exist_ok=True)
    ensure_account(accounts.view(project), home=view, group=accounts.view_group)
    ensure_account(accounts.work(project), home=work, group=accounts.work_group)
    _own(view, "root", accounts.view_group, 0o750)
    _own(work, "root", accounts.work_group, 0o750)
    _own(work / "work", accounts.work(project), accounts.work_group, 0o700)


def _own(path: Path, user: str, group: str, mode: int) -> None:
    if path.is_symlink():
        raise StoreError(f"{path}: is a symbolic link, expected a folder; remove it")
    shutil.chown(path, user, group)
    path.chmod(mode)


def _check_path(root: Path) -> None:
    """Refuse a root that sshd or the store's accounts could not use, before making anything."""
    for folder in (root, *root.parents):
        if not folder.exists():
            continue
        status = folder.stat()
        if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o022:
            raise ConfigError(
                f"store.root lies under {folder}, where others than root may write (owner "
                f"{status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}); sshd refuses that. "
                "Choose a place whose whole path belongs to root"
            )
        if not stat.S_IMODE(status.st_mode) & 0o001:
            raise ConfigError(
                f"store.root lies under {folder}, which the store's accounts cannot enter "
                f"(mode {stat.S_IMODE(status.st_mode):o}); choose another place, or chmod o+x"
            )


def _install(path: Path, data: bytes, mode: int) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.chmod(mode)
    shutil.chown(part, "root", "root")
    part.rename(path)


def _anchor(path: Path, authority: str) -> None:
    entry = find_account(authority)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        os.chown(path, entry.pw_uid, entry.pw_gid)
        with acting_as(authority):
            path.open("ab").close()
    except OSError as error:
        raise StoreError(
            f"{path}: the audit anchor cannot be made writable for {authority!r} "
            f"({error.strerror}); its folder has to let that account through"
        ) from error
