"""Projects from request to end: who asked, who approved, until when.

A request names purpose, people, data and places; it gives nobody anything. Somebody else
approves it, with the number of the ethics committee's approval and the last day. Then it is a
file that every part of the store reads with its configuration, and the audit trail has it all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import ValidationError

from kakehashi.config import APPROVED, Config, Project, explain
from kakehashi.errors import StoreError
from kakehashi.store.catalogue import now
from kakehashi.store.layout import locked, replacing, sync_folder

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

State = Literal["configured", "requested", "approved", "declined", "ended"]


class Trail(Protocol):
    """Where it is written down who did what; see :class:`kakehashi.audit.Audit`."""

    def append(self, kind: str, *, person: str | None, detail: Mapping[str, Any]) -> object:
        """Add a record and make it durable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A project and how far it has come.

    Attributes
    ----------
    state : str
        ``configured`` in the deployment's file, ``requested``, ``approved``, ``declined`` or
        ``ended``.
    history : tuple of dict
        Each step: ``step``, ``by``, ``at`` (ISO 8601, UTC), ``said``.
    """

    project: Project
    state: State
    history: tuple[dict[str, str], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "state": self.state,
            "project": self.project.model_dump(mode="json"),
            "history": list(self.history),
        }

    def _after(self, state: State, project: Project, by: str, said: str) -> Standing:
        step = {"step": state, "by": by, "at": now(), "said": said}
        return replace(self, state=state, project=project, history=(*self.history, step))


class Projects:
    """The register of a store's projects.

    Parameters
    ----------
    config : Config
        The store, and the projects that stand in its file.
    trail : Trail
        Gets a record before anything changes.
    """

    def __init__(self, config: Config, trail: Trail) -> None:
        self._config = config
        self._trail = trail
        self._active = config.need_store().root / APPROVED
        self._register = self._active / "register"

    def list(self) -> list[Standing]:
        """Return all projects, sorted by id."""
        found = {path.stem: self._read(path) for path in sorted(self._register.glob("*.json"))}
        for project in self._config.projects:
            if project.id not in found:
                found[project.id] = Standing(project=project, state="configured")
        return [found[name] for name in sorted(found)]

    def request(self, definition: Mapping[str, Any], by: str) -> Standing:
        """Write down what somebody asks for.

        Parameters
        ----------
        definition : mapping
            As ``[[projects]]`` of the configuration. Who asked and approved is not taken from
            it.
        by : str
            Who asks.

        Raises
        ------
        StoreError
            The definition breaks a rule, or there is a project of that id.
        """
        try:
            project = Project.model_validate(
                {**definition, "requested_by": _name(by), "approved_by": None}
            )
        except ValidationError as error:
            raise StoreError(explain("the request", error)) from None
        with self._changing():
            known = {one.project.id: one for one in self.list()}.get(project.id)
            if known is not None and known.state != "declined":
                raise StoreError(
                    f"there is a project {project.id!r} already ({known.state}); choose another id"
                )
            before = known or Standing(project=project, state="requested")
            standing = before._after("requested", project, by, project.purpose)
            self._record("project.requested", by, project, purpose=project.purpose)
            self._write(standing)
        return standing

    def approve(self, project_id: str, by: str, approval: str, expires: dt.date) -> Standing:
        """Open a requested project, or an approved one anew with another number and last day.

        Parameters
        ----------
        project_id : str
        by : str
            Who approves: somebody else than who asked.
        approval : str
            Number of the ethics committee's approval.
        expires : date
            The last day (UTC) of its grants.

        Raises
        ------
        StoreError
            There is no such request, the same person asked, or the store could not read its
            configuration any more with it.
        """
        with self._changing():
            before = self._standing(project_id, "requested", "approved")
            if _name(by).casefold() == (before.project.requested_by or "").casefold():
                raise StoreError(
                    f"{by!r} asked for {project_id!r}; somebody else has to approve it"
                )
            changes = {"approval": approval.strip(), "expires": expires, "approved_by": by}
            if not approval.strip():
                raise StoreError("the number of the ethics committee's approval is missing")
            try:
                project = Project.model_validate(before.project.model_dump() | changes)
            except ValidationError as error:
                raise StoreError(explain("the approval", error)) from None
            self._check_whole(project)
            last = expires.isoformat()
            self._record("project.approved", by, project, approval=approval, expires=last)
            with replacing(self._active / f"{project_id}.json", mode=0o644) as file:
                file.write(project.model_dump_json(indent=1).encode())
            standing = before._after("approved", project, by, f"{approval}, until {last}")
            self._write(standing)
        return standing

    def decline(self, project_id: str, by: str, reason: str) -> Standing:
        """Refuse a request; it may be made again.

        Raises
        ------
        StoreError
            There is no such request.
        """
        with self._changing():
            before = self._standing(project_id, "requested")
            self._record("project.declined", by, before.project, reason=reason)
            standing = before._after("declined", before.project, _name(by), reason)
            self._write(standing)
        return standing

    def end(self, project_id: str, by: str, reason: str) -> Standing:
        """End an approved project: nothing is granted to it any more.

        One that was ended stays as it is, so that whoever was cut off can go on from here.

        Raises
        ------
        StoreError
            It was not approved here.
        """
        with self._changing():
            before = self._standing(project_id, "approved", "ended")
            if before.state == "ended":
                return before
            self._record("project.ended", by, before.project, reason=reason)
            (self._active / f"{project_id}.json").unlink(missing_ok=True)
            sync_folder(self._active)
            standing = before._after("ended", before.project, _name(by), reason)
            self._write(standing)
        return standing

    def _check_whole(self, project: Project) -> None:
        """Check that the store can read its configuration with a project, as it does on its own.

        It keeps to what it read before where it cannot, and would not even start anew.
        """
        approved = (self._active / f"{project.id}.json").exists()
        others = [one for one in self._config.projects if not approved or one.id != project.id]
        whole = self._config.model_copy(update={"projects": (*others, project)})
        try:
            Config.model_validate_json(whole.model_dump_json())
        except ValidationError as error:
            raise StoreError(explain("the configuration with this project", error)) from None

    def _standing(self, project_id: str, *states: State) -> Standing:
        found = {one.project.id: one for one in self.list()}.get(project_id)
        if found is None or found.state not in states:
            state = "there is none of that id" if found is None else f"it is {found.state}"
            hint = "; it is changed in the configuration" if state == "it is configured" else ""
            raise StoreError(f"project {project_id!r} is not {' or '.join(states)}: {state}{hint}")
        return found

    def _changing(self) -> AbstractContextManager[None]:
        for folder in (self._active, self._register):
            folder.mkdir(mode=0o755, exist_ok=True)
        # Who asked for what, and was declined, is not for everyone on the store.
        self._register.chmod(0o700)
        return locked(self._register / ".lock", wait=True)

    def _record(self, kind: str, by: str, project: Project, **detail: str) -> None:
        self._trail.append(kind, person=_name(by), detail={"project": project.id, **detail})

    def _write(self, standing: Standing) -> None:
        content = json.dumps(standing.as_json(), ensure_ascii=False, indent=1)
        with replacing(self._register / f"{standing.project.id}.json") as file:
            file.write(content.encode())

    @staticmethod
    def _read(path: Path) -> Standing:
        try:
            data = json.loads(path.read_bytes())
            project = Project.model_validate(data["project"])
            return Standing(project=project, state=data["state"], history=tuple(data["history"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: cannot be read as a project's record ({error})") from error


def _name(by: str) -> str:
    if not by.strip() or not by.isprintable():
        raise StoreError("say who it is, by name")
    return by.strip()
