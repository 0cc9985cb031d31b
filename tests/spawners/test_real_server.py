"""The person's real server, started as the hub describes it, behind the real proxy.

The test is the node; in the payload's place it lays files into namespaces of mounts. Only the
folder ``/work`` lies elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kakehashi import __version__
from tests.spawners.standins import Hub, free_ports, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the agent drops to other accounts")

LAY = """
import json, os, subprocess, sys
server = json.load(sys.stdin)
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
os.makedirs("/run/kakehashi/server")
for name, text in server["files"].items():
    with open("/run/kakehashi/server/" + name, "w") as file:
        file.write(text)
os.execve(server["argv"][0], server["argv"], server["environment"])
"""


def test_jupyterlab_answers_through_the_proxy_and_has_its_settings(
    hub: Hub, tmp_path: Path
) -> None:
    hub.plan(mode="hold")
    alice = hub.login("alice")
    assert alice.spawn().ok
    session = alice.last_session()
    document, facts = hub.seen("document", session), hub.seen("facts", session)
    (port,) = free_ports(1)
    answer = hub.post(
        "enrol",
        {
            "session": session,
            "ticket": document["ticket"],
            "public_key": "ssh-ed25519 " + "A" * 68,
            "port": port,
            "host": "here",
            "job": facts["environment"]["KAKEHASHI_JOB"],
            "walls": "namespaces",
            "hub_port": None,
            "software": __version__,
            "checks": [],
        },
    ).json()["server"]
    work = tmp_path / "work"
    (work / "alice").mkdir(parents=True)
    (work / "alice" / "random.py").write_text("raise SystemExit('shadowed')")
    config = "jupyter_server_config.json"
    settings = json.loads(answer["files"][config])
    assert settings["ServerApp"]["root_dir"] == "/work"
    settings["ServerApp"] |= {"root_dir": str(work), "allow_root": True}
    answer["files"][config] = json.dumps(settings)
    answer["argv"][0] = sys.executable
    answer["environment"] |= {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", LAY],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=work / "alice",
            start_new_session=True,
        )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(answer).encode())
        process.stdin.close()
        until(
            "the server",
            lambda: alice.server().get("ready") or process.poll() is not None,
            60,
        )
        said = (tmp_path / "server.log").read_text(errors="replace")
        assert process.poll() is None, said[-4000:]
        page = alice.browser.get(f"{hub.url}/user/alice/lab", timeout=30)
        assert page.status_code == 200, page.text[:500]
        assert '"preferredPath": "/alice"' in page.text or '"preferredPath": "alice"' in page.text
        listing = alice.browser.get(f"{hub.url}/user/alice/api/contents/alice", timeout=30)
        assert [entry["name"] for entry in listing.json()["content"]] == ["random.py"]
        raw = alice.browser.get(f"{hub.url}/user/alice/files/alice/random.py", timeout=30)
        assert raw.status_code == 403, "files are not handed out"
        bob = hub.login("bob")
        theirs = bob.browser.get(f"{hub.url}/user/alice/api/contents", timeout=30)
        assert theirs.status_code != 200
        assert "shadowed" not in said
        assert "Config option" not in said, "every setting is one that the server knows"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
