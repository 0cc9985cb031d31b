"""A catalogue of made-up series behind a real socket, and people who ask it."""

# ruff: noqa: RUF001 - full-width letters are what is tested

from __future__ import annotations

import asyncio
import datetime as dt
import http.client
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from tornado.netutil import bind_sockets

from kakehashi.config import Config, Project
from kakehashi.secret import Secret
from kakehashi.store.catalogue import _SERIES, Catalogue, Series, _values
from kakehashi.store.cohorts import Cohorts
from kakehashi.store.facets import Index
from kakehashi.store.layout import Layout
from kakehashi.store.service import records
from kakehashi.store.service.app import http_server
from kakehashi.store.service.parts import AuditEvent, Parts
from kakehashi.store.service.reports import Reports
from kakehashi.store.service.tokens import Tokens
from kakehashi.store.service.work import Limiter

TODAY = dt.date(2026, 11, 22)
KEY = Secret("k" * 43)


def project(name: str, **fields: Any) -> Project:
    return Project.model_validate(
        {
            "id": name,
            "title": name,
            "purpose": "test",
            "approval": "1",
            "expires": "2099-01-01",
            "groups": ["g"],
            "sites": ["s"],
            **fields,
        }
    )


PROJECTS = {
    one.id: one
    for one in (
        project("all", tier=3),
        project("none", tier=3, cohort={"body_part": ["TOE"]}),
        project("over", tier=3, expires="2026-11-21"),
        project("last", tier=3, expires="2026-11-22"),
        project(
            "part",
            tier=2,
            cohort={
                "facility": ["F01", "F02", "F03"],
                "modality": ["CT", "MR"],
                "query": "slices < 400 and not '秘' in description",
            },
        ),
    )
}


def series(count: int, seed: int = 0) -> list[Series]:
    """Make rows with values that are shared, missing, equal but for case or width, and odd."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        study = number // 3
        one = random.Random(f"{seed} {study}")
        rows.append(
            Series(
                series_uid=f"1.2.392.{seed + 1}.{number}",
                study_uid=f"1.2.392.9.{study}",
                patient_id=f"p{study // 2}",
                facility=one.choice(["F01", "F02", "F03", "F04", "極秘"]),
                tier=draw.choice([1, 1, 2, 3]),
                modality=draw.choice(["CT", "CT", "MR", "PT"]),
                body_part=draw.choice(["CHEST", "HEAD", "chest", None]),
                manufacturer=draw.choice(["GE MEDICAL", "キヤノン", "ｷﾔﾉﾝ", None]),
                vendor=draw.choice(["GE", "CANON", "SIEMENS"]),
                model=draw.choice(["M'1", 'M"2', None]),
                kernel=draw.choice(["FC51", "B30f", "fc51", None]),
                description=draw.choice(["造影 5mm", "胸部 極秘", "Chest ＣＴ", "100%_x", None]),
                study_date=one.choice([None, dt.date(2020, 2, 29), dt.date(2024, 1, 1)]),
                rows=512,
                columns=draw.choice([512, 256]),
                slices=draw.choice([1, 31, 32, 300, 400, 900]),
                volumes=1,
                usable_3d=draw.random() < 0.5,
                spacing_z=draw.choice([1.0, 5.0, 0.1 + 0.2]),
                spacing_y=0.5,
                spacing_x=0.5,
                thickness=draw.choice([1.0, 5.0, None]),
                orientation=draw.choice(["axial", "coronal"]),
                kvp=draw.choice([120.0, 100.0, None]),
                exposure=draw.choice([81.5, None]),
                contrast=draw.random() < 0.3,
                sex=one.choice(["F", "M", "O", None]),
                age=one.choice([61.0, 0.5, None]),
                transfer_syntax="1.2.840.10008.1.2.1",
                flags=draw.choice([(), ("tilted",), ("tilted", "lossy")]),
                path=f"packs/aa/{number}.ozx",
                size=1000 + number,
                blocks=f"{number:064x}",
                added_at=f"2026-01-{1 + number % 28:02d}T00:00:00Z",
            )
        )
    return rows


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def ok(self) -> Any:
        assert self.status == 200, self.body
        return self.json


class Asker:
    """One session's connection to the service."""

    def __init__(self, port: int, token: str) -> None:
        self.token = token
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Authorization": f"Bearer {self.token}", **(headers or {})}
        self._connection.request(method, path, content, given)
        answer = self._connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read())

    def post(self, path: str, **body: Any) -> Answer:
        return self.ask("POST", f"/v1/{path}", body)

    def get(self, path: str) -> Answer:
        return self.ask("GET", f"/v1/{path}")

    def close(self) -> None:
        self._connection.close()


@dataclass
class Service:
    """The service with all that it stands on."""

    config: Config
    rows: list[Series]
    index: Index
    catalogue: Catalogue
    cohorts: Cohorts
    reports: Reports
    layout: Layout
    parts: Parts
    port: int = 0
    live: set[str] = field(default_factory=set)
    events: list[AuditEvent] = field(default_factory=list)
    askers: list[Asker] = field(default_factory=list)

    def token(self, project: str, person: str = "sato", session: str | None = None) -> str:
        name = session or f"{len(self.live):032x}"
        self.live.add(name)
        return self.parts.tokens.issue(name, project, person, 2**40).reveal()

    def asker(self, project: str, person: str = "sato", token: str | None = None) -> Asker:
        self.askers.append(Asker(self.port, token or self.token(project, person)))
        return self.askers[-1]


@contextmanager
def running(config: Config, rows: list[Series], **changed: Any) -> Iterator[Service]:
    """Serve rows on a socket of the loopback address."""
    store = config.need_store()
    layout = Layout(store.root)
    records.folder(store.root).mkdir(exist_ok=True)
    catalogue = Catalogue.open(store)
    if rows:
        with catalogue._engine.begin() as connection:
            connection.execute(sa.insert(_SERIES), [_values(row) for row in rows])
    index = Index.create(layout.facets)
    half = len(rows) // 2  # in two segments, whose dictionaries differ
    for part in (rows[:half], rows[half:]):
        index.add_segment([part])
    live: set[str] = set()
    events: list[AuditEvent] = []
    cohorts, reports = Cohorts.open(store), Reports.open(store)
    parts = Parts(
        **{
            "tokens": Tokens(KEY),
            "is_live": live.__contains__,
            "project": PROJECTS.get,
            "index": index,
            "catalogue": catalogue,
            "cohorts": cohorts,
            "reports": reports,
            "layout": layout,
            "today": lambda: TODAY,
            "audit": events.append,
            "limiter": Limiter(1e6, 10**6, 8),
            **changed,
        }
    )
    service = Service(
        config, rows, index, catalogue, cohorts, reports, layout, parts, live=live, events=events
    )
    with serving(parts) as service.port:
        try:
            yield service
        finally:
            for asker in service.askers:
                asker.close()
    for part in (catalogue, cohorts, reports):
        part.close()


@contextmanager
def serving(parts: Parts) -> Iterator[int]:
    """Run the server in a thread of its own; give its port."""
    ready = threading.Event()
    ports: list[int] = []
    stop: list[Callable[[], None]] = []

    async def main() -> None:
        server = http_server(parts, None)
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        ports.append(sockets[0].getsockname()[1])
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        ready.set()
        await ended.wait()
        server.stop()
        await server.close_all_connections()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(30)
    try:
        yield ports[0]
    finally:
        stop[0]()
        thread.join(30)
        parts.workers.close()
