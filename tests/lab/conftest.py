"""The lab, brought up once for all its tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser

from tests.lab import lab as real_lab
from tests.lab.browser import chromium
from tests.lab.client import Client
from tests.lab.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Give the running lab; one that ran before stays up."""
    if os.geteuid() != 0:
        pytest.skip("the lab makes namespaces and accounts: it needs root")
    was_running = real_lab.status() is not None
    running = real_lab.up()
    try:
        yield running
    finally:
        if not was_running:
            real_lab.down()


# Not for the whole session: Playwright's loop stays in the thread as long as it is open, and
# tests of other modules run loops of their own there.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Give a headless Chromium."""
    with chromium() as running:
        yield running


@pytest.fixture
def person(lab: Lab) -> Iterator[Callable[[str], Client]]:
    """Give people over HTTP; their sessions are stopped after the test."""
    clients: list[Client] = []

    def log_in(name: str) -> Client:
        client = Client(lab.url, name, str(lab.ca_file))
        client.log_in()
        clients.append(client)
        return client

    yield log_in
    for client in clients:
        if client.server() is not None:
            client.stop()
