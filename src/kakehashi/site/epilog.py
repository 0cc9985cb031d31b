"""Slurm's epilog for sessions: root scans the node after a job, tidies, and tells the store.

``Epilog=`` of ``slurm.conf`` names a program that runs ``python -I -m kakehashi.site.epilog``
as root on each node; with ``--pending`` it asks for the jobs of this node that the store still
waits to hear about (at boot, or from a timer). It never fails: a node would be drained, and no
session would be any cleaner. Standard library only.
"""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
import syslog
from pathlib import Path

from kakehashi.errors import KakehashiError, RefusedError, SessionError
from kakehashi.site.job import SiteFile, read_site_file
from kakehashi.site.scan import Ended, look
from kakehashi.site.witness import KEPT, keep, send_kept

DEFAULT_SITE_FILE = Path("/etc/kakehashi-site.json")
SQUEUE_TIMEOUT_S = 5.0
TRIES = 2


def main(arguments: list[str] | None = None) -> int:
    """Scan after a job, or for all jobs that are waited for; returns 0, or 2 for wrong words."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    pending = "--pending" in words
    if pending:
        words.remove("--pending")
    if words[:1] == ["--site"] and len(words) == 2:
        path = Path(words[1])
    elif not words:
        path = DEFAULT_SITE_FILE
    else:
        sys.stderr.write("usage: python -I -m kakehashi.site.epilog [--pending] [--site FILE]\n")
        return 2
    try:
        site = read_site_file(path)
        if pending:
            _all_pending(site)
        else:
            _after_job(site)
    except (KakehashiError, OSError) as error:
        _complain(str(error))
    return 0


def _complain(words: str) -> None:
    sys.stderr.write(f"kakehashi: {words}\n")
    syslog.openlog("kakehashi-epilog")
    syslog.syslog(syslog.LOG_ERR, words)


def host_name() -> str:
    """Return the node's name as the session's wrapper gave it to the store."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _after_job(site: SiteFile) -> None:
    job, uid = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_JOB_UID", "")
    if not job.isdigit() or not uid.isdigit():
        raise SessionError("SLURM_JOB_ID and SLURM_JOB_UID are not set; this is Slurm's epilog")
    account = _account(int(uid))
    # Jobs of people who have no sessions here are none of our business.
    if account not in site.accounts:
        return
    _scan(site, Ended(job, int(uid), alone=_is_alone(site, account, job)))


def _all_pending(site: SiteFile) -> None:
    if site.witness is None:
        raise SessionError("the site's file has no witness; nobody waits for a report")
    send_kept(KEPT, site.witness)
    for job in site.witness.pending(host_name()):
        if _runs(site, job):
            continue
        items: dict[str, dict[str, str]] = {}
        for account in sorted(site.accounts):
            try:
                uid = pwd.getpwnam(account).pw_uid
            except KeyError:
                continue
            ended = Ended(job, uid, alone=_is_alone(site, account, job))
            for item in look(ended, site.tidy):
                known = items.setdefault(item["item"], item)
                if WEIGHT[item["result"]] > WEIGHT[known["result"]]:
                    items[item["item"]] = item
        _send(site, job, list(items.values()))


# Of several accounts the word that weighs most stands.
WEIGHT = {"gone": 0, "unknown": 1, "seen": 2, "left": 3}


def _scan(site: SiteFile, ended: Ended) -> None:
    _send(site, ended.job, look(ended, site.tidy))


def _send(site: SiteFile, job: str, items: list[dict[str, str]]) -> None:
    if site.witness is None:
        return
    host = host_name()
    for _ in range(TRIES):
        try:
            site.witness.report(host, job, items)
        except RefusedError as error:
            # A job of the same account that was no session is unknown to the store.
            if error.code != "unknown-job":
                _complain(f"job {job}: the store takes no report: {error}")
            return
        except SessionError as error:
            words = str(error)
        else:
            return
    keep(KEPT, host, job, items)
    _complain(f"job {job}: {words}; the report is kept and sent later")


def _account(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _squeue(site: SiteFile, *selection: str) -> list[str] | None:
    """Return the ids of running jobs, or None where the scheduler does not answer."""
    environment = {"PATH": "/usr/bin:/bin"}
    if site.slurm_conf is not None:
        environment["SLURM_CONF"] = site.slurm_conf
    command = [f"{site.commands}/squeue", "--noheader", "--format=%i",
               "--states=running,suspended,stopped", *selection]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SQUEUE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split() if done.returncode == 0 else None


def _is_alone(site: SiteFile, account: str, job: str) -> bool:
    jobs = _squeue(site, f"--user={account}", f"--nodelist={host_name()}")
    # Where nobody says, nothing that might be another job's is removed.
    return jobs is not None and not set(jobs) - {job}


def _runs(site: SiteFile, job: str) -> bool:
    jobs = _squeue(site)
    return jobs is None or job in jobs


if __name__ == "__main__":
    sys.exit(main())
