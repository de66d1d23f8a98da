"""One case of the benchmark on several GPUs: refits of live vLLMs from a Megatron trainer on the same or other GPUs.

    python benchmarks/multi_gpu.py broadcast --shape qwen2.5-7b --json b7.json
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/multi_gpu.py colocated --json c7.json

broadcast: trainer on GPU 0, vLLM on GPU 1, NCCL between them. Beside it, a raw broadcast of the same bytes.
colocated: trainer TP2 and vLLM TP2 over the same two GPUs, direct and bucket path. Beside it, copies over the link.
stages: the same from a trainer of two pipeline stages: half of what each worker reads lies on the other GPU.
reshard: trainer TP2 over both GPUs, vLLM TP1 on the second: gathered and broadcast.

Options change any of it, for other machines: --tp 2 --pp 2 --trainer-gpus 0,1,2,3 --engine-gpus "4,5;6,7" has two
engines of two GPUs each. NCCL takes no two processes of one group on one GPU, so a worker cannot share the GPU of a
rank that broadcasts. Needs no checkpoint; the JSON is written anew after each stage. Times are wall seconds around
`sync()` on rank 0, medians. `--simulate` hides the GPUs: gloo for NCCL, small shapes, the same stages.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from gpu_engine import config_folder, engine_options, greedy, shut_down
from gpu_trainer import bridge_of, fill
from measure import about
from multi_gpu_links import measure_broadcast, measure_copies
from multi_gpu_places import children_see, settle
from refit_gpu import DEADLINE_S, Case
from shapes import SHAPES, make_config

from mbridge import init_parallel
from mbridge.plan import TrainerPlan
from mbridge_rl import WeightSyncer
from mbridge_rl.engines.vllm import start_llm
from mbridge_rl.transports.base import COLLECTIVE

KINDS: dict[str, dict[str, Any]] = {
    "broadcast": {"trainer_gpus": "0", "engine_gpus": "1", "paths": COLLECTIVE},
    "colocated": {"tp": 2, "trainer_gpus": "0,1", "engine_gpus": "0,1", "paths": "direct,bucket"},
    "stages": {"pp": 2, "trainer_gpus": "0,1", "engine_gpus": "0,1", "paths": "direct,bucket"},
    "reshard": {"tp": 2, "trainer_gpus": "0,1", "engine_gpus": "1", "paths": COLLECTIVE},
}
TURN_LIMIT_S = 1200.0  # ranks wait for rank 0, which waits for its turn to measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    for name in ("tp", "pp", "ep"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--etp", type=int, help="default: 1 if --ep is more than 1, else --tp")
    parser.add_argument("--trainer-gpus", help="of all ranks: a,b")
    parser.add_argument("--engine-gpus", help="of each engine: a,b;c,d")
    parser.add_argument("--paths", help="one or several of collective, direct, bucket, auto: a,b")
    parser.add_argument("--bucket-mib", type=int, help="default: chosen by the syncer")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    parser.add_argument("--simulate", action="store_true", help="gloo on the CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name, value in {"tp": 1, "pp": 1, "ep": 1, **KINDS[args.kind]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    MultiGpuCase(args).run()


class MultiGpuCase(Case):
    """A case of refit_gpu.py with trainers and engines on GPUs of their own, or on each other's."""

    def __init__(self, args: argparse.Namespace) -> None:
        # refit_gpu.py's options that have one value here
        args.engine, args.quantization, args.keep, args.soak = "eager", None, False, 0
        self.args, self.started = args, time.perf_counter()
        self.engines = [gpus.split(",") for gpus in args.engine_gpus.split(";")]
        settle(args.trainer_gpus, simulate=args.simulate)
        args.etp = args.etp or (1 if args.ep > 1 else args.tp)
        init_parallel(
            tp=args.tp,
            pp=args.pp,
            ep=args.ep,
            etp=args.etp,
            backend=None if args.simulate else "cpu:gloo,cuda:nccl",
            timeout_s=TURN_LIMIT_S,
        )
        if torch.cuda.is_available():
            torch.empty(1, device="cuda")  # what this process sees is settled
        self.rank = dist.get_rank()
        self.num_bytes, self.limit = 0, 0.0
        self.llms: list[Any] = []
        self.result: dict[str, Any] = {
            **about(), "kind": args.kind, "shape": args.shape, "engine": "eager", "quantization": None,
            "simulated": args.simulate, "nccl": _nccl_version(),
            "trainer": {"ranks": dist.get_world_size(), "tp": args.tp, "pp": args.pp, "ep": args.ep, "etp": args.etp,
                        "gpus": args.trainer_gpus},
            "engines": self.engines, "rows": [], "paths": {}, "tokens": {}, "memory": {}, "seconds": {}, "errors": {},
        }  # fmt: skip

    def boot(self) -> None:
        """The engines start, one after the other, while this process builds the trainer's model."""
        args = self.args
        folder = make_config(args.shape, config_folder())
        self.bridge = bridge_of(args.shape)
        if self.rank:
            self.bridge.get_model()
        else:
            import vllm  # noqa: F401  here, not in the thread: two imports at once can meet half-made modules

            self.thread = ThreadPoolExecutor(1)  # kept: the engine's process may be tied to the thread that made it
            coming = [self.thread.submit(self.start, str(folder), gpus) for gpus in self.engines]
            try:
                self.bridge.get_model()
            finally:
                self.llms = [future.result() for future in coming]
            self.llm = self.llms[0]
        fill(self.bridge, 1)

    def start(self, folder: str, gpus: list[str]) -> Any:
        options = engine_options(self.args.shape)
        if len(gpus) > 1:
            options |= {"tensor_parallel_size": len(gpus), "disable_custom_all_reduce": True}
        with children_see(",".join(gpus), simulate=self.args.simulate):
            return start_llm(folder, worker_extension_cls="gpu_engine.Probe", **options)

    def connect(self, path: str) -> None:
        way: dict[str, Any] = {"transport": COLLECTIVE} if path == COLLECTIVE else {"path": path}
        if self.args.bucket_mib:
            way["bucket_bytes"] = self.args.bucket_mib << 20
        self.mark(f"{path}: before")
        start = time.perf_counter()
        self.syncer = WeightSyncer(self.bridge, self.llms, deadline_s=DEADLINE_S, **way)
        connect_s = time.perf_counter() - start
        self.result["paths"][path] = {"connect_s": connect_s, "bucket_bytes": self.syncer.layout.bucket_bytes}
        self.mark(f"{path}: connected")
        owned = owned_bytes(self.bridge.plan(self.bridge.models))
        everyone: list[Any] = [0] * dist.get_world_size()
        dist.all_gather_object(everyone, owned)
        self.result["owned_bytes"] = everyone

    def refit(self, path: str) -> None:
        super().refit(path)
        if self.rank == 0:
            self.compare(path)

    def compare(self, path: str) -> None:
        """With what the link between the GPUs can do, measured now."""
        found = self.result["paths"][path]
        wall, stream = median(found["wall_s"]), found["phases_s"]["stream"]
        gpus = (self.args.trainer_gpus.split(",")[0], self.engines[0][-1])
        gpus = ("", "") if self.args.simulate else gpus
        if path == COLLECTIVE:
            raw = self.result["raw"] = measure_broadcast(gpus, self.num_bytes, self.syncer.layout.bucket_bytes)
            found["share_of_raw"] = raw["best_s"] / wall
            found["stream_share_of_raw"] = raw["best_s"] / stream
            print(f"{path}: {wall:.4f} s, stream {stream:.4f} s, raw {raw['best_s']:.4f} s", flush=True)
            return
        if "link_gb_s" not in self.result:
            self.result["link_gb_s"] = measure_copies([gpu for gpu in gpus if gpu])
        link, owned, num_workers = self.result["link_gb_s"], self.result["owned_bytes"], len(self.engines[0])
        print(f"{path}: {wall:.4f} s, copies GB/s {link}", flush=True)
        if self.args.kind == "stages" and "both at once, each" in link and len(owned) == num_workers:
            # A worker reads its share of each stage; that of its own GPU lies there.
            crossing = max(sum(owned) - own for own in owned) / num_workers
            found["crossing_bytes"] = crossing
            found["crossing_limit_s"] = crossing / 1e9 / link["both at once, each"]

    def tokens(self, path: str) -> None:
        super().tokens(path)
        others = [greedy(llm) for llm in self.llms[1:]]
        if others:
            first = self.result["tokens"][path]
            self.result["paths"][path]["engines_with_the_same_tokens"] = 1 + sum(tokens == first for tokens in others)

    def measure(self, booted: bool) -> None:
        super().measure(booted)
        for llm in self.llms[1:]:
            shut_down(llm)


def owned_bytes(plan: TrainerPlan) -> int:
    """Of the HF tensors that this rank owns."""
    widths = {spec.name: spec.dtype.itemsize for spec in plan.tensors}
    return sum(piece.box.numel * widths[piece.hf_name] for piece in plan.owned)


def _nccl_version() -> str | None:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
