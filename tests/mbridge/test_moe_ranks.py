"""Real Megatron-Core models with experts on real ranks: local shards, export, save, logits and the chosen experts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mbridge.moe_hf import CASES, Expected, make, run, tokens_of, watch_routers
from tests.mbridge.moe_reference import MoeModel, Place, local_tensors
from tests.mbridge.test_bridge_ranks import file_division, logits_of, read_all, tensor_problems

pytestmark = pytest.mark.slow

UNEVEN = {"num_layers_in_first_pipeline_stage": 1}
# name: (ranks, topology, fields of TransformerConfig)
TOPOLOGIES: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "one rank": (1, {}, {}),
    "EP2": (2, {"ep": 2}, {}),
    "EP4": (4, {"ep": 4}, {}),
    "EP2, two replicas": (4, {"ep": 2}, {}),
    "TP2": (2, {"tp": 2}, {}),
    "TP2 ETP1": (2, {"tp": 2, "etp": 1}, {}),
    "TP2 EP2 ETP1": (2, {"tp": 2, "ep": 2, "etp": 1}, {}),
    "TP2 EP2 ETP2": (4, {"tp": 2, "ep": 2, "etp": 2}, {}),
    "ETP2": (2, {"etp": 2}, {}),
    "TP4 EP2 ETP1": (4, {"tp": 4, "ep": 2, "etp": 1}, {}),
    "PP2 uneven": (2, {"pp": 2}, UNEVEN),
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}, {}),
    "EP2 PP2": (4, {"ep": 2, "pp": 2}, {}),
    "TP2 EP2 ETP1 PP2 VPP2": (4, {"tp": 2, "ep": 2, "etp": 1, "pp": 2, "vpp": 2}, {}),
}
EVERYWHERE = ("qwen2_moe", "deepseek_v3")
SOME = ("EP2", "TP2 EP2 ETP1", "TP2 EP2 ETP2", "PP2 VPP2")
RUNS = [(case, topology) for case in EVERYWHERE for topology in TOPOLOGIES]
RUNS += [(case, topology) for case in CASES if case not in EVERYWHERE for topology in SOME]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a case -> (folder, what transformers computes); made once each."""

    @cache
    def made(case: str) -> tuple[Path, Expected]:
        folder = tmp_path_factory.mktemp("hf_moe") / case.replace(" ", "-")
        return folder, make(CASES[case], folder)

    return made


def on_rank(*, path: str, case: str, topology: dict[str, int], extra: dict[str, Any], save_to: str) -> dict[str, Any]:
    """Everything that one rank is asked; what needs only this rank is compared here, exactly."""
    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    bridge.set_extra_args(**extra)
    chunks = bridge.get_model()
    sizes, at = read_topology()
    scramble(chunks)
    num_bytes = bridge.load_weights(chunks, path)
    original = read_all(Path(path))
    place = Place(at.tp, sizes.tp, at.ep, sizes.ep, at.etp, sizes.expert_tp)
    problems = shard_problems(CASES[case].model, original, chunks, place)
    own_bytes = sum(tensor.nbytes for tensor in bridge.local_tensors(chunks).values())
    problems += tensor_problems("export_weights", dict(bridge.export_weights(chunks)), original)
    in_buckets: dict[str, torch.Tensor] = {}
    for bucket in bridge.export_buckets(chunks, bucket_bytes=50_000):
        for name, tensor in bucket.tensors:
            assert name not in in_buckets
            in_buckets[name] = tensor.clone()
    problems += tensor_problems("export_buckets", in_buckets, {name: original[name] for name in in_buckets})
    bridge.save_weights(chunks, Path(save_to) / "by rank 0")
    bridge.save_weights(chunks, Path(save_to) / "by stages", distributed_filesystem=True)
    chosen = watch_routers(chunks, CASES[case])
    return {
        "problems": problems,
        "in_buckets": sorted(in_buckets),
        "num_bytes": num_bytes,
        "own_bytes": own_bytes,
        "replica": sizes.replica(at),
        "dp": at.dp,
        "logits": logits_of(chunks, tokens_of(CASES[case])),
        "chosen": chosen,
    }


def scramble(chunks: list[Any]) -> None:
    """So that nothing is right because it was so before."""
    for chunk in chunks:
        for tensor in (*chunk.parameters(), *chunk.buffers()):
            if tensor.is_floating_point():
                tensor.data.fill_(float("nan"))


