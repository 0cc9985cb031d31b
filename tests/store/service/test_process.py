"""The service as a process of its own, with the authority's book and keys."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from kakehashi.audit import Audit
from kakehashi.config import StoreHost, load
from kakehashi.store.authority.book import Book
from kakehashi.store.authority.layout import Layout as AuthorityLayout
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.facets import Index
from kakehashi.store.layout import Layout
from kakehashi.store.service import records
from kakehashi.store.service.tokens import Tokens, load_key

from .serving import series

SESSION = "ab" * 16


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def written(root, port: int | None, cohort: str = '{modality = ["CT"]}') -> str:
    return f"""
[store]
root = "{root}"
address = "store.example"
{f"catalogue_port = {port}" if port else ""}

[[projects]]
id = "ct"
title = "CT"
purpose = "test"
approval = "1"
expires = "2099-01-01"
groups = ["g"]
sites = ["s"]
tier = 3
cohort = {cohort}
"""


@pytest.fixture
def store(tmp_path):
    """A store as `store init` leaves it, as far as the service needs it."""
    root = tmp_path / "root"
    authority = AuthorityLayout(root)
    authority.keys.mkdir(parents=True)
    records.folder(root).mkdir()
    Book.create(authority.book).close()
    index = Index.create(Layout(root).facets)
    index.add_segment([series(40)])
    Catalogue.open(StoreHost(root=root, address="store.example")).close()
    return root


@contextlib.contextmanager
def started(path):
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "kakehashi.store.service"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(load(path).model_dump_json())
    process.stdin.close()
    process.stdin = None
    try:
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


def count(port: int, token: str) -> tuple[int, int]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/facets", b"{}", {"Authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body.get("count", -1)


def granted(root) -> Book:
    book = Book(AuthorityLayout(root).book)
    now = time.time()
    with book.transaction():
        book.add_session(
            SESSION,
            hub="hub",
            person="sato",
            groups=frozenset({"g"}),
            project="ct",
            site="s",
            kind="interactive",
            hours=1.0,
            created_at=now,
            ticket_sha256="0" * 64,
            ticket_expires_at=now + 60,
            ends_at=now + 3600,
            view_account="v",
            work_account="w",
        )
    return book


def test_it_serves_a_session_as_long_as_the_book_says_so(store, tmp_path):
    port = free_port()
    path = tmp_path / "kakehashi.toml"
    path.write_text(written(store, port))
    with started(path):
        key = load_key(AuthorityLayout(store).keys / "catalogue")
        token = Tokens(key).issue(SESSION, "ct", "sato", time.time() + 600).reveal()
        assert count(port, "x")[0] == 401
        assert count(port, token)[0] == 403  # no such session
        book = granted(store)
        assert count(port, token)[0] == 403  # it has no lease yet
        redeem(book)
        expect = sum(row.modality == "CT" for row in series(40))
        assert count(port, token) == (200, expect)
        with book.transaction():
            book.end(SESSION, "revoked", time.time())
        assert count(port, token)[0] == 403  # at once
        book.close()


def test_what_a_session_saw_stands_in_the_trail_when_the_service_ends(store, tmp_path):
    port = free_port()
    path = tmp_path / "kakehashi.toml"
    path.write_text(written(store, port))
    book = granted(store)
    redeem(book)
    book.close()
    with started(path):
        key = load_key(AuthorityLayout(store).keys / "catalogue")
        token = Tokens(key).issue(SESSION, "ct", "sato", time.time() + 600).reveal()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = b'{"limit": 7}'
        connection.request("POST", "/v1/page", body, {"Authorization": f"Bearer {token}"})
        assert connection.getresponse().status == 200
        connection.close()
        assert list(Audit(AuthorityLayout(store).audit).records()) == []
    (record,) = Audit(AuthorityLayout(store).audit).records()
    assert (record.kind, record.session, record.person) == ("catalogue.looked", SESSION, "sato")
    assert record.detail == {"project": "ct", "rows": 7, "series": 0, "thumbnails": 0}


def test_what_was_sought_stands_in_no_file_that_more_people_may_read(store, tmp_path):
    """A name may be sought; what somebody saves is kept, where the service alone reads it."""
    port = free_port()
    path = tmp_path / "kakehashi.toml"
    path.write_text(written(store, port))
    book = granted(store)
    redeem(book)
    book.close()
    with started(path):
        key = load_key(AuthorityLayout(store).keys / "catalogue")
        token = Tokens(key).issue(SESSION, "ct", "sato", time.time() + 600).reveal()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for address, body in (
            ("search", {"text": "SOUGHT"}),
            ("page", {"query": "'SOUGHT' in description"}),
            ("cohorts", {"name": "n", "query": "'SAVED' in description"}),
        ):
            sent = json.dumps(body).encode()
            connection.request("POST", f"/v1/{address}", sent, {"Authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            assert (answer.status, answer.read()[:1]) == (200, b"{")
        connection.close()
    files = {one: one.read_bytes() for one in store.rglob("*") if one.is_file()}
    assert [one for one, content in files.items() if b"sought" in content.lower()] == []
    (saved,) = [one for one, content in files.items() if b"SAVED" in content]
    assert saved.stat().st_mode & 0o077 == 0


def redeem(book: Book) -> None:
    now = time.time()
    with book.transaction():
        book.redeem(
            SESSION,
            public_key="k",
            fingerprint="f",
            host="h",
            address="127.0.0.1",
            job="1",
            walls="namespaces",
            lease_expires_at=now + 600,
            ends_at=now + 3600,
            now=now,
        )


def test_without_a_port_or_an_index_it_says_what_is_missing(store, tmp_path):
    path = tmp_path / "kakehashi.toml"
    for text, reason in (
        (written(store, None), "catalogue_port"),
        (written(tmp_path, 1), "store init"),
        (written(store, 1).replace("[store]", '[store]\nauthority_bind = "0.0.0.0"'), "TLS|tls"),
    ):
        path.write_text(text)
        done = subprocess.run(
            [sys.executable, "-I", "-m", "kakehashi.store.service"],
            input=load(path).model_dump_json(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("kakehashi: "), done.stderr
        assert re.search(reason, done.stderr), done.stderr
        assert "Traceback" not in done.stderr
