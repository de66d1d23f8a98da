"""A join as a table of pitched copies, planned once and replayed at every refit.

`CopyTable` knows no address: it is planned from the two lists of pieces. An executor binds it to tensors and replays
it, with torch on any device (the reference) or with a few Triton launches on CUDA.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mbridge.pieces import Copy, Shape

from .errors import PlanMismatchError
from .patches import PATCH, Integers, Patch, Records, Tuning, Tunings, is_rows, patches_of

if TYPE_CHECKING:
    from .copy_triton import Launches

# A patch between two tensors, which are numbers in the table's lists.
COPY = np.dtype(
    [("source_tensor", np.int64), ("destination_tensor", np.int64), *((n, np.int64) for n in Patch._fields)]
)


# 8-byte units in most launches, so 128 KiB a program. tests/mbridge_rl/gpu_kernels.py measures others.
# On an H200 4.15 TB/s read and written in runs, 4.14 in rows of 768 bytes; a plain copy of as much makes 4.28.
TUNING = Tunings(runs=Tuning(8192, 8192, 16), rows=Tuning(4096, 16 * 1024, 8))


class Endpoint(NamedTuple):
    """A local tensor that is read or written: its first `numel` elements, or some of them."""

    name: str
    dtype: torch.dtype
    numel: int

    def check(self, tensor: torch.Tensor) -> None:
        """Raise PlanMismatchError unless `tensor` is as it was planned."""
        if tensor.dtype != self.dtype or tensor.numel() < self.numel or not tensor.is_contiguous():
            raise PlanMismatchError(
                f"local tensor {self.name!r} must be {self.dtype}, contiguous, with {self.numel} elements or more; "
                f"found {tensor.dtype}, shape {list(tensor.shape)}, stride {list(tensor.stride())}; plan again",
                tensor=self.name,
            )


@dataclass(frozen=True, eq=False, slots=True)
class CopyTable:
    """Copies of a whole refit in the order of their destinations; those that continue each other are one."""

    sources: tuple[Endpoint, ...]
    destinations: tuple[Endpoint, ...]
    copies: Records  # of dtype COPY

    @classmethod
    def of(
        cls,
        copies: Iterable[Copy],
        sources: Mapping[str, torch.dtype],
        destinations: Mapping[str, torch.dtype],
    ) -> CopyTable:
        """Plan `copies` between local tensors of these dtypes (equal: bytes are moved; else: a cast as torch does it).

        Destinations must be disjoint. Raises PlanMismatchError for a local tensor without a dtype.
        """
        # A model repeats few geometries, so each is worked out once.
        known: dict[tuple[Shape, Shape, Shape], list[Patch]] = {}
        source_numbers: dict[str, int] = {}
        destination_numbers: dict[str, int] = {}
        found: list[tuple[int, ...]] = []
        for copy in copies:
            a, b = copy.source, copy.destination
            assert a.shape == b.shape, copy
            geometry = (a.shape, a.stride, b.stride)
            patches = known.get(geometry)
            if patches is None:
                patches = known[geometry] = patches_of(*geometry)
            if not patches:
                continue
            source = source_numbers.setdefault(copy.source_name, len(source_numbers))
            destination = destination_numbers.setdefault(copy.destination_name, len(destination_numbers))
            found.extend((source, destination, a.offset + p[0], b.offset + p[1], *p[2:]) for p in patches)
        table = _merged(np.array(found, dtype=COPY))
        return cls(
            _endpoints(source_numbers, sources, table["source_tensor"], _extents(table, "source")),
            _endpoints(destination_numbers, destinations, table["destination_tensor"], _extents(table, "destination")),
            table,
        )

    def __len__(self) -> int:
        return len(self.copies)

    @property
    def num_bytes(self) -> int:
        """Bytes written."""
        sizes = _itemsizes(self.destinations)[self.copies["destination_tensor"]]
        return int((self.copies["rows"] * self.copies["cols"] * sizes).sum())

    def only(self, kept: npt.NDArray[np.bool_]) -> CopyTable:
        """The table with some of its copies (and all of its tensors)."""
        return CopyTable(self.sources, self.destinations, self.copies[kept])


class Executor(ABC):
    """Replays a table: `bind` to tensors, then `run`, as often as wanted and on the same stream.

    Holds the tensors it is bound to until it is bound to others, or released.
    """

    def __init__(self, table: CopyTable) -> None:
        self.table = table
        self._tensors: list[torch.Tensor] = []
        self._addresses: list[int] = []

    def bind(self, sources: Mapping[str, torch.Tensor], destinations: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors (contiguous, of any shape) from now on. Cheap if they are those of the last call.

        Raises PlanMismatchError that names a tensor which is missing, or not as it was planned.
        """
        chosen = [*_choose(self.table.sources, sources), *_choose(self.table.destinations, destinations)]
        addresses = [tensor.data_ptr() for tensor in chosen]
        if addresses == self._addresses and all(map(operator.is_, chosen, self._tensors)):
            return
        self.release()
        for endpoint, tensor in zip((*self.table.sources, *self.table.destinations), chosen, strict=True):
            endpoint.check(tensor)
        num_sources = len(self.table.sources)
        self._point(chosen[:num_sources], chosen[num_sources:])
        self._tensors, self._addresses = chosen, addresses

    def release(self) -> None:
        """Hold no reference to the tensors; `bind` before the next `run`."""
        self._tensors, self._addresses = [], []

    @abstractmethod
    def run(self) -> None:
        """Enqueue all copies on the current stream (on a CPU: make them). Does not synchronise."""

    @property
    @abstractmethod
    def table_bytes(self) -> int:
        """Device memory that the executor holds."""

    @abstractmethod
    def _point(self, sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor]) -> None:
        """Prepare to copy between these tensors, which have been checked."""


