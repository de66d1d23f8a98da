"""Value and reward heads in the place of the output layer, as RL frameworks put them there; and frozen parameters."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mbridge import AutoBridge, ModelError, ValueHead
from mbridge.errors import CheckpointError, MBridgeError
from mbridge.families import find_family, with_value_head
from mbridge.hf_config import as_classifier, normalise
from mbridge.ops import Replicated
from tests.mbridge.moe_coded import MODELS
from tests.mbridge.small_hf import CASES, make, tokens_of
from tests.mbridge.test_bad_input import MODEL, TIED, write
from tests.mbridge.test_bridge_ranks import logits_of, read_all, scramble, tensor_problems

GRIDS: dict[str, tuple[int, dict[str, int]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
    "TP2 PP2 VPP2": (4, {"tp": 2, "pp": 2, "vpp": 2}),
}


class LinearForLastLayer(torch.nn.Linear):
    """What verl puts in the place of a critic's output layer (models/llama/megatron/layers/parallel_linear.py)."""

    def forward(self, input_: Any, weight: Any = None, runtime_gather_output: Any = None) -> Any:
        return super().forward(input_).float(), None


def put_head(size: int, *, bias: bool) -> Callable[..., None]:
    """A callback as verl's; the head's initial values are 100, 101, ..., and its bias 7."""

    def callback(model: Any, pre_process: bool, post_process: bool, config: Any, hf_config: Any) -> None:
        if post_process:
            model.output_layer = LinearForLastLayer(hf_config.hidden_size, size, bias=bias)
            model.output_layer.weight.data.copy_(initial(size, hf_config.hidden_size))
            if bias:
                model.output_layer.bias.data.fill_(7.0)

    return callback


def initial(size: int, hidden: int) -> torch.Tensor:
    return torch.arange(100.0, 100 + size * hidden).view(size, hidden)


def score(size: int, *, bias: bool, hidden: int = MODEL.hidden) -> dict[str, torch.Tensor]:
    tensors = {"score.weight": torch.arange(-5.0, size * hidden - 5).view(size, hidden)}
    return tensors | ({"score.bias": torch.arange(3.0, 3 + size)} if bias else {})


def without_output_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def critic(
    *, causal: str, reward: str, topology: dict[str, int], size: int, bias: bool, ddp: bool, save_to: str
) -> dict[str, Any]:
    """A critic from a causal model's checkpoint, then from a reward model's; and what it exports after each."""
    from mbridge import init_parallel

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mbridge").addHandler(handler)
    logging.getLogger("mbridge").setLevel(logging.INFO)
    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(causal, dtype=torch.float32)
    callback = put_head(size, bias=bias)
    chunks = bridge.get_model(causal, wrap_with_ddp=ddp, post_model_creation_callbacks=[callback])
    original = without_output_layer(read_all(Path(causal)))
    kept = {"score.weight": initial(size, MODEL.hidden)} | ({"score.bias": torch.full((size,), 7.0)} if bias else {})
    problems = tensor_problems("from causal", dict(bridge.export_weights(chunks)), original | kept)
    scramble(chunks)
    bridge.load_weights(chunks, reward)
    rewarded = read_all(Path(reward))
    problems += tensor_problems("from reward", dict(bridge.export_weights(chunks)), rewarded)
    in_buckets = {name: tensor.clone() for bucket in bridge.export_buckets(chunks) for name, tensor in bucket.tensors}
    problems += tensor_problems("buckets", in_buckets, {name: rewarded[name] for name in in_buckets})
    bridge.save_weights(chunks, Path(save_to) / "by rank 0")
    bridge.save_weights(chunks, Path(save_to) / "by stages", distributed_filesystem=True)
    assert {spec.name for spec in bridge.plan(chunks).tensors} == {spec.name for spec in bridge.hf_tensors()}
    logging.getLogger("mbridge").removeHandler(handler)
    heads = [name for name in bridge.local_tensors(chunks) if name.startswith("output_layer")]
    return {"problems": problems, "said": said, "head": bridge.head, "held": heads, "in_buckets": sorted(in_buckets)}


