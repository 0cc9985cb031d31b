"""``python -m kakehashi.link.bench``: as an operator's command starts it in a session."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from kakehashi.errors import KakehashiError
from kakehashi.link.bench.results import PARTS, without_names
from kakehashi.link.bench.run import measure
from kakehashi.link.bench.ways import Settings
from kakehashi.link.session import Session


def main() -> int:
    """Measure, tell progress on standard error, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m kakehashi.link.bench", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compute", type=float, default=Settings.compute_s, metavar="SECONDS")
    parser.add_argument("--part", action="append", choices=PARTS)
    options = parser.parse_args()
    # A program that a notebook starts may have been told to ignore it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    settings = Settings.chosen(quick=options.quick, compute_s=options.compute)
    try:
        report = measure(Session.current(), settings, options.part or PARTS)
    except KakehashiError as error:
        sys.stderr.write(f"{without_names(str(error))}\n")
        return 1
    # What there is shall not be lost to whoever asks for it once more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options.json.write_text(report.model_dump_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
