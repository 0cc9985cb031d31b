"""Trainings: how long a loop waits, several networks, and a segmentation of CT.

Each runs over the link and from memory, with the same loader, the same order and the same
network: what differs is only where the bytes come from.
"""

from __future__ import annotations

import itertools
import threading
import time
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from monai.inferers.utils import sliding_window_inference
from monai.losses.dice import DiceCELoss
from monai.networks.nets.densenet import DenseNet121
from monai.networks.nets.resnet import resnet18
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet

from kakehashi.link.bench.results import WAITING
from kakehashi.link.bench.ways import Quantity, Way, one
from kakehashi.link.dataset import SeriesDataset, SeriesLoader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kakehashi.link.bench.sample import Sample
    from kakehashi.link.bench.ways import Book

AIR_HU, BONE_HU = -1000.0, 150.0
_SCALE = 1000.0
_RING_BYTES = 1 << 30
_TESTS = 4


@dataclass(frozen=True)
class Size:
    """How much of a volume a network gets at once, and how many of them.

    Batch normalisation needs two, where a network leaves one voxel of each. A processor would
    need minutes for the test of a whole volume.
    """

    crop: int
    batch: int
    test_whole: bool


ON_CPU, ON_ACCELERATOR = Size(32, 2, test_whole=False), Size(96, 2, test_whole=True)


def device() -> torch.device:
    """Return the accelerator of this session, or the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def accelerators() -> tuple[str, ...]:
    """Return the names of this session's accelerators."""
    return tuple(torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count()))


