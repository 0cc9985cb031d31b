"""What a person may choose on the spawn page, and whether a choice is one of those.

A refusal's message begins with the field (``gpus: at most 2 here``), so that the page can show
it where it belongs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kakehashi.config import PROJECT_ID, QUEUE_NAME, SITE_NAME
from kakehashi.errors import SessionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kakehashi.config import Queue, Site
    from kakehashi.site.job import QueueState

FIELDS = ("site", "queue", "gpus", "hours", "project")
# ASCII digits only: int() would also take those of other scripts.
INTEGER = re.compile(r"[0-9]{1,3}")
DECIMAL = re.compile(r"[0-9]{1,4}(\.[0-9]{1,3})?")
MINUTES_LEAST = 1


class OptionsError(SessionError):
    """A choice is malformed, or not among what the person may have."""


class SessionOptions(BaseModel):
    """A person's choice, well-formed; whether they may have it is :func:`choose`'s matter.

    ``hours`` is the time limit, ``gpus`` how many GPUs on one node.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    site: str = Field(pattern=f"^{SITE_NAME.pattern}$")
    queue: str = Field(pattern=f"^{QUEUE_NAME.pattern}$")
    gpus: int = Field(ge=0, le=64)
    hours: float = Field(ge=MINUTES_LEAST / 60, le=24 * 31)
    project: str = Field(pattern=f"^{PROJECT_ID.pattern}$")


@dataclass(frozen=True)
class Chosen:
    """A choice that the person may have, with what the configuration says of it."""

    options: SessionOptions
    site: Site
    queue: Queue
    account: str


def from_form(form: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Turn the posted form into options; types are made here, rules checked by :func:`parse`.

    Raises
    ------
    OptionsError
        A field is missing, given twice, not text, or not a number where one is due.
    """
    fields = {key: value for key, value in form.items() if key != "_xsrf"}
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise OptionsError(f"(form): unknown field {unknown[0][:32]!r}")
    text: dict[str, str] = {}
    for name in FIELDS:
        values = fields.get(name, [])
        if len(values) != 1 or not isinstance(values[0], str):
            raise OptionsError(f"{name}: choose one")
        text[name] = values[0]
    if not INTEGER.fullmatch(text["gpus"]):
        raise OptionsError("gpus: must be a whole number")
    if not DECIMAL.fullmatch(text["hours"]):
        raise OptionsError("hours: must be a number of hours, e.g. 2 or 1.5")
    return {**text, "gpus": int(text["gpus"]), "hours": float(text["hours"])}


def parse(options: object) -> SessionOptions:
    """Check that options are well-formed, whichever way they came.

    Raises
    ------
    OptionsError
        Names the first field that breaks a rule, and the rule.
    """
    try:
        return SessionOptions.model_validate(options)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        name = str(problem["loc"][0]) if problem["loc"] else "(options)"
        if name not in FIELDS:
            raise OptionsError("(options): there is an unknown field") from None
        raise OptionsError(f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None


def choose(
    options: SessionOptions,
    person: str,
    sites: Mapping[str, Site],
    projects: Iterable[Mapping[str, Any]],
) -> Chosen:
    """Check that a person may have what they chose.

    Parameters
    ----------
    options : SessionOptions
        The choice.
    person : str
        Their name at the identity provider.
    sites : mapping
        The configured sites.
    projects : iterable of mapping
        What the store's authority lists for their groups, just asked.

    Raises
    ------
    OptionsError
        Names the field. What a person may not have reads as what does not exist.
    """
    project = next((item for item in projects if item.get("id") == options.project), None)
    if project is None:
        raise OptionsError(f"project: you have no project {options.project!r}")
    site = sites.get(options.site)
    account = None if site is None else site.accounts.get(person)
    if site is None or account is None:
        raise OptionsError(f"site: you have no account at {options.site!r}")
    if options.site not in project.get("sites", ()):
        raise OptionsError(f"site: project {options.project!r} may not compute at {site.title}")
    queue = next((item for item in site.queues if item.name == options.queue), None)
    if queue is None:
        raise OptionsError(f"queue: {site.title} has no queue {options.queue!r}")
    if options.gpus > queue.max_gpus:
        raise OptionsError(f"gpus: at most {queue.max_gpus} here")
    if options.hours > queue.max_hours:
        raise OptionsError(f"hours: at most {queue.max_hours:g} here")
    return Chosen(options, site, queue, account)


def offer(
    person: str,
    sites: Mapping[str, Site],
    projects: list[dict[str, Any]],
    live: Mapping[str, Iterable[QueueState]],
) -> dict[str, Any]:
    """List what a person may choose.

    Parameters
    ----------
    person : str
        Their name at the identity provider.
    sites : mapping
        The configured sites.
    projects : list of dict
        What the authority lists for their groups.
    live : mapping
        Site name to its queues' state now; a site without an answer is left out, and its
        free GPUs are then null.

    Returns
    -------
    dict
        ``{"projects": [..], "sites": {NAME: {"title","title_ja","walls","queues": [..]}}}``.
    """
    wanted = {name for project in projects for name in project.get("sites", ())}
    mine = {
        name: site for name, site in sites.items() if name in wanted and person in site.accounts
    }
    return {
        "projects": [
            {**project, "sites": [name for name in project.get("sites", ()) if name in mine]}
            for project in projects
        ],
        "sites": {
            name: {
                "title": site.title,
                "title_ja": site.title_ja,
                "walls": site.node.walls,
                "queues": [
                    _queue(queue, {state.name: state for state in live.get(name, ())})
                    for queue in site.queues
                ],
            }
            for name, site in mine.items()
        },
    }


def _queue(queue: Queue, live: Mapping[str, QueueState]) -> dict[str, Any]:
    state = live.get(queue.name)
    counted = state is not None and state.gpus > 0
    return {
        **queue.model_dump(mode="json"),
        "free_gpus": state.free_gpus if state is not None and counted else None,
        "starts_at": state.starts_at if state is not None else None,
    }
