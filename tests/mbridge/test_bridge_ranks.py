"""Real Megatron-Core models on real ranks: local shards, export, save and logits, over families and topologies."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.mbridge.reference import Model, local_tensors, padded_vocab
from tests.mbridge.small_hf import CASES, config_of, make, tokens_of

pytestmark = pytest.mark.slow

UNEVEN = {"num_layers_in_first_pipeline_stage": 1}
# name: (ranks, topology, fields of TransformerConfig)
TOPOLOGIES: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "TP1": (1, {}, {}),
    "TP2": (2, {"tp": 2}, {}),
    "TP4": (4, {"tp": 4}, {}),
    "PP2": (2, {"pp": 2}, {}),
    "PP2 uneven": (2, {"pp": 2}, UNEVEN),
    "PP3 uneven": (3, {"pp": 3}, {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1}),
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}, {}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}, {}),
    "TP2 PP2 uneven": (4, {"tp": 2, "pp": 2}, UNEVEN),
    "TP2 PP2 VPP2": (4, {"tp": 2, "pp": 2, "vpp": 2}, {}),
    "TP2 DP2": (4, {"tp": 2}, {}),
}
# Every family in a few topologies, and every topology with the two families in which most can go wrong.
RUNS = [(case, topology) for case in ("qwen2 tied", "qwen3") for topology in TOPOLOGIES]
RUNS += [(case, name) for case in ("llama", "qwen2", "qwen3 tied") for name in ("TP4", "PP2 VPP2", "TP2 PP2 uneven")]
RUNS += [(case, topology) for case in ("llama3", "llama linear") for topology in ("TP1", "TP2 PP2")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a case -> (folder, transformers' logits); made once each."""

    @cache
    def made(case: str) -> tuple[Path, torch.Tensor]:
        folder = tmp_path_factory.mktemp("hf") / case.replace(" ", "-")
        return folder, make(CASES[case], folder)

    return made


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def on_rank(*, path: str, case: str, topology: dict[str, int], extra: dict[str, Any], save_to: str) -> dict[str, Any]:
    """Everything that one rank is asked; what needs only this rank is compared here, exactly."""
    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    bridge.set_extra_args(**extra)
    chunks = bridge.get_model()
    place = read_topology()[1]
    scramble(chunks)
    num_bytes = bridge.load_weights(chunks, path)
    original = read_all(Path(path))

    problems = shard_problems(CASES[case].model, original, chunks, tp=topology.get("tp", 1), rank=place.tp)
    own_bytes = sum(tensor.nbytes for tensor in bridge.local_tensors(chunks).values())
    exported = dict(bridge.export_weights(chunks))
    problems += tensor_problems("export_weights", exported, original)
    in_buckets: dict[str, torch.Tensor] = {}
    for bucket in bridge.export_buckets(chunks, bucket_bytes=20_000):
        for name, tensor in bucket.tensors:
            assert name not in in_buckets
            in_buckets[name] = tensor.clone()
    problems += tensor_problems("export_buckets", in_buckets, {name: original[name] for name in in_buckets})
    bridge.save_weights(chunks, Path(save_to) / "by rank 0")
    bridge.save_weights(chunks, Path(save_to) / "by stages", distributed_filesystem=True)
    return {
        "problems": problems,
        "in_buckets": sorted(in_buckets),
        "num_bytes": num_bytes,
        "own_bytes": own_bytes,
        "coordinates": (place.pp, place.dp, place.tp),
        "logits": logits_of(chunks, tokens_of(CASES[case])),
    }


def scramble(chunks: list[Any]) -> None:
    """So that nothing is right because it was so before."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))


def shard_problems(
    model: Model,
    original: dict[str, torch.Tensor],
    chunks: list[Any],
    *,
    tp: int,
    rank: int,
    padded: int | None = None,
) -> list[str]:
    """How the tensors of this rank differ from the definition. Layers and stage are read off the modules themselves."""
    held: dict[str, torch.Tensor] = {}
    layers: list[int] = []
    for chunk in chunks:
        for i, layer in enumerate(chunk.decoder.layers):
            layers.append(layer.layer_number - 1)
            for name, tensor in layer.named_parameters():
                held[f"decoder.layers.{layers[-1]}.{name}"] = tensor.data
            assert f"decoder.layers.{i}" in dict(chunk.named_modules())
        held |= {name: t.data for name, t in chunk.named_parameters() if not name.startswith("decoder.layers.")}
    reference = local_tensors(
        model, original, rank=rank, tp=tp, layers=layers, padded=padded or padded_vocab(model.vocab, tp),
        first=any(chunk.pre_process for chunk in chunks), last=any(chunk.post_process for chunk in chunks),
    )  # fmt: skip
    return tensor_problems("local", held, reference)


def tensor_problems(what: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    problems = [f"{what}: only on one side: {name}" for name in sorted(found.keys() ^ expected.keys())]
    return problems + [
        f"{what}: {name} differs"
        for name in sorted(found.keys() & expected.keys())
        if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])
    ]


def logits_of(chunks: list[Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [batch, length, vocabulary of this rank] by Megatron-Core's own schedule; None before the last stage."""
    from mbridge.megatron import forward_backward_func

    batch, length = tokens.shape
    for chunk in chunks:
        chunk.eval()

    def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        next(data)
        mask = torch.triu(torch.ones(length, length), 1).bool()[None, None]
        output = model(tokens, torch.arange(length).expand(batch, length), mask)
        return output, lambda logits, non_loss_data=True: logits

    # The interleaved schedule wants a multiple of the stages: both are the same micro-batch.
    iterators = [iter(range(8)) for _ in chunks]
    with torch.no_grad():
        outputs = forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=2,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[-1] if outputs else None


