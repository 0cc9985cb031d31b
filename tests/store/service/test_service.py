"""The service on a real socket: who may ask, what is refused, and what its answers are."""

# ruff: noqa: RUF001 - full-width letters are what is tested

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import re
import shutil
import threading
from collections import Counter

import jsonschema
import numpy as np
import pyarrow as pa
import pytest

from kakehashi.config import Config
from kakehashi.secret import Secret
from kakehashi.store.catalogue import Kept, Series
from kakehashi.store.layout import blocks_path
from kakehashi.store.query import COLUMNS, value_of
from kakehashi.store.service import models
from kakehashi.store.service.access import row_of
from kakehashi.store.service.openapi import document
from kakehashi.store.service.parts import AuditEvent
from kakehashi.store.service.routes import ROUTES
from kakehashi.store.service.thumbnail import window
from kakehashi.store.service.tokens import Tokens
from kakehashi.store.service.work import Limiter, Workers
from tests.store.conftest import settings

from .serving import KEY, running, series

ARROW = "application/vnd.apache.arrow.stream"


def config(tmp_path):
    return Config.model_validate(settings(tmp_path))


# Who may ask


def test_without_a_good_token_there_is_no_answer_whatever_is_asked(service):
    good = service.token("all")
    late = Tokens(KEY, lambda: 1.0).issue("a" * 32, "all", "sato", 2.0**40).reveal()
    forged = Tokens(Secret("other"), lambda: 2.0**31).issue("a" * 32, "all", "sato", 2.0**40)
    head, _, tail = good.partition(".")
    for token in ("", "x", late, forged.reveal(), f"{head}.{tail[::-1]}", good + "x", "a" * 5000):
        asker = service.asker("all", token=token or "-")
        for method, path in (
            ("POST", "/v1/facets"),
            ("GET", "/v1/openapi.json"),
            ("GET", "/nowhere"),
            ("DELETE", "/v1/cohorts"),
        ):
            answer = asker.ask(method, path, {} if method == "POST" else None)
            assert (answer.status, answer.json["error"]) == (401, "credential")
    for value in ("Basic x", f"bearer {good}", good):
        answer = service.asker("all").ask("GET", "/v1/cohorts", headers={"Authorization": value})
        assert answer.status == 401
    assert service.asker("all", token=good).get("cohorts").status == 200


def test_a_session_that_ended_has_no_access_at_once(service):
    asker = service.asker("all")
    assert asker.get("cohorts").status == 200
    service.live.clear()
    answer = asker.get("cohorts")
    assert (answer.status, answer.json) == (
        403,
        {"error": "no-access", "message": "this session has no access"},
    )


def test_a_project_that_there_is_not_has_no_access_and_looks_the_same(service):
    stranger = service.asker("ghost")
    first = stranger.get("cohorts")
    service.live.clear()
    ended = service.asker("all", token=service.asker("all").token)
    service.live.clear()
    assert first.status == 403
    assert ended.get("cohorts").body == first.body


def test_a_token_of_another_session_shows_the_other_sessions_project(service):
    asker = service.asker("part")
    asker.token = service.token("none")
    assert asker.post("facets").ok()["count"] == 0


# What every answer has


def test_no_answer_may_be_kept_by_anybody(service):
    asker = service.asker("all")
    answers = [
        asker.post("facets"),
        asker.post("facets", query="("),
        asker.get("cohorts"),
        asker.get("series/1.2"),
        asker.get("nothing"),
        asker.ask("PUT", "/v1/facets"),
        asker.post("export", columns=["series_uid"]),
        service.asker("all", token="x").get("cohorts"),
    ]
    assert {answer.status for answer in answers} == {200, 401, 404, 405, 422}
    for answer in answers:
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Etag" not in answer.headers
        assert "Server" not in answer.headers


