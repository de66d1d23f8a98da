"""Cases of the memory that a transport shares: its slots, and what it lends."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import TransportError
from ..transports.base import NUM_SLOTS, Address, Lent, Transport
from .bench import raises


class Memory(NamedTuple):
    """A transport under test."""

    kind: type[Transport]
    slot_bytes: int
    device: str  # of what it lends


def slots(memory: Memory) -> None:
    """Two mappings of the same slots: what is written through one is read through the other; who creates destroys."""
    creator = memory.kind.create(memory.slot_bytes)
    try:
        peer = memory.kind.open(creator.address)
        for index in range(NUM_SLOTS):
            mine, theirs = creator.slot(index), peer.slot(index)
            for slot in (mine, theirs):
                assert slot.dtype == torch.uint8, "a slot is uint8"
                assert slot.shape == (memory.slot_bytes,), "a slot is flat and has slot_bytes"
                assert slot.data_ptr() % 16 == 0, "a slot is aligned for every dtype"
            mine.fill_(index + 1)
            assert theirs.eq(index + 1).all(), "the peer does not see what the creator wrote"
            theirs[::2] = 77
            assert mine[::2].eq(77).all(), "the creator does not see what the peer wrote"
        assert creator.slot(0)[1::2].eq(1).all(), "slots overlap"
        creator.everyone_attached()
        creator.slot(0).fill_(9)
        assert peer.slot(0).eq(9).all(), "everyone_attached() must not part those who are attached"
        peer.close()
        peer.close()
        creator.slot(1).fill_(3)
    finally:
        creator.close()
        creator.close()


def gone_when_closed(memory: Memory) -> None:
    """After the creator has closed, nobody can open its slots, and closed slots are no slots."""
    creator = memory.kind.create(memory.slot_bytes)
    address = creator.address
    creator.close()
    raises(TransportError, lambda: memory.kind.open(address).close(), "slots that were closed can still be opened")
    raises(TransportError, lambda: creator.slot(0), "a closed transport still has slots")


def lending(memory: Memory) -> None:
    """What is mapped is the tensors' own memory, views of one storage included."""
    kind, device = memory.kind, memory.device
    whole = torch.arange(3000, dtype=torch.float32, device=device)
    tensors = {
        "part": whole[100:200].view(10, 10),
        "other": torch.arange(77, device=device).to(torch.bfloat16),
        "scalar": torch.tensor(3.5, device=device),
        "tiny": torch.arange(3, device=device).to(torch.float8_e4m3fn),
        "whole": whole,
        "empty": torch.empty(0, device=device),
    }
    lent = kind.lend(tensors)
    assert set(lent.places) == tensors.keys() - {"empty"}, "every tensor with elements has a place, no other has"
    assert len(lent.segments) <= 4, "tensors of one storage lie in one segment"
    mapped = [kind.map_segment(address) for address in lent.segments]

    def check(name: str, violation: str) -> None:
        index, offset = lent.places[name]
        tensor, segment = tensors[name], mapped[index].bytes
        assert segment.dtype == torch.uint8, "a segment is uint8"
        assert segment.dim() == 1, "a segment is flat"
        there = segment[offset : offset + tensor.nbytes]
        assert torch.equal(there, tensor.reshape(-1).view(torch.uint8)), f"{name}: {violation}"

    for name in lent.places:
        check(name, "what is mapped are other bytes than the tensor's")
    whole[150] = -1
    assert tensors["part"][5, 0].eq(-1), "lending parted a tensor from its view"
    for name in lent.places:
        check(name, "what is written after lending is not seen")
    assert kind.lend(tensors) == lent, "the same memory, lent again, has the same addresses"
    moved = kind.lend({**tensors, "other": tensors["other"].clone()})
    assert _where(moved, "other") != _where(lent, "other"), "other memory has the same address"
    assert _where(moved, "part") == _where(lent, "part"), "a tensor that did not move has another address"
    for segment in mapped:
        segment.close()
        segment.close()
        raises(TransportError, lambda segment=segment: segment.bytes, "a closed segment still has bytes")  # type: ignore[misc]


def no_lending(memory: Memory) -> None:
    """Of a transport that only has slots."""
    tensors = {"a": torch.zeros(1, device=memory.device)}
    raises(TransportError, lambda: memory.kind.lend(tensors), "lent what cannot be mapped")


MEMORY_CASES: dict[str, Callable[[Memory], None]] = {
    "slots": slots,
    "gone_when_closed": gone_when_closed,
    "lending": lending,
}


def _where(lent: Lent, name: str) -> tuple[Address, int]:
    index, offset = lent.places[name]
    return lent.segments[index], offset
