"""The measurement of a session's link: what it says, what it leaves, and how it ends early."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import torch

from kakehashi.errors import SessionError
from kakehashi.link.bench import line, report, training
from kakehashi.link.bench.results import PARTS, Figure, Part, Report
from kakehashi.link.bench.run import measure
from kakehashi.link.bench.sample import Sample
from kakehashi.link.bench.ways import Book, Settings, one
from kakehashi.link.session import Session
from tests.lab.hosts import wait_for
from tests.link.mounted import MountedView
from tests.link.stores import SFTP_SERVER, Broker, Server, work_server
from tests.link.volumes import Cohort

SHAPES = [(20, 40, 36), (24, 32, 40), (16, 48, 32), (20, 36, 36)]
BRIEF = Settings(
    rounds=2,
    seconds=0.1,
    compute_s=0.02,
    batches=3,
    bytes=64 << 20,
    write_bytes=1 << 20,
    quick=True,
)
LEASE = {
    "expires_at": "2031-01-31T12:00:00Z",
    "ends_at": "2031-01-31T12:00:00Z",
    "state": "live",
    "message": "",
}
SLOW = """
import os, subprocess, sys, time
server = subprocess.Popen([sys.argv[1], "-R"], stdin=0, stdout=subprocess.PIPE)
try:
    while data := server.stdout.read1(4096):
        time.sleep(len(data) / float(sys.argv[2]))  # the line's rate
        os.write(1, data)
except BrokenPipeError:
    pass
"""


class Slow(Broker):
    """A line of so many bytes a second and connection."""

    def __init__(self, path: Path, rate: float) -> None:
        super().__init__(path, [sys.executable, "-I", "-c", SLOW, SFTP_SERVER, str(rate)])


@pytest.fixture
def cohort(tmp_path: Path) -> Iterator[Cohort]:
    cohort = Cohort(tmp_path / "cohort", SHAPES)
    cohort.path.with_name("lease.json").write_text(json.dumps(LEASE), encoding="utf-8")
    yield cohort
    cohort.close()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(line, "WARM_S", 0.1)
    monkeypatch.setattr(training, "NETWORKS", {"UNet": training.NETWORKS["UNet"]})
    monkeypatch.setattr(training, "ON_CPU", training.Size(16, 2, test_whole=False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(cohort: Cohort, *parts: Part, settings: Settings = BRIEF) -> Report:
    return measure(Session.current(cohort.path), settings, parts)


def found(result: Report, name: str) -> Figure:
    figure = result.figure(name)
    assert figure is not None, [one.name for one in result.figures]
    return figure


def lacking(result: Report) -> str:
    return "\n".join(f"{one.what}: {one.why}" for one in result.not_measured)


def test_all_parts_give_figures_and_nothing_of_the_store(
    cohort: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a mount and a server with a root of its own need root")
    work, mountpoint = tmp_path / "work", tmp_path / "mounted"
    work.mkdir()
    mountpoint.mkdir()
    (work / "mine").write_text("stays")
    with ExitStack() as stack:
        broker = Broker(tmp_path / "work.sock", work_server(work))
        stack.callback(broker.close)
        server = Server()
        stack.callback(server.close)
        folder = cohort.folder
        view = MountedView(mountpoint, server, folder.manifest_path, folder.sha256, ())
        stack.callback(view.close)
        view.ready()
        cohort.write(view=str(view.root), work_socket=str(tmp_path / "work.sock"))
        result = run(cohort, *PARTS)
    assert result.complete
    assert {figure.part for figure in result.figures} == set(PARTS)
    for figure in result.figures:
        assert len(figure.values) in {1, BRIEF.rounds}, figure.name
        assert all(value >= 0 for value in figure.values), figure.name
        assert len(figure.local) in {0, len(figure.values)}, figure.name
    # What a test store on this machine cannot be slower than.
    assert found(result, "round trip").median < 1000
    assert found(result, "reader, packed, 1 channel").ratio is not None
    assert found(result, "view, packed, one file at a time").median > 0
    assert found(result, "first byte, view").better == "lower"
    differ = found(result, "CT segmentation: batches that are not local's, to the bit")
    assert differ.values == (0,)
    assert result.cohort.series == result.cohort.series_used == len(SHAPES)
    assert "aes128-gcm@openssh.com" in result.ssh["ciphers offered, in this order"]
    assert "iperf3" in lacking(result)
    # Nothing is left in the work folder but what was there.
    assert [path.name for path in work.rglob("*") if path.is_file()] == ["mine"]
    text = result.model_dump_json()
    said = capsys.readouterr().err
    assert "round trip" in said
    for name in (*cohort.uids, "hanako", str(cohort.folder.root)):
        assert name not in text
        assert name not in said
    document = json.loads(text)
    jsonschema.validate(document, Report.model_json_schema(mode="serialization"))
    assert {"median", "ratio", "values", "local", "unit"} <= set(document["figures"][0])
    assert Report.model_validate_json(text) == result


def test_a_line_that_is_too_slow_shows_in_the_loop(cohort: Cohort) -> None:
    waiting = "loop, whole volumes, 0.3 s of compute each: waiting for data"
    cohort.broker.close()
    found_at = {}
    for rate in (1e9, 40e3):
        cohort.broker = Slow(cohort.broker.path, rate)
        result = run(cohort, "loop", settings=replace(BRIEF, compute_s=0.3))
        cohort.broker.close()
        found_at[rate] = found(result, waiting)
        assert min(found_at[rate].local) < 30
    assert found_at[1e9].median < 30
    assert found_at[40e3].median > 50


def test_a_segmentation_is_tested_on_whole_volumes(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there is an accelerator."""
    monkeypatch.setattr(training, "ON_CPU", training.Size(16, 2, test_whole=True))
    result = run(cohort, "segmentation", settings=replace(BRIEF, rounds=1))
    assert found(result, "CT segmentation: test of a whole volume").median > 0
    assert not [one for one in result.not_measured if "CT segmentation" in one.what]