def test_what_cannot_be_understood_is_refused_with_the_reason(service):
    asker = service.asker("all")
    for path, body, reason in [
        ("facets", {"query": "modality = 'CT'"}, "at character"),
        ("facets", {"query": "modalty == 'CT'"}, "did you mean modality"),
        ("facets", {"query": "x" * 5000}, "query: "),
        ("facets", {"columns": ["modalty"]}, "did you mean modality"),
        ("facets", {"columns": ["description"]}, "must be one of"),
        ("facets", {"selections": {"tier": ["high"]}}, "whole number"),
        ("facets", {"selections": {"modality": []}}, "at least 1"),
        ("facets", {"selections": {"patient_id": ["p"]}}, "must be one of"),
        ("facets", {"permission": "True"}, "permission"),
        ("facets", {"query": 3}, "query"),
        ("page", {"limit": 201}, "200"),
        ("page", {"limit": 0}, "limit"),
        ("page", {"order": "patient_id"}, "must be one of"),
        ("page", {"after": -1}, "after"),
        ("histogram", {"column": "modality"}, "must be one of"),
        ("histogram", {"column": "age", "bins": 10**6}, "bins"),
        ("pivot", {"rows": "flags", "columns": "sex"}, "must be one of"),
        ("combinations", {"columns": []}, "columns"),
        ("search", {"text": " "}, "must hold a word"),
        ("search", {"text": "a\u0000b"}, "control"),
        ("export", {"columns": ["blocks"]}, "not a column"),
        ("export", {"columns": ["path"]}, "not a column"),
        ("cohorts", {"name": ""}, "name"),
        ("cohorts", {"name": "a\nb"}, "control"),
    ]:
        answer = asker.post(path, **body)
        assert (answer.status, answer.json["error"]) == (422, "malformed"), (path, body)
        assert reason in answer.json["message"], answer.json
    for raw in (b"", b"{", b"[]", b'"x"', b"\xff", b"null"):
        answer = asker.ask("POST", "/v1/facets", raw)
        assert (answer.status, answer.json["error"]) == (422, "malformed")
    for path in ("?size=9", "?size=513", "?size=x", "?other=1", "?size=%ff"):
        answer = asker.get(f"series/1.2/thumbnail{path}")
        assert answer.status == 422


def test_bodies_have_an_end(service):
    asker = service.asker("all")
    try:
        answer = asker.ask("POST", "/v1/facets", b" " * (models.MAX_BODY + 1))
    except (ConnectionError, http.client.HTTPException):
        return  # the server closed the door before all of it came
    assert answer.status in {400, 413, 422}


def test_an_address_that_there_is_not_and_a_method_that_it_has_not(service):
    asker = service.asker("all")
    assert asker.get("facets").status == 405
    assert asker.ask("PUT", "/v1/facets", {}).status == 405
    assert asker.get("nothing").json["error"] == "not-found"
    assert asker.get("cohorts/nonsense").json["message"] == "there is no such cohort"


# Limits


def test_a_session_that_asks_too_often_waits_and_others_do_not(tmp_path):
    clock = [0.0]
    limiter = Limiter(1.0, 3, 8, lambda: clock[0])
    with running(config(tmp_path), series(6), limiter=limiter) as service:
        one, other = service.asker("all"), service.asker("all")
        assert [one.get("cohorts").status for _ in range(5)] == [200, 200, 200, 429, 429]
        refused = one.get("cohorts")
        assert refused.headers["Retry-After"] == "1"
        assert other.get("cohorts").status == 200
        clock[0] += 1
        assert [one.get("cohorts").status for _ in range(2)] == [200, 429]


def test_requests_at_the_same_time_are_counted_in_and_out():
    limiter = Limiter(1000.0, 1000, 2)
    limiter.enter("a")
    limiter.enter("a")
    limiter.enter("b")
    with pytest.raises(Exception, match="too much"):
        limiter.enter("a")
    limiter.leave("a")
    limiter.enter("a")


def test_what_takes_too_long_is_called_off(tmp_path, monkeypatch):
    with running(config(tmp_path), series(6), workers=Workers(1, 0.05)) as service:
        gate = threading.Event()
        monkeypatch.setattr(type(service.index), "count", _held(service, gate))
        answer = service.asker("all").post("export", columns=["series_uid"])
        gate.set()
        assert (answer.status, answer.json["error"]) == (503, "slow")


def _held(service, gate, started=None):
    """A search that goes on until it is cancelled, or the gate opens."""
    from kakehashi.store.facets import CancelledError

    def search(_index, *_args, cancel, **_kwargs):
        if started is not None:
            started.set()
        while not cancel.flag.value and not gate.wait(0.001):
            pass
        if cancel.flag.value:
            raise CancelledError("given up")
        raise AssertionError("nobody cancelled it")

    return search


