"""Writing job scripts and reading Slurm's answers, whatever the values."""

from __future__ import annotations

import json
import re

from hypothesis import assume, given
from hypothesis import strategies as st

from kakehashi.site.job import (
    GPU_TYPE,
    MAX_DOCUMENT,
    QUEUE,
    Job,
    RequestError,
    SiteFile,
    check_job,
)
from kakehashi.site.slurm import ENDED, parse_resources, parse_state, render

SITE = SiteFile("slurm", frozenset({"a"}), "/opt/kakehashi", frozenset({"gpu", "a.b-c_d"}))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
enters = st.fixed_dictionaries(
    {
        "session": st.from_regex(r"\A[0-9a-f]{32}\Z"),
        "ticket": st.from_regex(r"\A[A-Za-z0-9_-]{43}\Z"),
        "portal_url": st.text(),
        "portal_ca": st.none() | st.text(),
        "site": st.text(),
        "node": st.dictionaries(st.text(), st.text() | st.integers()).map(
            lambda node: node | {"software": SITE.software}
        ),
        "software": st.text(),
    }
)


@given(
    enter=enters,
    queue=st.sampled_from(sorted(SITE.queues)),
    gpus=st.integers(0, 64),
    kind=st.none() | st.from_regex(rf"\A{GPU_TYPE.pattern}\Z"),
    cpus=st.integers(1, 1024),
    memory=st.integers(256, 1 << 26),
    minutes=st.integers(1, 44640),
)
def test_a_script_holds_its_directives_and_the_document_and_nothing_else(
    enter: dict[str, object],
    queue: str,
    gpus: int,
    kind: str | None,
    cpus: int,
    memory: int,
    minutes: int,
) -> None:
    assume(len(json.dumps(enter)) < MAX_DOCUMENT)
    job = check_job(
        {
            "name": "kakehashi",
            "queue": queue,
            "gpus": gpus,
            "gpu_type": kind,
            "cpus": cpus,
            "memory_mb": memory,
            "minutes": minutes,
            "software": SITE.software,
            "enter": enter,
        },
        SITE,
    )
    script = render(job, SITE.software)
    assert script.isascii()
    lines = script.split("\n")
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert len(directives) == 13 + (1 if gpus else 0)
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+=?[A-Za-z0-9:@/._-]*", line) for line in directives)
    rest = lines[1 + len(directives) :]
    assert rest[0].startswith("exec /opt/kakehashi/.venv/bin/python -I -m kakehashi.session.enter")
    assert json.loads(rest[1]) == enter
    assert rest[2:] == ["KAKEHASHI", ""]


@given(anything)
def test_no_job_makes_the_checks_fail_otherwise(value: object) -> None:
    try:
        check_job(value, SITE)
    except RequestError:
        return
    raise AssertionError("a random value passed for a job")


@given(
    st.fixed_dictionaries(
        {
            "name": st.just("kakehashi"),
            "queue": st.just("gpu") | st.text(),
            "gpus": st.integers() | anything,
            "gpu_type": st.none() | anything,
            "cpus": st.integers() | anything,
            "memory_mb": st.integers() | anything,
            "minutes": st.integers() | anything,
            "software": st.just(SITE.software),
            "enter": enters,
        }
    )
)
def test_what_passes_the_checks_is_within_the_rules(value: dict[str, object]) -> None:
    try:
        job = check_job(value, SITE)
    except RequestError:
        return
    assert isinstance(job, Job)
    assert QUEUE.fullmatch(job.queue)
    assert 0 <= job.gpus <= 64
    assert "\n" not in job.document


@given(st.text())
def test_no_text_of_squeue_is_an_end_but_the_words_for_it(text: str) -> None:
    state = parse_state("7", text)
    if state.state == "ended":
        assert text.split("|")[1] in ENDED


@given(st.text(), st.text())
def test_no_text_of_sinfo_makes_the_counting_fail(nodes: str, ends: str) -> None:
    for queue in parse_resources(nodes, ends):
        assert 0 <= queue.free_gpus <= queue.gpus
