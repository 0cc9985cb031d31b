"""Root after a job: what it finds, what it takes away, what it leaves alone, what it tells."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from kakehashi.errors import SiteError
from kakehashi.site import epilog, witness
from kakehashi.site.scan import Ended, look, processes, remains
from tests.authority.real import until
from tests.session.real import Person

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="looks at other people's processes")

# As the warden of a session does: private namespaces with the session's own file in them.
IN_SESSION = (
    "mount -t tmpfs none /dev/shm && mkdir /dev/shm/run && echo {} > /dev/shm/run/session.json"
    " && echo ready && exec sleep 600"
)
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", IN_SESSION]


@pytest.fixture(scope="module")
def person() -> Iterator[Person]:
    made = Person()
    yield made
    made.remove()


@pytest.fixture
def begin(person: Person) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process of the person; it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(argv: list[str], **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            argv,
            user=person.uid,
            group=person.gid,
            extra_groups=[],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment},
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()


def said(items: list[dict[str, str]], name: str) -> dict[str, str]:
    return next(item for item in items if item["item"] == name)


def ready(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_who_holds_a_sessions_namespaces_is_found_and_killed(
    person: Person, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    # Started outside of any job, as somebody would who waits beside the session.
    holder = ready(begin(UNSHARE))
    shell = begin(["sleep", "600"])
    ended = Ended("77", person.uid, alone=True)
    assert [one.pid for one in remains(ended, processes())] == [holder.pid]
    item = said(look(ended, ()), "processes")
    assert item["result"] == "gone"
    assert str(holder.pid) in item["detail"]
    assert holder.wait(timeout=5) == -signal.SIGKILL
    assert shell.poll() is None, "a log-in of the person is nobody's session"
    assert remains(ended, processes()) == []


def test_processes_of_the_job_go_and_those_of_another_job_stay(
    person: Person, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    mine = begin(["sleep", "600"], SLURM_JOB_ID="77")
    other = ready(begin(UNSHARE, SLURM_JOB_ID="88"))
    items = look(Ended("77", person.uid, alone=False), ())
    assert mine.wait(timeout=5) == -signal.SIGKILL
    assert other.poll() is None
    assert str(mine.pid) in said(items, "processes")["detail"]


def test_nobody_elses_processes_are_touched(
    begin: Callable[..., subprocess.Popen[str]],
) -> None:
    held = ready(begin(UNSHARE, SLURM_JOB_ID="77"))
    look(Ended("77", 1, alone=True), ())
    assert held.poll() is None


def test_files_of_the_account_go_and_links_are_not_followed(person: Person, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    folder = tmp_path / "node"
    folder.mkdir()
    folder.chmod(0o1777)
    (folder / "roots").write_text("root's own")
    for name in ("a", "deep/er/file"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("data")
    (folder / "link").symlink_to(outside)
    (folder / "deep" / "link").symlink_to(outside)
    for path in [folder / "a", folder / "link", *(folder / "deep").rglob("*"), folder / "deep"]:
        os.chown(path, person.uid, person.gid, follow_symlinks=False)
    name = f"files in {folder}"
    beside = look(Ended("7", person.uid, alone=False), (str(folder),))
    assert said(beside, name)["result"] == "seen", "another job may own them"
    assert (folder / "a").exists()
    item = said(look(Ended("7", person.uid, alone=True), (str(folder),)), name)
    assert item["result"] == "gone"
    assert "found and removed" in item["detail"]
    assert sorted(path.name for path in folder.iterdir()) == ["roots"]
    assert (outside / "kept").exists()


def test_a_folder_that_is_a_link_is_not_entered(person: Person, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("x")
    os.chown(target / "file", person.uid, person.gid)
    (tmp_path / "link").symlink_to(target)
    place = str(tmp_path / "link")
    item = said(look(Ended("7", person.uid, alone=True), (place,)), f"files in {place}")
    assert item["result"] == "unknown"
    assert (target / "file").exists()


def test_system_v_memory_of_the_account_goes_and_no_other(person: Person) -> None:
    made = subprocess.run(["ipcmk", "-M", "4096"], capture_output=True, text=True, check=True)
    roots = made.stdout.split()[-1]
    try:
        assert person.run("ipcmk", "-M", "4096").returncode == 0
        item = said(look(Ended("7", person.uid, alone=True), ()), "System V memory")
        assert item["result"] == "gone"
        assert "found and removed: shm" in item["detail"]
        again = said(look(Ended("7", person.uid, alone=True), ()), "System V memory")
        assert again["detail"] == "none"
        assert roots in Path("/proc/sysvipc/shm").read_text()
    finally:
        subprocess.run(["ipcrm", "-m", roots], check=True)


# What is told


class Portal:
    """The hub's address for witnesses, at the outermost edge; it keeps what is said."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.pending: list[str] = []
        portal = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                portal.heard.append({**body, "path": self.path})
                message = json.loads(body["message"])
                answer: dict[str, Any] = {}
                if message["witness"] == "pending":
                    answer = {"jobs": [{"job": job, "session": "s"} for job in portal.pending]}
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(one["message"]) for one in self.heard]


