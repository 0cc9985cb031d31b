"""What holds for all tests, wherever they run."""

from __future__ import annotations

import resource

from hypothesis import settings

# What a session gets on most nodes, so that what keeps too many files open is seen here.
OPEN_FILES = 1024

# How long an example takes is the machine's business; a test's own limit ends one that hangs.
settings.register_profile("kakehashi", deadline=None)
settings.load_profile("kakehashi")


def pytest_configure() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, most), most))
