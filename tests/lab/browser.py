"""A person in front of a real browser: log-in, spawn page, JupyterLab, stop, log-out.

Each step waits for what a person would wait for. A request to any address that is not the
portal's or the identity provider's is refused and remembered: the platform has no internet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.lab.hosts import wait_for
from tests.lab.people import PEOPLE

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE 10.77.1.*",
)
START_SECONDS = 120
# What a person reads there: numbers with their words, and which list a reason stands in.
ARRIVALS = """() => {
  const number = (text) => (text ? Number(text.replace(/\\D/g, '')) : null);
  const found = {};
  for (const row of document.querySelectorAll('#arrivals-days tbody tr')) {
    const cell = (name) => row.querySelector(`td.sum ${name}`)?.textContent;
    const [received, expected] = [number(cell('.arrival-came')) ?? 0, number(cell('.arrival-of'))];
    const said = cell('.arrival-said') ?? '';
    const missing = /\\d/.test(said) ? number(said) : said ? expected : 0;
    found[row.querySelector('th').textContent.trim()] =
      {received, expected, missing, stopped: 0, held: 0};
  }
  for (const list of ['stopped', 'held'])
    for (const row of document.querySelectorAll(`#arrivals-${list} tbody tr`))
      found[row.cells[0].textContent.trim()][list] += number(row.cells[2].textContent);
  return found;
}"""
PROVIDER, PROVIDER_PORT = "10.77.1.30", 9400


@contextmanager
def chromium() -> Iterator[Browser]:
    """Give a headless Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visitor:
    """One person with a browser profile of their own."""

    page: Page
    url: str
    name: str
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    shots: Path | None = None

    @property
    def _me(self) -> str:
        return f"{self.url}/user/{self.name}/"

    def shot(self, name: str, *, full_page: bool = False) -> None:
        """Take a screenshot, where one was asked for."""
        if self.shots is not None:
            self.page.screenshot(path=self.shots / f"{name}.png", full_page=full_page)

    def log_in(self) -> None:
        """Log in at the identity provider; ends in the portal or a running session."""
        password = next(person.password for person in PEOPLE if person.name == self.name)
        self.page.goto(f"{self.url}/hub/login")
        self.shot("login")
        self.page.click("#login")
        self.page.fill("input[name=login]", self.name)
        self.page.fill("input[name=password]", password)
        self.shot("provider")
        self.page.click("button")
        self.page.wait_for_url(re.compile(re.escape(self.url) + "/(hub|user)/"))

    def spawn(
        self, *, project: str, site: str, queue: str, gpus: int = 0, hours: float = 1
    ) -> None:
        """Fill in the spawn page and wait for JupyterLab."""
        self.request_session(project=project, site=site, queue=queue, gpus=gpus, hours=hours)
        self.page.wait_for_url(re.compile(re.escape(self._me)), timeout=START_SECONDS * 1000)

    def request_session(
        self, *, project: str, site: str, queue: str, gpus: int, hours: float
    ) -> None:
        """Fill in the spawn page and press the button."""
        self.page.goto(f"{self.url}/hub/spawn")
        self.page.check(f"input[name=project][value='{project}']", force=True)
        self.page.check(f"input[name=site][value='{site}']", force=True)
        self.page.check(f"input[name=queue][value='{queue}']:not([disabled])", force=True)
        # A queue without GPUs shows the field, but does not let it be changed.
        if self.page.locator("#gpus:not([readonly])").count():
            self.page.fill("#gpus", str(gpus))
        self.page.fill("#hours", f"{hours:g}")
        self.shot("spawn")
        self.page.click("#submit")
        self.page.wait_for_url(re.compile("spawn-pending|/user/"))
        self.shot("pending")

    def open_notebook(self, path: str) -> None:
        """Open a notebook in JupyterLab and wait until its kernel can be used."""
        self.page.goto(f"{self._me}lab/tree/{path}?reset")
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        self.page.locator(".jp-StatusBar-TextItem", has_text="| Idle").wait_for(timeout=60_000)

    def run_all(self) -> None:
        """Run every cell by JupyterLab's menu and wait until the last has ended."""
        self.page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        self.page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        self.page.wait_for_function(
            """() => {
              const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
                .map((prompt) => prompt.textContent);
              return prompts.length > 0 && prompts.every((text) => /\\[\\d+\\]/.test(text));
            }""",
            timeout=120_000,
        )

    def cell_errors(self) -> list[str]:
        """Return the tracebacks that the notebook shows."""
        locator = self.page.locator(".jp-OutputArea-output[data-mime-type*=stderr], "
                                    ".jp-OutputArea-output .jp-RenderedText[data-mime-type="
                                    "'application/vnd.jupyter.error']")  # fmt: skip
        return [text for text in locator.all_inner_texts() if "Error" in text]

    def canvas(self, selector: str) -> tuple[int, int, list[int]]:
        """Return width, height and the red channel of a canvas, row by row."""
        answer = self.page.evaluate(
            """(selector) => {
              const canvas = document.querySelector(selector);
              const {width, height} = canvas;
              const pixels = canvas.getContext('2d').getImageData(0, 0, width, height).data;
              const red = [];
              for (let i = 0; i < pixels.length; i += 4) red.push(pixels[i]);
              return JSON.stringify([width, height, red]);
            }""",
            selector,
        )
        width, height, red = json.loads(answer)
        return width, height, red

    def save(self) -> None:
        """Save the notebook by JupyterLab's menu."""
        self.page.click(".lm-MenuBar-itemLabel:text-is('File')")
        self.page.click(".lm-Menu-itemLabel:text-is('Save Notebook')")

    def look_through(self) -> None:
        """Look at several slices in the notebook's viewer."""
        viewer = self.page.locator(".kkh-viewer").first
        viewer.scroll_into_view_if_needed()
        for key in ("Home", "ArrowUp", "ArrowUp", "ArrowDown"):
            self.page.wait_for_selector(".kkh-viewer[data-state=ready]")
            self.page.locator(".kkh-viewer .kkh-stage").first.focus()
            self.page.keyboard.press(key)
        self.page.wait_for_selector(".kkh-viewer[data-state=ready]")

    def arrivals(self) -> dict[str, dict[str, int | None]]:
        """Open the operators' page and return each hospital's figures as they stand there."""
        self.page.goto(f"{self.url}/hub/kakehashi/arrivals")
        self.page.wait_for_selector("#arrivals-days")
        return dict(self.page.evaluate(ARRIVALS))

    def stop(self) -> None:
        """Stop the session from the home page and wait until it has ended."""
        self.page.goto(f"{self.url}/hub/home")
        self.shot("home")
        self.page.click("#stop")
        self.page.click("#stop-yes")
        self.page.wait_for_selector(".card.state.idle", timeout=60_000)
        self.shot("home-after")

    def log_out(self) -> None:
        """Log out of the portal and of the identity provider."""
        self.page.goto(f"{self.url}/hub/home")
        self.page.click("#logout")
        # The provider asks whether to end its own log-in too.
        self.page.click("button[name=logout]")
        self.page.wait_for_url(re.compile(re.escape(f"{self.url}/hub/")))
        self.shot("logout")


