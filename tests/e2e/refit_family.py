"""One family end to end, run by torchrun on two ranks: train a step, refit a real vLLM, compare with a fresh one.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/e2e/refit_family.py FAMILY FOLDER [stages]

Writes FOLDER/result.json: greedy tokens of the engine before and after the refit, and of a vLLM that was started on the
checkpoint that the trainer saved.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mbridge import AutoBridge, destroy_parallel, init_parallel
from mbridge_rl import WeightSyncer
from mbridge_rl.engines.vllm import start_llm

COMMON = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "rope_theta": 20000.0, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
SPARSE = {**MOE, "num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": [1]}
CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"], **SPARSE, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], **SPARSE, "norm_topk_prob": True, "head_dim": 64},
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], **MOE, "num_key_value_heads": 4, "n_routed_experts": 8,
        "n_shared_experts": 1, "kv_lora_rank": 512, "q_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64,
        "v_head_dim": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip
EXPERT_PARALLEL = {"qwen2_moe", "qwen3_moe"}
PROMPTS = [[5, 17, 200, 31], [7, 7, 9], [300, 4, 4, 80, 250, 3]]
NUM_TOKENS = 12


def write_checkpoint(family: str, folder: Path, seed: int, **fields: int) -> Path:
    """Random weights with no value at its default: norms are not one, biases not zero."""
    folder.mkdir(parents=True)
    config = {"model_type": family, **COMMON, **CONFIGS[family], **fields}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    from safetensors.torch import save_file

    tensors = {}
    for spec in AutoBridge.from_config(config, dtype=torch.float32).hf_tensors():
        scale, shift = (0.2, 1.0) if len(spec.shape) == 1 and spec.name.endswith("norm.weight") else (0.15, 0.0)
        tensors[spec.name] = torch.randn(spec.shape, generator=generator) * scale + shift
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def greedy(llm) -> list[list[int]]:
    """One request at a time: in a batch, vLLM 0.32's latent attention on CPU depends on a request's neighbours."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    outputs = [llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0] for ids in PROMPTS]
    return [list(output.outputs[0].token_ids) for output in outputs]


def train_step(model: torch.nn.Module) -> float:
    """One step of SGD on next-token prediction; every rank sees the same batch."""
    tokens = torch.randint(0, COMMON["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(5))
    size = tokens.shape[1] - 1
    causal = torch.ones(1, 1, size, size, dtype=torch.bool).triu(1)
    loss = model(tokens[:, :-1], torch.arange(size).expand(2, -1), causal, labels=tokens[:, 1:].contiguous()).mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return float(loss.detach())


def start(folder: Path, **options):
    return start_llm(
        str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=64, enforce_eager=True,
        gpu_memory_utilization=0.2, enable_prefix_caching=True, **options,
    )  # fmt: skip


def checksums(llm) -> dict[str, object]:
    """vLLM's own checksums of its worker's parameters, derived ones included."""
    (sums,) = llm.collective_rpc("compute_weight_checksums")
    return sums


def stages(family: str, folder: Path) -> None:
    """Two pipeline stages, each of which broadcasts its layers, to a vLLM of two workers."""
    init_parallel(pp=2, seed=1)
    rank = dist.get_rank()
    if rank == 0:
        write_checkpoint(family, folder / "policy", seed=1, num_hidden_layers=4)
        write_checkpoint(family, folder / "other", seed=2, num_hidden_layers=4)
    dist.barrier()
    bridge = AutoBridge.from_pretrained(folder / "policy", dtype=torch.float32)
    bridge.get_model(weight_path=bridge.path)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|0"
    llm = start(folder / "other", tensor_parallel_size=2) if rank == 0 else None
    before = greedy(llm) if rank == 0 else []
    reports = []
    with WeightSyncer(bridge, llm, transport="collective", bucket_bytes=1 << 17, mode="sharded") as syncer:
        reports += [syncer.sync(verify="full"), syncer.sync(verify="full")]
    if rank == 0:
        refitted, sums = greedy(llm), llm.collective_rpc("compute_weight_checksums")
        del llm
        llm = start(folder / "policy", tensor_parallel_size=2)
        result = {
            "before": before,
            "refitted": refitted,
            "fresh": greedy(llm),
            "equal": sums == llm.collective_rpc("compute_weight_checksums"),
            "reports": [json.loads(report.to_json()) for report in reports],
        }
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    destroy_parallel()


def main() -> None:
    family, folder = sys.argv[1], Path(sys.argv[2])
    if sys.argv[3:] == ["stages"]:
        stages(family, folder)
        return
    init_parallel(**({"ep": 2} if family in EXPERT_PARALLEL else {"tp": 2}), seed=1)
    rank = dist.get_rank()
    if rank == 0:
        write_checkpoint(family, folder / "policy", seed=1)
        write_checkpoint(family, folder / "other", seed=2)
    dist.barrier()
    bridge = AutoBridge.from_pretrained(folder / "policy", dtype=torch.float32)
    (model,) = bridge.get_model(weight_path=bridge.path)
    if family == "deepseek_v3":
        model.eval()  # Megatron-Core trains MoE over tp ranks with sequence parallelism only, which needs CUDA
    loss = train_step(model)

    llm = start(folder / "other") if rank == 0 else None
    before = greedy(llm) if rank == 0 else []
    reports, answers = [], []
    with WeightSyncer(bridge, llm, path="bucket") as syncer:
        reports.append(syncer.sync())
        answers.append(greedy(llm) if rank == 0 else [])
    with WeightSyncer(bridge, llm, path="direct") as syncer:
        reports.append(syncer.sync())  # by vLLM's loader, from the trainers' memory
        answers.append(greedy(llm) if rank == 0 else [])
        train_step(model)
        reports.append(syncer.sync(verify="full"))
        answers.append(greedy(llm) if rank == 0 else [])
    bridge.save_weights(model, folder / "saved")
    if rank == 0:
        sums = checksums(llm)
        del llm
        llm = start(folder / "saved")
        result = {
            "loss": loss,
            "before": before,
            "bucket": answers[0],
            "reload": answers[1],
            "direct": answers[2],
            "fresh": greedy(llm),
            "other weights": [name for name, total in checksums(llm).items() if sums[name] != total],
            "reports": [json.loads(report.to_json()) for report in reports],
        }
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    destroy_parallel()


if __name__ == "__main__":
    main()
