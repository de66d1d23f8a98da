"""The public calls around a load: wrapped and foreign models, dtypes, a process without set-up, several bridges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mbridge.test_bad_input import MODEL, TIED, write
from tests.mbridge.test_bridge_ranks import read_all, shard_problems, tensor_problems

pytestmark = pytest.mark.slow


def wrapped(*, path: str, dtype: torch.dtype, topology: dict[str, int]) -> list[str]:
    """Load into and export from chunks inside Float16Module and DDP."""
    from mbridge import AutoBridge, init_parallel

    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(path, dtype=dtype)
    chunks = bridge.get_model(path, wrap_with_ddp=True)
    assert bridge.models is chunks
    names = [type(module).__name__ for module in chunks[0].modules()][:3]
    assert names == ["DistributedDataParallel", "Float16Module", "GPTModel"], names
    expected = {name: tensor.to(dtype) for name, tensor in read_all(Path(path)).items()}
    problems = tensor_problems("export", dict(bridge.export_weights(chunks)), expected)
    # Live, not a copy: what an optimizer writes is what is exported next.
    for tensor in bridge.local_tensors(chunks).values():
        tensor.mul_(2)
    doubled = {name: tensor * 2 for name, tensor in expected.items()}
    return problems + tensor_problems("after a step", dict(bridge.export_weights(chunks)), doubled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("topology", [{"tp": 2}, {"pp": 2, "vpp": 2}, {}], ids=["TP2", "PP2 VPP2", "DP2"])
def test_wrapped_half_precision_models(
    ranks: Any, tmp_path: Path, dtype: torch.dtype, topology: dict[str, int]
) -> None:
    tensors = {name: 1e-4 * tensor for name, tensor in MODEL.coded(torch.float32).items()}
    folder = write(MODEL, tmp_path / "hf", tensors)
    for problems in ranks.run(wrapped, 2, path=str(folder), dtype=dtype, topology=topology):
        assert problems == []


def foreign(*, path: str) -> list[str]:
    """A GPTModel that mbridge did not build, given bare and not as a list, with a vocabulary padded to 64."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(tp=2)
    config = TransformerConfig(
        num_layers=MODEL.layers, hidden_size=MODEL.hidden, ffn_hidden_size=MODEL.ffn,
        num_attention_heads=MODEL.heads, num_query_groups=MODEL.groups, kv_channels=MODEL.head_dim,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, add_qkv_bias=True, tensor_model_parallel_size=2, use_cpu_initialization=True,
        masked_softmax_fusion=False, persist_layer_norm=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=32, position_embedding_type="rope",
                     share_embeddings_and_output_weights=False)  # fmt: skip
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    original = read_all(Path(path))
    bridge.load_weights(model, path)
    weight = model.embedding.word_embeddings.weight
    rank = read_topology()[1].tp
    expected = torch.zeros(32, MODEL.hidden)
    for i in range(32):
        if 32 * rank + i < MODEL.vocab:
            expected[i] = original["model.embed_tokens.weight"][32 * rank + i]
    assert torch.equal(weight, expected)
    return tensor_problems("export", dict(bridge.export_weights(model)), original)


def test_a_model_from_elsewhere_with_other_padding(ranks: Any, tmp_path: Path) -> None:
    folder = write(MODEL, tmp_path / "hf")
    assert ranks.run(foreign, 2, path=str(folder)) == [[], []]


def side_by_side(*, tied: str, untied: str) -> list[str]:
    """Two bridges of one family, tied and untied, used in turns."""
    from mbridge import AutoBridge, init_parallel

    init_parallel(pp=2)
    bridges = [AutoBridge.from_pretrained(path, dtype=torch.float32) for path in (tied, untied)]
    models = [bridge.get_model(path) for bridge, path in zip(bridges, (tied, untied), strict=True)]
    problems = []
    for _ in range(2):
        for bridge, chunks, path in zip(bridges, models, (tied, untied), strict=True):
            problems += tensor_problems(path, dict(bridge.export_weights(chunks)), read_all(Path(path)))
    return problems


def test_bridges_share_no_state(ranks: Any, tmp_path: Path) -> None:
    tied, untied = write(TIED, tmp_path / "tied"), write(MODEL, tmp_path / "untied")
    assert ranks.run(side_by_side, 2, tied=str(tied), untied=str(untied)) == [[], []]


def loaded_twice(*, path: str, other: str) -> list[str]:
    from mbridge import AutoBridge, init_parallel

    init_parallel(tp=2)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunks = bridge.get_model(path)
    first = {name: tensor.clone() for name, tensor in bridge.local_tensors(chunks).items()}
    bridge.load_weights(chunks, other)
    changed = bridge.local_tensors(chunks)
    assert all(not torch.equal(changed[name], tensor) for name, tensor in first.items())
    bridge.load_weights(chunks, path)
    return tensor_problems("again", bridge.local_tensors(chunks), first)