def test_a_newer_request_of_the_same_client_ends_the_older_one(service, monkeypatch):
    gate, started = threading.Event(), threading.Event()
    real = type(service.index).facets
    monkeypatch.setattr(type(service.index), "facets", _held(service, gate, started))
    token = service.token("all")
    older: list[object] = []
    thread = threading.Thread(
        target=lambda: older.append(
            service.asker("all", token=token).post("facets", client="browser-1")
        )
    )
    thread.start()
    assert started.wait(30)
    monkeypatch.setattr(type(service.index), "facets", real)
    # Another client of the session, and the same name in another session, end nothing.
    assert service.asker("all", token=token).post("facets", client="browser-2").status == 200
    assert service.asker("all").post("facets", client="browser-1").status == 200
    assert thread.is_alive()
    assert service.asker("all", token=token).post("facets", client="browser-1").status == 200
    thread.join(30)
    assert (older[0].status, older[0].json["error"]) == (503, "superseded")
    assert service.asker("all", token=token).post("facets", client="browser-1").status == 200


def test_who_hangs_up_is_worked_for_no_more(service, monkeypatch):
    from kakehashi.store.facets import CancelledError

    started, ended = threading.Event(), threading.Event()

    def search(_index, *_args, cancel, **_kwargs):
        started.set()
        while not cancel.flag.value:
            pass
        ended.set()
        raise CancelledError("given up")

    monkeypatch.setattr(type(service.index), "facets", search)
    asker = service.asker("all")
    asker._connection.request(
        "POST", "/v1/facets", b"{}", {"Authorization": f"Bearer {asker.token}"}
    )
    assert started.wait(30)
    asker.close()
    assert ended.wait(30)


# The answers


def test_facets_are_drilled_sideways(service):
    asker = service.asker("all")
    found = asker.post(
        "facets", selections={"modality": ["CT"]}, columns=["modality", "vendor"]
    ).ok()
    modalities = Counter(row.modality for row in service.rows)
    vendors = Counter(row.vendor for row in service.rows if row.modality == "CT")
    assert {v["value"]: v["count"] for v in found["facets"]["modality"]} == modalities
    assert {v["value"]: v["count"] for v in found["facets"]["vendor"]} == vendors
    assert found["count"] == modalities["CT"]


def test_pages_lead_through_all_rows(service):
    asker = service.asker("all")
    seen, after = [], 0
    while after is not None:
        page = asker.post("page", order="slices", descending=False, after=after, limit=7).ok()
        seen += page["rows"]
        after = page["next"]
    assert [row["slices"] for row in seen] == sorted(row.slices for row in service.rows)
    assert {row["series_uid"] for row in seen} == {row.series_uid for row in service.rows}
    by_uid = {row.series_uid: row for row in service.rows}
    for row in seen:
        expect = json.dumps(row_of(by_uid[row["series_uid"]]), default=lambda day: day.isoformat())
        assert row == json.loads(expect)


def test_histograms_of_numbers_and_days(service):
    asker = service.asker("all")
    for column, bins in (("slices", 5), ("study_date", 3), ("age", 1)):
        found = asker.post("histogram", column=column, bins=bins).ok()
        values = [value_of(row, column) for row in service.rows]
        assert found["unknown"] == values.count(None)
        assert sum(one["count"] for one in found["bins"]) == len(values) - values.count(None)
    assert asker.post("histogram", column="age", query="age == None").ok()["bins"] == []


def test_pivot_and_combinations(service):
    asker = service.asker("all")
    found = asker.post("pivot", rows="vendor", columns="facility").ok()
    cells = {
        (row, column): count
        for row, line in zip(found["rows"], found["counts"], strict=True)
        for column, count in zip(found["columns"], line, strict=True)
        if count
    }
    assert cells == Counter((row.vendor, row.facility) for row in service.rows)
    found = asker.post("combinations", columns=["vendor", "model", "kernel"], limit=4).ok()
    expect = Counter((row.vendor, row.model, row.kernel) for row in service.rows)
    assert found["total"] == len(expect)
    assert len(found["combinations"]) == 4
    for one in found["combinations"]:
        assert expect[tuple(one["values"])] == one["count"]