def shard_problems(
    model: MoeModel, original: dict[str, torch.Tensor], chunks: list[Any], place: Place, **more: Any
) -> list[str]:
    """How the tensors of this rank differ from the definition. Layers and stage are read off the modules themselves."""
    held: dict[str, torch.Tensor] = {}
    layers: list[int] = []
    for chunk in chunks:
        numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        layers += numbers.values()
        biases = {name: buffer for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")}
        for name, tensor in {**dict(chunk.named_parameters()), **biases}.items():
            number = next((numbers[at] for at in numbers if name.startswith(at)), None)
            parts = name.split(".")
            held[".".join([*parts[:2], str(number), *parts[3:]]) if number is not None else name] = tensor.data
    reference = local_tensors(
        model, original, place, layers=layers, first=any(chunk.pre_process for chunk in chunks),
        last=any(chunk.post_process for chunk in chunks), **more,
    )  # fmt: skip
    return tensor_problems("local", held, reference)


@pytest.mark.parametrize(("case", "topology"), RUNS, ids=[f"{case}-{topology}" for case, topology in RUNS])
def test_load_export_save_logits_and_experts(
    ranks: Any, checkpoint: Any, tmp_path: Path, case: str, topology: str
) -> None:
    folder, expected = checkpoint(case)
    model = CASES[case].model
    world_size, sizes, extra = TOPOLOGIES[topology]
    results = ranks.run(
        on_rank, world_size, path=str(folder), case=case, topology=sizes, extra=extra, save_to=str(tmp_path)
    )
    original = read_all(folder)
    assert {name: tuple(tensor.shape) for name, tensor in original.items()} == model.hf_shapes()
    assert [problem for result in results for problem in result["problems"]] == []
    assert all(result["num_bytes"] <= result["own_bytes"] for result in results)
    for replica in {result["replica"] for result in results}:
        sent = [name for result in results if result["replica"] == replica for name in result["in_buckets"]]
        assert sorted(sent) == sorted(original)
    for saved in (tmp_path / "by rank 0", tmp_path / "by stages"):
        assert tensor_problems(saved.name, read_all(saved), original) == []
    assert file_division(tmp_path / "by rank 0") == file_division(folder)

    by_dp: dict[int, list[torch.Tensor]] = {}
    for result in results:  # in rank order, which is tp order inside a replica
        if result["logits"] is not None:
            by_dp.setdefault(result["dp"], []).append(result["logits"])
    assert by_dp
    for parts in by_dp.values():
        torch.testing.assert_close(torch.cat(parts, dim=-1)[..., : model.vocab], expected.logits, atol=1e-4, rtol=0)
    seen = set()
    for result in results:
        for layer, chosen in result["chosen"].items():
            seen.add(layer)
            assert torch.equal(chosen, expected.chosen[layer]), f"layer {layer}: other experts are chosen"
    assert seen == set(expected.chosen)


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"num_experts_per_tok": 2}),
    ("qwen2_moe renormalised", {"norm_topk_prob": False}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe not renormalised", {"norm_topk_prob": True}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"topk_group": 3}),
    ("deepseek_v3", {"routed_scaling_factor": 1.0}),
    ("deepseek_v3", {"rope_scaling": None}),
    *[
        (case, {"rope_scaling": {**CASES[case].model.fields["rope_scaling"], field: value}})
        for case in ("deepseek_v3", "deepseek_v2")
        for field, value in [("mscale", 1.0), ("mscale_all_dim", 1.0), ("factor", 40.0), ("beta_fast", 32)]
    ],
    ("deepseek_v3", {"rope_scaling": {**CASES["deepseek_v3"].model.fields["rope_scaling"], "beta_slow": 1}}),
    ("moonlight", {"routed_scaling_factor": 1.0}),
    ("deepseek_v2", {"routed_scaling_factor": 1.0}),
    ("glm4_moe", {"partial_rotary_factor": 0.5}),
    ("glm4_moe", {"routed_scaling_factor": 1.0}),
    ("glm4_moe", {"n_group": 1}),
]


