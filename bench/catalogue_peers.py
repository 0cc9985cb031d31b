"""The databases that the facets' index is measured beside, with the same rows and questions."""

from __future__ import annotations

import contextlib
import io
import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pyarrow as pa
import pyarrow.csv

FACETS = ("facility", "modality", "vendor", "model", "kernel", "body_part", "sex", "contrast")
OTHERS = ("orientation", "tier", "slices", "thickness", "study_date")
COLUMNS = ("series_uid", *FACETS, *OTHERS)
TYPES = {
    "contrast": "boolean",
    "tier": "smallint",
    "slices": "integer",
    "thickness": "double precision",
    "study_date": "date",
}

Cells = dict[tuple[str, str | None], int]
"""The count of each value of each facet."""


def facets_sql(where: str, chosen: Mapping[str, str], *, sets: bool) -> str:
    """Return one statement for drill-sideways counts: number of the facet, value, count.

    Parameters
    ----------
    where : str
        What all rows meet.
    chosen : mapping
        Condition of each facet in which something is chosen.
    sets : bool
        The database knows GROUPING SETS, by which all other facets take one pass.
    """
    plain = [name for name in FACETS if name not in chosen]
    marks = "".join(f", ({text}) AS s{number}" for number, text in enumerate(chosen.values()))
    near = ""
    if len(chosen) > 1:  # rows that miss two choices count nowhere
        misses = " + ".join(f"CASE WHEN {text} THEN 0 ELSE 1 END" for text in chosen.values())
        near = f" AND {misses} <= 1"
    # What is read once is not put aside first.
    inner = f"SELECT {', '.join(FACETS)}{marks} FROM series WHERE {where}{near}"
    rows = f"WITH x AS MATERIALIZED ({inner}) "
    all_chosen = " AND ".join(f"s{number}" for number in range(len(chosen)))
    source = f"x WHERE {all_chosen}" if chosen else f"series WHERE {where}"
    parts = []
    if sets:
        value = ", ".join(f"CAST({name} AS text)" for name in plain)
        groups = ", ".join(f"({name})" for name in plain)
        parts.append(
            f"SELECT GROUPING({', '.join(plain)}) AS g, COALESCE({value}) AS v, count(*) AS n "
            f"FROM {source} GROUP BY GROUPING SETS ({groups})"
        )
    else:
        parts += [
            f"SELECT {number}, CAST({name} AS text), count(*) FROM {source} GROUP BY {name}"
            for number, name in enumerate(plain)
        ]
    for number, name in enumerate(chosen):
        others = [f"s{other}" for other in range(len(chosen)) if other != number] or ["1 = 1"]
        parts.append(
            f"SELECT {-1 - number}, CAST({name} AS text), count(*) FROM x "
            f"WHERE {' AND '.join(others)} GROUP BY {name}"
        )
    return (rows if chosen else "") + " UNION ALL ".join(parts)


def read_facets(rows: Sequence[tuple[Any, ...]], chosen: Mapping[str, str], *, sets: bool) -> Cells:
    """Return the answer to :func:`facets_sql` as cells."""
    plain = [name for name in FACETS if name not in chosen]
    cells: Cells = {}
    for number, value, count in rows:
        if number < 0:
            name = list(chosen)[-1 - number]
        elif sets:  # all bits but the own one are set, the first column's is the highest
            own = (1 << len(plain)) - 1 - number
            name = plain[len(plain) - own.bit_length()]
        else:
            name = plain[number]
        text = {"1": "true", "0": "false"}.get(value, value) if name == "contrast" else value
        cells[name, text] = count
    return cells


class Peer(ABC):
    """A database with one table of series."""

    name: str
    sets = True
    rounds = 3
    """In how many rounds it takes part: where it takes seconds, a few say enough."""

    @abstractmethod
    def load(self, batches: Iterator[pa.RecordBatch]) -> None:
        """Take all rows."""

    @abstractmethod
    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        """Return all rows of an answer."""

    @abstractmethod
    def bytes_on_disk(self) -> int:
        """Return what it takes."""


def _texts(batch: pa.RecordBatch) -> pa.Table:
    table = pa.Table.from_batches([batch.select(list(COLUMNS))])
    fields = [
        pa.field(f.name, pa.large_string()) if pa.types.is_dictionary(f.type) else f
        for f in table.schema
    ]
    return table.cast(pa.schema(fields))


