"""vLLM's own ways to new weights, called inside its worker: the peers of benchmarks/refit.py in the same run.

`worker_extension_cls="refit_peer.Peer"` adds these methods to vLLM's worker.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


class Peer:
    model_runner: Any  # vLLM's worker has it
    _held: dict[str, Any]

    def peer_hold(self, folder: str) -> int:
        """Read a checkpoint into this worker's memory. Returns bytes."""
        self._held = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            self._held |= {name: tensor.clone() for name, tensor in load_file(file).items()}
        return sum(tensor.nbytes for tensor in self._held.values())

    def peer_release(self) -> None:
        self._held = {}

    def peer_from_memory(self) -> float:
        """vLLM's `load_weights` with its reload protocol, from tensors that are already here. Seconds."""
        start = time.perf_counter()
        self.model_runner.reload_weights(weights_iterator=iter(self._held.items()))
        return time.perf_counter() - start

    def peer_from_disk(self, folder: str) -> float:
        """vLLM's reload of a checkpoint on disk (in the page cache after the first time). Seconds."""
        start = time.perf_counter()
        self.model_runner.reload_weights(weights_path=folder)
        return time.perf_counter() - start
