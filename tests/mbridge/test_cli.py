"""`python -m mbridge`, run as users run it, on checkpoints that transformers wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mbridge.cli.expected import expected_tensors, fitting_topology, layers_of_rank
from mbridge.cli.files import DiskTensors, difference
from mbridge.cli.inspection import describe
from mbridge.errors import TopologyError
from mbridge.ops import ColumnOrReplicated

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MOE = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 2,
}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **SIZES},
    "llama tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", **SIZES, **MOE, "norm_topk_prob": True},
    "deepseek_v3": {"model_type": "deepseek_v3", **SIZES, **MLA},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a config -> folder of a bf16 checkpoint in several files; made once each."""
    from transformers import AutoConfig, AutoModelForCausalLM

    @cache
    def made(case: str) -> Path:
        folder = tmp_path_factory.mktemp("hf") / case.replace(" ", "-")
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[case]), dtype=torch.bfloat16)
            for name, parameter in model.named_parameters():
                with torch.no_grad():
                    parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.data = torch.randn(buffer.shape)
        model.save_pretrained(folder, max_shard_size="60KB")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "none"}')
        return folder

    return made


def run(*arguments: object, status: int = 0, timeout_s: float = 240) -> str:
    """Run `python -m mbridge` with `arguments`; its output and, if it fails, its errors."""
    done = subprocess.run(
        [sys.executable, "-m", "mbridge", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=timeout_s, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout + (done.stderr if status else "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("qwen2", []),
        ("qwen3_moe", ["--ep", 2]),
        ("llama tied", ["--pp", 2, "--vpp", 2]),
        ("llama tied", ["--pp", 2, "--layers-first", 1, "--layers-last", 3]),
        ("deepseek_v3", ["--tp", 2, "--ep", 2, "--etp", 1]),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(map(str, value)).replace("--", " ") or "one rank",
)
def test_verify(checkpoint: Any, case: str, arguments: list[object]) -> None:
    out = run("verify", checkpoint(case), "--forward", *arguments)
    num_tensors = len(all_tensors(checkpoint(case)))
    assert f"{num_tensors} tensors compared bit for bit" in out
    assert "max |logits - transformers'|" in out
    assert out.endswith("\n0 differences\n")


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_verify_names_every_tensor_that_differs(checkpoint: Any, tmp_path: Path) -> None:
    """Against another checkpoint: one element, one sign of a zero, a dtype that cannot hold it, a name on each side."""
    tensors = all_tensors(checkpoint("qwen2"))
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1
    tensors["model.layers.1.self_attn.q_proj.bias"] = tensors["model.layers.1.self_attn.q_proj.bias"].float() + 1e-7
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    out = run("verify", checkpoint("qwen2"), "--tp", 2, "--no-forward", "--against", tmp_path, status=1)
    assert "forward  skipped: --no-forward" in out
    assert "4 differences" in out
    assert "model.layers.2.mlp.up_proj.weight: 1 of 2240 elements differ; the first, [3, 5], is" in out
    assert "model.layers.1.self_attn.q_proj.bias: " in out
    assert "model.norm.weight: exported [40], not in the files" in out
    assert "model.extra.weight: in the files, not exported" in out


@pytest.mark.slow
def test_verify_sees_a_file_that_shadows_a_tensor(checkpoint: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("qwen2"), tmp_path / "shadowed")
    norm = all_tensors(folder)["model.norm.weight"]
    save_file({"model.norm.weight": norm + 1}, folder / "other.safetensors", metadata={"format": "pt"})
    out = run("verify", folder, "--no-forward", status=1)
    assert "1 differences" in out
    assert "model.norm.weight: 40 of 40 elements differ" in out
    assert "(in other.safetensors)" in out


@pytest.mark.slow
def test_verify_of_another_forward_pass(checkpoint: Any, tmp_path: Path) -> None:
    """Weights move as they should, but what Megatron-Core makes of them is not what transformers does."""
    folder = shutil.copytree(checkpoint("llama tied"), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    # A field that mbridge is told to ignore, and that transformers reads.
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert "hidden_act" in run("verify", folder, status=2)
    out = run("verify", folder, "--forward", "--ignore-config-field", "hidden_act", status=1)
    assert "1 differences" in out
    assert "forward: max |logits - transformers'|" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["verify", "/no/such/folder"], "is neither a folder nor a hub id"),
        (["verify", "QWEN2", "--pp", 3], "cannot be split over pp=3"),
        (["verify", "QWEN2", "--tp", 0], "sizes must be positive: tp = 0"),
        (["verify", "QWEN2", "--device", "cuda"], "needs a GPU for each of 1 ranks, found 0"),
        (["verify", "TRUNCATED", "--no-forward"], "model-00002-of-00002.safetensors cannot be read"),
        (["inspect", "QWEN2", "--tp", 3], "do not divide over 3 ranks"),
        (["inspect", "QWEN2", "--rank", 1], "rank 1 is outside a world of 1 ranks"),
        (["convert", "QWEN2", "OUT", "--max-shard-size", "5 parsecs"], "expected a size such as 500MB"),
        (["convert", "TRUNCATED", "OUT"], "cannot be read"),
        (["verify"], "the following arguments are required: path"),
        (["refit"], "invalid choice: 'refit'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_clear_error(
    checkpoint: Any, tmp_path: Path, arguments: list[object], text: str
) -> None:
    truncated = shutil.copytree(checkpoint("qwen2"), tmp_path / "truncated")
    file = truncated / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    places = {"QWEN2": checkpoint("qwen2"), "TRUNCATED": truncated, "OUT": tmp_path / "out"}
    assert text in run(*(places.get(str(argument), argument) for argument in arguments), status=2)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_verify_says_what_a_rank_failed_of(checkpoint: Any) -> None:
    """Megatron-Core refuses tp=3 in the ranks themselves: the error is theirs, once, and no process is left."""
    out = run("verify", checkpoint("qwen2"), "--tp", 3, "--no-forward", status=2)
    assert "rank 0, 1, 2: TopologyError" in out
    assert "num_attention_heads=4" in out


def test_inspect_as_a_table(checkpoint: Any) -> None:
    out = run("inspect", checkpoint("qwen3_moe"), "--tp", 2, "--pp", 2, "--ep", 2, "--rank", 5)
    assert "family       qwen3_moe" in out
    assert "tp=2, pp=2, vpp=1, ep=2, etp=2, dp=2; here tp 1, pp 1, ep 0, etp 1, dp 0" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line and not line.startswith(" ")}
    assert "[32, 40] bfloat16" in lines["decoder.layers.2-3.self_attention.linear_qkv.weight"].replace("64", "32")
    fc1 = lines["decoder.layers.3.mlp.experts.linear_fc1.weight0-1"]
    assert "[24, 40] bfloat16" in fc1
    assert "model.layers.3.mlp.experts.0-1.gate_proj.weight [12:24, 0:40]" in fc1
    assert "model.layers.2.mlp.gate_proj.weight [28:56, 0:40]" in out  # the dense layer of the stage
    assert "model.embed_tokens" not in out


def test_inspect_needs_no_megatron_and_no_process_group(checkpoint: Any) -> None:
    code = (
        "import sys; from mbridge.cli import main; status = main(sys.argv[1:]); import torch.distributed as dist\n"
        "assert not dist.is_initialized()\n"
        "assert not {'megatron', 'transformers', 'vllm'} & {name.split('.')[0] for name in sys.modules}\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(checkpoint("qwen2")), "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_parameters"] == sum(tensor.numel() for tensor in all_tensors(checkpoint("qwen2")).values())
    # Every element of the model, once: on one rank the pieces are all of it.
    pieces = [piece for tensor in found["local_tensors"] for piece in tensor["pieces"]]
    assert {piece["hf_name"] for piece in pieces} == all_tensors(checkpoint("qwen2")).keys()
    assert found["local_bytes"] == 2 * found["num_parameters"]


TOPOLOGIES: list[tuple[str, dict[str, int], tuple[int | None, int | None]]] = [
    ("qwen2", {"tp": 2, "pp": 2}, (None, None)),
    ("llama tied", {"pp": 2, "vpp": 2}, (None, None)),
    ("llama tied", {"pp": 2}, (1, None)),
    ("llama tied", {"pp": 3}, (1, 1)),
    ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}, (None, None)),
    ("qwen3_moe", {"pp": 2, "ep": 2}, (None, None)),
    ("deepseek_v3", {"tp": 2, "ep": 2, "etp": 1}, (None, None)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes", "uneven"), TOPOLOGIES, ids=str)
def test_what_inspect_expects_is_what_megatron_core_builds(
    ranks: Any, checkpoint: Any, case: str, sizes: dict[str, int], uneven: tuple[int | None, int | None]
) -> None:
    topology = fitting_topology(**{"tp": 1, "pp": 1, "vpp": 1, "ep": 1, "etp": None, **sizes})  # type: ignore[arg-type]
    path = str(checkpoint(case))
    built = ranks.run(specs_on_rank, topology.world_size, path=path, sizes=sizes, uneven=uneven)
    model = describe(path, None, ())
    for rank, found in enumerate(built):
        at = topology.coordinates(rank)
        layers = layers_of_rank(model.num_layers, topology, at, *uneven)
        padded = model.bridge.megatron_config(topology.tp).gpt["vocab_size"]
        expected = expected_tensors(model.table, topology, at, naming="local", padded_vocab=padded, layers=layers)
        assert {tuple(e.spec) for e in expected} == set(found)
        te = expected_tensors(model.table, topology, at, naming="te", padded_vocab=padded, layers=layers)
        # TransformerEngine renames; it changes only the shapes of MLA's down projections.
        same = [(a, b) for a, b in zip(expected, te, strict=True) if not isinstance(a.row.op, ColumnOrReplicated)]
        assert all(a.spec[1:] == b.spec[1:] for a, b in same)


def specs_on_rank(
    *, path: str, sizes: dict[str, int], uneven: tuple[int | None, int | None]
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    from mbridge import AutoBridge, init_parallel

    init_parallel(**sizes)
    bridge = AutoBridge.from_pretrained(path)
    names = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    bridge.set_extra_args(**{n: v for n, v in zip(names, uneven, strict=True) if v is not None})
    models = bridge.get_model()
    return [(name, tuple(t.shape), t.dtype) for name, t in bridge.local_tensors(models).items()]


def test_layers_of_a_rank_are_each_layer_once_and_in_order() -> None:
    for num_layers, pp, vpp, first, last in [
        (12, 3, 2, None, None), (12, 2, 3, None, None), (11, 4, 1, 2, None), (10, 4, 1, None, 1), (12, 4, 2, 2, 2),
        (5, 2, 1, 2, 3), (7, 1, 1, None, None),
    ]:  # fmt: skip
        topology = fitting_topology(1, pp, vpp, 1, None)
        held = [layers_of_rank(num_layers, topology, topology.coordinates(rank), first, last) for rank in range(pp)]
        assert sorted(layer for layers in held for layer in layers) == list(range(num_layers))
        assert all(layers == sorted(layers) for layers in held)
        assert first is None or len(held[0]) == first
        assert last is None or len(held[-1]) == last
    for num_layers, pp, vpp, first, last in [
        (7, 2, 1, None, None),
        (6, 2, 2, None, None),
        (6, 1, 1, 2, None),
        (6, 2, 1, 2, 2),
    ]:
        topology = fitting_topology(1, pp, vpp, 1, None)
        with pytest.raises(TopologyError):
            layers_of_rank(num_layers, topology, topology.coordinates(0), first, last)


def test_convert_to_other_shards(checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint("qwen2")
    run("convert", source, tmp_path / "out", "--max-shard-size", "20KB")
    found, expected = all_tensors(tmp_path / "out"), all_tensors(source)
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype and found[name].equal(expected[name]) for name in expected)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > len(list(source.glob("*.safetensors")))
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert list((tmp_path / "out").glob(".*")) == []

    # Then into one file, in place: readers see the old or the new, and nothing of the old is left.
    run("convert", tmp_path / "out", tmp_path / "out", "--max-shard-size", "1GB")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == ["model.safetensors"]
    assert all(tensor.equal(expected[name]) for name, tensor in all_tensors(tmp_path / "out").items())


def test_convert_casts_all_but_what_must_stay_in_fp32(checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint("deepseek_v3")
    run("convert", source, tmp_path / "half", "--dtype", "float16")
    found, expected = all_tensors(tmp_path / "half"), all_tensors(source)
    assert found.keys() == expected.keys()
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for name, tensor in expected.items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.float16
        assert found[name].dtype is dtype
        assert found[name].equal(tensor.to(dtype))
    assert bias in found
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (source, tmp_path / "half")]
    assert names[0] == names[1]
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"float16"}


def test_differences_are_of_bits() -> None:
    zero = torch.zeros(2, 2)
    assert difference(zero, zero.clone(), rounded=False) is None
    assert "the first, [0, 0], is 0.0, expected -0.0" in str(difference(zero, -zero, rounded=False))
    nan = torch.full((3,), float("nan"))
    assert difference(nan, nan.clone(), rounded=False) is None
    scalar = torch.tensor(1.0)
    assert difference(scalar, scalar.clone(), rounded=False) is None
    assert "shape" in str(difference(zero, zero.view(4), rounded=False))
    wide = torch.tensor([1.0, 1.0 + 2**-20])
    assert difference(wide.bfloat16(), wide, rounded=True) is None
    assert "1 of 2" in str(difference(wide.bfloat16(), wide, rounded=False))
    assert difference(torch.ones(2).bfloat16(), torch.ones(2), rounded=False) is None


def test_fp8_files_are_undone_block_by_block(tmp_path: Path) -> None:
    weight = torch.randn(130, 200, generator=torch.Generator().manual_seed(3)).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.5, 2.0], [3.0, 0.25]])
    save_file({"w.weight": weight, "w.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    disk = DiskTensors.open(tmp_path)
    assert list(disk.files) == ["w.weight"]
    found = disk.read("w.weight", tmp_path / "model.safetensors")
    for row, column in [(0, 0), (0, 199), (127, 127), (128, 127), (129, 128)]:
        value = weight[row, column].float() * scales[row // 128, column // 128]
        assert found[row, column] == value.bfloat16()
