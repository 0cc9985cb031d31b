"""The widgets in a real JupyterLab: pixels are read back from the canvas and compared."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator

from tests.widgets.browser import Notebook, pixels, visited, windowed
from tests.widgets.conftest import Shore
from tests.widgets.lab import Lab

pytestmark = pytest.mark.browser

FIRST_CELL = "from kakehashi_widgets import CohortTable, SessionClock, SliceViewer"
FIRST_LOOK = Path(__file__).resolve().parents[2] / "notebooks" / "01_first_look.ipynb"
Open = Callable[..., Notebook]


def viewer(book: Notebook) -> Locator:
    root = book.page.locator(".kkh-viewer")
    root.scroll_into_view_if_needed()
    book.wait_state(root, state="ready")
    return root


def number(root: Locator, name: str) -> float:
    return float(root.get_attribute(f"data-{name}") or "nan")


def assert_shows(root: Locator, volume: np.ndarray) -> None:
    """The canvas shows, exactly, the plane and window that the attributes name."""
    index = int(number(root, "index"))
    expected = windowed(volume[index], number(root, "window"), number(root, "level"))
    shown = pixels(root.locator("canvas"))
    assert shown.shape[:2] == expected.shape
    for channel in range(3):
        np.testing.assert_array_equal(shown[..., channel], expected)
    assert (shown[..., 3] == 255).all()
    assert len(np.unique(expected)) > 16, "the comparison would pass for an empty picture"


@pytest.mark.parametrize("name", ["ct", "mr", "pet"])
def test_the_canvas_shows_the_windowed_slice(notebook: Open, shore: Shore, name: str) -> None:
    uid = getattr(shore, name)
    volume = shore.pack(uid).values()
    book = notebook(f"viewer = SliceViewer({uid!r}); viewer")
    root = viewer(book)
    assert int(number(root, "index")) == volume.shape[0] // 2
    assert_shows(root, volume)

    width, other = number(root, "window") / 2 + 0.5, volume.shape[0] // 2 - 1
    book.kernel(f"[setattr(viewer, 'index', {other}), setattr(viewer, 'window', {width})]")
    book.wait_state(root, state="ready", index=other, window=width)
    assert_shows(root, volume)
    # The control: the neighbouring slice is another picture.
    assert (volume[other] != volume[other + 1]).any()


def test_wheel_keys_and_slider_change_the_slice_in_the_kernel(notebook: Open, shore: Shore) -> None:
    volume = shore.pack(shore.ct).values()
    book = notebook(f"viewer = SliceViewer({shore.ct!r}, index=3); viewer")
    root = viewer(book)
    stage = root.locator(".kkh-stage")
    stage.hover()
    book.page.mouse.wheel(0, 120)
    book.wait_kernel("viewer.index", lambda index: index == 4)
    book.page.mouse.wheel(0, -120)
    book.page.mouse.wheel(0, -120)
    book.wait_kernel("viewer.index", lambda index: index == 2)
    stage.focus()
    for key, expected in [("ArrowDown", 3), ("End", 11), ("ArrowDown", 11), ("PageUp", 1)]:
        book.page.keyboard.press(key)
        book.wait_kernel("viewer.index", lambda index, expected=expected: index == expected)
    root.locator(".kkh-slider").fill("7")
    book.wait_kernel("viewer.index", lambda index: index == 7)
    book.wait_state(root, state="ready", index=7)
    assert_shows(root, volume)


def test_many_small_steps_of_a_touch_pad_are_one_slice(notebook: Open, shore: Shore) -> None:
    book = notebook(f"viewer = SliceViewer({shore.ct!r}, index=3); viewer")
    root = viewer(book)
    root.locator(".kkh-stage").hover()
    for _ in range(10):
        book.page.mouse.wheel(0, 8)
    book.wait_kernel("viewer.index", lambda index: index == 5)


def test_presets_drag_and_numbers_change_the_window(notebook: Open, shore: Shore) -> None:
    volume = shore.pack(shore.ct).values()
    book = notebook(f"viewer = SliceViewer({shore.ct!r}); viewer")
    root = viewer(book)
    root.get_by_role("button", name="Lung").click()
    book.wait_kernel("[viewer.window, viewer.level]", lambda pair: pair == [1500, -600])
    assert_shows(root, volume)
    root.locator(".kkh-stage").focus()
    book.page.keyboard.press("3")
    book.wait_kernel("[viewer.window, viewer.level]", lambda pair: pair == [1800, 400])
    assert root.get_by_role("button", name="Bone").get_attribute("aria-pressed") == "true"

    box = root.locator(".kkh-stage").bounding_box()
    assert box is not None
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    book.page.mouse.move(*centre)
    book.page.mouse.down()
    book.page.mouse.move(centre[0] + 60, centre[1] + 40, steps=5)
    book.page.mouse.up()
    book.wait_kernel(
        "[viewer.window, viewer.level]",
        lambda pair: pair == [number(root, "window"), number(root, "level")],
    )
    assert number(root, "window") > 1800
    assert number(root, "level") < 400
    assert_shows(root, volume)

    root.get_by_label("Width").fill("250")
    root.get_by_label("Width").press("Enter")
    book.wait_kernel("viewer.window", lambda value: value == 250)


def test_value_and_position_under_the_pointer(notebook: Open, shore: Shore) -> None:
    pack = shore.pack(shore.ct)
    book = notebook(f"viewer = SliceViewer({shore.ct!r}, index=5); viewer")
    root = viewer(book)
    box = root.locator("canvas").bounding_box()
    assert box is not None
    rows, columns = pack.shape[1:]
    i, j = 300, 140
    book.page.mouse.move(
        box["x"] + (i + 0.5) * box["width"] / columns, box["y"] + (j + 0.5) * box["height"] / rows
    )
    x, y, z, _ = pack.affine_lps @ [i, j, 5, 1]
    value = f"{pack.slice(5)[j, i]:.0f} HU"
    assert root.locator(".kkh-south-west").inner_text() == value
    assert (
        root.locator(".kkh-south-east").inner_text().split()
        == f"L {x:.1f} P {y:.1f} H {z:.1f} mm".split()
    )


@pytest.mark.parametrize("name", ["ct", "mr", "tilted"])
def test_letters_and_proportions_follow_the_affine(notebook: Open, shore: Shore, name: str) -> None:
    uid = getattr(shore, name)
    pack = shore.pack(uid)
    book = notebook(f"viewer = SliceViewer({uid!r}); viewer")
    root = viewer(book)
    for side, axis, sign in [("right", 0, 1), ("left", 0, -1), ("bottom", 1, 1), ("top", 1, -1)]:
        direction = sign * pack.affine_lps[:3, axis]
        strongest = int(np.argmax(np.abs(direction)))
        letter = ("LPH" if direction[strongest] > 0 else "RAF")[strongest]
        assert root.locator(f".kkh-{side}").inner_text()[0] == letter
    box = root.locator("canvas").bounding_box()
    assert box is not None
    _, rows, columns = pack.shape
    _, dy, dx = pack.spacing_mm
    assert box["width"] / box["height"] == pytest.approx(columns * dx / (rows * dy), rel=0.01)


def test_pixels_do_not_pass_through_the_kernel(notebook: Open, shore: Shore) -> None:
    book = notebook(f"viewer = SliceViewer({shore.ct!r}, index=0); viewer")
    root = viewer(book)
    before = len(book.sizes)
    for index in range(1, 6):
        book.kernel(f"setattr(viewer, 'index', {index})")
        book.wait_state(root, state="ready", index=index)
    # One plane is 512 KB; all messages of five of them together are far less than one row.
    assert sum(book.sizes[before:]) < 200_000
    assert max(book.sizes[before:]) < 10_000


def test_an_unknown_series_is_said_in_words_and_can_be_left(notebook: Open, shore: Shore) -> None:
    book = notebook("viewer = SliceViewer('1.2.3'); viewer")
    root = book.page.locator(".kkh-viewer")
    book.wait_state(root, state="error")
    assert "not in this session's cohort" in root.get_by_role("alert").inner_text()
    book.kernel(f"setattr(viewer, 'uid', {shore.ct!r})")
    book.wait_state(root, state="ready", index=6)
    assert not root.get_by_role("alert").is_visible()


def test_another_series_begins_with_its_own_window(notebook: Open, shore: Shore) -> None:
    book = notebook(f"viewer = SliceViewer({shore.ct!r}, index=9, window=55, level=7); viewer")
    root = viewer(book)
    book.wait_state(root, index=9, window=55, level=7)
    volume = shore.pack(shore.pet).values()
    book.kernel(f"setattr(viewer, 'uid', {shore.pet!r})")
    book.wait_state(root, state="ready", uid=shore.pet, index=volume.shape[0] // 2)
    book.wait_kernel("viewer.window", lambda value: value is not None and value != 55)
    assert_shows(root, volume)


def test_zoom_keeps_the_voxel_under_the_pointer(notebook: Open, shore: Shore) -> None:
    book = notebook(f"viewer = SliceViewer({shore.ct!r}); viewer")
    root = viewer(book)
    box = root.locator(".kkh-stage").bounding_box()
    assert box is not None
    book.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.6)
    before = root.locator(".kkh-south-east").inner_text()
    book.page.keyboard.down("Control")
    book.page.mouse.wheel(0, -120)
    book.page.mouse.wheel(0, -120)
    book.page.keyboard.up("Control")
    wide = root.locator("canvas").bounding_box()
    assert wide is not None
    assert wide["width"] > box["width"] * 1.4
    assert root.locator(".kkh-south-east").inner_text() == before


def test_a_click_in_the_cohort_table_selects(notebook: Open, shore: Shore) -> None:
    book = notebook("table = CohortTable(); table")
    table = book.page.locator(".kkh-cohort")
    book.wait_state(table, state="ready")
    assert table.get_by_role("status").inner_text() == "5 series"
    table.locator(f"[data-uid='{shore.pet}']").click()
    book.wait_kernel("table.selected", lambda uid: uid == shore.pet)
    book.kernel(f"setattr(table, 'selected', {shore.ct!r})")
    book.wait_state(table, selected=shore.ct)
    assert table.locator("[aria-selected=true]").get_attribute("data-uid") == shore.ct


def test_the_cohort_table_by_keyboard_search_and_sort(notebook: Open, shore: Shore) -> None:
    book = notebook("table = CohortTable(); table")
    table = book.page.locator(".kkh-cohort")
    book.wait_state(table, state="ready")
    search = table.get_by_role("searchbox")
    search.fill("pt")
    rows = table.locator(".kkh-spacer [role=row]")
    assert rows.evaluate_all("rows => rows.map(row => row.dataset.uid)") == [shore.pet]
    search.press("ArrowDown")
    book.page.keyboard.press("Enter")
    book.wait_kernel("table.selected", lambda uid: uid == shore.pet)

    search.fill("")
    slices = table.get_by_role("button", name="Slices")
    for direction, reverse in [("ascending", False), ("descending", True)]:
        slices.click()
        header = table.locator("[role=columnheader][data-key=slices]")
        assert header.get_attribute("aria-sort") == direction
        shown = [
            int(n) for n in rows.locator("[role=gridcell]:nth-last-child(2)").all_inner_texts()
        ]
        assert shown == sorted(shown, reverse=reverse)


def test_a_large_cohort_draws_only_what_is_in_sight(notebook: Open, shore: Shore) -> None:
    book = notebook("table = CohortTable()")
    rows = [{"uid": f"1.2.{n}", "modality": "CT", "slices": n} for n in range(50_000)]
    book.page.route("**/kakehashi/cohort", lambda route: route.fulfill(json={"rows": rows}))
    book.page.evaluate(
        """async () => {
          const {NotebookActions} = jupyterapp.shell.currentWidget.content.constructor;
          const panel = jupyterapp.shell.currentWidget;
          await jupyterapp.commands.execute('notebook:insert-cell-below');
          panel.content.activeCell.model.sharedModel.setSource('table');
          await jupyterapp.commands.execute('notebook:run-cell');
        }"""
    )
    table = book.page.locator(".kkh-cohort")
    book.wait_state(table, state="ready")
    assert table.locator(".kkh-spacer [role=row]").count() < 60
    table.locator(".kkh-scroller").focus()
    book.page.keyboard.press("End")
    book.page.keyboard.press("Enter")
    book.wait_kernel("table.selected", lambda uid: uid == "1.2.49999")


def test_the_clock_counts_and_warns(notebook: Open, lab: Lab) -> None:
    try:
        lab.session.lease(ends_in_s=300)
        book = notebook("clock = SessionClock(); clock")
        clock = book.page.locator(".jp-OutputArea .kkh-clock")
        book.wait_state(clock, state="soon")
        assert clock.get_by_role("timer").inner_text().startswith("00:0")
        assert "Save your work" in clock.get_by_role("alert").inner_text()
        bar = book.page.locator("#jp-top-panel .kkh-clock")
        book.wait_state(bar, state="soon")
        # The notice that nobody can overlook, whichever document is open.
        book.page.get_by_text("what is in your work folder is kept").first.wait_for()
    finally:
        lab.session.lease(ends_in_s=7200)


def test_the_clock_is_calm_while_there_is_time(notebook: Open) -> None:
    book = notebook("clock = SessionClock(); clock")
    clock = book.page.locator(".jp-OutputArea .kkh-clock")
    book.wait_state(clock, state="live")
    assert clock.locator(".kkh-note").text_content() == ""


def test_labels_in_japanese(notebook: Open, shore: Shore) -> None:
    book = notebook(
        "table = CohortTable(); table",
        f"viewer = SliceViewer({shore.ct!r}); viewer",
        "clock = SessionClock(); clock",
        locale="ja-JP",
    )
    root = viewer(book)
    assert root.get_by_role("button", name="肺").is_visible()
    assert book.page.get_by_role("searchbox", name="シリーズを検索").count() == 1
    assert book.page.locator(".jp-OutputArea .kkh-link").inner_text() == "ストア接続中"


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_the_first_notebook_in_the_lab(
    browser: Browser, lab: Lab, shore: Shore, theme: str
) -> None:
    shutil.copy(FIRST_LOOK, lab.work / "alice" / "first.ipynb")
    with visited(browser, lab, "alice/first.ipynb") as book:
        book.page.evaluate(
            "async theme => await jupyterapp.commands.execute('apputils:change-theme', {theme})",
            theme,
        )
        book.run_all()
        root = viewer(book)
        # The notebook itself moves to another slice than the middle one.
        book.wait_state(root, state="ready", index=4)
        assert_shows(root, shore.pack(shore.ct).values())
        table = book.page.locator(".kkh-cohort")
        book.wait_state(table, state="ready", selected=shore.ct)
        if shots := os.environ.get("KAKEHASHI_SHOTS"):
            book.page.screenshot(path=f"{shots}/first_{theme[-5:].strip()}.png")
            table.scroll_into_view_if_needed()
            book.page.screenshot(path=f"{shots}/first_{theme[-5:].strip()}_top.png")
        ink, paper = (
            sum(map(int, re.findall(r"\d+", root.evaluate(f"e => getComputedStyle(e).{name}"))[:3]))
            for name in ("color", "backgroundColor")
        )
        assert (ink > paper) == (theme == "JupyterLab Dark")
        book.page.evaluate("async () => await jupyterapp.commands.execute('docmanager:save')")
        saved = (lab.work / "alice" / "first.ipynb").read_text()
        assert "image/png" in saved
        assert not book.outside
        assert not book.errors


def test_the_lab_offers_no_download_or_export(notebook: Open) -> None:
    book = notebook("1 + 1")
    commands = [
        "docmanager:download",
        "filebrowser:download",
        "filebrowser:copy-download-link",
        "filebrowser:open-browser-tab",
        "notebook:export-to-format",
    ]
    there = "id => jupyterapp.commands.hasCommand(id)"
    assert [name for name in commands if book.page.evaluate(there, name)] == []
    # The control: the names are looked up where the lab keeps its commands.
    assert book.page.evaluate(there, "docmanager:save")
    book.page.evaluate("async () => await jupyterapp.commands.execute('docmanager:save')")
