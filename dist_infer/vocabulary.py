"""What each token of a model adds to a text, in bytes: all that constrained decoding needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partition.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """texts: of each id of the model, a character for each byte (latin-1, so that JSON carries it); empty: no token.

    special_ids: ids whose text is only a name, e.g. `<|im_end|>`, and adds nothing to an answer.
    """

    texts: tuple[str, ...]
    special_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


def token_bytes(tokens: Sequence[str], decoder: Mapping[str, Any] | None) -> list[bytes]:
    """The bytes that each of the tokens, as it stands in the vocabulary, adds to a text that has begun.

    decoder: that of a tokenizer.json. Raises ConfigError for a decoder that makes
    different texts of one token, depending on its neighbours.
    """
    if decoder is None:
        raise ConfigError("the tokenizer has no decoder: it puts blanks between tokens")
    parts = decoder.get("decoders", [decoder]) if decoder.get("type") == "Sequence" else [decoder]
    names = [str(part.get("type")) for part in parts]
    if "ByteLevel" in names:
        values = _byte_level_values()
        return [_from_byte_level(token, values) for token in tokens]
    if unknown := sorted(set(names) - {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}):
        raise ConfigError(f"the tokenizer's decoder ({', '.join(unknown)}) joins tokens by context")
    bytes_by_name: dict[str, bytes] = {}
    replacements: list[tuple[str, str]] = []
    for part in parts:
        if part["type"] == "ByteFallback":
            bytes_by_name = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}
        elif part["type"] == "Metaspace":
            replacements.append((part["replacement"], " "))
        elif part["type"] == "Replace":
            pattern = part["pattern"].get("String")
            if pattern is None:
                raise ConfigError("the tokenizer's decoder replaces by a regular expression")
            replacements.append((pattern, part["content"]))
    found: list[bytes] = []
    for token in tokens:
        if (value := bytes_by_name.get(token)) is not None:
            found.append(value)
            continue
        for old, new in replacements:
            token = token.replace(old, new)
        found.append(token.encode("utf-8", "replace"))
    return found


def _from_byte_level(token: str, values: Mapping[str, int]) -> bytes:
    try:
        return bytes([values[character] for character in token])
    except KeyError:  # an added token: as it stands
        return token.encode("utf-8", "replace")


def _byte_level_values() -> dict[str, int]:
    """The byte that each sign of a byte-level vocabulary stands for: itself where it can be seen, else from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in set(visible)]
    return {chr(value): value for value in visible} | {chr(256 + at): value for at, value in enumerate(hidden)}
