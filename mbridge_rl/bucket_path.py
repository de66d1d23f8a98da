"""The bucket path in an engine worker: whole HF tensors come through shared slots, and the engine's loader takes them.

All modules are reloaded, until a refit has shown which the engine keeps as they were loaded: those are then loaded in
place. (A reload keeps a layer's tensors until they are all there: of a large MoE layer, many gigabytes.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import torch

from mbridge.pieces import Piece

from .buckets import Layout, Part, aligned, part_view
from .errors import EngineLoadError
from .learning import learn, not_loaded
from .loading import check_loaded, load
from .messages import Load
from .placement import Expected, compare_in_place, expected_of_tensors
from .target import Examined, Target


class Slots(Protocol):
    """The part of a transport that this path uses."""

    def slot(self, index: int) -> torch.Tensor: ...

    def close(self) -> None: ...


class BucketPath:
    """One refit after the other, bucket by bucket."""

    def __init__(self, layout: Layout, target: Target, examined: Examined, slots: Slots) -> None:
        self.reloaded: list[str] = []  # of interest on the direct path only
        self.num_buckets = layout.num_buckets
        self.changed: dict[str, str] | None = None
        """Engine name -> why it does not hold what was loaded as it was loaded; None until a refit has shown it."""
        self._expected: list[Expected] | None = None
        self._modules: frozenset[str] | None = None  # that need the engine's reload; None: all
        self._is_confirmed = False  # that the others come out right when they are loaded in place
        self._before: dict[str, int] = {}
        self._target, self._slots = target, slots
        self._found, self._placement = examined.found, examined.placement
        self._shapes = {spec.name: spec.shape for spec in layout.tensors}
        views = [slots.slot(0), slots.slot(1)]
        self._assembly = Assembly(layout, views[0].device)
        self._loaded: set[str] = set()
        self._program = [
            [(part, part_view(views[part.bucket % len(views)], layout.tensors[part.tensor], part)) for part in bucket]
            for bucket in layout.by_bucket()
        ]
        self._pieces: dict[str, list[Piece]] = {}
        for piece in examined.placement.pieces:
            self._pieces.setdefault(piece.hf_name, []).append(piece)

    @property
    def reasons(self) -> dict[str, str]:
        """Engine module -> why its loader cannot simply write into it, as far as that is known."""
        return self._placement.opaque

    @property
    def extra_bytes(self) -> int:
        return self._assembly.num_bytes + self._target.kept_bytes

    def begin(self) -> None:
        self._assembly.restart()
        self._loaded, self._expected = set(), None
        if self._modules is None and self._target.device.type != "cpu":
            self._before = not_loaded(self._target, self._placement)
        self._target.begin(self._modules)

    def apply(self, message: Load) -> None:
        if message.bucket == 0 and self._has_to_compare(message):
            self._expected = []
        tensors = self._assembly.ready(self._program[message.bucket])
        if self._expected is not None:
            ready = dict(tensors)  # a bucket holds whole groups, or the end of one that is put together: all stay valid
            pieces = [piece for name in ready for piece in self._pieces.get(name, ())]
            self._expected += expected_of_tensors(ready, pieces, self._placement.formats)
            tensors = iter(ready.items())
        self._loaded |= load(self._target, tensors)

    def finish(self) -> None:
        check_loaded(self._loaded, self._found.loaded)
        self._target.finish()
        if self._expected is None:
            return
        if self._modules is None:
            self.changed = learn(self._target, self._placement, self._expected, self._shapes, self._before)
            self._modules = frozenset(self._placement.opaque)
        else:
            self._confirm(self._expected, self._modules)

    def forget(self) -> None:
        """A refit failed: trust nothing of what was learnt. The next one reloads every module."""
        self.changed, self._modules, self._is_confirmed = None, None, False

    def close(self) -> None:
        self._program.clear()
        self._slots.close()

    def _has_to_compare(self, message: Load) -> bool:
        if self._modules is not None:
            self._is_confirmed |= message.is_checked  # the Check does the same
            return not self._is_confirmed
        # On a CPU engines repack nearly everything, and checksums take seconds: only if they are asked for.
        return message.is_checked or self._target.device.type != "cpu"

    def _confirm(self, expected: list[Expected], modules: frozenset[str]) -> None:
        """After the first refit that loaded all but `modules` in place: it must have come out as in a reload."""
        placement = self._placement
        changed = compare_in_place(expected, self._target.live(), placement.formats, self._shapes)
        wrong = [name for name in changed if placement.module_of[name] not in modules]
        if wrong:
            raise EngineLoadError(
                f"the engine's loader writes {len(wrong)} parameters otherwise in place than in a reload, such as "
                f"{wrong[0]}: {changed[wrong[0]]}"
            )
        self._is_confirmed = True


class Assembly:
    """Puts the tensors of fusion groups that lie in several buckets together again; whole groups pass as they are.

    Groups come one after the other, so one buffer of the largest such group serves them all, refit after refit.
    """

    def __init__(self, layout: Layout, device: torch.device | None = None) -> None:
        self._layout = layout
        self._group_of = {t: group for group in layout.split_groups for t in group}
        self._num_parts = Counter(self._group_of[p.tensor] for p in layout.parts if p.tensor in self._group_of)
        self._left = dict(self._num_parts)
        self._tensors: dict[int, torch.Tensor] = {}
        self.num_bytes = 0
        for group in layout.split_groups:
            self.num_bytes = max(self.num_bytes, sum(aligned(layout.tensors[t].num_bytes) for t in group))
        # Zeros: its pages are there before the first refit.
        buffer = torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        for group in layout.split_groups:
            offset = 0
            for t in group:
                spec = layout.tensors[t]
                self._tensors[t] = buffer[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
                offset += aligned(spec.num_bytes)

    def restart(self) -> None:
        """A refit begins; the last one may have been left in the middle."""
        self._left = dict(self._num_parts)

    def ready(self, bucket: list[tuple[Part, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (HF name, whole tensor) that is complete with the parts of this bucket. Valid until the next call."""
        for part, view in bucket:
            spec = self._layout.tensors[part.tensor]
            group = self._group_of.get(part.tensor)
            if group is None:
                yield spec.name, view
                continue
            whole = self._tensors[part.tensor]
            (whole[part.start : part.stop] if spec.shape else whole).copy_(view)
            self._left[group] -= 1
            if self._left[group] == 0:
                for t in group:
                    yield self._layout.tensors[t].name, self._tensors[t]
