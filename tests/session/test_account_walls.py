"""Sessions on nodes without namespaces and mounts: the weaker walls, and what they keep."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kakehashi.site import scan
from tests.authority.real import RealStore, until
from tests.session.real import SERIES, World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.session.real import Person, Session, Software

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts")

ACCOUNT: dict[str, Any] = {"node": {"walls": "account"}}
SITES = """
            [store.sites.here]
            addresses = ["127.0.0.0/8"]
            accept_account_walls = true
"""
TRY = """
import json, sys
from kakehashi.session import check, plan
node = plan.Node(sys.argv[1], (), (), 64, True, False, "account", len(sys.argv) > 3)
world = check.plan_for(node, stand_ins=True, session=sys.argv[2][:32])
left_out = sys.argv[2][32:]
if left_out:
    world = check.without(world, left_out)
print(json.dumps([one.to_json() for one in check.try_world(world)]))
"""

REDDENED = {
    "landlock": {"files", "processes", "network"},
    "seccomp": {"socket families", "system calls", "privileges", "what outlives", "network"},
    "core": {"core dumps"},
    "descriptors": {"open files"},
}


def probe(world: World, left_out: str = "") -> dict[str, tuple[bool, str]]:
    software = world.software
    argv = [software.python, "-I", "-c", TRY, str(software.root), "a" * 32 + left_out]
    done = world.person.run(*argv)
    assert done.returncode == 0, done.stderr
    return {
        one["check"].removeprefix("payload: "): (one["ok"], one["message"])
        for one in json.loads(done.stdout)
    }


def test_all_is_well_behind_whole_walls(world: World) -> None:
    results = probe(world)
    assert len(results) == 12
    assert not {name: result for name, result in results.items() if not result[0]}
    assert not world.listing()["/dev/shm"]


@pytest.mark.parametrize("left_out", sorted(REDDENED))
def test_each_protection_is_missed(world: World, left_out: str) -> None:
    red = {name: message for name, (ok, message) in probe(world, left_out).items() if not ok}
    assert red.keys() >= REDDENED[left_out], red
    assert not world.listing()["/dev/shm"]


def test_a_store_takes_weaker_walls_only_where_it_was_told_to(world: World) -> None:
    with world.session("", **ACCOUNT) as session:
        status, said = session.wait()
        assert status == 4
        assert "store.sites.here.accept_account_walls is not set" in said
        assert world.listing() == session.before


@pytest.fixture(scope="module")
def weak(person: Person, software: Software) -> Iterator[World]:
    """A store that accepts weaker walls at its site, and would give leases of 15 minutes."""
    store = RealStore(lease_minutes=15, sites=SITES, sessions_per_person=64)
    try:
        store.start()
        yield World(store, person, software)
    finally:
        store.remove()


LOOK = f"""
import errno, hashlib, json, os, pathlib, socket, struct, sys
from kakehashi.link.session import Session
from kakehashi.link.sftp import Sftp
session = Session.current()

def channel(path):
    link = socket.socket(socket.AF_UNIX)
    link.connect(str(path))
    made = Sftp(link)
    made.greet()
    return made

def read(path):
    with channel(session.socket) as store:
        handle = store.open(path)
        size, data = store.size(handle), b""
        while len(data) < size:
            store.ask_read(handle, len(data), min(size - len(data), 200000))
            store.flush()
            data += bytes(store.receive().data)
        return data

def attempt(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

data = read("/series/{SERIES}.ozx")
for name in ("HOME", "TMPDIR", "XDG_RUNTIME_DIR", "KAKEHASHI_SHM"):
    pathlib.Path(os.environ[name], "pixels").write_bytes(data)
account = pathlib.Path("{{home}}")
keeper = int(os.environ["KEEPER"]) if "KEEPER" in os.environ else os.getppid()
found = dict(
    hash=hashlib.sha256(data).hexdigest(), environment=dict(os.environ), cwd=os.getcwd(),
    session=json.loads(session.source.read_text()), lease=session.lease().state,
    files={{{{str(place): attempt((place / "pixels").write_bytes, data)
           for place in (account, *map(pathlib.Path, ("/tmp", "/var/tmp", "/dev/shm")))}}}},
    listing=attempt(os.listdir, account),
    tell=attempt(pathlib.Path(session.source.parent, "lease.json").write_text, "x"),
)
with channel(session.work_socket) as work:
    found["work"] = work.outstanding
print("hello", flush=True)
pathlib.Path(os.environ["HOME"], "look.part").write_text(json.dumps(found))
os.rename(os.environ["HOME"] + "/look.part", os.environ["HOME"] + "/look.json")
while not pathlib.Path(os.environ["HOME"], "finish").exists():
    pass
"""


def folder(weak: World) -> Path:
    """Wait for the session's folder on the node."""
    found: list[Path] = []

    def there() -> bool:
        found[:] = list(Path("/dev/shm").glob("kakehashi-*"))
        return bool(found) and (found[0] / "job").exists()

    until(there, seconds=30, what="the session's folder")
    return found[0]


def seen(weak: World, session: Session) -> dict[str, Any]:
    """Wait for what the payload has found."""
    path = folder(weak) / "home/look.json"

    def there() -> bool:
        assert session.process.poll() is None, session.wait()
        return path.exists()

    until(there, seconds=30, what="the payload's look")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_payload_reads_the_store_and_leaves_nothing(weak: World) -> None:
    script = LOOK.format(home=weak.person.home)
    with weak.session(script, **ACCOUNT) as session:
        found = seen(weak, session)
        place = folder(weak)
        session.family()
        (place / "home/finish").write_text("")
        status, said = session.wait()
        assert status == 0, said
        items = {item["item"]: item for item in reported(session)}
    assert found["hash"] == hashlib.sha256(weak.content).hexdigest()
    assert found["session"]["view"] is None
    assert found["lease"] == "live"
    assert grant_minutes(session) <= 5
    assert set(found["files"].values()) == {"EACCES"}
    assert (found["listing"], found["tell"]) == ("EACCES", "EACCES")
    assert found["environment"]["HOME"] == f"{place}/home"
    assert weak.listing() == session.before
    assert session.all_gone()
    assert items["processes"]["result"] == items["files"]["result"] == "gone"
    assert items["walls"]["result"] == "seen"


def grant_minutes(session: Session) -> float:
    """Return how long the first lease was, by the store's book."""
    expires = dt.datetime.fromisoformat(session.portal.grants[0]["expires_at"])
    issued = dt.datetime.fromisoformat(session.portal.grants[0]["issued_at"])
    return (expires - issued).total_seconds() / 60


def reported(session: Session) -> list[dict[str, str]]:
    (sent,) = session.portal.called("leave")
    items: list[dict[str, str]] = json.loads(sent["message"])["items"]
    return items


STAY = """
import os, pathlib, signal, subprocess, sys
for kind in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(kind, signal.SIG_IGN)
# A daemon of the old kind: twice forked, in a session of its own, deaf.
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    pathlib.Path(os.environ["HOME"], "daemon").write_text(str(os.getpid()))
    while True:
        signal.pause()
os.wait()
home = pathlib.Path(os.environ["HOME"])
while not (home / "daemon").exists():
    pass
(home / "look.json").write_text("{}")
while True:
    signal.pause()
"""


def family(session: Session) -> dict[str, int]:
    """Name the wrapper's own processes: keeper, its warden, and the payload's init."""
    found = session.family()
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
               for pid in found}  # fmt: skip
    keeper = session.process.pid
    warden = next(pid for pid in parents if parents[pid] == keeper and found[pid] != "ssh")
    init = next(pid for pid in parents if parents[pid] == warden)
    return {"keeper": keeper, "warden": warden, "init": init}


