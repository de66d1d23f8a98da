"""What planning the largest models costs: no weights, no Megatron-Core, no process group; shapes only.

    python benchmarks/plan.py [--json FILE]

For one rank of TP8 PP16 EP32 (ETP1, so a stage has 32 ranks): the table, the rank's pieces, its TrainerPlan, and the
export of its stage, for which every rank works out what all 32 own. Each shape is planned in a process of its own, so
that peak memory is its own. The same model cut to a quarter and a half of its layers shows that the time is linear in
tensors. Limits (issue "Every family, every parallel layout"): under 5 s and 500 MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import print_table, write_json

from mbridge.families import find_family
from mbridge.gather import plan_buckets
from mbridge.hf_config import normalise
from mbridge.ops import ColumnOrReplicated, Vocab, local_shape
from mbridge.pieces import TensorSpec
from mbridge.plan import Table, TrainerPlan, stored_by
from mbridge.topology import Coordinates, Topology

LIMIT_S, LIMIT_MB = 5.0, 500.0
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
TOPOLOGY = Topology(tp=8, pp=16, ep=32, etp=1, dp=4)


def layers_of(stage: int, num_layers: int) -> range:
    """As even as can be; the first stages have one layer less where it does not divide."""
    edges = [num_layers * i // TOPOLOGY.pp for i in range(TOPOLOGY.pp + 1)]
    return range(edges[stage], edges[stage + 1])


def specs_of(table: Table, stage: int) -> list[TensorSpec]:
    """What a rank of a stage holds, under TransformerEngine's names."""
    specs = []
    last = stage == TOPOLOGY.pp - 1
    stage_layers = layers_of(stage, table.num_layers)
    for row in table.rows:
        size = TOPOLOGY.expert_tp if row.num_experts else TOPOLOGY.tp
        if isinstance(row.op, ColumnOrReplicated):
            shape = row.shapes[0]  # TransformerEngine's are whole on every rank
        elif isinstance(row.op, Vocab):
            rows = -(-row.shapes[0][0] // size) * size
            shape = local_shape(row.op, row.shapes, size, rows)
        else:
            shape = local_shape(row.op, row.shapes, size)
        if not row.per_layer:
            here = last if row.mcore[0].startswith(("output_layer", "decoder.final")) else stage == 0
            layers: list[int | None] = [None] if here else []
        elif row.hf_offset:
            layers = list(table.layers_of(row)) if last else []
        else:
            layers = [layer for layer in table.layers_of(row) if layer in stage_layers]
        # A dense fc1 has the norm before it; experts never have.
        dense = row.mcore[0].endswith("mlp.linear_fc1.layer_norm_weight")
        for layer in layers:
            is_sparse = table.match(row.mcore[0].rsplit(".mlp.", 1)[0].format(layer=layer) + ".mlp.router.weight")
            name = row.mcore[-1] if dense and is_sparse is not None else row.mcore[0]
            specs += [
                TensorSpec(name.format(layer=layer, expert=expert), shape, row.dtype or table.dtype)
                for expert in range(row.num_experts // TOPOLOGY.ep or 1)
            ]
    return specs


def measure(name: str, stage: int, fraction: float) -> dict[str, Any]:
    """Plan one rank in this process, whose memory before is taken off."""
    config = normalise(SHAPES[name])
    config["num_hidden_layers"] = int(config["num_hidden_layers"] * fraction)
    before_mb = peak_mb()
    family = find_family(config["model_type"])
    family.check(config, ())
    table = Table(family.rows(config), config["num_hidden_layers"], torch.bfloat16)
    specs = specs_of(table, stage)
    made, made_cpu = time.perf_counter(), time.process_time()
    at = TOPOLOGY.coordinates(stage * TOPOLOGY.stage_size)
    stored = stored_by(table, TOPOLOGY, at, specs)
    plan = TrainerPlan.of(table, TOPOLOGY, at, stored)
    planned, planned_cpu = time.perf_counter(), time.process_time()
    after_mb = peak_mb()
    members: list[Coordinates] = TOPOLOGY.replica_members(at)
    owned = [stored_by(table, TOPOLOGY, other, specs).owned for other in members]
    names = {piece.hf_name for rank in owned for piece in rank}
    groups = [group for group in table.groups() if group[0].name in names]
    buckets = plan_buckets(groups, owned)
    exported = time.perf_counter()
    return {
        "shape": name,
        "stage": stage,
        "layers": config["num_hidden_layers"],
        "tensors": len(plan.tensors),
        "pieces": len(plan.pieces),
        "stage_tensors": len(names),
        "buckets": len(buckets),
        "plan_s": planned - made,
        "cpu_us_a_tensor": (planned_cpu - made_cpu) / len(plan.tensors) * 1e6,
        "export_plan_s": exported - planned,
        "plan_mb": after_mb - before_mb,
        "with_export_mb": peak_mb() - before_mb,
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_its_own_process(name: str, stage: int, fraction: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, "--stage", str(stage), "--fraction", str(fraction)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    result: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=SHAPES, help="plan this shape in this process, print one line of JSON")
    parser.add_argument("--stage", type=int, default=8)
    parser.add_argument("--fraction", type=float, default=1.0)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one, args.stage, args.fraction)))
        return
    runs = [(name, stage, 1.0) for name in SHAPES for stage in (0, 8, TOPOLOGY.pp - 1)]
    runs += [(name, 8, fraction) for name in SHAPES for fraction in (0.25, 0.5)]
    rows = [in_its_own_process(*run) for run in runs]
    print_table(rows)
    whole = [row for row, run in zip(rows, runs, strict=True) if run[2] == 1.0]
    worst_s = max(row["plan_s"] + row["export_plan_s"] for row in whole)
    worst_mb = max(row["with_export_mb"] for row in whole)
    result = {
        "benchmark": "plan", "topology": str(TOPOLOGY), "rows": rows, "worst_s": worst_s, "worst_mb": worst_mb,
        "limit_s": LIMIT_S, "limit_mb": LIMIT_MB, "ok": worst_s < LIMIT_S and worst_mb < LIMIT_MB,
    }  # fmt: skip
    write_json(result, args.json)
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
