"""The probe is green in a real payload's world, and red where a protection is left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.session.real import World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts")

TRY = """
import json, sys
from kakehashi.session import check, plan
node = plan.Node(sys.argv[1], (), tuple(sys.argv[3:]), 64, True, True)
world = check.plan_for(node, stand_ins=True)
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
