"""What the person's server lets a browser keep: its own files, and no answer that carries data."""

from __future__ import annotations

import pytest

from tests.widgets.lab import Lab


@pytest.mark.parametrize(
    "path",
    [
        "lab",
        "lab/tree/nothing.ipynb",
        "lab/api/settings/",
        "lab/api/workspaces/default",
        "lab/api/translations/",
        "api/status",
        "api/contents",
        "api/contents?content=1",
        "api/contents/nothing.ipynb",
        "api/sessions",
        "api/kernels",
        "api/kernelspecs",
        "api/terminals",
        "api/nbconvert",
        "api/me",
        "files/nothing.csv",
        "nbconvert/html/nothing.ipynb",
        "kernelspecs/python3/logo-64x64.png",
        "kakehashi/cohort",
        "kakehashi/series/1.2.3",
        "kakehashi/session",
        "metrics",
        "nothing",
        "static/nothing.js",
        "lab/extensions/nothing.js",
    ],
)
def test_no_answer_is_kept(lab: Lab, path: str) -> None:
    assert lab.get(path).headers["Cache-Control"] == "no-store"


def test_a_series_is_not_kept(lab: Lab) -> None:
    uid = lab.get("kakehashi/cohort").json()["rows"][0]["uid"]
    for path in ("", "/slice/k/0", "/slice/nothing/0"):
        answer = lab.get(f"kakehashi/series/{uid}{path}")
        assert answer.headers["Cache-Control"] == "no-store"


def test_the_labs_own_files_may_be_kept(lab: Lab) -> None:
    answer = lab.get("static/favicons/favicon.ico")
    assert answer.status_code == 200
    assert "no-store" not in answer.headers.get("Cache-Control", "")


def test_pages_load_and_send_nothing_elsewhere(lab: Lab) -> None:
    policy = lab.get("lab").headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "*" not in policy
