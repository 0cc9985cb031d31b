"""What a notebook uses: the cohort that was granted to this session, series by series.

Coordinates are DICOM's patient coordinates (LPS: x to the patient's left, y to the back, z to
the head) in mm. Arrays are indexed [z, y, x] = [slice, row, column]; an affine takes voxel
indices the other way round, (i, j, k, 1) = (column, row, slice, 1).
"""

from __future__ import annotations

import html
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast, overload

import numpy as np

from kakehashi.errors import SessionError, StoreError
from kakehashi.imaging.ozip import Pack, open_pack
from kakehashi.link import door, recorder
from kakehashi.link.manifest import Entry, Manifest, NotInManifestError, series_path
from kakehashi.link.pinned import HeldFile
from kakehashi.link.reader import Reader, Stats
from kakehashi.link.session import Lease, Session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import nibabel
    import pydicom
    from numpy.typing import NDArray

    from kakehashi.imaging.ozip import ByteReader
    from kakehashi.link.pinned import Held

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_TABLE_ROWS = 50

Range = tuple[int, int]


class Series:
    """One series: what the catalogue says at once, pixels when they are asked for.

    Every byte was checked against the manifest before it gets here. An array that has been read
    stays in memory for as long as this object does.

    Attributes
    ----------
    uid : str
        SeriesInstanceUID.
    row : Mapping
        The catalogue's row.
    """

    def __init__(self, store: Store, entry: Entry, held: Held | None = None) -> None:
        self.uid = entry.uid
        self.row: Mapping[str, Any] = entry.series
        self._store = store
        self._entry = entry
        self._held = held
        self._lock = threading.Lock()
        self._opened: Pack | None = None
        self._reading = threading.Lock()
        self._array: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        return f"<Series {self.modality} {self.description!r} {_extent(self.row)} {self.uid}>"

    @property
    def modality(self) -> str:
        """Modality as in DICOM, e.g. ``CT``."""
        return str(self.row.get("modality") or "")

    @property
    def description(self) -> str:
        """Series description, empty if it has none."""
        return str(self.row.get("description") or "")

    @property
    def path(self) -> Path:
        """Where the packed file lies in the session's read-only view.

        Raises
        ------
        SessionError
            The node has no mounted view.
        """
        view = self._store.session.view
        if view is None:
            raise SessionError(
                "this node has no mounted view of the store, so series have no path; read them "
                "through the series itself: array, slice, crop, pack, to_nibabel"
            )
        return view / self._entry.path

    def read_packed(self) -> bytes:
        """Return the packed file whole, every block checked; for where there is no mount."""
        with self._store.reader.open(self._entry.path) as file:
            return file.read(0, file.size)

    @property
    def pack(self) -> Pack:
        """The packed file itself, opened for reading ranges of it."""
        with self._lock:
            if self._opened is None:
                self._opened = open_pack(self._source())
            return self._opened

    def _source(self) -> ByteReader:
        at_store = partial(self._store.reader.open, self._entry.path)
        if self._held is None or self.uid not in self._held.places:
            return at_store()
        return HeldFile(self._held, self.uid, self._entry.size, at_store)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices, rows and columns (z, y, x)."""
        return self.pack.shape

    @property
    def unit(self) -> str:
        """Unit of the values, e.g. ``HU``; empty if the images do not say."""
        return self.pack.unit

    @property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4: voxel (i, j, k, 1) = (column, row, slice, 1) to (x, y, z, 1) in mm, LPS."""
        return self.pack.affine_lps.copy()

    @property
    def affine_ras(self) -> NDArray[np.float64]:
        """As :attr:`affine`, in RAS coordinates: what nibabel and NIfTI mean by an affine."""
        return _LPS_TO_RAS @ self.pack.affine_lps

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Length of one step in mm between slices, rows and columns (z, y, x)."""
        return self.pack.spacing_mm

    @property
    def array(self) -> NDArray[np.float32]:
        """The whole volume, axes z, y, x, rescaled (HU for CT); read once, then kept."""
        # Not a cached_property: in Python 3.11 all series would share its lock, and wait for one
        # another's bytes.
        if self._array is not None:
            return self._array
        self._store.reader.refuse_forked()
        with self._reading:
            if self._array is None:
                self._array = np.asarray(self.pack.values(np.float32))
            return self._array

    def slice(self, k: int) -> NDArray[np.float32]:
        """Return one slice, rescaled; reads only the part of the file that it needs.

        Parameters
        ----------
        k : int
            Index of the slice; negative counts from the end.

        Returns
        -------
        ndarray of float32, shape (rows, columns)

        Raises
        ------
        IndexError
            There is no such slice.
        """
        slices = self.shape[0]
        if not -slices <= k < slices:
            raise IndexError(f"slice {k} asked for; the series has slices 0 to {slices - 1}")
        return self.pack.slice(k % slices)

    def crop(
        self, z: Range | None = None, y: Range | None = None, x: Range | None = None
    ) -> NDArray[np.float32]:
        """Return a box, rescaled; reads only the part of the file that it needs.

        Parameters
        ----------
        z, y, x : tuple of int, optional
            First index and the one after the last, in slices, rows and columns; all of that
            axis if not given.

        Returns
        -------
        ndarray of float32, shape (z, y, x) of the box

        Raises
        ------
        IndexError
            The box is empty or leaves the volume; nothing is padded or cut off silently.
        """
        pack = self.pack
        bounds: list[Range] = []
        for name, given, size in zip("zyx", (z, y, x), pack.shape, strict=True):
            first, stop = given if given is not None else (0, size)
            if not 0 <= first < stop <= size:
                raise IndexError(
                    f"{name}=({first}, {stop}) is not a part of 0 to {size}; "
                    f"the series has shape {pack.shape}"
                )
            bounds.append((first, stop))
        first, stop = bounds[0]
        box = tuple(slice(*bound) for bound in bounds)
        try:
            stored = np.asarray(pack.array()[box])
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"{self._entry.path} is damaged, as it was packed: {error}; "
                "tell the store's operators"
            ) from error
        out = np.empty(stored.shape, dtype=np.float32)
        for k in range(first, stop):
            slope, intercept = pack.rescale.of_slice(k)
            out[k - first] = stored[k - first].astype(np.float64) * slope + intercept
        return out

    def headers(self) -> list[pydicom.Dataset]:
        """Return each image's DICOM attributes, all but the pixels, in the order of slices."""
        return self.pack.headers()

    def to_nibabel(self) -> nibabel.nifti1.Nifti1Image:
        """Return the volume as a NIfTI image in memory: axes x, y, z, affine in RAS, mm."""
        import nibabel  # noqa: PLC0415 - most notebooks do not need it

        make: Any = nibabel.nifti1.Nifti1Image  # has no type information
        image = make(self.array.transpose(2, 1, 0), self.affine_ras)
        image.header.set_xyzt_units("mm")
        return cast("nibabel.nifti1.Nifti1Image", image)


