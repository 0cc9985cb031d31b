"""Run benchmarks, and put what they measured on ``docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import json
import re
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
LAST = "Beside the original set-up"


def section(document: Document) -> str:
    """Write the part of the page that one benchmark has."""
    where = document["machine"]
    lines = [
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
    return "\n".join([*lines, ""])


def render(page: str, documents: list[Document]) -> str:
    """Put what was measured in place of what a page has of the same benchmarks."""
    first, *rest = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    parts = {part.partition("\n")[0].removeprefix("## "): part for part in rest}
    for document in documents:
        parts[document["title"]] = section(document) + "\n"
    last = beside_the_original(documents) or parts.get(LAST, "")
    parts.pop(LAST, None)
    return "".join([first, *parts.values(), last]).rstrip("\n") + "\n"


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


def beside_the_original(documents: list[Document]) -> str:
    """Lay the reported figures of the set-up that came before beside these, if all are there."""
    found: dict[str, float] = {}
    for document in documents:
        for one in document["series"]:
            found[one["name"]] = one["median"]
        for goal in document["goals"]:
            found[goal["name"]] = goal["value"]
    stream = "packed, reader, one stream"
    line, free = f"10 ms, 2 Gbit/s: {stream}", f"10 ms, no limit: {stream}"
    errors, wrong, back = "errors", "parts with a wrong byte", "cut of 300 s"
    if not {line, free, errors, wrong, back} <= found.keys():
        return ""
    return ORIGINAL.format(
        line=f"{found[line] * 8 / 1000:.1f}",
        free=f"{found[free] * 8 / 1000:.1f} Gbit/s",
        errors=found[errors],
        wrong=found[wrong],
        back=found[back],
    )


def main() -> int:
    """Run those named, or all; exit status 1 where a benchmark failed to run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=main.__doc__)
    parser.add_argument("name", nargs="*", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="each in a minute; no page is written")
    options = parser.parse_args()
    if unknown := set(options.name) - set(BENCHMARKS):
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    documents: list[Document] = []
    for name in options.name or BENCHMARKS:
        path = results / f"{name}.json"
        done = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), "--json", str(path)]
            + ["--quick"] * options.quick,
            cwd=HERE.parent,
            check=False,
        )
        if done.returncode:
            return 1
        if not options.quick:
            # After each one: they take hours, and what was measured is not to be lost.
            documents.append(json.loads(path.read_text()))
            PAGE.write_text(render(PAGE.read_text(), documents))
    return 0


if __name__ == "__main__":
    sys.exit(main())
