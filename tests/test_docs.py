"""The documents say what the code is: no module is missing on the map, no page is stale, no link leads nowhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from launch.cli import app

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("partition", "offload", "dist_infer", "launch")
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def modules() -> set[str]:
    """Every module with code of the four packages, by its dotted name."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.name != "__init__.py"}


def named_modules() -> set[str]:
    """The modules that have a row on the map."""
    return set(re.findall(rf"^\| `((?:{'|'.join(PACKAGES)})\.[a-z0-9_.]+)` \|", MAP, re.MULTILINE))


def test_every_module_is_on_the_map() -> None:
    """Guards the map against a module that was added and not described."""
    assert modules() - named_modules() == set()


def test_the_map_names_no_module_that_is_gone() -> None:
    """Guards the map against a module that was renamed or removed."""
    assert named_modules() - modules() == set()


def test_config_page_is_current() -> None:
    """Guards docs/config.md against a key that was changed without running the script."""
    script = runpy.run_path(str(ROOT / "scripts" / "generate_config_docs.py"))
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == script["render"](), "run scripts/generate_config_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Guards against a link to a file that was moved or is only planned."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_readme_has_every_command() -> None:
    """Guards the table of commands against a command that was added, renamed or removed."""
    documented = set(re.findall(r"^\| `dist-infer ([a-z-]+)", README, re.MULTILINE))
    assert documented == set(get_command(app).commands)  # type: ignore[attr-defined]


def test_readme_run_files_are_valid() -> None:
    """Guards the YAML shown in the README: a reader copies it."""
    from dist_infer import load_config

    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        load_config(yaml.safe_load(block))


@pytest.mark.slow
def test_readme_python_example_runs(tmp_path: Path) -> None:
    """Guards the Python example: it runs as it is written, and prints Paris."""
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    example = example.replace("configs/local.yaml", str(ROOT / "configs" / "local.yaml"))
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
