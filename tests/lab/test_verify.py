"""``kakehashi verify-site`` on the lab: its controls turn red, and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kakehashi.verify.canary import self_test_of
from tests.lab import verify
from tests.lab.client import Client
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


def test_an_operators_plan_does_as_well(lab: Lab, tmp_path: Path) -> None:
    """As on a deployment: a person's own token, and a command by which to be root on each host."""
    canary = Client(lab.url, verify.PERSON, str(lab.ca_file))
    canary.log_in()
    made = canary.call("POST", f"/hub/api/users/{verify.PERSON}/tokens", {"expires_in": 3600})
    assert made.status_code == 201, made.text
    token = tmp_path / "token"
    token.write_text(made.json()["token"])
    token.chmod(0o600)
    hosts = "".join(
        f"""
        [[hosts]]
        name = "{name}"
        role = "{role}"
        run = {json.dumps(lab[name].prefix())}
        skip = {json.dumps(verify.SKIP.get(name, ()))}
        """
        for name, role in verify.ROLES.items()
    )
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f"""
        portal = "{lab.url}"
        ca_file = "{lab.ca_file}"
        person = "{verify.PERSON}"
        token_file = "{token}"
        project = "canary"
        options = {{ queue = "gpu", gpus = 0, hours = 0.5 }}
        {hosts}
        """
    )
    command = [sys.executable, "-m", "kakehashi.cli", "verify-site", "slurm", "--json"]
    done = subprocess.run(
        [*command, "--plan", str(plan)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"] is True
    plan.write_text(plan.read_text().replace('project = "canary"', 'projekt = "canary"'))
    wrong = subprocess.run(
        [*command, "--plan", str(plan)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert "projekt" in wrong.stderr
