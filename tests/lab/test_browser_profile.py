"""What a person's browser keeps of a session: nothing that came from the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from kakehashi.verify.canary import Canary
from kakehashi.verify.profile import STATIC, answers_kept
from tests.lab import verify
from tests.lab.browser import OwnBrowser
from tests.lab.lab import Lab

pytestmark = pytest.mark.lab


@pytest.fixture
def own_browser(lab: Lab, tmp_path: Path) -> OwnBrowser:
    """Give the canary a browser with a fresh profile."""
    return OwnBrowser(lab.url, verify.PERSON, tmp_path / "browser", shots=tmp_path)


def test_a_browser_keeps_nothing_of_a_session(lab: Lab, own_browser: OwnBrowser) -> None:
    report = Canary(verify.deployment(lab, browser=own_browser)).run()
    assert [one for one in report["findings"] if one["host"] == "browser"] == []
    assert report["ok"], report
    assert report["browser_searched"]
    for control in ("cache", "cache, packed", "storage"):
        assert report["control"][f"browser: {control}"] > 0
    # Neither notebook nor viewer asked for anything that the pages' policy forbids.
    (canary,) = own_browser.seen
    assert canary.errors == []
    assert [text for text in canary.console if "Content Security Policy" in text] == []
    assert canary.outside == []
    # The browser does keep what the portal lets it: the search of its cache is not blind.
    kept = answers_kept(own_browser.folders[0], lab.url)
    assert any(path.startswith("/hub/") for path in kept if STATIC.match(path))
    assert any(path.startswith("/user/") for path in kept if STATIC.match(path))
