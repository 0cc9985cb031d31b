"""No secret is told: not by the scheduler, not to other accounts, not by a log or a database.

One session is run with the hub at its most talkative. Whatever it wrote, or showed to another
account, is searched during the session and after it for every secret that was in play.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from tests.lab import faults, look
from tests.lab import portal as services
from tests.lab.client import Client
from tests.lab.hosts import Host, wait_for
from tests.lab.lab import Lab
from tests.lab.test_attacks import server_token

pytestmark = pytest.mark.lab

PLAIN = {"site": "slurm", "queue": "gpu", "gpus": 0, "hours": 1.0, "project": "lung-ct"}
TANAKA, SUZUKI = "ka0001", "ka0002"
HOSTS = ("login", "head", "node1", "node2")
HUB_DATABASE = "/var/lib/kakehashi/hub/jupyterhub.sqlite"
BOOK = "/srv/kakehashi/authority/book.sqlite"
SPOOLS = ("/var/spool/slurmctld", "/var/spool/slurmd")
DRAINED = "nodename=node[1-2]"

# What an account without any rights reads of all processes of a host.
PROCESSES = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("cmdline", "environ", "comm", "status"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                print(name, file.read())
        except OSError:
            pass
"""


def read_all(host: Host, folder: str) -> bytes:
    """Return what all files below a folder hold."""
    paths = [path for path in sorted(host.path(folder).rglob("*")) if path.is_file()]
    return b"\n".join(path.read_bytes() for path in paths)


def told(lab: Lab) -> dict[str, bytes]:
    """Return whatever was written or shown by now: source to bytes."""
    login, store = lab["login"], lab["store"]
    sources = {
        "hub's log": login.log("hub").read_bytes(),
        "store's log": store.log("store").read_bytes(),
        "store's sshd log": read_all(store, "/srv/kakehashi/log"),
        "provider's log": lab["provider"].log("provider").read_bytes(),
        "audit trail": store.path("/srv/kakehashi/authority/audit.jsonl").read_bytes(),
        "receipts": read_all(store, "/srv/kakehashi/authority/receipts"),
        # Every column of every table, and what pages that were freed still hold.
        "hub's database": _dump(login, HUB_DATABASE) + _pages(login, HUB_DATABASE),
        "store's book": _dump(store, BOOK) + _pages(store, BOOK),
        "scheduler's controller log": lab["head"].path("/var/log/slurmctld.log").read_bytes(),
        "scheduler's state": read_all(lab["head"], SPOOLS[0]),
    }
    for name in ("node1", "node2"):
        sources[f"scheduler's spool on {name}"] = read_all(lab[name], SPOOLS[1])
        sources[f"scheduler's log on {name}"] = lab[name].path("/var/log/slurmd.log").read_bytes()
    for name in HOSTS:
        seen = lab[name].run(["/usr/bin/python3", "-I", "-c", PROCESSES], user=SUZUKI)
        sources[f"processes of {name}, for another account"] = seen.stdout.encode()
    for words in (["show", "job", "--details"], ["show", "steps"], ["show", "node"]):
        shown = login.run(["scontrol", *words], user=SUZUKI)
        sources[f"scontrol {' '.join(words)}, for another account"] = shown.stdout.encode()
    shown = login.run(["squeue", "--noheader", "--format=%all"], user=SUZUKI)
    sources["squeue, for another account"] = shown.stdout.encode()
    return sources


def _dump(host: Host, database: str) -> bytes:
    return host.run(["sqlite3", "-readonly", database, ".dump"]).stdout.encode()


def _pages(host: Host, database: str) -> bytes:
    files = [host.path(database + end) for end in ("", "-wal")]
    return b"".join(path.read_bytes() for path in files if path.exists())


def found(sources: Mapping[str, bytes], hidden: Mapping[str, str]) -> set[tuple[str, str]]:
    """Return which secret stands in which source."""
    return {
        (source, name)
        for source, text in sources.items()
        for name, value in hidden.items()
        if value.encode() in text
    }


