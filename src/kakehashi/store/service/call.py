"""One request that is being answered: who asks, what, and the one door to the catalogue."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from kakehashi.errors import RefusedError, StoreError
from kakehashi.store.query import any_of, parse
from kakehashi.store.service.access import Access, Scope
from kakehashi.store.service.parts import AuditEvent
from kakehashi.store.service.work import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tornado.web import RequestHandler

    from kakehashi.config import Project
    from kakehashi.store.query import Value
    from kakehashi.store.service.models import Asked
    from kakehashi.store.service.parts import Parts
    from kakehashi.store.service.tokens import Claims

_Model = TypeVar("_Model", bound=BaseModel)
_Result = TypeVar("_Result")


class Call:
    """A request whose sender is known, and has a session that lives.

    Attributes
    ----------
    access : Access
        What the sender's project may see.
    job : Job
        Called off when the sender is gone.
    """

    def __init__(
        self,
        parts: Parts,
        claims: Claims,
        project: Project,
        handler: RequestHandler,
        newest: dict[tuple[str, str], Job],
    ) -> None:
        self.parts = parts
        self.claims = claims
        self.handler = handler
        self.job = Job()
        self.project = project
        self._permission = parts.permission(project, parts.today())
        self.access = Access(parts.index, parts.catalogue, self._permission, self.job.cancel)
        self._newest = newest

    def body(self, model: type[_Model]) -> _Model:
        """Return the checked body.

        Raises
        ------
        RefusedError
            It is not as the model says; the message has each field and its rule.
        """
        try:
            return model.model_validate_json(self.handler.request.body)
        except ValidationError as error:
            raise RefusedError("malformed", _explain(error)) from None

    def parameters(self, model: type[_Model]) -> _Model:
        """Return the checked parameters of the address; errors are as those of :meth:`body`."""
        try:
            given = {name: values[-1].decode() for name, values in
                     self.handler.request.query_arguments.items()}  # fmt: skip
            return model.model_validate(given)
        except UnicodeDecodeError:
            raise RefusedError("malformed", "the address is not UTF-8") from None
        except ValidationError as error:
            raise RefusedError("malformed", _explain(error)) from None

    def part(self, name: str) -> str:
        """Return a part of the address."""
        return str(self.handler.path_kwargs[name])

    async def work(self, step: Callable[[], _Result]) -> _Result:
        """Do some work on a thread, until it is called off."""
        return await self.parts.workers.run(self.job, step)

    def take_place(self, client: str | None) -> None:
        """End the request of the same session and client that is under way."""
        if client is None:
            return
        key = self.claims.session, client
        if (older := self._newest.get(key)) is not None:
            older.call_off("superseded", "a newer request of the same client took its place")
        self._newest[key] = self.job

    def gone(self) -> None:
        """Forget the request."""
        for key in [key for key, job in self._newest.items() if job is self.job]:
            del self._newest[key]

    def check_live(self) -> None:
        """Check that the session still has its lease, and its project the same rights.

        Raises
        ------
        RefusedError
            It has not.
        """
        rights = self.parts.permission(self.project, self.parts.today())
        if not self.parts.is_live(self.claims.session) or rights != self._permission:
            raise RefusedError("no-access", "this session has no access")

    async def audit(self, kind: str, scope: Scope | None, count: int) -> None:
        """Tell what was looked at, and wait until that is noted; then it may be given.

        Raises
        ------
        RefusedError
            The session lost its right while it was being looked for.
        """
        self.check_live()
        claims = self.claims
        event = AuditEvent(
            kind,
            claims.session,
            claims.project,
            claims.person,
            None if scope is None else self.parts.tokens.digest(scope.whole.canonical()),
            count,
            claims.expires,
        )
        # Not here, since it may wait for the disk; nor behind searches, which take a while.
        await asyncio.to_thread(self.parts.audit, event)


def scope_of(asked: Asked) -> Scope:
    """Return what a request means.

    Raises
    ------
    RefusedError
        The query cannot be parsed, or a value is of another kind than its column.
    """
    return scope(asked.query, asked.selections)


def scope(query: str, selections: Mapping[str, Sequence[Value]]) -> Scope:
    """Return what a query with chosen values means; see :func:`scope_of`."""
    try:
        parsed = parse(query)
        for column, values in selections.items():
            any_of(column, values)
    except StoreError as error:
        raise RefusedError("malformed", f"query: {error}") from None
    return Scope(parsed, {column: frozenset(values) for column, values in selections.items()})


def _explain(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'request'}: {problem['msg']}"
        for problem in problems[:8]
    )
