"""The store as an fsspec file system, so that other libraries read through the verified reader.

``kakehashi://`` shows, read-only::

    manifest.json            as the store made it
    cohort.csv               the catalogue's rows, one a series, with their uid
    series/UID.ozx           the packed files
    nifti/UID.nii            each volume as NIfTI: float32, rescaled, affine in RAS
    dicom/UID/SOP.dcm        each image as it was received, where it came uncompressed;
                             otherwise reading it is an error

Listing the first four needs nothing of the link. What is below ``nifti`` and ``dicom`` is made
while it is read, from the parts of the pack that a read touches.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol

import numpy as np
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from kakehashi.errors import StoreError
from kakehashi.link.manifest import series_path
from kakehashi.link.processstore import ProcessStore, naming
from kakehashi.link.session import Session

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from kakehashi.link.reader import File
    from kakehashi.link.store import Series, Store

_FOLDERS = ("series", "nifti", "dicom")
_NIFTI_HEAD = 352
# What is decoded together: the depth of a pack's inner chunks.
_SLICES = 16
_DICOM_SERIES = 2


class _Content(Protocol):
    """What a file holds."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


@dataclass(frozen=True)
class _Bytes:
    """A file that is in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class _Nifti:
    """A series as NIfTI: its slices lie one after another, as in the array."""

    def __init__(self, series: Series) -> None:
        self._series = series
        with naming(series.uid):
            slices, rows, columns = series.shape
            self._slices = slices
            self._plane = rows * columns * 4
            self._head = _nifti_head(series)
        self.size = _NIFTI_HEAD + slices * self._plane
        self._slab: tuple[int, bytes] = (-1, b"")

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        parts = [self._head[offset : min(end, _NIFTI_HEAD)]]
        at = max(offset, _NIFTI_HEAD)
        slab = self._plane * _SLICES
        while at < end:
            number, within = divmod(at - _NIFTI_HEAD, slab)
            part = self._decoded(number)[within : within + end - at]
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def _decoded(self, number: int) -> bytes:
        # Programs that copy a file in small pieces come back to the same slices many times.
        known, data = self._slab
        if known != number:
            first = number * _SLICES
            with naming(self._series.uid):
                values = self._series.crop(z=(first, min(first + _SLICES, self._slices)))
            data = values.astype("<f4").tobytes()
            self._slab = (number, data)
        return data


def _nifti_head(series: Series) -> bytes:
    import nibabel  # noqa: PLC0415 - only who reads NIfTI needs it

    nothing = np.broadcast_to(np.float32(0), series.shape[::-1])
    make: Any = nibabel.nifti1.Nifti1Image  # has no type information
    header = make(nothing, series.affine_ras).header
    header.set_xyzt_units("mm")
    header["vox_offset"] = _NIFTI_HEAD
    return bytes(header.binaryblock) + bytes(4)


class _Dicom:
    """The images of a series as they were received."""

    def __init__(self, series: Series) -> None:
        self.series = series
        with naming(series.uid):
            originals = series.pack.original_headers()
            self._stored = _Slabs(series.pack.array())
        self._files = {entry["sop"]: (k, entry, raw) for k, (entry, raw) in enumerate(originals)}
        self.sizes: dict[str, int] = {sop: e["size"] for sop, (_, e, _) in self._files.items()}

    def file(self, sop: str) -> bytes:
        k, entry, raw = self._files[sop]
        with naming(self.series.uid):
            planes = self._stored.all() if len(self._files) == 1 else self._stored.plane(k)
            body = bytes.fromhex(entry["element"]) + planes.tobytes()
            # Values of an odd length are filled up with one byte.
            body += bytes(entry["size"] == len(raw) + len(body) + 1)
            data = raw[: entry["at"]] + body + raw[entry["at"] :]
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise StoreError(
                    f"image {sop} came compressed, or its frames in another order, and cannot "
                    "be given back as it was; read its voxels from the series, and its "
                    "attributes with Series.headers()"
                )
        return data


class _Slabs:
    """An array of a pack, decoded as many slices at a time as it must be."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self._last: tuple[int, NDArray[Any]] = (-1, np.empty(0))

    def plane(self, k: int) -> NDArray[Any]:
        number, within = divmod(k, _SLICES)
        known, planes = self._last
        if known != number:
            planes = np.asarray(self._array[number * _SLICES : (number + 1) * _SLICES])
            self._last = (number, planes)
        plane: NDArray[Any] = planes[within]
        return plane

    def all(self) -> NDArray[Any]:
        return np.asarray(self._array[:])


class _View:
    """What the file systems of one session in one process share."""

    def __init__(self, session: Session) -> None:
        self.stores = ProcessStore(session)
        self._images: OrderedDict[str, _Dicom] = OrderedDict()

    def images(self, uid: str) -> _Dicom:
        """Return a series' images; those used last are kept, for whoever goes through them."""
        series = self.stores.series(uid)
        images = self._images.get(uid)
        # In a process that was forked, the series is another one than it was.
        if images is None or images.series is not series:
            images = self._images[uid] = _Dicom(series)
            while len(self._images) > _DICOM_SERIES:
                self._images.popitem(last=False)
        return images


