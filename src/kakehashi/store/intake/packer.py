"""Packs of series, made by a child: looked at, copied and hashed here before they count."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from dataclasses import fields
from typing import TYPE_CHECKING

from kakehashi.errors import PackError, StoreError
from kakehashi.store.authority.accounts import find_account
from kakehashi.store.dicom import Instance
from kakehashi.store.intake.child import Child, Ended
from kakehashi.store.intake.look import look_at, most_bytes
from kakehashi.store.intake.parser import plain
from kakehashi.store.layout import PART, block_hashes, blocks_path, replacing
from kakehashi.store.pack import described
from kakehashi.store.repack import PackedInstance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kakehashi.store.pack import Described, PackInfo

MEMORY = (2 << 30) + (os.cpu_count() or 1) * (32 << 20)
"""Bytes that a series of no size may take while it is packed; each thread has a stack."""

COPIES = 4
"""How often a series' files may lie in memory besides."""

SECONDS = 600.0
"""How long a series of no size may take; each megabyte gives one more."""

FOLDER = ".packing"
"""Folder below staging in which one series at a time is packed."""


class Packer:
    """Packs series in a child that has no rights.

    Called as :func:`kakehashi.store.pack.pack_instances` is.

    Parameters
    ----------
    root : Path
        ``store.root``.
    account : str or None
        Who the child is; see :func:`kakehashi.store.confine.confine`.
    """

    def __init__(self, root: Path, account: str | None) -> None:
        self._folder = root / "staging" / FOLDER
        self._account = account
        first = {"folder": str(self._folder)}
        self._child = Child("packing", "kakehashi.store.intake.pack", account, first)

    def close(self) -> None:
        """End the child."""
        self._child.end()

    def __call__(
        self,
        instances: Sequence[Instance],
        out: Path,
        *,
        on_slice: Callable[[int, int], None] | None = None,
    ) -> PackInfo:
        """Pack instances; what is said of slices is said at the end.

        Raises
        ------
        PackError
            They cannot be packed, or the child ended over them.
        StoreError
            The child does not start.
        """
        if not instances:
            raise PackError("no images")
        try:
            info = self._packed(instances, out)
        finally:
            self.clear()
        if on_slice is not None:
            on_slice(info.facts.slices, info.facts.slices)
        return info

    def clear(self) -> None:
        """Leave nothing of a series that was being packed."""
        clear(self._folder)

    def _packed(self, instances: Sequence[Instance], out: Path) -> PackInfo:
        size = self._lay_out(instances)
        try:
            known = described([_bare(one) for one in instances])
        except PackError:
            # The child may say more of the reason, as it may look at pixels.
            known = None
        most = 0 if known is None else most_bytes(known, size)
        olds = any(isinstance(one, PackedInstance) for one in instances)
        news = sum(not isinstance(one, PackedInstance) for one in instances)
        try:
            said = self._child.ask(
                {"files": news, "old": olds},
                memory=MEMORY + COPIES * size,
                seconds=SECONDS + size / 1e6,
                largest=most,
            ).facts
        except Ended as ended:
            raise PackError(f"cannot be packed: {ended}") from ended
        finally:
            # Who was taken over by one series is not there for the next, nor to change its pack.
            self._child.end()
        if isinstance(reason := said.get("refused"), str):
            raise PackError(plain(reason))
        repeated = said.get("repeated")
        if known is None or not isinstance(repeated, bool):
            raise PackError("cannot be packed: what is said of it makes no sense")
        return self._taken(out, known, most, repeated=repeated)

    def _lay_out(self, instances: Sequence[Instance]) -> int:
        """Put copies of the files where the child may read them; return their bytes."""
        group = -1
        owner = -1
        if self._account is not None and os.geteuid() == 0:
            entry = find_account(self._account)
            owner, group = entry.pw_uid, entry.pw_gid
        _make(self._folder, -1, group)
        self.clear()
        into, result = self._folder / "in", self._folder / "out"
        for folder, whose in ((into, -1), (result, owner)):
            _make(folder, whose, group)
        size = number = 0
        for one in instances:
            if isinstance(one, PackedInstance):
                target = into / "old.ozx"
                if target.exists():
                    continue
            else:
                target = into / f"{number}.dcm"
                number += 1
            shutil.copyfile(one.path, target)
            target.chmod(0o640)
            os.chown(target, -1, group)
            size += target.stat().st_size
        return size

    def _taken(self, out: Path, known: Described, most: int, *, repeated: bool) -> PackInfo:
        """Copy a pack to its place, and look at the copy."""
        try:
            descriptor = os.open(
                self._folder / "out" / "pack.ozx",
                os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
            )
        except OSError as error:
            raise PackError("cannot be packed: there is no pack") from error
        with os.fdopen(descriptor, "rb") as made:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise PackError("cannot be packed: its pack is no ordinary file")
            if found.st_size > most:
                raise PackError("cannot be packed: its pack is larger than it can be")
            with replacing(out) as file:
                left = found.st_size
                while left and (piece := made.read(min(left, 1 << 20))):
                    left -= file.write(piece)
                file.flush()
                part = out.with_name(out.name + PART)
                try:
                    look_at(part, known)
                except (StoreError, ValueError) as error:
                    raise PackError(f"cannot be packed: its pack is none ({error})") from error
                blocks = block_hashes(part)
                # The hashes come first under their final name, as in any pack.
                with replacing(blocks_path(out)) as beside:
                    beside.write(blocks)
                size = file.tell()
        return known.information(size, hashlib.sha256(blocks).hexdigest(), repeated=repeated)


def _make(folder: Path, owner: int, group: int) -> None:
    folder.mkdir(exist_ok=True)
    # Not when it is made: the mask would take the group's rights away.
    folder.chmod(0o750)
    os.chown(folder, owner, group)


def _bare(one: Instance) -> Instance:
    """Return an instance that decodes nothing."""
    return Instance(**{field.name: getattr(one, field.name) for field in fields(Instance)})


def clear(folder: Path) -> None:
    """Empty the folder of packing; it stays, as a child may be at home in it."""
    for inside in (folder / "in", folder / "out"):
        if inside.is_dir():
            for path in inside.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
