"""TransformerEngine's parameter names and shapes, without TransformerEngine: stand-in modules go through the Bridge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.mbridge.reference import Model, local_tensors
from tests.mbridge.test_bridge_ranks import tensor_problems

pytestmark = pytest.mark.slow

MODELS = {
    "llama": Model("llama", layers=4),
    "qwen2": Model("qwen2", layers=4),
    "qwen2 tied": Model("qwen2", layers=4, tied=True),
    "qwen3": Model("qwen3", layers=4),
}
# name: (ranks, topology, layers of each chunk of each stage)
STAGES: dict[str, tuple[int, dict[str, int], list[list[list[int]]]]] = {
    "TP2": (2, {"tp": 2}, [[[0, 1, 2, 3]]]),
    "PP2 uneven": (2, {"pp": 2}, [[[0]], [[1, 2, 3]]]),
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}, [[[0], [2]], [[1], [3]]]),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}, [[[0, 1]], [[2, 3]]]),
}


class Wrapper(nn.Module):
    """As DDP and Float16Module hold what they wrap."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def stand_in(shapes: dict[str, torch.Tensor], layers: Sequence[int]) -> nn.Module:
    """Plain modules with these parameters: layers counted from 0 here, `layer_number` from 1 in the model."""
    root = nn.Module()
    for full_name, tensor in shapes.items():
        name = full_name
        for local, layer in enumerate(layers):
            name = name.replace(f"decoder.layers.{layer}.", f"decoder.layers.#{local}.")
        *path, leaf = name.replace("#", "").split(".")
        at = root
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(leaf, nn.Parameter(torch.full_like(tensor, float("nan"))))
    for local, layer in enumerate(layers):
        root.get_submodule(f"decoder.layers.{local}").layer_number = layer + 1
    return root


def through_the_bridge(*, path: str, name: str, topology: dict[str, int], stages: list[list[list[int]]]) -> list[str]:
    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(**topology)
    place = read_topology()[1]
    model, chunk_layers = MODELS[name], stages[place.pp]
    original = load_file(Path(path) / "model.safetensors")
    reference = [
        local_tensors(
            model, original, rank=place.tp, tp=topology.get("tp", 1), naming="te", layers=layers,
            first=place.pp == 0 and i == 0,
            last=place.pp == len(stages) - 1 and i == len(chunk_layers) - 1,
        )
        for i, layers in enumerate(chunk_layers)
    ]  # fmt: skip
    chunks = [stand_in(shapes, layers) for shapes, layers in zip(reference, chunk_layers, strict=True)]
    wrapped = [Wrapper(Wrapper(chunk)) for chunk in chunks]
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    bridge.load_weights(wrapped, path)
    problems = []
    for chunk, expected, layers in zip(chunks, reference, chunk_layers, strict=True):
        found = {}
        for local_name, parameter in chunk.named_parameters():
            parts = local_name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(layers[int(parts[2])])
            found[".".join(parts)] = parameter.data
        problems += tensor_problems("local", found, expected)
    return problems + tensor_problems("export", dict(bridge.export_weights(wrapped)), original)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", MODELS)
def test_load_and_export(ranks: Any, tmp_path: Path, name: str, stages: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name].config()))
    save_file(MODELS[name].coded(torch.float32), tmp_path / "model.safetensors")
    world_size, topology, layers = STAGES[stages]
    results = ranks.run(through_the_bridge, world_size, path=str(tmp_path), name=name, topology=topology, stages=layers)
    assert results == [[]] * world_size


def doubled_layers(*, path: str) -> str:
    from mbridge import AutoBridge, MBridgeError, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(pp=2)
    stage = read_topology()[1].pp
    original = load_file(Path(path) / "model.safetensors")
    layers = [[0, 1, 2, 3], [2, 3]][stage]
    held = local_tensors(
        MODELS["qwen2"], original, rank=0, tp=1, naming="te", layers=layers, first=stage == 0, last=stage == 1
    )
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunk = stand_in(held, layers)
    bridge.load_weights(chunk, path)
    try:
        list(bridge.export_weights(chunk))
    except MBridgeError as error:
        return f"{type(error).__name__}: {error}"
    return "exported"


def test_layers_that_two_stages_have_are_an_error_on_both(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["qwen2"].config()))
    save_file(MODELS["qwen2"].coded(torch.float32), tmp_path / "model.safetensors")
    for said in ranks.run(doubled_layers, 2, path=str(tmp_path), timeout_s=40.0):
        assert said.startswith("PlanError: several pipeline stages have")
        assert "model.layers.2.input_layernorm.weight" in said
        assert "model.layers.1." not in said
