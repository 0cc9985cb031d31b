"""``kakehashi bench link --site`` on the lab: sessions started, measured, and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kakehashi.link.bench.report import Study
from tests.lab.client import Client
from tests.lab.hosts import heeding_ctrl_c, wait_for
from tests.lab.lab import REPOSITORY, Lab

pytestmark = pytest.mark.lab

COMMAND = [sys.executable, "-m", "kakehashi.cli", "bench", "link", "--site", "slurm", "--quick"]
PROJECT = "lung-ct"


def plan(lab: Lab, person: Client, folder: Path) -> Path:
    """Write an operator's plan for one person, who gives a token of their own."""
    made = person.call("POST", f"/hub/api/users/{person.name}/tokens", {"expires_in": 3600})
    assert made.status_code == 201, made.text
    token = folder / f"{person.name}.token"
    token.write_text(made.json()["token"])
    token.chmod(0o600)
    path = folder / f"{person.name}.toml"
    path.write_text(
        f"""
        portal = "{lab.url}"
        ca_file = "{lab.ca_file}"
        person = "{person.name}"
        token_file = "{token}"
        project = "{PROJECT}"
        options = {{ queue = "gpu", gpus = 0, hours = 0.5 }}
        [[hosts]]
        name = "not used"
        role = "node"
        run = ["false"]
        """
    )
    return path


def parts(*names: str) -> list[str]:
    return [word for name in names for word in ("--part", name)]


def test_two_nodes_are_measured_alone_and_at_once(
    lab: Lab, person: Callable[[str], Client], tmp_path: Path
) -> None:
    people = [person("tanaka"), person("suzuki")]
    plans = [word for one in people for word in ("--plan", str(plan(lab, one, tmp_path)))]
    out = tmp_path / "out"
    done = subprocess.run(
        [*COMMAND, *plans, *parts("line", "reader", "write"), "--out", str(out)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    study = Study.model_validate_json((out / "report.json").read_bytes())
    assert [run.label for run in study.runs] == ["alone", "1 of 2 at once", "2 of 2 at once"]
    alone, *at_once = (run.report for run in study.runs)
    assert {figure.part for figure in alone.figures} == {"line", "reader", "write"}
    assert {figure.part for one in at_once for figure in one.figures} == {"reader"}
    # A mount is there on the lab's nodes, and a series in the cohort.
    assert alone.figure("view, packed, one file at a time") is not None
    assert alone.cohort.series_used >= 1
    assert all(min(one.values) > 0 for one in alone.figures if one.unit == "MB/s")
    assert alone.site == "slurm"
    assert "alone: line" in done.stderr
    text = (out / "report.md").read_text()
    assert "## Side by side" in text
    assert (out / "rates-1.png").read_bytes().startswith(b"\x89PNG")
    # What was said and written names no series.
    manifest = json.loads(series(lab))
    assert manifest
    for one in manifest:
        assert one["series_uid"] not in text + done.stdout + done.stderr
    for one in people:
        assert one.server() is None


def series(lab: Lab) -> str:
    from tests.lab import portal

    command = [portal.PYTHON, "-m", "kakehashi.cli", "store", "list", "--json"]
    return lab["store"].run(command, env={"KAKEHASHI_CONFIG": portal.CONFIG}).stdout


def test_ctrl_c_gives_what_there_is_and_ends_the_session(
    lab: Lab, person: Callable[[str], Client], tmp_path: Path
) -> None:
    tanaka = person("tanaka")
    said, out = tmp_path / "said", tmp_path / "out"
    command = [*COMMAND, "--plan", str(plan(lab, tanaka, tmp_path)), "--out", str(out)]
    with said.open("wb") as file, heeding_ctrl_c():
        process = subprocess.Popen(
            [*command, *parts("line", "loop"), "--compute", "60"],
            cwd=REPOSITORY,
            env=dict(os.environ),
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
    try:
        wait_for("the loop", lambda: "alone: loop" in said.read_text(), 180)
        running = tanaka.server()
        other = subprocess.run(
            [*command[:-1], str(tmp_path / "other")],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert other.returncode == 1
        assert "tanaka has a session already" in other.stdout.replace("\n", " ")
        now = tanaka.server()
        assert running is not None
        assert now is not None
        assert now["started"] == running["started"]
        process.send_signal(signal.SIGINT)
        # A minute for the measurement, two for the session's end, and a busy machine.
        assert process.wait(300) == 1, said.read_text()
    finally:
        process.kill()
        process.wait()
    study = Study.model_validate_json((out / "report.json").read_bytes())
    (run,) = study.runs
    assert run.report.stopped == "stopped by hand in: loop"
    assert run.report.figure("round trip") is not None
    assert tanaka.server() is None
