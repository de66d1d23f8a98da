"""Runs an engine model's own `load_weights` on probes: tensors without data, whose way to the parameters is recorded.

`dry_run` finds out, before any weight is touched, which HF names the loader uses, which box of which HF tensor it
copies to which region of which tensor, and what it refuses. Probes are plain meta tensors. A view has the storage of
its tensor, so what is known of a storage holds for all views of it, and a copy between two views is arithmetic on
their strides (`boxes_of_view`). Knows no engine.
"""

from __future__ import annotations

import bisect
import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mbridge.pieces import Box, Piece, Region, Shape, TensorSpec, row_major

from .errors import EngineMismatchError
from .views import NotABox, View, boxes_of_view

MAX_ERROR_CHARS = 300  # of an engine's own message; some list every parameter
Place = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # storage, offset, shape, stride
Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], "set[str] | None"]
Names = frozenset[str]

_aten = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default}
_NONE: Names = frozenset()
_CONSTANTS = {_aten.zero_.default, _aten.fill_.Scalar, _aten.fill_.Tensor}


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """The loader copies `box` of `hf_name` to `region`, in elements from the start of `destination`'s storage.

    A copy to a destination of another dtype converts. `destination` is the tensor that was copied to, often a view.
    """

    hf_name: str
    box: Box
    destination: torch.Tensor
    region: Region


@dataclass(slots=True)
class DryRun:
    """What a loader does with a list of HF tensors."""

    consumed: set[str] = field(default_factory=set)  # HF names
    loaded: set[str] | None = None  # engine names, if the loader returns them
    twice: list[tuple[str, str]] = field(default_factory=list)  # HF names written to one place
    writes: list[Write] = field(default_factory=list)  # in the loader's order
    opaque: dict[str, str] = field(default_factory=dict)  # HF name -> why `writes` is not all that happens to it
    _destinations: dict[int, tuple[torch.Tensor, set[str]]] = field(default_factory=dict)
    _places: dict[Place, Names] = field(default_factory=dict)

    def by_destination(self) -> dict[int, set[str]]:
        """Storage key -> HF names, opaque ones too, that were written there. The storages live as long as this."""
        return {key: names for key, (_, names) in self._destinations.items()}

    def note(self, names: Names, destination: torch.Tensor) -> None:
        """`names` were written to `destination` in some way."""
        self.consumed |= names
        key = storage_key(destination)
        self._destinations.setdefault(key, (destination, set()))[1].update(names)
        place = (key, int(destination.storage_offset()), tuple(destination.shape), destination.stride())
        earlier = self._places.setdefault(place, names)
        if earlier is not names and earlier != names:
            self.twice.append((min(earlier - names or earlier), min(names - earlier or names)))

    def give_up(self, names: Iterable[str], reason: str) -> None:
        """The first reason stands."""
        for name in names:
            self.opaque.setdefault(name, reason)


def storage_key(tensor: torch.Tensor) -> int:
    """The same for all views of one storage, and for no other storage that lives."""
    return int(tensor.untyped_storage()._cdata)


def dry_run(load: Loader, tensors: Iterable[TensorSpec]) -> DryRun:
    """Run `load` on probes of `tensors`. Raises EngineMismatchError that names the tensor which `load` refuses."""
    ledger = DryRun()
    recorder = _Recorder(ledger)
    last: list[TensorSpec] = []

    def probes() -> Iterator[tuple[str, torch.Tensor]]:
        for spec in tensors:
            last[:] = [spec]
            yield spec.name, recorder.probe(spec)

    try:
        with torch.no_grad(), recorder:
            ledger.loaded = load(probes())
    except Exception as error:
        where = f"{last[0].name} {list(last[0].shape)} {last[0].dtype}" if last else "nothing yet"
        raise EngineMismatchError(
            f"the engine's loader refuses the trainer's tensors at {where}: {type(error).__name__}: "
            f"{str(error)[:MAX_ERROR_CHARS]}. Is it the same model?",
            phase="connect",
            tensor=last[0].name if last else None,
        ) from error
    recorder.finish()
    return ledger


def engine_pieces(found: DryRun, owners: Mapping[int, tuple[str, int]]) -> tuple[list[Piece], dict[str, str]]:
    """The writes of `found` as pieces of the engine, and HF name -> reason for those to a storage that nobody owns.

    `owners`: `storage_key` of a parameter -> (its engine name, its own storage offset in elements). Regions count from
    the parameter's first element. Names that are opaque, or have a reason here, have no pieces at all.

    Pieces say nothing of dtypes. Elements are those of the parameter's dtype as it was during the dry run (a loader
    that writes through `parameter.view(another dtype)` is opaque), and a copy from an HF tensor of another dtype
    converts as `Tensor.copy_` does.
    """
    pieces: list[Piece] = []
    reasons: dict[str, str] = {}
    for write in found.writes:
        if write.hf_name in found.opaque:
            continue
        name, first = owners.get(storage_key(write.destination), (None, 0))
        region = Region(write.region.offset - first, write.region.shape, write.region.stride)
        if name is None or region.offset < 0:
            shape = list(write.destination.shape)
            reasons.setdefault(write.hf_name, f"it is copied to a tensor of shape {shape} that is no parameter")
        else:
            pieces.append(Piece(write.hf_name, write.box, name, region))
    return [piece for piece in pieces if piece.hf_name not in reasons], reasons


