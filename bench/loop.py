"""A training's loop over a distant store beside one over local memory, in turn.

Compute is emulated (a pause, as a GPU's step is for the node's processors) or a real small network
of MONAI on this machine's own processors, which ssh and the loader then have to share.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.unet import UNet
from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.far_store import FarStore
from bench.figures import Series, arguments, at_most, interleaved, let_pass, report
from kakehashi.link import Maintenance, SeriesDataset, SeriesLoader, pin
from tests.lab.hosts import need_root
from tests.link.volumes import Cohort

ROUNDS = 5
RTT_MS, RATE_MBIT = 10, 2000
SHAPE = (48, 256, 256)
SERIES = 24
COMPUTE_S = 0.3
CROP = (32, 96, 96)

ENDS = "2099-12-31T00:00:00Z"

Step = Callable[[dict[str, Any]], None]
Times = dict[str, tuple[float, float, float]]


def emulated(_: dict[str, Any]) -> None:
    """Take as long as a step, and nothing else."""
    let_pass(COMPUTE_S)


def network() -> Step:
    """Return a training step of a small network."""
    torch.manual_seed(1)
    model = UNet(3, 1, 1, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    optimiser = torch.optim.SGD(model.parameters(), 1e-4)

    def step(batch: dict[str, Any]) -> None:
        image = batch["image"] / 1000
        loss = (model(image) - image).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


class Loops:
    """The same samples from both places; keeps what each loop waited."""

    def __init__(self, stack: contextlib.ExitStack, series: int) -> None:
        self.far = FarStore(stack)
        self.far.wan.set(delay_ms=RTT_MS / 2, rate_mbit=RATE_MBIT)
        base = self.far.base / "data/cohort"
        self._cohort = Cohort(base, [SHAPE] * series)
        stack.callback(self._cohort.close)
        # The same path at the far end, below its chroot.
        self._cohort.broker._command = self.far.channel_command()
        folder = self._cohort.folder
        manifest = {"path": "/cohort/store/manifest.json", "sha256": folder.sha256}
        self._cohort.write(manifest=manifest)
        # What is pinned is dropped without a lease.
        lease = {"expires_at": ENDS, "ends_at": ENDS, "state": "live", "message": ""}
        (base / "lease.json").write_text(json.dumps(lease))
        self.bytes = sum(len(data) for data in folder.contents.values())
        self.first_s: dict[str, list[float]] = {}
        self.waited: dict[str, list[float]] = {}
        with SeriesLoader(SeriesDataset(self._cohort.path)) as loader:
            self._everything = Maintenance(0, 0, loader.dataset.uids)
            self._pins = pin(loader, self._everything, limit_bytes=2 * self.bytes)
            self._pins.wait()

    def run(self, name: str, step: Step, *, crop: tuple[int, int, int] | None, near: bool) -> float:
        """Go through an epoch; return the seconds behind the first batch."""
        dataset = SeriesDataset(self._cohort.path, crop=crop, seed=1)
        with SeriesLoader(dataset) as loader:
            if near:
                loader.announce(self._everything, self._pins)
            started = time.monotonic()
            for batch in loader:
                step(batch)
            stats = loader.stats()
            seconds = time.monotonic() - started - stats.first_s
        self.first_s.setdefault(name, []).append(stats.first_s)
        self.waited.setdefault(name, []).append((stats.waited_s - stats.first_s) / seconds)
        return seconds


def main() -> None:
    """Measure and report."""
    need_root()
    options = arguments("a training's loop over a distant store")
    rounds, series = (1, 6) if options.quick else (ROUNDS, SERIES)
    with contextlib.ExitStack() as stack:
        loops = Loops(stack, series)
        steps: dict[str, tuple[Step, tuple[int, int, int] | None]] = {
            "emulated compute, volumes": (emulated, None),
            "network, crops": (network(), CROP),
        }
        ways: dict[str, Callable[[], float]] = {}
        for name, (step, crop) in steps.items():
            for place in ("local", "far"):
                full = f"{name}: {place}"
                ways[full] = functools.partial(
                    loops.run, full, step, crop=crop, near=place == "local"
                )
        values = interleaved(ways, rounds, Console(stderr=True))
    goals, found = [], []
    for name in steps:
        far, local = f"{name}: far", f"{name}: local"
        shares = tuple(a / b for a, b in zip(values[far], values[local], strict=True))
        found += [
            Series(f"{local}, an epoch behind its first batch", "s", values[local]),
            Series(f"{far}, an epoch behind its first batch", "s", values[far]),
            Series(f"{name}: far by local", "", shares),
            Series(
                f"{far}, waited behind the first batch", "of the time", tuple(loops.waited[far])
            ),
            Series(f"{far}, first batch", "s", tuple(loops.first_s[far])),
        ]
        goals += [
            at_most(f"{name}: far by local", shares, 1.02, ""),
            at_most(f"{name}: first batch", loops.first_s[far], 2, "s"),
        ]
    megabytes = loops.bytes / 1e6
    report(
        f"A training's loop: {series} series, {megabytes:.0f} MB packed, 10 ms, 2 Gbit/s",
        found,
        goals,
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
