"""Series as samples for torch and MONAI: whole volumes, crops or slices, in a known order.

A :class:`SeriesDataset` says what the samples are, a :class:`SeriesLoader` gives batches of them,
epoch after epoch, fetched ahead into a :class:`~kakehashi.link.ring.Ring`. What comes, and in
which order, depends on the seed alone: not on the number of workers, and not on how often the
training was interrupted and resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from kakehashi.errors import LinkClosedError, StoreError
from kakehashi.link import recorder
from kakehashi.link.maintenance import Maintenance, Position, holds_all, refuse, turned
from kakehashi.link.manifest import series_path
from kakehashi.link.order import Order, Turned, share
from kakehashi.link.processstore import ProcessStore, naming
from kakehashi.link.ring import Ring, RingStats, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from kakehashi.link.pinned import Pins
    from kakehashi.link.session import Session

RING_BYTES = 1 << 30

Sample = dict[str, Any]
Crop = tuple[int | None, int | None, int | None]

_VALUE_BYTES = 4
# Each waits for the link a few times a series, so that fewer would leave a long line idle.
_THREADS = 4
_STATE = 1
# What is drawn for a sample: numbers 0 to 2 are the crop's place along z, y, x.
_DRAW_TRANSFORM = 3
# So long a wait behind what was pinned is told.
_TELL_S = 5.0

_log = logging.getLogger(__name__)


class SeriesDataset(Dataset[Sample]):
    """Samples of a session's cohort.

    A sample is a dictionary: ``image`` (float32, rescaled, axes channel, z, y, x), ``uid``,
    ``sample`` (its number) and ``start`` (the crop's first voxel, z, y, x). Indexing gives the
    sample as it is in the epoch of :attr:`epoch`, read at once; a :class:`SeriesLoader` gives the
    same samples in the epoch's order, read ahead.

    The object can be pickled and used in processes that were forked: each process opens its own
    channels.

    Parameters
    ----------
    session : Session, Path or str, optional
        As for :class:`kakehashi.link.Store`.
    uids : sequence of str, optional
        SeriesInstanceUIDs; the whole cohort, in its order, if not given.
    crop : tuple of int or None, optional
        Size (z, y, x) of a random crop, ``None`` for all of that axis: ``(1, None, None)`` is a
        random slice. The whole volume if not given. Only the parts of the file that a crop
        touches are read.
    fill : float, optional
        Value behind the volume's end where it is smaller than the crop; without it such a
        series is an error.
    per_series : int
        Samples that each series gives in an epoch.
    seed : int
        Order, crops and random transforms follow from it.
    transform : callable, optional
        Applied to the sample. Where it has ``set_random_state``, as MONAI's random transforms and
        their compositions have, that is set for each sample; so is torch's own random state.
    metatensor : bool
        ``image`` is a ``monai.data.MetaTensor`` whose affine takes (z, y, x, 1) indices of it to
        mm in RAS.

    Raises
    ------
    NotInManifestError
        The cohort lacks one of the series.
    """

    def __init__(
        self,
        session: Session | Path | str | None = None,
        *,
        uids: Sequence[str] | None = None,
        crop: Crop | None = None,
        fill: float | None = None,
        per_series: int = 1,
        seed: int = 0,
        transform: Callable[[Sample], Any] | None = None,
        metatensor: bool = False,
    ) -> None:
        if crop is not None and (len(crop) != 3 or any(c is not None and c < 1 for c in crop)):
            raise ValueError(f"crop must be three sizes of at least 1 (or None), got {crop}")
        if per_series < 1:
            raise ValueError(f"per_series must be at least 1, got {per_series}")
        self._stores = ProcessStore(session)
        store = self._stores.get()
        if uids is None:
            self.uids = tuple(entry.uid for entry in store.reader.manifest.files.values())
        else:
            self.uids = tuple(store.series(uid).uid for uid in uids)
        self.crop = crop
        self.fill = fill
        self.per_series = per_series
        self.seed = seed
        self.epoch = 0
        self.transform = transform
        self.metatensor = metatensor
        _ = self.order(0)

    def __len__(self) -> int:
        return len(self.uids) * self.per_series

    def __getitem__(self, sample: int) -> Any:
        """Return a sample of the present epoch, read now."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} asked for; there are {len(self)}")
        request = _Request(self, self.order(self.epoch), sample)
        return request.finish(request.load())

    def order(self, epoch: int) -> Order:
        """Return the order of an epoch."""
        return Order(len(self), self.seed, epoch)

    def _turned(self, epoch: int, announced: tuple[Maintenance, ...]) -> Turned:
        mine = [one for one in announced if one.epoch == epoch]
        return turned(self.order(epoch), self.uids, self.per_series, mine)

    def close(self) -> None:
        """Close this process's channels; they are opened anew when a sample is asked for."""
        self._stores.close()

    def _fingerprint(self) -> dict[str, Any]:
        """Return what must be the same for a position in the order to mean the same sample."""
        files = self._stores.get().reader.manifest.files
        # The hashes of their blocks too: the same series, with the same voxels.
        names = [f"{uid} {files[series_path(uid)].blocks}\n" for uid in self.uids]
        return {
            "series": hashlib.sha256("".join(names).encode()).hexdigest(),
            "crop": None if self.crop is None else list(self.crop),
            "fill": self.fill,
            "per_series": self.per_series,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class _Read:
    """A sample's voxels, and what is needed to finish it."""

    voxels: NDArray[np.float32]
    start: tuple[int, int, int]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class _Request:
    """One sample of one epoch: an item of the ring, and of a batch."""

    dataset: SeriesDataset
    order: Order
    sample: int
    last_of_batch: bool = True

    @property
    def uid(self) -> str:
        return self.dataset.uids[self.sample // self.dataset.per_series]

    def size(self) -> int:
        with naming(self.uid):
            shape = self.dataset._stores.series(self.uid).shape
            return math.prod(self._extent(shape)) * _VALUE_BYTES

    def load(self) -> _Read:
        with naming(self.uid):
            return self._load()

    def finish(self, read: _Read) -> Any:
        """Make the sample: tensor, then transform."""
        with naming(self.uid):
            return self._finish(read)

    def _extent(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        crop = self.dataset.crop or (None, None, None)
        return tuple(size if want is None else want for want, size in zip(crop, shape, strict=True))

    def _load(self) -> _Read:
        series = self.dataset._stores.series(self.uid)
        shape = series.shape
        extent = self._extent(shape)
        bounds = [
            self._bound(axis, want, size)
            for axis, (want, size) in enumerate(zip(extent, shape, strict=True))
        ]
        if self.dataset.crop is None:
            voxels = series.pack.values(np.float32)
        else:
            voxels = series.crop(*bounds)
        if voxels.shape != extent:
            padded = np.full(extent, self.dataset.fill, dtype=np.float32)
            padded[tuple(slice(size) for size in voxels.shape)] = voxels
            voxels = padded
        z, y, x = (first for first, _ in bounds)
        # From indices (z, y, x) of the crop, not (x, y, z) of the volume.
        affine = series.affine_ras
        affine[:3, 3] = (affine @ [x, y, z, 1])[:3]
        return _Read(voxels, (z, y, x), affine[:, [2, 1, 0, 3]])

    def _bound(self, axis: int, want: int, size: int) -> tuple[int, int]:
        if want <= size:
            first = self.order.draw(self.sample, axis, size - want + 1)
            return first, first + want
        if self.dataset.fill is None:
            raise StoreError(
                f"the volume has {size} voxels along {'zyx'[axis]}, the crop wants {want}; ask "
                "for a smaller crop, give fill=, or leave the series out"
            )
        return 0, size

    def _finish(self, read: _Read) -> Any:
        dataset = self.dataset
        image = torch.from_numpy(read.voxels)[None]
        if dataset.metatensor:
            from monai.data.meta_tensor import MetaTensor  # noqa: PLC0415 - torch alone must be enough

            image = MetaTensor(image, affine=torch.from_numpy(read.affine))
            image.meta["space"] = "RAS"
        sample: Sample = {
            "image": image,
            "uid": self.uid,
            "sample": self.sample,
            "start": torch.tensor(read.start),
        }
        transform = dataset.transform
        if transform is None:
            return sample
        seed = self.order.draw(self.sample, _DRAW_TRANSFORM, 1 << 32)
        reseed = getattr(transform, "set_random_state", None)
        if reseed is not None:
            reseed(seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return transform(sample)


@dataclass(frozen=True)
class LoaderStats:
    """What a loader did so far.

    Attributes
    ----------
    batches : int
        Batches handed to the loop.
    waited_s : float
        Seconds that the loop waited for them.
    first_s : float
        Seconds of those for the first batch, which nothing could be fetched ahead of.
    ring : RingStats
        The ring as it is now; those of all workers together as of the last batch of each.
    rate : float or None
        Samples a second of all ranks together, since the first batch; ``None`` before the second.
    used_up_s : float
        Seconds of ``waited_s`` behind the end of what was pinned for a maintenance.
    """

    batches: int
    waited_s: float
    first_s: float
    ring: RingStats
    rate: float | None
    used_up_s: float


class SeriesLoader:
    """Batches of a dataset, epoch after epoch.

    Each iteration gives what is left of the present epoch and then moves on to the next one; a
    loop that is left early goes on where it was. The ring looks ahead over the epoch's end. Ranks
    in step share an epoch without overlap or loss; where the samples do not divide, some ranks
    have one more.

    Parameters
    ----------
    dataset : SeriesDataset
    batch_size : int
        Samples a batch; an epoch's last one may be smaller.
    num_workers : int
        Processes that load and transform; 0 loads in threads of this one. The order is the same.
    ring_bytes : int
        Bytes to hold ahead of the loop, by all workers together.
    rank, world : int, optional
        This process's share; those of ``torch.distributed`` if it is initialised and they are
        not given, otherwise all.
    collate : callable
        Makes a batch of a list of samples.
    start_method : {"fork", "spawn", "forkserver"}, optional
        How workers are started; the platform's own way if not given.
    pin_memory : bool
        As for ``torch.utils.data.DataLoader``.
    """

    def __init__(
        self,
        dataset: SeriesDataset,
        batch_size: int = 1,
        *,
        num_workers: int = 0,
        ring_bytes: int = RING_BYTES,
        rank: int | None = None,
        world: int | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
        start_method: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if (rank is None) != (world is None):
            raise ValueError("give both rank and world, or neither")
        if rank is None or world is None:
            rank, world = _distributed()
        share(len(dataset), 0, rank, world)
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank, self.world = rank, world
        self._num_workers = num_workers
        # Workers have their own, since memory is not shared between processes.
        self._ring = None if num_workers else Ring(ring_bytes)
        self._ring_bytes = ring_bytes
        self._collate = collate
        self._start_method = start_method
        self._pin_memory = pin_memory
        self._epoch = 0
        self._done = 0
        self._running: Iterator[tuple[Any, int, RingStats]] | None = None
        # How often it was closed: a loop from before is over, also between two batches.
        self._closings = 0
        self._source: _Batches | None = None
        self._batches = 0
        self._waited_s = 0.0
        self._first_s = 0.0
        self._rings: dict[int, RingStats] = {}
        self._announced: tuple[Maintenance, ...] = ()
        # Where what is held ends in the epoch, for each maintenance that does not hold all.
        self._ends: dict[Maintenance, int] = {}
        self._told: set[Maintenance] = set()
        self._used_up_s = 0.0
        self._used_up_since: float | None = None
        # When the first batch and the last one came, and the samples from the one to the other.
        self._came: tuple[float, float] | None = None
        self._samples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of, from 0."""
        return self._epoch

    @property
    def position(self) -> Position:
        """Behind the batch that the loop was given last."""
        if self._done and self._done == len(self.dataset):
            return Position(self._epoch + 1, 0)
        return Position(self._epoch, self._done)

    @property
    def announced(self) -> tuple[Maintenance, ...]:
        """What was announced and is not over; a state brings it along."""
        return tuple(one for one in self._announced if one.epoch >= self.position.epoch)

    def order(self, epoch: int, *, before: Position | None = None) -> Turned:
        """Return an epoch's order, with what was announced for it.

        Parameters
        ----------
        epoch : int
        before : Position, optional
            Only what was announced to begin before this.
        """
        known = (one for one in self._announced if before is None or one.start < before)
        return self.dataset._turned(epoch, tuple(known))

    def announce(self, maintenance: Maintenance, pins: Pins | None = None) -> None:
        """Turn the order for a maintenance, and read from memory what is pinned for it.

        Call it in the loop's own thread, on every rank with the same maintenance. What was
        fetched ahead is fetched anew. The state carries it; to announce it once more, as a
        training does that was resumed, changes nothing but where bytes are read.

        Parameters
        ----------
        maintenance : Maintenance
            From a position that the loop has not passed; behind those that were announced before.
        pins : Pins, optional
            The share of it that this rank holds. The order does not depend on it.

        Raises
        ------
        ValueError
            It begins too early, its series are not the dataset's, or pinning is not finished.
        LinkClosedError
            What was pinned is dropped.
        """
        known = maintenance in self._announced
        if not known:
            refuse(self, maintenance)
        if pins is not None and not pins.wait(0):
            raise ValueError(f"not all is pinned yet ({pins.progress()}); pins.wait() waits for it")
        self._stop()
        if pins is not None:
            self.dataset._stores.hold(pins.held)
        if not known:
            self._schedule((*self._announced, maintenance))

    def _schedule(self, announced: tuple[Maintenance, ...]) -> None:
        # What is over orders nothing any more.
        self._announced = tuple(one for one in announced if one.epoch >= self._epoch)
        self._ends = {}
        uids = self.dataset.uids
        for epoch in {one.epoch for one in self._announced}:
            ones = [one for one in self._announced if one.epoch == epoch]
            partial = [one for one in ones if not holds_all(uids, one)]
            held = self.dataset._turned(epoch, tuple(ones)).held
            self._ends |= {one: part.stop for one, part in zip(partial, held, strict=True)}

    def __len__(self) -> int:
        """Return this rank's number of batches of a whole epoch."""
        mine = share(len(self.dataset), 0, self.rank, self.world)
        return len(mine[:: self.batch_size])

    def __iter__(self) -> Iterator[Any]:
        """Give the batches that are left of this epoch.

        Raises
        ------
        LinkClosedError
            The loader was closed meanwhile; a new loop takes up where this one was.
        """
        begin, closings = self._done, self._closings
        mine = share(len(self.dataset), begin, self.rank, self.world)
        for number in range(1, len(mine[:: self.batch_size]) + 1):
            batch = self._next(closings)
            before = self._done
            self._done = min(begin + number * self.batch_size * self.world, len(self.dataset))
            self._count(self._done - before)
            yield batch
        self._epoch += 1
        self._done = 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the loop is: behind the batch that it was given last.

        The state is the same on every rank in step; a training may go on with another number of
        ranks, workers or samples a batch.
        """
        epoch, done = self.position
        numbers = {uid: number for number, uid in enumerate(self.dataset.uids)}
        return {
            "kakehashi_loader": _STATE,
            "epoch": epoch,
            "done": done,
            "dataset": self.dataset._fingerprint(),
            "announced": [
                {
                    "epoch": one.epoch,
                    "sample": one.sample,
                    "series": [numbers[uid] for uid in one.uids],
                }
                for one in self._announced
                if one.epoch >= epoch
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises
        ------
        ValueError
            The state is of another dataset, in which it would mean other samples.
        """
        if state.get("kakehashi_loader") != _STATE:
            raise ValueError(f"not a state of a SeriesLoader of format {_STATE}: {list(state)}")
        mine, given = self.dataset._fingerprint(), state["dataset"]
        if other := [name for name in mine if given.get(name) != mine[name]]:
            raise ValueError(
                f"the state is of a dataset with other {', '.join(other)}: its samples would not "
                "be those of the training that is to be resumed; make the dataset as it was then"
            )
        if not 0 <= state["done"] <= len(self.dataset):
            raise ValueError(f"the state's position {state['done']} is not in the epoch")
        self._stop()
        self._epoch, self._done = state["epoch"], state["done"]
        self._schedule(
            tuple(
                Maintenance(
                    one["epoch"],
                    one["sample"],
                    tuple(self.dataset.uids[number] for number in one["series"]),
                )
                for one in state["announced"]
            )
        )

    def stats(self) -> LoaderStats:
        """Return the figures so far."""
        now = [self._ring.stats()] if self._ring is not None else self._rings.values()
        rings = [asdict(stats) for stats in now]
        total = RingStats(**{name: sum(ring[name] for ring in rings) for name in asdict(_NONE)})
        first, last = self._came or (0.0, 0.0)
        since = self._used_up_since
        return LoaderStats(
            batches=self._batches,
            waited_s=self._waited_s,
            first_s=self._first_s,
            ring=total,
            rate=self._samples / (last - first) if last > first else None,
            used_up_s=self._used_up_s + (time.monotonic() - since if since is not None else 0.0),
        )

    def close(self) -> None:
        """Stop fetching ahead, and end the workers; a loop in another thread ends, too."""
        self._closings += 1
        self._stop()
        self.dataset.close()

    def _stop(self) -> None:
        running, self._running = self._running, None
        # torch ends workers when the iterator is forgotten, which an exception's traceback delays.
        end_workers = getattr(running, "_shutdown_workers", None)
        if end_workers is not None:
            end_workers()
        # A loop in another thread that waits for the ring is woken.
        if self._source is not None:
            self._source.close()
            self._source = None

    def _next(self, closings: int) -> Any:
        started = time.monotonic()
        running = self._running
        if running is None:
            running = self._running = self._start()
        try:
            # Asked after it was started: what is closed later than this finds it and stops it.
            self._refuse_closed(closings)
            with recorder.step(self.dataset._stores.session), self._behind_what_is_held(started):
                batch, worker, stats = next(running)
        except BaseException:
            # Its place in the order is lost; the next attempt begins there anew.
            self._stop()
            raise
        self._rings[worker] = stats
        waited = time.monotonic() - started
        self._waited_s += waited
        if not self._batches:
            self._first_s = waited
        self._batches += 1
        return batch

    def _refuse_closed(self, closings: int) -> None:
        if closings != self._closings:
            raise LinkClosedError("this loader was closed; begin another loop to go on")

    def _count(self, samples: int) -> None:
        now = time.monotonic()
        if self._came is None:
            self._came = now, now
        else:
            self._came = self._came[0], now
            self._samples += samples

    @contextlib.contextmanager
    def _behind_what_is_held(self, started: float) -> Iterator[None]:
        """Count a wait for the store when what was pinned is used up; tell a long one, once."""
        used_up = [
            one for one, end in self._ends.items() if one.epoch == self._epoch and self._done >= end
        ]
        if not used_up or self.dataset._stores.held is None:
            yield
            return
        timer = threading.Timer(_TELL_S, self._tell, [used_up[-1]])
        timer.daemon = True
        if used_up[-1] not in self._told:
            timer.start()
        self._used_up_since = started
        try:
            yield
        finally:
            timer.cancel()
            self._used_up_since = None
            self._used_up_s += time.monotonic() - started

    def _tell(self, maintenance: Maintenance) -> None:
        self._told.add(maintenance)
        _log.warning(
            "what was pinned for the maintenance from epoch %d, sample %d on is used up; the loop "
            "waits for the store, and goes on by itself",
            maintenance.epoch,
            maintenance.sample,
        )

    def _start(self) -> Iterator[tuple[Any, int, RingStats]]:
        batches = self._source = _Batches(self)
        if not self._num_workers and not self._pin_memory:
            return iter(batches)
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            multiprocessing_context=self._start_method if self._num_workers else None,
            pin_memory=self._pin_memory,
            # Otherwise it would draw from the random state of the training itself.
            generator=torch.Generator(),
        )
        return cast("Iterator[tuple[Any, int, RingStats]]", iter(loader))


_NONE = RingStats()


class _Batches(IterableDataset[tuple[Any, int, RingStats]]):
    """The batches of one rank from some position on, without end; a worker gives its share."""

    def __init__(self, loader: SeriesLoader) -> None:
        self._dataset = loader.dataset
        self._batch_size = loader.batch_size
        self._rank, self._world = loader.rank, loader.world
        self._ring = loader._ring
        self._ring_bytes = loader._ring_bytes
        self._collate = loader._collate
        self._epoch = loader._epoch
        self._done = loader._done
        self._announced = loader._announced
        self._stream: Stream[tuple[_Request, _Read]] | None = None
        self._closed = False

    def close(self) -> None:
        """End the stream, where it is one of this process."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()

    def __iter__(self) -> Iterator[tuple[Any, int, RingStats]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        ring = self._ring or Ring(max(1, self._ring_bytes // workers))
        plan = (_Loaded(request) for request in self._plan(worker, workers))
        with ring.stream(plan, threads=_THREADS) as self._stream:
            if self._closed:
                # Before there was a stream that could be closed.
                self._stream.close()
            batch: list[Any] = []
            for request, read in self._stream:
                batch.append(request.finish(read))
                if request.last_of_batch:
                    made, batch = self._collate(batch), []
                    yield made, worker, ring.stats()

    def _plan(self, worker: int, workers: int) -> Iterator[_Request]:
        number = 0
        epoch, done = self._epoch, self._done
        while share(len(self._dataset), 0, self._rank, self._world):
            order = self._dataset._turned(epoch, self._announced)
            positions = share(len(self._dataset), done, self._rank, self._world)
            for at in range(0, len(positions), self._batch_size):
                # The loader under this asks its workers in turn, a batch each.
                if number % workers == worker:
                    batch = positions[at : at + self._batch_size]
                    for position in batch:
                        sample = order.sample(position)
                        last = position == batch[-1]
                        yield _Request(self._dataset, order.order, sample, last)
                number += 1
            epoch, done = epoch + 1, 0


@dataclass(frozen=True)
class _Loaded:
    """A request whose value says which it was."""

    request: _Request

    def size(self) -> int:
        return self.request.size()

    def load(self) -> tuple[_Request, _Read]:
        return self.request, self.request.load()


def _as_it_is(batch: Any) -> Any:
    return batch


def _distributed() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