@contextmanager
def visitor(
    browser: Browser,
    url: str,
    name: str,
    *,
    language: str = "en",
    shots: Path | None = None,
    allowed: Sequence[str] = (),
) -> Iterator[Visitor]:
    """Give a person with a browser profile of their own."""
    context = browser.new_context(
        viewport={"width": 1360, "height": 900}, locale=language, ignore_https_errors=True
    )
    try:
        yield _watched(context, url, name, shots, allowed)
    finally:
        context.close()


def _watched(
    context: BrowserContext, url: str, name: str, shots: Path | None, allowed: Sequence[str]
) -> Visitor:
    hosts = {urlsplit(url).hostname, *allowed}
    person = Visitor(context.new_page(), url, name, shots=shots)

    def watch(request_url: str) -> None:
        parts = urlsplit(request_url)
        if parts.scheme in {"http", "https", "ws", "wss"} and parts.hostname not in hosts:
            person.outside.append(request_url)

    context.on("request", lambda request: watch(request.url))
    person.page.on("pageerror", lambda error: person.errors.append(str(error)))
    person.page.on("console", lambda message: person.console.append(message.text))
    return person


def _fingerprint(server: tuple[str, int]) -> str:
    pem = ssl.get_server_certificate(server)
    key = x509.load_pem_x509_certificate(pem.encode()).public_key()
    digest = hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return base64.b64encode(digest.digest()).decode()


@dataclass(frozen=True)
class OwnBrowser:
    """A browser with a profile on the disk, as people have them, and the canary in front of it.

    Attributes
    ----------
    url : str
        The portal's address.
    name : str
        The person.
    home : Path
        An empty folder: the browser's home, with its profile and its temporary files.
    shots : Path or None
    """

    url: str
    name: str
    home: Path
    shots: Path | None = None
    seen: list[Visitor] = field(default_factory=list)

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.home / "profile", self.home, Path("/dev/shm"))

    @cached_property
    def _trust(self) -> str:
        """The flag that makes the servers' certificates good ones: else nothing is ever kept."""
        parts = urlsplit(self.url)
        servers = [(parts.hostname or "", parts.port or 443), (PROVIDER, PROVIDER_PORT)]
        keys = ",".join(_fingerprint(server) for server in servers)
        return f"--ignore-certificate-errors-spki-list={keys}"

    @contextmanager
    def open(self) -> Iterator[Visitor]:
        """Open the browser; its profile stays when it is closed."""
        profile, temporary = self.home / "profile", self.home / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        with sync_playwright() as playwright:
            context = playwright.chromium.launch_persistent_context(
                profile,
                executable_path="/usr/bin/chromium",
                args=[*FLAGS, self._trust],
                env={"PATH": os.defpath, "HOME": str(self.home), "TMPDIR": str(temporary)},
                viewport={"width": 1360, "height": 900},
            )
            try:
                yield _watched(context, self.url, self.name, self.shots, [PROVIDER, "127.0.0.1"])
            finally:
                context.close()

    @contextmanager
    def visiting(self, control: str, worked: Callable[[], bool]) -> Iterator[None]:
        with self.open() as person:
            self.seen.append(person)
            person.page.goto(control)
            person.page.locator("#state", has_text="hold the control").wait_for()
            person.log_in()
            person.open_notebook(f"{person.name}/canary.ipynb")
            person.run_all()
            person.look_through()
            person.save()
            wait_for("the notebook as it was run", worked)
            person.shot("notebook")
            yield
