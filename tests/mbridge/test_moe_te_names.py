"""TransformerEngine's and GroupedMLP's expert layouts, without either: stand-in modules go through the Bridge."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.mbridge.moe_coded import MODELS
from tests.mbridge.moe_reference import Experts, Place, local_tensors
from tests.mbridge.test_bridge_ranks import read_all, tensor_problems
from tests.mbridge.test_te_names import Wrapper

pytestmark = pytest.mark.slow

# name: (ranks, topology, number of the first layer of each stage)
TOPOLOGIES: dict[str, tuple[int, dict[str, int], list[int]]] = {
    "EP2": (2, {"ep": 2}, [0]),
    "TP2 EP2 ETP1": (2, {"tp": 2, "ep": 2, "etp": 1}, [0]),
    "TP2 EP2 ETP2": (4, {"tp": 2, "ep": 2, "etp": 2}, [0]),
    "TP2 EP2 ETP1 PP2": (4, {"tp": 2, "ep": 2, "etp": 1, "pp": 2}, [0, 1]),
}
LAYER = re.compile(r"^(decoder|mtp)\.layers\.(\d+)\.")


def stand_in(tensors: dict[str, torch.Tensor], first_layer: int) -> nn.Module:
    """Plain modules with these tensors: decoder layers counted from 0 here, `layer_number` from 1 in the model."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        numbers = LAYER.match(name)
        if numbers and numbers[1] == "decoder":
            path[2] = str(int(path[2]) - first_layer)
        at = root
        for depth, part in enumerate(path):
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
            if numbers and depth == 2:
                at.layer_number = int(numbers[2]) + 1
        empty = torch.full_like(tensor, float("nan")).contiguous()
        if leaf == "expert_bias":
            at.register_buffer(leaf, empty)
        else:
            at.register_parameter(leaf, nn.Parameter(empty))
    return root


def through_the_bridge(
    *, path: str, name: str, topology: dict[str, int], firsts: list[int], experts: Experts, mtp_name: str, save_to: str
) -> list[str]:
    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(**topology)
    sizes, at = read_topology()
    model = MODELS[name]
    layers = range(*[*firsts, model.layers][at.pp : at.pp + 2])
    original = load_file(Path(path) / "model.safetensors")
    reference = local_tensors(
        model, original, Place(at.tp, sizes.tp, at.ep, sizes.ep, at.etp, sizes.expert_tp), naming="te", experts=experts,
        layers=layers, first=at.pp == 0, last=at.pp == sizes.pp - 1, mtp_name=mtp_name,
    )  # fmt: skip
    chunk = stand_in(reference, layers.start)
    models = [Wrapper(Wrapper(chunk))]
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    bridge.load_weights(models, path)
    problems = tensor_problems("local", bridge.local_tensors(models), reference)
    problems += tensor_problems("export", dict(bridge.export_weights(models)), original)
    bridge.save_weights(models, save_to)
    return problems


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("experts", ["grouped", "sequential", "legacy"])
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "glm4_moe"])
def test_load_export_and_save(ranks: Any, tmp_path: Path, name: str, experts: Experts, topology: str) -> None:
    model, folder = MODELS[name], tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config()))
    save_file(model.coded(torch.float32), folder / "model.safetensors")
    world_size, sizes, firsts = TOPOLOGIES[topology]
    results = ranks.run(
        through_the_bridge, world_size, path=str(folder), name=name, topology=sizes, firsts=firsts, experts=experts,
        mtp_name="transformer_layer" if experts == "legacy" else "mtp_model_layer", save_to=str(tmp_path / "saved"),
    )  # fmt: skip
    assert results == [[]] * world_size
    assert tensor_problems("saved", read_all(tmp_path / "saved"), read_all(folder)) == []