@pytest.fixture
def portal() -> Iterator[Portal]:
    made = Portal()
    yield made
    made.close()


@pytest.fixture
def site(portal: Portal, person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a site's file whose scheduler, a stand-in, says that nothing else runs."""
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\nexit 0\n")
    squeue.chmod(0o755)
    key = tmp_path / "witness.key"
    (tmp_path / "witness.pub").write_text(witness.make_key(key))
    path = tmp_path / "site.json"
    document = {
        "scheduler": "slurm", "accounts": [person.name], "software": "/opt/kakehashi",
        "queues": ["q"], "commands": str(squeue.parent),
        "witness": {"site": "here", "key": str(key), "portal_url": portal.url, "portal_ca": None},
    }  # fmt: skip
    path.write_text(json.dumps(document))
    path.chmod(0o600)
    monkeypatch.setattr(epilog, "KEPT", tmp_path / "kept")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_UID", str(person.uid))
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    return path


def test_the_report_is_signed_with_the_sites_key(site: Path, portal: Portal) -> None:
    assert epilog.main(["--site", str(site)]) == 0
    (heard,) = portal.heard
    assert heard["path"].endswith("/hub/api/kakehashi/witness")
    public = load_ssh_public_key((site.parent / "witness.pub").read_bytes())
    assert isinstance(public, Ed25519PublicKey)
    public.verify(base64.b64decode(heard["signature"]), heard["message"].encode())
    (message,) = portal.messages()
    assert (message["site"], message["host"], message["job"]) == ("here", "node1", "77")
    assert {"processes", "mounts", "swap", "GPU memory"} <= {
        item["item"] for item in message["items"]
    }


def test_jobs_of_other_accounts_are_none_of_our_business(
    site: Path, portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_UID", "1")
    assert epilog.main(["--site", str(site)]) == 0
    assert portal.heard == []


def test_a_report_that_cannot_be_sent_is_kept_for_root_and_sent_later(
    site: Path, portal: Portal
) -> None:
    text = site.read_text()
    site.write_text(text.replace(portal.url, "http://127.0.0.1:9"))
    assert epilog.main(["--site", str(site)]) == 0, "an epilog that fails drains the node"
    (kept,) = (site.parent / "kept").iterdir()
    assert kept.parent.stat().st_mode & 0o077 == 0
    site.write_text(text)
    portal.pending = ["78"]
    assert epilog.main(["--pending", "--site", str(site)]) == 0
    assert [one.get("job") for one in portal.messages()] == ["77", None, "78"]
    until(lambda: not kept.exists(), what="the kept report's end")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda site: site.write_text("{"),
        lambda site: site.chmod(0o666),
        lambda site: (site.parent / "witness.key").chmod(0o644),
        lambda site: (site.parent / "witness.key").write_text("no key"),
    ],
)
def test_what_is_wrong_with_the_set_up_is_said_and_never_fails(
    site: Path, portal: Portal, spoil: Callable[[Path], object], capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(site)
    assert epilog.main(["--site", str(site)]) == 0
    assert "kakehashi: " in capfd.readouterr().err
    assert portal.heard == []
    assert epilog.main(["--what"]) == 2


def test_a_key_is_made_once_and_for_root_only(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "key"
    public = witness.make_key(path)
    assert public.startswith("ssh-ed25519 ")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SiteError, match="is there already"):
        witness.make_key(path)
