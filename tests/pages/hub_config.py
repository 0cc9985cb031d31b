"""A JupyterHub with the portal's real pages; log-in, sessions and proxy are stand-ins.

The stand-ins sit at the outermost edge: what a person is called decides what their session does,
so that each page can be brought up and held. ``PAGES_CONFIG`` names the ``kakehashi.toml``,
``PAGES_STATE`` a folder for the hub's own files and ``PAGES_STORE`` the store's address.
"""

import asyncio
import datetime as dt
import os
from pathlib import Path

from jupyterhub.auth import Authenticator
from jupyterhub.handlers.base import BaseHandler
from jupyterhub.proxy import Proxy
from jupyterhub.spawner import Spawner
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from kakehashi.config import load
from kakehashi.secret import Secret
from kakehashi_spawners import i18n, portal
from kakehashi_spawners.authority import Authority
from kakehashi_spawners.configure import OPERATOR_SCOPES
from kakehashi_spawners.options import OptionsError, from_form
from kakehashi_spawners.pages import NoProjectError, configure_pages, render_form

c = get_config()  # noqa: F821 - traitlets puts it there

CONFIG = load(Path(os.environ["PAGES_CONFIG"]))
STATE = Path(os.environ["PAGES_STATE"])
SESSION = "0123456789abcdef0123456789abcdef"


def ahead(**amount):
    when = dt.datetime.now(dt.UTC) + dt.timedelta(**amount)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def choices(free=3):
    return {
        "projects": [
            {
                "id": "lung",
                "title": "Early signs of lung cancer in chest CT",
                "title_ja": "胸部CTにおける肺がんの早期所見",
                "purpose": "Detect small nodules and follow them over time",
                "expires": "2027-03-31",
                "sites": ["flow", "mdx"],
                "series": 12840,
            },
            {
                "id": "liver-mr",
                "title": "Liver MR </script><script>alert(1)</script>",
                "title_ja": "肝臓MRIの定量評価",
                "purpose": "Quantify fat <b>&</b> iron",
                "expires": "2026-12-01",
                "sites": ["flow"],
                "series": 412,
            },
        ],
        "sites": {
            "flow": {
                "title": "University supercomputer",
                "title_ja": "大学スーパーコンピューター",
                "walls": "namespaces",
                "queues": [
                    {
                        "name": "gpu-share",
                        "title": "One GPU, shared node",
                        "gpu_type": "V100",
                        "max_gpus": 1,
                        "max_hours": 24,
                        "cpus": 10,
                        "memory_mb": 96000,
                        "free_gpus": free,
                        "starts_at": None,
                    },
                    {
                        "name": "gpu-node",
                        "title": "Whole node",
                        "gpu_type": "V100",
                        "max_gpus": 4,
                        "max_hours": 8,
                        "cpus": 40,
                        "memory_mb": 384000,
                        "free_gpus": 0,
                        "starts_at": ahead(minutes=25),
                    },
                    {
                        "name": "cpu",
                        "title": None,
                        "gpu_type": None,
                        "max_gpus": 0,
                        "max_hours": 0.5,
                        "cpus": 4,
                        "memory_mb": 16384,
                        "free_gpus": None,
                        "starts_at": None,
                    },
                ],
            },
            "mdx": {
                "title": "Virtual machine with A100",
                "title_ja": "A100 仮想マシン",
                "walls": "account",
                "queues": [
                    {
                        "name": "gpu-share",
                        "title": "A100",
                        "gpu_type": "A100",
                        "max_gpus": 8,
                        "max_hours": 48,
                        "cpus": 18,
                        "memory_mb": 58982,
                        "free_gpus": None,
                        "starts_at": None,
                    }
                ],
            },
        },
    }


NOTHING = {"projects": [], "sites": {}}
RECEIPT = {
    "session": SESSION,
    "project": "lung",
    "site": "flow",
    "ended_at": "2026-11-20T09:12:00Z",
    "state": "complete",
    "items": [
        {"item": "connections", "witness": "store", "result": "gone", "detail": "2 closed"},
        {"item": "mounts", "witness": "wrapper", "result": "gone", "detail": "/store /work"},
        {"item": "GPU memory", "witness": "none", "result": "unknown", "detail": ""},
        {"item": "<img src=x>", "witness": "site", "result": "left", "detail": "<b>1</b>"},
    ],
}


class PagesAuthenticator(Authenticator):
    """Logs in whoever is named; a stand-in for the identity provider."""

    login_service = "Platform account"

    def login_url(self, base_url):
        return base_url + "stand-in"

    def get_handlers(self, app):
        return [
            *super().get_handlers(app),
            (r"/stand-in", StandInLogin),
            (r"/broken/(\d+)", Broken),
            (r"/outsider", Outsider),
            (r"/api/kakehashi/sites", Sites),
            (r"/api/kakehashi/receipts/([0-9a-f]{32})", Receipts),
        ]

    async def authenticate(self, handler, data):
        return data["person"]


class StandInLogin(BaseHandler):
    async def get(self):
        user = await self.login_user({"person": self.get_argument("person")})
        self.redirect(self.get_next_url(user, default=self.hub.base_url + "home"))


