"""Where each constrained answer is in its grammar, and what may come next; on tp_rank 0 of the last stage alone.

A mask depends on the answer's tokens alone, so it is begun as soon as the last of them is drawn, on threads of its own,
and is there when the next step has come through the layers:

    step n:  layers ── wait for masks ── draw ── take_in ─┐      step n + 1:  layers ── wait for masks ── draw
                                                          └──> masks of n + 1 ────────^

State is a function of grammar and tokens: after a preemption it is made again from the tokens that come with `new`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from dist_infer.grammar import Grammar
from dist_infer.grammar_matcher import GrammarTokens, Matcher
from dist_infer.messages import GrammarSpec, SampledToken, StepPlan
from dist_infer.vocabulary import Vocabulary
from partition.errors import ConfigError

_NUM_THREADS = 2
_NUM_COMPILED = 32  # grammars kept for the next request that has the same; each has at most some MB
_WAIT_S = 20.0  # for one mask; the matcher's own limits come long before


@dataclass
class _Answer:
    """`tokens`: the answer's, as far as `matcher` has them. `mask` is being made in another thread, with `matcher`."""

    spec: GrammarSpec
    tokens: list[int]
    matcher: Matcher | None = None
    mask: Future[bytes] | None = None
    ending: bool = field(default=False)  # the last token that was drawn is not in the matcher: it says "end"
    error: str | None = None


class GrammarMasks:
    """Changed only by `apply` and `take_in`, in the thread of the rank. False when there is nothing to do."""

    def __init__(self) -> None:
        self._answers: dict[str, _Answer] = {}
        self._tokens: Future[GrammarTokens] | None = None
        self._compiled: OrderedDict[Grammar, Future[Matcher]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def __bool__(self) -> bool:
        return bool(self._answers)

    def apply(self, plan: StepPlan) -> None:
        """Finished first, then new, then diffs."""
        if plan.vocabulary is not None:
            self._learn(plan.vocabulary)
        for request_id in plan.finished:
            self._answers.pop(request_id, None)
        for new in plan.new:
            if (spec := new.sampling.grammar) is not None:
                outputs = list(new.token_ids[len(new.token_ids) - new.num_output_tokens :])
                answer = self._answers[new.request_id] = _Answer(spec, outputs)
                self._begin(answer)
        if self._answers:
            for diff in plan.diffs:
                known = self._answers.get(diff.request_id)
                if known is not None and known.ending and diff.new_token_ids:
                    known.ending = False  # it did not end the answer after all (min_tokens)
                    self._advance(known, diff.new_token_ids[-1])

    def of(self, request_ids: Sequence[str]) -> list[bytes | None]:
        """The masks, waited for; None: no grammar, or it has failed, which `take_in` tells."""
        return [self._mask(answer) if (answer := self._answers.get(name)) else None for name in request_ids]

    def take_in(self, tokens: Sequence[SampledToken]) -> list[SampledToken]:
        """What was drawn with the masks: the same tokens, with what the grammars have to say about them."""
        return [self._taken_in(token) for token in tokens]

    def close(self) -> None:
        """Idempotent; does not wait for a mask that is being made."""
        self._answers.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _learn(self, vocabulary: Vocabulary) -> None:
        self._pool = self._pool or _new_pool()
        self._compiled.clear()
        self._tokens = self._pool.submit(GrammarTokens, vocabulary)

    def _begin(self, answer: _Answer) -> None:
        if self._pool is None or self._tokens is None:
            raise RuntimeError("a request with a grammar, and no step has brought the vocabulary")
        grammar, tokens = answer.spec.grammar, self._tokens
        if grammar not in self._compiled:
            # threads take work in order: whoever waits for one of these waits for what has been begun
            self._compiled[grammar] = self._pool.submit(lambda: Matcher(grammar, tokens.result()))
            if len(self._compiled) > _NUM_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        answer.mask = self._pool.submit(_first_mask, answer, self._compiled[grammar])

    def _mask(self, answer: _Answer) -> bytes | None:
        if answer.error is not None or answer.mask is None:
            return None
        try:
            mask = answer.mask.result(_WAIT_S)
        except ConfigError as error:
            answer.error = str(error)
        except TimeoutError:
            answer.error = f"the grammar cannot be used: its mask took longer than {_WAIT_S:g} s"
            self._pool = _new_pool()  # the others' masks are not begun behind it
        else:
            if any(mask):
                return mask
            answer.error = "the grammar cannot be used: nothing that this model can write goes on here"
        return None

    def _taken_in(self, token: SampledToken) -> SampledToken:
        answer = self._answers.get(token.request_id)
        if answer is None or token.error is not None:
            return token
        completes = False
        if answer.error is None and answer.matcher is not None:
            if token.token_id in answer.spec.end_ids and answer.matcher.may_end:
                answer.ending = True
                return token
            completes = self._advance(answer, token.token_id)
        if answer.error is not None:
            return SampledToken(token.request_id, 0, error=answer.error)
        return replace(token, completes=True) if completes else token

    def _advance(self, answer: _Answer, token_id: int) -> bool:
        """Whether the answer is whole and nothing can follow.

        The matcher is this thread's between a mask that was waited for and the next: what is asked of it is asked
        before that is begun.
        """
        if self._pool is None or answer.matcher is None:
            raise RuntimeError("an answer goes on that was not begun")
        try:
            answer.matcher.consume([token_id])
        except ConfigError as error:
            answer.error = str(error)
            return False
        answer.tokens.append(token_id)
        if answer.matcher.must_end:
            return True
        answer.mask = self._pool.submit(_next_mask, answer.matcher, answer.spec.end_ids)
        return False


def _new_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="dist-infer-grammar")


def _first_mask(answer: _Answer, compiled: Future[Matcher]) -> bytes:
    matcher = compiled.result().copy()
    matcher.consume(answer.tokens)
    answer.matcher = matcher
    return _next_mask(matcher, answer.spec.end_ids)


def _next_mask(matcher: Matcher, end_ids: Sequence[int]) -> bytes:
    """What the grammar allows, and what ends the answer if it may end."""
    mask = matcher.mask()
    if not (end_ids and matcher.may_end):
        return mask
    bits = bytearray(mask)
    for token_id in end_ids:
        bits[token_id // 8] |= 1 << token_id % 8
    return bytes(bits)
