"""A whole session through a real hub, proxy, agent and process, with TLS to the server."""

from __future__ import annotations

import grp
import json
import os
import pwd
import signal
import socket
import ssl
from pathlib import Path

import pytest

from tests.spawners.standins import Authority, Hub, Person, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the agent drops to other accounts")


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def running(hub: Hub, name: str = "alice", **options: object) -> tuple[Person, str]:
    hub.plan(mode="serve")
    person = hub.login(name)
    answer = person.spawn(**options)
    assert answer.status_code in {201, 202}, answer.text
    person.ready()
    return person, person.last_session()


def failure(person: Person) -> str:
    """Return what the page says to the person after a failed start."""
    until("the end of the start", lambda: not person.server())
    page = person.browser.get(f"{person.hub.url}/hub/spawn-pending/{person.name}", timeout=10)
    return page.text


def test_a_session_starts_serves_and_ends_with_a_receipt(hub: Hub, authority: Authority) -> None:
    alice, session = running(hub)
    page = alice.browser.get(f"{hub.url}/user/alice/api", timeout=10)
    assert page.json()["version"] == "stand-in"
    alice.stop()
    ends = authority.sessions[session]["ends"]
    assert len(ends) == 1
    assert ends[0]["reason"] == "stopped"
    assert ends[0]["scheduler"]["state"] == "ended"
    pid = hub.seen("facts", session)["pid"]
    until("the wrapper's end", lambda: not alive(pid))
    assert session[:8] in alice.browser.get(f"{hub.url}/hub/home", timeout=10).text
    kept = hub.folder / "state" / "receipts.json"
    until("the completed receipt", lambda: '"complete"' in kept.read_text())


def test_the_wrapper_runs_as_the_person_and_no_secret_is_seen_outside(hub: Hub) -> None:
    alice, session = running(hub)
    facts, document = hub.seen("facts", session), hub.seen("document", session)
    account = pwd.getpwnam("games")
    assert facts["uid"] == account.pw_uid
    allowed = {account.pw_gid, *(g.gr_gid for g in grp.getgrall() if "games" in g.gr_mem)}
    assert set(facts["groups"]) <= allowed
    assert facts["argv"] == ["-I", "-m", "kakehashi.session.enter"]
    assert facts["cwd"] == "/"
    shown = json.dumps([facts["argv"], facts["environment"]])
    assert document["ticket"] not in shown
    assert set(facts["environment"]) <= {
        "HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER", "KAKEHASHI_JOB", "LC_CTYPE",
    }  # fmt: skip
    answer = hub.seen("answer", session)
    token = answer["server"]["environment"]["JUPYTERHUB_API_TOKEN"]
    log = hub.log()
    assert session in log, "the control: the log speaks of this session"
    for secret in (document["ticket"], token, hub.authority.token):
        assert secret not in log
    assert "PRIVATE KEY" not in log
    alice.stop()


def test_the_server_is_described_for_the_inside_of_the_payload(hub: Hub) -> None:
    alice, session = running(hub)
    answer = hub.seen("answer", session)
    server, port = answer["server"], alice.server()
    assert port["ready"]
    assert answer["hub"] == {"address": f"127.0.0.1:{hub.hub_port}", "port": hub.hub_port}
    assert answer["offline_max_s"] == 24 * 3600
    assert server["argv"][0] == f"{hub.software}/.venv/bin/python"
    environment = server["environment"]
    base = f"https://127.0.0.1:{hub.hub_port}/hub/api"
    assert environment["JUPYTERHUB_API_URL"] == base
    assert environment["JUPYTERHUB_ACTIVITY_URL"].startswith(base)
    assert environment["JUPYTERHUB_SERVICE_URL"].startswith("https://127.0.0.1:")
    for variable in ("KEYFILE", "CERTFILE", "CLIENT_CA"):
        path = Path(environment[f"JUPYTERHUB_SSL_{variable}"])
        assert path.parent == Path("/run/kakehashi/server")
        assert path.name in server["files"]
    settings = json.loads(server["files"]["jupyter_server_config.json"])
    assert settings["KernelManager"] == {"transport": "ipc"}
    assert settings["ServerApp"]["root_dir"] == "/work"
    assert settings["ContentsManager"]["preferred_dir"] == "alice"
    assert not list((hub.folder / "state" / "internal-ssl").glob("user-*")), "no key stays here"
    alice.stop()


