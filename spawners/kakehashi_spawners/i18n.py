"""Words of the pages in English and Japanese, and the language of a request.

The words stand in ``words/en.json`` and ``words/ja.json``: one flat object each, with the same
keys and the same ``{placeholders}``. Which language a request wants is decided once, when the
request arrives, and kept in a context variable, because JupyterHub renders its pages (error pages
too) in many places that know nothing of languages.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

Language = Literal["en", "ja"]

LANGUAGES: Final[tuple[Language, ...]] = ("en", "ja")
DEFAULT: Final[Language] = "en"
COOKIE: Final = "kakehashi-lang"
_WORDS = Path(__file__).parent / "words"


@dataclass(frozen=True, slots=True)
class Choice:
    """The language of a request.

    Attributes
    ----------
    language : {"en", "ja"}
    known : bool
        Whether the request said so. The proxy asks for error pages without the browser's
        headers; such a page is put right in the browser.
    """

    language: Language
    known: bool


_UNKNOWN: Final = Choice(DEFAULT, known=False)
_current: ContextVar[Choice | None] = ContextVar("kakehashi_language", default=None)


@cache
def catalogue(language: Language) -> dict[str, str]:
    """Return all words of a language, key to text."""
    words: dict[str, str] = json.loads((_WORDS / f"{language}.json").read_text(encoding="utf-8"))
    return words


def translate(key: str, language: Language | None = None, /, **values: Any) -> str:
    """Return the text of a key.

    Parameters
    ----------
    key : str
        Key of the catalogue.
    language : {"en", "ja"}, optional
        The current request's language by default.
    **values
        For the ``{placeholders}`` in the text.

    Raises
    ------
    KeyError
        No such key, or a placeholder without a value.
    """
    text = catalogue(language or current_language())[key]
    return text.format(**values) if values else text


def negotiate(cookie: str | None, accept: str | None) -> Choice:
    """Choose the language of a request.

    Parameters
    ----------
    cookie : str or None
        Value of the cookie ``kakehashi-lang``; what is no known language is ignored.
    accept : str or None
        The header ``Accept-Language``.
    """
    for language in LANGUAGES:
        if cookie == language:
            return Choice(language, known=True)
    best: tuple[float, Language] | None = None
    for part in (accept or "").split(","):
        tag, _, parameter = part.partition(";")
        quality = _quality(parameter)
        primary = tag.strip().lower().partition("-")[0]
        for language in LANGUAGES:
            if primary == language and quality > 0 and (best is None or quality > best[0]):
                best = (quality, language)
    if best is not None:
        return Choice(best[1], known=True)
    return Choice(DEFAULT, known=True) if accept else _UNKNOWN


def _quality(parameter: str) -> float:
    name, _, value = parameter.strip().partition("=")
    if not name:
        return 1.0
    try:
        quality = float(value) if name.strip().lower() == "q" else 0.0
    except ValueError:
        return 0.0
    return quality if 0 <= quality <= 1 else 0.0


def set_current(choice: Choice) -> None:
    """Set the language for the rest of this request's context."""
    _current.set(choice)


def current() -> Choice:
    """Return the language of the current request, and whether the request named it."""
    return _current.get() or _UNKNOWN


def current_language() -> Language:
    """Return the language of the current request (English outside of one)."""
    return current().language
