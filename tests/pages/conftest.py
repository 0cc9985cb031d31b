"""A real hub with the portal's pages, and a real browser before it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

HERE = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
CONFIG = """
[portal]
title = "Kakehashi"
url = "http://127.0.0.1:8000"

[sites.flow]
title = "University supercomputer"
title_ja = "大学スーパーコンピューター"
scheduler = "slurm"
agent = ["/bin/false"]
addresses = ["192.0.2.0/24"]
accounts = {}
queues = [{ name = "gpu-share" }]
"""


class Store:
    """A store's authority as far as the pages ask it; a test says what it answers.

    ``answer`` is a status and a document, or None: it hangs up without a word.
    """

    def __init__(self) -> None:
        self.answer: tuple[int, object] | None = None
        self.asked: list[tuple[str, str | None]] = []
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                store.asked.append((self.path, self.headers["Authorization"]))
                if store.answer is None:
                    self.close_connection = True
                    return
                status, document = store.answer
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@dataclass
class Hub:
    """A running hub; ``log`` is what it wrote so far."""

    url: str
    log_path: Path
    store: Store

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.05)  # between two looks at the condition


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    config = folder / "kakehashi.toml"
    config.write_text(CONFIG, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = folder / "hub.log"
    store = Store()
    environment = {
        **os.environ,
        "PAGES_CONFIG": str(config),
        "PAGES_STATE": str(folder),
        "PAGES_PORT": str(port),
        "PAGES_STORE": store.url,
    }
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterhub", "--config", str(HERE / "hub_config.py")],
            stdout=log,
            stderr=log,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    running = Hub(f"http://127.0.0.1:{port}/hub/", log_path, store)
    try:

        def up() -> bool:
            assert process.poll() is None, running.log()[-4000:]
            return answers(running.url + "health")

        wait_until(up, "the hub answers", 60)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        store.server.shutdown()
        store.server.server_close()


# Not for the whole session: Playwright's loop stays in the thread as long as it is open, and
# tests of other modules run loops of their own there.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """One person's browser.

    ``complaints`` holds what no page may do: errors on the console, exceptions of scripts,
    requests to anywhere but the hub.
    """

    page: Page
    hub: Hub
    complaints: list[str] = field(default_factory=list)
    asked: str = ""

    def go(self, path: str) -> int:
        self.asked = self.hub.url + path
        response = self.page.goto(self.asked)
        assert response is not None
        return response.status

    def log_in(self, person: str) -> None:
        self.go(f"stand-in?person={person}")

    def start_session(self, **fields: str) -> None:
        """Send the spawn form by its own button."""
        self.go("spawn")
        for name, value in fields.items():
            self.page.locator(f"#{name}").fill(value)
        self.page.locator("#submit").click()


def check_console(visit: Visit, message: ConsoleMessage) -> None:
    # The browser notes a page's own error status there too; tests look at that themselves. And
    # without a proxy the hub has nothing behind /user/.
    where = message.location["url"]
    own_status = message.text.startswith("Failed to load resource: the server responded") and (
        where == visit.asked or "/user/" in where
    )
    if message.type in {"error", "warning"} and not own_status:
        visit.complaints.append(f"console: {message.text}")


@pytest.fixture
def visit(hub: Hub, chromium: Browser) -> Iterator[Callable[..., Visit]]:
    """Open browsers; at the end no complaint may be left that a test has not taken out."""
    with _visits(hub, chromium) as open_visit:
        yield open_visit


@contextmanager
def _visits(hub: Hub, chromium: Browser) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def open_visit(language: str = "en", **options: object) -> Visit:
        locale = {"en": "en-US", "ja": "ja-JP"}[language]
        context = chromium.new_context(
            locale=locale,
            timezone_id="Asia/Tokyo",
            **{"viewport": {"width": 1280, "height": 900}, **options},
        )
        page = context.new_page()
        made = Visit(page, hub)
        visits.append(made)

        def check_request(url: str) -> None:
            parts = urlsplit(url)
            if parts.scheme not in {"data", "blob"} and parts.netloc != urlsplit(hub.url).netloc:
                made.complaints.append(f"request to {url}")

        page.on("request", lambda request: check_request(request.url))
        page.on("pageerror", lambda error: made.complaints.append(f"exception: {error}"))
        page.on("console", lambda message: check_console(made, message))
        return made

    yield open_visit
    for made in visits:
        made.page.context.close()
    assert [complaint for made in visits for complaint in made.complaints] == []


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of the pages go; ``KAKEHASHI_SCREENSHOTS`` names a folder to keep them."""
    kept = os.environ.get("KAKEHASHI_SCREENSHOTS")
    if kept is None:
        return tmp_path_factory.mktemp("screenshots")
    folder = Path(kept)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
