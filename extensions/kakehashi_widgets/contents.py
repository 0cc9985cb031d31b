"""A contents manager that replaces whole files, for a work folder across a network.

Jupyter's own "atomic" writing copies the old file aside and then writes in place, so that a
cut or a kill in the middle of a save leaves half a notebook. Here the new content goes into a
temporary file in the same folder, is flushed to the other side, and then takes the old one's
place in one step: whoever looks finds the old or the new file, whole.
"""

# mypy: allow-untyped-calls
# (jupyter_server says that it is typed, and leaves many functions without types)

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime as dt
import errno
import mimetypes
import os
import secrets
import stat
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from anyio.to_thread import run_sync
from jupyter_server.services.contents.filecheckpoints import AsyncFileCheckpoints
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from tornado.web import HTTPError
from traitlets import default

from kakehashi_widgets.closed import ClosedHandler

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFIX, _SUFFIX = ".~", ".part"
# A save that takes longer than this has died; what it left is rubbish.
_STALE_S = 24 * 3600
# File systems that cannot flush a folder say so with one of these; nothing is lost by it there.
_CANNOT_FLUSH_FOLDERS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF}


class PartialFile:
    """A file on its way to `target`, under a name of its own in the same folder.

    Parameters
    ----------
    target : Path
        The file to make or to replace. A symbolic link is followed.

    Raises
    ------
    PermissionError
        `target` exists and may not be written.
    OSError
        The folder does not take a new file.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        try:
            mode = stat.S_IMODE(self.target.stat().st_mode)
        except FileNotFoundError:
            mode = None
        else:
            # Replacing asks the folder only; a file that was made read-only stays as it is.
            if not os.access(self.target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.target))
        self.path = self.target.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o666 if mode is None else mode)
        self._file = os.fdopen(descriptor, "wb")
        if mode is not None:
            # The umask took bits away that the old file had; some file systems keep it so.
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, mode)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)

    def commit(self) -> None:
        """Flush everything to the other side, then take the target's place."""
        self._file.flush()
        os.fsync(self._file.fileno())
        # Over a network the last error may come only now; so close before the replacing.
        self._file.close()
        self.path.replace(self.target)
        _flush_folder(self.target.parent)

    def discard(self) -> None:
        """Remove what was written; the target stays as it was."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def write_whole(target: Path, data: bytes) -> None:
    """Make `target` hold `data`, or leave it as it is.

    Parameters
    ----------
    target : Path
        The file to make or to replace.
    data : bytes
        All of its new content.

    Raises
    ------
    OSError
        The file could not be written; the old content, if any, is untouched.
    """
    partial_file = PartialFile(target)
    try:
        partial_file.write(data)
        partial_file.commit()
    except BaseException:
        partial_file.discard()
        raise


def sweep(folder: Path) -> None:
    """Remove temporary files that saves left in a folder when they were killed, a day ago."""
    oldest = time.time() - _STALE_S
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < oldest:
                    path.unlink()


def decode(content: object, form: object, path: str) -> bytes:
    """Return a model's content as the bytes of its file.

    Raises
    ------
    HTTPError
        400: it is not text, or not in the format that it says.
    """
    if not isinstance(content, str):
        raise HTTPError(400, f"{path}: the content must be text, got {type(content).__name__}")
    if form == "text":
        return content.encode()
    if form == "base64":
        try:
            # Line breaks are allowed; any other stranger is not.
            return base64.b64decode("".join(content.split()).encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError) as error:
            raise HTTPError(400, f"{path}: the content is not valid base64: {error}") from error
    raise HTTPError(400, f"{path}: format must be 'text' or 'base64', got {form!r}")


class WholeFileCheckpoints(AsyncFileCheckpoints):
    """Checkpoints beside the notebooks, in the work folder, so that they outlive the session."""

    async def _copy(self, src: str, dest: str) -> None:
        def copy() -> None:
            write_whole(Path(dest), Path(src).read_bytes())

        with self.perm_to_403(dest):
            await run_sync(copy)


class WholeFileContentsManager(AsyncLargeFileManager):
    """Jupyter's file manager with saves that are whole or not at all.

    Writing happens off the event loop, since a save waits as long as the network does. Files
    are not given out as downloads, and what is deleted is deleted: a trash folder would keep
    copies of it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._uploads: dict[str, PartialFile] = {}
        self._swept: set[Path] = set()

    @default("checkpoints_class")
    def _default_checkpoints_class(self) -> type[WholeFileCheckpoints]:
        return WholeFileCheckpoints

    @default("delete_to_trash")
    def _default_delete_to_trash(self) -> bool:
        return False

    @default("files_handler_class")
    def _default_files_handler_class(self) -> type[ClosedHandler]:
        return ClosedHandler

    @default("files_handler_params")
    def _default_files_handler_params(self) -> dict[str, object]:
        return {}

    async def _off_loop(self, os_path: str, work: Callable[[], None]) -> None:
        folder = Path(os_path).parent
        first_time = folder not in self._swept
        self._swept.add(folder)

        def act() -> None:
            if first_time:
                sweep(folder)
            work()

        with self.perm_to_403(os_path):
            await run_sync(act)

    async def _save_notebook(
        self,
        os_path: str,
        nb: nbformat.NotebookNode,
        capture_validation_error: dict[str, Any] | None = None,
    ) -> None:
        def save() -> None:
            text = nbformat.writes(
                nb,
                version=nbformat.NO_CONVERT,
                capture_validation_error=capture_validation_error,
            )
            write_whole(Path(os_path), (text.rstrip("\n") + "\n").encode())

        await self._off_loop(os_path, save)

    async def _save_file(self, os_path: str, content: object, format: object) -> None:  # noqa: A002 - the base's name
        data = decode(content, format, os_path)
        await self._off_loop(os_path, partial(write_whole, Path(os_path), data))

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        """Save a file or notebook; a large upload comes as chunks 1, 2, ... and -1 (the last).

        The file takes its place when the last chunk is there, not before.
        """
        chunk = model.get("chunk")
        if chunk is None:
            saved: dict[str, Any] = await super().save(model, path)
            return saved
        return await self._save_chunk(model, path.strip("/"), chunk)

    async def _save_chunk(self, model: dict[str, Any], path: str, chunk: object) -> dict[str, Any]:
        if model.get("type") != "file":
            raise HTTPError(400, f"{path}: only files come in chunks, not {model.get('type')!r}")
        os_path = self._get_os_path(path)
        data = decode(model.get("content"), model.get("format"), path)
        if chunk == 1:
            self.run_pre_save_hooks(model=model, path=path)
            stale = self._uploads.pop(path, None)

            def begin() -> None:
                if stale is not None:
                    stale.discard()
                self._uploads[path] = PartialFile(Path(os_path))

            await self._off_loop(os_path, begin)
        upload = self._uploads.get(path)
        if upload is None:
            raise HTTPError(400, f"{path}: this upload was not begun here; upload the file again")

        def put() -> None:
            upload.write(data)
            if chunk == -1:
                upload.commit()

        try:
            await self._off_loop(os_path, put)
        except BaseException:
            self._uploads.pop(path, None)
            upload.discard()
            raise
        if chunk != -1:
            return unfinished(path)
        self._uploads.pop(path, None)
        finished: dict[str, Any] = await self.get(path, content=False)
        self.run_post_save_hooks(model=finished, os_path=os_path)
        self.emit(data={"action": "save", "path": path})
        return finished


def unfinished(path: str) -> dict[str, Any]:
    """Return the model of an upload of which more is to come."""
    now = dt.datetime.now(dt.UTC)
    return {
        "name": path.rsplit("/", 1)[-1],
        "path": path,
        "type": "file",
        "writable": True,
        "created": now,
        "last_modified": now,
        "mimetype": mimetypes.guess_type(path)[0],
        "size": None,
        "content": None,
        "format": None,
        "hash": None,
        "hash_algorithm": None,
    }
