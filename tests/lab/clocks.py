"""Hosts of the lab whose clock is wrong.

All processes of the machine share one kernel clock, so what a host asks its C library for the time
of day is answered with a difference. ``/etc/ld.so.preload`` reaches every program that the host
starts from then on, those with a cleaned environment and set-user-ID ones as well; a session's
payload has an ``/etc`` of its own, and keeps the kernel's clock. Waiting goes by the monotonic
clock, which no wrong time of day changes, and is left as it is. So are the scheduler's own
programs: munge refuses a difference of more than five minutes, on a real cluster too.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.hosts import Host
from tests.lab.lab import RUN_DIR, Lab

PRELOAD = "/etc/ld.so.preload"
LIBRARY = "/usr/lib/wrong-clock.so"
SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static time_t ahead(void) {
  const char *name = program_invocation_short_name;
  if (name == NULL) return AHEAD_S;
  return strncmp(name, "slurm", 5) && strncmp(name, "mung", 4) ? AHEAD_S : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = syscall(SYS_clock_gettime, clock, now);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    now->tv_sec += ahead();
  return result;
}

int gettimeofday(struct timeval *now, void *zone) {
  int result = syscall(SYS_gettimeofday, now, zone);
  if (!result) now->tv_sec += ahead();
  return result;
}

time_t time(time_t *copy) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (copy) *copy = now.tv_sec;
  return now.tv_sec;
}
"""


@contextmanager
def wrong(host: Host, ahead_s: int) -> Iterator[None]:
    """Let what a host starts from now on see a clock that is ahead, or behind (negative)."""
    library = _built(ahead_s)
    host.path(LIBRARY).write_bytes(library.read_bytes())
    host.write(PRELOAD, f"{LIBRARY}\n")
    try:
        yield
    finally:
        host.path(PRELOAD).unlink()


def _built(ahead_s: int) -> Path:
    library = RUN_DIR / f"clock{ahead_s:+d}.so"
    if not library.exists():
        flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", f"-DAHEAD_S=({ahead_s})"]
        subprocess.run(
            ["gcc", *flags, "-x", "c", "-", "-o", str(library)],
            input=SOURCE, text=True, check=True,
        )  # fmt: skip
    return library


def ahead(host: Host) -> float:
    """Return by how many seconds a host's clock is ahead of the machine's."""
    shown = host.run(["date", "+%s.%N"])
    return float(shown.stdout) - time.time()


def all_ahead(lab: Lab) -> dict[str, int]:
    """Return the hosts whose clock is wrong, and by how many minutes it is ahead."""
    seen = {name: round(ahead(host) / 60) for name, host in lab.hosts.items()}
    return {name: minutes for name, minutes in seen.items() if minutes}


def is_wrong(host: Host, pid: int) -> bool:
    """Tell whether a process of a host sees the wrong clock."""
    return LIBRARY in host.path(f"/proc/{pid}/maps").read_text()
