"""Write docs/config.md from the run file's own schema, so that the page cannot say anything else than the code.

python scripts/generate_config_docs.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dist_infer.config import RunConfig
from dist_infer.generate_config import GenerateConfig
from dist_infer.prompt_config import ChatPrompt, Message, TextPart
from dist_infer.serve_config import ServeConfig, ServeLimits, TlsConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
SECTIONS = ("model", "parallel", "offload", "engine", "cluster")
INTRODUCTION = """\
# The run file

Generated from the code by `scripts/generate_config_docs.py`. Do not edit it by hand: a test compares it.

A run is one YAML file. Unknown keys are errors that name the nearest key, and so are a key written twice and a value of
the wrong type. `--set a.b=c` on the command line overrides any key. `dist-infer schema` prints the JSON Schema.

- **size**: a number and a unit, e.g. `512 MiB`, `1.5 GiB`, `2 GB`. A bare whole number is bytes.
- **time**: a number and a unit (`ms`, `s`, `min`, `h`), e.g. `30 s`. A bare number is seconds.
- **auto**: the planner decides. `dist-infer plan FILE` shows what it decided.
- Relative paths are taken from the directory of the run file.
"""


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    text = render()
    if parser.parse_args().check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE} is {'current' if current else 'stale: run scripts/generate_config_docs.py'}")
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def render() -> str:
    """The whole page."""
    schema = RunConfig.model_json_schema()
    parts = [INTRODUCTION]
    top = [name for name in RunConfig.model_fields if name not in (*SECTIONS, "run")]
    parts.append(_section("Top level", RunConfig, schema, schema, only=top))
    for name in SECTIONS:
        kind = RunConfig.model_fields[name].annotation
        if not isinstance(kind, type) or not issubclass(kind, BaseModel):
            raise TypeError(f"RunConfig.{name} is no section")
        parts.append(_section(f"`{name}`", kind, schema["$defs"][kind.__name__], schema))
    shapes: tuple[tuple[str, type[BaseModel]], ...] = (
        ("`run` with `kind: generate`", GenerateConfig),
        ("`run` with `kind: serve`", ServeConfig),
        ("`run.limits`", ServeLimits),
        ("`run.tls`", TlsConfig),
        ("An object of `run.prompts`", ChatPrompt),
        ("A message of `run.prompts`", Message),
        ("A text part of a message", TextPart),
    )
    for title, kind in shapes:
        parts.append(_section(title, kind, schema["$defs"][kind.__name__], schema))
    return "\n".join(parts)


def _section(
    title: str, kind: type[BaseModel], schema: dict[str, Any], root: dict[str, Any], only: list[str] | None = None
) -> str:
    lines = [f"## {title}", "", (kind.__doc__ or "").strip(), ""]
    lines += ["| key | type | default | what it does |", "| --- | --- | --- | --- |"]
    for name, field in kind.model_fields.items():
        if only is not None and name not in only:
            continue
        cells = (f"`{name}`", _type(schema["properties"][name], root), _default(field.default), field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its keys' own"
    return "none" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _type(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """In the words of the introduction; a size or time is written as people write it, whatever it is kept as."""
    if "$ref" in schema:
        return _type(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    options = schema.get("anyOf", schema.get("oneOf", []))
    written = str(schema.get("format", "")).partition(",")[0]
    if written in ("size", "time"):
        above = " above 0" if any("exclusiveMinimum" in option for option in (schema, *options)) else ""
        return written + above + (" or `auto`" if any(option.get("const") == "auto" for option in options) else "")
    if options:
        return " or ".join(dict.fromkeys(_type(option, root) for option in options))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of ({_type(schema['items'], root)})"
    if schema["type"] == "object":
        return "{" + ", ".join(schema["properties"]) + "}" if "properties" in schema else "object"
    return _NAMES[schema["type"]] + _range(schema)


_NAMES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "none"}


def _range(schema: dict[str, Any]) -> str:
    marks = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{mark} {schema[key]:g}" for key, mark in marks.items() if key in schema]
    return f" {', '.join(limits)}" if limits else ""


if __name__ == "__main__":
    sys.exit(main())
