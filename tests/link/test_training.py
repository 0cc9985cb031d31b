"""A real training on the link: its loss curve is the same whatever happens to the link."""

from __future__ import annotations

import contextlib
import io
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import Compose, RandFlipd, RandGaussianNoised

from kakehashi.link import Reader, SeriesDataset, SeriesLoader
from kakehashi.link.order import Order
from tests.lab.hosts import wait_for
from tests.link.volumes import Cohort

SHAPES = [(20, 40, 36), (24, 32, 40), (16, 48, 32), (20, 36, 36), (18, 40, 40), (22, 34, 38)]
CROP = (8, 16, 16)
CROP_BYTES = 8 * 16 * 16 * 4
STEPS = 36

Step = Callable[[int], None]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cohort]:
    cohort = Cohort(tmp_path_factory.mktemp("cohort"), SHAPES)
    yield cohort
    cohort.close()


@pytest.fixture(scope="module", autouse=True)
def _exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    # The series are so small that the reader would keep them all, and no cut would be felt.
    monkeypatch.setitem(Reader.__init__.__kwdefaults__, "cache_bytes", 1)


def labelled(sample: dict[str, Any]) -> dict[str, Any]:
    return sample | {"label": (sample["image"] > 20).float(), "image": sample["image"] / 100}


class Training:
    """Model, optimiser and loader, and the losses so far."""

    def __init__(self, cohort: Cohort, *, ring: int = 64, workers: int = 0, seed: int = 3) -> None:
        dataset = SeriesDataset(
            cohort.path,
            crop=CROP,
            per_series=4,
            seed=seed,
            transform=Compose(
                [
                    labelled,
                    RandFlipd(["image", "label"], prob=0.5),
                    RandGaussianNoised(["image"], prob=0.5, std=0.1),
                ]
            ),
        )
        self.loader = SeriesLoader(
            dataset, 2, num_workers=workers, ring_bytes=ring * CROP_BYTES, start_method=None
        )
        torch.manual_seed(1)
        self.net = UNet(3, 1, 1, channels=(4, 8), strides=(2,), dropout=0.1)
        self.loss = DiceCELoss(sigmoid=True)
        self.adam = torch.optim.AdamW(self.net.parameters(), 5e-3)
        self.losses: list[str] = []

    def run(self, steps: int, before: Step = lambda step: None) -> list[str]:
        """Go on to so many steps, over the epochs' ends; return every loss, to the bit."""
        batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        while len(self.losses) < steps:
            before(len(self.losses))
            batch = next(batches)
            self.adam.zero_grad()
            value = self.loss(self.net(batch["image"]), batch["label"])
            value.backward()
            self.adam.step()
            self.losses.append(value.item().hex())
        return self.losses

    def save(self) -> bytes:
        out = io.BytesIO()
        state = {
            "net": self.net.state_dict(),
            "adam": self.adam.state_dict(),
            "loader": self.loader.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, out)
        return out.getvalue()

    def restore(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved))
        self.net.load_state_dict(state["net"])
        self.adam.load_state_dict(state["adam"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["random"])


@pytest.fixture(scope="module")
def undisturbed(cohort: Cohort, _exact: None) -> list[str]:
    training = Training(cohort)
    with training.loader:
        losses = training.run(STEPS)
    values = [float.fromhex(value) for value in losses]
    assert len(set(losses)) == STEPS
    assert sum(values[-6:]) < 0.9 * sum(values[:6]), "it does learn"
    return losses


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loss_curve_is_the_same_through_resets(
    cohort: Cohort, undisturbed: list[str], workers: int
) -> None:
    training = Training(cohort, ring=4, workers=workers)

    def reset(step: int) -> None:
        if step % 3 == 1:
            cohort.broker.send(signal.SIGKILL)

    before = cohort.broker.connections
    with training.loader:
        assert training.run(STEPS, reset) == undisturbed
    assert cohort.broker.connections > before + 5, "the control: resets were felt"


def test_a_cut_within_the_ring_is_not_even_waited_for(
    cohort: Cohort, undisturbed: list[str]
) -> None:
    training = Training(cohort, ring=24)

    def full() -> bool:
        ring = training.loader.stats().ring
        return ring.prefetched - ring.evicted == 24

    with training.loader:
        training.run(4)
        wait_for("a full ring", full)
        with cohort.broker.silence():
            before = training.loader.stats()
            training.run(14)
            during = training.loader.stats()
        assert training.run(STEPS) == undisturbed
    assert during.batches - before.batches == 10
    assert during.ring.waited == before.ring.waited
    # The control: of twenty items' room hardly any was filled, from what had just come.
    assert during.ring.prefetched - before.ring.prefetched <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loss_curve_is_the_same_through_a_cut_that_empties_the_ring(
    cohort: Cohort, undisturbed: list[str], workers: int
) -> None:
    training = Training(cohort, ring=4, workers=workers)
    moved, cut, over = threading.Event(), threading.Event(), threading.Event()
    silence = contextlib.ExitStack()

    def line() -> None:
        assert cut.wait(20)
        # The line comes back when the loop has stood still for a while.
        while moved.wait(0.5):
            moved.clear()
        over.set()
        silence.close()

    def before(step: int) -> None:
        moved.set()
        if step == 7:
            silence.enter_context(cohort.broker.silence())
            cut.set()

    thread = threading.Thread(target=line)
    thread.start()
    with silence, training.loader:
        assert training.run(STEPS, before) == undisturbed
        assert training.loader.stats().waited_s > 0.4, "the control: the cut was felt"
    thread.join(20)
    assert over.is_set()


@pytest.mark.parametrize("at", [1, 12, 17])
def test_a_training_that_is_killed_and_resumed_has_the_same_losses(
    cohort: Cohort, undisturbed: list[str], at: int
) -> None:
    first = Training(cohort)
    with first.loader:
        begun = list(first.run(at))
        saved = first.save()
        first.run(at + 3)
    second = Training(cohort, ring=3)
    second.restore(saved)
    second.losses = begun
    with second.loader:
        assert second.run(STEPS) == undisturbed


# --- what makes it red -------------------------------------------------------------------------


def test_two_samples_in_each_others_place_are_seen(
    cohort: Cohort, undisturbed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Order.sample
    swapped = {5: 6, 6: 5}
    monkeypatch.setattr(Order, "sample", lambda self, p: right(self, swapped.get(p, p)))
    training = Training(cohort)
    with training.loader:
        losses = training.run(4)
    assert losses[:2] == undisturbed[:2]
    assert losses[2] != undisturbed[2]


def test_one_voxel_that_differs_by_one_is_seen(cohort: Cohort) -> None:
    def losses(change: float) -> list[str]:
        training = Training(cohort)
        seen = iter(range(STEPS))

        def flip(sample: dict[str, Any]) -> dict[str, Any]:
            sample["image"][0, 4, 8, 8] += change * (next(seen) == 5)
            return sample

        training.loader.dataset.transform = Compose([flip, training.loader.dataset.transform])
        with training.loader:
            return training.run(4)

    right, wrong = losses(0), losses(1)
    assert right[:2] == wrong[:2]
    assert right[2] != wrong[2]
