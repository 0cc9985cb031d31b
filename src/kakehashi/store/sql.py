"""Queries of the catalogue in SQL, as far as a database can answer them exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kakehashi.store.query import COLUMNS, And, Condition, Not, Or, Query

if TYPE_CHECKING:
    from collections.abc import Callable

_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "<": lambda column, value: column < value,
    "<=": lambda column, value: column <= value,
    ">": lambda column, value: column > value,
    ">=": lambda column, value: column >= value,
}


def narrowing(query: Query, table: sa.Table) -> sa.ColumnElement[bool]:
    """Return a condition that every series meets which the query asks for, and maybe more.

    What is left to be looked at with :func:`kakehashi.store.query.matches` is what databases
    answer in different ways: parts of text without regard to case and width, the order of
    text, flags.

    Parameters
    ----------
    query : Query
    table : sqlalchemy.Table
        Has the columns of `COLUMNS`.
    """
    match query:
        case And(parts):
            return sa.and_(sa.true(), *(narrowing(part, table) for part in parts))
        case Or(parts):
            return sa.or_(sa.false(), *(narrowing(part, table) for part in parts))
        case _:
            exact = _exact(query, table)
            return sa.true() if exact is None else exact


def _exact(query: Query, table: sa.Table) -> sa.ColumnElement[bool] | None:
    """Return the same condition in SQL, None where there is none."""
    match query:
        case And(parts) | Or(parts):
            found = [_exact(part, table) for part in parts]
            exact = [part for part in found if part is not None]
            if len(exact) < len(found):
                return None
            if isinstance(query, And):
                return sa.and_(sa.true(), *exact)
            return sa.or_(sa.false(), *exact)
        case Not(part):
            inner = _exact(part, table)
            # Not known is no yes, and so the contrary of yes: SQL would say neither.
            return None if inner is None else sa.not_(sa.func.coalesce(inner, sa.false()))
        case Condition():
            return _condition(query, table.c[query.column])
    return None


def _condition(
    condition: Condition, column: sa.ColumnElement[Any]
) -> sa.ColumnElement[bool] | None:
    kind, op = COLUMNS[condition.column].kind, condition.op
    if op == "contains" or kind == "flags" or condition.column == "added_at":
        return None
    known = [value for value in condition.values if value is not None]
    asks_unknown = len(known) < len(condition.values)
    if op in {"==", "in"}:
        found: sa.ColumnElement[bool] = column.in_(known)
        return sa.or_(column.is_(None), found) if asks_unknown else found
    if op in {"!=", "not in"}:
        return sa.and_(column.is_not(None), column.not_in(known))
    if kind == "text":
        return None
    compared: sa.ColumnElement[bool] = _COMPARED[op](column, known[0])
    return compared
