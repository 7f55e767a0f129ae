"""Random JSON schemas whose instances are short enough for a random model to finish."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("a", "name", "größe", "x y", "tab\t", 'q"uote', "0", "long_property_name", "😀", "")


def random_schema(source: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of the kinds that people write: objects, arrays, unions, references, numbers and texts with bounds."""
    leaves = ("integer", "number", "boolean", "null", "string", "enum", "const", "pattern", "format")
    nested = ("object", "object", "array", "anyOf", "tuple", "ref", "map", "nullable")
    kind = source.choice(leaves if depth >= 3 else nested * (3 - depth) + leaves)
    match kind:
        case "object":
            names = source.sample(_NAMES, source.randint(0, 4))
            properties = {name: random_schema(source, depth + 1) for name in names}
            required = [name for name in names if source.random() < 0.6]
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        case "array":
            least = source.randint(0, 2)
            items = random_schema(source, depth + 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + source.randint(0, 2)}
        case "tuple":
            items = [random_schema(source, depth + 1) for _ in range(source.randint(1, 3))]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        case "anyOf":
            return {"anyOf": [random_schema(source, depth + 1) for _ in range(source.randint(1, 3))]}
        case "nullable":
            return {"type": [source.choice(("boolean", "integer")), "null"], "minimum": -9, "maximum": 9}
        case "ref":
            inner = random_schema(source, 3)
            name = f"d{source.randrange(10**6)}"
            node = {"type": "object", "properties": {"v": inner, "next": {"type": "null"}}, "required": ["v"]}
            return {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 2, "_defs": {name: node}}
        case "map":
            values = random_schema(source, 3)
            return {"type": "object", "additionalProperties": values, "maxProperties": 2}
        case "integer":
            low = source.randint(-2000, 2000)
            return {"type": "integer", "minimum": low, "maximum": low + source.choice((0, 5, 100, 5000))}
        case "number":
            return {"type": "number", "minimum": source.choice((0, -1.5, 10)), "exclusiveMaximum": 99.25}
        case "string":
            least = source.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + source.randint(0, 5)}
        case "enum":
            return {"enum": source.sample(["red", "grün", 1, -2.5, None, True, {"a": [1]}, [], "", "\n"], 3)}
        case "const":
            return {"const": source.choice(["x", 7, None, {"k": "v"}, [1, "2"]])}
        case "pattern":
            return {"type": "string", "pattern": source.choice((r"^[a-z]{1,4}$", r"^\d{3}-\d{2}$", r"^(ab|cd)+x$"))}
        case _:
            return {"type": "string", "format": source.choice(("date", "time", "ipv4", "uuid"))}


def whole_schema(source: random.Random) -> dict[str, Any]:
    """With its definitions at the root, where references look for them."""
    definitions: dict[str, Any] = {}

    def lift(value: Any) -> Any:
        if isinstance(value, dict):
            definitions.update(value.get("_defs", {}))
            return {name: lift(inner) for name, inner in value.items() if name != "_defs"}
        return [lift(inner) for inner in value] if isinstance(value, list) else value

    schema = lift(random_schema(source))
    return {**schema, "$defs": definitions} if definitions else schema
