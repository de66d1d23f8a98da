"""What the bridge itself costs: planning, load_weights, export_weights, against the plainest way to move the bytes.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/bridge.py --shape qwen2.5-0.5b
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/bridge.py --shape qwen3-moe-small --ep 2

- plan: table + topology -> pieces of this rank.
- load_weights: against safetensors reading and copying the same slices in a bare loop; bytes read against bytes owned.
- export_weights: against one all_gather of the same bytes; and the collectives it makes, beside the number of tensors.
Limits (issue "The main job"): plan under 1 s, load at most 1.3x and 1% more bytes, export at most 2x.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from measure import print_table, seconds, write_json
from safetensors import safe_open
from shapes import SHAPES, make_checkpoint

from mbridge import AutoBridge, destroy_parallel, gather, init_parallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel size; experts are then not cut over tp")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    init_parallel(tp=2, ep=args.ep, etp=1 if args.ep > 1 else None)
    rank = dist.get_rank()
    path = make_checkpoint(args.shape, args.folder) if rank == 0 else args.folder / args.shape
    dist.barrier()
    bridge = AutoBridge.from_pretrained(path)
    models = bridge.get_model(weight_path=path)
    plan = bridge.plan(models)
    tensors = bridge.local_tensors(models)
    own_bytes = sum(piece.box.numel * tensors[piece.local_name].element_size() for piece in plan.pieces)

    def together(action) -> float:
        """Median seconds of the slower rank."""
        times = torch.tensor(seconds(lambda: (dist.barrier(), action()), repeat=args.repeat))
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return statistics.median(times.tolist())

    def bare_read() -> None:
        with safe_open(path / "model.safetensors", framework="pt") as file, torch.no_grad():
            for piece in plan.pieces:
                piece.region.of(tensors[piece.local_name]).copy_(file.get_slice(piece.hf_name)[piece.box.slices])

    whole_bytes = sum(spec.num_bytes for spec in plan.tensors)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    half = torch.zeros(whole_bytes // 2, dtype=torch.uint8)
    both = torch.zeros(whole_bytes // 2 * 2, dtype=torch.uint8)

    def export() -> None:
        for _ in bridge.export_weights(models):
            pass

    num_collectives = 0
    gather_one = gather._all_gather

    def counting(*arguments, **options):
        nonlocal num_collectives
        num_collectives += 1
        return gather_one(*arguments, **options)

    gather._all_gather = counting
    export()
    gather._all_gather = gather_one

    read_bytes = bridge.load_weights(models, path)
    plan_s = statistics.median(seconds(lambda: bridge.plan(models), repeat=args.repeat))
    rows = [
        {"what": "load_weights", "seconds": together(lambda: bridge.load_weights(models, path))},
        {"what": "bare safetensors loop", "seconds": together(bare_read)},
        {"what": "export_weights", "seconds": together(export)},
        {"what": "one all_gather", "seconds": together(lambda: all_gather(both, half))},
    ]
    if rank == 0:
        for row, num_bytes in zip(rows, (own_bytes, own_bytes, whole_bytes, whole_bytes), strict=True):
            row |= {"bytes": num_bytes, "GB/s": num_bytes / 1e9 / row["seconds"]}
        print_table([*rows, {"what": "plan", "seconds": plan_s}])
        ratios = {
            "load_ratio": rows[0]["seconds"] / rows[1]["seconds"],
            "read_per_own_bytes": read_bytes / own_bytes,
            "export_ratio": rows[2]["seconds"] / rows[3]["seconds"],
            "export_collectives": num_collectives,
            "plan_s": plan_s,
        }
        write_json(
            {"shape": args.shape, "tp": 2, "ep": args.ep, "num_tensors": len(plan.tensors), **ratios, "rows": rows},
            args.json,
        )
    destroy_parallel()


if __name__ == "__main__":
    main()
