"""The contents manager over a channel, through a real server, beside the file manager's answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import nbformat
import pytest
import requests
from tornado.web import HTTPError

from kakehashi.errors import LinkClosedError, LinkError
from kakehashi.link.work import (
    WorkDeniedError,
    WorkError,
    WorkExistsError,
    WorkFullError,
    WorkLostError,
    WorkNotFoundError,
    is_part,
    part_name,
)
from kakehashi_widgets.checkpoints import off_loop
from tests.lab.browser import chromium
from tests.link.stores import SFTP_SERVER, Broker
from tests.link.test_session import write as write_session
from tests.widgets.browser import visited
from tests.widgets.lab import TOKEN, Lab, free_port
from tests.widgets.session import SessionFolder, environment
from tests.widgets.test_contents import wait_for

CHANNEL = "kakehashi_widgets.channel.ChannelContentsManager"
WHOLE = "kakehashi_widgets.contents.WholeFileContentsManager"


SAVE = "async () => await jupyterapp.commands.execute('docmanager:save')"
WRITE = """text => {
  const model = jupyterapp.shell.currentWidget.content.model;
  model.cells.get(0).sharedModel.setSource(text);
}"""


def notebook(text: str = "1 + 1") -> dict[str, Any]:
    cell = nbformat.v4.new_code_cell(text, id="a")
    return json.loads(nbformat.writes(nbformat.v4.new_notebook(cells=[cell])))


def text_file(content: str) -> dict[str, Any]:
    return {"type": "file", "format": "text", "content": content}


def b64_file(data: bytes, **more: Any) -> dict[str, Any]:
    content = base64.b64encode(data).decode()
    return {"type": "file", "format": "base64", "content": content, **more}


def notebook_file(text: str) -> dict[str, Any]:
    return {"type": "notebook", "format": "json", "content": notebook(text)}


@dataclass
class Running:
    base: str
    root: Path
    process: subprocess.Popen[bytes]
    log: Path
    broker: Broker | None = None

    def ask(self, method: str, path: str, **more: Any) -> requests.Response:
        headers = {"Authorization": f"token {TOKEN}"}
        return requests.request(method, f"{self.base}/{path}", headers=headers, timeout=60, **more)

    def put(self, path: str, model: dict[str, Any]) -> requests.Response:
        return self.ask("PUT", f"api/contents/{path}", json=model)

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        answer = self.ask("GET", f"api/contents/{path}", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextlib.contextmanager
def serving(
    folder: Path, manager: str, program: Sequence[str] = ("jupyter_server",)
) -> Iterator[Running]:
    root = folder / "work"
    root.mkdir(parents=True)
    settings = {
        CHANNEL: [
            f"--ChannelContentsManager.root_dir={root}",
            "--ChannelContentsManager.preferred_dir=hanako",
        ],
    }.get(manager, [f"--ServerApp.root_dir={root}", "--FileContentsManager.delete_to_trash=False"])
    broker = Broker(folder / "work.sock", [SFTP_SERVER]) if manager == CHANNEL else None
    session = write_session(
        folder,
        **(
            {"view": None, "work": None, "work_socket": str(folder / "work.sock")} if broker else {}
        ),
    )
    port = free_port()
    command = [
        *(sys.executable, "-m", *program, "--no-browser", "--allow-root"),
        *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
        f"--IdentityProvider.token={TOKEN}",
        '--ServerApp.jpserver_extensions={"kakehashi_widgets": True}',
        f"--ServerApp.contents_manager_class={manager}",
        *settings,
    ]
    log = folder / "server.log"
    env = environment(folder / "home") | {"KAKEHASHI_SESSION": str(session)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=folder / "home")
    running = Running(f"http://127.0.0.1:{port}", root, process, log, broker)

    def up() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(requests.ConnectionError):
            return running.ask("GET", "api/status").ok
        return False

    try:
        wait_for(up, "the server", 60)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        finally:
            process.kill()
            process.wait(timeout=10)
            if broker is not None:
                broker.close()


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("channel"), CHANNEL) as running:
        yield running


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("mounted"), WHOLE) as running:
        (running.root / "hanako").mkdir(exist_ok=True)
        yield running


C = "api/contents"
DAY: list[tuple[str, str, Any]] = [
    ("GET", C, None),
    ("GET", f"{C}/hanako", None),
    ("POST", f"{C}/hanako", {"type": "notebook"}),
    ("POST", f"{C}/hanako", {"type": "notebook"}),
    ("POST", f"{C}/hanako", {"type": "directory"}),
    ("POST", f"{C}/hanako", {"type": "file", "ext": ".txt"}),
    ("POST", f"{C}/none", {"type": "file"}),
    ("GET", f"{C}/hanako/Untitled.ipynb", None),
    ("GET", f"{C}/hanako/Untitled.ipynb?content=0", None),
    ("GET", f"{C}/hanako/Untitled.ipynb?type=file", None),
    ("GET", f"{C}/hanako/Untitled.ipynb?type=directory", None),
    ("GET", f"{C}/hanako?type=file", None),
    ("GET", f"{C}/hanako/none.txt", None),
    ("PUT", f"{C}/hanako/a.txt", text_file("日本語\r\n")),
    ("PUT", f"{C}/hanako/a.txt", text_file("日本語\n2\n")),
    ("GET", f"{C}/hanako/a.txt", None),
    ("GET", f"{C}/hanako/a.txt?format=base64&hash=1", None),
    ("GET", f"{C}/hanako/a.txt?content=0&hash=1", None),
    ("GET", f"{C}/hanako/a.txt?type=notebook", None),
    ("PUT", f"{C}/hanako/b.bin", b64_file(b"\xff\x00" * 500)),
    ("GET", f"{C}/hanako/b.bin", None),
    ("GET", f"{C}/hanako/b.bin?format=text", None),
    ("PUT", f"{C}/hanako/c.bin", {"type": "file", "format": "base64", "content": "!"}),
    ("PUT", f"{C}/hanako/c.bin", {"type": "file", "format": "hex", "content": ""}),
    ("PUT", f"{C}/hanako/c.bin", {"format": "text", "content": "no type"}),
    ("PUT", f"{C}/hanako/n.ipynb", notebook_file("first")),
    ("GET", f"{C}/hanako/n.ipynb", None),
    ("GET", f"{C}/hanako/n.ipynb/checkpoints", None),
    ("POST", f"{C}/hanako/n.ipynb/checkpoints", None),
    ("PUT", f"{C}/hanako/n.ipynb", notebook_file("second")),
    ("POST", f"{C}/hanako/n.ipynb/checkpoints/checkpoint", None),
    ("GET", f"{C}/hanako/n.ipynb", None),
    ("POST", f"{C}/hanako/n.ipynb/trust", None),
    ("PATCH", f"{C}/hanako/n.ipynb", {"path": "hanako/m.ipynb"}),
    ("PATCH", f"{C}/hanako/m.ipynb", {"path": "hanako/a.txt"}),
    ("PATCH", f"{C}/hanako/none", {"path": "hanako/x"}),
    ("PATCH", f"{C}/hanako/m.ipynb", {"path": "none/x.ipynb"}),
    ("GET", f"{C}/hanako/m.ipynb/checkpoints", None),
    ("DELETE", f"{C}/hanako/m.ipynb/checkpoints/checkpoint", None),
    ("DELETE", f"{C}/hanako/m.ipynb/checkpoints/checkpoint", None),
    ("GET", f"{C}/hanako/n.ipynb", None),
    ("PUT", f"{C}/hanako/folder", {"type": "directory"}),
    ("PUT", f"{C}/hanako/folder", {"type": "directory"}),
    ("PUT", f"{C}/hanako/a.txt", {"type": "directory"}),
    ("PUT", f"{C}/hanako/folder/x.tar.gz", b64_file(b"x")),
    ("POST", f"{C}/hanako/folder", {"copy_from": "hanako/folder/x.tar.gz"}),
    ("POST", f"{C}/hanako/folder", {"copy_from": "hanako/m.ipynb"}),
    ("POST", f"{C}/hanako", {"copy_from": "hanako/folder"}),
    ("POST", f"{C}/hanako", {"copy_from": "hanako/none"}),
    ("GET", f"{C}/hanako/folder-Copy1", None),
    ("DELETE", f"{C}/hanako/folder", None),
    ("DELETE", f"{C}/hanako/Untitled%20Folder", None),
    ("DELETE", f"{C}/hanako/none", None),
    ("DELETE", f"{C}/hanako/a.txt", None),
    ("DELETE", C, None),
    ("PUT", f"{C}/hanako/.hidden", text_file("x")),
    ("GET", f"{C}/hanako/.hidden", None),
    ("PUT", f"{C}/hanako/big.bin", b64_file(b"one", chunk=1)),
    ("PUT", f"{C}/hanako/big.bin", b64_file(b"two", chunk=2)),
    ("PUT", f"{C}/hanako/big.bin", b64_file(b"three", chunk=-1)),
    ("GET", f"{C}/hanako/big.bin", None),
    ("PUT", f"{C}/hanako/x.bin", b64_file(b"two", chunk=2)),
    ("GET", f"{C}/hanako/a%00b", None),
    ("GET", f"{C}/..%2f..%2fetc%2fpasswd", None),
    ("GET", f"{C}/hanako/..%2f..%2f..%2fsession.json", None),
    ("PUT", f"{C}/hanako/..%2f..%2foutside.txt", text_file("x")),
    ("GET", "files/hanako/big.bin", None),
    ("GET", "files/hanako/big.bin?download=1", None),
    ("GET", f"{C}/hanako", None),
]


def same(body: Any) -> Any:
    """An answer without its times, and lists without their order."""
    if isinstance(body, dict):
        return {key: same(body[key]) for key in body if key not in {"last_modified", "created"}}
    if isinstance(body, list):
        return sorted(map(same, body), key=lambda item: str(item.get("name", item)))
    return body


def test_it_answers_as_the_file_manager_does(channel: Running, mounted: Running) -> None:
    differences = []
    for number, (method, path, body) in enumerate(DAY):
        answers = [server.ask(method, path, json=body) for server in (channel, mounted)]
        ours, theirs = answers
        label = f"{number}: {method} {path}"
        if ours.status_code != theirs.status_code:
            differences.append(f"{label}: {ours.status_code} {ours.text[:300]}")
            differences.append(f"   theirs {theirs.status_code} {theirs.text[:300]}")
        elif ours.ok and ours.content and same(ours.json()) != same(theirs.json()):
            differences.append(f"{label}:\n   {same(ours.json())}\n   {same(theirs.json())}")
    assert not differences, "\n".join(differences)
    listings = [
        {
            str(path.relative_to(server.root)): path.read_bytes() if path.is_file() else None
            for path in server.root.rglob("*")
        }
        for server in (channel, mounted)
    ]
    assert listings[0] == listings[1]
    for path in ("files/hanako/big.bin", "files/hanako/big.bin?download=1"):
        assert channel.ask("GET", path).status_code == 403
    assert not any(is_part(Path(name).name) for name in listings[0])


def test_a_change_by_another_is_seen(channel: Running) -> None:
    """The lab compares what a save answered with what it finds before the next one."""
    saved = channel.put("hanako/w.ipynb", notebook_file("mine")).json()
    seen = channel.get("hanako/w.ipynb", content=0, hash=1)
    file = channel.root / "hanako/w.ipynb"
    assert seen["last_modified"] == saved["last_modified"]
    assert seen["hash"] == hashlib.sha256(file.read_bytes()).hexdigest()
    loaded = channel.get("hanako/w.ipynb")
    assert loaded["last_modified"] == saved["last_modified"]
    header = channel.ask("GET", f"{C}/hanako/w.ipynb").headers["Last-Modified"]
    assert parsedate_to_datetime(header).timestamp() == int(file.stat().st_mtime)
    os.utime(file, (2_000_000_000, 2_000_000_000))
    changed = channel.get("hanako/w.ipynb", content=0)["last_modified"]
    assert changed == "2033-05-18T03:33:20Z" != saved["last_modified"]


def test_trust_stays_with_the_content(channel: Running) -> None:
    content = notebook("print(1)")
    content["cells"][0]["outputs"] = [
        {"output_type": "display_data", "data": {"text/html": "<b>x</b>"}, "metadata": {}}
    ]
    (channel.root / "hanako/t.ipynb").write_text(json.dumps(content))

    def trusted() -> bool:
        model = channel.get("hanako/t.ipynb")
        return bool(model["content"]["cells"][0]["metadata"].get("trusted"))

    assert not trusted()
    assert channel.ask("POST", f"{C}/hanako/t.ipynb/trust").status_code == 201
    assert trusted()


def test_a_broken_notebook_is_said_to_be_unreadable(channel: Running) -> None:
    (channel.root / "hanako/broken.ipynb").write_text("{")
    answer = channel.ask("GET", f"{C}/hanako/broken.ipynb")
    assert answer.status_code == 400
    assert "Unreadable Notebook" in answer.json()["message"]


def test_old_leftovers_go_and_fresh_ones_do_not_show(channel: Running) -> None:
    folder = channel.root / "hanako/swept"
    folder.mkdir()
    stale, fresh = folder / part_name(), folder / part_name()
    for path in (stale, fresh):
        path.write_text("x")
    os.utime(stale, (1, 1))
    assert channel.put("hanako/swept/a.txt", text_file("a")).status_code == 201
    assert not stale.exists()
    assert fresh.exists()
    assert [entry["name"] for entry in channel.get("hanako/swept")["content"]] == ["a.txt"]


def test_names_that_json_cannot_tell_do_not_break_a_listing(channel: Running) -> None:
    folder = channel.root / "hanako/names"
    folder.mkdir()
    for name in (b"odd\xff", "全角\u3000空白.txt".encode(), b"line\nbreak"):
        (folder / os.fsdecode(name)).write_text("x")
    os.mkfifo(folder / "pipe")
    (folder / "nowhere").symlink_to("none")
    listed = {entry["name"] for entry in channel.get("hanako/names")["content"]}
    assert listed == {"全角\u3000空白.txt", "line\nbreak"}
    assert channel.get("hanako/names/全角\u3000空白.txt")["content"] == "x"
    assert channel.ask("GET", f"{C}/hanako/names/pipe").status_code == 400


def test_the_server_answers_others_while_a_save_waits(channel: Running) -> None:
    """The store holds still in the middle of a save: the event loop does not."""
    assert channel.broker is not None
    folder = channel.root / "hanako/held"
    folder.mkdir()
    answers: list[int] = []
    big = b64_file(os.urandom(40 << 20))
    saver = threading.Thread(
        target=lambda: answers.append(channel.put("hanako/held/a.bin", big).status_code)
    )
    saver.start()
    try:
        wait_for(lambda: any(part.stat().st_size for part in folder.iterdir()), "the save")
        channel.broker.send(signal.SIGSTOP)
        assert channel.ask("GET", "api/status").ok
        assert channel.put("hanako/held/b.txt", text_file("b")).status_code == 201
        assert not answers
        assert not (folder / "a.bin").exists()
    finally:
        channel.broker.send(signal.SIGCONT)
        saver.join(timeout=60)
    assert answers == [201]
    assert (folder / "a.bin").stat().st_size == 40 << 20


def test_a_cut_in_mid_save_is_mended(channel: Running) -> None:
    assert channel.broker is not None
    assert channel.put("hanako/cut.ipynb", notebook_file("old")).status_code == 201
    for turn in range(5):
        channel.broker.send(signal.SIGKILL)
        assert channel.put("hanako/cut.ipynb", notebook_file(f"new {turn}")).status_code == 200
    content = channel.get("hanako/cut.ipynb")["content"]
    assert content["cells"][0]["source"] == "new 4"


@pytest.mark.browser
def test_a_person_saves_through_cuts_and_loses_nothing(tmp_path: Path) -> None:
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("no /usr/bin/chromium here")
    program = ("jupyterlab", "--expose-app-in-browser")
    with serving(tmp_path / "lab", CHANNEL, program) as server, chromium() as browser:
        assert server.broker is not None
        file = server.root / "hanako/n.ipynb"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        file.write_text(json.dumps(notebook("6 * 7") | {"metadata": {"kernelspec": kernel}}))
        lab = Lab(server.base, SessionFolder(tmp_path, server.root), server.process, server.log)

        def saved() -> str:
            return file.read_text()

        with visited(browser, lab, "hanako/n.ipynb") as book:
            book.run_all()
            book.page.evaluate(SAVE)
            assert '"42"' in saved()
            server.broker.send(signal.SIGKILL)
            book.page.evaluate(WRITE, "# after a cut")
            book.page.evaluate(SAVE)
            wait_for(lambda: "# after a cut" in saved(), "the save after a cut")
            away = server.broker.path.with_name("away.sock")
            server.broker.path.rename(away)
            server.broker.send(signal.SIGKILL)
            book.page.evaluate(WRITE, "# while away")
            book.page.evaluate(f"() => {{ ({SAVE})().catch(() => null); }}")
            dialog = book.page.locator(".jp-Dialog")
            dialog.wait_for()
            assert "the way to the work folder is closed" in dialog.inner_text()
            dialog.locator("button").last.click()
            assert "# while away" not in saved()
            assert book.page.locator(".cm-content", has_text="# while away").count() == 1
            away.rename(server.broker.path)
            book.page.evaluate(SAVE)
            wait_for(lambda: "# while away" in saved(), "the save when the store is back")
            assert not book.errors


def test_a_full_disk_is_told_and_the_old_file_stays(channel: Running) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = channel.root / "hanako/small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=True)
    try:
        assert channel.put("hanako/small/a.txt", text_file("old")).status_code == 201
        answer = channel.put("hanako/small/a.txt", text_file("x" * (2 << 20)))
        assert answer.status_code == 507
        assert "its disk is full" in answer.json()["message"]
        chunk = b64_file(bytes(2 << 20), chunk=1)
        assert channel.put("hanako/small/b.bin", chunk).status_code == 507
        assert [path.name for path in small.iterdir()] == ["a.txt"]
        assert (small / "a.txt").read_text() == "old"
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (WorkNotFoundError("x"), 404),
        (WorkExistsError("x"), 409),
        (WorkDeniedError("x"), 403),
        (WorkFullError("x"), 507),
        (WorkLostError("x"), 503),
        (WorkError("x"), 400),
        (LinkClosedError("x"), 503),
        (LinkError("x"), 503),
    ],
)
def test_each_failure_has_its_status(error: LinkError, status: int) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(HTTPError, match="x") as caught:
        asyncio.run(off_loop(fail))
    assert caught.value.status_code == status


def test_without_the_store_it_says_so_and_the_next_save_works(
    tmp_path: Path,
) -> None:
    with serving(tmp_path / "lost", CHANNEL) as server:
        assert server.broker is not None
        assert (server.root / "hanako").is_dir(), "the person's folder is made in a first session"
        assert server.put("hanako/a.ipynb", notebook_file("old")).status_code == 201
        hidden = server.broker.path.with_name("away.sock")
        server.broker.path.rename(hidden)
        server.broker.send(signal.SIGKILL)
        for answer in (
            server.put("hanako/a.ipynb", notebook_file("new")),
            server.ask("GET", f"{C}/hanako/a.ipynb"),
            server.ask("GET", f"{C}/hanako"),
        ):
            assert answer.status_code == 503
            assert "the way to the work folder is closed" in answer.json()["message"]
        left = nbformat.read(server.root / "hanako/a.ipynb", 4)
        assert left.cells[0].source == "old"
        hidden.rename(server.broker.path)
        assert server.put("hanako/a.ipynb", notebook_file("new")).status_code == 200
        assert nbformat.read(server.root / "hanako/a.ipynb", 4).cells[0].source == "new"


def test_with_a_mounted_work_folder_it_does_not_start(tmp_path: Path) -> None:
    code = f"from {CHANNEL.rpartition('.')[0]} import ChannelContentsManager as C; C()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path / "home")
        | {
            "KAKEHASHI_SESSION": str(write_session(tmp_path)),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "is mounted at /work" in done.stderr
