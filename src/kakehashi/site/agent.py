"""The site agent: one short process a call, between a hub and a site's scheduler.

It reads one JSON object on standard input and prints one on standard output. It runs as root
and becomes the person's account before it does anything at the scheduler; what it will do at
all stands in a file of the site (``--site``), so that a hub which has fallen into wrong hands
can start sessions here, and nothing else. Standard library only.
"""

from __future__ import annotations

import json
import os
import pwd
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kakehashi.site.job import (
    RequestError,
    Scheduler,
    SiteFile,
    check_account,
    check_job,
    read_site_file,
)
from kakehashi.site.process import ProcessScheduler
from kakehashi.site.slurm import Slurm

DEFAULT_SITE_FILE = Path("/etc/kakehashi-site.json")
MAX_REQUEST = 64 * 1024
FIELDS = {
    "submit": frozenset({"verb", "scheduler", "account", "job"}),
    "query": frozenset({"verb", "scheduler", "account", "job"}),
    "cancel": frozenset({"verb", "scheduler", "account", "job"}),
    "resources": frozenset({"verb", "scheduler"}),
}
# Whom the agent asks as where no person is concerned.
NOBODY = "nobody"


def main(arguments: list[str] | None = None) -> int:
    """Answer one request.

    Returns
    -------
    int
        0 where the request was understood, also if the answer is a refusal; 2 otherwise.
    """
    given = sys.argv[1:] if arguments is None else arguments
    os.umask(0o077)
    try:
        site = read_site_file(_site_path(given))
        request = _request(sys.stdin.buffer.read(MAX_REQUEST + 1))
        reply = answer(request, site)
        status = 0
    except RequestError as error:
        reply = {"ok": False, "error": error.code, "message": str(error)}
        status = 2 if error.code in {"malformed", "site-file"} else 0
    sys.stdout.write(json.dumps(reply) + "\n")
    return status


def _site_path(arguments: list[str]) -> Path:
    if not arguments:
        return DEFAULT_SITE_FILE
    if len(arguments) == 2 and arguments[0] == "--site":
        return Path(arguments[1])
    raise RequestError("malformed", "usage: python -I -m kakehashi.site.agent [--site FILE]")


def _request(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_REQUEST:
        raise RequestError("malformed", f"the request is longer than {MAX_REQUEST} bytes")
    try:
        request = json.loads(data)
    except (ValueError, RecursionError):
        raise RequestError("malformed", "the request is not JSON") from None
    if not isinstance(request, dict):
        raise RequestError("malformed", "the request is not a JSON object")
    verb = request.get("verb")
    if not isinstance(verb, str) or verb not in FIELDS:
        raise RequestError("malformed", f"verb: expected one of {sorted(FIELDS)}")
    if set(request) != FIELDS[verb]:
        raise RequestError("malformed", f"{verb}: expected the fields {sorted(FIELDS[verb])}")
    return request


def answer(request: dict[str, Any], site: SiteFile) -> dict[str, Any]:
    """Check a request, become the account, and do what was asked.

    Raises
    ------
    RequestError
        The request breaks a rule, or the scheduler refused.
    """
    if request["scheduler"] != site.scheduler:
        raise RequestError("scheduler", f"this site's scheduler is {site.scheduler!r}")
    verb = request["verb"]
    if verb == "resources":
        scheduler = _scheduler(site, _become(NOBODY))
        return {"ok": True, "queues": [asdict(queue) for queue in scheduler.resources()]}
    account = check_account(request["account"], site)
    if verb == "submit":
        job = check_job(request["job"], site)
        return {"ok": True, "job": _scheduler(site, _become(account)).submit(job)}
    job_id = request["job"]
    if not isinstance(job_id, str):
        raise RequestError("malformed", "job: expected the job's id as text")
    scheduler = _scheduler(site, _become(account))
    if verb == "query":
        return {"ok": True, **asdict(scheduler.query(job_id))}
    scheduler.cancel(job_id)
    return {"ok": True}


def _scheduler(site: SiteFile, environment: dict[str, str]) -> Scheduler:
    if site.scheduler == "none":
        return ProcessScheduler(site.software, site.queues, environment)
    if site.slurm_conf is not None:
        environment = {**environment, "SLURM_CONF": site.slurm_conf}
    return Slurm(site.software, site.commands, environment)


def _become(account: str) -> dict[str, str]:
    """Drop to an account for good and return the environment that it starts with."""
    try:
        entry = pwd.getpwnam(account)
    except KeyError:
        raise RequestError("account", f"account {account!r} does not exist here") from None
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise RequestError("account", f"account {account!r} has root's rights")
    os.chdir("/")
    if os.geteuid() == 0:
        os.initgroups(account, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    elif account != NOBODY and os.geteuid() != entry.pw_uid:
        raise RequestError("account", f"the agent must run as root or as {account!r} itself")
    return {
        "HOME": entry.pw_dir,
        "LANG": "C.UTF-8",
        "LOGNAME": account,
        "PATH": "/usr/bin:/bin",
        "SHELL": "/bin/sh",
        "USER": account,
    }


if __name__ == "__main__":
    sys.exit(main())
