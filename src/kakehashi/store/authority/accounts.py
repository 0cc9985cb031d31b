"""Making the store's Unix accounts, and acting as one of them."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from kakehashi.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NO_SHELL = "/usr/sbin/nologin"


def ensure_group(name: str) -> None:
    """Make a system group unless it is there."""
    try:
        grp.getgrnam(name)
    except KeyError:
        _run(["groupadd", "--system", name])


def ensure_account(name: str, *, home: Path, group: str, others: tuple[str, ...] = ()) -> None:
    """Make a system account without password and shell, or check that it is as it must be.

    Raises
    ------
    StoreError
        An account of that name exists with another home or group, or it cannot be made.
    """
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        # '*' rather than the usual '!': no password fits either, but sshd without PAM refuses
        # an account that is marked as locked.
        arguments = ["useradd", "--system", "--no-create-home", "--no-log-init"]
        arguments += ["--home-dir", str(home), "--shell", NO_SHELL, "--gid", group]
        if others:
            arguments += ["--groups", ",".join(others)]
        _run([*arguments, "--password", "*", name])
        return
    if entry.pw_dir != str(home) or entry.pw_gid != grp.getgrnam(group).gr_gid:
        raise StoreError(
            f"the account {name!r} exists with the home {entry.pw_dir} and the group id "
            f"{entry.pw_gid}, expected {home} and {group}: it belongs to something else. Give "
            "this store another store.account_prefix, or remove the account"
        )
    for other in others:
        if name not in grp.getgrnam(other).gr_mem:
            _run(["usermod", "--append", "--groups", other, name])


def find_account(name: str) -> pwd.struct_passwd:
    """Return an account of the store.

    Raises
    ------
    ConfigError
        It does not exist.
    """
    try:
        return pwd.getpwnam(name)
    except KeyError as error:
        raise ConfigError(
            f"the account {name!r} does not exist; run `kakehashi store init` as root first"
        ) from error


def check_runnable(account: pwd.struct_passwd) -> None:
    """Check that an account can run Kakehashi from where it is installed.

    Raises
    ------
    ConfigError
        The account cannot read the interpreter or the packages.
    """
    probe = subprocess.run(
        [sys.executable, "-I", "-c", "import kakehashi.config"],
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        cwd="/",
        env={},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if probe.returncode != 0:
        raise ConfigError(
            f"{sys.executable}: the account {account.pw_name!r} cannot run Kakehashi from here; "
            "install it, and the Python that it uses, where every account can read them, e.g. "
            "under /opt/kakehashi"
        )


@contextlib.contextmanager
def acting_as(name: str) -> Iterator[None]:
    """Do something with an account's rights, so that files made by root do not lock it out.

    As another than root this changes nothing; the file system decides then.
    """
    if os.geteuid() != 0:
        yield
        return
    entry = find_account(name)
    groups = os.getgroups()
    os.setgroups(os.getgrouplist(name, entry.pw_gid))
    os.setegid(entry.pw_gid)
    os.seteuid(entry.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def become(name: str) -> None:
    """Be an account from now on, without a way back.

    As another than root this changes nothing; the file system decides then.
    """
    if os.geteuid() != 0:
        return
    entry = find_account(name)
    os.setgroups(os.getgrouplist(name, entry.pw_gid))
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def _run(arguments: list[str]) -> None:
    deadline = time.monotonic() + 30
    while True:
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
        # Status 1 is "the password file is locked by somebody else": they finish soon.
        if "lock" not in result.stderr or time.monotonic() > deadline:
            raise StoreError(
                f"{arguments[0]} {arguments[-1]} failed with status {result.returncode}: "
                f"{result.stderr.strip() or 'it gave no reason'}"
            )
        time.sleep(0.1)
