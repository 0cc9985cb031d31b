"""The wrapper runs on the standard library alone, and starts fast."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"
LIST = (
    "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
    "import kakehashi.session.enter\n"
    "print('\\n'.join(set(sys.modules) - before))"
)


def test_only_the_standard_library_is_loaded() -> None:
    argv = [sys.executable, "-I", "-S", "-c", LIST, str(SOURCE)]
    names = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    own = {name for name in names if name.partition(".")[0] == "kakehashi"}
    allowed = ("kakehashi.session", "kakehashi.errors", "kakehashi.secret")
    assert {name for name in own if not name.startswith(allowed)} == {"kakehashi"}
    others = {name.partition(".")[0] for name in names} - {"kakehashi"}
    assert others <= sys.stdlib_module_names | {"_sysconfigdata__x86_64-linux-gnu"}


def test_how_long_the_start_takes(capsys: object) -> None:
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        argv = [sys.executable, "-I", "-S", "-c", LIST, str(SOURCE)]
        subprocess.run(argv, capture_output=True, check=True)
        times.append(time.perf_counter() - begun)
    # Told, not judged: it depends on the machine.
    print(f"wrapper imported in {1000 * min(times):.0f} ms (fastest of 5)")
