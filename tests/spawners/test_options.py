"""What a person may choose, and hostile choices, also through the whole hub."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.config import Queue, Site
from kakehashi.site.job import QueueState
from kakehashi_spawners.options import OptionsError, choose, from_form, offer, parse
from tests.spawners.standins import Authority, Hub

GOOD = {"site": "here", "queue": "gpu", "gpus": 1, "hours": 2.0, "project": "lung"}
SITES = {
    "here": Site(
        title="Here",
        scheduler="slurm",
        agent=("/bin/false",),
        addresses=("10.0.0.0/8",),
        accounts={"alice": "a1"},
        queues=(Queue(name="gpu", gpu_type="h100", max_gpus=2, max_hours=8),),
    )
}
PROJECTS = [{"id": "lung", "title": "Lung", "sites": ["here"]}]
HOSTILE = [
    "gpu\n#SBATCH --uid=0",
    "gpu\n",
    "gpu\r",
    "gpu'",
    'gpu"',
    "gpu;id",
    "$(id)",
    "`id`",
    "../gpu",
    "gpu/../../etc",
    "gpu\0",
    "gpu ",
    " gpu",
    "",
    "-p",
    "--uid=0",
    "\uff47\uff50\uff55",
    "gpu\u2028x",
    "{{ 7*7 }}",
    "%(x)s",
    "{exec_prefix}",
    "g" * 65,
    None,
    1,
    True,
    [],
    ["gpu"],
    {"x": 1},
]


@pytest.mark.parametrize("field", ["site", "queue", "project"])
@pytest.mark.parametrize("value", HOSTILE)
def test_names_are_names_or_refused(field: str, value: Any) -> None:
    if field == "queue" and value == "gpu":
        pytest.skip("that is a name")
    with pytest.raises(OptionsError, match=f"^{field}: "):
        parse({**GOOD, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpus", "1"),
        ("gpus", 1.0),
        ("gpus", True),
        ("gpus", -1),
        ("gpus", 65),
        ("gpus", None),
        ("hours", "2"),
        ("hours", 0),
        ("hours", -1),
        ("hours", float("nan")),
        ("hours", float("inf")),
        ("hours", 1e9),
    ],
)
def test_numbers_are_numbers_in_range_or_refused(field: str, value: Any) -> None:
    with pytest.raises(OptionsError, match=f"^{field}: "):
        parse({**GOOD, field: value})


def test_good_options_are_taken_and_nothing_may_be_added_or_left_out() -> None:
    assert parse(GOOD).queue == "gpu"
    with pytest.raises(OptionsError):
        parse({**GOOD, "exec_prefix": "id"})
    for field in GOOD:
        with pytest.raises(OptionsError, match=f"^{field}: "):
            parse({key: value for key, value in GOOD.items() if key != field})
    for value in (None, [], "x", 3):
        with pytest.raises(OptionsError):
            parse(value)


@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(list(GOOD)), st.text(), max_size=6))
def test_whatever_a_form_holds_only_a_choice_or_a_refusal_comes_of_it(form: dict[str, str]) -> None:
    try:
        options = from_form({key: [value] for key, value in form.items()})
    except OptionsError:
        return
    assert set(options) == set(GOOD)


def test_a_form_is_read_strictly() -> None:
    form = {
        "site": ["here"],
        "queue": ["gpu"],
        "gpus": ["1"],
        "hours": ["1.5"],
        "project": ["lung"],
    }
    assert from_form({**form, "_xsrf": ["x"]})["hours"] == 1.5
    bad: list[dict[str, Any]] = [
        {"gpus": ["1 "]},
        {"gpus": ["\uff11"]},
        {"gpus": ["1e1"]},
        {"gpus": ["1", "2"]},
        {"gpus": []},
        {"hours": ["1_0"]},
        {"hours": ["-1"]},
        {"hours": ["nan"]},
        {"site_file": [{"filename": "x"}]},
        {"site": [{"filename": "x"}]},
    ]
    for change in bad:
        with pytest.raises(OptionsError):
            from_form({**form, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"project": "brain"}, "project: you have no project"),
        ({"site": "there"}, "site: you have no account"),
        ({"queue": "other"}, "queue: Here has no queue"),
        ({"gpus": 3}, "gpus: at most 2 here"),
        ({"hours": 9.0}, "hours: at most 8 here"),
    ],
)
def test_what_a_person_may_not_have_is_refused(change: dict[str, Any], words: str) -> None:
    assert choose(parse(GOOD), "alice", SITES, PROJECTS).account == "a1"
    with pytest.raises(OptionsError, match=words):
        choose(parse({**GOOD, **change}), "alice", SITES, PROJECTS)


def test_an_account_of_another_person_or_a_site_of_another_project_is_refused() -> None:
    with pytest.raises(OptionsError, match="you have no account"):
        choose(parse(GOOD), "mallory", SITES, PROJECTS)
    with pytest.raises(OptionsError, match="may not compute at"):
        choose(parse(GOOD), "alice", SITES, [{"id": "lung", "sites": ["there"]}])


def test_the_offer_holds_what_the_person_may_have_and_the_figures_of_now() -> None:
    live = {"here": [QueueState("gpu", 4, 0, "2026-01-01T00:00:00Z")]}
    mine = offer("alice", SITES, PROJECTS, live)
    queue = mine["sites"]["here"]["queues"][0]
    assert (queue["free_gpus"], queue["starts_at"]) == (0, "2026-01-01T00:00:00Z")
    assert offer("mallory", SITES, PROJECTS, live)["sites"] == {}
    assert offer("alice", SITES, PROJECTS, {})["sites"]["here"]["queues"][0]["free_gpus"] is None


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the agent drops to other accounts")


@needs_root
@pytest.mark.parametrize(
    "change",
    [
        {"queue": "local\n#SBATCH --uid=0"},
        {"queue": "local; touch /tmp/owned"},
        {"site": "../here"},
        {"gpus": "0"},
        {"gpus": 1},
        {"hours": 5},
        {"project": "brain"},
        {"site": "elsewhere"},
        {"exec_prefix": "touch /tmp/owned"},
        {"req_options\nX": "y"},
    ],
)
def test_no_hostile_choice_opens_a_session(
    hub: Hub, authority: Authority, change: dict[str, Any]
) -> None:
    before = len(authority.sessions)
    answer = hub.login("alice").spawn(**change)
    assert answer.status_code == 400, answer.text
    assert len(authority.sessions) == before
    assert not any(line.startswith(("X", "#SBATCH")) for line in hub.log().splitlines())


@needs_root
def test_a_queue_that_only_the_hub_knows_is_refused_by_the_site(
    hub: Hub, authority: Authority
) -> None:
    alice = hub.login("alice")
    answer = alice.spawn(queue="gone")
    assert answer.status_code in {202, 403}
    page = answer.text
    if answer.status_code == 202:
        page = alice.browser.get(f"{hub.url}/hub/spawn-pending/alice", timeout=10).text
    assert "not in this site" in page
    assert "ends" in authority.sessions[alice.last_session()]


@needs_root
def test_the_form_shows_the_refusal_beside_its_field_and_a_link_cannot_choose(hub: Hub) -> None:
    alice = hub.login("alice")
    page = alice.browser.get(f"{hub.url}/hub/spawn", timeout=10)
    assert page.status_code == 200
    assert 'name="project"' in page.text
    xsrf = alice.browser.cookies.get("_xsrf", path="/hub/")
    posted = alice.browser.post(
        f"{hub.url}/hub/spawn?_xsrf={xsrf}",
        data={"site": "here", "queue": "local", "gpus": "1", "hours": "1", "project": "lung"},
        timeout=20,
    )
    assert posted.status_code == 400
    assert "At most 0 here" in posted.text
    link = alice.browser.get(
        f"{hub.url}/hub/spawn?opt-site=here&opt-queue=local&opt-gpus=0&opt-hours=1&opt-project=lung",
        timeout=20,
    )
    assert link.status_code == 400
    assert "a link cannot choose" in link.text
    assert not alice.server()
