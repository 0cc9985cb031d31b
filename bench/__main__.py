"""Run every benchmark and render ``docs/benchmarks.md``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.figures import Document

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
BENCHMARKS = (
    "spawn",
    "link",
    "loop",
    "save",
    "outages",
    "growth",
    "pack",
    "receive",
    "catalogue",
    "views",
)


def render(documents: list[Document]) -> str:
    """Write the page of all benchmarks."""
    lines = [
        "# Benchmarks",
        "",
        "Measured side by side in one run, in turn. Times on a shared machine are noisy: the",
        "ratios and differences between the rows of one table say more than the rows.",
        "`make bench` measures all of it anew and writes this page.",
        "",
    ]
    for document in documents:
        where = document["machine"]
        lines += [
            f"## {document['title']}",
            "",
            ", ".join(
                [
                    document["measured_at"],
                    where["processor"],
                    f"{where['cores']} cores",
                    f"{where['memory_gib']} GiB",
                    f"Linux {where['kernel']}",
                ]
            ),
            "",
        ]
        for table in document["tables"]:
            if table["title"] != document["title"]:
                lines += [f"### {table['title']}", ""]
            lines += [
                f"| {' | '.join(table['columns'])} |",
                "|---|" + "---:|" * (len(table["columns"]) - 1),
                *(f"| {' | '.join(row)} |" for row in table["rows"]),
                "",
            ]
        for goal in document["goals"]:
            lines.append(
                f"- {goal['name']}: {goal['value']:.3g} (95 % bounds {goal['low']:.3g} to "
                f"{goal['high']:.3g}), goal {goal['goal']}: "
                f"{'met' if goal['met'] else '**not met**'}"
            )
        lines.append("")
    if not any(document["quick"] for document in documents):
        lines += beside_the_original(documents)
    return "\n".join(lines)


ORIGINAL = """\
## Beside the original set-up

What was reported of the portal's predecessor, which mounted the same platform over ssh for training
on eight GPUs, and what was measured here. The lines differ: there real ones of 10 Gbit/s, here
an emulated one, with both of its ends and the line itself on one machine.

| | reported | here |
|---|---|---|
| reading | 2.2 Gbit/s on average, 2.6 at best, by two sessions | one reader: {line} of 2 Gbit/s \
at 10 ms; {free} where only the machine is the limit |
| a cut of five minutes | the training went on | {errors:.0f} errors, {wrong:.0f} wrong parts; \
full rate {back:.1f} s after the line |
| five days without network | trainings of two weeks had to be stopped | a loop goes on over \
what is [pinned](training.md); shown by `tests/link/test_maintenance.py` with short lifetimes |
"""


def beside_the_original(documents: list[Document]) -> list[str]:
    """Lay the reported figures of the set-up that came before beside these."""
    found: dict[str, float] = {}
    for document in documents:
        for one in document["series"]:
            found[one["name"]] = one["median"]
        for goal in document["goals"]:
            found[goal["name"]] = goal["value"]
    stream = "packed, reader, one stream"
    return [
        ORIGINAL.format(
            line=f"{found[f'10 ms, 2 Gbit/s: {stream}'] * 8 / 1000:.1f}",
            free=f"{found[f'10 ms, no limit: {stream}'] * 8 / 1000:.1f} Gbit/s",
            errors=found["errors"],
            wrong=found["parts with a wrong byte"],
            back=found["cut of 300 s"],
        )
    ]


def main() -> int:
    """Run all; exit status 1 where a benchmark failed to run."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    documents: list[Document] = []
    for name in BENCHMARKS:
        path = results / f"{name}.json"
        done = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), "--json", str(path), *sys.argv[1:]],
            cwd=HERE.parent,
            check=False,
        )
        if done.returncode:
            return 1
        documents.append(json.loads(path.read_text()))
    PAGE.write_text(render(documents))
    return 0


if __name__ == "__main__":
    sys.exit(main())
