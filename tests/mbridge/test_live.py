"""LiveTensors: whatever is done to a module's tensors, the next access sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import nn

from mbridge.live import LiveTensors, reader


def pointers(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> Callable[[], list[int]]:
    """Reads, at each call, where the tensors are then."""
    read = reader(tensors, names)
    return lambda: [tensor.data_ptr() for tensor in read()]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False)
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(3, 2, bias=False)
        self.head.weight = self.block.linear.weight


NAMES = ["scale", "block.count", "block.hidden", "block.linear.weight", "head.weight"]


def test_names_are_those_of_all_parameters_and_buffers() -> None:
    module = Tied()
    live = LiveTensors.of(module)
    every = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    assert list(live) == NAMES
    assert sorted(every) == sorted(live)
    assert len(live) == len(NAMES)
    for name, tensor in every.items():
        assert live[name] is tensor
    assert live["head.weight"] is live["block.linear.weight"]
    assert list(LiveTensors.of(nn.Linear(1, 1))) == ["weight", "bias"]  # of the root itself


def test_a_swap_of_data_and_a_replaced_parameter_are_seen() -> None:
    module = Tied()
    live = LiveTensors.of(module)
    read = pointers(live, NAMES)
    before = read()
    module.block.linear.weight.data = torch.full((2, 3), 7.0)
    assert live["block.linear.weight"].eq(7).all()
    assert live["head.weight"].eq(7).all()
    module.scale = nn.Parameter(torch.zeros(9))
    assert live["scale"] is module.scale
    module.block.hidden = torch.zeros(1)
    assert live["block.hidden"] is module.block.hidden
    module.head.weight = nn.Parameter(torch.zeros(2, 3))  # tied no more
    assert live["head.weight"] is module.head.weight
    assert live["block.linear.weight"].eq(7).all()
    now = read()
    assert now == [live[name].data_ptr() for name in NAMES]
    assert [a == b for a, b in zip(before, now, strict=True)] == [False, True, False, False, False]


def test_what_the_module_dropped_is_a_key_error_until_it_is_back() -> None:
    module = Tied()
    live = LiveTensors.of(module)
    held = module.scale
    read = pointers(live, ["head.weight", "scale"]), pointers(live, ["head.weight", "block.count"])
    del module.scale
    module.block.count = None
    for name in ("scale", "block.count", "block.nothing", "never"):
        with pytest.raises(KeyError, match=name):
            _ = live[name]
        assert name not in live
        assert live.get(name) is None
    for name, of in zip(("scale", "block.count"), read, strict=True):
        with pytest.raises(KeyError, match=name):
            of()
    assert list(live) == NAMES  # names stay: what is gone is found by asking
    module.scale = held
    module.block.count = torch.tensor(6)
    assert live["scale"] is held
    assert live["block.count"] == 6
    for of in read:
        assert len(of()) == 2


def test_pointers_of_any_mapping() -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(5)}
    read = pointers(tensors, ["b", "a", "b"])
    assert read() == [tensors[name].data_ptr() for name in ("b", "a", "b")]
    tensors["b"] = torch.ones(7)
    assert read() == [tensors[name].data_ptr() for name in ("b", "a", "b")]
    del tensors["a"]
    with pytest.raises(KeyError, match="a"):
        read()
    assert pointers(tensors, [])() == pointers(LiveTensors({}), [])() == []
