"""Refits a real vLLM from a TP=2 Megatron trainer, and vLLM's own ways to new weights beside it, in one run.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/refit.py --shape qwen2.5-0.5b --repeat 10

Prints a table and one line of JSON: seconds, phases, bytes, GB/s, and share of one memcpy of the same bytes on this
machine. Rows alternate round by round, so that a busy neighbour hits all of them; figures are medians.
Limit (issue "The main job"): mbridge at most 1.5x of vLLM's load_weights from tensors that its worker already holds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch.distributed as dist
from measure import copy_gb_s, print_table, row, write_json
from shapes import SHAPES, make_checkpoint

from mbridge import AutoBridge, destroy_parallel, init_parallel
from mbridge_rl import WeightSyncer
from mbridge_rl.engines.vllm import start_llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--bucket-mib", type=int, help="default: chosen by the syncer")
    parser.add_argument("--folder", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    init_parallel(tp=2)
    rank = dist.get_rank()
    path = make_checkpoint(args.shape, args.folder).resolve() if rank == 0 else (args.folder / args.shape).resolve()
    limit = copy_gb_s() if rank == 0 else 0.0
    dist.barrier()
    bridge = AutoBridge.from_pretrained(path)
    bridge.get_model(weight_path=path)
    llm = None
    if rank == 0:
        llm = start_llm(
            str(path),
            skip_tokenizer_init=True,
            max_model_len=256,
            enforce_eager=True,
            gpu_memory_utilization=0.4,
            worker_extension_cls="refit_peer.Peer",
        )
        llm.collective_rpc("peer_hold", args=(str(path),))

    start = time.perf_counter()
    bucket_bytes = args.bucket_mib * 2**20 if args.bucket_mib else None
    syncer = WeightSyncer(bridge, llm, bucket_bytes=bucket_bytes)
    connect_s = time.perf_counter() - start

    reports, memory_s, disk_s = [], [], []
    for _ in range(args.warm_up + args.repeat):
        reports.append(syncer.sync())
        if llm is not None:
            memory_s.append(_rpc_seconds(llm, "peer_from_memory"))
            disk_s.append(_rpc_seconds(llm, "peer_from_disk", str(path)))
        dist.barrier()
    syncer.close()
    if llm is not None:
        reports, memory_s, disk_s = (times[args.warm_up :] for times in (reports, memory_s, disk_s))
        num_bytes = reports[0].num_bytes
        rows = [
            row("mbridge sync()", [r.total_s for r in reports], num_bytes, limit),
            row("vLLM load_weights, tensors in worker", memory_s, num_bytes, limit),
            row("vLLM reload from disk", disk_s, num_bytes, limit),
        ]
        print_table(rows)
        phases = {name: statistics.median(r.phases[name] for r in reports) for name in reports[0].phases}
        print("phases of mbridge, ms:", {name: round(seconds * 1e3, 1) for name, seconds in phases.items()})
        result = {
            "shape": args.shape,
            "tp": 2,
            "num_tensors": reports[0].num_tensors,
            "num_buckets": reports[0].num_buckets,
            "extra_bytes": reports[0].trainer_extra_bytes + reports[0].engine_extra_bytes,
            "memcpy_gb_s": limit,
            "connect_s": connect_s,
            "ratio_to_load_weights": rows[0]["seconds"] / rows[1]["seconds"],
            "phases_s": phases,
            "fill_s": statistics.median(r.fill_s for r in reports),
            "load_s": statistics.median(r.load_s for r in reports),
            "rows": rows,
        }
        write_json(result, args.json)
    destroy_parallel()


def _rpc_seconds(llm, method: str, *args: str) -> float:
    start = time.perf_counter()
    llm.collective_rpc(method, args=args)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
