"""The run file's `run` section with `kind: generate`: which prompts, sampled how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_infer.config_types import Count, LogitBias, Section
from dist_infer.prompt_config import Prompt
from dist_infer.sampling_params import SamplingParams


class GenerateConfig(Section):
    """Answer the prompts of the file, print the answers as they come, then a table; exit."""

    kind: Literal["generate"]
    prompts: list[Prompt] = Field(
        default=[],
        min_length=1,
        description="Texts, lists of {role, content} messages, or {messages, tools, documents}. This or prompts_file.",
    )
    prompts_file: str | None = Field(
        None,
        min_length=1,
        description="A JSONL file instead: each line is {prompt: text} or {messages, tools, documents}. A relative "
        "path is taken from the run file's directory.",
    )
    chat: bool = Field(True, description="Put a text into the model's chat template as a user message; false: as is.")
    system: str | None = Field(None, description="System message put before every chat prompt that is a text.")
    max_tokens: Count = Field(64, description="Longest answer, in tokens.")
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Field(0.0, description="0 is greedy.")
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="Sample among the k likeliest; 0: all.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Sample among the likeliest that sum to p.")
    seed: int | None = Field(None, description="Same seed, same text. Without it each run draws its own.")
    stop: list[str] = Field(default=[], description="Texts that end an answer (and are not part of it).")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="With --json: log-probabilities of the chosen token and of the n likeliest."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Drop tokens less likely than min_p times the likeliest; 0: off."
    )
    typical_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample among the tokens whose surprise is nearest to the expected one and that sum to p."
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = Field(
        1.0, description="Above 1 makes tokens of prompt and answer less likely; 1: off."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(
        0.0, description="Taken off the logits of tokens that are in the answer."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(
        0.0, description="Taken off the logits of tokens in the answer, once for each time."
    )
    logit_bias: LogitBias = Field(default={}, description="Token ids, and what is added to their logits: -100 to 100.")
    bad_words: list[str] = Field(default=[], description="Texts that no answer contains.")
    stop_token_ids: list[int] = Field(default=[], description="Token ids that end an answer.")
    ignore_eos: bool = Field(False, description="Go on after the end-of-sequence token.")
    min_tokens: Annotated[int, Field(ge=0)] = Field(0, description="Tokens before anything but max_tokens may end it.")
    n: Annotated[int, Field(ge=1, le=128)] = Field(1, description="Answers to each prompt; they share its computation.")
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(
        None, description="Compute so many answers, give the n likeliest per token."
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="With --json: log-probabilities of the prompt's tokens and of the n likeliest."
    )

    @model_validator(mode="after")
    def _has_prompts(self) -> GenerateConfig:
        if bool(self.prompts) == (self.prompts_file is not None):
            raise ValueError("give run.prompts or run.prompts_file, one of the two")
        return self

    @model_validator(mode="after")
    def _system_needs_chat(self) -> GenerateConfig:
        if self.system is not None and not self.chat:
            raise ValueError("run.system needs run.chat: true")
        return self

    @model_validator(mode="after")
    def _can_be_sampled(self) -> GenerateConfig:
        self.sampling_params()  # checks what a field alone cannot; better now than when all is loaded
        return self

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            bad_words=self.bad_words,
            min_tokens=self.min_tokens,
            n=self.n,
            best_of=self.best_of,
            prompt_logprobs=self.prompt_logprobs,
        )
