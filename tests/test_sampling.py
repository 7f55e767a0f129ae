"""Sampling end to end on a tiny model: options reach the logits, answers share a prompt, neighbours change nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dist_infer import LLM, SamplingParams
from dist_infer.counter_random import sample_seed
from dist_infer.errors import ConfigError
from dist_infer.model.adapter import LayerCalls, StageModel
from dist_infer.outputs import RequestOutput

VOCAB = 160
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]
ALL_OPTIONS = {
    "temperature": 1.3,
    "top_k": 80,
    "top_p": 0.97,
    "min_p": 0.001,
    "typical_p": 0.95,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {30: 3.0, 31: -5.0},
    "min_tokens": 5,
}


def run_config(path: Path, store: Path, *, tensor: int = 1, pipeline: int = 1, **engine: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(path)},
        "parallel": {"tensor": tensor, "pipeline": pipeline},
        "offload": {"store": str(store)},
        "engine": {
            "kv_memory": "1 MiB",
            "block_tokens": 4,
            "max_batch_tokens": 16,
            "max_requests": 6,
            "max_model_len": 120,
            **engine,
        },
        "cluster": {"device": "cpu"},
    }


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def llm(path: Path, store_root: Path) -> Iterator[LLM]:
    with LLM(run_config(path, store_root)) as made:
        yield made
        made.integrity()


@pytest.fixture(scope="module")
def reference(path: Path) -> Callable[[list[int]], torch.Tensor]:
    """transformers' log-probabilities, [tokens, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def run(token_ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    return run


def texts(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def num_computed(llm: LLM) -> int:
    return max(report.num_tokens for report in llm.stream_reports())


def params(seed: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 14, "ignore_eos": True, "seed": seed, **ALL_OPTIONS, **changes})


# ---- independence


def test_same_seed_same_text_with_every_option_alone_beside_others_and_cut(
    llm: LLM, path: Path, store_root: Path
) -> None:
    prompts = [PROMPT, [9, 10], [11] * 9, [40, 41, 42]]
    many = [params(3), params(4, n=2), SamplingParams(max_tokens=9, temperature=0), params(6, logit_bias={50: 4.0})]
    together = texts(llm.generate(prompts, many))
    alone = [texts(llm.generate([prompt], one))[0] for prompt, one in zip(prompts, many, strict=True)]
    assert alone == together
    with LLM(run_config(path, store_root, pipeline=2)) as cut:
        assert texts(cut.generate(prompts, many)) == together


@pytest.mark.slow
def test_same_seed_same_text_on_two_tensor_ranks(llm: LLM, path: Path, store_root: Path) -> None:
    """Also what is told of the prompt: all ranks take part in each of its slices, or they wait for each other."""
    many = [params(3, n=2, prompt_logprobs=1), params(4)]
    expected = llm.generate([PROMPT, [9, 10]], many)
    with LLM(run_config(path, store_root, tensor=2, pipeline=2)) as two:
        found = two.generate([PROMPT, [9, 10]], many)
    assert texts(found) == texts(expected)
    assert found[0].prompt_logprobs is not None
    assert expected[0].prompt_logprobs is not None
    for ours, theirs in zip(found[0].prompt_logprobs[1:], expected[0].prompt_logprobs[1:], strict=True):
        assert ours is not None
        assert theirs is not None
        assert [entry.logprob for entry in ours.values()] == pytest.approx(
            [entry.logprob for entry in theirs.values()], abs=1e-4
        )


# ---- several answers


@pytest.mark.parametrize("num_prompt", [1, 2, 8, 9, 12, 21])
def test_answers_share_the_prompt_and_are_those_of_their_seeds(llm: LLM, num_prompt: int) -> None:
    """Prompts that end within, before and after a block's border: a row that is not copied shows at once."""
    prompt, before = PROMPT[:num_prompt], num_computed(llm)
    (answers,) = texts(llm.generate([prompt], params(7, n=4)))
    others = 3 * (1 if num_prompt > 1 else num_prompt)
    assert num_computed(llm) - before == num_prompt + others + 4 * 13
    alone = [texts(llm.generate([prompt], params(sample_seed(7, index))))[0][0] for index in range(4)]
    assert answers == alone
    assert len(set(map(tuple, answers))) == 4


