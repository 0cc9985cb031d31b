"""The catalogue's database is really stopped and started while hospitals go on sending."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kakehashi.config import Config
from kakehashi.store.intake import intake

from ..conftest import files_of, program, settings
from .conftest import Hospital, open_hospital


class Server:
    """A PostgreSQL that a test may stop; what it acknowledged is on the disk."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._who: dict[str, object] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self._who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        subprocess.run(
            [program("initdb"), "-D", f"{folder}/data", "-U", "test", "-A", "trust", "-E", "UTF8"],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            **self._who,
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://test@/postgres?host={self.folder}"

    def start(self) -> None:
        import psycopg

        with Path(self.folder, "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("postgres"), "-D", f"{self.folder}/data", "-k", self.folder, "-c",
                 "listen_addresses="],
                cwd=self.folder,
                stderr=log,
                **self._who,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            assert self._process.poll() is None, Path(self.folder, "log").read_text()
            try:
                psycopg.connect(host=self.folder, user="test", dbname="postgres").close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, Path(self.folder, "log").read_text()
            else:
                return

    def stop(self) -> None:
        """End it as ``pg_ctl stop -m immediate`` does: connections are cut, nothing is tidied."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(60)
            self._process = None


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    if program("initdb") is None or program("postgres") is None:
        pytest.skip("PostgreSQL is not installed")  # never in CI: scripts/install.sh has it
    with tempfile.TemporaryDirectory(prefix="kakehashi-pg-") as folder:
        made = Server(folder)
        made.start()
        yield made
        made.stop()


@pytest.fixture
def hospital(tmp_path, server) -> Iterator[Hospital]:
    root = tmp_path / "store"
    root.mkdir()
    made = open_hospital(Config.model_validate(settings(root, database=server.url)))
    yield made
    made.close()


def until(condition, thread: threading.Thread) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert thread.is_alive()
        assert time.monotonic() < deadline


def test_a_database_that_is_stopped_and_started_loses_nothing_and_has_nothing_twice(
    hospital, server, monkeypatch, caplog
):
    monkeypatch.setattr(intake, "PAUSE_S", 0.05)
    monkeypatch.setattr(intake, "LONGEST_PAUSE_S", 0.2)
    chest, adc = files_of("ct_chest"), files_of("mr_adc")
    hospital.send(chest[:6])
    worker = hospital.intake()
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    try:
        until(lambda: worker.progress.taken >= 3, thread)
        server.stop()
        # The receiver knows nothing of it: all of this is acknowledged.
        hospital.send([*chest[6:], *adc, *chest[:3]])
        until(lambda: "the intake waits" in caplog.text, thread)
        waiting = hospital.waiting()
        assert waiting > 0
        server.start()
        until(lambda: hospital.waiting() == 0, thread)
    finally:
        stop.set()
        thread.join(120)
    server.stop()
    server.start()
    # What was acknowledged to us is there after that, too; a process that starts now finds it.
    again = open_hospital(hospital.config)
    try:
        again.intake().once()
        rows, kept = again.catalogue.list_series(), again.catalogue.list_kept()
    finally:
        again.close()
    assert hospital.reasons() == []
    assert sorted(row.slices for row in rows) == [4, 12]
    assert kept == []
    packs = [path.name for path in (hospital.root / "packs").rglob("*.ozx")]
    assert sorted(packs) == sorted(f"{row.series_uid}.ozx" for row in rows)
