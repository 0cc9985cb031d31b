"""The documentation: every link leads somewhere, every command and setting in it exists."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from kakehashi import config
from kakehashi.cli import app
from kakehashi.site import job

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "docker" / "README.md"])
# Written by ``make bench``, from figures of the machine that it ran on.
MADE = {ROOT / "docs" / "benchmarks.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    return FENCE.sub("", text_of(path))


def fences(path: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text_of(path)) if kind == language]


def anchors(path: Path) -> set[str]:
    """Return the anchors that headings of a page get, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")
        for heading in headings
    }


def link_faults(path: Path, root: Path = ROOT) -> list[str]:
    found = []
    targets = [*LINK.findall(prose(path)), *(target for _, target in PICTURE.findall(prose(path)))]
    for target in targets:
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        if not place.exists() and place not in MADE:
            found.append(f"{target}: does not exist")
        elif root not in place.parents and place != root:
            found.append(f"{target}: outside of the repository")
        elif anchor and anchor not in anchors(place):
            found.append(f"{target}: no such heading")
    found += [
        f"{target}: no description" for name, target in PICTURE.findall(prose(path)) if not name
    ]
    return found


def said_commands(path: Path) -> Iterator[list[str]]:
    """Give each ``kakehashi ...`` that a page names, as words."""
    lines = [line for _, body in FENCE.findall(text_of(path)) for line in body.splitlines()]
    for text in [*lines, *CODE.findall(prose(path))]:
        for command in re.findall(
            r"(?:^|[\s\"&/])kakehashi (?!import )((?:[a-z]|--)[^\"|&>]*)", text
        ):
            yield command.split()


def command_fault(words: list[str]) -> str | None:
    """Return what is wrong with a command of ours."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest:
        inner = command.commands.get(rest[0])
        if inner is None:
            return f"no command {rest[0]!r} in kakehashi {' '.join(words)}"
        command, rest = inner, rest[1:]
    known = {option for one in command.params for option in [*one.opts, *one.secondary_opts]}
    for word in rest:
        if word.startswith("-") and word.partition("=")[0] not in {*known, "--help"}:
            return f"no option {word} in kakehashi {' '.join(words)}"
    return None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links(path: Path) -> None:
    assert link_faults(path) == []


def test_every_page_of_docs_can_be_reached_from_the_first() -> None:
    reached, new = set(), {ROOT / "docs" / "index.md"}
    while new:
        page = new.pop()
        reached.add(page)
        for target in LINK.findall(prose(page)):
            place = (page.parent / target.partition("#")[0]).resolve()
            if place.suffix == ".md" and place not in reached:
                new.add(place)
    assert set((ROOT / "docs").glob("*.md")) - reached - MADE == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands(path: Path) -> None:
    assert [fault for words in said_commands(path) if (fault := command_fault(words))] == []


def test_the_docs_name_every_command() -> None:
    """What a person can do with the command line stands somewhere."""
    said = {" ".join(words[:2]) for path in PAGES for words in said_commands(path)}
    group: Any = typer.main.get_command(app)
    there = set()
    for name, command in group.commands.items():
        inner = getattr(command, "commands", {})
        there |= {f"{name} {one}" for one in inner} if inner else {name}
    unsaid = {one for one in there if not any(text.startswith(one) for text in said)}
    assert unsaid == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_make_targets_and_modules(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`", text_of(path)))
    assert named - targets == set()
    for module in re.findall(r"-m (kakehashi[\w.]*)", text_of(path)):
        assert (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").exists(), module


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_in_the_repository_exist(path: Path) -> None:
    top = "|".join(("src", "spawners", "extensions", "notebooks", "docker", "tests", "scripts"))
    for name in re.findall(rf"`((?:{top})/[\w./-]+)`", prose(path)):
        made_by_hand = name.startswith("docker/secrets")
        assert made_by_hand or (ROOT / name).exists(), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_settings_python_and_json(path: Path) -> None:
    for body in fences(path, "toml"):
        config.Config.model_validate(tomllib.loads(body))
    for body in fences(path, "python"):
        ast.parse(body)
    for body in fences(path, "json"):
        if '"scheduler"' in body and '"accounts"' in body:
            job._site_file(json.loads(body))


def test_the_example_of_a_deployment_is_valid() -> None:
    example = config.load(ROOT / "kakehashi.toml")
    assert example.sites
    assert example.projects


def test_the_operator_s_agent_is_the_same_in_sudoers_and_settings() -> None:
    page = ROOT / "docs" / "operator.md"
    (allowed,) = fences(page, "sudoers")
    sites = [tomllib.loads(body) for body in fences(page, "toml") if "[sites." in body]
    agent = sites[0]["sites"]["flow"]["agent"]
    assert allowed.partition("NOPASSWD: ")[2].split() == agent[2:]


def test_faults_are_seen(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    (root / "index.md").write_text("# Here\n", encoding="utf-8")
    page = root / "page.md"
    page.write_text(
        "[a](gone.md) [b](index.md#gone) [c](../) ![](index.md) [well](index.md#here)\n"
        "`kakehashi store gone` `kakehashi store list --gone` `kakehashi store list --kept`\n",
        encoding="utf-8",
    )
    assert len(link_faults(page, root)) == 4
    assert [fault for words in said_commands(page) if (fault := command_fault(words))] == [
        "no command 'gone' in kakehashi store gone",
        "no option --gone in kakehashi store list --gone",
    ]


def named_tests(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text_of(path))


def test_each_promise_names_tests_that_there_are() -> None:
    named = named_tests(ROOT / "docs" / "security.md")
    assert len(named) > 30
    missing = [
        f"{name}::{test}"
        for name, test in named
        if not (ROOT / name).is_file() or f"def {test}(" not in text_of(ROOT / name)
    ]
    assert missing == []
