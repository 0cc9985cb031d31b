"""The query language of the catalogue: plain expressions over one row a series.

A query is text such as ``modality == 'CT' and slices >= 32 and '結節' in description``. It is
parsed, never executed: what is not in the small grammar below is refused.

- comparisons of a column with literals: ``==  !=  <  <=  >  >=``, chained too, and
  ``in``/``not in`` a tuple or list; dates are written as ``'2024-03-31'``
- ``'text' in column``: a part of the text, without regard to case and width (NFKC)
- ``'tilted' in flags``; a bare boolean column (``contrast``); ``and``, ``or``, ``not``

A series of which a column is not known meets no comparison with it but ``column == None``: so
``kernel != 'FC51'`` leaves out series without a kernel, and ``not kernel == 'FC51'`` does not.
Identifiers can be compared for equality only.
"""

from __future__ import annotations

import ast
import datetime as dt
import difflib
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from kakehashi.store.catalogue import Series

Kind: TypeAlias = Literal["text", "identifier", "number", "integer", "date", "boolean", "flags"]
Value: TypeAlias = str | int | float | bool | dt.date | None
Operator: TypeAlias = Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in", "contains"]

MAX_LENGTH: Final = 4000
"""Characters of a query's text."""
MAX_DEPTH: Final = 20
"""Levels of ``and``, ``or`` and ``not`` inside each other."""
MAX_LITERALS: Final = 500
"""Literals in one query's text."""


@dataclass(frozen=True, slots=True)
class Column:
    """What can be asked of one column.

    Attributes
    ----------
    kind : str
        ``text``, ``identifier``, ``number``, ``integer``, ``date``, ``boolean``, ``flags``.
    title, title_ja : str
        What people call it.
    facet : bool
        It has few values, which are offered with their counts.
    """

    name: str
    kind: Kind
    title: str
    title_ja: str
    facet: bool = False


_COLUMNS = (
    Column("series_uid", "identifier", "Series", "シリーズ"),
    Column("study_uid", "identifier", "Study", "検査"),
    Column("patient_id", "identifier", "Patient", "患者"),
    Column("facility", "text", "Facility", "施設", facet=True),
    Column("tier", "integer", "Access tier", "アクセス区分", facet=True),
    Column("modality", "text", "Modality", "モダリティ", facet=True),
    Column("body_part", "text", "Body part", "部位", facet=True),
    Column("manufacturer", "text", "Manufacturer as written", "製造元(原表記)", facet=True),
    Column("vendor", "text", "Vendor", "メーカー", facet=True),
    Column("model", "text", "Model", "機種", facet=True),
    Column("kernel", "text", "Kernel", "再構成関数", facet=True),
    Column("description", "text", "Description", "シリーズ記述"),
    Column("study_date", "date", "Study date", "検査日"),
    Column("rows", "integer", "Rows", "行数", facet=True),
    Column("columns", "integer", "Columns", "列数", facet=True),
    Column("slices", "integer", "Slices", "スライス数"),
    Column("volumes", "integer", "Volumes", "ボリューム数", facet=True),
    Column("usable_3d", "boolean", "Usable in 3D", "3D利用可", facet=True),
    Column("spacing_z", "number", "Slice spacing (mm)", "スライス間隔 (mm)"),
    Column("spacing_y", "number", "Row spacing (mm)", "行間隔 (mm)"),
    Column("spacing_x", "number", "Column spacing (mm)", "列間隔 (mm)"),
    Column("thickness", "number", "Slice thickness (mm)", "スライス厚 (mm)", facet=True),
    Column("orientation", "text", "Orientation", "断面", facet=True),
    Column("kvp", "number", "Tube voltage (kV)", "管電圧 (kV)", facet=True),
    Column("exposure", "number", "Exposure (mAs)", "管電流時間積 (mAs)"),
    Column("contrast", "boolean", "Contrast agent", "造影", facet=True),
    Column("sex", "text", "Sex", "性別", facet=True),
    Column("age", "number", "Age (years)", "年齢"),
    Column("transfer_syntax", "text", "Transfer syntax", "転送構文", facet=True),
    Column("flags", "flags", "Remarks", "注意点", facet=True),
    Column("size", "integer", "Size (bytes)", "サイズ (バイト)"),
    Column("added_at", "date", "Day added", "登録日"),
)
COLUMNS: Final[Mapping[str, Column]] = MappingProxyType({one.name: one for one in _COLUMNS})
"""All that can be asked for: the columns of `Series` but where its pack lies and its hash."""