def file_division(folder: Path) -> dict[str, list[str]]:
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names[file.name] = sorted(handle.keys())
    return names


@pytest.mark.parametrize(("case", "topology"), RUNS, ids=[f"{case}-{topology}" for case, topology in RUNS])
def test_load_export_save_and_logits(ranks: Any, checkpoint: Any, tmp_path: Path, case: str, topology: str) -> None:
    folder, expected_logits = checkpoint(case)
    world_size, sizes, extra = TOPOLOGIES[topology]
    results = ranks.run(
        on_rank, world_size, path=str(folder), case=case, topology=sizes, extra=extra, save_to=str(tmp_path)
    )
    original = read_all(folder)
    assert [problem for result in results for problem in result["problems"]] == []
    assert len(original) == len(CASES[case].model.hf_shapes())

    # No rank reads what it does not store (padding is stored, not read); buckets come once, from each stage's sender.
    assert all(result["num_bytes"] <= result["own_bytes"] for result in results)
    senders = [result for result in results if result["coordinates"][2] == 0]
    assert all(not result["in_buckets"] for result in results if result not in senders)
    for dp in {result["coordinates"][1] for result in results}:
        replica = [name for result in senders if result["coordinates"][1] == dp for name in result["in_buckets"]]
        assert sorted(replica) == sorted(original)

    for saved in (tmp_path / "by rank 0", tmp_path / "by stages"):
        assert tensor_problems(saved.name, read_all(saved), original) == []
        assert json.loads((saved / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
        assert (saved / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
        assert list(saved.glob(".*")) == []
        modes = {path.name: path.stat().st_mode & 0o007 for path in saved.iterdir()}
        assert set(modes.values()) == {0}, modes
    assert file_division(tmp_path / "by rank 0") == file_division(folder)

    vocab = CASES[case].model.vocab
    by_replica: dict[int, list[torch.Tensor]] = {}
    for result in results:  # in rank order, which is tp order inside a replica
        if result["logits"] is not None:
            by_replica.setdefault(result["coordinates"][1], []).append(result["logits"])
    assert by_replica
    for parts in by_replica.values():
        logits = torch.cat(parts, dim=-1)[..., :vocab]
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {"rms_norm_eps": 1e-6}),
        ("llama", {"rope_theta": 10000.0}),
        ("llama3", {"rope_scaling": None}),
        ("llama3", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
        ("llama linear", {"rope_scaling": None}),
        ("llama linear", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("qwen2", {"rope_theta": 10000.0}),
        ("qwen3", {"rms_norm_eps": 1e-6}),
    ],
    ids=str,
)
def test_a_wrong_config_value_would_show_in_the_logits(checkpoint: Any, case: str, changes: dict[str, Any]) -> None:
    """Else parity would say nothing about that value: transformers with the value changed must differ visibly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, expected = checkpoint(case)
    config = config_of(CASES[case]) | changes
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.for_model(**config), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        changed = model(tokens_of(CASES[case])).logits
    assert float((changed - expected).abs().max()) > 100 * 1e-4


@pytest.mark.parametrize("name", ["layernorm.weight", "linear_qkv.bias", "linear_qkv.weight", "linear_fc1.weight"])
def test_a_wrong_weight_would_show_in_the_logits(ranks: Any, checkpoint: Any, name: str) -> None:
    """One element moved by 0.01 on one rank of two is seen by the parity that the tests above ask for."""
    folder, expected = checkpoint("qwen2")
    results = ranks.run(logits_with_one_wrong_element, 2, path=str(folder), name=name)
    logits = torch.cat(results, dim=-1)[..., : CASES["qwen2"].model.vocab]
    assert not torch.allclose(logits, expected, atol=1e-4, rtol=0)


def logits_with_one_wrong_element(*, path: str, name: str) -> torch.Tensor | None:
    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(tp=2)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunks = bridge.get_model(path)
    if read_topology()[1].tp == 1:
        wrong = [tensor for local_name, tensor in bridge.local_tensors(chunks).items() if local_name.endswith(name)]
        wrong[0].view(-1)[0] += 0.01
    return logits_of(chunks, tokens_of(CASES["qwen2"]))
