"""A session from its document to its report, on real parts."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.session.real import SERIES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.session.real import Session, World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")

LOOK = f"""
import hashlib, json, os, pathlib, signal, socket, struct, sys, threading
store = pathlib.Path("/store/series/{SERIES}.ozx").read_bytes()
link = socket.socket(socket.AF_UNIX)
link.connect("/run/kakehashi/store.sock")
link.sendall(struct.pack(">IBI", 5, 1, 3))
answer = link.recv(9)
print("hello from the payload")
for folder in ("/tmp", "/var/tmp", "/dev/shm", os.environ["HOME"], os.environ["XDG_RUNTIME_DIR"]):
    pathlib.Path(folder, "pixels").write_bytes(store)
try:
    pathlib.Path("/store/new").write_text("x")
except OSError as error:
    refused = error.strerror
pathlib.Path("look.part").write_text(json.dumps(dict(
    hash=hashlib.sha256(store).hexdigest(), sftp=answer[4], cwd=os.getcwd(), refused=refused,
    session=json.load(open("/run/kakehashi/session.json")),
    lease=json.load(open("/run/kakehashi/lease.json")),
    key=open("/run/kakehashi/server/server.key").read(),
    listing=sorted(os.listdir("/run/kakehashi")), python=sys.executable,
    terminate=signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    environment=dict(os.environ))))
os.rename("look.part", "look.json")
while not pathlib.Path("finish").exists():
    threading.Event().wait(0.05)
os.unlink("finish")
"""
STAY = """
import pathlib, signal
pathlib.Path("up").write_text("1")
signal.pause()
"""
STUBBORN = """
import pathlib, signal
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("asked").write_text("1"))
pathlib.Path("up").write_text("1")
while True:
    signal.pause()
"""


def items(session: Session) -> dict[str, dict[str, str]]:
    """Return what the report says, its signature checked by the store's authority."""
    (sent,) = session.portal.called("leave")
    return {item["item"]: item for item in json.loads(sent["message"])["items"]}


def test_a_payload_reads_the_store_writes_its_work_and_leaves_nothing(world: World) -> None:
    with world.session(LOOK) as session:
        seen = json.loads(session.file("look.json"))
        during = world.listing()
        (session.work / "alice/finish").write_text("")
        status, said = session.wait()
        assert status == 0, (said, session.log())
        assert session.log() == "hello from the payload\n"
        report = items(session)
    assert seen["hash"] == hashlib.sha256(world.content).hexdigest()
    assert (seen["sftp"], seen["cwd"]) == (2, "/work/alice")
    assert seen["refused"] == "Read-only file system"
    assert seen["key"] == "key of the server"
    assert seen["listing"] == ["lease.json", "server", "session.json", "store.sock", "work.sock"]
    assert seen["terminate"]
    assert seen["session"]["person"] == "alice"
    assert seen["session"]["manifest"]["sha256"] == world.folder.sha256
    assert seen["lease"]["state"] == "live"
    environment = seen["environment"]
    assert environment["GIVEN"] == "by the hub"
    assert environment["HOME"] == "/home/session"
    assert not {name for name in environment if name.startswith(("LD_", "KAKEHASHI", "SSH"))}
    assert during == session.before, "a file appeared on the node during the session"
    assert world.listing() == session.before, "a file was left on the node"
    gone = {name for name, item in report.items() if item["result"] == "gone"}
    assert {"processes", "mounts", "files", "core dumps"} <= gone
    assert session.all_gone()


def test_the_enrolment_says_who_and_where(world: World) -> None:
    with world.session(STAY) as session:
        session.file("up")
        (sent,) = session.portal.called("enrol")
        assert sent["job"] == "7"
        assert sent["host"] == socket.gethostname()
        assert 1024 <= sent["port"] <= 65535
        assert all(check["ok"] for check in sent["checks"])
        assert len(sent["checks"]) > 25
        assert sent["public_key"].startswith("ssh-ed25519 ")


ECHO = """
import json, pathlib, socket, threading
port = int(pathlib.Path("port").read_text())
def serve(one):
    data = b""
    while part := one.recv(65536):
        data += part
    one.sendall(data[::-1])
    one.close()
listener = socket.create_server(("127.0.0.1", port))
hub = socket.create_connection(("127.0.0.1", HUB))
hub.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
text = b""
while part := hub.recv(65536):
    text += part
pathlib.Path("up").write_bytes(text)
while True:
    one, _ = listener.accept()
    threading.Thread(target=serve, args=(one,), daemon=True).start()
"""


class _HubPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"this is the hub")

    def log_message(self, *_: object) -> None:
        pass


