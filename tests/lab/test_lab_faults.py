"""The lab's faults do what they say: each has its effect, and its cure takes it away."""

from __future__ import annotations

import pytest
import requests

from tests.lab import faults, look
from tests.lab import portal as services
from tests.lab.hosts import wait_for
from tests.lab.lab import PLATFORM, SITE, Lab

pytestmark = pytest.mark.lab

CONNECT = (
    "import socket, sys\n"
    "link = socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))\n"
    "print(link.recv(4).decode())\n"
)
# Longer than any answer of the lab, shorter than the first repeated packet that would be let in.
SILENCE_S = "1"


def answers(lab: Lab, source: str, target: str, port: int) -> bool:
    """Return whether a service that speaks first is heard from a host."""
    done = lab[source].run(
        [services.PYTHON, "-I", "-c", CONNECT, target, str(port), SILENCE_S], check=False
    )
    return done.stdout.strip() == "SSH-"


def pings(lab: Lab, source: str, target: str) -> bool:
    """Return whether a host of the same network is there."""
    refused = lab[source].run(
        [services.PYTHON, "-I", "-c", CONNECT, target, "9", SILENCE_S], check=False
    )
    return "ConnectionRefusedError" in refused.stderr


def slurm_says(lab: Lab, name: str) -> str:
    """Return a node's state as Slurm has it."""
    return lab["head"].run(["sinfo", "-h", "-N", "-n", name, "-o", "%T"]).stdout.strip()


def test_a_cut_host_reaches_nothing_until_it_is_healed(lab: Lab) -> None:
    store = PLATFORM["store"]
    wait_for("an answer", lambda: answers(lab, "node1", store, 22))
    faults.cut(lab, "node1")
    try:
        wait_for("silence", lambda: not answers(lab, "node1", store, 22))
        wait_for("silence", lambda: not pings(lab, "node1", SITE["head"]))
        wait_for("silence", lambda: not pings(lab, "head", SITE["node1"]))
        # The control: others are not cut.
        wait_for("an answer", lambda: answers(lab, "node2", store, 22))
        wait_for("an answer", lambda: pings(lab, "node2", SITE["head"]))
    finally:
        faults.heal(lab, "node1")
    wait_for("an answer", lambda: answers(lab, "node1", store, 22))
    wait_for("an answer", lambda: pings(lab, "node1", SITE["head"]))


@pytest.mark.parametrize(("one", "other"), [("node1", "store"), ("login", "store")])
def test_a_cut_between_two_hosts_leaves_them_the_others(lab: Lab, one: str, other: str) -> None:
    addresses = {**PLATFORM, **SITE}
    wait_for("an answer", lambda: answers(lab, one, addresses[other], 22))
    faults.cut(lab, one, other)
    try:
        wait_for("silence", lambda: not answers(lab, one, addresses[other], 22))
        wait_for("an answer", lambda: answers(lab, "node2", addresses[other], 22))
    finally:
        faults.heal(lab, one, other)
    wait_for("an answer", lambda: answers(lab, one, addresses[other], 22))


def test_a_cut_holds_connections_that_were_there_before(lab: Lab) -> None:
    script = CONNECT + "print('open', flush=True)\nsys.stdin.readline()\nlink.settimeout(1)\n"
    script += "link.sendall(b'SSH-2.0-nobody\\r\\n')\nlink.recv(200)\nprint(link.recv(200)[:0])\n"
    outcome = {}
    for state in ("whole", "cut"):
        talk = lab["node1"].popen(
            [services.PYTHON, "-I", "-c", script, PLATFORM["store"], "22", "5"],
            stdin=-1, stdout=-1, stderr=-1,
        )  # fmt: skip
        assert talk.stdin is not None
        assert talk.stdout is not None
        assert talk.stdout.readline() == b"SSH-\n"
        assert talk.stdout.readline() == b"open\n"
        if state == "cut":
            faults.cut(lab, "node1", "store")
        try:
            _, errors = talk.communicate(b"\n", timeout=20)
            outcome[state] = errors
        finally:
            if state == "cut":
                faults.heal(lab, "node1", "store")
    # Before the cut the server goes on talking.
    assert b"timed out" not in outcome["whole"]
    assert b"timed out" in outcome["cut"]


def test_a_killed_node_is_gone_and_returns_with_its_disk_alone(lab: Lab) -> None:
    node = lab["node2"]
    node.write("/var/lib/planted", "on disk")
    for place in ("/tmp", "/var/tmp", "/dev/shm", "/run"):
        node.write(f"{place}/planted", "in memory")
    wait_for("an idle node", lambda: slurm_says(lab, "node2") == "idle")
    faults.kill_node(lab, "node2")
    try:
        assert not node.alive
        wait_for("silence", lambda: not pings(lab, "head", SITE["node2"]))
    finally:
        returned = faults.return_node(lab, "node2")
    assert lab["node2"] is returned
    assert returned.pid != node.pid
    assert returned.path("/var/lib/planted").read_text() == "on disk"
    for place in ("/tmp", "/var/tmp", "/dev/shm", "/run"):
        assert not returned.path(f"{place}/planted").exists()
    returned.path("/var/lib/planted").unlink()
    wait_for("an idle node", lambda: slurm_says(lab, "node2") == "idle")
    ran = lab["head"].run(["srun", "--nodelist=node2", "hostname"]).stdout.strip()
    assert ran == "node2"
    wait_for("an answer", lambda: answers(lab, "node2", PLATFORM["store"], 22))


def test_a_killed_store_answers_nobody_until_it_is_started(lab: Lab) -> None:
    faults.stop_store(lab)
    try:
        wait_for("silence", lambda: not answers(lab, "node1", PLATFORM["store"], 22))
        wait_for("closed connections", lambda: not look.store_connections(lab))
    finally:
        faults.start_store(lab)
    wait_for("the store", lambda: answers(lab, "node1", PLATFORM["store"], 22))
    faults.restart_store(lab)
    wait_for("the store", lambda: answers(lab, "node1", PLATFORM["store"], 22))


def test_a_killed_hub_answers_nobody_until_it_is_started(lab: Lab) -> None:
    def status() -> int:
        with requests.Session() as http:
            http.trust_env = False
            return http.get(
                f"{lab.url}/hub/health", verify=str(lab.ca_file), timeout=10
            ).status_code

    assert status() == 200
    faults.kill_hub(lab)
    try:
        wait_for("silence of the hub", lambda: status() == 503, 10)
    finally:
        faults.start_hub(lab)
    assert status() == 200


@pytest.mark.parametrize(("queue", "there"), [("gpu", True), ("plain", False)])
def test_jobs_of_the_plain_queue_have_neither_user_namespaces_nor_fuse(
    lab: Lab, queue: str, there: bool
) -> None:
    job = ["srun", f"--partition={queue}"]
    attempts = (
        ["/usr/bin/unshare", "--user", "true"],
        ["/usr/bin/test", "-e", "/dev/fuse"],
        # Through a thread's clone as well as by unshare itself.
        ["/usr/bin/bwrap", "--unshare-user", "--ro-bind", "/", "/", "true"],
    )
    for attempt in attempts:
        done = lab["head"].run([*job, *attempt], user="ka0001", check=False)
        assert (done.returncode == 0) == there, (attempt, done.stderr)
    assert lab["head"].run([*job, "/usr/bin/true"], user="ka0001").returncode == 0