def test_the_figures_come_in_turn_and_the_ratio_is_that_of_each_round(cohort: Cohort) -> None:
    order: list[str] = []

    def said(name: str, value: float) -> float:
        order.append(name)
        return value

    with Sample(Session.current(cohort.path), 1 << 20) as sample:
        book = Book(sample, Settings(rounds=2))
        far = iter([10.0, 30.0])
        book.measure(
            "line",
            [
                one("a", "MB/s", lambda: said("a", next(far)), lambda: said("a here", 20.0)),
                one("b", "MB/s", lambda: said("b", 1.0)),
            ],
        )
    assert order == ["a", "a here", "b", "b", "a here", "a"]
    figure, other = book.figures
    assert figure.ratio == pytest.approx(1.0)
    assert figure.values == (10.0, 30.0)
    assert other.ratio is None


def test_what_fails_is_named_without_the_series_and_the_rest_goes_on(cohort: Cohort) -> None:
    def fail() -> float:
        raise OSError(f"series/{cohort.uids[0]}.ozx: cannot be read")

    with Sample(Session.current(cohort.path), 1 << 20) as sample:
        book = Book(sample, Settings(rounds=2))
        book.measure("line", [one("bad", "ms", fail), one("good", "ms", lambda: 1.0)])
    assert [figure.name for figure in book.figures] == ["good"]
    (lack,) = book.not_measured
    assert lack.what == "bad"
    assert "cannot be read" in lack.why
    assert cohort.uids[0] not in lack.why


def test_without_torch_it_says_so(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kakehashi.link.bench.training")
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run(cohort, "ranges", "loop", "networks", "segmentation")
    assert result.complete
    assert {figure.part for figure in result.figures} == {"ranges"}
    for part in ("loop", "networks", "segmentation"):
        assert f"part {part}: torch and monai are not installed" in lacking(result)


def test_stopped_by_hand_it_tells_what_it_has(cohort: Cohort, tmp_path: Path) -> None:
    said, out = tmp_path / "said", tmp_path / "report.json"
    command = [sys.executable, "-m", "kakehashi.link.bench", "--json", str(out), "--quick"]
    with said.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--part", "line", "--part", "loop", "--compute", "60"],
            env={**os.environ, "KAKEHASHI_SESSION": str(cohort.path)},
            stderr=file,
        )
    try:
        wait_for("the loop", lambda: "\nloop\n" in said.read_text(), 120)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, said.read_text()
    finally:
        process.kill()
        process.wait()
    result = Report.model_validate_json(out.read_bytes())
    assert not result.complete
    assert result.stopped == "stopped by hand in: loop"
    assert found(result, "round trip").values