def test_loading_again_gives_the_same_bits(ranks: Any, tmp_path: Path) -> None:
    tensors = MODEL.coded(torch.float32)
    folder = write(MODEL, tmp_path / "one", tensors)
    other = write(MODEL, tmp_path / "other", {name: tensor + 1 for name, tensor in tensors.items()})
    assert ranks.run(loaded_twice, 2, path=str(folder), other=str(other)) == [[], []]


def incomplete(*, path: str, folder: str) -> str:
    """Save a model without its head, strictly and not."""
    from mbridge import AutoBridge, PlanError, init_parallel

    init_parallel(pp=2)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunks = bridge.get_model(path)
    for chunk in chunks:
        if chunk.post_process:
            chunk.output_layer.weight = None
    said = ""
    try:
        bridge.save_weights(chunks, folder)
    except PlanError as error:
        said = str(error)
    bridge.save_weights(chunks, folder, strict=False)
    return said


def test_a_save_of_an_incomplete_model_is_refused_if_strict(ranks: Any, tmp_path: Path) -> None:
    source = write(MODEL, tmp_path / "hf")
    for said in ranks.run(incomplete, 2, path=str(source), folder=str(tmp_path / "saved")):
        assert "no pipeline stage has" in said
        assert "lm_head.weight" in said
    expected = {name: tensor for name, tensor in read_all(source).items() if name != "lm_head.weight"}
    assert tensor_problems("saved", read_all(tmp_path / "saved"), expected) == []


def plans(*, path: str, topology: dict[str, int]) -> Any:
    from mbridge import AutoBridge, init_parallel

    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    return bridge.plan(bridge.get_model(path))


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "topology", [{"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2}], ids=["TP2 PP2", "PP2 VPP2 DP2", "TP2 DP2"]
)
def test_the_plans_of_all_ranks_cover_the_checkpoint_once(
    ranks: Any, tmp_path: Path, model: Any, topology: dict[str, int]
) -> None:
    folder = write(model, tmp_path / "hf")
    original = read_all(folder)
    found = ranks.run(plans, 4, path=str(folder), topology=topology)
    assert len({plan.digest for plan in found}) == 1
    assert all(plan.tensors == found[0].tensors and plan.fusion_groups == found[0].fusion_groups for plan in found)
    assert {spec.name: spec.shape for spec in found[0].tensors} == {n: tuple(t.shape) for n, t in original.items()}
    times = {name: torch.zeros_like(tensor) for name, tensor in original.items()}
    for plan in found:
        assert set(plan.owned) <= set(plan.pieces)
        for piece in plan.owned:
            times[piece.hf_name][piece.box.slices] += 1
    assert all(bool((count == 1).all()) for count in times.values())


def extra_arguments(*, path: str) -> list[str]:
    """What was said to each name that nobody knows."""
    from mbridge import AutoBridge, init_parallel

    init_parallel()
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    bridge.set_extra_args(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    chunk = bridge.get_model(extra_provider_args={"fp16_lm_cross_entropy": True})[0]
    said = [f"{chunk.config.recompute_granularity} {chunk.fp16_lm_cross_entropy}"]
    for attempt in (
        lambda: bridge.get_model(extra_provider_args={"no_such_argument": 1}),
        lambda: bridge.set_extra_args(no_such_field=1) or bridge.get_model(),
    ):
        try:
            attempt()
        except TypeError as error:
            said.append(str(error))
    return said


def test_extra_arguments_reach_megatron_and_unknown_ones_are_type_errors(ranks: Any, tmp_path: Path) -> None:
    said = ranks.run(extra_arguments, 1, path=str(write(MODEL, tmp_path / "hf")))[0]
    assert said[0] == "full True"
    assert "no_such_argument" in said[1]
    assert "no_such_field" in said[2]


def shards_of_own_padding(*, path: str, divisor: int) -> list[str]:
    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(tp=2)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32, make_vocab_size_divisible_by=divisor)
    chunks = bridge.get_model(path)
    assert chunks[0].embedding.word_embeddings.weight.shape[0] == divisor
    original = read_all(Path(path))
    return shard_problems(
        MODEL, original, chunks, tp=2, rank=read_topology()[1].tp, padded=2 * divisor
    ) + tensor_problems("export", dict(bridge.export_weights(chunks)), original)


def test_vocabulary_padding_larger_than_a_rank(ranks: Any, tmp_path: Path) -> None:
    """37 rows on two ranks of 40: the second holds nothing but padding."""
    folder = write(MODEL, tmp_path / "hf")
    assert ranks.run(shards_of_own_padding, 2, path=str(folder), divisor=40) == [[], []]


PLAIN = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from mbridge import AutoBridge
bridge = AutoBridge.from_pretrained(sys.argv[1])
model = bridge.get_model()
bridge.load_weights(model, bridge.path)
print(len(dict(bridge.export_weights(model))), next(model[0].parameters()).dtype, bridge.config.num_layers)
"""


def test_a_plain_python_process_needs_no_set_up(tmp_path: Path, repo_root: Path) -> None:
    folder = write(MODEL, tmp_path / "hf")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, folder],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=repo_root,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(MODEL.hf_shapes())), "torch.bfloat16", str(MODEL.layers)]
    assert "world of one rank" in done.stderr