@dataclass
class Session:
    """What one session had as secrets, and what was told during and after it."""

    job: str = ""
    hidden: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, bytes] = field(default_factory=dict)
    during: dict[str, bytes] = field(default_factory=dict)
    after: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture(scope="module")
def talkative(lab: Lab) -> Iterator[Lab]:
    """Have the hub write all that it can write."""
    faults.kill_hub(lab)
    services.start_hub(lab["login"], debug=True)
    yield lab
    faults.kill_hub(lab)
    services.start_hub(lab["login"])


@pytest.fixture(scope="module")
def session(talkative: Lab) -> Session:
    """Run one session from log-in to its end, and gather its secrets on the way."""
    lab = talkative
    login, one = lab["login"], Session()
    tanaka = Client(lab.url, "tanaka", str(lab.ca_file))
    tanaka.log_in()
    own = tanaka.call("POST", "/hub/api/users/tanaka/tokens", {"expires_in": 600}).json()["token"]
    lab["head"].run(["scontrol", "update", DRAINED, "state=drain", "reason=test"])
    try:
        tanaka.call("POST", "/hub/api/users/tanaka/server", PLAIN)
        wait_for("the job", lambda: bool(faults.slurm_job(lab, TANAKA)), 30)
        one.job = faults.slurm_job(lab, TANAKA)
        show = ["scontrol", "write", "batch_script", one.job, "-"]
        script = login.run(show, user=TANAKA).stdout
        document = json.loads(next(line for line in script.splitlines() if line[:1] == "{"))
        one.waiting = told(lab)
    finally:
        lab["head"].run(["scontrol", "update", DRAINED, "state=resume"])
    tanaka.wait_ready()
    with tanaka.kernel() as kernel:
        tls_key = kernel.value(
            "[open('/run/kakehashi/server/' + name).read() for name in"
            " __import__('os').listdir('/run/kakehashi/server')]"
        )
        one.hidden = {
            "ticket": document["ticket"],
            "server's token": server_token(kernel),
            "person's token": own,
            "client secret": login.path("/etc/kakehashi/client.secret").read_text().strip(),
            "hub's credential": login.path("/etc/kakehashi/authority.token").read_text().strip(),
            "witness key": lab["node1"].path("/etc/kakehashi/witness.key").read_text().strip(),
            "log-in's cookie": _cookie(tanaka, "/hub/"),
            "server's TLS key": _key_line(tls_key),
            "an SSH private key": "OPENSSH PRIVATE KEY",
            "password": "tanaka-demo",
        }
        one.during = told(lab)
    tanaka.stop()
    wait_for("the end of the job", lambda: not faults.slurm_job(lab, TANAKA), 30)
    one.after = told(lab)
    return one


def _cookie(client: Client, path: str) -> str:
    """Return the value of the cookie that is the log-in at the hub, as it travels."""
    values = [c.value for c in client.http.cookies if c.path == path and "_xsrf" not in c.name]
    return max((value or "" for value in values), key=len).strip('"')