# name: (tied, rows of the head, with bias, in DDP)
VARIANTS: dict[str, tuple[bool, int, bool, bool]] = {
    "untied": (False, 1, False, False),
    "tied, bias": (True, 1, True, False),
    "three labels, bias, DDP": (False, 3, True, True),
    "tied, DDP": (True, 1, False, True),
}
RUNS = [("one rank", "tied, bias"), ("one rank", "untied"), ("TP2", "tied, DDP")]
RUNS += [(grid, variant) for grid in ("PP2", "TP2 PP2") for variant in VARIANTS] + [("TP2 PP2 VPP2", "tied, bias")]


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "variant"), RUNS, ids=[f"{grid}: {variant}" for grid, variant in RUNS])
def test_a_critic(ranks: Any, tmp_path: Path, grid: str, variant: str) -> None:
    tied, size, bias, ddp = VARIANTS[variant]
    model = TIED if tied else MODEL
    causal = write(model, tmp_path / "causal")
    tensors = {name: tensor + 0.5 for name, tensor in without_output_layer(model.coded(torch.float32)).items()}
    reward = write(model, tmp_path / "reward", tensors | score(size, bias=bias))
    num_ranks, topology = GRIDS[grid]
    results = ranks.run(
        critic, num_ranks, causal=str(causal), reward=str(reward), topology=topology, size=size, bias=bias, ddp=ddp,
        save_to=str(tmp_path),
    )  # fmt: skip
    assert [problem for result in results for problem in result["problems"]] == []
    kinds = ["output_layer.weight", *(["output_layer.bias"] if bias else [])]
    for result in results:
        assert result["head"] == ValueHead(size, bias)  # on the stages that do not have it, too
        assert result["held"] in ([], kinds)
        assert any("the value head keeps its values" in line for line in result["said"])
        assert any("1 redundant tensors are not read: lm_head.weight" in line for line in result["said"]) is not tied
    assert sum(bool(result["held"]) for result in results) == num_ranks // topology.get("pp", 1)
    names = sorted(name for result in results for name in result["in_buckets"])
    assert names == sorted(read_all(reward))
    for folder in ("by rank 0", "by stages"):
        assert tensor_problems(folder, read_all(tmp_path / folder), read_all(reward)) == []
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["architectures"] == ["Qwen2For" + ("Token" if bias else "Sequence") + "Classification"]
        assert len(config["id2label"]) == size


def wrong_heads(*, path: str, checkpoints: list[str], bias: bool) -> list[tuple[str, bool]]:
    """What is said to each checkpoint, and whether the model is as it was."""
    from mbridge import init_parallel

    init_parallel(pp=2)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunks = bridge.get_model(path, post_model_creation_callbacks=[put_head(1, bias=bias)])
    before = {name: tensor.clone() for name, tensor in bridge.local_tensors(chunks).items()}
    outcomes = []
    for checkpoint in checkpoints:
        said = "nothing was raised"
        try:
            bridge.load_weights(chunks, checkpoint)
        except CheckpointError as error:
            said = str(error)
        after = bridge.local_tensors(chunks)
        outcomes.append((said, all(torch.equal(after[name], tensor) for name, tensor in before.items())))
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_a_reward_checkpoint_that_does_not_fit(ranks: Any, tmp_path: Path, bias: bool) -> None:
    causal = write(MODEL, tmp_path / "causal")
    body = without_output_layer(MODEL.coded(torch.float32))
    two_labels = write(MODEL, tmp_path / "two", body | score(2, bias=bias))
    other_bias = write(MODEL, tmp_path / "bias", body | score(1, bias=not bias))
    expected = [
        f"shape: score.weight is [2, {MODEL.hidden}], expected [1, {MODEL.hidden}]",
        "missing: score.bias [1]" if bias else "extra: score.bias [1]",
    ]
    results = ranks.run(
        wrong_heads, 2, path=str(causal), checkpoints=[str(two_labels), str(other_bias)], bias=bias
    )  # fmt: skip
    for outcomes in results:
        for (said, unchanged), wanted in zip(outcomes, expected, strict=True):
            assert wanted in said
            assert unchanged


