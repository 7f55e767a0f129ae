"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

File = Annotated[Path, typer.Argument(help="The run file (YAML).", metavar="FILE")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a key. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout.")]
