"""The examples of docs/training.md run, one after another, as they stand there."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.link.stores import Broker, work_server
from tests.link.volumes import Cohort

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("needs root, for a folder that is /work at a server")
    cohort = Cohort(tmp_path / "cohort", [(20, 40, 36), (24, 32, 40), (16, 48, 32)])
    (tmp_path / "work").mkdir()
    work = Broker(tmp_path / "work.sock", work_server(tmp_path / "work"))
    cohort.write(work_socket=str(work.path))
    ends_at = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=8)).isoformat()
    lease = {"expires_at": ends_at, "ends_at": ends_at, "state": "live", "message": ""}
    cohort.path.with_name("lease.json").write_text(json.dumps(lease), encoding="utf-8")
    monkeypatch.setenv("KAKEHASHI_SESSION", str(cohort.path))
    yield tmp_path / "work"
    work.close()
    cohort.close()


def test_every_example_runs(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = FENCE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(examples) >= 7
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "3 of 3 series held" in printed
    assert "held: 3 of 3 series" in printed
    assert {entry.name for entry in session.iterdir()} >= {"model.pt", "model.pt.~1~"}
    assert len(names["table"]) == 3  # type: ignore[arg-type]
    assert names["group"]
    assert len(names["head"]) == 352  # type: ignore[arg-type]
