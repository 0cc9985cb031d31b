"""Checkpoints beside the notebooks, where the work folder is reached through a channel."""

# mypy: allow-untyped-calls
# (jupyter_server says that it is typed, and leaves many functions without types)

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from anyio.to_thread import run_sync
from jupyter_server.services.contents.checkpoints import AsyncCheckpoints
from tornado.web import HTTPError

from kakehashi.errors import LinkError
from kakehashi.link.work import (
    WorkDeniedError,
    WorkError,
    WorkExistsError,
    WorkFullError,
    WorkLostError,
    WorkNotFoundError,
    WorkStat,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.link.workchannel import ChannelFolder

T = TypeVar("T")

FOLDER = ".ipynb_checkpoints"
_ID = "checkpoint"

_STATUS: tuple[tuple[type[LinkError], int], ...] = (
    (WorkNotFoundError, 404),
    (WorkExistsError, 409),
    (WorkDeniedError, 403),
    (WorkFullError, 507),
    (WorkLostError, 503),
    (WorkError, 400),
    (LinkError, 503),
)


class _Manager(Protocol):
    folder: ChannelFolder


async def off_loop(work: Callable[[], T]) -> T:
    """Do what waits for the store in a thread; its errors become HTTP's, with their message."""
    try:
        return await run_sync(work)
    except LinkError as error:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        raise HTTPError(status, str(error)) from error


class ChannelCheckpoints(AsyncCheckpoints):
    """One checkpoint a file, in the work folder, so that it outlives the session."""

    async def create_checkpoint(self, contents_mgr: _Manager, path: str) -> dict[str, Any]:
        """Copy the file to its checkpoint."""
        source, folder = path.strip("/"), contents_mgr.folder
        target = _place(_ID, source)

        def create() -> WorkStat:
            with contextlib.suppress(WorkExistsError):
                folder.mkdir(target.rpartition("/")[0])
            folder.copy(source, target)
            return folder.stat(target)

        return _model(_ID, await off_loop(create))

    async def restore_checkpoint(
        self, contents_mgr: _Manager, checkpoint_id: str, path: str
    ) -> None:
        """Copy the checkpoint to its file."""
        source, target = _place(checkpoint_id, path), path.strip("/")
        await off_loop(lambda: contents_mgr.folder.copy(source, target))

    async def rename_checkpoint(self, checkpoint_id: str, old_path: str, new_path: str) -> None:
        """Let a checkpoint follow its file."""
        old, new = _place(checkpoint_id, old_path), _place(checkpoint_id, new_path)
        folder = self._folder()

        def rename() -> None:
            with contextlib.suppress(WorkExistsError):
                folder.mkdir(new.rpartition("/")[0])
            # One of a file that had this name before is of no use to anyone.
            with contextlib.suppress(WorkNotFoundError):
                folder.remove(new)
            folder.rename(old, new)

        await off_loop(rename)

    async def delete_checkpoint(self, checkpoint_id: str, path: str) -> None:
        """Remove a checkpoint."""
        place = _place(checkpoint_id, path)
        folder = self._folder()
        await off_loop(lambda: folder.remove(place))

    async def list_checkpoints(self, path: str) -> list[dict[str, Any]]:
        """Return the file's checkpoint, if it has one."""
        place, folder = _place(_ID, path), self._folder()
        try:
            return [_model(_ID, await off_loop(lambda: folder.stat(place)))]
        except HTTPError as error:
            if error.status_code != 404:
                raise
            return []

    def _folder(self) -> ChannelFolder:
        manager: Any = self.parent
        folder: ChannelFolder = manager.folder
        return folder


def _place(checkpoint_id: str, path: str) -> str:
    if checkpoint_id != _ID:
        raise HTTPError(404, f"Checkpoint does not exist: {path}@{checkpoint_id}")
    parent, _, name = path.strip("/").rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    base, extension = (stem, dot + suffix) if stem else (name, "")
    place = f"{FOLDER}/{base}-{checkpoint_id}{extension}"
    return f"{parent}/{place}" if parent else place


def _model(checkpoint_id: str, found: WorkStat) -> dict[str, Any]:
    return {"id": checkpoint_id, "last_modified": found.modified}
