"""A refit while vLLM generates, with `in_flight="keep"`: the requests go on, with the new weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gpu_engine import PROMPTS, greedy

LENGTH = 128
BEFORE = 32  # tokens of each request before the refit
LIMIT_S = 60.0


def refit_in_the_middle(llm: Any, refit: Callable[[], Any], old: list[list[int]]) -> dict[str, Any]:
    """Start requests, refit when each has BEFORE tokens, let them finish.

    `old` is what the weights before the refit answer. A request must begin as `old` does; what follows the refit must
    be what the new weights make of the tokens so far (to rounding: a prefill and a decode sum in other orders).
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, detokenize=False)
    engine, tokens, finished = llm.llm_engine, [[] for _ in PROMPTS], set()
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    limit = time.perf_counter() + LIMIT_S

    def step() -> None:
        if time.perf_counter() > limit:
            raise TimeoutError(f"no end after {LIMIT_S} s; {[len(t) for t in tokens]} tokens so far")
        for output in engine.step():
            number = int(output.request_id.split("-")[0])
            tokens[number] = list(output.outputs[0].token_ids)
            if output.finished:
                finished.add(number)

    while min(len(t) for t in tokens) < BEFORE:
        step()
    seen_before = [len(t) for t in tokens]
    start = time.perf_counter()
    report = refit()
    seconds = time.perf_counter() - start
    while len(finished) < len(PROMPTS):
        step()

    # The engine ran on between the last step and the pause: find where the new weights took over.
    took_over = [_first_difference(a, b) for a, b in zip(tokens, old, strict=True)]
    rest = [
        greedy(llm, [[*prompt, *t[: cut + 1]]], LENGTH - cut - 1)[0] if cut + 1 < LENGTH else []
        for prompt, t, cut in zip(PROMPTS, tokens, took_over, strict=True)
    ]
    return {
        "seconds": seconds,
        "total_s": report.total_s,
        "finished": len(finished),
        "lengths": [len(t) for t in tokens],
        "tokens_seen_before_refit": seen_before,
        "first_token_unlike_old_weights": took_over,
        "equal_to_new_weights_after": [
            _first_difference(t[cut + 1 :], new) for t, new, cut in zip(tokens, rest, took_over, strict=True)
        ],
        "tokens_after": [len(new) for new in rest],
    }


def _first_difference(a: list[int], b: list[int]) -> int:
    """Index of the first token that differs; the length if none does."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
