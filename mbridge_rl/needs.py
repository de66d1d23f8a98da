"""What workers need of the HF tensors, and how that is packed, bucket by bucket. Pure: integers and names.

Workers that need the same boxes (rank t of every tensor-parallel replica) are a class: they get one message for each
bucket. Trainers and workers plan it from the same boxes, each by itself, and compare digests before the first byte.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from mbridge.errors import PlanError
from mbridge.pieces import Box, Copy, Piece, Region, Shape, TensorSpec, first_overlap, join

from .broadcast_plan import packed
from .buckets import Layout, destination_pieces
from .errors import ProtocolError
from .messages import Needs


@dataclass(frozen=True)
class Packing:
    """The messages of one class. Names of regions are dtypes: of a slot and of a message, as elements of that dtype."""

    copies: list[list[Copy]]  # of each bucket: boxes, from the bucket's slot to the message
    sizes: list[int]  # bytes of each bucket's message; 0 where nothing is needed
    digest: str  # equal if the layout and all of this is

    def __str__(self) -> str:
        num_boxes = sum(len(copies) for copies in self.copies)
        return f"plan {self.digest} ({num_boxes:,} boxes in {sum(self.sizes):,} bytes)"

    def pieces(self, bucket: int) -> list[Piece]:
        """What the bucket's message holds where."""
        return [Piece(c.hf_name, c.box, c.destination_name, c.destination) for c in self.copies[bucket]]


def plan_packing(layout: Layout, boxes: Iterable[tuple[str, Box]]) -> Packing:
    """How these boxes of HF tensors travel. They may come twice, overlap and be unfolded.

    A message is never larger than its bucket: what would not be smaller in boxes travels as it lies there.
    """
    wanted: dict[str, set[Box]] = defaultdict(set)
    for name, box in boxes:
        wanted[name].add(box)
    places = destination_pieces(layout)
    apart = [
        Piece(spec.name, box, "", Region.contiguous(box.shape))
        for spec in layout.tensors
        for box in _disjoint(spec, wanted.get(spec.name, set()))
    ]
    found: dict[tuple[str, str], list[tuple[Box, Region]]] = defaultdict(list)  # bucket, HF name
    for copy in join(places, apart):
        found[copy.source_name, copy.hf_name].append((copy.box, copy.source))

    dtypes = {spec.name: spec.dtype for spec in layout.tensors}
    copies: list[list[Copy]] = [[] for _ in range(layout.num_buckets)]
    sizes = [0] * layout.num_buckets
    for place in places:
        name, bucket, dtype = place.hf_name, int(place.local_name), dtypes[place.hf_name]
        parts = found[place.local_name, name]
        offsets, end = packed([box.numel * dtype.itemsize for box, _ in parts])
        if end >= packed([place.box.numel * dtype.itemsize])[1] and parts:
            parts, (offsets, end) = [(place.box, place.region)], packed([place.box.numel * dtype.itemsize])
        for (box, region), offset in zip(parts, offsets, strict=True):
            into = Region.contiguous(box.shape, (sizes[bucket] + offset) // dtype.itemsize)
            copies[bucket].append(Copy(name, box, str(dtype), region, str(dtype), into))
        sizes[bucket] += end
    return Packing(copies, sizes, _digest(layout, copies, sizes))


def write_needs(layout: Layout, boxes: Iterable[tuple[str, Box]], packing: Packing) -> Needs:
    """`boxes` as a message. A model has few shapes, so each box is told once, with all tensors that have it."""
    number = {spec.name: i for i, spec in enumerate(layout.tensors)}
    tensors: dict[Box, set[int]] = defaultdict(set)
    for name, box in boxes:
        tensors[box].add(number[name])
    return Needs(packing.digest, [(box.start, box.stop, sorted(tensors[box])) for box in sorted(tensors, key=_order)])


def read_needs(layout: Layout, needs: Needs) -> list[tuple[str, Box]]:
    """The boxes that `write_needs` wrote. Raises ProtocolError for a tensor or a box that there is not."""
    boxes = []
    for start, stop, numbers in needs.boxes:
        for number in numbers:
            if not 0 <= number < len(layout.tensors):
                raise ProtocolError(f"a worker needs tensor {number} of {len(layout.tensors)}", phase="stream")
            spec, box = layout.tensors[number], Box(tuple(start), tuple(stop))
            if not _is_inside(spec, box):
                text = f"a worker needs {list(start)} to {list(stop)} of a tensor of shape {list(spec.shape)}"
                raise ProtocolError(text, phase="stream", tensor=spec.name)
            boxes.append((spec.name, box))
    return boxes


def _is_inside(spec: TensorSpec, box: Box) -> bool:
    whole = Box.whole(spec.shape)
    if len(box.start) == len(spec.shape) + 1 and spec.shape and spec.shape[-1] % 2 == 0:
        whole = whole.unfolded()
    if len(box.start) != len(whole.start) or len(box.stop) != len(whole.stop):
        return False
    return all(0 <= a <= b <= n for a, b, n in zip(box.start, box.stop, whole.stop, strict=True))


def _disjoint(spec: TensorSpec, boxes: set[Box]) -> list[Box]:
    """`boxes` of a tensor in one order and one view, none twice: the whole tensor, if it is not as simple as that."""
    whole = Box.whole(spec.shape)
    found = [box for box in boxes if box.numel]
    try:
        if len({len(box.start) for box in found}) > 1:
            found = [box if len(box.start) > len(spec.shape) else box.unfolded() for box in found]
    except PlanError:
        return [whole]
    found = sorted(set(found), key=_order)
    return found if first_overlap(found) is None else [whole]


def _order(box: Box) -> tuple[int, Shape, Shape]:
    return len(box.start), box.start, box.stop


def _digest(layout: Layout, copies: list[list[Copy]], sizes: list[int]) -> str:
    digest = hashlib.blake2b(repr(layout.tensors).encode(), digest_size=8)
    for bucket, size in zip(copies, sizes, strict=True):
        digest.update(repr(size).encode())
        for c in bucket:
            digest.update(repr((c.hf_name, c.box.start, c.box.stop, c.source, c.destination)).encode())
    return digest.hexdigest()
