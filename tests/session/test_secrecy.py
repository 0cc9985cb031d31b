"""Another process of the same person, outside the session, gets at nothing of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.session.test_session import STAY, items

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.session.real import Session, World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")

PARTS = ("keeper", "entering", "warden", "middle", "init", "sshfs", "ssh", "view")

ATTACK = """
import ctypes, fcntl, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
pid = int(sys.argv[1])

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

if len(sys.argv) > 2:
    # The owner of a user namespace has every capability in it: go in, and try from there.
    space = os.open(f"/proc/{sys.argv[2]}/ns/user", os.O_RDONLY)
    if sys.argv[3] == "warden":
        space = fcntl.ioctl(space, 0xB702)
    checked(libc.setns(space, 0))

def memory():
    with open(f"/proc/{pid}/maps") as maps:
        start = int(next(line for line in maps if "[stack]" in line).split("-")[0], 16)
    os.pread(os.open(f"/proc/{pid}/mem", os.O_RDONLY), 16, start)

def trace():
    checked(libc.ptrace(16, pid, None, None))
    os.waitpid(pid, 0x40000000)
    libc.ptrace(17, pid, None, None)

def steal():
    handle = os.pidfd_open(pid)
    checked(libc.syscall(438, handle, 0, 0))

def enter():
    checked(libc.setns(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY), 0))

ways = {
    "environ": lambda: open(f"/proc/{pid}/environ", "rb").read(),
    "memory": memory,
    "trace": trace,
    "root": lambda: os.listdir(f"/proc/{pid}/root/"),
    "folder": lambda: os.listdir(f"/proc/{pid}/cwd/"),
    "files": lambda: os.listdir(f"/proc/{pid}/fd"),
    "steal a file": steal,
    "enter": enter,
}
open_ways = []
for name, way in ways.items():
    try:
        way()
        open_ways.append(name)
    except OSError:
        pass
print(json.dumps(open_ways))
"""


@pytest.fixture(scope="module")
def running(world: World) -> Iterator[Session]:
    with world.session(STAY) as session:
        session.file("up")
        yield session


def attack(world: World, pid: int, *further: str) -> list[str]:
    """Try every way at a process, as another process of the person."""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", ATTACK, str(pid), *further],
        user=world.person.uid,
        group=world.person.gid,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
    )
    ways: list[str] = json.loads(done.stdout)
    return ways


@pytest.mark.parametrize("part", PARTS)
def test_no_way_into_the_wrapper(world: World, running: Session, part: str) -> None:
    assert attack(world, running.tree()[part]) == []


def payload(session: Session) -> int:
    init = session.tree()["init"]
    return next(pid for pid in session.family() if _parent(pid) == init)


def test_the_attack_works_where_it_can(world: World, running: Session) -> None:
    """Otherwise the checks above would show nothing: the payload is open, and has no key."""
    ways = set(attack(world, payload(running)))
    assert {"environ", "memory", "trace", "files", "enter"} <= ways


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("owner", ["payload", "warden"])
def test_no_way_into_the_wrapper_from_its_own_namespaces(
    world: World, running: Session, part: str, owner: str
) -> None:
    assert attack(world, running.tree()[part], str(payload(running)), owner) == []


def _parent(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[1])


def test_no_argument_or_environment_holds_the_ticket(running: Session) -> None:
    ticket = running.document["ticket"].encode()
    for pid in [running.process.pid, *running.family()]:
        for name in ("cmdline", "environ"):
            assert ticket not in Path(f"/proc/{pid}/{name}").read_bytes()


ASK = """
import os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(f"/proc/self/fd/{sys.argv[1]}/agent")
try:
    link.sendall(bytes.fromhex("000000010b"))
    print(link.recv(100).hex() or "nothing")
except ConnectionError:
    print("nothing")
"""


def test_the_agent_answers_no_stranger_and_reports_him(world: World) -> None:
    with world.session(STAY) as session:
        session.file("up")
        # Root opens the door for the stranger here; his own uid gives him no way in.
        folder = os.open(f"/proc/{session.tree()['warden']}/root/dev/shm/auth", os.O_RDONLY)
        options: dict[str, Any] = {"user": world.person.uid, "group": world.person.gid}
        done = subprocess.run(
            [sys.executable, "-I", "-c", ASK, str(folder)],
            pass_fds=[folder],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            **options,
        )
        os.close(folder)
        assert done.stdout.strip() == "nothing", done.stderr
        session.process.terminate()
        session.wait(10)
        assert "all refused" in items(session)["key agent"]["detail"]


def test_no_secret_lies_in_the_private_folder(world: World, running: Session) -> None:
    """What ssh needs has no key in it: whoever gets in there finds public things."""
    folder = Path(f"/proc/{running.tree()['warden']}/root/dev/shm/auth")
    assert {path.name for path in folder.iterdir()} == {
        "agent",
        "cert",
        "id.pub",
        "known_hosts",
        "ssh",
        "sshfs",
    }
    for name in ("cert", "id.pub", "known_hosts"):
        assert "PRIVATE" not in (folder / name).read_text()