class Duck(Peer):
    """DuckDB's own file, text as ENUM, rows in order of dates."""

    name = "DuckDB"
    rounds = 9

    def __init__(self, folder: Path, values: Mapping[str, Sequence[str]], threads: int) -> None:
        self._path = folder / "peer.duckdb"
        self._connection = duckdb.connect(str(self._path), config={"threads": str(threads)})
        columns = []
        for name in COLUMNS:
            kind = TYPES.get(name, "text")
            if name in values:
                kind = f"{name}_t"
                listed = ", ".join("'" + value.replace("'", "''") + "'" for value in values[name])
                self._connection.execute(f"CREATE TYPE {kind} AS ENUM ({listed})")
            columns.append(f"{name} {kind}")
        self._connection.execute(f"CREATE TABLE series ({', '.join(columns)})")

    def load(self, batches: Iterator[pa.RecordBatch]) -> None:
        for batch in batches:
            self._connection.register("given", _texts(batch))
            self._connection.execute("INSERT INTO series SELECT * FROM given")
        self._connection.unregister("given")
        self._connection.execute("CHECKPOINT")

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self._connection.execute(sql).fetchall()
        return rows

    def bytes_on_disk(self) -> int:
        return self._path.stat().st_size

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()


class Lite(Peer):
    """SQLite with a covering index: no statement touches the table."""

    name = "SQLite"
    sets = False

    def __init__(self, folder: Path) -> None:
        self._path = folder / "peer.sqlite"
        self._connection = sqlite3.connect(self._path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute("PRAGMA cache_size = -1000000")
        columns = ", ".join(f"{name} {TYPES.get(name, 'text')}" for name in COLUMNS)
        self._connection.execute(f"CREATE TABLE series ({columns})")

    def load(self, batches: Iterator[pa.RecordBatch]) -> None:
        marks = ", ".join("?" * len(COLUMNS))
        for batch in batches:
            table = _texts(batch)
            days = table.column("study_date").cast(pa.string())
            table = table.set_column(table.schema.get_field_index("study_date"), "study_date", days)
            rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
            self._connection.execute("BEGIN")
            self._connection.executemany(f"INSERT INTO series VALUES ({marks})", rows)
            self._connection.execute("COMMIT")
        self._connection.execute("CREATE UNIQUE INDEX by_uid ON series (series_uid)")
        covered = ", ".join(
            dict.fromkeys(("modality", "orientation", "study_date", *FACETS, *OTHERS))
        )
        self._connection.execute(f"CREATE INDEX covering ON series ({covered})")
        self._connection.execute("ANALYZE")

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql).fetchall()

    def bytes_on_disk(self) -> int:
        return self._path.stat().st_size

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()


class Postgres(Peer):
    """PostgreSQL on a socket of its own, two parallel workers, statistics up to date."""

    name = "PostgreSQL"

    def __init__(self, host: str) -> None:
        self._connection = psycopg.connect(
            host=host, user="test", dbname="postgres", autocommit=True
        )
        columns = ", ".join(f"{name} {TYPES.get(name, 'text')}" for name in COLUMNS)
        self._connection.execute(f"CREATE UNLOGGED TABLE series ({columns})")

    def load(self, batches: Iterator[pa.RecordBatch]) -> None:
        statement = "COPY series FROM STDIN (FORMAT csv)"
        with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
            for batch in batches:
                out = io.BytesIO()
                pyarrow.csv.write_csv(
                    _texts(batch), out, pyarrow.csv.WriteOptions(include_header=False)
                )
                copy.write(out.getbuffer())
        self._connection.execute("CREATE UNIQUE INDEX ON series (series_uid)")
        self._connection.execute("CREATE INDEX ON series (study_date)")
        self._connection.execute("VACUUM ANALYZE series")

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql.encode()).fetchall()

    def bytes_on_disk(self) -> int:
        return int(self.ask("SELECT pg_total_relation_size('series')")[0][0])

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


@contextlib.contextmanager
def postgres_server() -> Iterator[str | None]:
    """Run a PostgreSQL; yield the folder of its socket, None where it is not installed."""
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), Path("/usr/local/bin")]
    path = os.pathsep.join(map(str, folders))
    initdb, postgres = shutil.which("initdb", path=path), shutil.which("postgres", path=path)
    if initdb is None or postgres is None:
        yield None
        return
    who: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="kakehashi-pg-") as folder:
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        subprocess.run(
            [*(initdb, "-D", f"{folder}/data", "-U", "test", "-A", "trust"), "-E", "UTF8", "-N"],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            **who,
        )
        options = {
            "listen_addresses": "",
            "fsync": "off",
            "shared_buffers": "1GB",
            "work_mem": "256MB",
            "max_parallel_workers_per_gather": "2",
            "jit": "off",
        }
        server = subprocess.Popen(
            [
                *(postgres, "-D", f"{folder}/data", "-k", folder),
                *(word for item in options.items() for word in ("-c", "=".join(item))),
            ],
            cwd=folder,
            stderr=subprocess.DEVNULL,
            **who,
        )
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    psycopg.connect(host=folder, user="test", dbname="postgres").close()
                    break
                except psycopg.OperationalError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise
                    # A server that starts tells nobody when it is ready.
                    time.sleep(0.05)
            yield folder
        finally:
            server.send_signal(signal.SIGQUIT)  # its immediate shutdown
            server.wait(60)