class TorchExecutor(Executor):
    """One `copy_` for each copy, on any device or between two: the reference."""

    def __init__(self, table: CopyTable) -> None:
        super().__init__(table)
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []

    # Engines may hold inference tensors, which may be written in this mode only; others do not mind.
    @torch.inference_mode()
    def run(self) -> None:
        assert self._tensors or not len(self.table), "bind before run"
        for source, destination in self._views:
            destination.copy_(source)

    @property
    def table_bytes(self) -> int:
        return 0

    def release(self) -> None:
        super().release()
        self._views = []

    @torch.inference_mode()
    def _point(self, sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor]) -> None:
        for a, b, source, destination, rows, cols, *strides in self.table.copies.tolist():
            shape, (a_row, a_col, b_row, b_col) = (rows, cols), strides
            view = sources[a].as_strided(shape, (a_row, a_col), sources[a].storage_offset() + source)
            into = destinations[b].as_strided(shape, (b_row, b_col), destinations[b].storage_offset() + destination)
            self._views.append((view, into))


class TritonExecutor(Executor):
    """A launch for each kind of copy (one, for most models), over a table in the memory of `device`.

    Casts that the kernel does not know go through torch.
    """

    def __init__(self, table: CopyTable, device: torch.device, tuning: Tunings = TUNING) -> None:
        super().__init__(table)
        from . import copy_triton  # triton is heavy

        self.device, self._tuning = device, tuning
        self._launches: Launches | None = None
        self._make_launches = copy_triton.Launches
        # Copies by (source dtype, destination dtype).
        source_dtypes = np.array([e.dtype for e in table.sources], object)[table.copies["source_tensor"]]
        destination_dtypes = np.array([e.dtype for e in table.destinations], object)[table.copies["destination_tensor"]]
        pairs = set(zip(source_dtypes, destination_dtypes, strict=True))
        strided = ~is_rows(table.copies)
        self._groups: list[tuple[torch.dtype, torch.dtype, npt.NDArray[np.intp]]] = []
        rest = np.zeros(len(table), bool)
        for source, destination in sorted(pairs, key=str):
            members = (source_dtypes == source) & (destination_dtypes == destination)
            unknown = members & ~copy_triton.is_known(source, destination, strided)
            rest |= unknown
            self._groups.append((source, destination, np.flatnonzero(members & ~unknown)))
        self._rest = TorchExecutor(table.only(rest)) if rest.any() else None
        self._base = np.zeros(0, np.int64)  # addresses in the launches' table

    def run(self) -> None:
        assert self._tensors or not len(self.table), "bind before run"
        if self._launches is not None:
            self._launches.run()
        if self._rest is not None:
            self._rest.run()

    @property
    def table_bytes(self) -> int:
        return 0 if self._launches is None else self._launches.num_bytes

    def release(self) -> None:
        super().release()
        if self._rest is not None:
            self._rest.release()

    def _point(self, sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor]) -> None:
        endpoints, tensors = (*self.table.sources, *self.table.destinations), (*sources, *destinations)
        for endpoint, tensor in zip(endpoints, tensors, strict=True):
            if tensor.device.type != self.device.type:  # another GPU's memory is mapped into this one's address space
                raise PlanMismatchError(
                    f"local tensor {endpoint.name!r} must be on a {self.device.type} device, found {tensor.device}",
                    tensor=endpoint.name,
                )
        if self._rest is not None:
            self._rest.bind(
                {e.name: t for e, t in zip(self.table.sources, sources, strict=True)},
                {e.name: t for e, t in zip(self.table.destinations, destinations, strict=True)},
            )
        base = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        if self._launches is not None and np.array_equal(base, self._base):
            return
        self._launches = self._make_launches(
            [(a, b, self._addressed(members, base)) for a, b, members in self._groups if len(members)],
            self.device,
            self._tuning,
        )
        self._base = base

    def _addressed(self, members: npt.NDArray[np.intp], base: Integers) -> Records:
        """Patches of these copies with addresses in place of offsets."""
        copies = self.table.copies[members]
        patches = np.empty(len(copies), PATCH)
        for name in Patch._fields[2:]:
            patches[name] = copies[name]
        first = 0
        for side, endpoints in (("source", self.table.sources), ("destination", self.table.destinations)):
            tensors = copies[side + "_tensor"]
            patches[side] = base[first + tensors] + copies[side] * _itemsizes(endpoints)[tensors]
            first += len(endpoints)
        return patches