class _Image(NamedTuple):
    """A storage that holds, in row-major order of `shape`, an HF tensor, or `view` of another such storage."""

    spec: TensorSpec
    dtype: torch.dtype
    shape: Shape
    parent: _Image | None = None
    view: Region = Region(0, (), ())

    def boxes(self, view: View, destination: View) -> list[tuple[Box, Region]]:
        """The boxes of the HF tensor in `view` of this storage, and their regions of `destination`, parallel to it."""
        found = boxes_of_view(self.shape, *view, destination)
        if self.parent is None:
            return found
        mine = Piece(self.spec.name, Box.whole(self.shape), "", self.view)
        result = []
        for box, region in found:
            whole = mine if len(box.start) == len(self.shape) else mine.unfolded()
            part = whole.part(box)
            target = (region.offset, region.shape, region.stride)
            result += self.parent.boxes((part.offset, part.shape, part.stride), target)
        return result


class _Content(NamedTuple):
    """What is known of a storage that the dry run has made, or that the loader has copied to."""

    names: Names  # HF tensors that it comes from; none: it is the loader's own
    storage: StorageWeakRef  # while it is held, no other storage gets the key
    image: _Image | None = None
    made_by: str = ""  # if no image: the first operation on the way that is not a view or a copy
    landed: bool = False  # the engine's: the loader has copied to it


