"""A session to test in: a store of packed real series, and what the wrapper lays out."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kakehashi.store.pack import pack_series

DATA = Path(__file__).resolve().parents[1] / "data"
BLOCK = 131072
INSIDE = Path(__file__).with_name("inside.py")


@dataclass
class StoreFolder:
    """A project's view at the store, made with the store's own packer."""

    root: Path
    files: list[dict[str, Any]] = field(default_factory=list)

    def add(self, folder: str) -> str:
        """Pack a series of the test data; returns its UID."""
        target = self.root / "series"
        target.mkdir(parents=True, exist_ok=True)
        raw = target / f"{secrets.token_hex(4)}.ozx"
        paths = sorted(p for p in (DATA / folder).iterdir() if not p.name.startswith("LICENSE"))
        info = pack_series(paths, raw)
        uid = info.facts.series_uid
        for suffix in (".ozx", ".blocks"):
            raw.with_suffix(suffix).rename(target / f"{uid}{suffix}")
        self.files.append(
            {
                "path": f"series/{uid}.ozx",
                "size": info.size,
                "blocks": info.blocks,
                "series": json.loads(json.dumps(asdict(info.facts), default=str)),
            }
        )
        return uid

    def publish(self) -> str:
        """Write the manifest; returns its SHA-256."""
        raw = json.dumps(
            {
                "kakehashi_manifest": 1,
                "project": "lung",
                "cohort": {"version": 1, "sha256": "0" * 64},
                "block_size": BLOCK,
                "files": self.files,
            }
        ).encode()
        (self.root / "manifest.json").write_bytes(raw)
        return hashlib.sha256(raw).hexdigest()


@dataclass
class SessionFolder:
    """What the session wrapper lays into the payload's /run/kakehashi."""

    root: Path
    work: Path

    def write(self, store: StoreFolder, sha256: str, *, hours: float = 2) -> None:
        self.root.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)
        (self.work / "alice").mkdir(exist_ok=True)
        session = {
            "session": "0" * 32,
            "person": "alice",
            "project": "lung",
            "site": "here",
            "ends_at": utc(hours * 3600),
            "manifest": {"path": str(store.root / "manifest.json"), "sha256": sha256},
            "view": str(store.root),
            "work": str(self.work),
            "socket": "/run/kakehashi/store.sock",
            "work_socket": "/run/kakehashi/work.sock",
            "software": "0.1.0",
        }
        (self.root / "session.json").write_text(json.dumps(session))
        self.lease(ends_in_s=hours * 3600)

    def lease(self, *, ends_in_s: float, state: str = "live", message: str = "") -> None:
        """Replace lease.json whole, as the wrapper does."""
        new = self.root / "lease.json.new"
        new.write_text(
            json.dumps(
                {
                    "expires_at": utc(600),
                    "ends_at": utc(ends_in_s),
                    "state": state,
                    "message": message,
                }
            )
        )
        new.rename(self.root / "lease.json")


def utc(seconds_from_now: float) -> str:
    time = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds_from_now)
    return time.isoformat().replace("+00:00", "Z")


@contextlib.contextmanager
def running(
    session: SessionFolder, command: Sequence[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command inside the session, and end it with all its children."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            inside(session, command),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


def inside(session: SessionFolder, command: Sequence[str]) -> list[str]:
    """Return the command line that runs a command inside the session."""
    prefix = ["/usr/bin/unshare", "--mount", "--propagation", "private", "--pid", "--fork"]
    return [
        *prefix,
        "--kill-child",
        "--mount-proc",
        sys.executable,
        str(INSIDE),
        str(session.root),
        *command,
    ]


def environment(home: Path) -> dict[str, str]:
    """Return an environment in which Jupyter keeps everything in a folder of the test."""
    home.mkdir(exist_ok=True)
    (home / "run").mkdir(mode=0o700, exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
    return kept | {
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "MPLCONFIGDIR": str(home / "matplotlib"),
        "XDG_CACHE_HOME": str(home / "cache"),
    }
