"""A person's browser: what its profile keeps of a session, and pages that it does keep.

The search of hosts looks at what a site leaves; this one at what the person's own machine does.
Its control is a page of this program's own, which lets itself be kept in every place that a
browser has for that: where the pattern of that page is not found, the search is blind.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import struct
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from kakehashi.errors import KakehashiError
from kakehashi.verify.pattern import Pattern
from kakehashi.verify.search import Needles, Search

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

ENTRY = struct.Struct("<QIII4x")
"""Head of an entry of Chromium's cache: magic, version, length of the key, its hash."""
PERSON_S = 900.0
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - looked into, not written to
ENTRY_MAGIC = 0xFCFB6D1BA7725C30
STATIC = re.compile(
    r"/hub/(static|logo|kakehashi/static)(/|$)|/user/[^/]+/(static|lab/extensions)/"
)
"""What a portal serves that is the same for everybody, below its address."""

_PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>Kakehashi: control</title>
<h1>Control of the browser's search</h1>
<p id="state">This page fills the browser's stores.</p>
<ol><li><a href="{address}">Open the canary's notebook</a> and log in as {person} where asked.
<li>Run all cells (menu Run), and scroll through the slices that appear.
<li>Save the notebook (Ctrl+S). Leave the browser open until the program says so.</ol>
<script src="control.js"></script>"""

_SCRIPT = """const text = "{storage}";
localStorage.setItem("control", text);
sessionStorage.setItem("control", text);
const opening = indexedDB.open("control", 1);
opening.onupgradeneeded = () => opening.result.createObjectStore("control");
opening.onsuccess = () => {{
  const writing = opening.result.transaction("control", "readwrite");
  writing.objectStore("control").put(text, "control");
  writing.oncomplete = async () => {{
    for (const kept of ["plain", "packed"]) await (await fetch(kept)).text();
    document.getElementById("state").textContent = "The browser's stores hold the control.";
  }};
}};
"""


class BrowserError(KakehashiError):
    """The browser was not used as the search needs it."""


class Browser(Protocol):
    """A browser that a person, or a program in a person's place, uses.

    Attributes
    ----------
    folders : sequence of Path
        Its profile first; then wherever else it might write.
    """

    @property
    def folders(self) -> Sequence[Path]:
        """Return what is searched."""

    def visiting(self, control: str, worked: Callable[[], bool]) -> AbstractContextManager[None]:
        """Open the control page, follow it to the notebook, do what it says; close at the end.

        Parameters
        ----------
        control : str
            Address of the control page, whose only link is the notebook's.
        worked : callable
            Whether the notebook was saved after its cells had run.
        """


@dataclass(frozen=True)
class PersonsBrowser:
    """A browser that somebody uses by hand on this machine.

    Attributes
    ----------
    profile : Path
        The folder of its profile.
    """

    profile: Path

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the profile, and where a browser puts what it needs for a while."""
        return (self.profile, *(Path(name) for name in TEMPORARY))

    @contextmanager
    def visiting(self, control: str, worked: Callable[[], bool]) -> Iterator[None]:
        """Ask for what only a person can do, and wait until it was done.

        Raises
        ------
        BrowserError
            It was not done in time.
        """
        _say(f"open {control} in the browser with the profile {self.profile}, and do what it says")
        _wait(worked, "the notebook was not run and saved")
        yield
        _say("now close that browser, with all its windows")
        _wait(lambda: not in_use(self.profile), f"a program still uses {self.profile}")


def in_use(folder: Path) -> bool:
    """Tell whether a process has a file below a folder open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(link)).is_relative_to(folder):  # noqa: PTH115 - a magic link
                return True
    return False


def _wait(condition: Callable[[], bool], failing: str) -> None:
    deadline = time.monotonic() + PERSON_S
    while not condition():
        if time.monotonic() > deadline:
            raise BrowserError(f"{failing} within {PERSON_S / 60:.0f} minutes")
        time.sleep(1)  # the pause of a poll with a deadline


def _say(words: str) -> None:
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


@dataclass
class Control:
    """Pages that a browser may keep, each with a pattern of its own."""

    patterns: Mapping[str, Pattern] = field(
        default_factory=lambda: {
            "cache": Pattern.new(), "cache, packed": Pattern.new(), "storage": Pattern.new()
        }
    )  # fmt: skip

    @contextmanager
    def serving(self, address: str, person: str) -> Iterator[str]:
        """Serve the pages to this machine's own browsers; gives the first one's address."""
        text = {name: one.plain.hex() for name, one in self.patterns.items()}
        pages = {
            "/": ("text/html", "no-store", _PAGE.format(address=address, person=person)),
            "/control.js": ("text/javascript", "no-store", _SCRIPT.format(storage=text["storage"])),
            "/plain": ("text/plain", "max-age=3600", text["cache"]),
            "/packed": ("text/plain", "max-age=3600", text["cache, packed"] * 8),
        }
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Pages, pages)) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/"
            finally:
                server.shutdown()


class _Pages(BaseHTTPRequestHandler):
    def __init__(self, pages: Mapping[str, tuple[str, str, str]], *rest: Any) -> None:
        self._pages = pages
        super().__init__(*rest)

    def do_GET(self) -> None:
        """Answer a page."""
        if self.path not in self._pages:
            self.send_error(404)
            return
        kind, keep, text = self._pages[self.path]
        body = text.encode()
        self.send_response(200)
        if self.path == "/packed":
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", keep)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: standard error is for the run's progress."""


def search(
    folders: Sequence[Path], since_ns: int, pattern: Pattern, control: Control, portal: str
) -> dict[str, Any]:
    """Search a profile that no browser uses any more.

    Returns
    -------
    dict
        As a host's search answers, with what the cache keeps of the portal beside its static files
        among the findings; ``control`` says how often each control was found.
    """
    answer = _walk(folders, since_ns, pattern)
    answer["findings"] += [
        {"place": "cache", "path": path, "encoding": "an answer that is no static file"}
        for path in sorted(answers_kept(folders[0], portal))
        if not STATIC.match(path)
    ]
    answer["control"] = {
        name: len(_walk(folders, since_ns, one)["findings"])
        for name, one in control.patterns.items()
    }
    return answer


def _walk(folders: Sequence[Path], since_ns: int, pattern: Pattern) -> dict[str, Any]:
    looking = Search(Needles(pattern.needles()), since_ns, frozenset())
    return looking.folders([str(folder) for folder in folders])


def answers_kept(profile: Path, portal: str) -> set[str]:
    """Return the paths, below a portal's address, of all answers in a Chromium's caches.

    An answer may be packed in a way that the search cannot unpack; its address is not.
    """
    base = urlsplit(portal)
    address = re.escape(f"{base.scheme}://{base.netloc}").encode()
    below = re.compile(address + rb"(" + re.escape(base.path).encode() + rb"/[^\s?#]*)")
    kept: set[str] = set()
    for path in profile.rglob("*_0"):
        if path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as stream:
            head = stream.read(ENTRY.size)
            if len(head) < ENTRY.size:
                continue
            magic, _version, length, _hash = ENTRY.unpack(head)
            if magic == ENTRY_MAGIC:
                # The last address is what was asked for; sites of the page stand before it.
                found = below.findall(stream.read(length))
                kept |= {one.decode(errors="replace")[len(base.path) :] for one in found[-1:]}
    return kept
