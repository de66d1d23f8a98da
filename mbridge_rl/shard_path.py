"""The sharded path in an engine worker: of each bucket come the boxes that this worker needs, packed in one message.

The first refit brings whole buckets, which go through the engine's own loader. What then lies in the engine as it was
loaded is needed in boxes, which are copied straight into its parameters from the next refit on; what the engine's
loader has to see is needed in whole fusion groups. After a refit that failed, it all begins anew.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from mbridge.pieces import Box, Copy, Piece, join

from .broadcast_slots import BroadcastSlots
from .bucket_path import Assembly
from .buckets import Layout, Part, part_box, part_view
from .copy_plan import CopyTable, Executor, executor_for
from .errors import EngineLoadError
from .learning import learn, not_loaded
from .loading import check_loaded, load
from .local_copies import typed_views
from .messages import Load
from .needs import Packing, plan_packing, write_needs
from .placement import Expected, expected_of_tensors
from .target import Examined, Target
from .transports.base import NUM_SLOTS


@dataclass(frozen=True)
class _Program:
    """What is done with what comes in the slots, bucket by bucket."""

    parts: list[list[tuple[Part, torch.Tensor]]]  # for the engine's loader
    executors: list[Executor]  # straight into the engine; none: all goes through the loader
    modules: frozenset[str] | None  # that the loader fills; None: all
    loaded: set[str] | None  # engine names that the loader then writes, if it tells


class ShardPath:
    """One refit after the other, bucket by bucket."""

    def __init__(self, layout: Layout, target: Target, examined: Examined, slots: BroadcastSlots) -> None:
        self.reloaded: list[str] = []  # of interest on the direct path only
        self.num_buckets = layout.num_buckets
        self.changed: dict[str, str] | None = None
        """Engine name -> why it does not hold what was loaded as it was loaded; None until a refit has shown it."""
        self._layout, self._target, self._slots = layout, target, slots
        self._found, self._placement = examined.found, examined.placement
        self._shapes = {spec.name: spec.shape for spec in layout.tensors}
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in examined.placement.pieces:
            self._pieces[piece.hf_name].append(piece)
        self._assembly = Assembly(layout, target.device)
        dtypes = {spec.dtype for spec in layout.tensors}
        self._typed = [typed_views(slots.slot(i), dtypes) for i in range(NUM_SLOTS)]
        whole = [
            [
                (part, part_view(slots.slot(part.bucket % NUM_SLOTS), layout.tensors[part.tensor], part))
                for part in bucket
            ]
            for bucket in layout.by_bucket()
        ]
        self._whole = _Program(whole, [], None, self._found.loaded)
        self._sharded: _Program | None = None  # once it is learnt
        self._program = self._whole  # of this refit
        self._loaded: set[str] = set()
        self._expected: list[Expected] = []
        self._before: dict[str, int] = {}

    @property
    def reasons(self) -> dict[str, str]:
        """Engine module -> why it is not written directly."""
        return self._placement.opaque

    @property
    def extra_bytes(self) -> int:
        executors = self._sharded.executors if self._sharded is not None else []
        return self._assembly.num_bytes + self._target.kept_bytes + sum(e.table_bytes for e in executors)

    def begin(self) -> None:
        """The engine's update begins when it is known how the buckets come, in `apply`."""

    def apply(self, message: Load) -> None:
        if message.bucket == 0:
            self._start()
        program = self._program
        if program.executors:
            self._copy(program.executors[message.bucket], message.bucket)
        # A bucket holds whole groups, or the end of one that is put together: all stay valid until the next.
        ready = dict(self._assembly.ready(program.parts[message.bucket]))
        if program is self._whole:
            pieces = [piece for name in ready for piece in self._pieces.get(name, ())]
            self._expected += expected_of_tensors(ready, pieces, self._placement.formats)
        if ready:
            self._loaded |= load(self._target, ready.items())

    def finish(self) -> None:
        check_loaded(self._loaded, self._program.loaded)
        self._target.finish()
        if self._program is self._whole:
            self._learn()

    def forget(self) -> None:
        """A refit failed: trust nothing of what was learnt. The next one brings whole buckets."""
        self._release()
        self.changed = None

    def close(self) -> None:
        self._release()
        self._whole.parts.clear()
        self._typed.clear()
        self._slots.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if not self._slots.plan:
            self._release()  # if rank 0 trusts nothing of it any more
            self._before = not_loaded(self._target, self._placement)
        self._program = self._sharded or self._whole
        self._assembly.restart()
        self._loaded, self._expected = set(), []
        self._target.begin(self._program.modules)

    def _release(self) -> None:
        if self._sharded is not None:
            for executor in self._sharded.executors:
                executor.release()
        self._sharded, self._program = None, self._whole
        self._slots.expect(None)

    def _copy(self, executor: Executor, bucket: int) -> None:
        if not len(executor.table):
            return
        live = self._target.live()
        slot = {str(dtype): view for dtype, view in self._typed[bucket % NUM_SLOTS].items()}
        executor.bind(slot, {e.name: live[e.name] for e in executor.table.destinations})
        executor.run()

    def _learn(self) -> None:
        """After a refit with whole buckets: find out what is needed of them, and plan what is done with it."""
        placement, layout = self._placement, self._layout
        self.changed = learn(self._target, placement, self._expected, self._shapes, self._before)
        self._expected = []
        opaque = placement.reloaded_names()
        numbers = {t for group in layout.groups if any(layout.tensors[t].name in opaque for t in group) for t in group}
        specs = tuple(layout.tensors[t] for t in sorted(numbers))
        reloaded = {spec.name for spec in specs}
        rehearsed = self._target.rehearse(specs)
        unread = opaque & self._found.consumed - rehearsed.consumed
        if unread:
            raise EngineLoadError(
                f"the engine's loader, given {len(specs)} tensors of its own, leaves {len(unread)} unread",
                tensor=min(unread),
            )
        direct = [piece for piece in placement.pieces if piece.hf_name not in reloaded]
        boxes = [(spec.name, Box.whole(spec.shape)) for spec in specs] + [(p.hf_name, p.box) for p in direct]
        packing = plan_packing(layout, boxes)
        self._sharded = _Program(
            self._needed_parts(packing, numbers),
            self._executors(packing, direct),
            frozenset(placement.opaque),
            rehearsed.loaded,
        )
        self._slots.expect(write_needs(layout, boxes, packing), packing.sizes)

    def _needed_parts(self, packing: Packing, numbers: set[int]) -> list[list[tuple[Part, torch.Tensor]]]:
        """The parts of whole tensors `numbers`, where they lie in the messages."""
        found: list[list[tuple[Part, torch.Tensor]]] = []
        for bucket, parts in enumerate(self._layout.by_bucket()):
            typed = self._typed[bucket % NUM_SLOTS]
            places = {(piece.hf_name, piece.box): piece for piece in packing.pieces(bucket)}
            found.append([])
            for part in parts:
                if part.tensor not in numbers:
                    continue
                spec = self._layout.tensors[part.tensor]
                box = part_box(spec, part)
                place = places.get((spec.name, box))
                assert place is not None or not box.numel, (spec, part)
                view = typed[spec.dtype][:0].view(box.shape) if place is None else place.region.of(typed[spec.dtype])
                found[-1].append((part, view))
        return found

    def _executors(self, packing: Packing, direct: list[Piece]) -> list[Executor]:
        """For each bucket, the copies of its message into the engine."""
        formats = self._placement.formats
        dtypes = {str(spec.dtype): spec.dtype for spec in self._layout.tensors}
        messages = [
            Piece(p.hf_name, p.box, f"{bucket} {p.local_name}", p.region)
            for bucket in range(self.num_buckets)
            for p in packing.pieces(bucket)
        ]
        copies: list[list[Copy]] = [[] for _ in range(self.num_buckets)]
        for copy in join(messages, direct):
            bucket, _, dtype = copy.source_name.partition(" ")
            copies[int(bucket)].append(copy._replace(source_name=dtype))
        assert sum(c.box.numel for b in copies for c in b) == sum(p.box.numel for p in direct), "a box is missing"
        kept = {piece.local_name: formats[piece.local_name].dtype for piece in direct}
        return [executor_for(CopyTable.of(bucket, dtypes, kept), self._target.device) for bucket in copies]