class Broken(BaseHandler):
    async def get(self, status):
        raise web.HTTPError(int(status), "the disk <b>of</b> the hub is full")


class Outsider(BaseHandler):
    async def get(self):
        raise NoProjectError("nao", ["radiology", "<staff>"])


class Sites(BaseHandler):
    @web.authenticated
    async def get(self):
        if self.current_user.name == "stale":
            raise web.HTTPError(503, "out of reach")
        self.set_header("Content-Type", "application/json")
        self.finish(choices(free=2))


class Receipts(BaseHandler):
    @web.authenticated
    async def get(self, session):
        if session != SESSION:
            raise web.HTTPError(404)
        self.set_header("Content-Type", "application/json")
        self.finish(RECEIPT)


class Server(web.RequestHandler):
    async def get(self):
        self.finish("a notebook")


class PagesSpawner(Spawner):
    """Does what the person's name says: runs, waits, fails, or stops slowly."""

    start_timeout = 600
    http_server = None

    def _options_form_default(self):
        return lambda spawner: render_form(
            NOTHING if self.user.name == "nao" else choices(), i18n.current_language(), None
        )

    def options_from_form(self, formdata):
        options = from_form(formdata)
        if options["gpus"] > 1:
            raise OptionsError("gpus: at most 1 here")
        if options["project"] == "liver-mr":
            raise OptionsError("(options): the store <b>does</b> not answer")
        return options

    def page_session(self):
        minutes = 7 if self.user.name == "late" else 195
        return {"session": SESSION, "ends_at": ahead(minutes=minutes)}

    def page_receipts(self):
        if self.user.name not in {"aya", "run"}:
            return []
        base = {"session": SESSION, "project": "lung", "site": "flow", "state": "complete"}
        return [
            {**base, "ended_at": "2026-11-20T09:12:00Z", "left": 0},
            {**base, "ended_at": "2026-11-19T18:40:00Z", "state": "pending", "left": 0},
            {**base, "ended_at": "2026-11-18T02:05:00Z", "left": 2},
        ]

    async def progress(self):
        yield {"progress": 10, "message": "submitted job 4711", "stage": "submitted"}
        yield {
            "progress": 20,
            "message": "PENDING (Priority)",
            "stage": "queued",
            "reason": "Priority",
            "starts_at": ahead(minutes=40),
        }
        if self.user.name == "nearly":
            yield {"progress": 60, "message": "node gpu01 checked", "stage": "preparing"}
            yield {"progress": 80, "message": "view mounted", "stage": "mounted"}
        if self.user.name != "odd":
            await asyncio.Event().wait()
        yield {"progress": 30, "message": "<img src=x> [strange]", "stage": "unheard-of"}
        await asyncio.Event().wait()

    async def start(self):
        if self.user.name == "mio":
            error = RuntimeError("refused")
            error.jupyterhub_message = (
                "node gpu01: user namespaces are switched off; expected "
                "user.max_user_namespaces > 0; ask the site's operators"
            )
            raise error
        if self.user.name in {"ken", "nearly", "odd", "cancels"}:
            await asyncio.Event().wait()
        sockets = bind_sockets(0, "127.0.0.1")
        self.http_server = HTTPServer(web.Application([(r".*", Server)]))
        self.http_server.add_sockets(sockets)
        return f"http://127.0.0.1:{sockets[0].getsockname()[1]}"

    async def poll(self):
        return None if self.http_server is not None else 0

    async def stop(self, now=False):
        if self.user.name == "yui":
            await asyncio.Event().wait()
        if self.http_server is not None:
            self.http_server.stop()
            self.http_server = None


class NoProxy(Proxy):
    """The hub is asked directly."""

    should_start = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.routes = {}

    async def add_route(self, routespec, target, data):
        self.routes[routespec] = {"routespec": routespec, "target": target, "data": data}

    async def delete_route(self, routespec):
        self.routes.pop(routespec, None)

    async def get_all_routes(self):
        return dict(self.routes)


c.JupyterHub.authenticator_class = PagesAuthenticator
c.JupyterHub.spawner_class = PagesSpawner
c.JupyterHub.proxy_class = NoProxy
c.JupyterHub.bind_url = f"http://127.0.0.1:{os.environ['PAGES_PORT']}/"
c.JupyterHub.hub_bind_url = f"http://127.0.0.1:{os.environ['PAGES_PORT']}/"
c.JupyterHub.db_url = "sqlite://"
c.JupyterHub.cookie_secret = os.urandom(32)
c.JupyterHub.tornado_settings = {"slow_spawn_timeout": 0.1, "slow_stop_timeout": 0.1}
c.ConfigurableHTTPProxy.should_start = False
c.Authenticator.allow_all = True
c.Authenticator.admin_users = {"root-of-portal"}
c.JupyterHub.load_groups = {"operators": {"users": ["operator"]}}
c.JupyterHub.load_roles = [
    {"name": "portal-operator", "scopes": OPERATOR_SCOPES, "groups": ["operators"]}
]
c.JupyterHub.init_spawners_timeout = 1
os.chdir(STATE)
store = Authority(os.environ["PAGES_STORE"], Secret("of-this-hub"), None, timeout_s=5)
portal.install(portal.Portal(CONFIG, store, {}))
configure_pages(c, CONFIG)
