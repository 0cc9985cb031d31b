"""``kakehashi verify-site``: whether a site keeps the three rules."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kakehashi.config import read_secret
from kakehashi.errors import ConfigError

if TYPE_CHECKING:
    from kakehashi.verify.canary import Deployment

SEARCH_S = 1800


class PlanHost(BaseModel):
    """One host that is searched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    role: Literal["hub", "store", "node", "head"]
    run: tuple[str, ...] = Field(
        min_length=1, description="Argument list that runs what follows as root there."
    )
    software: Path = Path("/opt/kakehashi")
    skip: tuple[str, ...] = ()


class Plan(BaseModel):
    """Where and as whom the canary flies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    portal: str
    ca_file: Path | None = None
    person: str
    token_file: Path
    project: str
    options: dict[str, str | int | float]
    hosts: tuple[PlanHost, ...] = Field(min_length=1)


@dataclass(frozen=True)
class RemoteHost:
    """A host by the plan's words."""

    host: PlanHost

    @property
    def name(self) -> str:
        """Return its name."""
        return self.host.name

    @property
    def role(self) -> str:
        """Return what it does."""
        return self.host.role

    @property
    def skip(self) -> tuple[str, ...]:
        """Return the paths that are not searched."""
        return (*self.host.skip, str(self.host.software))

    def python(self, module: str, *arguments: str, stdin: str = "") -> str:
        """Run a module of the host's installation as root.

        Raises
        ------
        VerifyError
            It failed; the message holds what it said.
        """
        from kakehashi.verify.canary import VerifyError

        python = str(self.host.software / ".venv/bin/python")
        try:
            done = subprocess.run(
                [*self.host.run, python, "-m", module, *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=SEARCH_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise VerifyError(f"{self.name}: {error}") from None
        if done.returncode:
            raise VerifyError(f"{self.name}: {module} failed: {done.stderr.strip()[-500:]}")
        return done.stdout


def load_plan(path: Path, site: str, profile: Path | None = None) -> Deployment:
    """Return the deployment that a plan describes.

    Raises
    ------
    ConfigError
        The file cannot be read, or breaks a rule.
    """
    from kakehashi.verify.canary import Deployment
    from kakehashi.verify.profile import PersonsBrowser
    from kakehashi.verify.visitor import Visitor

    try:
        plan = Plan.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        words = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problems)
        raise ConfigError(f"{path}: {words}") from None
    ca_file = None if plan.ca_file is None else str(plan.ca_file)
    return Deployment(
        visitor=Visitor(plan.portal, plan.person, ca_file, read_secret(plan.token_file)),
        site=site,
        project=plan.project,
        options=plan.options,
        hosts=[RemoteHost(host) for host in plan.hosts],
        browser=None if profile is None else PersonsBrowser(profile),
    )


def lab_deployment(site: str) -> Deployment:
    """Return the running lab of the repository.

    Raises
    ------
    ConfigError
        There is none.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "tests" / "lab").is_dir():
        raise ConfigError("--lab needs the repository, with its folder tests/lab")
    sys.path.insert(0, str(root))
    from tests.lab import lab, verify

    running = lab.status()
    if running is None:
        raise ConfigError("the lab does not run; `make lab` starts it")
    return verify.deployment(running, site)


def verify_site(
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site, by its name.")],
    *,
    plan: Annotated[
        Path | None, typer.Option(help="TOML file: portal, person, hosts and how to reach root.")
    ] = None,
    lab: Annotated[bool, typer.Option("--lab", help="The lab of the repository.")] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            resolve_path=True,
            help="Profile of a Chromium on this machine, to be searched too; with --plan.",
        ),
    ] = None,
    end: Annotated[str, typer.Option(metavar="WAY", help="How the session ends.")] = "stop",
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Plant the pattern everywhere; find it all.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object last.")] = False,
) -> None:
    """Fly a canary session and search every host for what it may have left.

    Exits with 0 where nothing was found that may not be, 1 otherwise.
    """
    from kakehashi.verify.canary import Canary, self_test_of

    if lab == (plan is not None):
        raise typer.BadParameter("say either --lab or --plan FILE")
    if profile is not None and (lab or self_test):
        raise typer.BadParameter("--profile goes with --plan, and not with --self-test")
    deployment = lab_deployment(site) if plan is None else load_plan(plan, site, profile)
    report = self_test_of(deployment) if self_test else Canary(deployment, end).run()
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _show(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if name == "looked":
            continue
        if isinstance(value, list):
            typer.echo(f"{name}: {len(value)}")
            for one in value:
                typer.echo(f"  {one if isinstance(one, str) else json.dumps(one)}")
        else:
            typer.echo(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