@dataclass
class Loop:
    """What one run of a training loop took.

    Attributes
    ----------
    wall_s : float
        From the first wait to the last step's end.
    waited_s : float
        Of that, waiting for batches.
    first_s : float
        Of that, waiting for the first one.
    batches : int
    """

    wall_s: float = 0.0
    waited_s: float = 0.0
    first_s: float = 0.0
    batches: int = 0

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting, in per cent."""
        return 100 * self.waited_s / self.wall_s

    @property
    def waiting_later(self) -> float:
        """The same behind the first batch, which nothing can be fetched ahead of."""
        rest = self.wall_s - self.first_s
        return 100 * (self.waited_s - self.first_s) / rest


def _dataset(sample: Sample, *, near: bool, crop: int | None, per_series: int) -> SeriesDataset:
    size = None if crop is None else (crop, crop, crop)
    dataset = SeriesDataset(
        sample.session, uids=sample.uids, crop=size, fill=AIR_HU, per_series=per_series, seed=1
    )
    if near:
        dataset._stores.hold(sample.held)
    return dataset


def _loader(
    stack: ExitStack,
    book: Book,
    *,
    near: bool,
    crop: int | None,
    batch: int,
) -> SeriesLoader:
    """Return a loader whose one epoch is as long as a run."""
    wanted = book.settings.batches * batch
    per_series = -(-wanted // len(book.sample.uids))
    dataset = _dataset(book.sample, near=near, crop=crop, per_series=per_series)
    # Whole volumes are of different sizes.
    collate: dict[str, Any] = {"collate": list} if crop is None else {}
    return stack.enter_context(SeriesLoader(dataset, batch, ring_bytes=_RING_BYTES, **collate))


def _run(loader: SeriesLoader, batches: int, step: Callable[[Any], object]) -> Loop:
    found = Loop()
    started = time.monotonic()
    epochs: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))
    while found.batches < batches:
        asked = time.monotonic()
        batch = next(epochs)
        waited = time.monotonic() - asked
        found.waited_s += waited
        if not found.batches:
            found.first_s = waited
        step(batch)
        found.batches += 1
    _finish()
    found.wall_s = time.monotonic() - started
    return found


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


WAITING_LATER = "waiting for data behind the first batch"


def loop(book: Book) -> None:
    """Measure how long a loop waits for whole volumes beside emulated compute."""
    seconds = book.settings.compute_s
    pause = threading.Event()
    name = f"loop, whole volumes, {seconds:g} s of compute each"

    def run(*, near: bool) -> tuple[float, ...]:
        with ExitStack() as stack:
            loader = _loader(stack, book, near=near, crop=None, batch=1)
            found = _run(loader, book.settings.batches, lambda _: pause.wait(seconds))
        return found.wall_s, found.waiting, found.waiting_later, found.first_s

    quantities = (
        Quantity(f"{name}: wall time", "s", "lower"),
        Quantity(f"{name}: {WAITING}", "%", "lower"),
        Quantity(f"{name}: {WAITING_LATER}", "%", "lower"),
        Quantity(f"{name}: first batch", "s", "lower"),
    )
    book.measure("loop", [Way(quantities, partial(run, near=False), partial(run, near=True))])


def networks(book: Book) -> None:
    """Train several networks: loading alone, compute alone, and both together."""
    where, size = device(), _size()
    words = f"{size.batch} x {size.crop}³"

    def load(*, near: bool) -> float:
        with ExitStack() as stack:
            loader = _loader(stack, book, near=near, crop=size.crop, batch=size.batch)
            found = _run(loader, book.settings.batches, lambda _: None)
        return found.batches * size.batch / found.wall_s

    ways = [
        one(f"loading alone, {words}", "crops/s", partial(load, near=False),
            partial(load, near=True))
    ]  # fmt: skip
    for name in NETWORKS:
        ways += _network(book, name, where, size, words)
    book.measure("networks", ways)


def _network(book: Book, name: str, where: torch.device, size: Size, words: str) -> list[Way]:
    batches = book.settings.batches

    def train(*, near: bool) -> tuple[float, ...]:
        network = _Network(name, where)
        # The first step of a network makes its plans.
        network.train(torch.zeros(size.batch, 1, *3 * [size.crop]))
        with ExitStack() as stack:
            loader = _loader(stack, book, near=near, crop=size.crop, batch=size.batch)
            found = _run(loader, batches, lambda batch: network.train(batch["image"]))
        return found.wall_s / batches * 1e3, found.waiting

    def compute(act: Callable[[_Network, torch.Tensor], object]) -> float:
        network = _Network(name, where)
        image = torch.randn(size.batch, 1, *3 * [size.crop], device=where)
        act(network, image)
        _finish()
        started = time.monotonic()
        for _ in range(batches):
            act(network, image)
        _finish()
        return (time.monotonic() - started) / batches * 1e3

    label = f"{name}, {words}"
    together = (
        Quantity(f"{label}: a training step with loading", "ms", "lower"),
        Quantity(f"{label}: {WAITING}", "%", "lower"),
    )
    return [
        one(f"{label}: a training step, compute alone", "ms",
            partial(compute, _Network.train), better="lower"),
        one(f"{label}: inference, compute alone", "ms",
            partial(compute, _Network.infer), better="lower"),
        Way(together, partial(train, near=False), partial(train, near=True)),
    ]  # fmt: skip


def segmentation(book: Book) -> None:
    """Train a U-Net on what is denser than soft tissue, and test it: the CT segmentation test."""
    where, size = device(), _size()
    whole = size.test_whole
    seen: dict[bool, list[int]] = {}

    def run(*, near: bool) -> tuple[float, ...]:
        network = _Network("UNet", where)
        network.train(torch.zeros(size.batch, 1, *3 * [size.crop]))
        sums = seen[near] = []

        def step(batch: dict[str, Any]) -> None:
            sums.append(zlib.crc32(batch["image"].numpy().data))
            network.train(batch["image"])

        with ExitStack() as stack:
            loader = _loader(stack, book, near=near, crop=size.crop, batch=size.batch)
            trained = _run(loader, book.settings.batches, step)
        with ExitStack() as stack:
            crop = None if whole else 2 * size.crop
            tests = min(_TESTS, len(book.sample.uids))
            loader = _loader(stack, book, near=near, crop=crop, batch=1)

            def test(batch: Any) -> None:
                image = batch[0]["image"][None] if whole else batch["image"]
                network.segment(image, size.crop)

            tested = _run(loader, tests, test)
        return trained.wall_s, trained.waiting, tested.wall_s / tests, tested.waiting

    volume = "a whole volume" if whole else f"a box of {2 * size.crop}³"
    quantities = (
        Quantity(f"CT segmentation: training, {book.settings.batches} steps", "s", "lower"),
        Quantity(f"CT segmentation, training: {WAITING}", "%", "lower"),
        Quantity(f"CT segmentation: test of {volume}", "s", "lower"),
        Quantity(f"CT segmentation, test: {WAITING}", "%", "lower"),
    )
    book.measure(
        "segmentation", [Way(quantities, partial(run, near=False), partial(run, near=True))]
    )
    if len(seen) == 2:
        differ = sum(far != near for far, near in zip(seen[False], seen[True], strict=True))
        book.add(
            "segmentation",
            Quantity("CT segmentation: batches that are not local's, to the bit", "", "lower"),
            [differ],
        )


class _Network:
    """A network with its optimiser, and labels that follow from the image alone."""

    def __init__(self, name: str, where: torch.device) -> None:
        make, self._segments = NETWORKS[name]
        torch.manual_seed(1)
        self._where = where
        self._net = make().to(where)
        self._adam = torch.optim.AdamW(self._net.parameters(), 1e-3)
        self._loss = DiceCELoss(sigmoid=True) if self._segments else torch.nn.CrossEntropyLoss()

    def train(self, image: torch.Tensor) -> None:
        image = image.to(self._where)
        self._net.train()
        self._adam.zero_grad()
        if self._segments:
            label = (image > BONE_HU).float()
        else:
            label = torch.arange(len(image), device=self._where) % 2
        loss = self._loss(self._net(image / _SCALE), label)
        loss.backward()
        self._adam.step()

    def infer(self, image: torch.Tensor) -> None:
        self._net.eval()
        with torch.inference_mode():
            self._net(image.to(self._where) / _SCALE)

    def segment(self, image: torch.Tensor, crop: int) -> None:
        self._net.eval()
        with torch.inference_mode():
            sliding_window_inference(
                image.to(self._where) / _SCALE, (crop, crop, crop), 4, self._net
            )


NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], bool]] = {
    "UNet": (lambda: UNet(3, 1, 1, channels=(8, 16, 32), strides=(2, 2)), True),
    "SegResNet": (lambda: SegResNet(3, init_filters=8, in_channels=1, out_channels=1), True),
    "ResNet18": (
        lambda: resnet18(spatial_dims=3, n_input_channels=1, num_classes=2),
        False,
    ),
    "DenseNet121": (lambda: DenseNet121(spatial_dims=3, in_channels=1, out_channels=2), False),
}
"""What is trained, and whether it segments."""


def _size() -> Size:
    return ON_CPU if device().type == "cpu" else ON_ACCELERATOR
