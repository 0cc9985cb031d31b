"""``kakehashi store openapi``."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from kakehashi.cli import app
from kakehashi.store.service.openapi import document


def test_the_description_is_printed():
    done = CliRunner().invoke(app, ["store", "openapi"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == document()
