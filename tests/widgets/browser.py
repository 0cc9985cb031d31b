"""A notebook in a real JupyterLab in a real browser, and what a person does with it."""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import nbformat
import numpy as np
from playwright.sync_api import Browser, BrowserContext, Error, Locator, Page, Request, Route

from tests.widgets.lab import TOKEN, Lab

PATIENCE_S = 30

_RUNNING = """() => {
  const widget = window.jupyterapp?.shell?.currentWidget;
  const kernel = widget?.sessionContext?.session?.kernel;
  return kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle'
    && widget.content?.widgets?.length > 0;
}"""
_EVALUATE = """async expression => {
  const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({
    code: '', silent: true, store_history: false,
    user_expressions: {v: `__import__('json').dumps(${expression})`},
  });
  return (await future.done).content.user_expressions.v;
}"""
_PIXELS = """canvas => {
  const {data, width, height} = canvas.getContext('2d').getImageData(
    0, 0, canvas.width, canvas.height);
  let text = '';
  for (let at = 0; at < data.length; at += 32768) {
    text += String.fromCharCode(...data.subarray(at, at + 32768));
  }
  return {width, height, data: btoa(text)};
}"""


@dataclass
class Notebook:
    page: Page
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def run_all(self) -> None:
        done = self.page.evaluate(
            "async () => await jupyterapp.commands.execute('notebook:run-all-cells')"
        )
        assert done is not False, self.page.locator(".jp-OutputArea").all_inner_texts()

    def kernel(self, expression: str) -> Any:
        """Value of an expression in the notebook's kernel; no cell is added."""
        reply = self.page.evaluate(_EVALUATE, expression)
        assert reply["status"] == "ok", reply
        return json.loads(ast.literal_eval(reply["data"]["text/plain"]))

    def wait_kernel(self, expression: str, held: Callable[[Any], bool]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            value = self.kernel(expression)
            if held(value):
                return value
            assert time.monotonic() < deadline, f"{expression} stayed {value!r}"

    def wait_state(self, root: Locator, **wanted: object) -> None:
        """Wait until the widget's data attributes are these."""
        root.page.wait_for_function(
            """([element, wanted]) => Object.entries(wanted).every(
                 ([name, value]) => element.dataset[name] === value)""",
            arg=[root.element_handle(), {key: str(value) for key, value in wanted.items()}],
            timeout=PATIENCE_S * 1000,
        )


def pixels(canvas: Locator) -> np.ndarray:
    """The canvas read back: (rows, columns, 4) bytes."""
    image = canvas.evaluate(_PIXELS)
    return np.frombuffer(base64.b64decode(image["data"]), np.uint8).reshape(
        image["height"], image["width"], 4
    )


def windowed(plane: np.ndarray, window: float, level: float) -> np.ndarray:
    """DICOM PS3.3 C.11.2.1.3.2 (LINEAR_EXACT) to 8 bits, halves rounded up."""
    grey = np.floor(((plane.astype(np.float64) - level) / window + 0.5) * 255 + 0.5)
    return np.clip(grey, 0, 255).astype(np.uint8)


@contextlib.contextmanager
def opened(
    browser: Browser, lab: Lab, name: str, cells: Sequence[str], **context: Any
) -> Iterator[Notebook]:
    """Open a new notebook with these code cells."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(book, lab.work / f"{name}.ipynb")
    with visited(browser, lab, f"{name}.ipynb", **context) as notebook:
        yield notebook


@contextlib.contextmanager
def visited(browser: Browser, lab: Lab, path: str, **context: Any) -> Iterator[Notebook]:
    """Open a notebook of the work folder, and shut its kernel down afterwards."""
    profile = browser.new_context(viewport={"width": 1360, "height": 1000}, **context)
    notebook = Notebook(profile.new_page())
    _watch(profile, notebook, lab)
    try:
        notebook.page.goto(f"{lab.base}/lab/tree/{path}?reset&token={TOKEN}")
        notebook.page.wait_for_function(_RUNNING, timeout=PATIENCE_S * 1000)
        yield notebook
    finally:
        with contextlib.suppress(Error):
            notebook.page.evaluate(
                "async () => await jupyterapp.shell.currentWidget.sessionContext.shutdown()"
            )
        profile.close()


def _watch(profile: BrowserContext, notebook: Notebook, lab: Lab) -> None:
    home = urlsplit(lab.base).netloc

    def gate(route: Route, request: Request) -> None:
        if urlsplit(request.url).netloc == home:
            route.continue_()
        else:
            notebook.outside.append(request.url)
            route.abort()

    profile.route(lambda url: url.startswith("http"), gate)
    notebook.page.on("pageerror", lambda error: notebook.errors.append(str(error)))
    notebook.page.on(
        "websocket",
        lambda socket: socket.on("framereceived", lambda frame: notebook.sizes.append(len(frame))),
    )
