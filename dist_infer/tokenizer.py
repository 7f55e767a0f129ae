"""The checkpoint's own tokenizer and chat template, loaded by transformers without any remote code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_infer.engine.detokenizer import TokenKinds
from dist_infer.vocabulary import Vocabulary, token_bytes
from partition.errors import CheckpointError, ConfigError

_CHECKED_TOKENS = 1000


class Tokenizer:
    """Text to token ids and back. Owned by the coordinator; loading takes about a second."""

    def __init__(self, checkpoint: Path) -> None:
        """checkpoint: a directory with tokenizer files, or a GGUF file. Raises CheckpointError when there is none."""
        from transformers import AutoTokenizer

        self._checkpoint = checkpoint
        try:
            if checkpoint.is_dir():
                self._inner: Any = AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True)
            else:
                self._inner = AutoTokenizer.from_pretrained(
                    str(checkpoint.parent), gguf_file=checkpoint.name, local_files_only=True
                )
        except Exception as error:  # the loaders raise anything from OSError to KeyError
            raise CheckpointError(
                f"no usable tokenizer in {checkpoint} ({type(error).__name__}: {error}); prompts can still be given as "
                "token ids"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added ones included; the model may have more."""
        return len(self._inner)

    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self._inner.eos_token_id
        return () if eos is None else (int(eos),)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: put around the text what the tokenizer puts around a text; a template does it itself."""
        try:
            return [int(token) for token in self._inner(text, add_special_tokens=add_special_tokens)["input_ids"]]
        except Exception as error:  # half a surrogate pair, for one
            raise ConfigError(f"the tokenizer refuses this text ({type(error).__name__}: {error})") from error

    def chat_template(self, wanted: str | None, *, with_tools: bool) -> str:
        """The template to use: `wanted` (a template, or the name of one of the model's own), else the model's.

        Of several the model's are `tool_use` for a conversation with tools, then `default`. ConfigError when there is
        none to use, with what there is.
        """
        own = self._inner.chat_template
        if isinstance(own, Mapping):
            if wanted in own:
                return str(own[wanted])
            if wanted is None:
                name = "tool_use" if with_tools and "tool_use" in own else "default"
                if name in own:
                    return str(own[name])
                raise ConfigError(
                    f"the model in {self._checkpoint} has the chat templates {', '.join(sorted(own))} and no default: "
                    "name one of them (chat_template=)"
                )
        if wanted:
            return wanted
        if not own:
            raise ConfigError(
                f"this model has no chat template: {_template_places(self._checkpoint)}. Give plain text prompts "
                "(run.chat: false), or a template (chat_template=), or put a chat_template.jinja into the model's "
                "directory"
            )
        return str(own)

    def template_variables(self) -> dict[str, Any]:
        """What a template sees by name beside the conversation: the special tokens, as texts."""
        return dict(self._inner.special_tokens_map)

    def special_token_ids(self) -> dict[str, int]:
        """Of the special tokens, by their text."""
        named = zip(self._inner.all_special_tokens, self._inner.all_special_ids, strict=True)
        added = self._inner.added_tokens_decoder.items()
        return {str(text): int(id) for text, id in named} | {str(t): int(id) for id, t in added if t.special}

    def token_kinds(self, vocab_size: int, *, skip_special_tokens: bool = True) -> TokenKinds:
        """What the detokenizer must know of ids below `vocab_size` (the model's, often more than the tokenizer's)."""
        known = self._inner.get_vocab()
        candidates = set(range(vocab_size)) - set(known.values())
        if skip_special_tokens:
            candidates |= set(self._inner.all_special_ids)
            candidates |= {id for id, token in self._inner.added_tokens_decoder.items() if token.special}
        silent = frozenset(id for id in candidates if self._is_silent(id, skip_special_tokens))
        return TokenKinds(silent=silent, byte_values=_byte_values(known) if self._joins_bytes() else {})

    def vocabulary(self, vocab_size: int) -> Vocabulary:
        """What each id below `vocab_size` (the model's) adds to a text that has begun. Takes up to a second.

        ConfigError where that depends on its neighbours; then there are no grammars.
        """
        backend = getattr(self._inner, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError("this model's tokenizer is none of the `tokenizers` library: no grammars")
        by_id = {id: token for token, id in self._inner.get_vocab().items() if id < vocab_size}
        ids = sorted(by_id)
        try:
            found = token_bytes([by_id[id] for id in ids], json.loads(backend.to_str()).get("decoder"))
        except ConfigError as error:
            raise ConfigError(f"this model cannot follow a grammar: {error}") from None
        silent = self.token_kinds(vocab_size).silent
        texts = [""] * vocab_size
        for id, text in zip(ids, found, strict=True):
            texts[id] = (by_id[id].encode() if id in silent else text).decode("latin-1")
        self._check_texts([(id, text) for id, text in zip(ids, found, strict=True) if id not in silent])
        return Vocabulary(texts=tuple(texts), special_ids=tuple(id for id in ids if id in silent))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids, special tokens left out unless they are asked for."""
        text: str = self._inner.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _check_texts(self, texts: Sequence[tuple[int, bytes]]) -> None:
        """A sample of them against the decoder itself."""
        anchor = next((id for id, text in texts if text == b"a"), None)
        before = "" if anchor is None else self.decode((anchor,))
        for id, text in texts[:: max(1, len(texts) // _CHECKED_TOKENS)]:
            try:
                expected = text.decode()
            except UnicodeDecodeError:  # a part of a character
                continue
            if anchor is None or self.decode((anchor, id)) != before + expected:
                raise ConfigError(
                    f"this model cannot follow a grammar: its token {id} is not the text {expected!r} everywhere"
                )

    def _is_silent(self, token_id: int, skip_special_tokens: bool) -> bool:
        try:
            return not self.decode((token_id,), skip_special_tokens=skip_special_tokens)
        except Exception:  # an id it does not know; whoever decodes it will say so
            return False

    def _joins_bytes(self) -> bool:
        """Whether the decoder takes `<0xE2>` for a byte, and a row of such tokens for one text."""
        backend = getattr(self._inner, "backend_tokenizer", None)
        if backend is None:
            return False
        # the state of the decoder alone: the whole tokenizer as JSON is megabytes
        decoder = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        return any(part.get("type") == "ByteFallback" for part in decoder.get("decoders", [decoder]))


def _byte_values(vocabulary: Mapping[str, int]) -> dict[int, int]:
    names = {f"<0x{value:02X}>": value for value in range(256)}
    return {vocabulary[name]: value for name, value in names.items() if name in vocabulary}


def _template_places(checkpoint: Path) -> str:
    if not checkpoint.is_dir():
        return f"{checkpoint.name} has none in its metadata (tokenizer.chat_template)"
    there = [name for name in ("tokenizer_config.json", "chat_template.jinja") if (checkpoint / name).exists()]
    return f"{checkpoint} has {' and '.join(there) or 'no tokenizer_config.json'}, and no template in it"
