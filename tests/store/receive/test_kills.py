"""The receiver is killed in mid-transfer, and what was not fsynced is gone: nothing is lost."""

from __future__ import annotations

import random
import signal
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kakehashi.store.layout import sync_folder
from kakehashi.store.receive import Inbox

from .conftest import Running, content, settings
from .lossy import Disk, mounted
from .scu import ClosedError, data_set, store_units

KILLS = 200
SENDERS = 3
IMAGES = 5
"""Of each sender, between two kills."""


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    if not Path("/dev/fuse").exists():
        # The file system that forgets is FUSE; a container may have none.
        pytest.skip("needs /dev/fuse")
    with mounted(tmp_path_factory.mktemp("lossy") / "disk") as disk:
        yield disk


@dataclass
class Hospital:
    """Sends objects until each is acknowledged, and remembers which are."""

    name: int
    to_send: dict[str, bytes] = field(default_factory=dict)
    acknowledged: dict[str, bytes] = field(default_factory=dict)
    made: int = 0
    under_way: bool = False
    """Whether something of an object was sent that is not acknowledged."""

    def fill(self, chance: random.Random) -> None:
        while len(self.to_send) < IMAGES:
            self.made += 1
            sop = f"1.2.{self.name}.{self.made}"
            self.to_send[sop] = data_set(sop, pixels=chance.randbytes(chance.randrange(9000)))

    def send(self, running: Running, until: int) -> None:
        """Send until all is there, or the receiver is gone; kill it after so many bytes."""
        self.under_way = False
        try:
            client = running.call()
            client.associate()
            sent = 0
            for sop, data in list(self.to_send.items()):
                self.under_way = True
                for unit in store_units(sop, data):
                    if sent <= until < sent + len(unit):
                        client.connection.sendall(unit[: until - sent])
                        running.kill()
                    client.connection.sendall(unit)
                    sent += len(unit)
                if client.status() == 0:
                    self.acknowledged[sop] = self.to_send.pop(sop)
                self.under_way = False
        except (ClosedError, OSError):
            pass


class Trial:
    """One disk, one receiver that is killed again and again, and its senders."""

    def __init__(self, disk: Disk, name: str, seed: int) -> None:
        self.disk, self.chance = disk, random.Random(seed)
        root = disk.path / name
        root.mkdir()
        sync_folder(disk.path)
        self.running = Running(root, settings())
        self.hospitals = [Hospital(number) for number in range(SENDERS)]
        self.taken: set[str] = set()
        self.kills = Counter[str]()
        self.takes = True

    def round(self, *, cut: bool) -> None:
        chance, running = self.chance, self.running
        running.start()
        self.check(running.inbox)
        by_bytes = chance.random() < 0.3
        if not by_bytes:
            self.disk.kill_at(running.pid, chance.randrange(1, 90), chance.randrange(99))
        threads = []
        for hospital in self.hospitals:
            hospital.fill(chance)
            first = by_bytes and hospital.name == 0
            until = chance.randrange(20_000) if first else 1 << 40
            threads.append(threading.Thread(target=hospital.send, args=(running, until)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Some rounds end before the blow falls; then it falls now.
        running.kill()
        assert running.wait() == -signal.SIGKILL
        running.all_gone()
        self.disk.kill_at(0, 0)
        parts = running.files("incoming")
        self.kills["with half an object there"] += bool(parts)
        under_way = any(hospital.under_way for hospital in self.hospitals)
        self.kills["in mid-transfer"] += bool(parts) or under_way
        if cut:
            self.disk.cut_power(chance.randrange(1 << 30))

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.round(cut=True)

    def check(self, inbox: Inbox) -> None:
        """All that was acknowledged is there once, as it was sent, and nothing half."""
        entries = list(inbox.entries())
        acknowledged: dict[str, bytes] = {}
        sent: dict[str, bytes] = {}
        for hospital in self.hospitals:
            acknowledged |= hospital.acknowledged
            sent |= hospital.acknowledged | hospital.to_send
        uids = [entry.sop for entry in entries]
        assert len(uids) == len(set(uids)), "an object is there twice"
        lost = acknowledged.keys() - set(uids) - self.taken
        assert not lost, f"acknowledged, and not in the journal: {lost}"
        assert not self.taken.intersection(uids), "taken over, and there again"
        for entry in entries:
            assert entry.path.exists(), f"{entry.sop} is in the journal only"
            assert content(entry) == sent[entry.sop], "the content is not what was sent"
        names = {path.name for path in self.running.files("inbox")}
        assert names == {entry.path.name for entry in entries}, "a file without a row"
        assert self.running.files("incoming") == []
        assert inbox.held.list() == []
        if not self.takes:
            return
        done = [one for one in entries if one.sop in acknowledged and self.chance.random() < 0.6]
        inbox.discard(*done)
        self.taken.update(entry.sop for entry in done)
        if self.chance.random() < 0.2 and entries:
            inbox.trim(entries[-1].position)


def test_200_kills_lose_nothing(lossy):
    trial = Trial(lossy, "honest", seed=5)
    try:
        for number in range(KILLS):
            trial.round(cut=number % 2 == 1)
        print(f"of {KILLS} kills: {dict(trial.kills)}")
        assert trial.kills["in mid-transfer"] >= KILLS * 0.9
        assert trial.kills["with half an object there"] >= KILLS / 2
        trial.running.start()
        trial.check(trial.running.inbox)
        # What was not acknowledged is sent again, and then all is there.
        for hospital in trial.hospitals:
            hospital.send(trial.running, 1 << 40)
            assert not hospital.to_send
        trial.check(trial.running.inbox)
        assert trial.running.end() == 0
        assert sum(len(hospital.acknowledged) for hospital in trial.hospitals) > KILLS
    finally:
        trial.running.kill()


@pytest.mark.parametrize("culprit", ["disk", "receiver"])
def test_the_check_is_red_where_fsync_does_nothing(lossy, monkeypatch, culprit):
    trial = Trial(lossy, f"lying {culprit}", seed=6)
    trial.takes = False
    trial.round(cut=False)
    if culprit == "disk":
        lossy.lie(True)
    else:
        # The receiver is a fork of this process.
        monkeypatch.setattr("os.fsync", lambda _: None)
        monkeypatch.setattr("os.fdatasync", lambda _: None)
    try:
        with pytest.raises(
            AssertionError, match=r"acknowledged, and not in|not what was sent|without a row"
        ):
            trial.rounds(20)
    finally:
        lossy.lie(False)
        trial.running.kill()