def test_a_session_that_ends_meanwhile_leaves_a_partial_report(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ending(io.StringIO):
        def write(self, text: str) -> int:
            if text == "ranges\n":
                cohort.broker.close()
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Ending())
    result = run(cohort, "line", "ranges")
    assert result.stopped == "the session ended in: ranges"
    assert {figure.part for figure in result.figures} >= {"line"}


def test_outside_of_a_session_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="only available inside"):
        Session.current(tmp_path / "none.json")
    done = subprocess.run(
        [sys.executable, "-m", "kakehashi.cli", "bench", "link"],
        env={**os.environ, "KAKEHASHI_SESSION": str(tmp_path / "none.json")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "only available inside a Kakehashi session" in done.stderr.replace("\n", " ")


def example() -> Report:
    def figure(part: Part, name: str, unit: str, *values: float, **more: Any) -> Figure:
        return Figure(part=part, name=name, unit=unit, values=values, **more)

    label = "UNet, 2 x 32³"
    return Report.model_validate(
        {
            "site": "far",
            "measured_at": "2026-01-01T00:00:00+00:00",
            "seconds": 3,
            "quick": True,
            "complete": False,
            "stopped": "stopped by hand in: segmentation",
            "machine": {
                "processor": "p",
                "cores": 2,
                "memory_gib": 4,
                "accelerators": [],
                "kernel": "6.1",
                "versions": {"python": "3.11"},
            },
            "cohort": {"series": 2, "bytes": 2e6, "series_used": 1, "bytes_used": 1e6},
            "ssh": {"compression": "no"},
            "figures": [
                figure("line", "ssh, 1 connection", "MB/s", 100, 120),
                figure("line", "ssh, 4 connections", "MB/s", 200, 220, 240),
                figure("reader", "reader, packed, 4 channels at most", "MB/s", 90, 110, 100,
                       local=(100, 100, 100)),
                figure("networks", f"{label}: a training step, compute alone", "ms", 10),
                figure("networks", f"{label}: a training step with loading", "ms", 12,
                       local=(11,), better="lower"),
                figure("networks", f"{label}: waiting for data", "%", 4, local=(2,)),
            ],
            "not_measured": [{"what": "a | b", "why": "<script> `x` \n\n# new"}],
        }
    )  # fmt: skip


def test_the_report_has_tables_and_plots(tmp_path: Path) -> None:
    runs = (report.Run(label="alone", report=example()),
            report.Run(label="1 of 2 at once", report=example()))  # fmt: skip
    iperf = report.Iperf(server="store", connections=4, to_server_mb_s=230, from_server_mb_s=240)
    study = report.Study(runs=runs, iperf3=iperf, problems=("something went wrong",))
    written = report.write(study, tmp_path / "out")
    assert report.Study.model_validate_json(written[0].read_bytes()) == study
    text = written[1].read_text()
    row = "| reader, packed, 4 channels at most | 100 MB/s [90, 110] | 100 MB/s [100, 100] | 1.00 |"
    assert row in text
    assert "**Not complete: stopped by hand in: segmentation.**" in text
    assert "something went wrong" in text
    assert "230 MB/s there" in text
    assert "| quantity | alone | 1 of 2 at once |" in text
    plots = [path for path in written if path.suffix == ".png"]
    assert [path.name for path in plots] == [
        f"{name}-{number}.png" for number in (1, 2) for name in ("rates", "steps", "waiting")
    ]
    for plot in plots:
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"]({plot.name})" in text


def test_what_a_session_says_is_shown_as_words(tmp_path: Path) -> None:
    study = report.Study(runs=(report.Run(label="alone", report=example()),))
    text = report.markdown(study)
    assert r"- a \| b: \<script\> \`x\`" in text
    assert not re.search(r"^# new", text, re.MULTILINE)
    assert "`--iperf3 HOST` was not given" in text


def test_without_matplotlib_there_are_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    study = report.Study(runs=(report.Run(label="alone", report=example()),))
    written = report.write(study, tmp_path)
    assert [path.name for path in written] == ["report.json", "report.md"]
    assert "matplotlib is not installed" in written[1].read_text()