def test_nobody_without_the_proxys_certificate_speaks_to_the_server(hub: Hub) -> None:
    _, session = running(hub)
    url = hub.seen("answer", session)["server"]["environment"]["JUPYTERHUB_SERVICE_URL"]
    port = int(url.split(":")[2].split("/")[0])
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    # The server hangs up during or right after the handshake, whichever TLS comes to.
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        exchange(context, port)


def exchange(context: ssl.SSLContext, port: int) -> None:
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain) as secured,
    ):
        secured.sendall(b"GET /user/alice/api HTTP/1.0\r\n\r\n")
        assert secured.recv(100) == b"", "the server spoke to a stranger"


def test_the_nodes_own_words_reach_the_person(hub: Hub, authority: Authority) -> None:
    words = "user namespaces are switched off; set kernel.unprivileged_userns_clone = 1"
    hub.plan(mode="refuse", failures=[{"check": "namespaces", "message": words}])
    alice = hub.login("alice")
    alice.spawn()
    assert words in failure(alice)
    session = authority.sessions[alice.last_session()]
    assert "ends" in session, "the ticket is spent"
    until("the record", lambda: authority.kinds("node-cannot-start"))


def test_a_job_that_ends_at_once_does_not_leave_the_page_waiting(hub: Hub) -> None:
    hub.plan(mode="exit")
    alice = hub.login("alice")
    alice.spawn()
    assert "the job ended before the session was ready" in failure(alice)


def test_giving_up_while_it_starts_ends_the_job(hub: Hub, authority: Authority) -> None:
    hub.plan(mode="hold")
    alice = hub.login("alice")
    alice.spawn()
    session = alice.last_session()
    pid = hub.seen("facts", session)["pid"]
    assert alive(pid)
    alice.stop()
    until("the job's end", lambda: not alive(pid))
    assert len(authority.sessions[session]["ends"]) == 1


def test_a_killed_wrapper_is_noticed_and_the_session_gets_its_receipt(
    hub: Hub, authority: Authority
) -> None:
    alice, session = running(hub)
    os.kill(hub.seen("facts", session)["pid"], signal.SIGKILL)
    until("the server to be gone", lambda: not alice.server())
    assert authority.sessions[session]["ends"][0]["reason"] == "the job has ended"


def test_a_running_job_whose_port_nobody_serves_is_ended(hub: Hub, authority: Authority) -> None:
    alice, session = running(hub)
    pid = hub.seen("facts", session)["pid"]
    os.kill(pid, signal.SIGUSR1)
    until("the session's end", lambda: "ends" in authority.sessions[session])
    assert "nobody listens" in authority.sessions[session]["ends"][0]["reason"]
    until("the job's end", lambda: not alive(pid))
    until("the server to be gone", lambda: not alice.server())


def test_a_server_that_hangs_is_not_taken_for_dead(hub: Hub, authority: Authority) -> None:
    alice, session = running(hub)
    pid = hub.seen("facts", session)["pid"]
    os.kill(pid, signal.SIGSTOP)
    until("a knock without answer", lambda: "its knock: unreachable" in hub.log())
    assert alice.server()["ready"]
    assert "ends" not in authority.sessions[session]
    os.kill(pid, signal.SIGCONT)


def test_a_silent_scheduler_is_not_an_end(hub: Hub, authority: Authority) -> None:
    alice, session = running(hub)
    site_file = hub.folder / "site.json"
    text = site_file.read_text()
    marks = hub.log().count("the scheduler does not answer")
    site_file.write_text("{")
    until("polls in silence", lambda: hub.log().count("the scheduler does not answer") >= marks + 4)
    assert alice.server()["ready"]
    assert "ends" not in authority.sessions[session]
    site_file.write_text(text)
    alice.stop()
    assert "ends" in authority.sessions[session]