def test_the_server_is_reached_from_the_node_and_reaches_the_hub(world: World) -> None:
    hub = http.server.HTTPServer(("127.0.0.1", 0), _HubPage)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    script = ECHO.replace("HUB", str(hub.server_port)).replace(
        'pathlib.Path("port").read_text()', "__import__('os').environ['PORT']"
    )
    with world.session(script, portal={"hub_port": hub.server_port}) as session:
        # The hub learns the port at the enrolment and gives it to the server.
        grant = session.portal.answer

        def answer(call: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            if call == "enrol":
                session.portal.server["environment"]["PORT"] = str(body["port"])
            return grant(call, body)

        session.portal.answer = answer  # type: ignore[method-assign]
        assert session.file("up").endswith("this is the hub")
        port = session.portal.called("enrol")[0]["port"]
        data = os.urandom(4 << 20)
        with socket.create_connection(("127.0.0.1", port)) as near:
            near.sendall(data)
            near.shutdown(socket.SHUT_WR)
            back = b""
            while part := near.recv(1 << 20):
                back += part
        assert back == data[::-1]
    hub.shutdown()
    hub.server_close()


def test_the_scheduler_asks_and_the_payload_goes(world: World) -> None:
    with world.session(STAY) as session:
        session.file("up")
        session.family()
        session.process.send_signal(signal.SIGXCPU)
        assert session.wait(10)[0] == 0
        assert session.all_gone()
        assert items(session)["end"]["detail"] == "the scheduler or the person asked for it"


def test_a_payload_that_does_not_want_to_go_is_killed(world: World) -> None:
    with world.session(STUBBORN) as session:
        session.file("up")
        session.family()
        session.process.send_signal(signal.SIGTERM)
        session.file("asked")
        assert session.wait(15)[0] == 0
        assert session.all_gone()


def test_signals_to_all_processes_end_the_session_in_order(world: World) -> None:
    """A scheduler sends SIGTERM to every process of the job, not to the first alone."""
    last = STAY.replace("signal.pause()", "signal.sigwait({signal.SIGTERM})").replace(
        "import pathlib, signal",
        "import pathlib, signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})",
    )
    last += "pathlib.Path('last-words').write_text('saved')"
    with world.session(last) as session:
        session.file("up")
        for pid in [session.process.pid, *session.family()]:
            os.kill(pid, signal.SIGTERM)
        assert session.wait(15)[0] == 0
        assert session.file("last-words") == "saved"
        assert items(session)["processes"]["result"] == "gone"


def test_a_ticket_is_good_once(world: World) -> None:
    with world.session(STAY) as session:
        session.file("up")
        argv = world.person.command(
            world.software.python, "-I", "-m", "kakehashi.session.enter", KAKEHASHI_JOB="8"
        )
        document = json.dumps(session.document)
        done = subprocess.run(
            argv, input=document, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 4
        assert "replayed" in done.stderr
        assert session.document["ticket"] not in done.stderr


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"software": "9.9.9"}, "version"),
        ({"node": {"software": "/nowhere/at/all"}}, "software"),
        ({"node": {"read_only": ["/nowhere/either"]}}, "software"),
    ],
)
def test_a_node_that_lacks_something_says_so_and_keeps_the_ticket(
    world: World, changes: dict[str, Any], check: str
) -> None:
    with world.session(STAY, **changes) as session:
        status, _ = session.wait()
        assert status == 3
        (sent,) = session.portal.called("refuse")
        assert check in {failure["check"] for failure in sent["failures"]}
        assert not session.portal.called("enrol")


def test_a_node_where_fuse_is_closed_says_so(world: World) -> None:
    def close(argv: list[str]) -> list[str]:
        return [word.replace("0666", "0600") for word in argv]

    with world.session(STAY, run=close) as session:
        assert session.wait()[0] == 3
        (sent,) = session.portal.called("refuse")
        assert [one["check"] for one in sent["failures"]] == ["fuse"]
        assert "0666" in sent["failures"][0]["message"]


@pytest.fixture
def without_view(world: World) -> Iterator[None]:
    """Take away, for a while, what the verified view needs."""
    binding = next((world.software.root / ".venv/lib").glob("python3*/site-packages/mfusepy.py"))
    aside = binding.with_suffix(".aside")
    binding.rename(aside)
    yield
    aside.rename(binding)


@pytest.mark.usefixtures("without_view")
def test_a_node_without_the_view_falls_back_only_where_allowed(world: World) -> None:
    with world.session(LOOK) as session:
        assert session.wait()[0] == 3
        (sent,) = session.portal.called("refuse")
        assert "allow_sshfs_view" in sent["failures"][0]["message"]
    with world.session(LOOK, node={"allow_sshfs_view": True}) as session:
        seen = json.loads(session.file("look.json"))
        assert seen["hash"] == hashlib.sha256(world.content).hexdigest()
        assert seen["refused"] == "Read-only file system"


