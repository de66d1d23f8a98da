"""Checkpoints that spell a table's tensors in another way: fused experts, repeated tensors, block-scaled fp8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mbridge import AutoBridge, CheckpointError
from mbridge.checkpoint import Checkpoint
from mbridge.fp8 import dequantise, scale_box, scale_shape
from mbridge.pieces import Box

HIDDEN, FFN, EXPERTS = 64, 48, 4
CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu", "vocab_size": 101,
    "hidden_size": HIDDEN, "intermediate_size": 96, "moe_intermediate_size": FFN, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 128, "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def plain_tensors() -> Tensors:
    """One tensor an expert, every element different."""
    generator = torch.Generator().manual_seed(0)
    specs = AutoBridge.from_config(CONFIG, dtype=torch.float32).hf_tensors()
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in specs}


def fuse(plain: Tensors, *, transposed: bool) -> Tensors:
    """What transformers 5 writes with save_original_format=False; transposed, what Qwen3-VL-MoE's files hold."""
    fused = {name: tensor for name, tensor in plain.items() if ".experts." not in name}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate_up = [
            torch.cat([plain[f"{prefix}{e}.gate_proj.weight"], plain[f"{prefix}{e}.up_proj.weight"]])
            for e in range(EXPERTS)
        ]
        down = [plain[f"{prefix}{e}.down_proj.weight"] for e in range(EXPERTS)]
        for name, matrices in (("gate_up_proj", gate_up), ("down_proj", down)):
            stack = torch.stack(matrices)
            fused[prefix + name] = (stack.transpose(1, 2) if transposed else stack).contiguous()
    return fused


def write(folder: Path, tensors: Tensors, config: dict[str, object] = CONFIG) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32):
    bridge = AutoBridge.from_pretrained(folder, dtype=dtype)
    models = bridge.get_model()
    bridge.load_weights(models, folder)
    return bridge, models


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_load_like_plain_ones_and_are_written_fused(tmp_path: Path, transposed: bool) -> None:
    plain = plain_tensors()
    fused = fuse(plain, transposed=transposed)
    _, expected = load(write(tmp_path / "plain", plain))
    bridge, models = load(write(tmp_path / "fused", fused))
    same(dict(models[0].named_parameters()), dict(expected[0].named_parameters()))
    same(dict(bridge.export_weights(models)), fused)
    bridge.save_weights(models, tmp_path / "saved")
    same(load_file(tmp_path / "saved" / "model.safetensors"), fused)


def test_a_fused_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    fused = fuse(plain_tensors(), transposed=False)
    name = "model.layers.1.mlp.experts.down_proj"
    fused[name] = fused[name][:, :, :-1].contiguous()
    folder = write(tmp_path / "fused", fused)
    bridge = AutoBridge.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=rf"shape: {name} is \[4, 64, 47\]"):
        bridge.load_weights(bridge.get_model(), folder)


def test_a_repeated_embedding_is_written_again(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = plain_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    bridge, models = load(write(tmp_path / "tied", tensors, config))
    same(dict(bridge.export_weights(models)), tensors)


def block_fp8(shape: tuple[int, int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp8 values, scales, and by plain loops over the blocks the fp32 weight that they stand for."""
    values = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator) + 0.5
    weight = values.float()
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            weight[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] *= scales[row, column]
    return values, scales, weight


@pytest.mark.parametrize("box", [Box((0, 0), (300, 200)), Box((100, 60), (260, 190)), Box((128, 128), (256, 200))])
def test_any_box_of_an_fp8_weight_is_dequantised(box: Box) -> None:
    values, scales, weight = block_fp8((300, 200), torch.Generator().manual_seed(1))
    assert scales.shape == scale_shape((300, 200))
    found = dequantise(values[box.slices], scales[scale_box(box).slices], box)
    assert torch.equal(found, weight[box.slices])


def test_an_fp8_checkpoint_loads_and_is_saved_in_bf16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = 192
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    config = {**CONFIG, "hidden_size": hidden, "moe_intermediate_size": 160, "quantization_config": quantisation}
    generator = torch.Generator().manual_seed(2)
    on_disk: Tensors = {}
    expected: Tensors = {}
    for spec in AutoBridge.from_config(config, dtype=torch.float32).hf_tensors():
        if spec.name.endswith("_proj.weight"):
            values, scales, expected[spec.name] = block_fp8(spec.shape, generator)  # type: ignore[arg-type]
            on_disk |= {spec.name: values, spec.name + "_scale_inv": scales}
        else:
            on_disk[spec.name] = expected[spec.name] = torch.randn(spec.shape, generator=generator)
    bridge, models = load(write(tmp_path / "fp8", on_disk, config))
    same(dict(bridge.export_weights(models)), expected)
    bridge.save_weights(models, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    same(saved, {n: t.bfloat16() if n.endswith("_proj.weight") else t for n, t in expected.items()})
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "saved in bfloat16" in caplog.text


def test_fp8_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    values, scales, _ = block_fp8((256, 256), torch.Generator().manual_seed(3))
    tensors = {"x": values, "x_scale_inv": scales[:1].contiguous()}
    folder = write(tmp_path / "fp8", tensors)
    with pytest.raises(CheckpointError, match=r"x_scale_inv has shape \[1, 2\]"):
        Checkpoint.open(folder)