_ORDER: Final[Mapping[str, Callable[[Any, Any], bool]]] = MappingProxyType(
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
)
_MIRROR: Final[Mapping[str, Operator]] = MappingProxyType(
    {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
)
_SYMBOLS: Final[Mapping[type[ast.cmpop], Operator]] = MappingProxyType(
    {
        ast.Eq: "==",
        ast.NotEq: "!=",
        ast.Lt: "<",
        ast.LtE: "<=",
        ast.Gt: ">",
        ast.GtE: ">=",
        ast.In: "in",
        ast.NotIn: "not in",
        ast.Is: "==",
        ast.IsNot: "!=",
    }
)


class Query:
    """A condition on a series; immutable, made by :func:`parse` or of :class:`Condition`."""

    __slots__ = ()

    def __and__(self, other: Query) -> Query:
        return _join(And, (self, other), neutral=TRUE, final=FALSE)

    def __or__(self, other: Query) -> Query:
        return _join(Or, (self, other), neutral=FALSE, final=TRUE)

    def __invert__(self) -> Query:
        if isinstance(self, Not):
            return self.part
        if self in (TRUE, FALSE):
            return FALSE if self == TRUE else TRUE
        return Not(self)

    def canonical(self) -> str:
        """Return the query as text: the same for the same query, and it can be parsed."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class And(Query):
    """All parts hold; without parts it always does. Made by ``&``."""

    parts: tuple[Query, ...]

    def canonical(self) -> str:
        """Return the query as text."""
        return " and ".join(map(_inner, self.parts)) or "True"


@dataclass(frozen=True, slots=True)
class Or(Query):
    """One of the parts holds; without parts it never does. Made by ``|``."""

    parts: tuple[Query, ...]

    def canonical(self) -> str:
        """Return the query as text."""
        return " or ".join(map(_inner, self.parts)) or "False"


@dataclass(frozen=True, slots=True)
class Not(Query):
    """The part does not hold. Made by ``~``."""

    part: Query

    def canonical(self) -> str:
        """Return the query as text."""
        return f"not {_inner(self.part)}"


TRUE: Final[Query] = And(())
"""Every series."""
FALSE: Final[Query] = Or(())
"""No series."""


@dataclass(frozen=True, slots=True)
class Condition(Query):
    """One column compared with literals.

    Attributes
    ----------
    column : str
        A name in `COLUMNS`.
    op : str
        ``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in``, ``not in`` or ``contains``.
    values : tuple
        One value; for ``in`` and ``not in`` at least two, sorted.

    Raises
    ------
    StoreError
        The column has no such comparison, or the value is of another kind.
    """

    column: str
    op: Operator
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        column = column_named(self.column)
        many = self.op in {"in", "not in"}
        if len(self.values) != 1 and not (many and self.values):
            raise StoreError(f"{self.op} needs {'a value or more' if many else 'one value'}")
        _check_operator(column, self.op, self.values)
        values = tuple({_literal(column, value): None for value in self.values})
        if many:
            values = tuple(sorted(values, key=_place))
            if len(values) == 1:
                object.__setattr__(self, "op", "==" if self.op == "in" else "!=")
        object.__setattr__(self, "values", values)

    def canonical(self) -> str:
        """Return the query as text."""
        if self.op == "contains":
            return f"{_written(self.values[0])} in {self.column}"
        if self.op in {"in", "not in"}:
            return f"{self.column} {self.op} ({', '.join(map(_written, self.values))})"
        return f"{self.column} {self.op} {_written(self.values[0])}"


def column_named(name: str) -> Column:
    """Return a column.

    Raises
    ------
    StoreError
        There is none of that name; the message has the nearest one.
    """
    if name in COLUMNS:
        return COLUMNS[name]
    near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(COLUMNS)}"
    raise StoreError(f"{name[:60]!r} is not a column; {hint}")


def any_of(column: str, values: Iterable[Value]) -> Query:
    """Return the query of a facet's chosen values: the column has one of them.

    Parameters
    ----------
    column : str
    values : iterable
        Of the column's kind. None stands for not known, and for a series without flags.

    Raises
    ------
    StoreError
        There is no such column, a value is of another kind, or there is no value.
    """
    chosen = tuple(values)
    if not chosen:
        raise StoreError(f"no value of {column} is chosen; leave the column out instead")
    if column_named(column).kind != "flags":
        return Condition(column, "in", chosen)
    query = FALSE
    for value in chosen:
        query |= Condition(column, "==" if value is None else "contains", (value,))
    return query


def fold(text: str) -> str:
    """Return text as it is compared by ``'text' in column``: without case and width."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def matches(query: Query, row: Series | Mapping[str, Any]) -> bool:
    """Say whether a row meets a query. This is what a query means, in the plainest way."""
    match query:
        case And(parts):
            return all(matches(part, row) for part in parts)
        case Or(parts):
            return any(matches(part, row) for part in parts)
        case Not(part):
            return not matches(part, row)
        case Condition(column, op, values):
            return _holds(op, values, value_of(row, column))
    raise TypeError(f"{query!r} is not a query")


def value_of(row: Series | Mapping[str, Any], column: str) -> Any:
    """Return a row's value as queries see it.

    Days are dates, flags a tuple; what is not known, not a number, or no flag is None.
    """
    value = row[column] if isinstance(row, Mapping) else getattr(row, column)
    kind = COLUMNS[column].kind
    if kind == "flags":
        return tuple(value) or None
    if kind == "date" and isinstance(value, str):
        return dt.date.fromisoformat(value[:10])
    return None if isinstance(value, float) and math.isnan(value) else value


def parse(text: str) -> Query:
    """Parse a query.

    Parameters
    ----------
    text : str
        See the module's own text; blank text is every series.

    Returns
    -------
    Query

    Raises
    ------
    StoreError
        The text is no query: where, what is wrong, and what was expected.
    """
    if len(text) > MAX_LENGTH:
        raise StoreError(f"the query has {len(text)} characters; at most {MAX_LENGTH} are allowed")
    if not text.strip():
        return TRUE
    # Each character keeps its place; a line's end within quotes is wrong either way.
    line = re.sub(r"[\r\n]", " ", text)
    start = len(line) - len(line.lstrip())
    line = line.strip()
    try:
        tree = ast.parse(line, mode="eval").body
    except SyntaxError as error:
        where = start + max(error.offset or 1, 1)
        raise StoreError(f"at character {where}: {error.msg}; expected {_EXPECTED}") from None
    except (MemoryError, RecursionError, ValueError):
        raise StoreError(f"the query cannot be read; expected {_EXPECTED}") from None
    if line.encode()[tree.end_col_offset :].strip(b" )"):
        raise StoreError("the query has a comment (#...), which would hide what follows")
    query = _Parser(line, start).query(tree)
    # Its canonical text must be one that is taken again.
    if _levels(query) > MAX_DEPTH or len(query.canonical()) > MAX_LENGTH:
        raise StoreError(
            f"the query is too long or deep; at most {MAX_LENGTH} characters and {MAX_DEPTH} "
            "levels of and, or, not are allowed, chained comparisons written out"
        )
    return query


def _levels(query: Query) -> int:
    match query:
        case And(parts) | Or(parts):
            return 1 + max(map(_levels, parts), default=-1)
        case Not(part):
            return 1 + _levels(part)
    return 0


_EXPECTED = "an expression such as modality == 'CT' and slices >= 32"


class _Parser:
    """Turns the syntax tree of one text into a query."""

    def __init__(self, text: str, start: int) -> None:
        self._text = text.encode()
        self._start = start
        self._literals = 0

    def query(self, node: ast.expr, depth: int = 0) -> Query:
        if depth > MAX_DEPTH:
            raise self._error(node, f"more than {MAX_DEPTH} levels of and, or, not")
        match node:
            case ast.BoolOp(op=joint, values=values):
                parts = tuple(self.query(value, depth + 1) for value in values)
                if isinstance(joint, ast.And):
                    return _join(And, parts, neutral=TRUE, final=FALSE)
                return _join(Or, parts, neutral=FALSE, final=TRUE)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.query(operand, depth + 1)
            case ast.Compare():
                return self._comparison(node)
            case ast.Name(id=name):
                if self._column(node).kind != "boolean":
                    raise self._error(node, f"{name} is not yes or no; compare it with a value")
                return Condition(name, "==", (True,))
            case ast.Constant(value=bool(value)):
                return TRUE if value else FALSE
        raise self._error(node, f"this is not allowed here; expected {_EXPECTED}")

    def _comparison(self, node: ast.Compare) -> Query:
        query = TRUE
        left = node.left
        for operation, right in zip(node.ops, node.comparators, strict=True):
            query &= self._pair(left, _SYMBOLS[type(operation)], operation, right)
            left = right
        return query

    def _pair(self, left: ast.expr, op: Operator, raw: ast.cmpop, right: ast.expr) -> Query:
        if isinstance(left, ast.Name) == isinstance(right, ast.Name):
            raise self._error(
                left,
                "a comparison needs a column on one side and a value on the other; text stands "
                "in quotes",
            )
        if isinstance(left, ast.Name):
            column, node = self._column(left), right
            if op in {"in", "not in"}:
                if not isinstance(right, ast.Tuple | ast.List):
                    raise self._error(right, f"after {op} stands a list such as ('CT', 'MR')")
                values = tuple(self._literal(item) for item in right.elts)
            else:
                values = (self._literal(right),)
            negated = False
        else:
            column, node, values = self._column(right), left, (self._literal(left),)
            negated = op == "not in"
            op = "contains" if op in {"in", "not in"} else _MIRROR[op]
        if isinstance(raw, ast.Is | ast.IsNot) and values != (None,):
            raise self._error(node, "is goes with None only; use == or !=")
        try:
            found = Condition(column.name, op, values)
        except StoreError as error:
            raise self._error(node, str(error)) from None
        return ~found if negated else found

    def _column(self, node: ast.expr) -> Column:
        if not isinstance(node, ast.Name):
            raise self._error(node, "expected a column")
        try:
            return column_named(node.id)
        except StoreError as error:
            raise self._error(node, f"{error}; text stands in quotes") from None

    def _literal(self, node: ast.expr) -> Value:
        self._literals += 1
        if self._literals > MAX_LITERALS:
            raise self._error(node, f"more than {MAX_LITERALS} values")
        match node:
            case ast.Constant(value=None | str() | int() | float() as value):
                return value
            case ast.UnaryOp(
                op=ast.USub(), operand=ast.Constant(value=int() | float() as value)
            ) if not isinstance(value, bool):
                return -value
        raise self._error(node, "expected a value: text in quotes, a number, True, False or None")

    def _error(self, node: ast.expr, message: str) -> StoreError:
        """Return an error with its place, counted in characters from 1."""
        before = len(self._text[: node.col_offset].decode())
        return StoreError(f"at character {self._start + before + 1}: {message}")


def _join(
    kind: type[And] | type[Or], parts: Iterable[Query], *, neutral: Query, final: Query
) -> Query:
    """Join parts into one level, each once, in one order: the same query is the same text."""
    flat: dict[str, Query] = {}
    for part in parts:
        if part == final:
            return final
        for piece in part.parts if isinstance(part, kind) else (part,):
            flat[piece.canonical()] = piece
    if len(flat) <= 1:
        return next(iter(flat.values()), neutral)
    return kind(tuple(flat[text] for text in sorted(flat)))


def _inner(query: Query) -> str:
    if isinstance(query, Condition):
        return query.canonical()
    return f"({query.canonical()})"


def _written(value: Value) -> str:
    return repr(value.isoformat() if isinstance(value, dt.date) else value)


def _place(value: Any) -> tuple[bool, Any]:
    return (value is not None, 0 if value is None else value)


def _check_operator(column: Column, op: str, values: tuple[Value, ...]) -> None:
    unknown = None in values
    allowed: dict[Kind, tuple[str, ...]] = {
        "text": ("==", "!=", "<", "<=", ">", ">=", "in", "not in", "contains"),
        "identifier": ("==", "!=", "in", "not in"),
        "boolean": ("==", "!=", "in", "not in"),
        "flags": ("contains", "==", "!="),
    }
    if op not in allowed.get(column.kind, ("==", "!=", "<", "<=", ">", ">=", "in", "not in")):
        raise StoreError(f"{column.name} is of kind {column.kind}, which has no {op!r}")
    if unknown and (op in _ORDER or op == "contains"):
        raise StoreError(f"None can be compared by == and != only, not by {op!r}")
    if column.kind == "flags" and op != "contains" and not unknown:
        raise StoreError(f"a flag is asked for as 'tilted' in {column.name}")


def _literal(column: Column, value: Value) -> Value:
    """Return a literal as the column's kind holds it."""
    if value is None:
        return None
    taken = _READ[column.kind](value)
    if taken is None:
        expected = {
            "date": "a date as '2024-03-31'",
            "boolean": "True or False",
            "integer": "a whole number of at most 64 bits",
            "number": "a finite number",
        }.get(column.kind, "text in quotes")
        raise StoreError(f"{column.name} is compared with {expected}, not with {ascii(value)[:60]}")
    return taken


def _as_integer(value: Value) -> Value:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if abs(value) < 2**63 and value == int(value) else None


def _as_number(value: Value) -> Value:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) + 0.0 if math.isfinite(float(value)) else None  # -0.0 is 0.0
    except OverflowError:
        return None


def _as_date(value: Value) -> Value:
    if isinstance(value, dt.date):
        return None if isinstance(value, dt.datetime) else value
    try:
        return dt.date.fromisoformat(str(value)) if _DAY.fullmatch(str(value)) else None
    except ValueError:
        return None


def _as_text(value: Value) -> Value:
    # What no database can hold cannot be searched for either.
    if not isinstance(value, str) or "\0" in value:
        return None
    return value if not any("\ud800" <= letter <= "\udfff" for letter in value) else None


_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_READ: Final[Mapping[Kind, Callable[[Value], Value]]] = MappingProxyType(
    {
        "text": _as_text,
        "identifier": _as_text,
        "flags": _as_text,
        "integer": _as_integer,
        "number": _as_number,
        "date": _as_date,
        "boolean": lambda value: value if isinstance(value, bool) else None,
    }
)


def _holds(op: Operator, values: tuple[Value, ...], value: Any) -> bool:
    if op in {"in", "=="}:
        return value in values
    if value is None:
        return False
    if op in {"not in", "!="}:
        return value not in values
    if op == "contains":
        wanted = str(values[0])
        return wanted in value if isinstance(value, tuple) else fold(wanted) in fold(value)
    return _ORDER[op](value, values[0])
