"""Where an engine keeps HF tensors: what its loader writes, and which of its modules keep it as it was written.

A module is *opaque* when its tensors cannot be written from outside: its loader computes instead of copying, or the
engine repacks, quantises or derives something after loading. The recorder sees the first kind; the second kind shows
after a whole load, when what lies in the engine's memory is compared with what came (`compare_in_place`). No engine and
no model is known here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch

from mbridge.pieces import Copy, Piece, Region, Shape, first_overlap, row_major

from .checksum import checksums, hf_region
from .recorder import DryRun, engine_pieces, storage_key
from .views import NotABox, boxes_of_view


class Format(NamedTuple):
    """Shape, stride and dtype in which a loader fills a parameter."""

    shape: Shape
    stride: Shape
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Format:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


@dataclass(slots=True)
class Placement:
    """The engine's side of a join. `opaque` grows when more is learnt."""

    pieces: tuple[Piece, ...]  # what the loader writes where; local names are engine names
    formats: Mapping[str, Format]  # engine name -> how the loader wants to find it
    module_of: Mapping[str, str]  # engine name -> the module that it belongs to
    opaque: dict[str, str] = field(default_factory=dict)  # module -> why it cannot be written from outside
    computed: frozenset[str] = frozenset()  # HF names with which the loader does more than copy
    written: frozenset[str] = frozenset()  # engine names that the loader writes anything to
    kept: set[str] = field(default_factory=set)  # engine names that were once found as they had been loaded

    def reloaded_names(self) -> set[str]:
        """HF names that the engine's own loader has to see."""
        opaque = {piece.hf_name for piece in self.pieces if self.module_of[piece.local_name] in self.opaque}
        return opaque | self.computed

    def unwritten(self) -> dict[str, int]:
        """Engine name -> elements that no HF tensor goes to, of tensors that some go to (padding)."""
        left = {piece.local_name: _numel(self.formats[piece.local_name].shape) for piece in self.pieces}
        for piece in self.pieces:
            left[piece.local_name] -= piece.box.numel
        return {name: numel for name, numel in left.items() if numel}


def place(found: DryRun, tensors: Mapping[str, torch.Tensor], module_of: Mapping[str, str]) -> Placement:
    """What a dry run tells. `tensors`: the parameters and buffers by engine name, as they were during the dry run."""
    homes: dict[int, dict[tuple[int, int], str]] = defaultdict(dict)  # storage -> first and last element -> its owner
    for name, tensor in tensors.items():
        if tensor.numel():
            homes[storage_key(tensor)].setdefault(_span(_region_of(tensor)), name)  # tied ones are one
    pieces, strays = _owned_pieces(found, homes)
    formats = {name: Format.of(tensor) for name, tensor in tensors.items()}
    twice = _written_twice(pieces, formats)
    pieces = [piece for piece in pieces if piece.hf_name not in twice]
    computed = {**found.opaque, **strays, **twice}
    written = found.by_destination()
    placement = Placement(
        tuple(pieces),
        formats,
        module_of,
        computed=frozenset(computed),
        written=frozenset(name for key in written for name in homes.get(key, {}).values()),
    )
    traced: set[str] = set()
    for key, names in written.items():
        for owner in homes.get(key, {}).values():
            for name in sorted(names & computed.keys()):
                placement.opaque.setdefault(module_of[owner], f"{name}: {computed[name]}")
            traced |= names
    found.writes.clear()  # told; they hold on to the storages of the dry run
    lost = sorted((computed.keys() - traced) | strays.keys())
    if lost:
        # They may end up anywhere that is not accounted for.
        filled = {p.local_name for p in pieces} - placement.unwritten().keys()
        for name in tensors.keys() - filled:
            placement.opaque.setdefault(module_of[name], f"{lost[0]} may go here: {computed[lost[0]]}")
    return placement


def _owned_pieces(
    found: DryRun, homes: Mapping[int, Mapping[tuple[int, int], str]]
) -> tuple[list[Piece], dict[str, str]]:
    """`engine_pieces`, also where several tensors are views of one storage: each piece lies in one of them."""
    in_storages, strays = engine_pieces(found, {key: (str(key), 0) for key in homes})
    pieces: list[Piece] = []
    for piece in in_storages:
        region = piece.region
        low, high = _span(region)
        spans = homes[int(piece.local_name)]
        home = next((span for span in spans if span[0] <= low and high <= span[1]), None)
        if home is None:
            strays.setdefault(piece.hf_name, "it is copied to memory that no parameter holds alone")
        else:
            inside = Region(region.offset - home[0], region.shape, region.stride)
            pieces.append(Piece(piece.hf_name, piece.box, spans[home], inside))
    return [piece for piece in pieces if piece.hf_name not in strays], strays


