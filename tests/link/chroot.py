"""Run an SFTP server that has a folder as /work, as the store has, and little else.

Started by root with the folder that is to be /work; talks on standard input and output.
"""

import os
import subprocess
import sys
from pathlib import Path

SYSTEM = ("dev", "etc", "lib", "lib64", "usr")


def main(work: str) -> None:
    mount = ["/bin/mount", "--no-mtab"]
    source = os.open(work, os.O_PATH | os.O_DIRECTORY)
    subprocess.run([*mount, "-t", "tmpfs", "none", "/mnt"], check=True)
    places = [(f"/{name}", f"/mnt/{name}") for name in SYSTEM if Path(f"/{name}").is_dir()]
    places.append((f"/proc/{os.getpid()}/fd/{source}", "/mnt/work"))
    for origin, place in places:
        Path(place).mkdir()
        subprocess.run([*mount, "--bind", origin, place], check=True)
    os.close(source)
    os.chroot("/mnt")
    os.chdir("/")
    os.execv("/usr/lib/openssh/sftp-server", ["sftp-server"])


if __name__ == "__main__":
    main(sys.argv[1])
