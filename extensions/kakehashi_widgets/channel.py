"""A contents manager for nodes that mount nothing: the work folder through its channel.

It answers as Jupyter's file manager does. What waits for the store does so in a thread. Where the
store is out of reach the answer is 503 with a sentence that says so: the lab keeps what it has in
the browser, and the next save brings it.
"""

# mypy: allow-untyped-calls
# (jupyter_server says that it is typed, and leaves many functions without types)

from __future__ import annotations

import base64
import contextlib
import hashlib
import mimetypes
from typing import Any

import nbformat
from jupyter_server.services.contents.manager import AsyncContentsManager, copy_pat
from tornado.web import HTTPError
from traitlets import Bool, Int, TraitError, Unicode, default, validate

from kakehashi.errors import LinkError, SessionError
from kakehashi.link import Session
from kakehashi.link.work import WorkError, WorkExistsError, WorkNotFoundError, WorkStat, relative
from kakehashi.link.workchannel import ChannelFolder, Incoming
from kakehashi_widgets.checkpoints import FOLDER as CHECKPOINTS
from kakehashi_widgets.checkpoints import ChannelCheckpoints, off_loop
from kakehashi_widgets.closed import ClosedHandler
from kakehashi_widgets.contents import decode, unfinished

_DEEPEST = 50