def assert_nothing_left(session: Session) -> None:
    until(session.all_gone, seconds=60, what="the end of all processes")
    assert session.world.listing() == session.before


@pytest.mark.parametrize("victim", ["keeper", "warden", "init"])
def test_kill_of_any_part_of_the_wrapper_ends_all(weak: World, victim: str) -> None:
    with weak.session(STAY, **ACCOUNT) as session:
        seen(weak, session)
        os.kill(family(session)[victim], signal.SIGKILL)
        session.wait(30)
        assert_nothing_left(session)
        if victim != "keeper":
            items = {item["item"]: item["result"] for item in reported(session)}
            assert items["processes"] == items["files"] == "gone"


def test_a_stop_ends_what_is_deaf_to_it(weak: World) -> None:
    with weak.session(STAY, **ACCOUNT) as session:
        seen(weak, session)
        session.family()
        session.process.send_signal(signal.SIGTERM)
        status, said = session.wait(30)
        assert status == 0, said
        assert_nothing_left(session)


def test_what_outlives_keeper_and_warden_is_the_epilogs(weak: World) -> None:
    with weak.session(STAY, **ACCOUNT) as session:
        seen(weak, session)
        parts = family(session)
        # Both at once: neither may hear of the other's end.
        for name in ("keeper", "warden"):
            os.kill(parts[name], signal.SIGSTOP)
        for name in ("warden", "keeper"):
            os.kill(parts[name], signal.SIGKILL)
        session.wait(30)
        left = weak.listing()["/dev/shm"] - session.before["/dev/shm"]
        assert left, "the control: there is something for the epilog to do"
        uid = weak.person.uid
        other = {one["item"]: one for one in scan.look(scan.Ended("8", uid, alone=False), ())}
        assert other["session folders"]["result"] == "seen"
        assert weak.listing()["/dev/shm"] - session.before["/dev/shm"] == left
        own = {one["item"]: one for one in scan.look(scan.Ended("7", uid, alone=True), ())}
        assert own["session folders"]["result"] == own["processes"]["result"] == "gone"
        assert "found and killed" in own["processes"]["detail"]
        assert_nothing_left(session)


KNOCK = """
import socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
try:
    link.sendall(bytes([0, 0, 0, 5, 1, 0, 0, 0, 3]))
    print(len(link.recv(9)))
except (BrokenPipeError, ConnectionResetError):
    print(0)
"""


def test_the_channels_are_the_payloads_alone(weak: World) -> None:
    """Another program of the same account reaches the sockets' files, and gets no channel."""
    inside = KNOCK.replace("sys.argv[1]", "socket_path").replace(
        "link.connect",
        "import os, pathlib\n"
        "socket_path = os.environ['KAKEHASHI_SESSION'].replace('session.json', 'store.sock')\n"
        "link.connect",
    )
    own = f"{inside.replace('print(len(link.recv(9)))', 'answer = len(link.recv(9))')}\n"
    own += "pathlib.Path(os.environ['HOME'], 'look.json').write_text(str(answer))\n"
    own += "import signal; signal.pause()\n"
    with weak.session(own, **ACCOUNT) as session:
        assert seen(weak, session) == 9
        for name in ("store.sock", "work.sock"):
            path = str(folder(weak) / "run" / name)
            done = weak.person.run("/usr/bin/python3", "-c", KNOCK, path)
            assert done.stdout.strip() == "0", done
        agent = str(folder(weak) / "auth/agent")
        ask = KNOCK.replace("bytes([0, 0, 0, 5, 1, 0, 0, 0, 3])", "bytes([0, 0, 0, 1, 11])")
        done = weak.person.run("/usr/bin/python3", "-c", ask, agent)
        assert done.stdout.strip() == "0", done
        session.process.send_signal(signal.SIGTERM)
        session.wait(30)
