"""The report: tables, plots, and the same as JSON."""

from __future__ import annotations

import re
import statistics
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kakehashi.link.bench.results import PARTS, WAITING, Part, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from kakehashi.link.bench.results import Figure

TITLES: dict[Part, str] = {
    "line": "The line and ssh",
    "reader": "Packed files",
    "ranges": "Small reads",
    "write": "Writing",
    "loop": "A training loop with emulated compute",
    "networks": "Networks: loading apart from compute",
    "segmentation": "CT segmentation, training and test",
}
_CONNECTIONS = re.compile(r"(ssh|reader, packed), (\d+) (?:connection|channel)")
_STEP = re.compile(r"(.+): (a training step.*)")


class Run(BaseModel):
    """What one session measured, and which one it was."""

    model_config = ConfigDict(frozen=True)

    label: Annotated[str, Field(max_length=100)]
    report: Report


class Iperf(BaseModel):
    """What iperf3 said of the line, measured from where the command ran."""

    model_config = ConfigDict(frozen=True)

    server: str
    connections: int
    to_server_mb_s: float
    from_server_mb_s: float


class Study(BaseModel):
    """All that one command measured: one session, or several."""

    model_config = ConfigDict(frozen=True)

    kakehashi_bench_link: Literal[1] = 1
    runs: tuple[Run, ...]
    iperf3: Iperf | None = None
    problems: tuple[str, ...] = ()


def write(study: Study, folder: Path) -> list[Path]:
    """Write ``report.json``, ``report.md`` and the plots; returns what was written.

    Parameters
    ----------
    study : Study
    folder : Path
        Made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.json"]
    written[0].write_text(study.model_dump_json(indent=2) + "\n", encoding="utf-8")
    try:
        plots = _plots(study, folder)
        without = ""
    except ImportError:
        plots, without = [], "No plots: matplotlib is not installed where the command ran."
    text = markdown(study)
    if plots:
        text += "\n## Plots\n\n" + "".join(f"![{one.stem}]({one.name})\n" for one in plots)
    elif without:
        text += f"\n{without}\n"
    written.append(folder / "report.md")
    written[1].write_text(text, encoding="utf-8")
    return written + plots


def markdown(study: Study) -> str:
    """Return the tables as text."""
    lines = ["# The link, measured", ""]
    if not study.runs:
        lines += ["No session gave figures.", ""]
    lines += [f"- **{problem}**" for problem in study.problems]
    for run in study.runs:
        lines += _head(run)
        for part in PARTS:
            figures = [figure for figure in run.report.figures if figure.part == part]
            if figures:
                lines += [f"### {TITLES[part]}", "", *_table(figures), ""]
        if run.report.not_measured:
            lines += ["### Not measured", ""]
            lines += [f"- {_cell(one.what)}: {_cell(one.why)}" for one in run.report.not_measured]
            lines.append("")
    if len(study.runs) > 1:
        lines += ["## Side by side", "", *_side_by_side(study.runs), ""]
    lines += ["## The line itself", "", _line_words(study.iperf3), ""]
    return "\n".join(lines)


def _head(run: Run) -> list[str]:
    report = run.report
    machine, cohort = report.machine, report.cohort
    lines = [
        f"## {_cell(run.label)}: site {_cell(report.site)}",
        "",
        (
            f"- measured {_cell(report.measured_at)} in {report.seconds:.0f} s"
            f"{', in the quick way' if report.quick else ''}"
        ),
        (
            f"- node: {_cell(machine.processor)}, {machine.cores} cores, "
            f"{machine.memory_gib:g} GiB, "
            f"{_cell(', '.join(machine.accelerators) or 'no accelerator')}, "
            f"Linux {_cell(machine.kernel)}"
        ),
        "- versions: " + _pairs(machine.versions),
        (
            f"- data: {cohort.series_used} of the cohort's {cohort.series} series, "
            f"{cohort.bytes_used / 1e6:.1f} of {cohort.bytes / 1e6:.1f} MB"
        ),
        "- ssh: " + _pairs(report.ssh, ": "),
        "",
    ]
    if not report.complete:
        lines += [f"**Not complete: {_cell(report.stopped)}.** What follows was measured.", ""]
    lines += [
        (
            "Medians of the rounds, least and most in brackets. `local` is the same from the "
            "node's own memory, measured in turn; `of local` the median of the rounds' ratios."
        ),
        "",
    ]
    return lines


def _pairs(values: dict[str, str], between: str = " ") -> str:
    return "; ".join(f"{_cell(name)}{between}{_cell(value)}" for name, value in values.items())


def _table(figures: Sequence[Figure]) -> list[str]:
    lines = [
        "| quantity | link | local | of local | rounds |",
        "|---|---|---|---|---|",
    ]
    for figure in figures:
        local = _spread(figure.local, figure.unit) if figure.local else ""
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        lines.append(
            f"| {_cell(figure.name)} | {_spread(figure.values, figure.unit)} | {local} | {ratio} "
            f"| {len(figure.values)} |"
        )
    return lines


def _spread(values: Sequence[float], unit: str) -> str:
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{_value(median, unit)} [{least:.4g}, {most:.4g}]"


def _value(value: float, unit: str) -> str:
    return f"{value:.4g} {_cell(unit)}".strip()


def _side_by_side(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(figure.name for run in runs for figure in run.report.figures)
    lines = [
        "| quantity | " + " | ".join(_cell(run.label) for run in runs) + " |",
        "|---|" + "---|" * len(runs),
    ]
    for name in names:
        found = [run.report.figure(name) for run in runs]
        if sum(one is not None for one in found) > 1:
            cells = ["" if one is None else _value(one.median, one.unit) for one in found]
            lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
    return lines


def _line_words(iperf: Iperf | None) -> str:
    if iperf is None:
        return (
            "Not measured: a session has no way out of its network, and `--iperf3 HOST` was not "
            "given. Rates can be compared with local only, not with the line."
        )
    return (
        f"iperf3 from where the command ran (not from the node) to {_cell(iperf.server)}, "
        f"{iperf.connections} connections: {iperf.to_server_mb_s:.0f} MB/s there, "
        f"{iperf.from_server_mb_s:.0f} MB/s back."
    )


def _cell(text: str) -> str:
    """Return what a session said as plain words of a table."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", plain)


