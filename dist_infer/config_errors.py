"""What pydantic found wrong, in the words of who wrote the file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """What is wrong with what was read as `root`, in one line: each place as people wrote it, and what to change."""
    return "; ".join(dict.fromkeys(_explain(item, root) for item in error.errors()))


def _explain(item: Mapping[str, Any], root: type[BaseModel]) -> str:
    written, section = _as_written(item["loc"], root)
    if item["type"] == "union_tag_invalid":  # pydantic names the section, people wrote its `kind`
        written.append("kind")
    elif item["type"] == "union_tag_not_found":
        return f"missing key `{'.'.join([*written, 'kind'])}`"
    place = ".".join(written)
    if item["type"] == "extra_forbidden":
        known = list(section.model_fields)
        near = difflib.get_close_matches(written[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key `{place}`; {hint}"
    if item["type"] == "missing":
        return f"missing key `{place}`"
    if item["type"] == "union_tag_invalid":
        return f"`{place}`: must be one of {item['ctx']['expected_tags']} (got {str(item['ctx']['tag'])[:80]!r})"
    shown = repr(item.get("input"))
    message = str(item["msg"]).removeprefix("Value error, ")
    where = f"`{place}`: " if place else ""
    return f"{where}{message} (got {shown if len(shown) <= 80 else shown[:77] + '...'})"


def _as_written(location: Sequence[str | int], root: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The keys and indices of a location, and the section its last key is in.

    Inside a value pydantic also names the branch of a union that it tried; nobody wrote that.
    """
    written: list[str] = []
    section = root
    kind: Any = root  # of the value the location has come to: a section, a list, or None
    branches: dict[str, Any] = {}  # of that value, where it is one of several kinds with names
    for part in location:
        if part in branches:
            kind, branches = branches[str(part)], {}
            continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            section = kind
            field = kind.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
        elif isinstance(part, int):
            annotation = None if kind is None else get_args(kind)[0]
        else:
            continue
        kind, branches = _container(annotation), _branches(annotation)
        written.append(str(part))
    return written, section


def _branches(annotation: Any) -> dict[str, Any]:
    """The containers of a union whose members have tags, or a `kind` that is theirs alone."""
    found: dict[str, Any] = {}
    for part in get_args(annotation):
        tags = [extra.tag for extra in getattr(part, "__metadata__", ()) if isinstance(extra, Tag)]
        found |= {tag: _container(part) for tag in tags} or _kinds(part) or _branches(part)
    return found


def _kinds(part: Any) -> dict[str, Any]:
    if not isinstance(part, type) or not issubclass(part, BaseModel) or "kind" not in part.model_fields:
        return {}
    return dict.fromkeys(map(str, get_args(part.model_fields["kind"].annotation)), part)


def _container(annotation: Any) -> Any:
    """The section or list in an annotation, behind Annotated and unions; None for a plain value."""
    if get_origin(annotation) is list:
        return annotation
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in get_args(annotation) if (found := _container(part)) is not None), None)
