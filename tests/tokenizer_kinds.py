"""Tokenizers of every kind that can be built here, trained on texts of the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo_model import SMOLLM2

from dist_infer.tokenizer import Tokenizer

_TEXT = Path(__file__).parent / "data" / "persuasion.txt"

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
KINDS = (
    "byte-level",
    "byte-fallback",
    "legacy-llama",
    "unigram",
    "unigram-bytes",
    "wordpiece",
    "word-level",
    "char-level",
    "suffix-bpe",
)
_EXTRA = [
    "naïve café, Grüße! 你好，世界。 こんにちは Привет мир 😀👍 'tis o'clock don't I'm we've  two   three\n\tend ."
] * 5


def _build(kind: str) -> Any:
    """A tokenizer of the `tokenizers` library."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Inner

    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    quiet: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "byte-level":
        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, **quiet)
    elif kind in ("byte-fallback", "legacy-llama"):
        inner = Inner(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        pieces: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "legacy-llama":
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            pieces.append(decoders.Strip(content=" ", left=1, right=0))
        else:
            inner.normalizer = normalizers.Replace(" ", "▁")
        inner.decoder = decoders.Sequence(pieces)
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            initial_alphabet=[chr(code) for code in range(32, 127)],
            limit_alphabet=100,
            **{**quiet, "special_tokens": SPECIAL + byte_tokens},
        )
    elif kind in ("unigram", "unigram-bytes"):
        inner = Inner(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", **quiet)
    elif kind == "wordpiece":
        inner = Inner(models.WordPiece(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece(cleanup=True)
        trainer = trainers.WordPieceTrainer(vocab_size=500, **quiet)
    elif kind == "word-level":
        inner = Inner(models.WordLevel(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=400, **quiet)
    elif kind == "char-level":
        inner = Inner(models.BPE(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        inner.decoder = decoders.Fuse()
        trainer = trainers.BpeTrainer(vocab_size=10, **quiet)
    else:
        inner = Inner(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(vocab_size=500, end_of_word_suffix="</w>", **quiet)
    lines = _TEXT.read_text(encoding="utf-8").splitlines()[:200]
    inner.train_from_iterator([*lines, *_EXTRA], trainer)
    if kind in ("byte-fallback", "legacy-llama"):
        # trained as special tokens only to get their ids: they are ordinary ones
        data = json.loads(inner.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in byte_tokens]
        inner = Inner.from_str(json.dumps(data))
    elif kind == "unigram-bytes":
        trained = [tuple(entry) for entry in json.loads(inner.to_str())["model"]["vocab"]]
        inner.model = models.Unigram(
            [*trained, *((token, -20.0) for token in byte_tokens)], unk_id=0, byte_fallback=True
        )
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    inner.add_tokens([AddedToken("<tool_call>", normalized=False)])
    inner.add_special_tokens([AddedToken("<|eot|>", normalized=False)])
    return inner


def make_tokenizer(kind: str, directory: Path) -> Tokenizer:
    """Written to `directory` and loaded as that of a checkpoint; "smollm2" is the demo model's own."""
    from transformers import PreTrainedTokenizerFast

    from dist_infer.location import resolve_model

    if kind == "smollm2":
        return Tokenizer(resolve_model(SMOLLM2))
    PreTrainedTokenizerFast(
        tokenizer_object=_build(kind), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return Tokenizer(directory)