@pytest.mark.parametrize(("case", "changes"), CHANGES, ids=str)
def test_a_wrong_config_value_would_show(checkpoint: Any, case: str, changes: dict[str, Any]) -> None:
    """Else parity would say nothing about that value: transformers with the value changed must differ visibly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, expected = checkpoint(case)
    config = AutoConfig.for_model(**(CASES[case].model.config() | changes))
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert float((run(model, CASES[case]).logits - expected.logits).abs().max()) > 100 * 1e-4


WEIGHTS = [
    ("qwen2_moe", "shared_experts.gate_weight"),
    ("qwen2_moe", "shared_experts.linear_fc1.weight"),
    ("qwen2_moe", "router.weight"),
    ("deepseek_v3", "local_experts.0.linear_fc1.weight"),
    ("deepseek_v3", "linear_kv_down_proj.weight"),
    ("deepseek_v3", "q_layernorm.weight"),
    ("glm4_moe", "linear_qkv.bias"),
]


@pytest.mark.parametrize(("case", "name"), WEIGHTS, ids=[f"{case}-{name}" for case, name in WEIGHTS])
def test_a_wrong_weight_would_show_in_the_logits(ranks: Any, checkpoint: Any, case: str, name: str) -> None:
    """One row moved by 0.05 on one rank of two is seen by the parity that the tests above ask for."""
    folder, expected = checkpoint(case)
    results = ranks.run(logits_with_one_wrong_row, 2, path=str(folder), case=case, name=name)
    logits = torch.cat(results, dim=-1)[..., : CASES[case].model.vocab]
    assert not torch.allclose(logits, expected.logits, atol=1e-4, rtol=0)


def logits_with_one_wrong_row(*, path: str, case: str, name: str) -> torch.Tensor | None:
    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(tp=2, ep=2, etp=1)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunks = bridge.get_model(path)
    if read_topology()[1].tp == 1:
        wrong = [tensor for local_name, tensor in bridge.local_tensors(chunks).items() if local_name.endswith(name)]
        wrong[0].view(wrong[0].shape[0], -1)[0] += 0.05
    return logits_of(chunks, tokens_of(CASES[case]))


@pytest.mark.parametrize(("case", "sizes"), [("deepseek_v3", {"ep": 2}), ("glm4_moe", {"pp": 2})], ids=str)
def test_expert_biases_stay_fp32_in_a_bf16_model(
    ranks: Any, checkpoint: Any, tmp_path: Path, case: str, sizes: dict[str, int]
) -> None:
    folder, _ = checkpoint(case)
    biases = {name: tensor for name, tensor in read_all(folder).items() if name.endswith("correction_bias")}
    assert len(biases) == 3
    assert all(tensor.dtype is torch.float32 for tensor in biases.values())
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in biases.values())
    results = ranks.run(biases_of_a_bf16_model, 2, path=str(folder), sizes=sizes, save_to=str(tmp_path / "saved"))
    held: dict[str, torch.Tensor] = {}
    for result in results:
        assert tensor_problems("export", result["exported"], biases) == []
        assert result["other_dtypes"] == {torch.bfloat16}
        held |= result["held"]
    by_layer = {f"model.layers.{n.split('.')[2]}.mlp.gate.e_score_correction_bias": t for n, t in held.items()}
    assert tensor_problems("held", by_layer, biases) == []
    saved = {name: tensor for name, tensor in read_all(tmp_path / "saved").items() if name in biases}
    assert tensor_problems("saved", saved, biases) == []


def biases_of_a_bf16_model(*, path: str, sizes: dict[str, int], save_to: str) -> dict[str, Any]:
    from mbridge import AutoBridge, init_parallel

    init_parallel(**sizes)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.bfloat16)
    chunks = bridge.get_model(path)
    assert type(chunks[0]).__name__ == "Float16Module"
    tokens = torch.arange(8)[None]
    if sizes.get("pp", 1) == 1:  # a forward pass in training mode runs the module's own fp32 upkeep
        mask = torch.triu(torch.ones(8, 8), 1).bool()[None, None]
        assert chunks[0](tokens, torch.arange(8)[None], mask).isfinite().all()
    held = {n: t.clone() for n, t in bridge.local_tensors(chunks).items() if n.endswith("expert_bias")}
    others = {t.dtype for n, t in bridge.local_tensors(chunks).items() if not n.endswith("expert_bias")}
    exported = {n: t.clone() for n, t in bridge.export_weights(chunks) if n.endswith("correction_bias")}
    bridge.save_weights(chunks, save_to)
    return {"held": held, "other_dtypes": others, "exported": exported}
