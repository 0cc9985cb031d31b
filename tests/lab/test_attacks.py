"""What must be refused on the lab, with real accounts and hosts, and stand in the audit."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable

import pytest
import requests

from tests.lab import look
from tests.lab.client import Client, ClientError
from tests.lab.hosts import Host, wait_for
from tests.lab.lab import Lab

pytestmark = pytest.mark.lab

# What a node says of its walls when it enrols.
WALLS = {"walls": "namespaces", "hub_port": None}

People = Callable[[str], Client]
PLAIN = {"site": "slurm", "queue": "gpu", "gpus": 0, "hours": 1.0, "project": "lung-ct"}
TANAKA = "ka0001"


def ssh_key() -> str:
    """Return a well-formed Ed25519 public key that nobody has the private half of."""
    kind = b"ssh-ed25519"
    blob = len(kind).to_bytes(4, "big") + kind + (32).to_bytes(4, "big") + secrets.token_bytes(32)
    return f"ssh-ed25519 {base64.b64encode(blob).decode()}"


def post_from_node(lab: Lab, path: str, document: object, token: str = "") -> tuple[int, str]:
    """Post to the portal from a compute node, as a job there would."""
    script = (
        "import json, ssl, sys, urllib.request as u, urllib.error as e\n"
        "url, document, token = json.load(sys.stdin)\n"
        "context = ssl._create_unverified_context()\n"
        "request = u.Request(url, json.dumps(document).encode(),"
        " {'Content-Type': 'application/json', **({'Authorization': 'token ' + token}"
        " if token else {})})\n"
        "try:\n"
        "    with u.urlopen(request, context=context, timeout=20) as answer:\n"
        "        print(json.dumps([answer.status, answer.read().decode()]))\n"
        "except e.HTTPError as error:\n"
        "    print(json.dumps([error.code, error.read().decode()]))\n"
    )
    answer = lab["node1"].run(
        ["/usr/bin/python3", "-I", "-c", script],
        user=TANAKA,
        stdin=json.dumps([lab.url + path, document, token]),
    )
    status, text = json.loads(answer.stdout)
    return int(status), str(text)


def server_token(kernel: object) -> str:
    """Return the token of the person's own server, which their payload holds."""
    return str(kernel.value("__import__('os').environ['JUPYTERHUB_API_TOKEN']"))  # type: ignore[attr-defined]