def executor_for(table: CopyTable, device: torch.device) -> Executor:
    """The fastest executor for tensors on `device`."""
    return TritonExecutor(table, device) if device.type == "cuda" else TorchExecutor(table)


def _merged(copies: Records) -> Records:
    """`copies` in the order of their destinations; runs that continue each other on both sides become one."""
    copies = copies[np.lexsort((copies["destination"], copies["destination_tensor"]))]
    if len(copies) < 2:
        return copies
    before, after = copies[:-1], copies[1:]
    run = is_rows(copies) & (copies["rows"] == 1)
    continues = run[:-1] & run[1:]
    for side in ("source", "destination"):
        continues &= before[side + "_tensor"] == after[side + "_tensor"]
        continues &= before[side] + before["cols"] == after[side]
    starts = np.flatnonzero(np.concatenate(([True], ~continues)))
    merged = copies[starts]
    merged["cols"] = np.where(run[starts], np.add.reduceat(copies["cols"], starts), merged["cols"])
    return merged


def _extents(copies: Records, side: str) -> Integers:
    """Elements from a tensor's first to the last that each copy touches."""
    last_row = (copies["rows"] - 1) * copies[side + "_row"]
    last_col = (copies["cols"] - 1) * copies[side + "_col"]
    extents: Integers = copies[side] + last_row + last_col + 1
    return extents


def _endpoints(
    numbers: Mapping[str, int], dtypes: Mapping[str, torch.dtype], tensors: Integers, extents: Integers
) -> tuple[Endpoint, ...]:
    numel = np.zeros(len(numbers), np.int64)
    np.maximum.at(numel, tensors, extents)
    for name in numbers:
        if name not in dtypes:
            raise PlanMismatchError(f"a copy names local tensor {name!r}, whose dtype is not known", tensor=name)
    return tuple(Endpoint(name, dtypes[name], int(numel[i])) for name, i in numbers.items())


def _itemsizes(endpoints: Sequence[Endpoint]) -> Integers:
    return np.array([e.dtype.itemsize for e in endpoints], np.int64)


def _choose(endpoints: Sequence[Endpoint], tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    try:
        return [tensors[endpoint.name] for endpoint in endpoints]
    except KeyError as error:
        name = str(error.args[0])
        raise PlanMismatchError(f"there is no local tensor {name!r} any more; plan again", tensor=name) from error
