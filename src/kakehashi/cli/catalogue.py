"""``kakehashi store openapi``: the catalogue service's description."""

from __future__ import annotations

import json

import typer


def openapi() -> None:
    """Print the description of the catalogue service (OpenAPI 3.1)."""
    from kakehashi.store.service.openapi import document

    typer.echo(json.dumps(document(), ensure_ascii=False, indent=2))
