"""``kakehashi store synthetic``: studies that nobody had, for demo and tests."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 - typer reads it at run time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def synthetic(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write into.")],
    *,
    studies: Annotated[int, typer.Option(min=1, help="How many studies.")] = 10,
    seed: Annotated[int, typer.Option(help="Another seed gives other people.")] = 1,
    facility: Annotated[
        str | None, typer.Option(help="Only this one, F01 to F10; else all ten.")
    ] = None,
    size: Annotated[int, typer.Option(help="Rows and columns: 512, 256 or 128.")] = 512,
) -> None:
    """Make studies of people who do not exist: DICOM files, reports, and what is true of them.

    The same options give the same files. Each study is a folder OUT/FACILITY/NUMBER; it can be
    interrupted and repeated, and studies that are complete stay.
    """
    from kakehashi.errors import StoreError
    from kakehashi.store.synthetic import TRUTH, VERSION, plan_studies, write_study

    plans = plan_studies(studies, seed=seed, size=size, facility=facility)
    there = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        for plan in progress.track(plans, description="studies"):
            folder = out / plan.facility / f"{plan.index:06d}"
            if not folder.exists():
                write_study(plan, folder)
                continue
            try:
                truth = json.loads((folder / TRUTH).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                truth = {}
            if (truth.get("study_uid"), truth.get("version")) != (plan.study_uid, VERSION):
                raise StoreError(
                    f"{folder} holds something else than this study; remove it, or choose "
                    "another folder"
                )
            there += 1
    typer.echo(f"{len(plans) - there} studies written to {out}, {there} were there already")
