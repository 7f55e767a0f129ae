"""llama.cpp through its C API (llama-cpp-python): one llama_decode a step, greedy, all sequences in one batch.

setting: "mmap" maps the file, "ram" reads it into memory; with "-repack" weights are also rearranged for the vector
units, which takes memory of its own.
"""

from __future__ import annotations

import ctypes

import llama_cpp as llama
import numpy as np
from recorder import Recorder


@llama.llama_log_callback
def _quiet(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Only the result goes to stdout, and errors are raised."""


class Decoder:
    """A context for `batch` sequences."""

    def __init__(self, recorder: Recorder) -> None:
        job = recorder.job
        place, _, repack = job.setting.partition("-")
        model_parameters = llama.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        model_parameters.load_mode = {"mmap": llama.LLAMA_LOAD_MODE_MMAP, "ram": llama.LLAMA_LOAD_MODE_NONE}[place]
        model_parameters.use_extra_bufts = repack == "repack"
        self._model = llama.llama_model_load_from_file(job.model.encode(), model_parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {job.model}")
        parameters = llama.llama_context_default_params()
        each = -(-(job.prompt_tokens + job.new_tokens) // 256) * 256
        parameters.n_ctx = each * job.batch
        parameters.n_seq_max = job.batch
        parameters.n_batch = parameters.n_ubatch = max(512, job.batch * job.prompt_tokens)
        parameters.n_threads = parameters.n_threads_batch = job.threads
        parameters.kv_unified = False
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._vocab = job.vocab
        self._batch = llama.llama_batch_init(parameters.n_batch, 0, 1)

    def step(self, tokens: list[list[int]], start: int) -> list[int]:
        """Tokens of every sequence from position `start` on; the likeliest next token of each."""
        rows = []
        index = 0
        for sequence, mine in enumerate(tokens):
            for offset, token in enumerate(mine):
                last = offset == len(mine) - 1
                self._batch.token[index] = token
                self._batch.pos[index] = start + offset
                self._batch.n_seq_id[index] = 1
                self._batch.seq_id[index][0] = sequence
                self._batch.logits[index] = last
                if last:
                    rows.append(index)
                index += 1
        self._batch.n_tokens = index
        code = llama.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return [
            int(np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, row), (self._vocab,)).argmax())
            for row in rows
        ]


def main() -> None:
    recorder = Recorder()
    job = recorder.job
    llama.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    decoder = Decoder(recorder)
    recorder.loaded()
    prompts = job.prompts()
    answers: list[list[int]] = [[] for _ in prompts]
    tokens, position = prompts, 0
    for _ in range(job.new_tokens):
        chosen = decoder.step(tokens, position)
        position += len(tokens[0])
        for answer, token in zip(answers, chosen, strict=True):
            answer.append(token)
        recorder.tokens(sum(map(len, answers)))
        tokens = [[token] for token in chosen]
    info = llama.llama_print_system_info().decode().strip()
    recorder.finish(answers, ("llama-cpp-python",), {"mode": job.setting, "threads": job.threads, "system": info})


if __name__ == "__main__":
    main()
