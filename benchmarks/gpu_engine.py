"""The vLLM of the GPU benchmarks: its options, what it generates, and what its worker tells (`Probe`)."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES

PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9] * 6, [11] * 70]
GIB = 1 << 30


def engine_options(shape: str, *, graphs: bool = False, quantization: str | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for dummy weights of a shape, beside a trainer on the same GPU."""
    options: dict[str, Any] = {
        "skip_tokenizer_init": True, "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 1024,
        "max_num_batched_tokens": 1024, "max_num_seqs": 8, "enforce_eager": not graphs, "seed": 0,
    }  # fmt: skip
    if quantization:
        options["quantization"] = quantization
    if not torch.cuda.is_available():
        return options | {"gpu_memory_utilization": 0.3, "block_size": 32}
    # vLLM wants the share of the GPU free when it starts; what it takes for its cache is said in bytes.
    options |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": GIB}
    if "kv_lora_rank" not in SHAPES[shape]:  # latent attention has backends of its own
        options["attention_config"] = {"backend": "FLASH_ATTN"}
    if graphs:  # no torch.compile: its minutes would measure nothing
        options["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
        }
    return options


def greedy(llm: Any, prompts: list[list[int]] | None = None, num_tokens: int = 16) -> list[list[int]]:
    """Greedy tokens for each prompt, one request at a time, so that no answer depends on a neighbour."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    outputs = [llm.generate({"prompt_token_ids": p}, params, use_tqdm=False)[0] for p in prompts or PROMPTS]
    return [list(output.outputs[0].token_ids) for output in outputs]


def shut_down(llm: Any) -> None:
    """End the engine's processes, so that the next case finds the GPU empty."""
    llm.llm_engine.engine_core.shutdown(timeout=20.0)


def config_folder() -> Path:
    return Path("runs/configs")


class Probe:
    """Methods for vLLM's worker (`worker_extension_cls`): memory, CUDA graphs, and the peers' ways of loading."""

    model_runner: Any  # vLLM's worker has both
    device: torch.device
    _mapped: list[tuple[str, torch.Tensor]]

    def probe_memory(self) -> dict[str, int]:
        """Bytes that this worker's allocator has handed out, and holds."""
        if self.device.type != "cuda":
            return {"allocated": 0, "reserved": 0}
        return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}

    def probe_num_graphs(self) -> int:
        """CUDA graphs captured so far."""
        from vllm.compilation.counter import compilation_counter

        return int(compilation_counter.num_cudagraph_captured)

    def probe_map(self, shared: bytes) -> int:
        """Map the trainer's tensors and hold them. Returns their number."""
        self._mapped = [(name, rebuild(*args)) for name, rebuild, args in pickle.loads(shared)]  # noqa: S301  the benchmark's own
        return len(self._mapped)

    def probe_unmap(self) -> None:
        self._mapped = []

    def probe_load_mapped(self) -> dict[str, float]:
        """vLLM's `load_weights` in its reload protocol, from tensors that are mapped already. Seconds of each part."""
        seconds = {"begin": self.probe_begin()}
        start = time.perf_counter()
        self._model.load_weights(iter(self._mapped))
        seconds["load"] = self._since(start)
        return seconds | {"finish": self.probe_finish()}

    def probe_begin(self) -> float:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        start = time.perf_counter()
        initialize_layerwise_reload(self._model)
        return self._since(start)

    def probe_finish(self) -> float:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        start = time.perf_counter()
        with set_current_vllm_config(self.model_runner.vllm_config):
            finalize_layerwise_reload(self._model, self.model_runner.model_config)
        return self._since(start)

    def probe_load_bucket(self, bucket: bytes) -> None:
        """One flat bucket, as SGLang's and slime's flattened buckets: map, cut into views, load."""
        rebuild, args, parts = pickle.loads(bucket)  # noqa: S301  the benchmark's own
        flat = rebuild(*args)
        views = [(name, flat[start:stop].view(dtype).view(shape)) for name, dtype, shape, start, stop in parts]
        self._model.load_weights(iter(views))
        self._since(0.0)

    @property
    def _model(self) -> Any:
        return self.model_runner.get_model()

    def _since(self, start: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
