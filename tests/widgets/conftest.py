from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from playwright.sync_api import Browser

from kakehashi.imaging.ozip import FileReader, Pack, open_pack
from tests.lab.browser import chromium
from tests.link.stores import Broker, work_server
from tests.widgets.browser import Notebook, opened
from tests.widgets.lab import Lab, jupyterlab
from tests.widgets.session import SessionFolder, StoreFolder


@dataclass
class Shore:
    """The store's side, and the session that may read it."""

    store: StoreFolder
    session: SessionFolder
    broker: Broker
    ct: str
    mr: str
    pet: str
    tilted: str
    spare: str

    def pack(self, uid: str) -> Pack:
        """The pack as it lies at the store, read without the link."""
        return open_pack(FileReader(self.store.root / "series" / f"{uid}.ozx"))


@pytest.fixture(scope="session")
def shore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shore]:
    if os.geteuid() != 0:
        pytest.skip("a session's private /run needs root")
    root = tmp_path_factory.mktemp("shore")
    store = StoreFolder(root / "view")
    made = {
        "ct": store.add("ct_chest"),
        "mr": store.add("sts/MR_T1/image"),
        "pet": store.add("sts/PET/image"),
        "tilted": store.add("ct_tilted/axial"),
        "spare": store.add("sts/CT/image"),
    }
    session = SessionFolder(root / "run", root / "work")
    session.write(store, store.publish())
    broker = Broker(session.root / "store.sock")
    work = Broker(session.root / "work.sock", work_server(session.work))
    yield Shore(store, session, broker, **made)
    work.close()
    broker.close()


@pytest.fixture(scope="session")
def lab(shore: Shore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with jupyterlab(shore.session, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def notebook(
    browser: Browser, lab: Lab, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Notebook]]:
    """Opens and runs notebooks of these cells, behind the module's ``FIRST_CELL``."""
    name = re.sub(r"\W", "-", request.node.name)
    with ExitStack() as stack:
        made: list[Notebook] = []

        def open_notebook(*cells: str, theme: str = "", **context: Any) -> Notebook:
            every = [request.module.FIRST_CELL, *cells]
            one = stack.enter_context(opened(browser, lab, name, every, **context))
            made.append(one)
            if theme:
                one.page.evaluate(
                    "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", theme
                )
            one.run_all()
            return one

        yield open_notebook
        for one in made:
            if shots := os.environ.get("KAKEHASHI_SHOTS"):
                one.page.screenshot(path=f"{shots}/{name}.png")
            assert not one.outside, "requests left the server's origin"
            assert not one.errors, "errors in the page"