class _Recorder(TorchDispatchMode):
    """Sees every operation below the level of Python. Whatever would change the engine's tensors is not carried out."""

    def __init__(self, ledger: DryRun) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger
        self._contents: dict[int, _Content] = {}
        self._reinterpreted: dict[int, StorageWeakRef] = {}
        self._overwrites: list[tuple[int, torch.Tensor, str]] = []  # how many writes came before, where, by what
        self._read: Names = _NONE  # whose values the loader has read since it got the last probe

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: loaders are not compiled, and torch would import its compiler for this (a second)."""
        return False

    def probe(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor for the loader in place of the HF tensor."""
        self._read = _NONE
        probe = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        self._hold(probe, frozenset((spec.name,)), _Image(spec, spec.dtype, tuple(spec.shape)))
        return probe

    def finish(self) -> None:
        """Find what can only be seen afterwards: copies that were overwritten, probes that the loader has kept."""
        self._find_overwritten()
        if self._kept():
            gc.collect()
        for content in self._kept():
            self._ledger.consumed |= content.names
            self._ledger.give_up(content.names, "the loader keeps the tensor itself")

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.copy_.default:
            return self._copy(func, args, kwargs)
        if func is _aten.view.dtype:
            self._reinterpreted[storage_key(args[0])] = StorageWeakRef(args[0].untyped_storage())
        if func.is_view:
            return func(*args, **kwargs)
        inputs = {storage_key(tensor) for tensor in _tensors((*args, *kwargs.values()))}
        known = [content for key in inputs if (content := self._contents.get(key)) is not None]
        names = frozenset().union(*(content.names for content in known))
        made_by = next((content.made_by for content in known if content.made_by), _name(func))
        if func._schema.is_mutable:
            return self._mutate(func, args, kwargs, names, made_by)
        if names and func is _aten._local_scalar_dense.default:
            self._read |= names
            self._ledger.consumed |= names
            self._ledger.give_up(names, f"the loader reads its value ({made_by.removeprefix('_')})")
            return 0
        if names and func in _COPIES:
            return self._materialise(func, args, kwargs, known[0])
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if storage_key(tensor) not in inputs:
                self._hold(tensor, names, made_by=made_by if names else "")
        return result

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        destination, source = args[0], args[1]
        before = self._contents.get(storage_key(destination))
        content = self._contents.get(storage_key(source))
        names = content.names if content is not None else _NONE
        if names and source.shape != destination.shape:
            source = source.expand(destination.shape)  # raises as the copy would
        if before is not None and not before.landed:
            if not names and not before.names:
                return func(*args, **kwargs)
            self._hold(destination, before.names | names, made_by="copied in parts to another tensor")
        elif content is not None and names:
            self._land(content, source, destination)
        else:
            self._constant(func, destination)
        return destination

    def _land(self, content: _Content, source: torch.Tensor, destination: torch.Tensor) -> None:
        image, ledger = content.image, self._ledger
        reason = ""
        if image is None:
            reason = content.made_by or "copied on from another tensor of the engine"
        elif source.dtype != image.dtype:
            reason = f"reinterpreted as {source.dtype}"
        elif storage_key(destination) in self._reinterpreted:
            reason = f"its destination is reinterpreted as {destination.dtype}"
        elif image.dtype not in (image.spec.dtype, destination.dtype):
            reason = f"cast through {image.dtype}"
        else:
            try:
                for box, region in image.boxes(_geometry(source), _geometry(destination)):
                    ledger.writes.append(Write(image.spec.name, box, destination, region))
            except NotABox as error:
                reason = str(error)
        if reason:
            ledger.give_up(content.names, reason)
        self._arrive(content.names, destination)

    def _mutate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names, made_by: str) -> Any:
        """An operation in place, or with `out=`."""
        arguments = func._schema.arguments
        values = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(arguments)]
        written = [
            tensor
            for argument, value in zip(arguments, values, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value)
        ]
        contents = [self._contents.get(storage_key(tensor)) for tensor in written]
        if all(content is not None and not content.landed for content in contents):
            if names:
                for tensor in written:
                    self._hold(tensor, names, made_by=made_by)
            if not names or all(tensor.is_meta for tensor in written):  # else data would be missing
                return func(*args, **kwargs)
        elif func in _CONSTANTS and not self._comes_from_hf(args[1:]):
            self._constant(func, written[0])
        elif names:
            self._ledger.give_up(names, made_by)
            for tensor in written:
                self._arrive(names, tensor)
        returned = len(func._schema.returns)
        return None if not returned else written[0] if returned == 1 else tuple(written)

    def _constant(self, func: Any, destination: torch.Tensor) -> None:
        """The engine's `destination` is set to what is no tensor from HF: a constant, or a value that was read."""
        self._overwrites.append((len(self._ledger.writes), destination, _name(func)))
        if self._read:
            self._arrive(self._read, destination)

    def _materialise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], content: _Content) -> Any:
        """`clone`, `contiguous`, `to`: a new storage, its elements those of a view of another."""
        source, image = args[0], content.image
        if "device" in kwargs:  # wherever to: there is nothing to move
            kwargs = {**kwargs, "device": source.device, "pin_memory": None}
        result = func(*args, **kwargs)
        made_by, copied = content.made_by or _name(func), None
        if image is not None:
            order = sorted((d for d in range(source.dim()) if source.shape[d] != 1), key=lambda d: -result.stride(d))
            shape, stride = tuple(source.shape[d] for d in order), tuple(source.stride(d) for d in order)
            if source.dtype != image.dtype:
                made_by = f"reinterpreted as {source.dtype}"
            elif result.dtype != source.dtype != image.spec.dtype:
                made_by = f"cast through {source.dtype}"
            elif tuple(result.stride(d) for d in order) == row_major(shape):
                made_by, view = "", Region(source.storage_offset(), shape, stride)
                copied = _Image(image.spec, result.dtype, shape, image, view)
        self._hold(result, content.names, copied, made_by)
        return result

    def _hold(self, tensor: torch.Tensor, names: Names, image: _Image | None = None, made_by: str = "") -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        self._contents[storage_key(tensor)] = _Content(names, storage, image, made_by)

    def _arrive(self, names: Names, destination: torch.Tensor) -> None:
        self._ledger.note(names, destination)
        key = storage_key(destination)
        before = self._contents.get(key)
        if before is None:
            storage = StorageWeakRef(destination.untyped_storage())
            self._contents[key] = _Content(names, storage, landed=True)
        elif not names <= before.names:
            self._contents[key] = before._replace(names=before.names | names)

    def _comes_from_hf(self, values: tuple[Any, ...]) -> bool:
        contents = (self._contents.get(storage_key(tensor)) for tensor in _tensors(values))
        return any(content is not None and content.names for content in contents)

    def _kept(self) -> list[_Content]:
        return [c for c in self._contents.values() if c.names and not c.landed and not c.storage.expired()]

    def _find_overwritten(self) -> None:
        """Constants go to padding, or come before the copy: else the copy is not what stays."""
        if not self._overwrites:
            return
        spans: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # first, last element; index in writes
        for index, write in enumerate(self._ledger.writes):
            first, last = _span(write.region.offset, write.region.shape, write.region.stride)
            spans[storage_key(write.destination)].append((first, last, index))
        longest = {}
        for key, sorted_spans in spans.items():
            sorted_spans.sort()
            longest[key] = max(last - first for first, last, _ in sorted_spans)
        for before, tensor, op in self._overwrites:
            here = spans.get(storage_key(tensor))
            if not here or not tensor.numel():
                continue
            low, high = _span(*_geometry(tensor))
            begin = bisect.bisect_left(here, (low - longest[storage_key(tensor)],))
            for first, last, index in here[begin : bisect.bisect_left(here, (high + 1,))]:
                if index < before and last >= low and first <= high:
                    self._ledger.give_up([self._ledger.writes[index].hf_name], f"overwritten by {op}")


def _name(func: Any) -> str:
    return str(func._schema.name).partition("::")[2]


def _geometry(tensor: torch.Tensor) -> View:
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _span(offset: int, size: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """First and last element of a view that is not empty."""
    return offset, offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