def test_a_silent_site_does_not_keep_the_store_from_being_told(
    hub: Hub, authority: Authority
) -> None:
    """What the store must hear, lost rights above all, does not wait behind a job's end."""
    alice, session = running(hub)
    site_file = hub.folder / "site.json"
    text = site_file.read_text()
    marks = hub.log().count("end of job")
    # Too deep for the agent, which then says nothing at all; a refusal would be an answer.
    site_file.write_text("[" * 100_000)
    try:
        alice.call("DELETE", "api/users/alice/server")
        until("tries to end the job", lambda: hub.log().count("end of job") >= marks + 2)
        told = len(authority.kinds("enrol-refused"))
        hub.post("enrol", {"session": "0" * 32})
        until("the record", lambda: len(authority.kinds("enrol-refused")) > told, 10)
    finally:
        site_file.write_text(text)
    until("the end", lambda: "ends" in authority.sessions[session], 60)


def test_a_session_that_the_store_ends_loses_its_job_too(hub: Hub, authority: Authority) -> None:
    _, session = running(hub)
    pid = hub.seen("facts", session)["pid"]
    authority.down = True
    marks = hub.log().count("are not known")
    until("a silent store", lambda: hub.log().count("are not known") > marks)
    assert alive(pid), "a store out of reach takes no right away"
    authority.down = False
    authority.sessions[session]["ended"] = "revoked"
    until("the end", lambda: "ends" in authority.sessions[session], 10)
    assert (
        "the store has ended the session: revoked"
        in (authority.sessions[session]["ends"][0]["reason"])
    )
    until("the wrapper's end", lambda: not alive(pid))


def test_the_store_hears_of_a_stop_before_the_job_has_gone(hub: Hub, authority: Authority) -> None:
    alice, session = running(hub)
    alice.stop()
    assert authority.sessions[session]["ending"] == {"reason": "stopped", "grace_s": 15.0}


def test_a_receipt_is_not_lost_while_the_store_is_away(hub: Hub, authority: Authority) -> None:
    alice, session = running(hub)
    authority.down = True
    alice.stop()
    assert "ends" not in authority.sessions[session]
    authority.down = False
    until("the receipt", lambda: "ends" in authority.sessions[session])


def test_a_session_survives_the_hubs_death(hub: Hub, authority: Authority) -> None:
    alice, session = running(hub)
    pid = hub.seen("facts", session)["pid"]
    hub.kill()
    hub.start()
    assert alive(pid)
    alice.ready()
    assert "ends" not in authority.sessions[session]
    alice.stop()
    assert "ends" in authority.sessions[session]
    until("the wrapper's end", lambda: not alive(pid))
    hub.kill()
    hub.start()
    home = hub.login("alice").browser.get(f"{hub.url}/hub/home", timeout=10)
    assert session[:8] in home.text, "the list of receipts survives, too"


def test_a_start_that_the_hubs_death_cut_short_leaves_no_job(
    hub: Hub, authority: Authority
) -> None:
    hub.plan(mode="hold")
    alice = hub.login("alice")
    alice.spawn()
    session = alice.last_session()
    pid = hub.seen("facts", session)["pid"]
    until("the saved job", lambda: f"session {session}: job" in hub.log())
    hub.kill()
    hub.start()
    until("the job's end", lambda: not alive(pid))
    until("the receipt", lambda: "ends" in authority.sessions[session])


def test_two_people_at_once_each_on_their_own(hub: Hub) -> None:
    alice, first = running(hub)
    bob, second = running(hub, "bob", project="brain")
    assert hub.seen("facts", first)["uid"] != hub.seen("facts", second)["uid"]
    page = bob.browser.get(f"{hub.url}/hub/api/users/alice/server", timeout=10)
    assert page.status_code in {403, 404, 405}
    assert "stand-in" in bob.browser.get(f"{hub.url}/user/bob/api", timeout=10).text
    alice.stop()
    bob.stop()


def test_another_version_at_the_store_is_a_clear_message(hub: Hub, authority: Authority) -> None:
    authority.software = "0.0.9"
    try:
        alice = hub.login("alice")
        answer = alice.spawn()
        text = answer.text if answer.status_code >= 400 else failure(alice)
        assert "0.0.9" in text
        assert "install the same version on both" in text
    finally:
        authority.software = hub_version()


def hub_version() -> str:
    from kakehashi import __version__

    return __version__
