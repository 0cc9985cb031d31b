"""Samples for torch and MONAI: right voxels, one order, exact resume, through cuts as well."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kakehashi.errors import BlockMismatchError, LinkClosedError, StoreError
from kakehashi.link import Reader, SeriesDataset, SeriesLoader, Store
from kakehashi.link.manifest import NotInManifestError
from kakehashi.link.order import Order, share
from tests.lab.hosts import wait_for
from tests.link.volumes import Cohort, uid, voxels

SHAPES = [(20, 40, 36), (24, 32, 40), (16, 48, 32), (20, 36, 36), (18, 40, 40), (22, 34, 38)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cohort]:
    cohort = Cohort(tmp_path_factory.mktemp("cohort"), SHAPES)
    yield cohort
    cohort.close()


@pytest.fixture
def own_cohort(tmp_path: Path) -> Iterator[Cohort]:
    cohort = Cohort(tmp_path, SHAPES)
    yield cohort
    cohort.close()


def plain(batch: dict[str, Any]) -> tuple[Any, ...]:
    """Return a batch as something that compares by value, to the bit."""
    return (
        tuple(batch["uid"]),
        tuple(batch["sample"].tolist()),
        tuple(map(tuple, batch["start"].tolist())),
        batch["image"].numpy().tobytes(),
    )


def epochs(loader: SeriesLoader, count: int) -> list[list[tuple[Any, ...]]]:
    return [[plain(batch) for batch in loader] for _ in range(count)]


# --- the order ---------------------------------------------------------------------------------


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    order = Order(count, seed, epoch)
    return [order.sample(position) for position in range(count)]


def test_the_order_is_frozen() -> None:
    # If this fails, trainings that were begun with an older version can no longer be resumed.
    assert order_of(10, 0, 0) == [4, 7, 5, 2, 0, 1, 8, 9, 6, 3]
    assert order_of(10, 0, 1) == [7, 0, 1, 6, 4, 9, 5, 2, 3, 8]
    assert order_of(7, 1 << 63, 5) == [3, 1, 5, 4, 0, 2, 6]
    large = Order(1_000_000, 1, 2)
    assert [large.sample(p) for p in (0, 1, 999_999)] == [353186, 113135, 881254]
    order = Order(10, 3, 4)
    assert [
        order.draw(0, 0, 100),
        order.draw(9, 2, 7),
        order.draw(5, 3, 1 << 32),
        order.draw(5, 3, 1),
    ] == [32, 1, 2653285358, 0]


@given(
    count=st.integers(1, 700),
    seed=st.integers(0, (1 << 64) - 1),
    epoch=st.integers(0, 1 << 40),
)
def test_the_order_has_every_sample_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(order_of(count, seed, epoch)) == list(range(count))


def test_no_order_is_favoured() -> None:
    seen = Counter(tuple(order_of(4, seed, seed % 3)) for seed in range(1200))
    chi = sum((seen[key] - 50) ** 2 / 50 for key in seen)
    assert len(seen) == 24
    assert chi < 60, "chi square with 23 degrees of freedom; one in 30,000 is above"
    draws = Counter(Order(5, seed, 0).draw(3, 1, 6) for seed in range(1200))
    assert sum((draws[k] - 200) ** 2 / 200 for k in range(6)) < 30


@given(count=st.integers(0, 200), data=st.data())
def test_ranks_share_an_epoch_without_overlap_or_loss_whatever_their_number(
    count: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, count))
    world = data.draw(st.integers(1, 17))
    parts = [share(count, start, rank, world) for rank in range(world)]
    assert sorted(p for part in parts for p in part) == list(range(start, count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("rank", "world"), [(1, 1), (-1, 2), (0, 0)])
def test_a_rank_outside_of_its_world_is_refused(cohort: Cohort, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="rank must be"):
        SeriesLoader(SeriesDataset(cohort.path), rank=rank, world=world)


# --- the samples -------------------------------------------------------------------------------


def test_whole_volumes_are_those_of_the_series(cohort: Cohort) -> None:
    dataset = SeriesDataset(cohort.path)
    assert len(dataset) == len(SHAPES)
    for number, shape in enumerate(SHAPES):
        sample = dataset[number]
        assert sample["uid"] == uid(number)
        assert sample["image"].shape == (1, *shape)
        assert sample["image"].dtype == torch.float32
        np.testing.assert_array_equal(sample["image"][0].numpy(), voxels(number, shape))
    dataset.close()


@pytest.mark.parametrize("crop", [(8, 16, 16), (1, None, None), (None, 5, None), (16, 32, 32)])
def test_crops_are_parts_of_their_volumes(cohort: Cohort, crop: Any) -> None:
    dataset = SeriesDataset(cohort.path, crop=crop, per_series=3, seed=4)
    assert len(dataset) == 3 * len(SHAPES)
    starts = set()
    for number in range(len(dataset)):
        sample = dataset[number]
        whole = voxels(number // 3, SHAPES[number // 3])
        z, y, x = sample["start"].tolist()
        size = [want or all_ for want, all_ in zip(crop, whole.shape, strict=True)]
        part = whole[z : z + size[0], y : y + size[1], x : x + size[2]]
        np.testing.assert_array_equal(sample["image"][0].numpy(), part)
        starts.add((z, y, x))
    assert len(starts) > 6, "they are drawn at random"
    dataset.close()


def test_a_crop_reads_only_the_parts_of_the_file_that_it_touches(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path, [(96, 256, 256)])
    size = len(cohort.folder.contents[f"series/{uid(0)}.ozx"])
    dataset = SeriesDataset(cohort.path, crop=(1, None, None))
    _ = dataset[0]
    assert dataset._stores.get().stats().bytes < size / 3
    whole = SeriesDataset(cohort.path)
    _ = whole[0]
    assert whole._stores.get().stats().bytes > 0.9 * size * 64 / 96
    dataset.close()
    whole.close()
    cohort.close()


def test_a_volume_smaller_than_the_crop_is_refused_by_name_or_filled(cohort: Cohort) -> None:
    dataset = SeriesDataset(cohort.path, crop=(18, 32, 32))
    with pytest.raises(StoreError, match=rf"series {uid(2)}: .* 16 voxels along z.* 18"):
        _ = dataset[2]
    filled = SeriesDataset(cohort.path, crop=(18, 32, 32), fill=-1024)
    image = filled[2]["image"][0].numpy()
    assert image.shape == (18, 32, 32)
    assert (image[16:] == -1024).all()
    assert (image[:16] > -1024).all()
    dataset.close()
    filled.close()


def test_monais_tensor_has_the_affine_of_its_crop(cohort: Cohort) -> None:
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms import Orientation

    with Store(cohort.path) as store:
        series = store.series(uid(1))
        dataset = SeriesDataset(cohort.path, crop=(5, 6, 7), metatensor=True)
        sample = dataset[1]
        image = sample["image"]
        assert isinstance(image, MetaTensor)
        z, y, x = sample["start"].tolist()
        expected = series.affine_ras @ [x + 3, y + 2, z + 1, 1]
        np.testing.assert_allclose(image.affine.numpy() @ [1, 2, 3, 1], expected)
        np.testing.assert_allclose(image.pixdim.numpy(), series.spacing)
        turned = Orientation(axcodes="RAS", labels=None)(image)
        assert isinstance(turned, MetaTensor)
        assert turned.shape == (1, 7, 6, 5)
        corner = turned.affine.numpy() @ [0, 0, 0, 1]
        inverse = np.linalg.inv(image.affine.numpy()) @ corner
        k, j, i = np.rint(inverse[:3]).astype(int)
        assert turned[0, 0, 0, 0] == image[0, k, j, i]
        dataset.close()


def test_names_of_what_is_asked_for_wrongly(cohort: Cohort) -> None:
    with pytest.raises(NotInManifestError, match=r"9\.9"):
        SeriesDataset(cohort.path, uids=["9.9"])
    with pytest.raises(ValueError, match="crop must be"):
        SeriesDataset(cohort.path, crop=(0, 1, 1))
    with pytest.raises(ValueError, match="per_series"):
        SeriesDataset(cohort.path, per_series=0)
    with pytest.raises(ValueError, match="seed must be"):
        SeriesDataset(cohort.path, seed=-1)
    dataset = SeriesDataset(cohort.path, uids=[uid(3), uid(1)])
    assert dataset[0]["uid"] == uid(3)
    with pytest.raises(IndexError, match="there are 2"):
        _ = dataset[2]
    with pytest.raises(ValueError, match="batch_size"):
        SeriesLoader(dataset, 0)
    with pytest.raises(ValueError, match="both rank and world"):
        SeriesLoader(dataset, rank=0)
    dataset.close()


# --- the loader --------------------------------------------------------------------------------


def test_the_loader_gives_the_orders_samples_and_goes_on_to_the_next_epoch(
    cohort: Cohort,
) -> None:
    dataset = SeriesDataset(cohort.path, crop=(4, 8, 8), per_series=2, seed=9)
    with SeriesLoader(dataset, 5) as loader:
        assert len(loader) == 3
        for epoch in range(3):
            assert loader.epoch == epoch
            got = [plain(batch) for batch in loader]
            assert [len(batch[0]) for batch in got] == [5, 5, 2]
            order = dataset.order(epoch)
            assert [n for b in got for n in b[1]] == [order.sample(p) for p in range(12)]
            # The very voxels that asking for the sample itself gives.
            dataset.epoch = epoch
            first = order.sample(0)
            assert dataset[first]["start"].tolist() == list(got[0][2][0])
        stats = loader.stats()
        assert stats.batches == 9
        assert stats.waited_s >= stats.first_s > 0
        assert stats.ring.prefetched + stats.ring.read_through >= 36


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_give_the_same_as_none(cohort: Cohort, start_method: str) -> None:
    make = {"crop": (4, 8, 8), "per_series": 3, "seed": 2}
    with SeriesLoader(SeriesDataset(cohort.path, **make), 4) as loader:
        expected = epochs(loader, 2)
    dataset = SeriesDataset(cohort.path, **make)
    _ = dataset[0]  # so that channels and threads are there when the workers are forked
    with SeriesLoader(dataset, 4, num_workers=3, start_method=start_method) as loader:
        before = cohort.broker.connections
        assert epochs(loader, 2) == expected
        assert cohort.broker.connections > before + 2, "each worker has its own channels"
        _ = dataset[0]
        assert loader.stats().ring.prefetched > 0


def run_ranks(cohort: Cohort, world: int, batch: int, state: Any, batches: int | None) -> Any:
    """Run ranks in step for some batches; return samples by rank and the state behind them."""
    got, states = [], []
    for rank in range(world):
        dataset = SeriesDataset(cohort.path, crop=(2, 4, 4), per_series=4, seed=5)
        with SeriesLoader(dataset, batch, rank=rank, world=world) as loader:
            if state is not None:
                loader.load_state_dict(state)
            mine = []
            for number, made in enumerate(loader):
                mine.append(plain(made))
                if batches is not None and number + 1 == batches:
                    break
            got.append(mine)
            states.append(loader.state_dict())
    assert all(other == states[0] for other in states)
    return got, states[0]


@settings(max_examples=12)
@given(
    worlds=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batches=st.integers(1, 2),
)
def test_another_number_of_ranks_can_go_on_without_loss_or_repetition(
    cohort: Cohort, worlds: tuple[int, int], sizes: tuple[int, int], batches: int
) -> None:
    assume(worlds[0] * sizes[0] * batches < 24)  # otherwise the epoch is over
    first, state = run_ranks(cohort, worlds[0], sizes[0], None, batches)
    second, after = run_ranks(cohort, worlds[1], sizes[1], state, None)
    samples = [n for part in (first, second) for rank in part for b in rank for n in b[1]]
    assert sorted(samples) == list(range(24))
    assert (after["epoch"], after["done"]) == (1, 0)


@settings(max_examples=15)
@given(at=st.integers(0, 20), workers=st.sampled_from([0, 0, 0, 2]), batch=st.integers(1, 5))
def test_a_resume_anywhere_equals_the_undisturbed_run_to_the_bit(
    cohort: Cohort, at: int, workers: int, batch: int
) -> None:
    from monai.transforms import Compose, RandFlipd, RandGaussianNoised

    def make() -> SeriesDataset:
        return SeriesDataset(
            cohort.path,
            crop=(4, 8, 8),
            per_series=2,
            seed=11,
            transform=Compose([RandFlipd(["image"], prob=0.5), RandGaussianNoised(["image"])]),
        )

    with SeriesLoader(make(), batch) as loader:
        expected = [b for epoch in epochs(loader, 3) for b in epoch]
    at = min(at, len(expected) - 1)
    got: list[tuple[Any, ...]] = []
    with SeriesLoader(make(), batch, num_workers=workers) as loader:
        while len(got) < at:
            for made in loader:
                got.append(plain(made))
                if len(got) == at:
                    break
        state = pickle.loads(pickle.dumps(loader.state_dict()))
    with SeriesLoader(make(), batch, num_workers=workers) as loader:
        loader.load_state_dict(state)
        while len(got) < len(expected):
            got += [plain(made) for made in loader]
    assert got == expected
    assert len({b[3] for b in expected}) == len(expected), "the control: batches do differ"


def test_a_loop_that_was_left_goes_on_where_it_was(cohort: Cohort) -> None:
    with SeriesLoader(SeriesDataset(cohort.path, seed=1)) as loader:
        whole = epochs(loader, 1)[0]
    with SeriesLoader(SeriesDataset(cohort.path, seed=1)) as loader:
        got = []
        for batch in loader:
            got.append(plain(batch))
            if len(got) == 2:
                break
        assert loader.epoch == 0
        assert got + [plain(batch) for batch in loader] == whole


def test_a_state_of_something_else_is_refused(cohort: Cohort) -> None:
    with SeriesLoader(SeriesDataset(cohort.path, seed=1)) as loader:
        state = loader.state_dict()
    for changes, name in (
        ({"seed": 2}, "seed"),
        ({"per_series": 2}, "per_series"),
        ({"uids": [uid(0)]}, "series"),
        ({"uids": [uid(n) for n in (1, 0, 2, 3, 4, 5)]}, "series"),
        ({"crop": (4, 4, 4)}, "crop"),
    ):
        with (
            SeriesLoader(SeriesDataset(cohort.path, **({"seed": 1} | changes))) as other,
            pytest.raises(ValueError, match=f"other {name}:"),
        ):
            other.load_state_dict(state)
    with SeriesLoader(SeriesDataset(cohort.path, seed=1)) as loader:
        with pytest.raises(ValueError, match="not a state"):
            loader.load_state_dict({})
        with pytest.raises(ValueError, match="not in the epoch"):
            loader.load_state_dict(state | {"done": 7})


def test_the_trainings_own_random_state_is_left_alone(cohort: Cohort) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(3)
        dataset = SeriesDataset(
            cohort.path, transform=lambda s: s | {"image": s["image"] + torch.rand(1)}
        )
        with SeriesLoader(dataset, num_workers=workers, start_method="fork") as loader:
            noisy = [plain(b) for b in loader]
        assert torch.equal(torch.rand(3), expected)
        with SeriesLoader(dataset) as again:
            assert [plain(b) for b in again] == noisy


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_series_is_named_and_is_not_skipped(own_cohort: Cohort, workers: int) -> None:
    path = own_cohort.folder.root / f"series/{uid(3)}.ozx"
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    with SeriesLoader(SeriesDataset(own_cohort.path, seed=1), num_workers=workers) as loader:
        good: list[Any] = []
        with pytest.raises(BlockMismatchError, match=uid(3)):
            good.extend(loader)
        order = loader.dataset.order(0)
        at = [order.sample(p) for p in range(6)].index(3)
        assert loader.state_dict()["done"] == at
        raw[1000] ^= 1
        path.write_bytes(raw)
        assert [b["sample"].item() for b in loader] == [order.sample(p) for p in range(at, 6)]


@pytest.mark.parametrize("batches_before", [0, 1])
def test_closing_in_a_cut_does_not_wait_for_the_line(
    own_cohort: Cohort, monkeypatch: pytest.MonkeyPatch, batches_before: int
) -> None:
    # The series are so small that the reader would keep them all.
    monkeypatch.setitem(Reader.__init__.__kwdefaults__, "cache_bytes", 1)
    loader = SeriesLoader(SeriesDataset(own_cohort.path), ring_bytes=1 << 17)
    batches = iter(loader)
    for _ in range(batches_before):
        next(batches)
    waits_before = loader.stats().ring.waited
    with own_cohort.broker.silence(), ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, batches)
        wait_for("the loop to wait", lambda: loader.stats().ring.waited > waits_before)
        started = time.monotonic()
        loader.close()
        with pytest.raises(LinkClosedError):
            rest.result(20)
    assert time.monotonic() - started < 5
    wait_for(
        "the ring's threads to end",
        lambda: not [t for t in threading.enumerate() if t.name.startswith("ring-")],
    )
    assert len(list(loader)) >= 1, "it can be taken up again"
    loader.close()


def test_a_loop_that_was_between_two_batches_ends_with_the_loader(cohort: Cohort) -> None:
    loader = SeriesLoader(SeriesDataset(cohort.path))
    batches = iter(loader)
    first = next(batches)
    loader.close()
    with pytest.raises(LinkClosedError, match="begin another loop"):
        next(batches)
    rest = list(loader)
    assert len([first, *rest]) == len(SHAPES)
    loader.close()


def test_a_worker_that_dies_is_an_error_and_the_loop_goes_on_where_it_was(cohort: Cohort) -> None:
    with SeriesLoader(SeriesDataset(cohort.path, seed=6)) as loader:
        expected = epochs(loader, 2)
    with SeriesLoader(SeriesDataset(cohort.path, seed=6), num_workers=1) as loader:
        got = []

        def killing() -> None:
            for batch in loader:
                got.append(plain(batch))
                if len(got) == 2:
                    (worker,) = multiprocessing.active_children()
                    worker.kill()

        # torch's own; which one depends on what it was doing with the worker.
        with pytest.raises((RuntimeError, OSError, EOFError)):
            killing()
        again = [plain(batch) for batch in loader]
        assert again, "the rest of the epoch"
        assert got + again == expected[0]
        assert [plain(batch) for batch in loader] == expected[1]


def one_rank(rank: int, session: Path, meeting: Path, answer: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    with SeriesLoader(SeriesDataset(session, seed=8)) as loader:
        answer.put((rank, [plain(batch)[1][0] for batch in loader]))
    torch.distributed.destroy_process_group()


def test_ranks_are_those_of_torch(cohort: Cohort, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    ranks = [
        context.Process(target=one_rank, args=(rank, cohort.path, tmp_path / "meet", answer))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    got = dict(answer.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(30)
    order = order_of(6, 8, 0)
    assert got == {0: order[0::2], 1: order[1::2]}


def test_it_is_imported_only_when_it_is_asked_for() -> None:
    code = (
        "import sys, kakehashi, kakehashi.link\n"
        "assert not {'torch', 'monai', 'numpy', 'zarr'} & set(sys.modules), 'too much'\n"
        "from kakehashi.link import Ring, Store\n"
        "assert not {'torch', 'monai'} & set(sys.modules), 'torch for nothing'\n"
        "from kakehashi.link import SeriesDataset\n"
        "assert 'torch' in sys.modules and 'monai' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_forked_child_that_ends_does_not_cut_its_parents_channels(cohort: Cohort) -> None:
    dataset = SeriesDataset(cohort.path)
    _ = dataset[0]
    before = dataset._stores.get().stats().reconnects
    child = os.fork()
    if child == 0:
        right = dataset[1]["image"].shape[1:] == SHAPES[1]
        atexit._run_exitfuncs()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    for number in range(len(SHAPES)):
        _ = dataset[number]
    assert dataset._stores.get().stats().reconnects == before
    dataset.close()
