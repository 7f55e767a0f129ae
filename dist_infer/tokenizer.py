"""The checkpoint's own tokenizer and chat template, loaded by transformers without any remote code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partition.errors import CheckpointError, ConfigError


class Tokenizer:
    """Text to token ids and back. Owned by the coordinator; loading takes about a second."""

    def __init__(self, checkpoint: Path) -> None:
        """checkpoint: a directory with tokenizer files, or a GGUF file. Raises CheckpointError when there is none."""
        from transformers import AutoTokenizer

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
    def has_chat_template(self) -> bool:
        return bool(self._inner.chat_template)

    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self._inner.eos_token_id
        return () if eos is None else (int(eos),)

    def encode(self, text: str) -> list[int]:
        try:
            return [int(token) for token in self._inner(text)["input_ids"]]
        except Exception as error:  # half a surrogate pair, for one
            raise ConfigError(f"the tokenizer refuses this text ({type(error).__name__}: {error})") from error

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, with the prompt for the assistant's answer at its end.

        Raises ConfigError when there is no template, or when it (a program, run in a sandbox) fails on the messages.
        """
        if not self.has_chat_template:
            raise ConfigError("this model has no chat template: give plain text prompts (run.chat: false) instead")
        try:
            encoded = self._inner.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
            return [int(token) for token in encoded["input_ids"]]
        except Exception as error:  # whatever the template and the sandbox raise
            raise ConfigError(
                f"the model's chat template fails on these messages ({type(error).__name__}: {error})"
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self._inner.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
