"""What a session sees when its grant is renewed in mid-read, and when the store is shut.

Run as a program in namespaces of its own it prints its outcomes as JSON, for ``bench/outages.py``.
Store, hub, Slurm and session are those of the lab; a lease is 20 s there instead of 15 minutes, and
the store is shut for longer than that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.figures import let_pass
from tests.lab import faults, look
from tests.lab import lab as real_lab
from tests.lab.client import Client, Kernel
from tests.lab.hosts import wait_for
from tests.lab.lab import Lab
from tests.run import PRIVATE, SETTING

PERSON, PROJECT = "tanaka", "lung-ct"
OPTIONS = {"site": "slurm", "queue": "gpu", "gpus": 0, "hours": 1.0, "project": PROJECT}
LEASE_S = 20.0
RENEWALS = 5
SHUT_S = 2 * LEASE_S
START, PER_SERIES, STEP_S = 8, 60, 0.7
"""Where the maintenance begins; samples of a series; how long the loop computes for a batch."""
PATIENCE_S = 300.0

# A store of its own each time: nothing of it is in memory yet.
READING = """
import hashlib, threading
from kakehashi import Store

rounds, failures, over = [], [], threading.Event()

def go_on():
    try:
        while not over.is_set():
            with Store() as store:
                rounds.append({
                    s.uid: hashlib.sha256(s.read_packed()).hexdigest() for s in store.cohort
                })
    except Exception as error:
        failures.append(repr(error))

reading = threading.Thread(target=go_on)
reading.start()
"""
LOOP = f"""
import time, torch
from kakehashi.link import Maintenance, SeriesDataset, SeriesLoader, pin

announced = None

def loop(*, pinned, step_s):
    global announced
    # Of each thread its own; with more of them sums are in another order.
    torch.set_num_threads(1)
    dataset = SeriesDataset(crop=(2, 32, 32), per_series={PER_SERIES}, seed=3)
    announced = Maintenance(0, {START}, tuple(dataset.uids[: len(dataset.uids) // 2 or 1]))
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, (1, 3, 3)), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.LazyLinear(1),
    )
    losses, seen = [], []
    # So small a ring that the loop feels at once that the store is gone.
    with SeriesLoader(dataset, 2, ring_bytes=1 << 16) as loader:
        yield loader
        if pinned:
            pins = pin(loader, announced, limit_bytes=1 << 30)
            pins.wait()
            loader.announce(announced, pins)
        else:
            loader.announce(announced)
        for batch in loader:
            image = batch["image"] / 1000
            loss = (net(image) - image.mean((1, 2, 3, 4))[:, None]).square().mean()
            net.zero_grad()
            loss.backward()
            with torch.no_grad():
                for one in net.parameters():
                    one -= 0.01 * one.grad
            losses.append(loss.item().hex())
            seen.extend(batch["sample"].tolist())
            time.sleep(step_s)  # it stands for the computing of a network that is not so small
            yield losses
    yield losses, seen, loader.stats().used_up_s

def whole(**how):
    *_, last = loop(**how)
    return last
"""
DISTURBED = f"""
import threading
progress, result, failed = [0], [], []

def disturbed():
    try:
        for what in loop(pinned=True, step_s={STEP_S}):
            progress[0] += isinstance(what, list)
            result[:] = [what]
    except Exception as error:
        failed.append(repr(error))

training = threading.Thread(target=disturbed)
training.start()
"""


@dataclass(frozen=True)
class Seen:
    """What a session saw of one event.

    Attributes
    ----------
    name : str
    lasted_s : float
    back_s : float
        Seconds until it went on as before; 0 where it never stopped.
    errors : int
    wrong : int
        Files, or steps of the loop, that were not as undisturbed.
    checked : int
        Files that were compared, or steps that the loop made while the store was shut.
    """

    name: str
    lasted_s: float
    back_s: float
    errors: int
    wrong: int
    checked: int


def renewals(lab: Lab, kernel: Kernel) -> Seen:
    """Read all files over and over while the grant is renewed again and again."""
    truth = _files_at_the_store(lab)
    before, began = _renewed(lab), time.monotonic()
    kernel.run(READING)
    wait_for("renewals", lambda: _renewed(lab) >= before + RENEWALS, PATIENCE_S)
    kernel.run("over.set(); reading.join()")
    rounds, failures = kernel.value("(rounds, failures)")
    return Seen(
        f"grant renewed {_renewed(lab) - before} times in mid-read",
        time.monotonic() - began,
        0.0,
        len(failures),
        sum(found[uid] != right for found in rounds for uid, right in truth.items()),
        len(rounds) * len(truth),
    )


def maintenance(lab: Lab, kernel: Kernel) -> Seen:
    """Shut the store while a loop goes on over what is pinned; compare every step's loss."""
    kernel.run(LOOP)
    undisturbed, order, _ = kernel.value("whole(pinned=False, step_s=0)")
    kernel.run(DISTURBED)

    def steps() -> int:
        return int(kernel.value("progress[0]"))

    wait_for("the maintenance's begin", lambda: steps() > START // 2, PATIENCE_S)
    at, began = steps(), time.monotonic()
    faults.stop_store(lab)
    let_pass(SHUT_S)
    gone_on = steps() - at
    faults.start_store(lab)
    ended = time.monotonic()
    wait_for("the loop's end", lambda: not kernel.value("training.is_alive()"), PATIENCE_S)
    failed = kernel.value("failed")
    losses, seen, used_up_s = kernel.value("result[0]") if not failed else ([], [], 0.0)
    different = sum(one != other for one, other in zip(losses, undisturbed, strict=False))
    return Seen(
        f"store shut for a maintenance of {SHUT_S / LEASE_S:g} leases, half of the cohort pinned",
        ended - began,
        used_up_s,
        len(failed),
        different + abs(len(losses) - len(undisturbed)) + (sorted(seen) != sorted(order)),
        gone_on,
    )


def _files_at_the_store(lab: Lab) -> dict[str, str]:
    """Return the SHA-256 of each file of the project, computed where it lies."""
    view = lab["store"].path(f"/srv/kakehashi/views/{PROJECT}")
    return {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in view.rglob("*.ozx")
    }


def _renewed(lab: Lab) -> int:
    return sum(record["kind"] == "lease.renewed" for record in look.audit(lab))


@contextlib.contextmanager
def _session(lab: Lab) -> Iterator[Kernel]:
    client = Client(lab.url, PERSON, str(lab.ca_file))
    client.log_in()
    client.start(OPTIONS, 300)
    try:
        with client.kernel() as kernel:
            yield kernel
    finally:
        client.stop()


def measured() -> list[Seen]:
    """Let it happen in a lab of its own, out of sight of one that runs already."""
    argv = [*PRIVATE, "bash", "-ec", SETTING, "lab", sys.executable, __file__]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
    return [Seen(**one) for one in json.loads(done.stdout)]


def main() -> None:
    """Measure in the lab of these namespaces."""
    try:
        lab = real_lab.up(lease_minutes=LEASE_S / 60)
        with _session(lab) as kernel:
            found = [happen(lab, kernel) for happen in (renewals, maintenance)]
    finally:
        real_lab.down()
    print(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main()
