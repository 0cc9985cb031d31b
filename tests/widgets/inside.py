"""Run a command in a mount namespace of its own, with a folder as its /run/kakehashi.

So the command finds the session where a payload finds it, and the machine's /run is untouched.
"""

import os
import subprocess
import sys
from pathlib import Path


def main(folder: str, command: list[str]) -> None:
    # Opened before /run is covered, in case the folder lies under it.
    source = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    mount = ["/bin/mount", "--no-mtab"]
    subprocess.run([*mount, "-t", "tmpfs", "none", "/run"], check=True)
    target = Path("/run/kakehashi")
    target.mkdir()
    subprocess.run([*mount, "--bind", f"/proc/{os.getpid()}/fd/{source}", str(target)], check=True)
    os.close(source)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
