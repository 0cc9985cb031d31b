"""The program that decodes and packs, without any right but to write into a folder of its own.

Started by :class:`kakehashi.store.intake.packer.Packer` alone. The folder it is started for has
``in``, which it may read, and ``out``, which is its own.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kakehashi.errors import PackError, StoreError
from kakehashi.store.dicom import read_instance, tolerant
from kakehashi.store.intake.child import serve
from kakehashi.store.pack import REPEATED, pack_instances
from kakehashi.store.repack import packed_instances

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.store.dicom import Instance
    from kakehashi.store.intake.channel import Message

# Threads of the pools, of zarr, and of the codecs.
_THREADS = 64 + 4 * (os.cpu_count() or 1)


def prepare(_first: dict[str, Any]) -> Callable[[Message], tuple[dict[str, Any], bytes]]:
    """Return what packs the files of ``in``, and says what is known from the pixels alone."""

    def answer(message: Message) -> tuple[dict[str, Any], bytes]:
        try:
            return _packed(message.facts["files"], old=message.facts["old"]), b""
        except MemoryError:
            raise
        except (PackError, StoreError) as error:
            return {"refused": str(error)}, b""
        except Exception as error:
            # What came from outside may break a decoder in any way.
            return {"refused": f"cannot be packed: {type(error).__name__}"}, b""

    return answer


def _packed(files: int, *, old: bool) -> dict[str, Any]:
    with ExitStack() as stack:
        instances: list[Instance] = []
        if old:
            instances += stack.enter_context(packed_instances(Path("in/old.ozx")))
        instances += [read_instance(Path(f"in/{number}.dcm")) for number in range(files)]
        info = pack_instances(instances, Path("out/pack.ozx"))
    return {"repeated": REPEATED in info.facts.flags}


if __name__ == "__main__":
    with tolerant():
        serve(prepare, read=["."], write=["out"], threads=_THREADS)
