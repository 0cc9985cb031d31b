"""The probe is green in a real payload's world, and red where a protection is left out."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.session.real import World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts")

TRY = """
import json, sys
from kakehashi.session import check, plan
node = plan.Node(sys.argv[1], (), tuple(sys.argv[3:]), 64, True, True)
world = check.plan_for(node, stand_ins=True, session="0" * 32)
if sys.argv[2]:
    world = check.without(world, sys.argv[2])
print(json.dumps([one.to_json() for one in check.try_world(world)]))
"""

REDDENED = {
    "seccomp": {"socket families", "system calls", "privileges", "core dumps"},
    "network": {"network"},
    "capabilities": {"privileges"},
    "namespaces": {"new namespaces"},
    "read-only": {"writing"},
    "init": {"init"},
    "core": {"core dumps"},
    "descriptors": {"open files"},
}


def probe(world: World, left_out: str = "", *devices: str) -> dict[str, tuple[bool, str]]:
    software = world.software
    argv = [software.python, "-I", "-c", TRY, str(software.root), left_out, *devices]
    done = world.person.run(*argv)
    assert done.returncode == 0, done.stderr
    return {
        one["check"].removeprefix("payload: "): (one["ok"], one["message"])
        for one in json.loads(done.stdout)
    }


def test_all_is_well_in_a_whole_world(world: World) -> None:
    results = probe(world)
    assert len(results) == 16
    assert not {name: result for name, result in results.items() if not result[0]}


@pytest.mark.parametrize("left_out", sorted(REDDENED))
def test_each_protection_is_missed(world: World, left_out: str) -> None:
    red = {name for name, (ok, _) in probe(world, left_out).items() if not ok}
    assert red >= REDDENED[left_out]


def test_a_job_that_may_dump_nothing_will_do_unless_a_handler_waits(world: World) -> None:
    """The kernel runs a handler that the pattern pipes to at a limit of none, but not of one."""
    piped = Path("/proc/sys/kernel/core_pattern").read_text().startswith("|")
    argv = [world.software.python, "-I", "-c", TRY, str(world.software.root), ""]
    done = world.person.run("prlimit", "--core=0:0", *argv)
    assert done.returncode == 0, done.stderr
    (core,) = [one for one in json.loads(done.stdout) if one["check"] == "payload: core dumps"]
    assert core["ok"] is not piped, core["message"]


def test_devices_of_the_site_are_shown_and_no_others(world: World) -> None:
    assert probe(world, "", "/dev/net/*", "/dev/kmsg")["devices"] == (
        True,
        "only what is allowed",
    )


CHECK = """
import sys
from kakehashi.session import check, plan
node = plan.Node(sys.argv[1], (), (), 64, True, False)
sys.exit(repr([one for one in check.node_checks(node) if not one.ok]))
"""


def test_a_whole_node_is_found_well(world: World) -> None:
    argv = [world.software.python, "-I", "-c", CHECK, str(world.software.root)]
    assert world.person.run(*argv).stderr == "[]\n"


SHOWN = """
import json, sys
from kakehashi.session import check, plan
node = plan.Node(sys.argv[1], (sys.argv[2],), (), 64, True, False)
print(json.dumps({one.check: [one.ok, one.message] for one in check.node_checks(node)}))
"""

CARRY = """
import json, os, socket, sys, threading
from kakehashi.session import check, plan, warden
software, shown = sys.argv[1:]
os.mkfifo(shown + "/pipe")
listener = socket.socket(socket.AF_UNIX)
listener.bind(shown + "/socket")
listener.listen(1)
came = {}
def hear():
    came["socket"] = listener.accept()[0].recv(9).decode()
def read():
    came["pipe"] = open(shown + "/pipe").read()
threads = [threading.Thread(target=one, daemon=True) for one in (hear, read)]
for thread in threads:
    thread.start()
handle = warden.start()
handle.build(check.plan_for(
    plan.Node(software, (shown,), (), 64, True, True), stand_ins=True, session="0" * 32
))
payload = (
    "import socket, sys; one = socket.socket(socket.AF_UNIX); one.connect(sys.argv[1] + '/socket');"
    "one.send(b'data'); open(sys.argv[1] + '/pipe', 'w').write('data')"
)
argv = [sys.executable, "-I", "-c", payload, shown]
handle.send({"start": {"argv": argv, "environment": {}, "person": "a", "session": "0" * 32}})
for thread in threads:
    thread.join(20)
print(json.dumps(came))
"""


@pytest.fixture
def shown(world: World) -> Iterator[Path]:
    """A folder of the node that belongs to root."""
    folder = Path(tempfile.mkdtemp(prefix="kakehashi-shown-", dir="/srv"))
    (folder / "models").mkdir()
    for path in (folder, folder / "models"):
        path.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def checks(world: World, shown: Path) -> dict[str, tuple[bool, str]]:
    root = str(world.software.root)
    done = world.person.run(world.software.python, "-I", "-c", SHOWN, root, str(shown))
    assert done.returncode == 0, done.stderr
    return {name: (ok, words) for name, (ok, words) in json.loads(done.stdout).items()}


def test_what_is_shown_read_only_would_carry_data_out_where_it_can_be_written(
    world: World, shown: Path
) -> None:
    """The control of the three tests below: why no shown folder may be the person's own."""
    os.chown(shown, world.person.uid, world.person.gid)
    root = str(world.software.root)
    done = world.person.run(world.software.python, "-I", "-c", CARRY, root, str(shown))
    assert json.loads(done.stdout) == {"socket": "data", "pipe": "data"}, done.stderr


def test_a_shown_folder_of_root_is_well(world: World, shown: Path) -> None:
    assert not {name: one for name, one in checks(world, shown).items() if not one[0]}


def test_a_shown_folder_of_the_persons_own_is_refused_at_each_start(
    world: World, shown: Path
) -> None:
    os.chown(shown, world.person.uid, world.person.gid)
    well, words = checks(world, shown)["software"]
    assert not well
    assert str(shown) in words


@pytest.mark.parametrize("special", ["folder", "pipe", "socket"])
def test_a_way_out_deeper_down_is_found_by_the_check_of_a_node(
    world: World, shown: Path, special: str
) -> None:
    place = shown / "models" / special
    with socket.socket(socket.AF_UNIX) as listener:
        match special:
            case "folder":
                place.mkdir()
            case "pipe":
                os.mkfifo(place)
            case _:
                listener.bind(str(place))
        place.chmod(0o777)
        results = checks(world, shown)
    assert results["software"][0]
    well, words = results["shown folders"]
    assert not well
    assert str(place) in words
