"""Cohorts in a notebook: choose series by a plain expression, split them by patient, freeze them.

Everything is asked of the catalogue service of the store, which decides what may be seen. Only
the standard library is needed here; tables come as pandas data frames where pandas is there.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import ssl
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

from kakehashi.errors import KakehashiError, SessionError, StoreError
from kakehashi.store.query import FALSE, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kakehashi.secret import Secret

HUB = "JUPYTERHUB_API_URL"
"""Environment variable with the hub's address, which hands a session's questions on."""

_HUB_TLS = "JUPYTERHUB_SSL_"
"""How the variables begin that name the files for it."""

TIMEOUT_S = 60.0

_LONGEST_ANSWER = 1 << 30

Value = str | int | float | bool | None


class CatalogueError(KakehashiError):
    """The catalogue did not give what was asked for."""


class NoCatalogueError(CatalogueError):
    """The catalogue cannot be reached."""


class NoAccessError(CatalogueError):
    """The session has no right to the catalogue, or not any more."""


class NotAQueryError(CatalogueError):
    """The catalogue cannot understand what was asked; the message has the place and reason."""


class UnknownError(CatalogueError):
    """There is no such series or cohort, or this project may not see it."""


class TooMuchError(CatalogueError):
    """More was asked for than one session may have at a time."""


_ERRORS = {
    401: (NoAccessError, "the session's lease may have ended; start a new session"),
    403: (NoAccessError, "ask for the project's approval, or start a session of another project"),
    404: (UnknownError, "look for its name or UID again"),
    409: (CatalogueError, "ask again"),
    422: (NotAQueryError, "correct the query"),
    429: (TooMuchError, "wait a moment and ask again"),
    507: (TooMuchError, "use what is there"),
    503: (TooMuchError, "narrow the query, and ask again"),
}


class Client:
    """Speaks with the catalogue service.

    Parameters
    ----------
    base_url : str
        ``https://host:port``, ``http://host:port``, or ``unix:/path/of/a/socket``.
    token_source : callable
        Gives the session's token. It is asked at every call, because a token lasts no
        longer than a lease, and is renewed with it.
    """

    def __init__(self, base_url: str, token_source: Callable[[], Secret]) -> None:
        self._parts = urlsplit(base_url)
        self._token_source = token_source
        if self._parts.scheme not in {"http", "https", "unix"}:
            raise CatalogueError(
                f"{base_url!r} is no address of a catalogue; expected https://, http:// or unix:"
            )

    @classmethod
    def of_session(cls) -> Self:
        """Return the client of the session that this runs in.

        Raises
        ------
        NoCatalogueError
            This does not run in a session, or the session has no catalogue.
        """
        from kakehashi.link.session import Session  # noqa: PLC0415 - other clients need none

        hub = os.environ.get(HUB)
        try:
            session = Session.current()
        except SessionError as error:
            raise NoCatalogueError(f"cohorts are chosen inside a session only: {error}") from None
        if not hub:
            raise NoCatalogueError(f"{HUB} is not set; ask from a notebook of the session")

        def token() -> Secret:
            try:
                found = session.lease().catalogue
            except SessionError as error:
                raise NoAccessError(str(error)) from None
            if found is None:
                raise NoCatalogueError("the store of this session has no catalogue service")
            return found

        return cls(f"{hub.rstrip('/')}/kakehashi/catalogue/{session.session}", token)

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON value that the service gives.

        Parameters
        ----------
        method : str
        path : str
            Below ``/v1``.
        body : mapping, optional

        Raises
        ------
        CatalogueError
            One of its subclasses says what to do.
        """
        with self._answer(method, path, body, "application/json") as answer:
            raw = _whole(answer)
        try:
            return json.loads(raw)
        except ValueError:
            raise NoCatalogueError(
                "what came is not an answer of the catalogue; is another program at its address?"
            ) from None

    def rows(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows of an export as they come, one dictionary each."""
        with self._answer("POST", "/export", body, "application/jsonl") as answer:
            try:
                for line in answer:
                    yield json.loads(line)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise NoCatalogueError(
                    f"the table broke off ({type(error).__name__}); ask for it again"
                ) from None

    @contextmanager
    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, accept: str
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        headers = {
            "Accept": accept,
            "Authorization": f"Bearer {self._token_source().reveal()}",
            "Content-Type": "application/json",
        }
        content = None if body is None else json.dumps(body, default=_plain).encode()
        prefix = "" if self._parts.scheme == "unix" else self._parts.path.rstrip("/")
        try:
            try:
                connection.request(method, f"{prefix}/v1{path}", content, headers)
                answer = connection.getresponse()
                if answer.status != 200:
                    raise _error(answer.status, answer.read(1 << 16))
            except (OSError, http.client.HTTPException) as error:
                raise NoCatalogueError(
                    f"the catalogue does not answer ({type(error).__name__}); if the session "
                    "runs, try again in a moment, else start a new one"
                ) from None
            yield answer
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        parts = self._parts
        if parts.scheme == "unix":
            return _UnixConnection(unquote(parts.path))
        if parts.hostname is None:
            raise CatalogueError(f"{parts.geturl()!r} names no host")
        if parts.scheme == "https":
            return http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=TIMEOUT_S, context=_trust()
            )
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)


def _trust() -> ssl.SSLContext:
    """Trust, inside a session, who the hub trusts, and show what it asks of its servers."""
    context = ssl.create_default_context(cafile=os.environ.get(f"{_HUB_TLS}CLIENT_CA"))
    certificate = os.environ.get(f"{_HUB_TLS}CERTFILE")
    if certificate is not None:
        context.load_cert_chain(certificate, os.environ.get(f"{_HUB_TLS}KEYFILE"))
    return context


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Cohort:
    """Series that meet a condition.

    Parameters
    ----------
    query : str
        An expression such as ``"modality == 'CT' and slices >= 32"``; every series that the
        project may see if it is empty. docs/data-manager.md lists the columns.
    selections : mapping of str to sequence, optional
        Values chosen of facets, as in the cohort browser.
    client : Client, optional
        That of the session by default.

    Examples
    --------
    >>> lungs = Cohort("modality == 'CT'") & Cohort("body_part == 'CHEST'")  # doctest: +SKIP
    >>> lungs.count()  # doctest: +SKIP
    1234
    >>> parts = lungs.split(train=0.7, val=0.15, test=0.15)  # doctest: +SKIP
    """

    def __init__(
        self,
        query: str = "",
        *,
        selections: Mapping[str, Sequence[Value]] | None = None,
        client: Client | None = None,
    ) -> None:
        self.query = query
        self.selections = {name: tuple(values) for name, values in (selections or {}).items()}
        self._given = client

    def __repr__(self) -> str:
        chosen = f", selections={self.selections!r}" if self.selections else ""
        return f"Cohort({self.query!r}{chosen})"

    def __and__(self, other: Cohort) -> Cohort:
        """Return the series that are in both."""
        if not isinstance(other, Cohort):
            return NotImplemented
        try:
            query = parse(self.query) & parse(other.query)
        except StoreError as error:
            raise NotAQueryError(f"{error}; correct the query") from None
        chosen = self.selections | other.selections
        for name in self.selections.keys() & other.selections.keys():
            theirs = other.selections[name]
            chosen[name] = tuple(value for value in self.selections[name] if value in theirs)
            if not chosen[name]:
                # No value is left: that is no series, and not a facet without a choice.
                del chosen[name]
                query = FALSE
        return Cohort(query.canonical(), selections=chosen, client=self._given or other._given)

    @cached_property
    def _client(self) -> Client:
        return self._given or Client.of_session()

    @property
    def _asked(self) -> dict[str, Any]:
        return {
            "query": self.query,
            "selections": {name: list(values) for name, values in self.selections.items()},
        }

    def count(self) -> int:
        """Return how many series there are."""
        return int(self._client.ask("POST", "/facets", self._asked | {"columns": []})["count"])

    def facets(self, columns: Sequence[str] | None = None) -> dict[str, dict[Value, int]]:
        """Return, for each facet, how many series have each value.

        Parameters
        ----------
        columns : sequence of str, optional
            All facets by default.

        Returns
        -------
        dict of str to dict
            The most frequent value first; None is unknown. A facet of which values are chosen
            is counted as if they were not, so that others can be chosen instead.
        """
        body = self._asked if columns is None else self._asked | {"columns": list(columns)}
        found = self._client.ask("POST", "/facets", body)["facets"]
        return {
            name: {one["value"]: one["count"] for one in values} for name, values in found.items()
        }

    def table(self, columns: Sequence[str]) -> Any:
        """Return chosen columns of all series.

        Parameters
        ----------
        columns : sequence of str

        Returns
        -------
        pandas.DataFrame or list of dict
            A data frame where pandas is installed.
        """
        rows = list(self._client.rows(self._asked | {"columns": list(columns)}))
        try:
            import pandas as pd  # type: ignore[import-untyped] # noqa: PLC0415 - may be missing
        except ImportError:
            return rows
        return pd.DataFrame(rows, columns=list(columns))

    def series(self) -> list[str]:
        """Return all SeriesInstanceUIDs, sorted."""
        body = self._asked | {"columns": ["series_uid"]}
        return sorted(row["series_uid"] for row in self._client.rows(body))

    def split(
        self,
        train: float = 0.7,
        val: float = 0.15,
        test: float = 0.15,
        *,
        stratify: Sequence[str] = ("facility", "sex"),
        seed: int = 0,
    ) -> Split:
        """Split the series into three parts, by patient; see :func:`split_rows`."""
        columns = dict.fromkeys(("series_uid", "patient_id", "study_date", *stratify))
        rows = self._client.rows(self._asked | {"columns": list(columns)})
        return split_rows(list(rows), train, val, test, stratify=stratify, seed=seed)

    def freeze(self, name: str) -> FrozenCohort:
        """Save the query under a name, and fix the list of series that it gives now.

        Where the list is the same as the newest one under that name, that one is given.
        """
        saved = self._client.ask("POST", "/cohorts", self._asked | {"name": name})
        made = self._client.ask("POST", f"/cohorts/{saved['id']}/freeze", {})
        return FrozenCohort.open(saved["id"], made["version"], client=self._client)


@dataclass(frozen=True)
class FrozenCohort:
    """A fixed list of series.

    Attributes
    ----------
    id, name : str
        Of the cohort that it is a version of.
    version : int
    sha256 : str
        Over the list as it was frozen; it stays when persons withdraw.
    frozen_at : str
        ISO 8601, UTC.
    tombstones : int
        Series that were withdrawn since.
    manifest : dict
        Size and hash of each pack; what the session's reader checks against.
    changed : tuple of str
        SeriesInstanceUIDs of the list that were packed anew since, with slices that came late.
        They are not the ones that were frozen, and not in :attr:`series`: freeze again to have
        them.
    """

    id: str
    name: str
    version: int
    sha256: str
    frozen_at: str
    tombstones: int
    manifest: dict[str, Any] = field(repr=False)
    changed: tuple[str, ...] = ()

    @classmethod
    def open(cls, cohort: str, version: int, *, client: Client | None = None) -> Self:
        """Return a version of a cohort by its id."""
        client = client or Client.of_session()
        name = client.ask("GET", f"/cohorts/{cohort}")["name"]
        found = client.ask("GET", f"/cohorts/{cohort}/versions/{version}")
        return cls(
            id=cohort,
            name=name,
            version=found["version"],
            sha256=found["sha256"],
            frozen_at=found["frozen_at"],
            tombstones=found["tombstones"],
            manifest=found["manifest"],
            changed=tuple(found["changed"]),
        )

    @property
    def series(self) -> tuple[str, ...]:
        """SeriesInstanceUIDs that the project may see of it now, sorted."""
        return tuple(entry["series"]["series_uid"] for entry in self.manifest["files"])

    @property
    def complete(self) -> bool:
        """Whether the list is the one that was frozen, by its hash."""
        listed = [[entry["series"]["series_uid"], entry["blocks"]] for entry in self._files]
        text = json.dumps(listed, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest() == self.sha256

    @property
    def _files(self) -> list[dict[str, Any]]:
        return list(self.manifest["files"])

    def citation(self) -> str:
        """Return a line for a paper: what names this list, and nothing else."""
        number = f"{len(self.series)} series" if self.complete else "no longer complete"
        return (
            f'Kakehashi cohort "{self.name}", project {self.manifest["project"]}, version '
            f"{self.version} ({self.frozen_at[:10]}; {number}), SHA-256 {self.sha256}"
        )

    def diff(self, other: FrozenCohort) -> Difference:
        """Return what stands in one of two lists only."""
        mine, theirs = set(self.series), set(other.series)
        return Difference(tuple(sorted(mine - theirs)), tuple(sorted(theirs - mine)))

    def split(
        self,
        train: float = 0.7,
        val: float = 0.15,
        test: float = 0.15,
        *,
        stratify: Sequence[str] = ("facility", "sex"),
        seed: int = 0,
    ) -> Split:
        """Split the series into three parts, by patient; see :func:`split_rows`."""
        rows = [entry["series"] for entry in self._files]
        return split_rows(rows, train, val, test, stratify=stratify, seed=seed)


@dataclass(frozen=True)
class Difference:
    """Series of the first list only, and of the second only, sorted."""

    only_here: tuple[str, ...]
    only_there: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """SeriesInstanceUIDs of each part, sorted; no patient is in two of them."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def split_rows(
    rows: Sequence[Mapping[str, Any]],
    train: float,
    val: float,
    test: float,
    *,
    stratify: Sequence[str],
    seed: int,
) -> Split:
    """Split series into three parts, by patient.

    In each stratum the patients are put in the order of a keyed hash of their id, and the
    order is cut at the shares. So the same series give the same parts, in whatever order they
    come; each stratum has its shares to within one patient; and where to round is drawn for
    each stratum by the same hash, so that small strata do not all fall to one part.

    Further series of known patients move nobody. A new patient moves, in their stratum alone,
    at most one other across each of the two cuts: where a test set must stay a test set, freeze
    the cohort and split that.

    Parameters
    ----------
    rows : sequence of mapping
        With ``series_uid``, ``patient_id``, ``study_date`` and the columns of `stratify`.
        Series without a patient's id count as those of one patient.
    train, val, test : float
        Shares of the patients; they add up to 1.
    stratify : sequence of str
        Columns; a patient has the values of their first series by date.
    seed : int

    Returns
    -------
    Split

    Raises
    ------
    CatalogueError
        The shares are no shares.
    """
    shares = (train, val, test)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise CatalogueError(
            f"train, val and test are {train}, {val} and {test}; they must not be negative, and "
            "must add up to 1"
        )
    patients: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        patients.setdefault(row["patient_id"] or "", []).append(row)
    strata: dict[str, list[str]] = {}
    for patient, own in patients.items():
        first = min(own, key=lambda row: (row["study_date"] or "9999", row["series_uid"]))
        stratum = json.dumps([first[column] for column in stratify], ensure_ascii=False)
        strata.setdefault(stratum, []).append(patient)
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for stratum, members in strata.items():
        members.sort(key=lambda patient: _draw(seed, "patient", patient))
        offset = _draw(seed, "stratum", stratum)
        # Rounded, so that an end that is not exact in binary draws no patient over a cut.
        first_cut, last_cut = (
            int(round(len(members) * share, 6) + offset) for share in (train, train + val)
        )
        for place, patient in enumerate(members):
            part = parts[(place >= first_cut) + (place >= last_cut)]
            part.extend(row["series_uid"] for row in patients[patient])
    return Split(*(tuple(sorted(part)) for part in parts))


def _draw(seed: int, kind: str, name: str) -> float:
    """Return a number from 0 to 1, below 1, that depends on nothing but the arguments."""
    text = json.dumps([seed, kind, name]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:6]) / 2**48


def _whole(answer: http.client.HTTPResponse) -> bytes:
    try:
        raw = answer.read(_LONGEST_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        raise NoCatalogueError(
            f"the answer broke off ({type(error).__name__}); ask again"
        ) from None
    if len(raw) == _LONGEST_ANSWER:
        raise TooMuchError("the answer is too long to be taken; narrow the query")
    return raw


def _error(status: int, raw: bytes) -> CatalogueError:
    kind, advice = _ERRORS.get(
        status, (CatalogueError, "try again; if it stays so, tell the people of the platform")
    )
    try:
        said = str(json.loads(raw)["message"])
    except (ValueError, KeyError, TypeError):
        said = f"status {status}"
    return kind(f"the catalogue refused: {said}; {advice}")


def _plain(value: Any) -> Any:
    """Return a value of numpy or of a date as JSON has it."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent to the catalogue")
