"""walk: names, layer numbers and what is left out, on stand-in modules without Megatron-Core, then on real chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small_qwen2
from torch import nn

from mbridge.errors import ModelError
from mbridge.megatron.walk import LocalTensor, unwrap, walk


class Layer(nn.Module):
    """Bears the names of a TransformerEngine layer with experts."""

    def __init__(self, layer_number: object) -> None:
        super().__init__()
        if layer_number is not None:
            self.layer_number = layer_number
        self.self_attention = nn.Module()
        self.self_attention.linear_qkv = nn.Linear(4, 8, bias=False)
        self.self_attention.linear_qkv.layer_norm_weight = nn.Parameter(torch.ones(4))
        self.mlp = nn.Module()
        self.mlp.router = nn.Module()
        self.mlp.router.register_buffer("expert_bias", torch.zeros(2))
        self.mlp.router.register_buffer("local_tokens_per_expert", torch.zeros(2), persistent=False)


class Chunk(nn.Module):
    def __init__(self, numbers: list[object], mtp_numbers: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Layer(number) for number in numbers)
        if mtp_numbers:
            self.mtp = nn.Module()
            self.mtp.layers = nn.ModuleList()
            for number in mtp_numbers:
                layer = nn.Module()
                layer.layer_number = number
                # Megatron-Core numbers the layer inside as if it followed the decoder's; its depth is what counts here.
                layer.transformer_layer = Layer(number + 10)
                self.mtp.layers.append(layer)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def numbers(found: list[LocalTensor]) -> dict[tuple[int, str], int | None]:
    return {(local.chunk, local.name): local.global_layer for local in found}


def test_names_numbers_and_buffers_of_two_chunks() -> None:
    def layer(chunk: int, path: str, number: int) -> dict[tuple[int, str], int]:
        return {
            (chunk, f"{path}.self_attention.linear_qkv.weight"): number,
            (chunk, f"{path}.self_attention.linear_qkv.layer_norm_weight"): number,
            (chunk, f"{path}.mlp.router.expert_bias"): number,
        }

    chunks = [Chunk([1, 2]), Wrapper(Wrapper(Chunk([11], mtp_numbers=(1,))))]
    assert numbers(walk(chunks)) == {
        (0, "embedding.weight"): None,
        **layer(0, "decoder.layers.0", 0),
        **layer(0, "decoder.layers.1", 1),
        (1, "embedding.weight"): None,
        **layer(1, "decoder.layers.0", 10),
        **layer(1, "mtp.layers.0.transformer_layer", 0),
    }


def test_more_than_ten_layers_do_not_confuse_their_prefixes() -> None:
    found = numbers(walk(Chunk([100 + index for index in range(12)])))
    for index in range(12):
        assert found[0, f"decoder.layers.{index}.mlp.router.expert_bias"] == 99 + index


def test_tensors_are_the_live_ones() -> None:
    chunk = Chunk([1])
    by_name = {local.name: local.tensor for local in walk(chunk)}
    assert by_name["embedding.weight"] is chunk.embedding.weight
    assert by_name["decoder.layers.0.mlp.router.expert_bias"] is chunk.decoder.layers[0].mlp.router.expert_bias


def test_the_holder_has_what_the_module_holds_now() -> None:
    def current(local: LocalTensor) -> torch.Tensor:
        return local.holder[local.key]  # type: ignore[return-value]

    chunk = Chunk([1])
    found = {local.name: local for local in walk(Wrapper(chunk))}
    assert all(current(local) is local.tensor for local in found.values())
    router, weight, bias = (
        chunk.decoder.layers[0].mlp.router,
        found["embedding.weight"],
        found["decoder.layers.0.mlp.router.expert_bias"],
    )
    weight.tensor.data = torch.full((3, 4), 5.0)  # an optimizer or an offload: same object, other storage
    assert current(weight).data_ptr() == chunk.embedding.weight.data_ptr()
    assert current(weight).eq(5).all()
    chunk.embedding.weight = nn.Parameter(torch.full((3, 4), 6.0))  # another object
    router.expert_bias = torch.full((2,), 7.0)
    chunk.double()
    assert current(weight) is chunk.embedding.weight is not weight.tensor
    assert current(bias) is router.expert_bias is not bias.tensor
    assert current(bias).tolist() == [7.0, 7.0]
    del chunk.embedding.weight
    router.expert_bias = None
    assert weight.key not in weight.holder
    assert current(bias) is None


def test_a_shared_tensor_is_listed_once_under_its_first_name() -> None:
    first, second = Chunk([1]), Chunk([2])
    first.output_layer = nn.Linear(4, 3, bias=False)
    first.output_layer.weight = first.embedding.weight
    second.embedding.weight = first.embedding.weight
    names = [(local.chunk, local.name) for local in walk([first, second]) if local.global_layer is None]
    assert names == [(0, "embedding.weight")]


@pytest.mark.parametrize("number", [None, 0, "3"])
def test_a_layer_without_a_number_is_an_error(number: object) -> None:
    with pytest.raises(ModelError, match=r"chunk 0: layer decoder\.layers\.1 \(Layer\).*layer_number"):
        walk([Chunk([1, number])])


def test_no_chunks_is_an_error() -> None:
    with pytest.raises(ModelError, match="empty list"):
        walk([])


def test_unwrap_reaches_the_bare_model() -> None:
    chunk = Chunk([1])
    assert unwrap(Wrapper(Wrapper(chunk))) is chunk
    assert unwrap(chunk) is chunk


def layers_of_rank(*, topology: dict[str, int], transformer: dict[str, Any]) -> list[tuple[int, str, int]]:
    """(chunk, layer prefix, global layer) of this rank's real chunks, wrapped in Float16Module and DDP."""
    from mbridge.megatron import build_chunks, init_parallel

    init_parallel(**topology)
    chunks = build_chunks(
        small_qwen2(num_layers=8), dtype=torch.bfloat16, wrap_with_ddp=True, extra_transformer=transformer
    )
    return [
        (local.chunk, local.name.removesuffix(".mlp.linear_fc1.weight"), local.global_layer)
        for local in walk(chunks)
        if local.global_layer is not None and local.name.endswith(".mlp.linear_fc1.weight")
    ]


