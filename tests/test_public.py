"""What the project is published with agrees with it: CITATION.cff, workflows, forms, hooks, owners."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridtrain import __version__
from tools.check_subject import problems

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
FORMS = sorted(path for path in TEMPLATES if path.name != "config.yml")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_citation_has_what_the_format_asks_for_and_this_version() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["title"] == project["name"]
    assert citation["license"] == project["license"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_that_exist_within_a_time(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    jobs = load(path)["jobs"]
    for name, job in jobs.items():
        assert job["timeout-minutes"] <= 360, name
        suites = job.get("strategy", {}).get("matrix", {}).get("suite", [])
        commands = "\n".join(step.get("run", "") for step in job["steps"])
        called = [*re.findall(r"\bmake ([a-z][\w-]*)", commands), *suites]
        assert called, f"{path.name}: {name} runs no make target"
        missing = set(called) - targets
        assert not missing, f"{path.name}: {name} runs {missing}, which the Makefile lacks"


def test_ci_tests_every_python_that_is_supported() -> None:
    versions = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={versions[0]}"
    assert versions == ["3.11", "3.12", "3.13"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_fields_with_names_of_their_own(path: Path) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in fields)
    if path.name == "bug.yml":
        assert {"version", "command", "settings", "layout", "log"} <= set(names)


def test_hooks_use_the_version_of_ruff_that_the_tests_use() -> None:
    hooks = load(ROOT / ".pre-commit-config.yaml")
    (ruff,) = (repo for repo in hooks["repos"] if "ruff" in repo["repo"])
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert f"\nruff=={ruff['rev'].removeprefix('v')}\n" in lock
    (local,) = (repo for repo in hooks["repos"] if repo["repo"] == "local")
    for hook in local["hooks"]:
        scripts = [word for word in hook["entry"].split() if word.startswith("tools/")]
        assert all((ROOT / script).is_file() for script in scripts)


def test_owners_own_files_that_exist() -> None:
    """A rule with no owner takes the files from everybody. Without rules nobody is asked for a review."""
    lines = (ROOT / ".github" / "CODEOWNERS").read_text(encoding="utf-8").splitlines()
    assert lines
    for pattern, *owners in [line.split() for line in lines if line and not line.startswith("#")]:
        assert owners, pattern
        assert pattern == "*" or (ROOT / pattern.strip("/")).exists(), pattern


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Say why\n\nA body.\n# a comment\n", []),
        ("x" * 72, []),
        ("x" * 73, ["the subject has 73 characters, at most 72 are legal"]),
        ("é" * 72, []),
        ("\n# a comment\n", ["the message has no subject"]),
        ("Say why\nA body.\n", ["line 2 is not empty; an empty line parts subject and body"]),
        (f"# a comment\n{'x' * 80}\n# {'-' * 24} >8 {'-' * 24}\nx\ny", ["the subject has 80"]),
    ],
)
def test_subjects_of_commits(message: str, expected: list[str]) -> None:
    found = problems(message)
    assert len(found) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(found, expected, strict=True))


def test_the_hook_refuses_a_long_subject(tmp_path: Path) -> None:
    message = tmp_path / "message"
    for text, status in (("Say why\n", 0), ("x" * 73, 1)):
        message.write_text(text, encoding="utf-8")
        command = [sys.executable, str(ROOT / "tools" / "check_subject.py"), str(message)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == status
        assert ("at most 72" in done.stderr) == bool(status)
