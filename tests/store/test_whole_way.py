"""The whole way of a study, with real programs: hospital, receiver, intake, project, session."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from kakehashi.store.synthetic import plan_studies, write_study
from tests.authority.real import RealStore, free_port, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")

DATA = Path(__file__).parents[1] / "data"
WANTED = """
id = "chests"
title = "Chests"
purpose = "A test"
approval = "none yet"
expires = 2099-01-01
groups = ["g-chests"]
sites = ["here"]
tier = 2
cohort = { facility = ["F01"], modality = ["CT"] }
"""


class Platform(RealStore):
    """A store with hospitals, and the commands that its people use."""

    def __init__(self) -> None:
        self.dicom_port, self.catalogue_port = free_port(), free_port()
        super().__init__(
            lines=f"catalogue_port = {self.catalogue_port}",
            sites=f"""
            [store.receive]
            bind = "127.0.0.1"
            port = {self.dicom_port}
            [[store.receive.senders]]
            facility = "F01"
            ae_titles = ["F01PACS"]
            addresses = ["127.0.0.1"]
            [[store.receive.senders]]
            facility = "F02"
            ae_titles = ["F02PACS"]
            addresses = ["127.0.0.1"]
            """,
        )

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kakehashi.cli", "store", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        return {
            "KAKEHASHI_CONFIG": str(self.config_path),
            "COLUMNS": "300",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }

    def send(self, calling: str, folder: Path) -> None:
        subprocess.run(
            ["dcmsend", "-aet", calling, "-aec", "KAKEHASHI", "127.0.0.1", str(self.dicom_port),
             "+sd", "+r", "--no-halt", str(folder)],
            check=True,
            capture_output=True,
        )  # fmt: skip

    def count(self, token: str, query: str = "") -> tuple[int, int]:
        connection = http.client.HTTPConnection("127.0.0.1", self.catalogue_port, timeout=30)
        body = json.dumps({"query": query})
        try:
            connection.request("POST", "/v1/facets", body, {"Authorization": f"Bearer {token}"})
        except ConnectionRefusedError:
            return 0, -1  # it is started anew with the projects as they are now
        answer = connection.getresponse()
        value = json.loads(answer.read())
        connection.close()
        return answer.status, value.get("count", -1)

    def answer(self) -> int | str:
        """What the authority says to a session of the project: the status, or why not."""
        try:
            answer = self.hub.create(project="chests", groups=["g-chests"])
        except (ConnectionRefusedError, http.client.HTTPException):
            return 0  # it is started anew with the projects as they are now
        return answer.body.get("error", answer.status)


@pytest.fixture
def platform():
    made = Platform()
    try:
        made.run("init")
        made.run("view", "--all")
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture
def receiver(platform):
    process = subprocess.Popen(
        [sys.executable, "-m", "kakehashi.cli", "store", "receive"],
        env=platform.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("ready")
    yield process
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()


def test_a_study_from_the_hospital_to_a_session_and_out_again(platform, receiver, tmp_path):
    plan = plan_studies(1, seed=3, size=128, facility="F01")[0]
    truth = write_study(plan, tmp_path / "study")

    # What parses the network's bytes is nobody but the receiver.
    owner = pwd.getpwnam(f"{platform.prefix}receive")
    status = Path(f"/proc/{receiver.pid}/status").read_text()
    assert f"Uid:\t{owner.pw_uid}\t{owner.pw_uid}\t{owner.pw_uid}\t{owner.pw_uid}" in status
    assert f"Groups:\t{owner.pw_gid} " in status

    platform.send("F01PACS", tmp_path / "study")
    platform.send("F02PACS", DATA / "ct_chest")
    said = platform.run("intake", "--once")
    assert "series packed" in said
    listed = json.loads(platform.run("list", "--json"))
    assert {row["facility"] for row in listed} == {"F01", "F02"}
    mine = [row for row in listed if row["facility"] == "F01"]
    packable = [one for one in truth["series"] if one["packable"]]
    assert len(mine) == len(packable)
    assert all("synthetic" in row["flags"] for row in mine)
    words = [one["value"] for one in truth["identifiers"] if "StationName" not in str(one)]
    assert len(words) > 5
    shown = json.dumps(listed, ensure_ascii=False)
    assert not [word for word in words if len(word) > 3 and word in shown]
    held = json.loads(platform.run("quarantine", "list", "--json"))
    assert {one["facility"] for one in held} <= {"F01"}
    assert all(one["reason"].startswith("held back: ") for one in held)
    assert "F01" in platform.run("arrivals")
    summary = json.loads((platform.layout.root / "arrivals.json").read_text())
    assert {one["facility"] for one in summary["facilities"]} == {"F01", "F02"}

    (tmp_path / "chests.toml").write_text(WANTED)
    platform.run("project", "request", str(tmp_path / "chests.toml"), "--by", "tanaka")
    created = platform.hub.create(project="chests", groups=["g-chests"])
    created.refused(403, "no-project")
    approve = ["project", "approve", "chests", "--by", "suzuki", "--approval", "2026-7"]
    platform.run(*approve, "--expires", "2099-01-01")
    until(lambda: platform.answer() == 200)
    chosen = [row for row in mine if row["modality"] == "CT" and row["tier"] <= 2]
    session, node, _ = platform.session(project="chests", groups=["g-chests"])
    token = node.grant["catalogue"]
    until(lambda: platform.count(token)[0] == 200, what=platform.logs())
    assert platform.count(token) == (200, len(chosen))
    assert platform.count(token, "facility == 'F02'") == (200, 0)
    assert platform.count("x" + token)[0] == 401
    manifest = json.loads((platform.layout.view("chests") / "manifest.json").read_text())
    assert len(manifest["files"]) == len(chosen)

    told = json.loads(
        platform.run(
            "withdraw", plan.patient_id, "--facility", "F01", "--by", "suzuki",
            "--reason", "asked to", "--json",
        )
    )  # fmt: skip
    assert told["series"] == len(mine)
    assert told["quarantined"] == len(held)
    assert [one["session"] for one in told["trained"]] == [session]
    assert session in told["sessions"]
    assert platform.count(token)[0] == 403
    left = json.loads(platform.run("list", "--json"))
    assert {row["facility"] for row in left} == {"F02"}
    assert not list((platform.layout.view("chests") / "series").glob("*.ozx"))
    platform.run("fsck")
    platform.send("F01PACS", tmp_path / "study")
    assert "of people who withdrew" in platform.run("intake", "--once")
    assert len(json.loads(platform.run("list", "--json"))) == len(left)

    platform.run("project", "end", "chests", "--by", "suzuki", "--reason", "over")
    assert not platform.layout.view("chests").exists()
    until(lambda: platform.answer() == "no-project")