@pytest.mark.parametrize(
    ("world_size", "topology", "transformer", "expected"),
    [
        (1, {}, {}, [[[0, 1, 2, 3, 4, 5, 6, 7]]]),
        (2, {"pp": 2}, {}, [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]),
        (2, {"pp": 2}, {"num_layers_in_first_pipeline_stage": 3}, [[[0, 1, 2]], [[3, 4, 5, 6, 7]]]),
        (
            4,
            {"pp": 4},
            {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3},
            [[[0]], [[1, 2]], [[3, 4]], [[5, 6, 7]]],
        ),
        (2, {"pp": 2, "vpp": 2}, {}, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        (2, {"pp": 2, "vpp": 4}, {}, [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]),
        (
            2,
            {"pp": 2, "vpp": 2},
            {"num_layers_in_first_pipeline_stage": 2},
            [[[0], [4]], [[1, 2, 3], [5, 6, 7]]],
        ),
        (
            2,
            {"pp": 2, "vpp": 2},
            {"pipeline_model_parallel_layout": "Et*2|t|t*3|t*2L"},
            [[[0, 1], [3, 4, 5]], [[2], [6, 7]]],
        ),
    ],
    ids=["one", "PP2", "first", "first and last", "VPP2", "VPP4", "VPP2 first", "layout"],
)
def test_global_layers_of_real_chunks(
    ranks: Any,
    world_size: int,
    topology: dict[str, int],
    transformer: dict[str, Any],
    expected: list[list[list[int]]],
) -> None:
    found = ranks.run(layers_of_rank, world_size, topology=topology, transformer=transformer)
    assert found == [
        [
            (chunk, f"decoder.layers.{local}", layer)
            for chunk, layers in enumerate(of_rank)
            for local, layer in enumerate(layers)
        ]
        for of_rank in expected
    ]
