#!/usr/bin/python3 -IS
"""Answers sshd at each authentication whether a certificate opens an account now.

``store init`` copies this file to the store's ``libexec``, owned by root. It must start in
milliseconds, so it uses the standard library only. sshd has checked by then that the
certificate is genuine, unexpired and comes from where it may; this program asks the book
whether its lease still lives, writes the connection down, and prints the account's name as
the principal. Anything unexpected prints nothing, and nothing means no.

Arguments: key id, serial, account, fingerprint (sshd's ``%i %s %u %f``).
"""

import re
import sqlite3
import sys
import time
from os import getppid
from pathlib import Path

KEY_ID = re.compile(r"([0-9a-f]{32}):([1-9][0-9]{0,18})")
PENDING_DENIALS = 1000


def main(key_id: str, serial: str, account: str, fingerprint: str) -> str:
    """Return the principal, or the empty string."""
    match = KEY_ID.fullmatch(key_id)
    if not match or match[2] != serial:
        return ""
    pid = getppid()
    # sshd's monitor, which lives as long as the connection, is the parent of this process.
    status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    name, _, rest = status.partition("(")[2].rpartition(")")
    if not name.startswith("sshd"):
        return ""
    start_time = int(rest.split()[19])
    book = Path(__file__).resolve().parent.parent / "authority" / "book.sqlite"
    database = sqlite3.connect(f"file:{book}?mode=rw", uri=True, timeout=5, isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        reason = denied(database, match[1], int(serial), account, fingerprint)
        if reason:
            database.execute(
                "INSERT INTO denials (time, session, account, reason) SELECT ?, ?, ?, ?"
                " WHERE (SELECT count(*) FROM denials) < ?",
                (time.time(), match[1], account, reason, PENDING_DENIALS),
            )
        else:
            database.execute(
                "INSERT OR IGNORE INTO connections"
                " (session, serial, account, pid, start_time, opened_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (match[1], int(serial), account, pid, start_time, time.time()),
            )
        database.execute("COMMIT")
    finally:
        database.close()
    return "" if reason else account


def denied(
    database: sqlite3.Connection, session: str, serial: int, account: str, fingerprint: str
) -> str:
    """Return why the certificate opens nothing now; the empty string if it opens the account."""
    row = database.execute(
        "SELECT s.state, s.lease_expires_at, s.ends_at, s.view_account, s.work_account,"
        " c.expires_at, c.fingerprint FROM certificates c JOIN sessions s ON s.id = c.session"
        " WHERE c.serial = ? AND c.session = ?",
        (serial, session),
    ).fetchone()
    if row is None:
        return "unknown certificate"
    state, lease, ends, view, work, expires, known = row
    now = time.time()
    if fingerprint != known:
        return "another key"
    if account not in (view, work):
        return "another project's account"
    if state != "granted":
        return f"session is {state}"
    if now >= min(lease, ends, expires):
        return "lease lapsed"
    return ""


if __name__ == "__main__":
    try:
        principal = main(*sys.argv[1:])
    except Exception as error:
        # Only the kind: a message could quote what must not stand in a log.
        sys.stderr.write(f"principals: {type(error).__name__}\n")
        sys.exit(1)
    if not principal:
        sys.exit(1)
    sys.stdout.write(principal + "\n")