# fsspec makes a file system each time one is asked for; they need not each have channels.
_SHARED: dict[Session, _View] = {}


class KakehashiFile(AbstractBufferedFile):  # type: ignore[misc] # has no type information
    """An open file; reads are ranges of it, verified."""

    def __init__(
        self, fs: KakehashiFileSystem, path: str, content: _Content, **options: Any
    ) -> None:
        self._content = content
        super().__init__(fs, path, "rb", size=content.size, cache_type="none", **options)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._content.read(start, end - start)


class KakehashiFileSystem(AbstractFileSystem):  # type: ignore[misc] # has no type information
    """The session's view of the store, read-only.

    Parameters
    ----------
    session : Session, Path or str, optional
        As for :class:`kakehashi.link.Store`.
    """

    protocol: ClassVar[str] = "kakehashi"
    root_marker: ClassVar[str] = ""
    # Made anew, it reads session.json again: another session is another store.
    cachable: ClassVar[bool] = False

    def __init__(self, session: Session | Path | str | None = None, **options: Any) -> None:
        super().__init__(session=session, **options)
        current = Session.of(session)
        self._view = _SHARED.get(current) or _SHARED.setdefault(current, _View(current))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:  # noqa: FBT001, FBT002 - fsspec's
        """List a folder; sizes below ``nifti`` are None, since only opening tells them."""
        path = self._strip_protocol(path)
        found = self._folder(path)
        if found is None:
            found = [self.info(path)]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size and type of a file or folder."""
        path = self._strip_protocol(path)
        folder, _slash, name = path.rpartition("/")
        if path == "" or path in _FOLDERS or (folder == "dicom" and self._known(name)):
            return {"name": path, "size": 0, "type": "directory"}
        entry = self._store.reader.manifest.files.get(path)
        if entry is not None:
            return {"name": path, "size": entry.size, "type": "file"}
        if folder.startswith("dicom/"):
            uid = folder.removeprefix("dicom/")
            if not self._known(uid):
                raise _missing(path)
            sizes = self._view.images(uid).sizes
            sop = name.removesuffix(".dcm")
            if name == sop or sop not in sizes:
                raise _missing(path)
            return {"name": path, "size": sizes[sop], "type": "file"}
        return {"name": path, "size": self._content(path).size, "type": "file"}

    def _folder(self, path: str) -> list[dict[str, Any]] | None:
        """Return what a folder holds, None if it is none."""
        files = self._store.reader.manifest.files.values()
        if path == "":
            return [self.info(name) for name in ("manifest.json", "cohort.csv", *_FOLDERS)]
        if path == "series":
            return [{"name": e.path, "size": e.size, "type": "file"} for e in files]
        if path == "nifti":
            return [{"name": f"nifti/{e.uid}.nii", "size": None, "type": "file"} for e in files]
        if path == "dicom":
            return [{"name": f"dicom/{e.uid}", "size": 0, "type": "directory"} for e in files]
        folder, _slash, uid = path.rpartition("/")
        if folder == "dicom" and self._known(uid):
            sizes = self._view.images(uid).sizes
            return [
                {"name": f"{path}/{sop}.dcm", "size": size, "type": "file"}
                for sop, size in sizes.items()
            ]
        return None

    def _open(self, path: str, mode: str = "rb", **options: Any) -> KakehashiFile:
        if mode != "rb":
            self._refuse(path)
        for name in ("block_size", "autocommit", "cache_options", "cache_type"):
            options.pop(name, None)
        return KakehashiFile(self, path, self._content(path), **options)

    def _content(self, path: str) -> _Content:
        folder, _slash, name = path.rpartition("/")
        if path == "manifest.json":
            return _Bytes(self._store.reader.manifest.raw)
        if path == "cohort.csv":
            return _Bytes(_table(self._store))
        if path in self._store.reader.manifest.files:
            file: File = self._store.reader.open(path)
            return file
        if folder == "nifti" and name.endswith(".nii"):
            uid = name.removesuffix(".nii")
            if self._known(uid):
                return _Nifti(self._view.stores.series(uid))
        if folder.startswith("dicom/") and name.endswith(".dcm"):
            uid, sop = folder.removeprefix("dicom/"), name.removesuffix(".dcm")
            if self._known(uid):
                images = self._view.images(uid)
                if sop in images.sizes:
                    return _Bytes(images.file(sop))
        if path == "" or path in _FOLDERS:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise _missing(path)

    @property
    def _store(self) -> Store:
        return self._view.stores.get()

    def _known(self, uid: str) -> bool:
        return series_path(uid) in self._store.reader.manifest.files

    def _refuse(self, path: object, *_: Any, **__: Any) -> NoReturn:
        """Refuse to write: the store's view is read-only."""
        raise OSError(errno.EROFS, "the store is read-only; write to the work folder", str(path))

    cp_file = mkdir = makedirs = mv = rm = rm_file = rmdir = touch = _refuse
    put_file = pipe_file = _refuse


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "not in this session's view of the store", path)


def _table(store: Store) -> bytes:
    rows = store.table()
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names or ["uid"])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()
