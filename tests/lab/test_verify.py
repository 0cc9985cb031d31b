"""``kakehashi verify-site`` on the lab: its controls turn red, and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kakehashi.verify.canary import self_test_of
from tests.lab import verify
from tests.lab.lab import REPOSITORY, Lab

pytestmark = pytest.mark.lab


def test_the_search_finds_the_pattern_in_every_place_and_form(lab: Lab) -> None:
    report = self_test_of(verify.deployment(lab))
    assert report["stayed_green"] == []
    # Twelve forms in a dozen folders, and seven other places, on each host.
    assert report["controls"] > 100 * len(verify.ROLES)
    assert report["ok"]


def test_the_command_prints_one_object_and_refuses_what_it_does_not_know(lab: Lab) -> None:
    command = [sys.executable, "-m", "kakehashi.cli", "verify-site", "slurm", "--lab", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"] is True
    assert report["end"] == "stop"
    assert report["allowed_in_session"]
    odd = subprocess.run(
        [*command, "--end", "sing"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert odd.returncode == 1
    assert "there is no way 'sing' to end a session" in odd.stderr.replace("\n", " ")
