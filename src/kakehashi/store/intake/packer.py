"""Packs of series, made by a child: looked at, copied and hashed here before they count."""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import os
import shutil
import stat
from typing import TYPE_CHECKING, Any

from kakehashi.errors import PackError, StoreError
from kakehashi.imaging.ozip import PREAMBLE_MEMBER, FileReader, ZipStore, open_pack
from kakehashi.store.authority.accounts import find_account
from kakehashi.store.catalogue import SeriesFacts
from kakehashi.store.intake.child import Child, Ended
from kakehashi.store.intake.parser import plain
from kakehashi.store.layout import PART, block_hashes, blocks_path, replacing
from kakehashi.store.pack import PackInfo
from kakehashi.store.repack import PackedInstance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kakehashi.store.dicom import Instance

MEMORY = (2 << 30) + (os.cpu_count() or 1) * (32 << 20)
"""Bytes that a series of no size may take while it is packed; each thread has a stack."""

COPIES = 4
"""How often a series' files may lie in memory besides."""

SECONDS = 600.0
"""How long a series of no size may take; each megabyte gives one more."""

FOLDER = ".packing"
"""Folder below staging in which one series at a time is packed."""

_LONGEST_TEXT = 4096
_MOST_FLAGS = 64
_ZSTD = b"\x28\xb5\x2f\xfd"


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
        olds = [one for one in instances if isinstance(one, PackedInstance)]
        try:
            said = self._child.ask(
                {"files": len(instances) - len(olds), "old": bool(olds)},
                memory=MEMORY + COPIES * size,
                seconds=SECONDS + size / 1e6,
            ).facts
        except Ended as ended:
            raise PackError(f"cannot be packed: {ended}") from ended
        if isinstance(reason := said.get("refused"), str):
            raise PackError(plain(reason))
        try:
            facts = _facts(said.get("facts"))
        except ValueError as error:
            self._child.end()
            raise PackError(f"cannot be packed: what is said of it is no {error}") from error
        hashes = {one.sop: one.sha256 for one in instances}
        own = instances[0].dataset
        if (facts.series_uid, facts.study_uid, facts.patient_id) != tuple(
            str(own.get(name, ""))
            for name in ("SeriesInstanceUID", "StudyInstanceUID", "PatientID")
        ):
            self._child.end()
            raise PackError("cannot be packed: what is said of it is of another series")
        headers = sum(len(one.header) + 1024 for one in instances)
        return self._taken(out, facts, hashes, headers)

    def _lay_out(self, instances: Sequence[Instance]) -> int:
        """Put copies of the files where the child may read them; return their bytes."""
        group = -1
        owner = -1
        if self._account is not None and os.geteuid() == 0:
            entry = find_account(self._account)
            owner, group = entry.pw_uid, entry.pw_gid
        self._folder.mkdir(mode=0o750, exist_ok=True)
        os.chown(self._folder, -1, group)
        self.clear()
        into, result = self._folder / "in", self._folder / "out"
        for folder, whose in ((into, -1), (result, owner)):
            folder.mkdir(mode=0o750, exist_ok=True)
            os.chown(folder, whose, group)
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

    def _taken(
        self, out: Path, facts: SeriesFacts, hashes: dict[str, str], headers: int
    ) -> PackInfo:
        """Copy a pack to its place: the child may still have its own open, and change it."""
        try:
            descriptor = os.open(
                self._folder / "out" / "pack.ozx",
                os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
            )
        except OSError as error:
            raise PackError("cannot be packed: there is no pack") from error
        with os.fdopen(descriptor, "rb") as made:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PackError("cannot be packed: its pack is no ordinary file")
            with replacing(out) as file:
                shutil.copyfileobj(made, file, 1 << 20)
                file.flush()
                part = out.with_name(out.name + PART)
                try:
                    sources = _looked_at(part, facts.series_uid, hashes, headers)
                except (StoreError, ValueError, KeyError, TypeError) as error:
                    self._child.end()
                    raise PackError(f"cannot be packed: its pack is none ({error})") from error
                blocks = block_hashes(part)
                # The hashes come first under their final name, as in any pack.
                with replacing(blocks_path(out)) as beside:
                    beside.write(blocks)
                size = file.tell()
        return PackInfo(facts, size, hashlib.sha256(blocks).hexdigest(), sources)


def clear(folder: Path) -> None:
    """Empty the folder of packing; it stays, as a child may be at home in it."""
    for inside in (folder / "in", folder / "out"):
        if inside.is_dir():
            for path in inside.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _looked_at(part: Path, series: str, hashes: dict[str, str], headers: int) -> dict[str, str]:
    """Check that a pack is one, and is of what went into it; return its sources."""
    with FileReader(part) as reader:
        _check_announced(ZipStore(reader).member(PREAMBLE_MEMBER), 2 * headers + (1 << 20))
        pack = open_pack(reader)
        if pack.meta["series"] != series:
            raise StoreError("it is of another series")
        sources = {entry["sop"]: entry["sha256"] for entry, _ in pack.original_headers()}
        # All of them: what is staged is removed once its pack is in the catalogue.
        if sources != hashes or set(pack.instances) != set(hashes):
            raise StoreError("it is not of the files that were packed")
    return sources


def _check_announced(blob: bytes, most: int) -> None:
    """Refuse what would be much larger than what went into it (RFC 8878, frame header)."""
    if blob[:4] != _ZSTD or len(blob) < 18:
        raise StoreError("its headers are not compressed as they should be")
    descriptor = blob[4]
    flag, single, dictionary = descriptor >> 6, descriptor >> 5 & 1, descriptor & 3
    start = 5 + (not single) + (0, 1, 2, 4)[dictionary]
    length = (1 if single else 0, 2, 4, 8)[flag]
    size = int.from_bytes(blob[start : start + length], "little") + (256 if length == 2 else 0)
    if length == 0 or size > most:
        raise StoreError("its headers are larger than those that were packed")


def _facts(said: object) -> SeriesFacts:
    if not isinstance(said, dict) or said.keys() != set(SeriesFacts.__slots__):
        raise ValueError("description")
    found = {name: _value(name, said[name]) for name in SeriesFacts.__slots__}
    return SeriesFacts(**found)


def _value(name: str, value: Any) -> Any:
    kind, _, may_lack = str(SeriesFacts.__annotations__[name]).partition(" | ")
    if value is None and may_lack:
        return None
    return _CHECKS[kind](name, value)


def _date(name: str, value: Any) -> dt.date:
    return dt.date.fromisoformat(_text(name, value))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _MOST_FLAGS:
        raise ValueError(name)
    return tuple(_text(name, one) for one in value)


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(name)  # noqa: TRY004 - one kind of error, whatever is wrong
    return value


def _int(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(name)
    return value


def _float(name: str, value: Any) -> float:
    if type(value) not in {int, float} or not math.isfinite(value):
        raise ValueError(name)
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or "\0" in value:
        raise ValueError(name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(name) from None
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "str": _text,
    "dt.date": _date,
    "tuple[str, ...]": _texts,
    "bool": _bool,
    "int": _int,
    "float": _float,
}
