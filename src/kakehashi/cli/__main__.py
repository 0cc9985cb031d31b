"""``python -m kakehashi.cli``: the command line where scripts of the environment do not run."""

from __future__ import annotations

from kakehashi.cli import main

if __name__ == "__main__":
    main()
