"""A real JupyterLab in a session, and requests to it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.widgets.session import SessionFolder, environment, running

TOKEN = "t0k-for-the-tests"
START_S = 60
OURS = (
    '--ServerApp.jpserver_extensions={"kakehashi_widgets": True}',
    "--ServerApp.contents_manager_class=kakehashi_widgets.contents.WholeFileContentsManager",
)


@dataclass
class Lab:
    base: str
    session: SessionFolder
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def work(self) -> Path:
        return self.session.work

    def request(self, method: str, path: str, **more: Any) -> requests.Response:
        headers = {"Authorization": f"token {TOKEN}", **more.pop("headers", {})}
        return requests.request(
            method,
            f"{self.base}/{path}",
            headers=headers,
            timeout=60,
            allow_redirects=False,
            **more,
        )

    def get(self, path: str, **more: Any) -> requests.Response:
        return self.request("GET", path, **more)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def jupyterlab(session: SessionFolder, home: Path, settings: Sequence[str] = OURS) -> Iterator[Lab]:
    """Run JupyterLab with the settings that a session has, or with others."""
    port = free_port()
    kept = home / "settings" / "@jupyterlab" / "apputils-extension"
    kept.mkdir(parents=True)
    (kept / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        # As behind the portal: everything lies under the person's prefix.
        "--ServerApp.base_url=/user/alice/",
        f"--ServerApp.root_dir={session.work}",
        "--KernelManager.transport=ipc",
        "--expose-app-in-browser",
        *settings,
    ]
    log = home / "lab.log"
    with running(session, command, log, environment(home)) as process:
        lab = Lab(f"http://127.0.0.1:{port}/user/alice", session, process, log)
        deadline = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-4000:]}")
            with contextlib.suppress(requests.ConnectionError):
                if lab.get("api/status").ok:
                    break
        yield lab
