"""Sessions on nodes without namespaces and mounts: the weaker walls, and what they keep."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.authority.real import until
from tests.session.real import SERIES

if TYPE_CHECKING:
    from tests.session.real import Session, World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts")

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


def folder(world: World) -> Path:
    """Wait for the session's folder on the node."""
    found: list[Path] = []

    def there() -> bool:
        found[:] = list(Path("/dev/shm").glob("kakehashi-*"))
        return bool(found) and (found[0] / "job").exists()

    until(there, seconds=30, what="the session's folder")
    return found[0]


def seen(world: World, session: Session) -> dict[str, Any]:
    """Wait for what the payload has found."""
    path = folder(world) / "home/look.json"

    def there() -> bool:
        assert session.process.poll() is None, session.wait()
        return path.exists()

    until(there, seconds=30, what="the payload's look")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_payload_reads_the_store_and_leaves_nothing(world: World) -> None:
    script = LOOK.format(home=world.person.home)
    with world.session(script, node={"walls": "account"}) as session:
        found = seen(world, session)
        place = folder(world)
        session.family()
        (place / "home/finish").write_text("")
        status, said = session.wait()
        assert status == 0, said
        items = {item["item"]: item for item in reported(session)}
    assert found["hash"] == hashlib.sha256(world.content).hexdigest()
    assert found["session"]["view"] is None
    assert found["lease"] == "live"
    assert set(found["files"].values()) == {"EACCES"}
    assert (found["listing"], found["tell"]) == ("EACCES", "EACCES")
    assert found["environment"]["HOME"] == f"{place}/home"
    assert world.listing() == session.before
    assert session.all_gone()
    assert items["processes"]["result"] == items["files"]["result"] == "gone"
    assert items["walls"]["result"] == "seen"


def reported(session: Session) -> list[dict[str, str]]:
    (sent,) = session.portal.called("leave")
    items: list[dict[str, str]] = json.loads(sent["message"])["items"]
    return items
