"""Other ways to bring the same tensors from one process into a live vLLM on the same GPU: the peers of refit_gpu.py.

    VLLM_ALLOW_INSECURE_SERIALIZATION=1 python benchmarks/refit_gpu_peers.py --shape qwen2.5-7b --json c.json

The trainer is a dict of HF tensors on the GPU: nothing to gather, nothing to rename, the best case for each peer.
Measured: vLLM's own `ipc` backend, packed and unpacked, through its public calls; flat buckets of 512 MB made by
torch.cat, one CUDA IPC handle each, as SGLang and slime send them, loaded inside vLLM's reload protocol; and vLLM's
`load_weights` in that protocol from tensors that its worker has mapped already. Medians of --repeat.
Without a GPU only the last two run, with the tensors in the message, as a dry run.
"""

from __future__ import annotations

import argparse
import base64
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_engine import config_folder, engine_options, greedy, shut_down
from measure import about, copy_limit, device_used_bytes, print_table, row, turn, write_json
from shapes import SHAPES, make_config
from torch.multiprocessing.reductions import reduce_tensor

from mbridge import AutoBridge

BUCKET_BYTES = 512 << 20
PACKED_BYTES = 1 << 30  # vLLM's default; more where one tensor is larger


class Peers:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.perf_counter()
        self.has_gpu = torch.cuda.is_available()
        self.device = "cuda" if self.has_gpu else "cpu"
        self.result: dict[str, Any] = {
            **about(), "shape": args.shape, "engine": "eager", "rows": [], "details": {}, "memory": {}, "errors": {},
        }  # fmt: skip

    def run(self) -> None:
        self.boot()
        with turn():
            self.limit = self.result["memcpy_gb_s"] = copy_limit()
            self.measure_all()
        self.write()
        print_table(self.result["rows"] or [{"what": "nothing ran"}])
        shut_down(self.llm)
        os._exit(0 if not self.result["errors"] else 1)

    def measure_all(self) -> None:
        ways: dict[str, Callable[[], Any]] = {
            "vLLM ipc packed": lambda: self.ipc(packed=True),
            "vLLM ipc unpacked": lambda: self.ipc(packed=False),
        }
        for what, way in (ways if self.has_gpu else {}).items():
            self.measure(what, way)
        self.measure("flattened buckets", self.flattened)
        self.measure("load_weights, mapped", self.load_mapped, before=self.map)

    def boot(self) -> None:
        from vllm import LLM

        generator = torch.Generator(self.device).manual_seed(1)
        self.tensors = {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device).normal_(
                0.0, 0.02, generator=generator
            )
            for spec in AutoBridge.from_config(SHAPES[self.args.shape]).hf_tensors()
        }
        self.num_bytes = sum(t.nbytes for t in self.tensors.values())
        self.llm = LLM(
            model=str(make_config(self.args.shape, config_folder())),
            weight_transfer_config={"backend": "ipc"},
            worker_extension_cls="gpu_engine.Probe",
            **engine_options(self.args.shape),
        )
        if self.has_gpu:
            self.llm.init_weight_transfer_engine({"init_info": {}})
        self.result["num_tensors"] = len(self.tensors)
        self.result["tokens_before"] = greedy(self.llm)
        self.say("boot")

    def measure(self, what: str, way: Callable[[], Any], *, before: Callable[[], Any] | None = None) -> None:
        """Median of the repeats after one warm-up; a way that fails leaves its error, and the next one is tried."""
        times, details = [], []
        try:
            if before is not None:
                start = time.perf_counter()
                before()
                self.result["details"][f"{what}: once"] = time.perf_counter() - start
            for _ in range(1 + self.args.repeat):
                start = time.perf_counter()
                details.append(way())
                times.append(time.perf_counter() - start)
        except Exception:  # noqa: BLE001  the other peers are measured all the same
            self.result["errors"][what] = traceback.format_exc()[-3000:]
            print(f"{what}:\n{traceback.format_exc()}", flush=True)
        if len(times) > 1:
            self.result["rows"].append(row(what, times[1:], self.num_bytes, self.limit))
            self.result["details"][what] = details[-1]
        self.result["memory"][what] = device_used_bytes()
        try:
            self.result.setdefault("tokens", {})[what] = greedy(self.llm)
        except Exception as error:  # noqa: BLE001
            self.result["errors"][f"{what}: tokens"] = str(error)
        self.say(what)

    def ipc(self, *, packed: bool) -> None:
        """vLLM's own backend and sender. The handles go as one pickle, as its HTTP sender does."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

        def send(info: Any) -> None:
            fields = {name: value for name, value in vars(info).items() if value is not None}
            handles = pickle.dumps(fields.pop("ipc_handles"))
            fields["ipc_handles_pickled"] = base64.b64encode(handles).decode()
            self.llm.update_weights({"update_info": fields})

        largest = max(tensor.nbytes for tensor in self.tensors.values())
        arguments = IPCTrainerSendWeightsArgs(
            send_mode=send, packed=packed, packed_buffer_size_bytes=max(PACKED_BYTES, largest)
        )
        self.llm.start_weight_update()
        IPCWeightTransferEngine.trainer_send_weights(iter(self.tensors.items()), arguments)
        self.llm.finish_weight_update()

    def flattened(self) -> dict[str, int]:
        num_buckets = 0
        self.llm.collective_rpc("probe_begin")
        for bucket in buckets(self.tensors):
            flat = torch.cat([tensor.view(-1).view(torch.uint8) for tensor in bucket.values()])
            if self.has_gpu:
                torch.cuda.synchronize()
            parts, start = [], 0
            for name, tensor in bucket.items():
                parts.append((name, tensor.dtype, tuple(tensor.shape), start, start + tensor.nbytes))
                start += tensor.nbytes
            rebuild, args = share(flat)
            self.llm.collective_rpc("probe_load_bucket", args=(pickle.dumps((rebuild, args, parts)),))
            num_buckets += 1
            del flat
            if self.has_gpu:
                torch.cuda.ipc_collect()
        self.llm.collective_rpc("probe_finish")
        return {"num_buckets": num_buckets}

    def map(self) -> None:
        shared = [(name, *share(tensor)) for name, tensor in self.tensors.items()]
        self.llm.collective_rpc("probe_map", args=(pickle.dumps(shared),))

    def load_mapped(self) -> dict[str, float]:
        return self.llm.collective_rpc("probe_load_mapped")[0]

    def say(self, stage: str) -> None:
        print(f"{time.perf_counter() - self.started:7.1f} s  {stage}", flush=True)
        self.write()

    def write(self) -> None:
        self.result["seconds"] = {"all": round(time.perf_counter() - self.started, 1)}
        write_json(self.result, self.args.json, quiet=True)


def buckets(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """In order, each as many tensors as fit into BUCKET_BYTES, at least one."""
    bucket: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors.items():
        if bucket and num_bytes + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = {}, 0
        bucket[name] = tensor
        num_bytes += tensor.nbytes
    yield bucket


def share(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """(function, arguments) that make the tensor again in another process; on the CPU they carry its bytes."""
    if tensor.device.type == "cuda":
        return reduce_tensor(tensor)
    return rebuild_cpu, (tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), tensor.dtype, tuple(tensor.shape))


def rebuild_cpu(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    Peers(parser.parse_args()).run()


if __name__ == "__main__":
    main()