def _written_twice(pieces: Sequence[Piece], formats: Mapping[str, Format]) -> dict[str, str]:
    """HF name -> reason, of those that the loader copies to elements to which it copies others: the order matters."""
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.local_name].append(piece)
    found: dict[str, str] = {}
    for name, own in by_name.items():
        spans = sorted(_span(piece.region) for piece in own)
        if all(a[1] < b[0] for a, b in pairwise(spans)):
            continue
        kept = formats[name]
        try:
            boxes = [
                box
                for piece in own
                for box, _ in boxes_of_view(kept.shape, piece.region.offset, piece.region.shape, piece.region.stride)
            ]
        except NotABox:
            boxes = []
        is_told = kept.stride == row_major(kept.shape) and len({len(box.start) for box in boxes}) == 1
        if not is_told or first_overlap(boxes) is not None:
            found |= {piece.hf_name: f"several tensors go to the same elements of {name}" for piece in own}
    return found


def _region_of(tensor: torch.Tensor) -> Region:
    return Region(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def _span(region: Region) -> tuple[int, int]:
    """First and last element that `region` touches."""
    steps = sum(max(n - 1, 0) * stride for n, stride in zip(region.shape, region.stride, strict=True))
    return region.offset, region.offset + steps


class Expected(NamedTuple):
    """An engine piece and the checksum that it must have."""

    piece: Piece
    checksum: int


def expected_of_copies(
    copies: Sequence[Copy],
    sources: Mapping[str, torch.Tensor],
    formats: Mapping[str, Format],
    shapes: Mapping[str, Shape],
) -> list[Expected]:
    """What the destinations of `copies` must hold, read from their sources."""
    same = [c for c in copies if sources[c.source_name].dtype == formats[c.destination_name].dtype]
    there = checksums([Piece(c.hf_name, c.box, c.source_name, c.source) for c in same], shapes, sources)
    expected = [Expected(_destination(c), total) for c, total in zip(same, there, strict=True)]
    for c in copies:
        dtype = formats[c.destination_name].dtype
        if sources[c.source_name].dtype != dtype:
            value = c.source.of(sources[c.source_name]).to(dtype).contiguous()
            piece = Piece(c.hf_name, c.box, "cast", Region.contiguous(c.box.shape))
            expected.append(Expected(_destination(c), checksums([piece], shapes, {"cast": value})[0]))
    return expected


def expected_of_tensors(
    tensors: Mapping[str, torch.Tensor], pieces: Iterable[Piece], formats: Mapping[str, Format]
) -> list[Expected]:
    """What engine `pieces` of whole HF `tensors` must hold."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    whole = [Copy(p.hf_name, p.box, p.hf_name, hf_region(p, shapes[p.hf_name]), p.local_name, p.region) for p in pieces]
    return expected_of_copies(whole, tensors, formats, shapes)


def compare_in_place(
    expected: Sequence[Expected],
    live: Mapping[str, torch.Tensor],
    formats: Mapping[str, Format],
    shapes: Mapping[str, Shape],
) -> dict[str, str]:
    """Engine name -> why it does not hold what was loaded, as it was loaded. Names that are not in it do."""
    reasons: dict[str, str] = {}
    comparable = []
    for item in expected:
        name = item.piece.local_name
        now = Format.of(live[name]) if name in live else None
        if now != formats[name]:
            reasons[name] = f"loaded as {_text(formats[name])}, kept as {_text(now)}"
        elif not live[name].is_contiguous():
            reasons[name] = f"kept as {_text(now)}, which is not contiguous"
        else:
            comparable.append(item)
    found = checksums([item.piece for item in comparable], shapes, live)
    for item, total in zip(comparable, found, strict=True):
        if total != item.checksum:
            reasons[item.piece.local_name] = "its values change after loading"
    return reasons


def _destination(copy: Copy) -> Piece:
    return Piece(copy.hf_name, copy.box, copy.destination_name, copy.destination)


def _numel(shape: Shape) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _text(kept: Format | None) -> str:
    return "nothing" if kept is None else f"{list(kept.shape)} {kept.dtype} of stride {list(kept.stride)}"