def _plots(study: Study, folder: Path) -> list[Path]:
    """Draw what there is of each plot."""
    # No window, whatever the machine has.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - may be missing
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415 - as above

    written = []
    draws: dict[str, Callable[[Axes, Run], bool]] = {
        "rates": _draw_rates,
        "steps": _draw_steps,
        "waiting": _draw_waiting,
    }
    for number, run in enumerate(study.runs, 1):
        for name, draw in draws.items():
            canvas = Canvas(figsize=(9, 5), layout="constrained")
            FigureCanvasAgg(canvas)
            axes = canvas.add_subplot()
            if draw(axes, run):
                axes.set_title(f"{run.label}, site {run.report.site}", parse_math=False)
                axes.legend()
                written.append(folder / f"{name}-{number}.png")
                canvas.savefig(written[-1], dpi=120)
    return written


def _draw_rates(axes: Axes, run: Run) -> bool:
    """Draw ssh and reader over the number of connections, and the view as a line."""
    curves: dict[str, list[tuple[int, Figure]]] = {}
    for figure in run.report.figures:
        found = _CONNECTIONS.match(figure.name)
        if found:
            curves.setdefault(found[1], []).append((int(found[2]), figure))
        elif figure.name.startswith("view, packed"):
            axes.axhline(figure.median, linestyle=":", color="grey")
            axes.annotate(figure.name, (1, figure.median), va="bottom")
    for name, points in curves.items():
        points.sort(key=lambda point: point[0])
        middle = [figure.median for _, figure in points]
        below = [figure.median - min(figure.values) for _, figure in points]
        above = [max(figure.values) - figure.median for _, figure in points]
        counts = [count for count, _ in points]
        axes.errorbar(counts, middle, [below, above], marker="o", capsize=3, label=name)
    known = sorted({count for points in curves.values() for count, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(known, [str(count) for count in known])
    axes.set_xlabel("connections")
    axes.set_ylabel("MB/s")
    axes.set_ylim(bottom=0)
    return bool(curves)


def _draw_steps(axes: Axes, run: Run) -> bool:
    """Draw each network's step: compute alone, with loading from memory, over the link."""
    bars: dict[str, dict[str, float]] = {}
    for figure in run.report.figures:
        found = _STEP.match(figure.name)
        if figure.part != "networks" or found is None:
            continue
        network = bars.setdefault(found[1], {})
        if figure.local:
            network["with loading, link"] = figure.median
            network["with loading, local"] = statistics.median(figure.local)
        else:
            network["compute alone"] = figure.median
    return _bars(axes, bars, "ms a step")


def _draw_waiting(axes: Axes, run: Run) -> bool:
    bars = {
        figure.name.removesuffix(f": {WAITING}"): {
            "link": figure.median,
            "local": statistics.median(figure.local),
        }
        for figure in run.report.figures
        if figure.name.endswith(f": {WAITING}") and figure.local
    }
    return _bars(axes, bars, "% of the time waiting for data")


def _bars(axes: Axes, bars: dict[str, dict[str, float]], unit: str) -> bool:
    kinds = list(dict.fromkeys(kind for found in bars.values() for kind in found))
    height = 0.8 / max(1, len(kinds))
    for at, kind in enumerate(kinds):
        rows = [row for row, found in enumerate(bars.values()) if kind in found]
        values = [found[kind] for found in bars.values() if kind in found]
        axes.barh([row + at * height for row in rows], values, height, label=kind)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(bars))], list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    return bool(bars)