def test_a_document_that_is_not_one_is_refused_without_an_echo(world: World) -> None:
    done = world.person.run(
        world.software.python, "-I", "-m", "kakehashi.session.enter", input='{"ticket": "sesame"'
    )
    assert done.returncode == 2
    assert "sesame" not in done.stderr


def test_root_gets_no_session(world: World) -> None:
    argv = [world.software.python, "-I", "-m", "kakehashi.session.enter"]
    with world.session(STAY, run=lambda _: argv) as session:
        assert session.wait()[0] == 3
        (sent,) = session.portal.called("refuse")
        assert sent["failures"][0]["check"] == "account"


def test_over_tls_only_the_named_authority_counts(world: World, tmp_path: Path) -> None:
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=portal", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    portal = {"certificate": (cert, key)}
    with world.session(STAY, portal=portal, portal_ca=(tmp_path / "cert.pem").read_text()) as one:
        one.file("up")
        one.process.terminate()
        assert one.wait()[0] == 0
    with world.session(STAY, portal=portal) as other:
        status, said = other.wait()
        assert status == 1
        assert "CERTIFICATE_VERIFY_FAILED" in said
        assert not other.portal.calls


def test_a_file_that_appears_on_the_node_is_seen_and_told(world: World) -> None:
    with world.session(STAY) as session:
        session.file("up")
        planted = Path("/var/tmp") / f"planted-{session.id}"
        planted.write_text("pixels")
        os.chown(planted, world.person.uid, world.person.gid)
        try:
            assert world.listing() != session.before
            session.process.terminate()
            session.wait(20)
        finally:
            planted.unlink()
        item = items(session)["files"]
        assert item["result"] == "seen"
        assert str(planted) in item["detail"]


def test_a_server_that_cannot_start_is_an_end_with_a_reason(world: World) -> None:
    with world.session(STAY, portal={"server": {"argv": ["/no/such/program"]}}) as session:
        status, said = session.wait()
        assert status == 1
        assert "/no/such/program" in said
        assert session.all_gone()


def test_channels_are_bounded(world: World) -> None:
    script = """
import json, pathlib, socket, struct
links, answered = [], 0
for _ in range(40):
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(20)
    link.connect("/run/kakehashi/store.sock")
    link.sendall(struct.pack(">IBI", 5, 1, 3))
    links.append(link)
for link in links:
    try:
        answered += bool(link.recv(9))
    except OSError:
        pass
pathlib.Path("count").write_text(str(answered))
"""
    with world.session(script) as session:
        assert 1 <= int(session.file("count", seconds=60)) <= 32


def test_the_log_is_bounded(world: World) -> None:
    with world.session("import sys; sys.stdout.write('x' * (20 << 20))") as session:
        assert session.wait()[0] == 0
        text = session.log()
        assert len(text) < (16 << 20) + 100
        assert text.endswith("[the log ends here: it has reached its bound]\n")


def test_the_key_is_new_each_time(world: World) -> None:
    lines = set()
    for _ in range(2):
        with world.session("") as session:
            session.wait()
            lines.add(session.portal.called("enrol")[0]["public_key"])
    assert len(lines) == 2


# How long after a save through one way the other may still show the old file.
SOON_S = 5

SHARED = """
import json, os, pathlib, threading, time
from kakehashi.link import WorkFolder

def until(seen):
    started = time.monotonic()
    while not seen() and time.monotonic() - started < 30:
        threading.Event().wait(0.05)
    return time.monotonic() - started

mounted, folder = pathlib.Path("/work/alice"), WorkFolder.current()
old, new = os.urandom(300_000), os.urandom(2_000_000)
took = dict()
folder.write("alice/by_channel", old)
took["a new file"] = until(lambda: "by_channel" in os.listdir(mounted))
took["its bytes"] = until(lambda: (mounted / "by_channel").read_bytes() == old)
folder.write("alice/by_channel", new)
took["a longer one"] = until(lambda: (mounted / "by_channel").read_bytes() == new)
folder.write("alice/by_channel", old)
took["a shorter one"] = until(lambda: (mounted / "by_channel").read_bytes() == old)
folder.remove("alice/by_channel")
took["none"] = until(lambda: not (mounted / "by_channel").exists())
(mounted / "by_mount").write_bytes(new)
took["by the mount"] = until(lambda: folder.read("alice/by_mount") == new)
folder.close()
(mounted / "took.part").write_text(json.dumps(took))
(mounted / "took.part").rename(mounted / "took")
"""


def test_what_is_saved_through_a_channel_is_soon_seen_in_the_mount_and_back(world: World) -> None:
    with world.session(SHARED) as session:
        took = json.loads(session.file("took", seconds=150))
        assert max(took.values()) < SOON_S, took
        assert session.wait()[0] == 0