def test_one_series_with_what_belongs_to_it(service):
    row = service.rows[0]
    service.catalogue.add_kept(
        Kept(
            sha256="a" * 64,
            sop_uid="1.2.3",
            series_uid="1.9",
            study_uid=row.study_uid,
            patient_id=row.patient_id,
            tier=1,
            modality="SEG",
            reason="not an image",
            path="kept/aa/1.dcm",
            size=7,
            added_at="2026-01-01T00:00:00Z",
            refers_to=(row.series_uid, "1.2.3.secret"),
        )
    )
    service.reports.add(row.study_uid, row.facility, "所見なし", patient_id=row.patient_id)
    found = service.asker("all").get(f"series/{row.series_uid}").ok()
    assert found["row"]["series_uid"] == row.series_uid
    assert found["attachments"] == [
        {"modality": "SEG", "sop_uid": "1.2.3", "sha256": "a" * 64, "size": 7}
    ]
    assert found["reports"] == ["所見なし"]
    assert "secret" not in json.dumps(found)


def test_words_in_descriptions(service):
    found = service.asker("all").post("search", text="chest ｃｔ", limit=200).ok()
    assert {row["series_uid"] for row in found["series"]} == {
        row.series_uid for row in service.rows if row.description == "Chest ＣＴ"
    }


def test_rows_as_lines_and_as_arrow_are_the_same(service):
    asker = service.asker("all")
    names = list(COLUMNS)
    lines = asker.post("export", columns=names)
    assert lines.headers["Content-Type"] == "application/jsonl"
    rows = [json.loads(line) for line in lines.body.splitlines()]
    assert len(rows) == len(service.rows)
    stream = asker.ask("POST", "/v1/export", {"columns": names}, {"Accept": ARROW})
    table = pa.ipc.open_stream(stream.body).read_all()
    assert table.column_names == names
    plain = json.loads(json.dumps(table.to_pylist(), default=lambda date: date.isoformat()))
    assert plain == rows
    assert Counter(row["kernel"] for row in rows) == Counter(row.kernel for row in service.rows)


def test_an_export_has_an_end_and_says_so(service, monkeypatch):
    asker = service.asker("all")
    assert len(asker.post("export", columns=["age"], limit=7).body.splitlines()) == 7
    empty = asker.ask(
        "POST", "/v1/export", {"columns": ["age"], "query": "False"}, {"Accept": ARROW}
    )
    assert pa.ipc.open_stream(empty.body).read_all().num_rows == 0
    monkeypatch.setattr(models, "MOST_EXPORTED", 10)
    answer = asker.post("export", columns=["age"])
    assert answer.status == 422
    assert "at most 10" in answer.json["message"]
    answer = asker.ask("POST", "/v1/export", {"columns": ["age"]}, {"Accept": "text/html"})
    assert answer.status == 406


def test_an_export_is_cut_and_seen_to_be_cut_when_the_session_ends(service, monkeypatch):
    from kakehashi.store.service import access

    monkeypatch.setattr(access, "_PIECE", 5)
    asker = service.asker("all")
    looks = iter([True, True, True, False])
    object.__setattr__(service.parts, "is_live", lambda _session: next(looks, False))
    with pytest.raises(http.client.IncompleteRead):
        asker.post("export", columns=["series_uid"])


# Thumbnails


