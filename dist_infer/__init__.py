"""dist-infer: distributed inference for models that do not fit.

    from dist_infer import LLM, SamplingParams

    with LLM("run.yaml") as llm:
        for output in llm.generate(["Hello"], SamplingParams(max_tokens=32, temperature=0)):
            print(output.outputs[0].text)

Importing this package loads neither torch nor ray; the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_infer import errors as errors
    from dist_infer.config import RunConfig, load_config
    from dist_infer.grammar import Grammar
    from dist_infer.llm import LLM
    from dist_infer.outputs import CompletionOutput, Failed, Finished, RequestOutput, TokenEvent
    from dist_infer.sampling_params import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "dist_infer.llm",
    "SamplingParams": "dist_infer.sampling_params",
    "Grammar": "dist_infer.grammar",
    "RunConfig": "dist_infer.config",
    "load_config": "dist_infer.config",
    "RequestOutput": "dist_infer.outputs",
    "CompletionOutput": "dist_infer.outputs",
    "TokenEvent": "dist_infer.outputs",
    "Finished": "dist_infer.outputs",
    "Failed": "dist_infer.outputs",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "Failed",
    "Finished",
    "Grammar",
    "RequestOutput",
    "RunConfig",
    "SamplingParams",
    "TokenEvent",
    "__version__",
    "errors",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("dist_infer.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dist_infer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