class Cohort(Sequence[Series]):
    """The series granted to this session, in the catalogue's order.

    Attributes
    ----------
    version : int
        Number of the frozen cohort.
    sha256 : str
        Hash of the frozen list: what a paper can name.
    """

    def __init__(self, store: Store) -> None:
        manifest = store.reader.manifest
        self._store = store
        self._entries = tuple(manifest.files.values())
        self.version = int(manifest.cohort.get("version", 0))
        self.sha256 = str(manifest.cohort.get("sha256", ""))

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Series: ...
    @overload
    def __getitem__(self, index: slice) -> list[Series]: ...
    def __getitem__(self, index: int | slice) -> Series | list[Series]:
        """Return one series, or a list of them for a range."""
        if isinstance(index, slice):
            return [Series(self._store, entry) for entry in self._entries[index]]
        return Series(self._store, self._entries[index])

    def __iter__(self) -> Iterator[Series]:
        return (Series(self._store, entry) for entry in self._entries)

    def __repr__(self) -> str:
        return (
            f"<Cohort of project {self._store.project!r}, version {self.version}: "
            f"{len(self)} series>"
        )

    def _repr_html_(self) -> str:
        head = ("", "Modality", "Body part", "Description", "Voxels (x, y, z)", "mm (x, y, z)")
        rows = [
            (
                str(number),
                *(str(row.get(key) or "") for key in ("modality", "body_part", "description")),
                _extent(row),
                _steps(row),
                entry.uid,
            )
            for number, entry in enumerate(self._entries[:_TABLE_ROWS])
            for row in (entry.series,)
        ]
        more = len(self) - len(rows)
        parts = [
            f"<p>{html.escape(repr(self).strip('<>'))}</p>",
            "<table><thead><tr>",
            *(f"<th>{html.escape(cell)}</th>" for cell in (*head, "Series")),
            "</tr></thead><tbody>",
            *(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            ),
            "</tbody></table>",
            f"<p>and {more} more; store.table() has all of them</p>" if more else "",
        ]
        return "".join(parts)


