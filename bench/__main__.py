"""Run every benchmark and render ``docs/benchmarks.md``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
BENCHMARKS = ("spawn", "link")


def render(documents: list[dict[str, object]]) -> str:
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
        assert isinstance(where, dict)
        lines += [
            f"## {document['title']}",
            "",
            ", ".join(
                [
                    str(document["measured_at"]),
                    str(where["processor"]),
                    f"{where['cores']} cores",
                    f"{where['memory_gib']} GiB",
                    f"Linux {where['kernel']}",
                ]
            ),
            "",
        ]
        for table in document["tables"]:  # type: ignore[attr-defined]
            if table["title"] != document["title"]:
                lines += [f"### {table['title']}", ""]
            lines += [
                f"| {' | '.join(table['columns'])} |",
                "|---|" + "---:|" * (len(table["columns"]) - 1),
                *(f"| {' | '.join(row)} |" for row in table["rows"]),
                "",
            ]
        for goal in document["goals"]:  # type: ignore[attr-defined]
            lines.append(
                f"- {goal['name']}: {goal['value']:.3g} (95 % bounds {goal['low']:.3g} to "
                f"{goal['high']:.3g}), goal {goal['goal']}: "
                f"{'met' if goal['met'] else '**not met**'}"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Run all; exit status 1 where a benchmark failed to run."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    documents = []
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


sys.exit(main())