def test_batchspawners_endpoint_is_not_there(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    tanaka.start(PLAIN)
    with tanaka.kernel() as kernel:
        token = server_token(kernel)
    marker = "/tmp/owned-by-batchspawner"
    attack = {"exec_prefix": f"touch {marker};", "port": 4444}
    for path in ("/hub/api/batchspawner", "/hub/api/kakehashi/enrol"):
        status, _ = post_from_node(lab, path, attack, token)
        assert status in {400, 403, 404, 405, 422}
    # A poll later nothing of it has been run.
    assert tanaka.server() is not None
    assert not lab["login"].path(marker).exists()
    # The control: the token is good for what it is for.
    answer = requests.get(
        f"{lab.url}/hub/api/user",
        headers={"Authorization": f"token {token}"},
        verify=str(lab.ca_file),
        timeout=10,
        proxies={"http": "", "https": ""},
    )
    assert answer.status_code == 200


def test_a_servers_token_does_not_get_another_key_signed(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    tanaka.start(PLAIN)
    with tanaka.kernel() as kernel:
        token = server_token(kernel)
    session = look.open_sessions(lab)[0]
    before = len(look.audit(lab))
    status, text = post_from_node(
        lab,
        "/hub/api/kakehashi/enrol",
        {"session": session, "ticket": token, "public_key": ssh_key(), "port": 5555,
         "host": "node1", "job": "1", "software": "0.1.0", "checks": [], **WALLS},
        token,
    )  # fmt: skip
    assert status in {401, 403, 409, 410, 422}, text
    for path in ("renew", "leave"):
        status, _ = post_from_node(
            lab,
            f"/hub/api/kakehashi/{path}",
            {"session": session, "message": json.dumps({"renew": session, "counter": 99}),
             "signature": base64.b64encode(secrets.token_bytes(64)).decode()},
            token,
        )  # fmt: skip
        assert status in {401, 403, 409, 410, 422}
    wait_for("the refusals in the audit", lambda: len(look.audit(lab)) > before)
    kinds = {record["kind"] for record in look.audit(lab)[before:]}
    assert any("refused" in kind for kind in kinds), kinds


def test_a_ticket_that_is_used_again_ends_the_session_with_an_alarm(
    lab: Lab, person: People
) -> None:
    tanaka = person("tanaka")
    answer = tanaka.call("POST", "/hub/api/users/tanaka/server", PLAIN)
    assert answer.status_code in {201, 202}
    tanaka.wait_ready()
    session = look.open_sessions(lab)[0]
    # The thief has the job's script, where the ticket stood until it was redeemed.
    job = lab["login"].run(["squeue", "-h", "-u", TANAKA, "-o", "%i"]).stdout.strip()
    script = lab["login"].run(["scontrol", "write", "batch_script", job, "-"], user=TANAKA).stdout
    document = json.loads(next(line for line in script.splitlines() if line.startswith("{")))
    assert document["session"] == session
    status, text = post_from_node(
        lab,
        "/hub/api/kakehashi/enrol",
        {"session": session, "ticket": document["ticket"], "public_key": ssh_key(), "port": 5555,
         "host": "node1", "job": job, "software": document["software"], "checks": [], **WALLS},
    )  # fmt: skip
    assert status == 409, text
    assert json.loads(text)["error"] == "replayed"
    wait_for("the session's end", lambda: session not in look.open_sessions(lab), 30)
    wait_for("closed connections", lambda: not look.store_connections(lab), 10)
    kinds = [record["kind"] for record in look.audit(lab) if record.get("session") == session]
    assert any("alarm" in kind or "replayed" in kind for kind in kinds), kinds
    wait_for("the hub's notice", lambda: tanaka.server() is None, 60)
    wait_for("the job's end", lambda: not look.processes(lab["node1"], TANAKA), 30)


def test_another_account_on_the_node_reaches_nothing_of_a_session(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    tanaka.start(PLAIN)
    node = look.node_of(lab, TANAKA)
    assert node is not None
    pid = look.keeper(node, TANAKA)
    attempts = (
        ["cat", f"/proc/{pid}/environ"],
        ["ls", f"/proc/{pid}/root"],
        ["ls", f"/proc/{pid}/fd"],
        ["nsenter", "--target", str(pid), "--user", "--mount", "ls"],
    )
    children = node.run(["pgrep", "-u", TANAKA]).stdout.split()
    for account in ("ka0002", TANAKA):
        for attempt in attempts:
            assert node.run(attempt, user=account, check=False).returncode != 0, (account, attempt)
    for child in children:
        for name in ("environ", "mem", "root", "fd"):
            done = node.run(["ls", f"/proc/{child}/{name}/"], user="ka0002", check=False)
            assert done.returncode != 0
    # What anyone can see holds no secret: command lines and the scheduler's word.
    seen = node.run(["ps", "ax", "-o", "args="], user="ka0002").stdout
    seen += lab["login"].run(["scontrol", "show", "job"], user="ka0002").stdout
    with tanaka.kernel() as kernel:
        token = server_token(kernel)
    assert token not in seen
    assert "PRIVATE KEY" not in seen


INSIDE = """
import os, socket, stat, subprocess
found = {}
def attempt(name, act):
    try:
        act()
    except Exception as error:
        found[name] = type(error).__name__
    else:
        found[name] = "DONE"
places = ["/", "/usr", "/etc", "/opt", "/opt/kakehashi", "/dev", "/proc", "/sys", "/run",
          "/run/kakehashi", "/run/kakehashi/server", "/store", "/store/series", "/var", "/home",
          "/mnt", "/usr/local", "/var/spool", "/root", "/srv"]
for place in places:
    attempt("write " + place, lambda: open(place + "/planted", "w"))
for host, port in (("10.77.1.20", 22), ("10.77.1.10", 8000), ("10.77.1.10", 8081),
                   ("10.77.2.10", 6817), ("10.77.2.1", 22), ("10.77.1.30", 9400)):
    attempt(f"reach {host}:{port}", lambda: socket.create_connection((host, port), 3))
attempt("submit a job", lambda: subprocess.run(["sbatch", "--wrap", "id"], check=True, timeout=3))
attempt("scheduler's socket", lambda: os.stat("/run/munge/munge.socket.2"))
attempt("trace init", lambda: open("/proc/1/mem", "rb").read(1))
attempt("init's environment", lambda: open("/proc/1/environ", "rb").read())
attempt("a new namespace", lambda: subprocess.run(["unshare", "--user", "true"], check=True))
attempt("unmount", lambda: subprocess.run(["umount", "/store"], check=True))
attempt("mount", lambda: subprocess.run(["mount", "-t", "tmpfs", "t", "/tmp"], check=True))
attempt("the ssh agent", lambda: os.stat(os.environ["SSH_AUTH_SOCK"]))
keys = []
for folder, _, names in os.walk("/", onerror=lambda error: None):
    if folder.startswith(("/proc", "/sys", "/usr", "/opt/kakehashi", "/store")):
        continue
    for name in names:
        path = os.path.join(folder, name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                continue
            with open(path, "rb") as file:
                text = file.read(65536)
        except OSError:
            continue
        if b"OPENSSH PRIVATE KEY" in text:
            keys.append(path)
allowed = {}
for place in ("/tmp", "/var/tmp", "/dev/shm", "/home/session", "/work", "/work/tanaka"):
    try:
        with open(place + "/allowed", "w") as file:
            file.write("x")
        os.unlink(place + "/allowed")
        allowed[place] = True
    except OSError as error:
        allowed[place] = str(error)
"""


def test_from_inside_there_is_no_key_no_way_out_and_no_place_to_leave_anything(
    lab: Lab, person: People
) -> None:
    tanaka = person("tanaka")
    tanaka.start(PLAIN)
    with tanaka.kernel() as kernel:
        ran = kernel.run(INSIDE)
        assert ran.error is None, ran.error
        found, keys, allowed = kernel.value("(found, keys, allowed)")
    assert not [name for name, outcome in found.items() if outcome == "DONE"]
    assert len(found) > 30
    assert keys == []
    # The controls: the places that are meant to be written can be.
    assert set(allowed.values()) == {True}, allowed
    # Nothing of it came as far as the store's sshd, and a session as it should be is no refusal.
    session = look.open_sessions(lab)[0]
    kinds = {record["kind"] for record in look.audit(lab) if record.get("session") == session}
    assert "session.granted" in kinds
    assert "sshd.refused" not in kinds


@pytest.mark.parametrize("name", ["node1", "node2"])
def test_a_node_passes_its_own_check(lab: Lab, name: str) -> None:
    answer = lab[name].run(
        ["/opt/kakehashi/.venv/bin/python", "-m", "kakehashi.cli", "node", "check", "--json"],
        user=TANAKA,
    )
    outcome = json.loads(answer.stdout)
    assert outcome["ok"] is True
    assert len(outcome["checks"]) > 20


def test_a_node_without_fuse_says_so_and_refuses(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    nodes = [lab[name].path("/dev/fuse") for name in ("node1", "node2")]
    try:
        for device in nodes:
            device.chmod(0o600)
        with pytest.raises(ClientError, match="fuse"):
            tanaka.start(PLAIN)
    finally:
        for device in nodes:
            device.chmod(0o666)
    tanaka.start(PLAIN)


def test_the_sessions_port_answers_only_to_the_hub(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    tanaka.start(PLAIN)
    node = look.node_of(lab, TANAKA)
    assert node is not None
    listening = node.run(["ss", "-Hltn"]).stdout
    ports = [line.split()[3].rsplit(":", 1)[1] for line in listening.splitlines()]
    script = (
        "import socket, ssl, sys\n"
        "context = ssl._create_unverified_context()\n"
        "link = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5)\n"
        "tls = context.wrap_socket(link)\n"
        "tls.sendall(b'GET /user/tanaka/api HTTP/1.0\\r\\n\\r\\n')\n"
        "print(tls.recv(100))\n"
    )
    port = next(port for port in ports if port not in {"6818"})
    done = node.run(["/usr/bin/python3", "-I", "-c", script, port], user="ka0002", check=False)
    assert done.returncode != 0
    assert "CERTIFICATE" in done.stderr.upper() or "alert" in done.stderr


def test_a_person_without_a_project_ends_on_a_page_that_says_what_to_do(lab: Lab) -> None:
    kimura = Client(lab.url, "kimura", str(lab.ca_file))
    page = kimura.log_in()
    assert page.status_code == 403
    assert "kimura" in page.text
    assert kimura.call("GET", "/hub/api/user").status_code in {401, 403}


@pytest.mark.parametrize(
    "change",
    [
        {"project": "brain-mr"},
        {"project": "../lung-ct"},
        {"site": "slurm\n#SBATCH --partition=other"},
        {"queue": "gpu --wrap=id"},
        {"gpus": "1; id"},
        {"hours": 1e9},
        {"hours": -1},
        {"account": "ka0002"},
        {"exec_prefix": "touch /tmp/owned"},
    ],
)
def test_hostile_or_foreign_options_are_refused(
    lab: Lab, person: People, change: dict[str, object]
) -> None:
    tanaka = person("tanaka")
    answer = tanaka.call("POST", "/hub/api/users/tanaka/server", {**PLAIN, **change})
    assert answer.status_code in {400, 403, 422}, answer.text
    assert not lab["login"].run(["squeue", "--noheader", "--user", TANAKA]).stdout


def test_one_person_cannot_touch_anothers_session(lab: Lab, person: People) -> None:
    tanaka, suzuki = person("tanaka"), person("suzuki")
    tanaka.start(PLAIN)
    assert suzuki.call("GET", "/user/tanaka/api/contents").status_code in {403, 404}
    assert suzuki.call("DELETE", "/hub/api/users/tanaka/server").status_code in {403, 404}
    assert suzuki.call("GET", "/hub/api/users/tanaka").status_code in {403, 404}
    assert tanaka.server() is not None


def test_after_a_session_another_account_on_the_node_finds_nothing_of_it(
    lab: Lab, person: People
) -> None:
    tanaka = person("tanaka")
    tanaka.start(PLAIN)
    node = look.node_of(lab, TANAKA)
    assert node is not None
    # The control: while it runs there is something that root can see.
    assert look.processes(node, TANAKA)
    assert owned(node, "root")
    tanaka.stop()
    wait_for("the end of the job", lambda: not look.processes(node, TANAKA), 30)
    for account in ("ka0002", "root"):
        assert owned(node, account) == []
    assert not look.mounts(node)
    assert not look.shared_memory(node)
    assert not node.run(["ss", "-Hltn", "sport", ">=", ":30000"]).stdout


def owned(node: Host, account: str) -> list[str]:
    """Return what an account finds of another one on a node: files, and worlds of processes."""
    roots = ["/tmp", "/var/tmp", "/dev/shm", "/run", "/var/lib", "/proc"]
    done = node.run(["find", *roots, "-maxdepth", "2", "-user", TANAKA], user=account, check=False)
    return done.stdout.splitlines()
