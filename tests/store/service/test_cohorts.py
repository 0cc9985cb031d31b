"""Cohorts over HTTP and in Python: whose they are, what is frozen, and what is seen of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from kakehashi import cohort as module
from kakehashi.cohort import (
    Client,
    Cohort,
    FrozenCohort,
    NoAccessError,
    NoCatalogueError,
    NotAQueryError,
    UnknownError,
)
from kakehashi.config import Config
from kakehashi.errors import AuditError
from kakehashi.secret import Secret
from kakehashi.store.cohorts import Cohorts
from kakehashi.store.permission import permission
from kakehashi.store.query import matches
from kakehashi.store.service.parts import AuditEvent
from kakehashi.store.view import build_view
from tests.store.conftest import DATA, StoreUnderTest, settings

from .serving import PROJECTS, TODAY, project, running, series


def client(service, name: str = "all", person: str = "sato") -> Client:
    token = service.token(name, person)
    return Client(f"http://127.0.0.1:{service.port}", lambda: Secret(token))


def saved(asker, name="lung", **body):
    return asker.post("cohorts", name=name, **body).ok()


# Over HTTP


def test_a_cohort_is_its_owners_until_it_is_shared_and_never_another_projects(on_both):
    owner, colleague = on_both.asker("all", "sato"), on_both.asker("all", "abe")
    stranger = on_both.asker("part", "sato")
    cohort = saved(owner, query="slices>31", selections={"kernel": [None, "FC51"]})
    assert cohort["query"] == "slices > 31"
    assert cohort["selections"] == {"kernel": [None, "FC51"]}
    path = f"cohorts/{cohort['id']}"
    owner.post(f"{path}/freeze").ok()
    unknown = colleague.get(f"cohorts/{'0' * 32}")

    def closed(asker) -> bool:
        answers = [
            asker.get(path),
            asker.get(f"{path}/versions/1"),
            asker.get(f"{path}/diff?a=1&b=1"),
            asker.post(f"{path}/freeze"),
            asker.post(f"{path}/share"),
        ]
        listed = [one["id"] for one in asker.get("cohorts").ok()["cohorts"]]
        return {(answer.status, answer.body) for answer in answers} == {
            (404, unknown.body)
        } and cohort["id"] not in listed

    assert closed(colleague)
    assert closed(stranger)
    assert owner.post(f"{path}/share").ok()["shared"]
    assert colleague.get(path).ok()["owner"] == "sato"
    refused = colleague.post(f"{path}/share")
    assert (refused.status, refused.json["error"]) == (403, "not-owner")
    assert closed(stranger)


def test_the_same_list_frozen_twice_is_one_version_with_one_hash(on_both):
    asker = on_both.asker("all")
    path = f"cohorts/{saved(asker, query='slices >= 300')['id']}"
    one, two = asker.post(f"{path}/freeze").ok(), asker.post(f"{path}/freeze").ok()
    assert one == two
    rows = sorted((row for row in on_both.rows if row.slices >= 300), key=lambda r: r.series_uid)
    text = json.dumps([[row.series_uid, row.blocks] for row in rows], separators=(",", ":"))
    assert one["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert one["count"] == len(rows) > 10
    found = asker.get(f"{path}/versions/1").ok()
    assert found["series"] == [row.series_uid for row in rows]
    for number in ("0", "2", "x", "-1", "01", "9" * 30):
        assert asker.get(f"{path}/versions/{number}").status == 404


def test_a_version_stays_when_the_catalogue_grows_and_the_difference_is_told(on_both):
    asker = on_both.asker("all")
    path = f"cohorts/{saved(asker, query='slices >= 300')['id']}"
    first = asker.post(f"{path}/freeze").ok()
    more = [
        dataclasses.replace(row, series_uid=f"1.5.{n}", slices=999)
        for n, row in enumerate(series(5, seed=9))
    ]
    for row in more:
        on_both.catalogue.add_series(row)
    on_both.index.add_segment([more])
    second = asker.post(f"{path}/freeze").ok()
    assert (first["version"], second["version"]) == (1, 2)
    assert asker.get(f"{path}/versions/1").ok()["sha256"] == first["sha256"]
    diff = asker.get(f"{path}/diff?a=1&b=2").ok()
    assert diff == {
        "only_a": [],
        "only_b": sorted(row.series_uid for row in more),
        "both": first["count"],
    }
    assert [one["version"] for one in asker.get(path).ok()["versions"]] == [1, 2]


def test_the_manifest_is_the_one_of_a_projects_view(tmp_path):
    config = Config.model_validate(settings(tmp_path))
    with running(config, []) as service:
        store = StoreUnderTest(config, service.catalogue, tmp_path)
        store.add(DATA / "mr_adc", DATA / "ct_tilted")
        service.index.add_segment([service.catalogue.list_series()])
        built = build_view(config, "everything", service.catalogue)
        view = json.loads((tmp_path / "views" / "everything" / "manifest.json").read_bytes())
        asker = service.asker("all")
        path = f"cohorts/{saved(asker)['id']}"
        frozen = asker.post(f"{path}/freeze").ok()
        found = asker.get(f"{path}/versions/1").ok()["manifest"]
        assert frozen["sha256"] == built.cohort.sha256
        assert found == view | {"project": "all"}


def test_of_a_frozen_list_only_what_is_permitted_now_is_seen_and_no_more_is_said(service):
    asker = service.asker("all")
    path = f"cohorts/{saved(asker)['id']}"
    whole = asker.post(f"{path}/freeze").ok()
    narrow = project("all", tier=1, cohort={"modality": ["CT"]})
    object.__setattr__(service.parts, "project", {"all": narrow}.get)
    granted = permission(narrow, TODAY)
    seen = sorted(row.series_uid for row in service.rows if matches(granted, row))
    found = asker.get(f"{path}/versions/1").ok()
    assert found["series"] == seen
    assert found["count"] == len(seen) < whole["count"]
    assert [file["series"]["series_uid"] for file in found["manifest"]["files"]] == seen
    assert (found["tombstones"], found["sha256"]) == (0, whole["sha256"])
    assert str(whole["count"]) not in json.dumps({k: found[k] for k in ("count", "tombstones")})
    assert asker.get(path).ok()["count"] == len(seen)
    assert asker.get(f"{path}/diff?a=1&b=1").ok()["both"] == len(seen)


def test_who_withdraws_leaves_a_tombstone(service):
    asker = service.asker("all")
    path = f"cohorts/{saved(asker)['id']}"
    whole = asker.post(f"{path}/freeze").ok()
    gone = [row.series_uid for row in service.rows if row.patient_id == "p1"]
    service.catalogue.withdraw("p1", "operator", "wish")
    service.index.withdraw(gone)
    affected = service.cohorts.withdraw(gone)
    assert [(one.version, one.withdrawn) for one in affected] == [(1, len(gone))]
    found = asker.get(f"{path}/versions/1").ok()
    assert found["tombstones"] == len(gone)
    assert found["sha256"] == whole["sha256"]
    assert not set(gone) & set(found["series"])
    assert not any(uid in json.dumps(found) for uid in gone)
    assert asker.post(f"{path}/freeze").ok()["version"] == 2


def test_a_list_that_is_frozen_while_somebody_withdraws_does_not_hold_them(service, monkeypatch):
    asker = service.asker("all")
    path = f"cohorts/{saved(asker)['id']}"
    gone = service.rows[0].series_uid
    real = Cohorts.withdrawals

    def withdrawn_in_between(cohorts):
        seen = real(cohorts)
        service.cohorts.withdraw([gone])
        return seen

    monkeypatch.setattr(Cohorts, "withdrawals", withdrawn_in_between)
    answer = asker.post(f"{path}/freeze")
    assert (answer.status, answer.json["error"]) == (409, "changed")
    assert asker.get(path).ok()["versions"] == []


# In Python


@pytest.mark.parametrize(
    ("part", "name", "ask"),
    [
        ("index", "count", lambda asker, _: asker.post("cohorts", name="late")),
        ("index", "count", lambda asker, path: asker.post(f"{path}/freeze")),
        ("cohorts", "find", lambda asker, path: asker.post(f"{path}/freeze")),
        ("cohorts", "find", lambda asker, path: asker.post(f"{path}/share")),
        ("cohorts", "visible", lambda asker, _: asker.get("cohorts")),
    ],
)
def test_who_loses_the_right_meanwhile_changes_nothing_and_sees_nothing(
    service, monkeypatch, part, name, ask
):
    asker = service.asker("all")
    path = f"cohorts/{saved(asker)['id']}"
    before = asker.get("cohorts").ok(), asker.get(path).ok()
    looked_at = getattr(service, part)
    whole = getattr(looked_at, name)

    def revoked(*given, **named):
        service.live.clear()
        return whole(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(looked_at, name, revoked)
        answer = ask(asker, path)
    assert (answer.status, answer.json["error"]) == (403, "no-access")
    later = service.asker("all")
    assert (later.get("cohorts").ok(), later.get(path).ok()) == before


def test_no_list_is_frozen_that_does_not_stand_in_the_trail(tmp_path):
    full: list[str] = []

    def audit(event: AuditEvent) -> None:
        if event.kind in full:
            raise AuditError("the disk is full")

    with running(Config.model_validate(settings(tmp_path)), series(6), audit=audit) as service:
        asker = service.asker("all")
        path = f"cohorts/{saved(asker)['id']}"
        full.append("freeze")
        assert asker.post(f"{path}/freeze").status == 500
        assert asker.get(path).ok()["versions"] == []
        full.clear()
        assert asker.post(f"{path}/freeze").ok()["version"] == 1


def test_counting_choosing_and_joining(service):
    ask = client(service)
    ct = Cohort("modality == 'CT'", client=ask)
    thick = Cohort("slices >= 300 or slices == 1", client=ask)
    both = ct & thick
    expect = sorted(
        row.series_uid
        for row in service.rows
        if row.modality == "CT" and (row.slices >= 300 or row.slices == 1)
    )
    assert both.series() == expect
    assert both.count() == len(expect) > 0
    assert (ct & Cohort(client=ask)).count() == ct.count()
    assert (Cohort(client=ask) & Cohort()).count() == len(service.rows)
    assert (Cohort("modality == 'MR'", client=ask) & ct).count() == 0


def test_an_expression_cannot_leave_its_brackets(service):
    narrow = Cohort("modality == 'CT'", client=client(service))
    for text in ("True) or (True", "True #", "slices > 0) or (True #"):
        with pytest.raises(NotAQueryError, match="correct the query"):
            narrow & Cohort(text)
    joined = narrow & Cohort("slices > 0 or True")
    assert joined.series() == narrow.series()


def test_values_chosen_of_facets_are_joined_by_and(service):
    ask = client(service)
    one = Cohort(selections={"modality": ["CT", "MR"]}, client=ask)
    two = Cohort(selections={"modality": ["MR", "PT"], "sex": [None]}, client=ask)
    assert (one & two).series() == sorted(
        row.series_uid for row in service.rows if row.modality == "MR" and row.sex is None
    )
    assert (one & Cohort(selections={"modality": ["PT"]})).count() == 0


def test_facets_and_tables(service):
    import pandas as pd

    cohort = Cohort("modality == 'CT'", client=client(service))
    facets = cohort.facets(["vendor", "kernel"])
    assert sum(facets["kernel"].values()) == cohort.count()
    assert None in facets["kernel"]
    table = cohort.table(["series_uid", "age", "flags"])
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == ["series_uid", "age", "flags"]
    assert sorted(table["series_uid"]) == cohort.series()
    empty = Cohort("False", client=client(service)).table(["age"])
    assert (len(empty), list(empty.columns)) == (0, ["age"])


def test_without_pandas_a_table_is_a_list(service, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = Cohort("modality == 'CT'", client=client(service)).table(["modality"])
    assert {row["modality"] for row in rows} == {"CT"}


def test_freezing_in_python(service):
    ask = client(service)
    frozen = Cohort("slices >= 300", client=ask).freeze("lung study")
    assert frozen == Cohort("slices >= 300", client=ask).freeze("lung study")
    assert frozen.complete
    assert frozen.series == tuple(Cohort("slices >= 300", client=ask).series())
    line = frozen.citation()
    for part in ("lung study", "version 1", frozen.sha256, f"{len(frozen.series)} series", "all"):
        assert part in line
    other = Cohort("slices >= 400", client=ask).freeze("lung study")
    assert (other.id, other.version) == (frozen.id, 2)
    difference = frozen.diff(other)
    assert set(difference.only_here) == {r.series_uid for r in service.rows if r.slices == 300}
    assert difference.only_there == ()
    assert FrozenCohort.open(frozen.id, 1, client=ask) == frozen
    parts = frozen.split()
    assert sorted(parts.train + parts.val + parts.test) == list(frozen.series)


def test_a_list_that_is_not_whole_any_more_is_not_cited_as_whole(service):
    ask = client(service)
    frozen = Cohort(client=ask).freeze("all")
    service.catalogue.withdraw("p1", "operator", "wish")
    service.cohorts.withdraw([row.series_uid for row in service.rows if row.patient_id == "p1"])
    later = FrozenCohort.open(frozen.id, 1, client=ask)
    assert not later.complete
    assert later.tombstones > 0
    assert "no longer complete" in later.citation()
    assert later.sha256 == frozen.sha256


def test_what_was_packed_anew_since_is_named_and_not_taken_for_what_was_frozen(service):
    ask = client(service)
    frozen = Cohort(client=ask).freeze("all")
    assert frozen.changed == ()
    late, hidden = service.rows[3], service.rows[4]
    for row in (late, hidden):
        service.catalogue.replace_series(dataclasses.replace(row, slices=9, blocks="f" * 64))
    later = FrozenCohort.open(frozen.id, 1, client=ask)
    assert later.changed == tuple(sorted((late.series_uid, hidden.series_uid)))
    assert set(later.series) == set(frozen.series) - set(later.changed)
    assert (later.complete, later.sha256) == (False, frozen.sha256)
    again = Cohort(client=ask).freeze("all")
    assert (again.version, again.series, again.changed) == (2, frozen.series, ())
    # Of what the project may not see now, nothing is said.
    only = project("all", tier=3, cohort={"series": [late.series_uid]})
    object.__setattr__(service.parts, "project", {"all": only}.get)
    assert FrozenCohort.open(frozen.id, 1, client=ask).changed == (late.series_uid,)


def test_the_split_of_a_cohort_is_by_patient(service):
    parts = Cohort(client=client(service)).split()
    patient = {row.series_uid: row.patient_id for row in service.rows}
    people = [{patient[uid] for uid in part} for part in (parts.train, parts.val, parts.test)]
    assert sorted(parts.train + parts.val + parts.test) == sorted(patient)
    assert not people[0] & people[1]
    assert not people[1] & people[2]
    assert not people[0] & people[2]


def test_the_token_is_asked_for_at_every_call(service):
    tokens = iter([service.token("all"), service.token("none"), "expired"])
    ask = Client(f"http://127.0.0.1:{service.port}", lambda: Secret(next(tokens)))
    cohort = Cohort(client=ask)
    assert cohort.count() == len(service.rows)
    assert cohort.count() == 0
    with pytest.raises(NoAccessError, match="start a new session"):
        cohort.count()


def test_errors_say_what_to_do(service, tmp_path):
    ask = client(service)
    with pytest.raises(NotAQueryError, match=r"did you mean modality.*correct the query"):
        Cohort("modalty == 'CT'", client=ask).count()
    with pytest.raises(NotAQueryError, match="not a column"):
        Cohort(client=ask).table(["path"])
    with pytest.raises(UnknownError, match="no such cohort"):
        FrozenCohort.open("0" * 32, 1, client=ask)
    service.live.clear()
    with pytest.raises(NoAccessError):
        Cohort(client=ask).count()
    for address in ("http://127.0.0.1:1", f"unix:{tmp_path}/none.sock"):
        with pytest.raises(NoCatalogueError, match="does not answer"):
            Cohort(client=Client(address, lambda: Secret("x"))).count()
    with pytest.raises(module.CatalogueError, match="no address"):
        Client("ftp://x", lambda: Secret("x"))


def test_outside_a_session_there_is_no_catalogue(monkeypatch, tmp_path):
    monkeypatch.setenv("KAKEHASHI_SESSION", str(tmp_path / "none.json"))
    with pytest.raises(NoCatalogueError, match="inside a"):
        Cohort().count()


def test_inside_a_session_the_hub_is_asked_with_the_token_of_the_lease(
    service, monkeypatch, tmp_path
):
    token = service.token("part")
    name = "f" * 32
    (tmp_path / "session.json").write_text(
        json.dumps(
            {
                "session": name,
                "person": "sato",
                "project": "part",
                "site": "s",
                "ends_at": "2099-01-01T00:00:00Z",
                "manifest": {"path": "/manifest.json", "sha256": "0" * 64},
                "view": None,
                "work": None,
                "socket": "/x",
                "work_socket": "/y",
                "software": "0",
            }
        )
    )
    lease = {
        "expires_at": "2099-01-01T00:00:00Z",
        "ends_at": "2099-01-01T00:00:00Z",
        "state": "live",
        "message": "",
    }
    monkeypatch.setenv("KAKEHASHI_SESSION", str(tmp_path / "session.json"))
    monkeypatch.setenv(module.HUB, f"http://127.0.0.1:{service.port}/hub/api/")
    (tmp_path / "lease.json").write_text(json.dumps(lease | {"catalogue": token}))
    ask = Client.of_session()
    assert ask._parts.path == f"/hub/api/kakehashi/catalogue/{name}"
    assert ask._token_source().reveal() == token
    (tmp_path / "lease.json").write_text(json.dumps(lease | {"catalogue": None}))
    with pytest.raises(NoCatalogueError, match="no catalogue service"):
        ask._token_source()


def test_a_unix_socket_leads_to_the_service_too(service, tmp_path):
    import socket
    import threading

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "catalogue.sock"))
    listener.listen()

    def relay() -> None:
        inner, _ = listener.accept()
        with inner, socket.create_connection(("127.0.0.1", service.port)) as outer:

            def back() -> None:
                while data := outer.recv(65536):
                    inner.sendall(data)

            thread = threading.Thread(target=back)
            thread.start()
            while data := inner.recv(65536):
                outer.sendall(data)
            outer.shutdown(socket.SHUT_WR)
            thread.join()

    thread = threading.Thread(target=relay)
    thread.start()
    token = service.token("all")
    ask = Client(f"unix:{tmp_path}/catalogue.sock", lambda: Secret(token))
    assert Cohort(client=ask).count() == len(service.rows)
    thread.join(30)
    listener.close()


def test_a_node_needs_nothing_but_the_standard_library_for_it():
    code = (
        "import sys; import kakehashi.cohort; "
        "print([m for m in ('numpy', 'pandas', 'pyarrow', 'pydantic', 'tornado', 'sqlalchemy', "
        "'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_room_for_another_list_is_said_and_is_no_matter_of_waiting(service, monkeypatch):
    from kakehashi.store import cohorts

    asker = service.asker("all")
    saved = asker.post("cohorts", name="lists").ok()
    asker.post(f"cohorts/{saved['id']}/freeze").ok()
    asker.post("cohorts", name="lists", query="slices >= 32").ok()
    monkeypatch.setattr(cohorts, "MOST_VERSIONS", 1)
    answer = asker.post(f"cohorts/{saved['id']}/freeze")
    assert (answer.status, answer.json["error"]) == (507, "full")
    assert "'lists' was frozen 1 times already" in answer.json["message"]
    assert "Retry-After" not in answer.headers


def test_projects_of_these_tests_are_as_thought():
    assert set(PROJECTS) == {"all", "last", "none", "over", "part"}
