"""docs/faults.md names every fault, every test named there exists, and every fault test is named there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ROWS = re.findall(r"^\| (T\d\d|headers) \|.*\|(.*)\|$", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
NAMED = [(fault, name) for fault, cell in ROWS for name in re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", cell)]


def names_in(file: Path) -> set[str]:
    """The test functions of a file, named as the table names them."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, functions)]
    return {f"{file.relative_to(ROOT)}::{name}" for name in found if name.startswith("test_")}


def test_every_fault_is_proved_by_a_test() -> None:
    """Guards against a promise without proof."""
    numbers = (1, 3, 4, 7, *range(10, 22), *range(25, 29), 31, 32, 34)
    assert {fault for fault, _ in NAMED} == {f"T{number:02}" for number in numbers} | {"headers"}
    assert all("`tests/" in cell for _, cell in ROWS)


def test_every_test_that_is_named_exists() -> None:
    """Guards against a test that was renamed or removed."""
    for fault, name in NAMED:
        file = ROOT / name.partition("::")[0]
        assert file.exists(), f"{fault}: {file}"
        assert name in names_in(file), f"{fault}: {name}"


def test_every_fault_test_is_named() -> None:
    """Guards against a test of a fault that the table does not promise."""
    files = set(HERE.glob("test_*.py")) - {Path(__file__).resolve()}
    assert {name for file in files for name in names_in(file)} <= {name for _, name in NAMED}