@pytest.mark.parametrize("family", ["gemma2", "deepseek_v3"])
def test_answers_share_the_prompt_in_other_caches(
    tiny_checkpoint: Callable[..., Path], store_root: Path, family: str
) -> None:
    """Windows (shorter than the prompt) and latents: more answers than may run at a time, so that some come late."""
    config = run_config(tiny_checkpoint(family), store_root, max_requests=3, max_batch_tokens=4)
    with LLM(config) as llm:
        (answers,) = texts(llm.generate([PROMPT], params(7, n=6)))
        alone = [texts(llm.generate([PROMPT], params(sample_seed(7, index))))[0][0] for index in range(6)]
        assert answers == alone
        llm.integrity()


def test_an_answer_that_comes_late_does_not_take_over_rows_that_are_gone(
    tiny_checkpoint: Callable[..., Path], store_root: Path
) -> None:
    """Its sibling has gone round its rings by the time there is room for it."""
    config = run_config(tiny_checkpoint("gemma2"), store_root, max_requests=2, max_batch_tokens=4)
    with LLM(config) as llm:
        in_the_way = SamplingParams(max_tokens=26, temperature=0, ignore_eos=True)
        _, answers = texts(llm.generate([PROMPT[:3], PROMPT], [in_the_way, params(7, n=2, max_tokens=30)]))
        alone = [texts(llm.generate([PROMPT], params(sample_seed(7, index), max_tokens=30)))[0][0] for index in (0, 1)]
        assert answers == alone


def test_answers_on_two_stages_and_with_little_memory(llm: LLM, path: Path, store_root: Path) -> None:
    """Preempted answers come back, by themselves or from a sibling; none of it shows."""
    expected = texts(llm.generate([PROMPT, PROMPT[:6]], params(1, n=5, max_tokens=20)))
    with LLM(run_config(path, store_root, pipeline=2, max_model_len=52)) as big:
        rank = big.plan.ranks[0]
        block_bytes = rank.kv_bytes // rank.num_kv_blocks
    config = run_config(path, store_root, pipeline=2, max_model_len=52, kv_memory=18 * block_bytes)
    with LLM(config) as small:
        assert texts(small.generate([PROMPT, PROMPT[:6]], params(1, n=5, max_tokens=20))) == expected
        assert small.stats.num_preemptions > 0
        small.integrity()
        assert small.stats.num_free_kv_blocks == small.stats.num_kv_blocks


def test_best_of_keeps_the_likeliest(llm: LLM) -> None:
    whole = llm.generate([PROMPT], params(2, n=5, logprobs=0))[0].outputs
    mean = [
        sum(entry[token].logprob for token, entry in zip(a.token_ids, a.logprobs or [], strict=True)) for a in whole
    ]
    ranked = [whole[at].token_ids for at in sorted(range(5), key=lambda at: -mean[at])]
    best = llm.generate([PROMPT], params(2, n=2, best_of=5))[0].outputs
    assert [answer.token_ids for answer in best] == ranked[:2]
    assert [answer.cumulative_logprob for answer in best] == pytest.approx(sorted(mean, reverse=True)[:2])


# ---- the prompt's log-probabilities


@pytest.mark.parametrize("max_requests", [1, 6])
def test_prompt_logprobs_are_transformers(
    path: Path, store_root: Path, reference: Callable[[list[int]], torch.Tensor], max_requests: int
) -> None:
    """In chunks (21 tokens in micro-batches of 16), and in slices of as many rows as the plan has memory for."""
    with LLM(run_config(path, store_root, max_requests=max_requests)) as llm:
        options = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=3)
        outputs = llm.generate([PROMPT, [9], PROMPT[5:12]], [options, options, SamplingParams(max_tokens=2)])
        assert outputs[1].prompt_logprobs == [None]
        assert outputs[2].prompt_logprobs is None
        found, expected = outputs[0].prompt_logprobs, reference(PROMPT)
        assert found is not None
        assert len(found) == len(PROMPT)
        assert found[0] is None
        for at, entry in enumerate(found[1:], 1):
            assert entry is not None
            own, *top = entry.items()
            assert own[0] == PROMPT[at]
            assert own[1].logprob == pytest.approx(float(expected[at - 1, PROMPT[at]]), abs=1e-4)
            values, ids = expected[at - 1].topk(3)
            likeliest = dict(zip(ids.tolist(), values.tolist(), strict=True))
            assert {token: e.logprob for token, e in entry.items() if token in likeliest} == pytest.approx(
                likeliest, abs=1e-4
            )
            assert len(top) == 3 - (PROMPT[at] in likeliest)


