"""Programs that share memory and semaphores, run by test_shm.py as a payload's programs are.

``python sharing.py PROGRAM [WORD]`` runs one of the functions below and prints what it returns
as JSON. It runs as another account, where nothing of the tests can be imported.
"""

from __future__ import annotations

import _multiprocessing  # type: ignore[import-not-found]
import contextlib
import ctypes
import errno
import fcntl
import importlib
import json
import multiprocessing as mp
import os
import signal
import stat
import sys
import threading
from multiprocessing import managers, resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

TURNS = 200
RECURSIVE_MUTEX = 0


def _context(method: str) -> Any:
    return mp.get_context(method)


def _bytes(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None
    return memory.buf


def _square(number: int) -> int:
    return number * number


def _put(queue: Any) -> None:
    queue.put(list(range(1000)))


def _count(lock: Any, values: Any) -> None:
    for _ in range(TURNS):
        with lock:
            values[0] += 1


def _write(name: str, text: bytes) -> None:
    memory = SharedMemory(name)
    _bytes(memory)[: len(text)] = text
    memory.close()


def _double(values: Any) -> None:
    values[:] = [2 * value for value in values]


def _run(process: Any) -> None:
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode


def queue(method: str) -> Any:
    context = _context(method)
    queue = context.Queue()
    process = context.Process(target=_put, args=(queue,))
    process.start()
    found = queue.get(timeout=30)
    process.join()
    return sum(found)


def pool(method: str) -> Any:
    with _context(method).Pool(2) as workers:
        return sum(workers.map(_square, range(100)))


def lock(method: str) -> Any:
    context = _context(method)
    lock, values = context.Lock(), context.RawArray("l", 1)
    processes = [context.Process(target=_count, args=(lock, values)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return values[0]


def memory(method: str) -> Any:
    memory = SharedMemory(create=True, size=1 << 20)
    try:
        _run(_context(method).Process(target=_write, args=(memory.name, b"seen")))
        return bytes(_bytes(memory)[:4]).decode()
    finally:
        memory.close()
        memory.unlink()


def array(method: str) -> Any:
    context = _context(method)
    values = context.RawArray("d", 1000)
    values[:] = [1.0] * 1000
    _run(context.Process(target=_double, args=(values,)))
    return sum(values)


def manager(method: str) -> Any:
    context = _context(method)
    with managers.SharedMemoryManager(ctx=context) as shared, context.Manager() as proxies:
        numbers = shared.ShareableList([0, 1, 2])
        rows = proxies.list([numbers[2]])
        _run(context.Process(target=_append, args=(rows, numbers.shm.name)))
        return list(rows)


def _append(rows: Any, name: str) -> None:
    memory = SharedMemory(name)
    rows.append(memory.size > 0)
    memory.close()


def torch_loader(strategy: str) -> Any:
    torch: Any = importlib.import_module("torch")
    data: Any = importlib.import_module("torch.utils.data")
    torch.multiprocessing.set_sharing_strategy(strategy)
    rows = torch.arange(64 * 256, dtype=torch.float32).reshape(64, 256)
    loader = data.DataLoader(data.TensorDataset(rows), batch_size=8, num_workers=2)
    shared = torch.zeros(1000).share_memory_()
    total = sum(float(batch[0].sum()) for batch in loader) + float(shared.sum())
    return total == float(rows.sum())


def leave(_: str) -> Any:
    """Leave one piece of shared memory and one semaphore behind, for the test to find."""
    memory = SharedMemory("left", create=True, size=100)
    resource_tracker.unregister("/left", "shared_memory")
    memory.close()
    _multiprocessing.SemLock(RECURSIVE_MUTEX, 1, 1, "/left", False)
    return True


def tracked(_: str) -> Any:
    """Die without a word: Python's resource tracker has to remove what was made."""
    SharedMemory("tracked", create=True, size=100)
    held = _context("spawn").Lock()
    print(len(list(Path(os.environ["KAKEHASHI_SHM"]).iterdir())), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return held


class C:
    """glibc's functions as a C program calls them; an error is its name."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None, use_errno=True)
        self.library.sem_open.restype = ctypes.c_void_p
        self.library.sem_close.argtypes = [ctypes.c_void_p]
        self.library.sem_post.argtypes = [ctypes.c_void_p]
        self.library.sem_getvalue.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]

    def call(self, name: str, *arguments: Any) -> Any:
        ctypes.set_errno(0)
        result = getattr(self.library, name)(*arguments)
        if result in {None, -1}:
            return errno.errorcode[ctypes.get_errno()]
        return result

    def shm_open(self, name: bytes, flags: int, mode: int = 0o600) -> Any:
        return self.call("shm_open", name, flags, mode)

    def sem_open(self, name: bytes, flags: int, mode: int = 0o600, value: int = 1) -> Any:
        made = (ctypes.c_uint(mode), ctypes.c_uint(value)) if flags & os.O_CREAT else ()
        return self.call("sem_open", name, flags, *made)

    def value(self, semaphore: int) -> int:
        value = ctypes.c_int(-1)
        self.library.sem_getvalue(semaphore, ctypes.byref(value))
        return value.value


def _made(result: Any) -> Any:
    """Return the error, or that there was none: addresses and descriptors differ."""
    return result if isinstance(result, str) else "made"


def answers(_: str) -> Any:
    """Return what the calls say to good and bad names, flags and modes."""
    c, found = C(), {}
    new, only_new = os.O_CREAT | os.O_RDWR, os.O_CREAT | os.O_EXCL | os.O_RDWR
    names = [b"", b"/", b"/a/b", b"/a/", b"//two", b"bare", b"/" + 250 * b"m"]
    names += [b"/" + 255 * b"n", "/ü".encode()]
    for name in names:
        found[f"{name.decode()} shm"] = [
            _made(c.shm_open(name, os.O_RDWR)),
            _made(c.shm_open(name, new)),
            _made(c.shm_open(name, only_new)),
            _made(c.shm_open(name, os.O_RDONLY)),
            c.call("shm_unlink", name),
            c.call("shm_unlink", name),
        ]
        found[f"{name.decode()} sem"] = [
            _made(c.sem_open(name, 0)),
            _made(c.sem_open(name, new)),
            _made(c.sem_open(name, only_new)),
            _made(c.sem_open(name, 0)),
            c.call("sem_unlink", name),
            c.call("sem_unlink", name),
        ]
    most = 2**31 - 1
    found["most"] = [c.value(c.sem_open(b"/most", new, 0o600, most))]
    found["too many"] = [c.sem_open(b"/many", new, 0o600, most + 1)]
    found["closed for its owner"] = [
        _made(c.sem_open(b"/closed", new, 0o000)),
        c.sem_open(b"/closed", 0),
        _made(c.shm_open(b"/closed", new, 0o000)),
        c.shm_open(b"/closed", os.O_RDWR),
    ]
    os.umask(0o027)
    status = os.fstat(c.shm_open(b"/masked", new, 0o666))
    found["masked"] = [stat.S_IMODE(status.st_mode), status.st_size]
    c.sem_open(b"/masked", new, 0o666)
    found["close on exec"] = [fcntl.fcntl(c.shm_open(b"/masked", os.O_RDWR), fcntl.F_GETFD)]
    return found


def uses(_: str) -> Any:
    """Return how semaphores opened several times behave in one process."""
    c, found = C(), {}
    first = c.sem_open(b"/one", os.O_CREAT, 0o600, 3)
    again = c.sem_open(b"/one", 0)
    found["same address"] = first == again
    found["first closed"] = c.call("sem_close", first)
    c.library.sem_post(again)
    found["still there"] = c.value(again)
    found["unlinked"] = c.call("sem_unlink", b"/one")
    found["no name"] = c.sem_open(b"/one", 0)
    other = c.sem_open(b"/one", os.O_CREAT | os.O_EXCL, 0o600, 7)
    found["another one"] = [other != again, c.value(other), c.value(again)]
    found["last closed"] = c.call("sem_close", again)
    found["closed too often"] = c.call("sem_close", again)
    return found


def tricks(folder: str) -> Any:
    """Return what names and files that lead elsewhere get."""
    c = C()
    outside = Path(folder, "tmp/outside")
    outside.write_bytes(bytes(32))
    shm = Path(folder, "shm")
    (shm / "link").symlink_to(outside)
    (shm / "sem.link").symlink_to(outside)
    (shm / "sem.dangling").symlink_to(outside.with_name("nothing"))
    (shm / "sem.short").write_bytes(b"short")
    os.mkfifo(shm / "sem.pipe")
    return {
        "link": c.shm_open(b"/link", os.O_RDWR),
        "link made": c.shm_open(b"/link", os.O_RDWR | os.O_CREAT),
        "semaphore": c.sem_open(b"/link", 0),
        "semaphore made": c.sem_open(b"/dangling", os.O_CREAT),
        "short": c.sem_open(b"/short", 0),
        "pipe": c.sem_open(b"/pipe", 0),
        "folder": c.shm_open(b"/..", os.O_RDONLY),
        "itself": c.shm_open(b".", os.O_RDONLY),
        "too long": c.shm_open(b"/" + 256 * b"n", os.O_RDWR | os.O_CREAT),
        "much too long": c.sem_open(b"/" + 5000 * b"n", os.O_CREAT),
        "room": os.statvfs("/dev/shm").f_bavail,
    }


def emptied(_: str) -> Any:
    """Return where things lie when the program empties its environment itself."""
    folder = Path(os.environ["KAKEHASHI_SHM"])
    for name in list(os.environ):
        del os.environ[name]
    made = SharedMemory("emptied", create=True, size=1)
    found = [path.name for path in folder.iterdir()]
    made.unlink()
    return found


def race(_: str) -> Any:
    """Return how processes end that make, look at and remove one semaphore all at once."""
    context = _context("fork")
    together = context.Barrier(4)
    processes = [context.Process(target=_make_and_remove, args=(together,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _make_and_remove(together: Any) -> None:
    c = C()
    together.wait()
    for _ in range(50 * TURNS):
        semaphore = c.sem_open(b"/raced", os.O_CREAT, 0o600, 7)
        assert not isinstance(semaphore, str), semaphore
        assert c.value(semaphore) == 7
        c.call("sem_close", semaphore)
        c.call("sem_unlink", b"/raced")


def forks(_: str) -> Any:
    """Return what children say that are forked while threads open and close semaphores."""
    c = C()
    done = threading.Event()

    def busy(name: bytes) -> None:
        while not done.is_set():
            c.call("sem_close", c.sem_open(name, os.O_CREAT))

    names = (b"/left-thread", b"/right-thread")
    threads = [threading.Thread(target=busy, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    end = 0
    for _turn in range(2 * TURNS):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(isinstance(c.sem_open(b"/child", os.O_CREAT), str))
        end = os.waitpid(child, 0)[1]
        if end != 0:
            break
    done.set()
    for thread in threads:
        thread.join()
    return end


if __name__ == "__main__":
    program, word = (*sys.argv[1:], "")[:2]
    answer = globals()[program](word)
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(answer))
