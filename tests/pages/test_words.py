"""The words: one set of keys in every language, each used, each used key there."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi_spawners import i18n, pages

# Keys that templates and scripts put together from parts.
MADE_UP = (
    r"login\.promise[123](-text)?",
    r"spawn\.data[1234]",
    r"noproject\.do[123]",
    r"error\.(\d{3}|other|unavailable)(-do)?",
    r"pending\.(submitted|queued|preparing|mounted|starting)",
    r"js\.(gpus|hours)-many",
    r"js\.(reason|result|witness)\..*",
    r"js\.step-(done|current|waiting)",
    r"arrivals\.legend-.*",
    r"arrivals\.reason-.*",
)


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def sources() -> str:
    files = [*pages.TEMPLATES.glob("*.html"), pages.STATIC / "portal.js"]
    files.append(pages.TEMPLATES.parent / "pages.py")
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_every_language_has_the_same_keys_and_placeholders() -> None:
    english = i18n.catalogue("en")
    for language in i18n.LANGUAGES:
        words = i18n.catalogue(language)
        assert list(words) == list(english), language
        for key, text in words.items():
            assert text.strip() == text, key
            assert text, key
            assert placeholders(text) == placeholders(english[key]), key


def test_japanese_is_japanese() -> None:
    kana_or_kanji = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
    bare = [key for key, text in i18n.catalogue("ja").items() if not kana_or_kanji.search(text)]
    assert bare == []


def test_every_key_that_pages_name_exists_and_every_key_is_named() -> None:
    text = sources()
    words = i18n.catalogue("en")
    named = set(re.findall(r"""["']((?:[a-z]+)\.[a-z0-9-]+)["']""", text))
    prefixes = {key.partition(".")[0] for key in words}
    missing = {
        key
        for key in named
        if key.partition(".")[0] in prefixes
        and key not in words
        and not key.endswith((".html", ".css", ".js", ".svg"))
    }
    assert missing == set()
    unused = {
        key
        for key in words
        if key not in named and not any(re.fullmatch(pattern, key) for pattern in MADE_UP)
    }
    assert unused == set()


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"login\.nothing"):
        i18n.translate("login.nothing")
    with pytest.raises(KeyError, match="version"):
        i18n.translate("page.version", "en", other=1)


@pytest.mark.parametrize(
    ("cookie", "accept", "language", "known"),
    [
        (None, None, "en", False),
        (None, "", "en", False),
        (None, "fr", "en", True),
        (None, "ja", "ja", True),
        (None, "ja-JP,ja;q=0.9,en;q=0.8", "ja", True),
        (None, "en-GB;q=0.5, ja;q=0.6", "ja", True),
        (None, "ja;q=0, en;q=0.1", "en", True),
        (None, "ja;q=nan, en;q=0.1", "en", True),
        ("en", "ja", "en", True),
        ("ja", None, "ja", True),
        ("xx", "ja", "ja", True),
    ],
)
def test_language_of_a_request(
    cookie: str | None, accept: str | None, language: str, known: bool
) -> None:
    assert i18n.negotiate(cookie, accept) == i18n.Choice(language, known)


@given(cookie=st.none() | st.text(), accept=st.none() | st.text())
def test_no_header_breaks_the_choice_of_language(cookie: str | None, accept: str | None) -> None:
    assert i18n.negotiate(cookie, accept).language in i18n.LANGUAGES


def test_outside_of_a_request_it_is_english() -> None:
    assert i18n.current() == i18n.Choice("en", known=False)