# ---- options that act on tokens


def test_a_prompt_is_scored_some_rows_at_a_time_even_for_one_request(
    path: Path, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """max_requests rows went through the head at a time: with 1, a call for each token of the prompt."""
    sizes: list[int] = []
    finish = StageModel.finish

    def counted(self: StageModel, call: LayerCalls, rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return finish(self, call, rows)

    monkeypatch.setattr(StageModel, "finish", counted)
    with LLM(run_config(path, store_root, max_requests=1)) as one:
        (output,) = one.generate([PROMPT], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    assert sorted(sizes, reverse=True)[:2] == [16, 4]  # 21 tokens: 20 are scored, in micro-batches of 16
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 21


def test_min_tokens_puts_the_end_off(llm: LLM) -> None:
    whole = (
        llm.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))[0].outputs[0].token_ids
    )
    stop = whole[1]
    early = llm.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[stop]))[0].outputs[0]
    late = llm.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[stop], min_tokens=6))[
        0
    ].outputs[0]
    assert early.token_ids == whole[: whole.index(stop) + 1]
    assert stop not in late.token_ids[:6]
    assert len(late.token_ids) > 6


def test_penalties_bias_and_bad_words_change_the_text_as_they_say(path: Path, store_root: Path, tmp_path: Path) -> None:
    """Greedy, so that each shows alone. Word `w7` is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    worded = tmp_path / "model"
    shutil.copytree(path, worded)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w2").save_pretrained(worded)

    def greedy(llm: LLM, **options: Any) -> list[int]:
        greedy_params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, **options)
        return llm.generate([PROMPT], greedy_params)[0].outputs[0].token_ids

    with LLM(run_config(worded, store_root)) as llm:
        plain = greedy(llm)
        assert greedy(llm, logit_bias={77: 100.0}) == [77] * 16
        assert greedy(llm, logit_bias={plain[0]: -100.0})[0] != plain[0]
        unlike = greedy(llm, logit_bias={77: 20.0}, frequency_penalty=2.0)
        assert unlike.count(77) < 16
        assert unlike[0] == 77
        assert len(set(greedy(llm, repetition_penalty=100.0)) & set(PROMPT)) <= len(set(plain) & set(PROMPT))
        pair = f"w{plain[2]} w{plain[3]}"
        without = greedy(llm, bad_words=[pair])
        assert without[:3] == plain[:3]
        assert without[3] != plain[3]
        assert plain[0] not in greedy(llm, bad_words=f"w{plain[0]}")


def test_ids_outside_the_vocabulary_and_words_without_a_tokenizer_are_refused(llm: LLM) -> None:
    for options, message in (
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias token ids must be whole numbers in"),
        ({"bad_words": ["x"]}, "bad_words need a tokenizer"),
        ({"stop": ["x"]}, "stop strings need a tokenizer"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            llm.generate([PROMPT], SamplingParams(**options))  # type: ignore[arg-type]


def test_the_run_section_knows_every_option() -> None:
    """An option that can be given in Python and not in a run file would be missing in the batch job.

    A grammar is none: it is a text of its own kind, which Python and the endpoint have. Special tokens are kept where
    somebody parses the text: by the endpoint.
    """
    import inspect

    from dist_infer.generate_config import GenerateConfig

    options = set(inspect.signature(SamplingParams).parameters) - {"grammar", "kept_special_token_ids"}
    assert options <= set(GenerateConfig.model_fields)
    given: dict[str, Any] = {
        **ALL_OPTIONS,
        "max_tokens": 9,
        "stop": ["x"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logprobs": 2,
        "bad_words": ["y"],
        "n": 2,
        "best_of": 3,
        "prompt_logprobs": 1,
        "seed": 4,
    }
    assert set(given) == options
    section = GenerateConfig(kind="generate", prompts=["a"], **given)
    assert section.sampling_params() == SamplingParams(**given)
