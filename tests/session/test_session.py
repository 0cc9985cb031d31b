"""A session from its document to its report, on real parts."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from tests.session.real import SERIES

if TYPE_CHECKING:
    from tests.session.real import World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")

LOOK = f"""
import json, os, socket, struct, pathlib
store = pathlib.Path("/store/series/{SERIES}.ozx").read_bytes()
link = socket.socket(socket.AF_UNIX)
link.connect("/run/kakehashi/store.sock")
link.sendall(struct.pack(">IBI", 5, 1, 3))
answer = link.recv(9)
print("hello from the payload")
pathlib.Path("look.json").write_text(json.dumps(dict(
    size=len(store), hash=__import__("hashlib").sha256(store).hexdigest(),
    sftp=answer[4], cwd=os.getcwd(), home=os.environ["HOME"], given=os.environ["GIVEN"],
    session=json.load(open("/run/kakehashi/session.json")),
    lease=json.load(open("/run/kakehashi/lease.json")),
    key=open("/run/kakehashi/server/server.key").read(),
    environment=sorted(os.environ))))
"""


def test_a_payload_reads_the_store_writes_its_work_and_leaves(world: World) -> None:
    with world.session(LOOK) as session:
        status, said = session.wait()
        assert status == 0, (said, session.log())
        seen = json.loads(session.file("look.json"))
        assert (seen["size"], seen["sftp"]) == (len(world.content), 2)
        assert seen["cwd"] == "/work/alice"
        assert seen["home"] == "/home/session"
        assert session.log() == "hello from the payload\n"
        (report,) = session.portal.called("leave")
    items = {item["item"]: item for item in json.loads(report["message"])["items"]}
    assert items["processes"]["result"] == "gone"