def _key_line(files: list[str]) -> str:
    """Return a line from the middle of a private key in PEM."""
    (key,) = [text for text in files if "PRIVATE KEY" in text]
    return key.splitlines()[len(key.splitlines()) // 2]


def test_every_source_says_something_and_every_secret_is_one(session: Session) -> None:
    """The control: what is empty could not tell anything, and short words stand anywhere."""
    for sources in (session.waiting, session.during, session.after):
        empty = {name for name, text in sources.items() if not text.strip()}
        quiet = {"squeue, for another account", "scontrol show steps, for another account",
                 "scheduler's spool on node1", "scheduler's spool on node2",
                 "receipts"}  # fmt: skip
        assert empty <= quiet, empty
    assert session.during["receipts"] is not None
    assert session.after["receipts"]
    assert b"[D " in session.during["hub's log"]
    assert (
        session.job.encode() in session.during["scontrol show job --details, for another account"]
    )
    assert {name for name, value in session.hidden.items() if len(value) < 11} == set()


def test_nothing_secret_is_told_while_the_job_waits(session: Session) -> None:
    hits = found(session.waiting, session.hidden)
    # The ticket travels in the job's script, which only root and the account itself can read.
    assert hits == {("scheduler's state", "ticket")}


def test_nothing_secret_is_told_during_the_session(session: Session) -> None:
    hits = found(session.during, session.hidden)
    # By now it was redeemed: used again, it ends the session with an alarm.
    spools = {("scheduler's state", "ticket")}
    spools |= {(f"scheduler's spool on {node}", "ticket") for node in ("node1", "node2")}
    assert hits <= spools, hits - spools


def test_nothing_secret_is_told_after_the_session(session: Session) -> None:
    hits = found(session.after, session.hidden)
    # Slurm's controller forgets a job, script and all, when it is MinJobAge old.
    assert hits <= {("scheduler's state", "ticket")}, hits


def test_the_schedulers_files_are_closed_to_other_accounts(lab: Lab, session: Session) -> None:
    for name, folder in (("head", SPOOLS[0]), ("node1", SPOOLS[1]), ("node2", SPOOLS[1])):
        seen = lab[name].run(["grep", "-rl", "ticket", folder], user=SUZUKI, check=False)
        assert seen.stdout == "", name
    show = ["scontrol", "write", "batch_script", session.job, "-"]
    assert "ticket" not in lab["login"].run(show, user=SUZUKI, check=False).stdout


def test_log_ins_tokens_of_the_provider_lie_encrypted(lab: Lab, session: Session) -> None:
    assert b"tanaka" in session.during["hub's database"]
    for word in (b"access_token", b"refresh_token", b"id_token", b'auth_state":'):
        assert word not in session.during["hub's database"], word
    columns = lab["login"].run(
        ["sqlite3", "-readonly", HUB_DATABASE,
         "SELECT length(encrypted_auth_state) FROM users WHERE name = 'tanaka'"],
    )  # fmt: skip
    # The control: something is kept there, so it is kept encrypted.
    assert int(columns.stdout.strip()) > 100


def _into_log(lab: Lab, client: Client, word: str) -> None:
    client.call("GET", f"/hub/api/{word}")


def _into_database(lab: Lab, client: Client, word: str) -> None:
    client.call("POST", "/hub/api/users/tanaka/tokens", {"note": word, "expires_in": 60})


def _into_audit(lab: Lab, client: Client, word: str) -> None:
    services.kakehashi(
        lab["store"],
        ["revoke", "--person", word, "--by", "tester", "--reason", "a rehearsal"],
    )
    services.kakehashi(lab["store"], ["allow", "--person", word, "--by", "tester"])


def _into_spool(lab: Lab, client: Client, word: str) -> None:
    lab["head"].run(["sbatch", "--hold", "--comment", word], user=TANAKA, stdin="#!/bin/sh\nid\n")


def _into_processes(lab: Lab, client: Client, word: str) -> None:
    wait = "import signal; signal.pause()"
    lab["node1"].popen(["/usr/bin/python3", "-I", "-c", wait, word], user=TANAKA)


PLANTS: dict[str, Callable[[Lab, Client, str], None]] = {
    "hub's log": _into_log,
    "hub's database": _into_database,
    "audit trail": _into_audit,
    "scheduler's state": _into_spool,
    "scontrol show job --details, for another account": _into_spool,
    "processes of node1, for another account": _into_processes,
}


@pytest.mark.parametrize("source", PLANTS)
def test_a_planted_secret_is_found(talkative: Lab, source: str) -> None:
    lab, word = talkative, "planted-" + secrets.token_hex(16)
    tanaka = Client(lab.url, "tanaka", str(lab.ca_file))
    tanaka.log_in()
    assert found(told(lab), {"plant": word}) == set()
    PLANTS[source](lab, tanaka, word)
    try:
        wait_for(
            f"the plant in {source}",
            lambda: (source, "plant") in found(told(lab), {"plant": word}),
            15,
        )
    finally:
        lab["head"].run(["scancel", "--user", TANAKA])
        lab["node1"].run(["pkill", "-u", TANAKA, "-f", word], check=False)
    wait_for("the plant's end", lambda: not look.processes(lab["node1"], TANAKA))
