"""The page of benchmarks: one that is measured anew replaces its own part and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.__main__ import LAST, render

if TYPE_CHECKING:
    from bench.figures import Document

PAGE = f"""\
# Benchmarks

Words by hand.

## Reading

old figures

## Writing

their figures

## {LAST}

what was reported
"""


def measured(title: str, *series: tuple[str, float]) -> Document:
    """Return what a benchmark writes."""
    found: list[dict[str, Any]] = [{"name": name, "median": value} for name, value in series]
    return {
        "title": title,
        "quick": False,
        "measured_at": "2026-01-01T00:00:00+00:00",
        "machine": {"processor": "P", "cores": 2, "memory_gib": 8, "kernel": "6"},
        "cpu_seconds": 1.0,
        "series": found,
        "goals": [],
        "tables": [{"title": title, "columns": ["way", "MB/s"], "rows": [["ours", "123"]]}],
    }


def test_a_benchmark_replaces_its_own_part_only() -> None:
    page = render(PAGE, [measured("Reading")])
    assert "old figures" not in page
    assert "| ours | 123 |" in page
    for stays in ("Words by hand.", "their figures", "what was reported"):
        assert stays in page
    assert page.index("## Reading") < page.index("## Writing")


def test_a_new_benchmark_comes_before_the_last_part() -> None:
    page = render(PAGE, [measured("Searching")])
    assert page.index("## Writing") < page.index("## Searching") < page.index(f"## {LAST}")


def test_measured_twice_is_the_same_as_once() -> None:
    once = render(PAGE, [measured("Reading"), measured("Searching")])
    assert render(once, [measured("Reading"), measured("Searching")]) == once