def test_a_thumbnail_is_the_middle_slice_of_the_pack(tmp_path, packed):
    image = pytest.importorskip("PIL.Image")
    names = ["ct_enhanced", "mr_adc", "sts_ct", "sts_pet"]
    rows = [_with_pack(packed(name), tmp_path, number) for number, name in enumerate(names)]
    with running(config(tmp_path), rows) as service:
        asker = service.asker("all")
        for name, row in zip(names, rows, strict=True):
            pack = packed(name).pack
            middle = pack.slice(pack.shape[0] // 2)
            size = min(max(middle.shape), 512)
            answer = asker.get(f"series/{row.series_uid}/thumbnail?size={size}")
            assert answer.status == 200, answer.body
            assert answer.headers["Content-Type"] == "image/png"
            picture = np.asarray(_decoded(image, answer.body), np.float64)
            assert max(picture.shape) == size
            low, high = window(row.modality, row.body_part, middle)
            grey = np.clip((middle - low) / (high - low), 0, 1) * 255
            if row.modality == "PT":
                grey = 255 - grey
            if picture.shape == grey.shape:
                assert np.abs(picture - grey).max() <= 1, name
            else:  # pixels that are not square
                assert abs(picture.mean() - grey.mean()) < 6, name
            small = asker.get(f"series/{row.series_uid}/thumbnail?size=32")
            assert max(_decoded(image, small.body).size) == 32
        (tmp_path / "packs" / "0.ozx").unlink()
        broken = asker.get(f"series/{rows[0].series_uid}/thumbnail")
        assert (broken.status, broken.json["error"]) == (500, "internal")
        assert str(tmp_path) not in broken.body.decode()


def _with_pack(made, root, number):
    """Put a pack and its block hashes into a store; return its row."""
    pack = root / "packs" / f"{number}.ozx"
    pack.parent.mkdir(exist_ok=True)
    for source, target in ((made.path, pack), (blocks_path(made.path), blocks_path(pack))):
        shutil.copy(source, target)
    return Series(
        **dataclasses.asdict(made.info.facts),
        facility="F01",
        tier=2,
        path=f"packs/{number}.ozx",
        size=made.info.size,
        blocks=made.info.blocks,
        added_at="2026-01-01T00:00:00Z",
    )


def test_no_picture_is_drawn_of_a_pack_that_is_newer_than_its_row(tmp_path, packed):
    """What came late may be of a higher tier; the row says so only when the pack is in place."""
    row = _with_pack(packed("ct_enhanced"), tmp_path, 0)
    with running(config(tmp_path), [row]) as service:
        asker = service.asker("part")
        assert asker.get(f"series/{row.series_uid}/thumbnail").status == 200
        # The hashes come first, then the pack, at last the row.
        for name in (".blocks", ".ozx"):
            newer = packed("ct_chest").path.with_suffix(name)
            shutil.copy(newer, tmp_path / "new")
            (tmp_path / "new").rename(tmp_path / "packs" / f"0{name}")
            answer = asker.get(f"series/{row.series_uid}/thumbnail")
            assert (answer.status, answer.json["error"]) == (503, "packing")
        settled = dataclasses.replace(
            row, size=packed("ct_chest").info.size, blocks=packed("ct_chest").info.blocks
        )
        service.catalogue.replace_series(settled)
        assert asker.get(f"series/{row.series_uid}/thumbnail").status == 200
        assert [event.kind for event in service.events] == ["thumbnail", "thumbnail"]


def test_no_picture_is_given_of_a_series_whose_tier_rose_while_it_was_drawn(
    tmp_path, packed, monkeypatch
):
    row = _with_pack(packed("ct_enhanced"), tmp_path, 0)
    with running(config(tmp_path), [row]) as service:

        def rises(*drawn):
            service.catalogue.replace_series(dataclasses.replace(row, tier=3))
            return window(*drawn)

        monkeypatch.setattr("kakehashi.store.service.thumbnail.window", rises)
        assert service.asker("part").get(f"series/{row.series_uid}/thumbnail").status == 404
        assert service.events == []
        assert service.asker("all").get(f"series/{row.series_uid}/thumbnail").status == 200


def _decoded(image, body):
    import io

    picture = image.open(io.BytesIO(body))
    picture.load()
    assert (picture.format, picture.mode) == ("PNG", "L")
    return picture


# What is written down


def test_everything_looked_at_is_told_without_what_was_sought(service):
    asker = service.asker("all", "yamada")
    row = service.rows[0]
    asker.post("facets", query="description == 'かくし'").ok()
    asker.post("facets", query="(description == 'かくし')").ok()
    asker.post("page", limit=3).ok()
    asker.get(f"series/{row.series_uid}").ok()
    asker.post("export", columns=["age"])
    events = service.events
    assert [(event.kind, event.count) for event in events] == [
        ("facets", 0),
        ("facets", 0),
        ("page", 3),
        ("series", 1),
        ("export", len(service.rows)),
    ]
    assert {(event.project, event.person) for event in events} == {("all", "yamada")}
    assert events[0].query_digest == events[1].query_digest != events[2].query_digest
    assert all(isinstance(event, AuditEvent) and "かくし" not in str(event) for event in events)


def test_the_log_has_no_text_no_uid_and_no_token(service, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    asker = service.asker("all", "yamada")
    uid = service.rows[0].series_uid
    asker.post("facets", query="description == 'かくし'").ok()
    asker.post("facets", query="description = 'かくし'")
    asker.post("search", text="かくし").ok()
    asker.get(f"series/{uid}").ok()
    asker.get(f"かくし{uid}".encode("ascii", "ignore").decode())
    monkeypatch.setattr(type(service.index), "facets", lambda *_a, **_k: 1 / 0)
    failed = asker.post("facets", query="description == 'かくし'")
    assert (failed.status, failed.json["error"]) == (500, "internal")
    own = [record for record in caplog.records if record.name.startswith(("kakehashi", "tornado"))]
    text = "\n".join(logging.Formatter().format(record) for record in own)
    assert "POST /v1/facets: 200" in text
    assert "ZeroDivisionError" in text
    for secret in ("かくし", uid, asker.token, asker.token.partition(".")[2]):
        assert secret not in text


# The description


def test_the_description_has_every_route_and_no_other(service):
    described = service.asker("part").get("openapi.json").ok()
    assert described == document()
    listed = {
        (method.upper(), path) for path, item in described["paths"].items() for method in item
    }
    assert listed == {(route.method, route.path) for route in ROUTES}
    served = {rule.matcher.regex.pattern for rule in _rules(service)}
    for _, path in listed:
        concrete = re.sub(r"\{\w+\}", "x", path)
        assert any(re.fullmatch(pattern, concrete) for pattern in served)


def _rules(service):
    from kakehashi.store.service.app import application

    return application(service.parts).wildcard_router.rules


def test_the_description_is_openapi_and_its_schemas_are_schemas():
    described = document()
    assert described["openapi"] == "3.1.0"
    assert set(described) == {"openapi", "info", "security", "paths", "components"}
    for schema in described["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(described)
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in described["components"]["schemas"]
    ids = []
    for path, item in described["paths"].items():
        for operation in item.values():
            ids.append(operation["operationId"])
            assert operation["summary"]
            assert {"200", "401", "403", "422", "429"} <= set(operation["responses"])
            named = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
            assert named == set(re.findall(r"\{(\w+)\}", path))
    assert len(ids) == len(set(ids)) == len(ROUTES)


def test_answers_are_as_described(service):
    described = document()
    asker = service.asker("all")
    row = service.rows[0]
    saved = asker.post("cohorts", name="x", query="slices > 31").ok()
    cohort = f"cohorts/{saved['id']}"
    asker.post(f"{cohort}/freeze").ok()
    asked = {
        ("POST", "/v1/facets"): asker.post("facets"),
        ("POST", "/v1/page"): asker.post("page"),
        ("POST", "/v1/histogram"): asker.post("histogram", column="study_date"),
        ("POST", "/v1/pivot"): asker.post("pivot", rows="vendor", columns="sex"),
        ("POST", "/v1/combinations"): asker.post("combinations", columns=["vendor", "tier"]),
        ("POST", "/v1/search"): asker.post("search", text="ct"),
        ("GET", "/v1/series/{series}"): asker.get(f"series/{row.series_uid}"),
        ("POST", "/v1/cohorts"): asker.post("cohorts", name="y"),
        ("GET", "/v1/cohorts"): asker.get("cohorts"),
        ("GET", "/v1/cohorts/{cohort}"): asker.get(cohort),
        ("POST", "/v1/cohorts/{cohort}/share"): asker.post(f"{cohort}/share"),
        ("POST", "/v1/cohorts/{cohort}/freeze"): asker.post(f"{cohort}/freeze"),
        ("GET", "/v1/cohorts/{cohort}/versions/{version}"): asker.get(f"{cohort}/versions/1"),
        ("GET", "/v1/cohorts/{cohort}/diff"): asker.get(f"{cohort}/diff?a=1&b=1"),
    }
    modelled = {(route.method, route.path) for route in ROUTES if route.answer is not None}
    assert set(asked) == modelled
    for (method, path), answer in asked.items():
        content = described["paths"][path][method.lower()]["responses"]["200"]["content"]
        schema = content["application/json"]["schema"] | {"components": described["components"]}
        jsonschema.validate(answer.ok(), schema, jsonschema.Draft202012Validator)
        # The check is worth something: another answer is not as described.
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**answer.json, "more": 1}, schema)
    problem = asker.post("facets", query="(").json
    schema = {"$ref": "#/components/schemas/Problem", "components": described["components"]}
    jsonschema.validate(problem, schema)
