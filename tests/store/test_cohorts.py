"""Cohorts are kept the same on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import hashlib
import json
import threading

import pytest

from kakehashi.errors import StoreError
from kakehashi.store import cohorts as module
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.cohorts import Cohorts, TooMuchFrozenError, WithdrawnMeanwhileError
from kakehashi.store.service import records

A, B, C = (("1.2.1", "a" * 64), ("1.2.2", "b" * 64), ("1.2.3", "c" * 64))


@pytest.fixture
def cohorts(database):
    records.folder(database.need_store().root).mkdir()
    opened = Cohorts.open(database.need_store())
    yield opened
    opened.close()


def save(cohorts, name="lung", owner="sato", project="ct", query="slices >= 32", **selections):
    return cohorts.save(project=project, owner=owner, name=name, query=query, selections=selections)


def freeze(cohorts, cohort, *members):
    return cohorts.freeze(cohort, members, by="sato", withdrawals=cohorts.withdrawals())


def test_a_cohort_comes_back_as_it_was(cohorts, database):
    saved = save(cohorts, name="肺 1", query="description == '造影'", sex=["M", "F", "F"])
    assert saved.selections == {"sex": ["F", "M"]}
    assert cohorts.find(saved.id, "ct", "sato") == saved
    again = Cohorts.open(database.need_store())
    assert again.visible("ct", "sato") == [saved]
    again.close()


def test_values_of_any_kind_can_be_chosen(cohorts):
    saved = save(cohorts, tier=[2, 1], contrast=[True], kernel=[None, "FC51"], kvp=[120.0])
    assert saved.selections == {
        "contrast": [True],
        "kernel": [None, "FC51"],
        "kvp": [120.0],
        "tier": [1, 2],
    }


def test_a_name_is_its_owners_in_a_project_and_can_get_another_query(cohorts):
    first = save(cohorts)
    frozen = freeze(cohorts, first, A)
    second = save(cohorts, query="slices >= 64")
    assert (second.id, second.query) == (first.id, "slices >= 64")
    assert cohorts.frozen(first.id, 1) == frozen
    assert frozen.query == "slices >= 32"
    assert len({save(cohorts, owner="abe").id, save(cohorts, project="mr").id, first.id}) == 3


def test_others_of_the_project_see_a_cohort_when_it_is_shared_and_other_projects_never(cohorts):
    saved = save(cohorts)
    assert cohorts.find(saved.id, "ct", "abe") is None
    assert cohorts.visible("ct", "abe") == []
    assert not cohorts.share(saved.id, "abe")
    assert cohorts.find(saved.id, "ct", "abe") is None
    assert cohorts.share(saved.id, "sato")
    assert cohorts.find(saved.id, "ct", "abe").shared
    assert [found.id for found in cohorts.visible("ct", "abe")] == [saved.id]
    assert cohorts.find(saved.id, "mr", "sato") is None
    assert cohorts.visible("mr", "sato") == []


def test_a_project_cannot_fill_the_record(cohorts, monkeypatch):
    monkeypatch.setattr(module, "MOST_COHORTS", 2)
    save(cohorts, "a")
    save(cohorts, "b")
    with pytest.raises(StoreError, match="2 cohorts already"):
        save(cohorts, "c")
    save(cohorts, "b", query="True")
    save(cohorts, "c", project="mr")


def test_the_same_list_is_the_same_version_with_the_hash_of_a_view(cohorts):
    saved = save(cohorts)
    one = freeze(cohorts, saved, A, B)
    text = json.dumps([list(A), list(B)], separators=(",", ":"))
    assert one.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert freeze(cohorts, saved, A, B) == one
    assert freeze(cohorts, saved, A, B, C).version == 2
    assert freeze(cohorts, saved, A, ("1.2.2", "d" * 64)).version == 3
    assert [v.version for v in cohorts.versions(saved.id)] == [1, 2, 3]
    assert cohorts.frozen(saved.id, 1).members == (A, B)
    assert cohorts.frozen(saved.id, 4) is None
    assert cohorts.frozen("0" * 32, 1) is None
    assert freeze(cohorts, save(cohorts, "empty")).members == ()


def test_what_is_withdrawn_leaves_a_tombstone_and_the_hash_stays(cohorts):
    lung, liver = save(cohorts), save(cohorts, "liver")
    before = freeze(cohorts, lung, A, B, C)
    freeze(cohorts, lung, A, B)
    freeze(cohorts, liver, B)
    affected = cohorts.withdraw(["1.2.1", "1.2.3", "9"])
    assert [(one.name, one.version, one.withdrawn, one.project) for one in affected] == [
        ("lung", 1, 2, "ct"),
        ("lung", 2, 1, "ct"),
    ]
    after = cohorts.frozen(lung.id, 1)
    assert (after.members, after.tombstones, after.sha256) == ((B,), 2, before.sha256)
    assert cohorts.frozen(lung.id, 2).tombstones == 1
    assert cohorts.frozen(liver.id, 1).tombstones == 0
    again = cohorts.withdraw(["1.2.1", "1.2.3"])
    assert again == affected  # also when it was cut off, and is repeated
    assert cohorts.frozen(lung.id, 1) == after
    assert cohorts.withdraw(["8"]) == []
    # What the same query gives now is another list.
    assert freeze(cohorts, lung, B).version == 3


def test_nothing_of_a_withdrawn_series_is_left_but_the_hash_of_its_entry(cohorts, database):
    lung = save(cohorts)
    freeze(cohorts, lung, A, B)
    cohorts.withdraw([A[0]])
    import sqlalchemy as sa

    with cohorts._engine.connect() as connection:
        tables = sa.inspect(connection).get_table_names()
        for table in [name for name in tables if "cohort" in name]:
            for row in connection.execute(sa.text(f"SELECT * FROM {table}")):
                for value in row:
                    plain = module._unpack(value) if isinstance(value, bytes) else str(value)
                    assert A[0] not in str(plain)
        entries = connection.execute(sa.text("SELECT entry FROM cohort_tombstones")).scalars().all()
    assert entries == [hashlib.sha256(A[0].encode()).hexdigest()]


def test_a_list_made_before_a_withdrawal_is_refused_after_it(cohorts):
    saved = save(cohorts)
    seen = cohorts.withdrawals()
    cohorts.withdraw([A[0]])
    with pytest.raises(WithdrawnMeanwhileError, match="freeze again"):
        cohorts.freeze(saved, [A], by="sato", withdrawals=seen)
    assert cohorts.versions(saved.id) == []


def test_many_who_freeze_at_once_get_one_version_each_list(cohorts):
    saved = save(cohorts)
    failures = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                freeze(cohorts, saved, A, (f"2.{number}", "e" * 64))
        except StoreError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    versions = cohorts.versions(saved.id)
    assert [version.version for version in versions] == list(range(1, len(versions) + 1))
    assert len({version.sha256 for version in versions}) == 4


def test_cohorts_and_catalogue_live_in_one_database(cohorts, database):
    catalogue = Catalogue.open(database.need_store())
    assert catalogue.cohort("ct") is None
    catalogue.close()
    assert save(cohorts).name == "lung"


def test_a_missing_folder_is_a_clear_error(database):
    if database.need_store().database is None:
        with pytest.raises(StoreError, match="kakehashi store init"):
            Cohorts.open(database.need_store())


def test_a_cohort_has_so_many_versions_and_a_project_so_much_room(cohorts, monkeypatch):
    monkeypatch.setattr(module, "MOST_VERSIONS", 2)
    saved, other = save(cohorts), save(cohorts, name="other")
    freeze(cohorts, saved, A)
    second = freeze(cohorts, saved, A, B)
    with pytest.raises(TooMuchFrozenError, match=r"'lung' was frozen 2 times"):
        freeze(cohorts, saved, A, B, C)
    assert freeze(cohorts, saved, A, B) == second  # the same list is no new one
    assert [one.version for one in cohorts.versions(saved.id)] == [1, 2]
    assert freeze(cohorts, other, C).version == 1
    monkeypatch.setattr(module, "MOST_BYTES", 1)
    with pytest.raises(TooMuchFrozenError, match="'ct' take up all"):
        freeze(cohorts, other, A)
    room = sum(len(module._pack(one)) for one in ([A], [A, B], [C]))
    monkeypatch.setattr(module, "MOST_BYTES", room + 5)
    with pytest.raises(TooMuchFrozenError):
        freeze(cohorts, other, A)
    assert freeze(cohorts, save(cohorts, project="mr"), A).version == 1  # each has its own room
    monkeypatch.setattr(module, "MOST_BYTES", 2 * room)
    assert freeze(cohorts, other, A).version == 2