class Store:
    """The image store as this session may see it.

    Parameters
    ----------
    session : Session, Path or str, optional
        The session, or the path of its ``session.json`` where that is not at its usual place.
    manifest : Manifest, optional
        The session's manifest, where it was fetched and checked before: by the process that
        this one was forked from.

    Raises
    ------
    SessionError
        This is not inside a session.
    LinkError
        The store cannot be reached, or its manifest is not the one that was granted.

    Examples
    --------
    >>> store = Store()  # doctest: +SKIP
    >>> series = store.cohort[0]  # doctest: +SKIP
    >>> series.array.shape, series.spacing  # doctest: +SKIP
    """

    def __init__(
        self,
        session: Session | Path | str | None = None,
        *,
        manifest: Manifest | None = None,
    ) -> None:
        self.session = Session.of(session)
        reference = self.session.manifest
        connects = door.to_store(self.session)
        if manifest is None:
            manifest = Manifest.fetch(connects, reference.path, reference.sha256)
        self.reader = Reader(connects, manifest, manifest_path=reference.path)
        recorder.of(self.session).watch(self.reader.pulse)

    def __repr__(self) -> str:
        count = len(self.reader.manifest.files)
        return f"<Store: project {self.project!r}, {count} series, for {self.person!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channels to the store; series of it can no longer be read."""
        self.reader.close()

    @property
    def project(self) -> str:
        """The project that this session computes for."""
        return self.session.project

    @property
    def person(self) -> str:
        """Who computes."""
        return self.session.person

    @property
    def cohort(self) -> Cohort:
        """The series that were granted."""
        return Cohort(self)

    def series(self, uid: str, *, held: Held | None = None) -> Series:
        """Return a series of the cohort.

        Parameters
        ----------
        uid : str
            SeriesInstanceUID.
        held : Held, optional
            Where its bytes may lie in memory.

        Raises
        ------
        NotInManifestError
            The cohort has no such series.
        """
        entry = self.reader.manifest.files.get(series_path(uid))
        if entry is None:
            raise NotInManifestError(
                f"the series {uid!r} is not in this session's cohort "
                f"({len(self.reader.manifest.files)} series); store.cohort shows what is"
            )
        return Series(self, entry, held)

    def table(self) -> list[dict[str, Any]]:
        """Return the catalogue's rows, each with its ``uid``; ``pandas.DataFrame`` takes it."""
        return [{"uid": entry.uid, **entry.series} for entry in self.reader.manifest.files.values()]

    def lease(self) -> Lease:
        """Return how long the session still may reach the store."""
        return self.session.lease()

    def stats(self) -> Stats:
        """Return what was read so far, and how long it was waited for."""
        return self.reader.stats()


def _extent(row: Mapping[str, Any]) -> str:
    sizes = [row.get(key) for key in ("columns", "rows", "slices")]
    return " x ".join(str(size) for size in sizes) if None not in sizes else ""


def _steps(row: Mapping[str, Any]) -> str:
    steps = [row.get(key) for key in ("spacing_x", "spacing_y", "spacing_z")]
    if not all(isinstance(step, int | float) for step in steps):
        return ""
    return " x ".join(f"{step:.3g}" for step in steps)
