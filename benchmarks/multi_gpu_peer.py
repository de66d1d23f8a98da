"""vLLM's own `nccl` weight transfer between two GPUs: the peer of `multi_gpu.py broadcast`.

    python benchmarks/multi_gpu_peer.py --shape qwen2.5-7b --json p7.json

The trainer is a dict of HF tensors on GPU 0: nothing to gather, nothing to rename, the best case for the peer. Measured
end to end through vLLM's public calls, packed and unpacked, from start_weight_update to finish_weight_update.
`--simulate` has no NCCL: it runs the rest, and the tensors that the worker has mapped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_engine import config_folder, engine_options, greedy
from multi_gpu_links import measure_broadcast
from multi_gpu_places import children_see, settle
from refit_gpu_peers import PACKED_BYTES, Peers
from shapes import SHAPES, make_config

from mbridge import AutoBridge
from mbridge_rl.transports._process_group import serve

BUCKET_BYTES = 1 << 30


class NcclPeer(Peers):
    def __init__(self, args: argparse.Namespace) -> None:
        settle(args.trainer_gpu, simulate=args.simulate)
        super().__init__(args)
        self.result["kind"] = "peer"
        self.sender = ThreadPoolExecutor(1)  # vLLM's calls block until all has come: they are made beside the sending

    def boot(self) -> None:
        from vllm import LLM

        args = self.args
        generator = torch.Generator(self.device).manual_seed(1)
        self.tensors = {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device).normal_(
                0.0, 0.02, generator=generator
            )
            for spec in AutoBridge.from_config(SHAPES[args.shape]).hf_tensors()
        }
        self.num_bytes = sum(t.nbytes for t in self.tensors.values())
        with children_see(args.engine_gpu, simulate=args.simulate):
            self.llm = LLM(
                model=str(make_config(args.shape, config_folder())),
                weight_transfer_config={"backend": "nccl"},
                worker_extension_cls="gpu_engine.Probe",
                **engine_options(args.shape),
            )
        self.result["num_tensors"] = len(self.tensors)
        self.result["tokens_before"] = greedy(self.llm)
        self.say("boot")

    def measure_all(self) -> None:
        gpus = ("", "") if self.args.simulate else (self.args.trainer_gpu, self.args.engine_gpu)
        if self.has_gpu:
            self.measure("vLLM nccl packed", lambda: self.nccl(packed=True), before=self.meet)
            self.args.repeat = self.args.repeat_unpacked
            if self.args.repeat:
                self.measure("vLLM nccl unpacked", lambda: self.nccl(packed=False))
        else:
            self.measure("load_weights, mapped", self.load_mapped, before=self.map)
        self.result["raw"] = measure_broadcast(gpus, self.num_bytes, BUCKET_BYTES)

    def meet(self) -> None:
        """Worker and trainer join vLLM's own group."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        place = {"master_address": "127.0.0.1", "master_port": _free_port(), "world_size": 2}
        with self.beside(self.llm.init_weight_transfer_engine, {"init_info": place | {"rank_offset": 1}}):
            self.group = NCCLWeightTransferEngine.trainer_init(place)

    def nccl(self, *, packed: bool) -> dict[str, float]:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        size = max(PACKED_BYTES, *(tensor.nbytes for tensor in self.tensors.values()))
        update: dict[str, Any] = {
            "names": list(self.tensors),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()],
            "shapes": [list(tensor.shape) for tensor in self.tensors.values()],
            "packed": packed,
            "packed_buffer_size_bytes": size,
        }
        start = time.perf_counter()
        self.llm.start_weight_update()
        started = time.perf_counter()
        with self.beside(self.llm.update_weights, {"update_info": update}):
            NCCLWeightTransferEngine.trainer_send_weights(
                iter(self.tensors.items()), {"group": self.group, "packed": packed, "packed_buffer_size_bytes": size}
            )
        sent = time.perf_counter()
        self.llm.finish_weight_update()
        return {"start": started - start, "update": sent - started, "finish": time.perf_counter() - sent}

    @contextmanager
    def beside(self, call: Any, argument: Any) -> Iterator[None]:
        """Make vLLM's blocking call in a thread while the trainer's side runs inside; both end here."""
        made = self.sender.submit(call, argument)
        yield
        made.result(timeout=120)


def _free_port() -> int:
    return int(serve("127.0.0.1", 10.0).port)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--trainer-gpu", default="0")
    parser.add_argument("--engine-gpu", default="1")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--repeat-unpacked", type=int, default=2, help="0: leave it out")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--json", type=Path)
    NcclPeer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