def from_elsewhere(*, path: str, reward: str, head: int | ValueHead) -> list[str]:
    """A bridge that did not build the model, and is told of its head."""
    from mbridge import init_parallel

    init_parallel(tp=2)
    builder = AutoBridge.from_pretrained(path, dtype=torch.float32)
    bias = isinstance(head, ValueHead) and head.bias
    chunks = builder.get_model(post_model_creation_callbacks=[put_head(1, bias=bias)])
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32, value_head=head)
    bridge.load_weights(chunks, reward)
    problems = tensor_problems("told", dict(bridge.export_weights(chunks)), read_all(Path(reward)))
    # Without being told, it finds a model that is not the one of the config.
    for action in (bridge_of(path).load_weights, lambda models, _: dict(bridge_of(path).export_weights(models))):
        try:
            action(chunks, reward)
            problems.append("a bridge that knows of no head should refuse this model")
        except ModelError as error:
            problems += (
                []
                if "'output_layer.weight' has shape [1, 24] here, on 2 ranks 2 rows; at least the 37" in str(error)
                else [str(error)]
            )
    return problems


def bridge_of(path: str) -> Any:
    return AutoBridge.from_pretrained(path, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("head", [1, ValueHead(1, bias=True)], ids=str)
def test_a_model_from_elsewhere(ranks: Any, tmp_path: Path, head: int | ValueHead) -> None:
    causal = write(MODEL, tmp_path / "causal")
    tensors = without_output_layer(MODEL.coded(torch.float32)) | score(1, bias=isinstance(head, ValueHead))
    reward = write(MODEL, tmp_path / "reward", tensors)
    assert ranks.run(from_elsewhere, 2, path=str(causal), reward=str(reward), head=head) == [[], []]


def one_after_the_other(*, path: str) -> list[str]:
    """A head is of the model that was built last; and one that was promised has to be there."""
    from mbridge import init_parallel

    init_parallel(pp=2)
    bridge = bridge_of(path)
    bridge.get_model(post_model_creation_callbacks=[put_head(1, bias=False)])
    problems = [] if bridge.head == ValueHead(1) else [f"head: {bridge.head}"]
    chunks = bridge.get_model(path, post_model_creation_callbacks=[lambda model, **keywords: None])
    problems += [] if bridge.head is None else [f"head: {bridge.head}"]
    problems += tensor_problems("causal", dict(bridge.export_weights(chunks)), read_all(Path(path)))
    promised = AutoBridge.from_pretrained(path, dtype=torch.float32, value_head=2)
    for callbacks in ([], [put_head(1, bias=False)]):
        try:
            promised.get_model(post_model_creation_callbacks=callbacks)
            problems.append("a promised head is not there, and nothing was raised")
        except MBridgeError as error:
            problems += [] if "expected ValueHead(size=2" in str(error) else [str(error)]
    return problems


@pytest.mark.slow
def test_a_head_is_of_the_model_that_was_built_last(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(one_after_the_other, 2, path=str(write(MODEL, tmp_path / "causal"))) == [[], []]


def values(*, path: str, case: str, size: int, bias: bool, save_to: str) -> torch.Tensor | None:
    from mbridge import init_parallel

    init_parallel(pp=2)
    bridge = bridge_of(path)
    chunks = bridge.get_model(path, post_model_creation_callbacks=[put_head(size, bias=bias)])
    for name, tensor in bridge.local_tensors(chunks).items():
        if name.startswith("output_layer"):
            tensor.mul_(0.01)
    bridge.save_weights(chunks, save_to)
    return logits_of(chunks, tokens_of(CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "size", "bias"), [("qwen2", 1, False), ("qwen3 tied", 3, True), ("llama", 2, False)])
def test_transformers_reads_what_is_saved(ranks: Any, tmp_path: Path, case: str, size: int, bias: bool) -> None:
    """As the classifier that config.json names, nothing missing, and with the values that Megatron-Core computes."""
    from transformers import AutoModelForTokenClassification

    make(CASES[case], tmp_path / "causal")
    found = ranks.run(
        values, 2, path=str(tmp_path / "causal"), case=case, size=size, bias=bias, save_to=str(tmp_path / "critic")
    )
    theirs, report = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "critic", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    missing = {"score.bias"} if not bias else set()  # a token classifier has one, a sequence classifier has none
    assert set(report["missing_keys"]) == missing and not report["unexpected_keys"]
    if not bias:
        theirs.score.bias.data.zero_()
    with torch.no_grad():
        expected = theirs.eval()(tokens_of(CASES[case])).logits
    assert expected.shape[-1] == size
    torch.testing.assert_close(found[-1], expected, atol=1e-4, rtol=0)


def with_mtp(*, path: str) -> list[str]:
    from mbridge import init_parallel

    init_parallel()
    bridge = bridge_of(path)
    chunks = bridge.get_model(path, post_model_creation_callbacks=[put_head(1, bias=False)])
    original = read_all(Path(path))
    expected = {name: t for name, t in original.items() if name != "lm_head.weight" and "shared_head.head" not in name}
    expected["score.weight"] = initial(1, bridge.raw_config["hidden_size"])
    return tensor_problems("MTP", dict(bridge.export_weights(chunks)), expected)


@pytest.mark.slow
def test_copies_of_an_output_layer_that_is_not_there(ranks: Any, tmp_path: Path) -> None:
    """DeepSeek-V3's files repeat the output layer in each MTP layer; with a head there is nothing to repeat."""
    model = replace(MODELS["deepseek_v3"], hidden=16, num_mtp=1)
    tensors = model.coded(torch.float32)
    at = f"model.layers.{model.layers}."
    tensors[at + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[at + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(model.config()))
    assert ranks.run(with_mtp, 1, path=str(tmp_path)) == [[]]


def frozen(*, path: str, other: str, topology: dict[str, int], ddp: bool) -> list[str]:
    """Everything but the second layer's attention is frozen by a callback, as for a partly trained model."""
    from mbridge import init_parallel

    def freeze(model: Any, **keywords: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "layers.1.self_attention" in name

    init_parallel(**topology)
    bridge = bridge_of(path)
    chunks = bridge.get_model(path, wrap_with_ddp=ddp, post_model_creation_callbacks=[freeze])
    problems = tensor_problems("built", dict(bridge.export_weights(chunks)), read_all(Path(path)))
    before = [parameter.requires_grad for chunk in chunks for parameter in chunk.parameters()]
    bridge.load_weights(chunks, other)
    problems += tensor_problems("again", dict(bridge.export_weights(chunks)), read_all(Path(other)))
    after = [parameter.requires_grad for chunk in chunks for parameter in chunk.parameters()]
    if before != after or all(before):
        problems.append(f"frozen before: {before}, after: {after}")
    return problems


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "grid", "ddp"),
    [(MODEL, "one rank", False), (TIED, "TP2 PP2", True), (MODEL, "TP2 PP2", True)],
    ids=["untied, one rank", "tied, TP2 PP2, DDP", "untied, TP2 PP2, DDP"],
)
def test_frozen_parameters(ranks: Any, tmp_path: Path, model: Any, grid: str, ddp: bool) -> None:
    path = write(model, tmp_path / "hf")
    other = write(model, tmp_path / "other", {name: -t for name, t in model.coded(torch.float32).items()})
    num_ranks, topology = GRIDS[grid]
    found = ranks.run(frozen, num_ranks, path=str(path), other=str(other), topology=topology, ddp=ddp)
    assert found == [[]] * num_ranks


# ---- pure


def test_the_rows_of_a_head() -> None:
    for model in (MODEL, TIED):
        rows = find_family("qwen2").rows(normalise(model.config()))
        plain = [row for row in rows if row.mcore != ("output_layer.weight",)]
        headed = with_value_head(rows, ValueHead(2, bias=True, dtype=torch.float64), model.hidden)
        assert headed[: len(plain)] == plain
        assert [(row.mcore, row.hf, row.shapes) for row in headed[len(plain) :]] == [
            (("output_layer.weight",), ("score.weight",), ((2, model.hidden),)),
            (("output_layer.bias",), ("score.bias",), ((2,),)),
        ]
        assert all(row.op == Replicated() and row.dtype is torch.float64 for row in headed[len(plain) :])


def test_without_a_model_a_head_can_be_told_of() -> None:
    names = {spec.name: spec.shape for spec in AutoBridge.from_config(MODEL.config(), value_head=1).hf_tensors()}
    assert names["score.weight"] == (1, MODEL.hidden)
    assert "lm_head.weight" not in names and "score.bias" not in names


def test_a_config_that_is_one_of_a_classifier_stays_as_it_is() -> None:
    raw = {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "good"}, "label2id": {"good": 0}}
    assert as_classifier(raw, 1, bias=False) == raw
    two = as_classifier({"architectures": ["Qwen2ForCausalLM"]}, 2, bias=True)
    assert two == {"architectures": ["Qwen2ForTokenClassification"]}  # two labels are transformers' default
    one = as_classifier({"architectures": ["Qwen2ForCausalLM"]}, 1, bias=False)
    assert (one["id2label"], one["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
