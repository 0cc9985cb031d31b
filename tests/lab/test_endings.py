"""However a session ends: the canary finds nothing, or the receipt says who has still to look."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kakehashi.verify.canary import Canary
from tests.lab import faults, look, verify
from tests.lab.hosts import wait_for
from tests.lab.lab import NODES, Lab

pytestmark = pytest.mark.lab

WAYS = ("stop", "cancel", "kill-wrapper", "kill-slurmstepd", "time-limit", "kill-hub",
        "store-unreachable", "wrapper-and-store", "held-namespaces")  # fmt: skip

# Where neither hub nor store hears what the epilog has to say.
UNHEARD = {"kill-hub", "wrapper-and-store"}


@pytest.fixture(autouse=True)
def _whole(lab: Lab) -> Iterator[None]:
    """Leave the lab as it was, whatever a test has broken."""
    yield
    for name in NODES:
        if not lab[name].alive:
            faults.return_node(lab, name)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_however_a_session_ends(lab: Lab, way: str) -> None:
    canary = Canary(verify.deployment(lab), way)
    report = canary.run()
    assert report["findings"] == []
    assert not any(report["live"].values()), report["live"]
    assert all(report["control"].values()), report["control"]
    assert report["not_allowed_but_done"] == []
    assert "submit a job" in report["refused_in_session"]
    assert report["ok"], report
    if way not in UNHEARD:
        assert report["receipt"] == "complete", report["pending"]
        return
    # The site's root could tell nobody: the receipt says so, until it is heard.
    assert report["receipt"] == "pending"
    assert any("has to scan the node" in detail for detail in report["pending"])
    for name in NODES:
        faults.scan_pending(lab, name)
    receipt = look.receipt(lab, report["session"])
    assert receipt["state"] == "complete"
    assert "site" in {item["witness"] for item in receipt["items"]}


def test_a_dead_nodes_receipt_waits_until_the_node_is_back_and_scanned(lab: Lab) -> None:
    canary = Canary(verify.deployment(lab), "node-death")
    report = canary.run()
    assert report["receipt"] == "pending"
    assert any("has to scan the node" in detail for detail in report["pending"])
    assert report["findings"] == []
    (dead,) = [name for name in NODES if not lab[name].alive]
    unseen = {"host": dead, "place": "the host", "reason": f"{dead} is down"}
    assert unseen in report["not_observable"]
    faults.return_node(lab, dead)
    wait_for(
        "the returned node's report",
        lambda: look.receipt(lab, report["session"])["state"] == "complete",
        30,
    )
    answers = canary.search_all()
    assert [one for answer in answers.values() for one in answer["findings"]] == []
    assert answers[dead]["looked"], "the returned node was searched"
