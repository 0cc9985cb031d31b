"""A token is good for one session, one project, and a short time; nothing else makes one."""

from __future__ import annotations

import base64
import json
import multiprocessing
import stat

import pytest

from kakehashi.errors import ConfigError, RefusedError, StoreError
from kakehashi.secret import Secret
from kakehashi.store.service.tokens import LONGEST_LIFE_S, Tokens, load_key

SESSION = "0123456789abcdef" * 2
NOW = 1_800_000_000.0


def tokens(now: float = NOW, key: str = "key") -> Tokens:
    return Tokens(Secret(key), lambda: now)


def issued(**changed) -> Secret:
    given = {"session": SESSION, "project": "lung", "person": "佐藤", "expires": NOW + 600}
    return tokens().issue(**(given | changed))


def test_a_token_says_what_it_was_made_for():
    claims = tokens(NOW + 599).verify(issued())
    assert (claims.session, claims.project, claims.person) == (SESSION, "lung", "佐藤")
    assert claims.expires == NOW + 600


@pytest.mark.parametrize("now", [NOW + 600, NOW + 10_000, NOW - 2])
def test_it_is_good_from_its_making_to_its_end(now):
    with pytest.raises(RefusedError, match="not a valid token") as caught:
        tokens(now).verify(issued())
    assert caught.value.code == "credential"


def test_no_token_lasts_longer_than_a_lease():
    long = issued(expires=NOW + 10**6)
    assert tokens(NOW + LONGEST_LIFE_S - 1).verify(long)
    with pytest.raises(RefusedError):
        tokens(NOW + LONGEST_LIFE_S).verify(long)


def test_every_change_of_a_character_is_seen():
    text = issued().reveal()
    for place in range(len(text)):
        for other in "Ax-_.":
            if other == text[place]:
                continue
            with pytest.raises(RefusedError):
                tokens().verify(Secret(text[:place] + other + text[place + 1 :]))


@pytest.mark.parametrize(
    "text", ["", ".", "a.b", "a" * 5000, "é.é", "\ud800.a", "a.b.c", issued().reveal() + "="]
)
def test_what_is_no_token_is_refused_in_the_same_way(text):
    with pytest.raises(RefusedError, match="not a valid token"):
        tokens().verify(Secret(text))


def test_another_key_another_purpose_and_no_key_make_no_token():
    with pytest.raises(RefusedError):
        tokens(key="other").verify(issued())
    payload, _, code = issued().reveal().partition(".")
    said = json.loads(base64.urlsafe_b64decode(payload + "=="))
    forged = base64.urlsafe_b64encode(json.dumps(said | {"project": "all"}).encode()).rstrip(b"=")
    with pytest.raises(RefusedError):
        tokens().verify(Secret(f"{forged.decode()}.{code}"))


def test_what_cannot_be_a_session_or_lies_in_the_past_gets_none():
    for changed in ({"session": "x"}, {"project": "../x"}, {"expires": NOW - 1}):
        with pytest.raises(StoreError):
            issued(**changed)


def test_tokens_and_keys_do_not_show(tmp_path):
    key = load_key(tmp_path / "catalogue")
    assert key.reveal() not in f"{key} {key!r} {Tokens(key)!r} {issued()!r}"


def test_the_key_is_made_once_and_closed_to_others(tmp_path):
    path = tmp_path / "catalogue"
    assert load_key(path) == load_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["catalogue"]
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_key(path)


def _load(path, queue):
    queue.put(load_key(path).reveal())


def test_all_who_come_at_once_get_one_key(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    path = tmp_path / "catalogue"
    processes = [context.Process(target=_load, args=(path, queue)) for _ in range(8)]
    for process in processes:
        process.start()
    keys = {queue.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert len(keys) == 1


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be made"):
        load_key(tmp_path / "none" / "catalogue")