class ChannelContentsManager(AsyncContentsManager):
    """The work folder through the session's channel.

    Saves are whole or not at all. Files are not given out as downloads, as everywhere.

    Attributes
    ----------
    folder : ChannelFolder
        The way to the work folder.
    """

    root_dir = Unicode("/work", config=True, help="The work folder's path on the channel.")
    always_delete_dir = Bool(
        default_value=False, config=True, help="Also delete folders that are not empty."
    )
    max_copy_folder_size_mb = Int(500, config=True, help="The largest folder that is copied (MB).")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        session = Session.current()
        if session.work is not None:
            raise SessionError(
                f"{session.source}: this session's work folder is mounted at {session.work}; its "
                "server takes kakehashi_widgets.contents.WholeFileContentsManager"
            )
        self._socket = session.work_socket
        self._uploads: dict[str, Incoming] = {}
        self._swept: set[str] = set()
        self._folder: ChannelFolder | None = None
        super().__init__(*args, **kwargs)

    @property
    def folder(self) -> ChannelFolder:
        """The way to the work folder, opened when it is first needed."""
        if self._folder is None:
            self._folder = ChannelFolder.on_socket(self._socket, root=self.root_dir)
        return self._folder

    @default("checkpoints_class")
    def _default_checkpoints_class(self) -> type[ChannelCheckpoints]:
        return ChannelCheckpoints

    @default("files_handler_class")
    def _default_files_handler_class(self) -> type[ClosedHandler]:
        return ClosedHandler

    @validate("preferred_dir")
    def _validate_preferred_dir(self, proposal: dict[str, Any]) -> str:
        """Take the person's folder, and make it in their first session."""
        path = str(proposal["value"]).strip("/")
        try:
            if path:
                with contextlib.suppress(WorkExistsError):
                    self.folder.mkdir(path)
            if self.folder.stat(path).kind != "folder":
                raise TraitError(f"{path}: is not a folder of the work folder")
        except LinkError as error:
            raise TraitError(str(error)) from error
        return path

    def info_string(self) -> str:
        """Say where the files are."""
        return "Serving the project's work folder through the session's channel"

    async def get_kernel_path(self, path: str, model: object = None) -> str:  # noqa: ARG002 - the base's signature
        """Return where a notebook's kernel starts: at the server's own folder.

        No folder of the work folder is one of the node's.
        """
        return ""

    async def is_hidden(self, path: str) -> bool:
        """Whether a part of a path begins with a dot."""
        return any(part.startswith(".") for part in _clean(path).split("/"))

    async def dir_exists(self, path: str) -> bool:
        """Whether there is a folder."""
        return await self._kind(path) == "folder"

    async def file_exists(self, path: str) -> bool:
        """Whether there is a file."""
        return await self._kind(path) == "file"

    async def exists(self, path: str) -> bool:
        """Whether there is anything."""
        return await self._kind(path) is not None

    async def get(
        self,
        path: str,
        content: bool = True,  # noqa: FBT001, FBT002 - the base's signature
        type: str | None = None,  # noqa: A002 - the base's signature
        format: str | None = None,  # noqa: A002 - the base's signature
        require_hash: bool = False,  # noqa: FBT001, FBT002 - the base's signature
    ) -> dict[str, Any]:
        """Return a file's, notebook's or folder's model."""
        path = _clean(path)
        await self._refuse_hidden(path, 404, f"file or directory does not exist: {path!r}")
        found = await off_loop(lambda: self.folder.stat(path))
        if found.kind == "folder":
            if type not in {None, "directory"}:
                raise HTTPError(400, f"{path} is a directory, not a {type}", reason="bad type")
            model = await off_loop(lambda: self._folder_model(path, found, content=bool(content)))
        elif type == "directory":
            raise HTTPError(400, f"{path} is not a directory", reason="bad type")
        elif found.kind != "file":
            raise HTTPError(400, f"Cannot read non-file {path}")
        else:
            data = None
            if content or require_hash:
                found, data = await off_loop(lambda: self.folder.fetch(path))
            model = self._file_model(path, found, notebook=_is_notebook(path, type))
            if content and data is not None:
                self._fill(model, data, format)
            if require_hash and data is not None:
                model["hash"] = hashlib.sha256(data).hexdigest()
                model["hash_algorithm"] = "sha256"
        self.emit(data={"action": "get", "path": path})
        return model

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        """Save a file, notebook or folder; a large upload comes as chunks 1, 2, ... and -1."""
        path = _clean(path)
        if model.get("chunk") is not None:
            return await self._save_chunk(model, path, model["chunk"])
        self.run_pre_save_hooks(model=model, path=path)
        kind = _required(model, "type", "No file type provided")
        if kind != "directory":
            _required(model, "content", "No file content provided")
        await self._refuse_hidden(path, 400, f"Cannot create file or directory {path!r}")
        message = None
        if kind == "notebook":
            saved, message = await self._save_notebook(model, path)
        elif kind == "file":
            data = decode(model["content"], model.get("format"), path)
            saved = self._file_model(path, await self._put(path, data), notebook=False)
        elif kind == "directory":
            saved = await off_loop(lambda: self._save_folder(path))
        else:
            raise HTTPError(400, f"Unhandled contents type: {kind}")
        if message:
            saved["message"] = message
        self.run_post_save_hooks(model=saved, os_path=path)
        self.emit(data={"action": "save", "path": path})
        return saved

    async def delete_file(self, path: str) -> None:
        """Delete a file, or a folder, which must be empty unless ``always_delete_dir``."""
        path = _clean(path)
        await self._refuse_hidden(path, 400, f"Cannot delete file or directory {path!r}")

        def delete() -> None:
            if self.folder.stat(path).kind == "folder" and not self.always_delete_dir:
                names = {entry.name for entry in self.folder.listdir(path)}
                # One with nothing but left checkpoints in it is empty to its owner.
                if names - {CHECKPOINTS}:
                    raise HTTPError(400, f"Directory {path} not empty")
            self.folder.remove(path, recursive=True)

        await off_loop(delete)

    async def rename_file(self, old_path: str, new_path: str) -> None:
        """Rename a file or folder; what is there already is not replaced."""
        old, new = _clean(old_path), _clean(new_path)
        if old == new:
            return
        for path in (old, new):
            await self._refuse_hidden(path, 400, f"Cannot rename file or directory {old!r}")
        await off_loop(lambda: self.folder.rename(old, new))

    async def copy(self, from_path: str, to_path: str | None = None) -> dict[str, Any]:
        """Copy a file or folder, into a folder under a name that is free there."""
        source = _clean(from_path)
        parent, _, name = source.rpartition("/")
        target = parent if to_path is None else _clean(to_path)
        found = await off_loop(lambda: self.folder.stat(source))
        if await self.dir_exists(target):
            free = await self.increment_filename(copy_pat.sub(".", name), target, insert="-Copy")
            target = f"{target}/{free}".strip("/")
        elif to_path is None or not await self.dir_exists(target.rpartition("/")[0]):
            raise HTTPError(404, f"No such parent directory: {target} to copy file in")
        if found.kind == "folder":
            await off_loop(lambda: self._copy_folder(source, target))
        else:
            await off_loop(lambda: self.folder.copy(source, target))
            if _is_notebook(target, None):
                await self._check_in(target)
        model = await self.get(target, content=False)
        self.emit(data={"action": "copy", "path": target, "source_path": from_path})
        return model

    async def _kind(self, path: str) -> str | None:
        clean = _clean(path)

        def look() -> str | None:
            try:
                return self.folder.stat(clean).kind
            except WorkNotFoundError:
                return None

        return await off_loop(look)

    async def _refuse_hidden(self, path: str, status: int, message: str) -> None:
        if not self.allow_hidden and await self.is_hidden(path):
            raise HTTPError(status, message)

    def _folder_model(self, path: str, found: WorkStat, *, content: bool) -> dict[str, Any]:
        model = _model(path, found) | {"type": "directory", "size": None}
        if not content:
            return model
        model["content"] = [
            self._entry_model(f"{path}/{entry.name}".strip("/"), entry)
            for entry in self.folder.listdir(path)
            if entry.kind in {"file", "folder"}
            and _is_text(entry.name)
            and self.should_list(entry.name)
            and (self.allow_hidden or not entry.name.startswith("."))
        ]
        model["format"] = "json"
        return model

    def _entry_model(self, path: str, entry: WorkStat) -> dict[str, Any]:
        if entry.kind == "folder":
            return self._folder_model(path, entry, content=False)
        return self._file_model(path, entry, notebook=_is_notebook(path, None))

    def _file_model(self, path: str, found: WorkStat, *, notebook: bool) -> dict[str, Any]:
        if notebook:
            return _model(path, found) | {"type": "notebook"}
        return _model(path, found) | {"type": "file", "mimetype": mimetypes.guess_type(path)[0]}

    def _fill(self, model: dict[str, Any], data: bytes, form: str | None) -> None:
        """Put a file's content into its model."""
        path = model["path"]
        if model["type"] == "notebook":
            errors: dict[str, Any] = {}
            try:
                notebook = nbformat.reads(
                    data.decode(), as_version=4, capture_validation_error=errors
                )
            except Exception as error:
                raise HTTPError(400, f"Unreadable Notebook: {path} {error!r}") from error
            self.mark_trusted_cells(notebook, path)
            model["content"], model["format"] = notebook, "json"
            self.validate_notebook_model(model, errors)
            return
        text = None
        if form != "base64":
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                if form == "text":
                    raise HTTPError(
                        400, f"{path} is not UTF-8 encoded", reason="bad format"
                    ) from error
        if text is not None:
            model["content"], model["format"] = text, "text"
        else:
            model["content"], model["format"] = base64.encodebytes(data).decode(), "base64"
        if model["mimetype"] is None:
            octets = "application/octet-stream"
            model["mimetype"] = octets if text is None else "text/plain"

    async def _save_notebook(
        self, model: dict[str, Any], path: str
    ) -> tuple[dict[str, Any], str | None]:
        errors: dict[str, Any] = {}
        try:
            notebook = nbformat.from_dict(model["content"])
            self.check_and_sign(notebook, path)
            text = nbformat.writes(
                notebook, version=nbformat.NO_CONVERT, capture_validation_error=errors
            )
        except Exception as error:
            raise HTTPError(500, f"Unexpected error while saving file: {path} {error}") from error
        found = await self._put(path, (text.rstrip("\n") + "\n").encode())
        await self._check_in(path)
        self.validate_notebook_model(model, validation_error=errors)
        return self._file_model(path, found, notebook=True), model.get("message")

    async def _check_in(self, path: str) -> None:
        """Make a notebook's first checkpoint: one should always exist."""
        if not await self.checkpoints.list_checkpoints(path):
            await self.create_checkpoint(path)

    async def _put(self, path: str, data: bytes) -> WorkStat:
        def put() -> WorkStat:
            self._sweep_beside(path)
            with self.folder.begin(path) as incoming:
                incoming.write(data)
                return incoming.commit()

        return await off_loop(put)

    def _save_folder(self, path: str) -> dict[str, Any]:
        try:
            self.folder.mkdir(path)
        except WorkExistsError:
            if self.folder.stat(path).kind != "folder":
                raise HTTPError(400, f"Not a directory: {path}") from None
        return self._folder_model(path, self.folder.stat(path), content=False)

    async def _save_chunk(self, model: dict[str, Any], path: str, chunk: object) -> dict[str, Any]:
        if model.get("type") != "file":
            raise HTTPError(400, f"{path}: only files come in chunks, not {model.get('type')!r}")
        await self._refuse_hidden(path, 400, f"Cannot create file or directory {path!r}")
        data = decode(model.get("content"), model.get("format"), path)
        if chunk == 1:
            self.run_pre_save_hooks(model=model, path=path)
            await off_loop(lambda: self._begin_upload(path))
        upload = self._uploads.get(path)
        if upload is None:
            raise HTTPError(400, f"{path}: this upload was not begun here; upload the file again")
        try:
            await off_loop(lambda: upload.write(data))
            if chunk != -1:
                return unfinished(path)
            found = await off_loop(upload.commit)
        except BaseException:
            self._uploads.pop(path, None)
            await off_loop(upload.discard)
            raise
        self._uploads.pop(path, None)
        finished = self._file_model(path, found, notebook=_is_notebook(path, None))
        self.run_post_save_hooks(model=finished, os_path=path)
        self.emit(data={"action": "save", "path": path})
        return finished

    def _begin_upload(self, path: str) -> None:
        stale = self._uploads.pop(path, None)
        if stale is not None:
            stale.discard()
        self._sweep_beside(path)
        self._uploads[path] = self.folder.begin(path)

    def _sweep_beside(self, path: str) -> None:
        """Once for each folder, remove what saves left there that died long ago."""
        parent = path.rpartition("/")[0]
        if parent not in self._swept:
            with contextlib.suppress(WorkError):
                self.folder.sweep(parent)
            self._swept.add(parent)

    def _copy_folder(self, source: str, target: str) -> None:
        limit = self.max_copy_folder_size_mb << 20
        size = 0
        folders: list[str] = []
        files: list[str] = []

        def look(below: str, depth: int) -> None:
            nonlocal size
            folders.append(below)
            if depth > _DEEPEST:
                raise HTTPError(400, f"Can't copy '{source}': its folders lie too deep")
            for entry in self.folder.listdir(f"{source}/{below}"):
                place = f"{below}/{entry.name}".strip("/")
                if entry.kind == "folder":
                    look(place, depth + 1)
                elif entry.kind == "file":
                    files.append(place)
                    size += entry.size
            if size > limit:
                raise HTTPError(
                    400, f'Can\'t copy folders larger than {limit >> 20}MB, "{source}" is larger'
                )

        look("", 0)
        for below in folders:
            self.folder.mkdir(f"{target}/{below}")
        for below in files:
            self.folder.copy(f"{source}/{below}", f"{target}/{below}")


def _clean(path: str) -> str:
    try:
        return relative(path.strip("/"))
    except WorkError as error:
        raise HTTPError(404, str(error)) from error


def _is_text(name: str) -> bool:
    """Whether a name can be told in JSON: one that is not UTF-8 at the store cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _is_notebook(path: str, kind: str | None) -> bool:
    return kind == "notebook" or (kind is None and path.endswith(".ipynb"))


def _required(model: dict[str, Any], key: str, message: str) -> Any:
    if key not in model:
        raise HTTPError(400, message)
    return model[key]


def _model(path: str, found: WorkStat) -> dict[str, Any]:
    return {
        "name": path.rpartition("/")[2],
        "path": path,
        # The protocol does not tell when a file was made.
        "created": found.modified,
        "last_modified": found.modified,
        "content": None,
        "format": None,
        "mimetype": None,
        "size": found.size,
        "writable": found.writable,
        "hash": None,
        "hash_algorithm": None,
    }
