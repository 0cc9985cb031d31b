"""Stands in for the session wrapper in tests of the login server. Standard library only.

It is laid down as ``SOFTWARE/.venv/bin/python`` and started by the real agent. What it does
stands in ``SOFTWARE/plan.json``: ``hold`` only writes its document down and waits, so that the
test itself can be the node; ``serve`` enrols and serves, and on SIGUSR1 it goes deaf;
``refuse`` says why it cannot start; ``exit`` ends at once.
"""

import http.server
import json
import os
import signal
import socket
import ssl
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def post(document: dict, call: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"{document['portal_url']}/hub/api/kakehashi/{call}",
        json.dumps({"session": document["session"], **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


class Lab(http.server.BaseHTTPRequestHandler):
    """Answers as a person's server does to the hub's knock."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({"version": "stand-in", "path": self.path}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve(document: dict) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    listener = socket.create_server(("127.0.0.1", 0))
    answer = post(
        document,
        "enrol",
        {
            "ticket": document["ticket"],
            "public_key": "ssh-ed25519 " + "A" * 68,
            "port": listener.getsockname()[1],
            "host": "anywhere",
            "job": os.environ["KAKEHASHI_JOB"],
            "walls": "namespaces",
            "hub_port": None,
            "software": document["software"],
            "checks": [],
        },
    )
    write("answer", document, answer)
    files = answer["server"]["files"]
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text)
        context.load_cert_chain(Path(folder, "server.crt"), Path(folder, "server.key"))
        context.load_verify_locations(Path(folder, "authorities.crt"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Lab, bind_and_activate=False)
    server.socket.close()
    server.socket = context.wrap_socket(listener, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Told to be deaf, it lives on and listens no more.
    signal.sigwait({signal.SIGUSR1})
    server.shutdown()
    server.server_close()
    signal.pause()


def write(kind: str, document: dict, value: dict) -> None:
    path = HERE / "seen" / f"{kind}-{document['session']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.chmod(0o644)
    part.rename(path)


def main() -> None:
    document = json.loads(sys.stdin.readline())
    plan = json.loads((HERE / "plan.json").read_text())
    facts = {
        "argv": sys.argv[1:],
        "environment": dict(os.environ),
        "uid": os.getuid(),
        "groups": os.getgroups(),
        "cwd": str(Path.cwd()),
        "pid": os.getpid(),
    }
    write("document", document, document)
    write("facts", document, facts)
    if plan["mode"] == "serve":
        serve(document)
    elif plan["mode"] == "refuse":
        post(document, "refuse", {"ticket": document["ticket"], "failures": plan["failures"]})
    elif plan["mode"] == "hold":
        signal.pause()


if __name__ == "__main__":
    main()
