"""The trainer's half of the direct path: lend the memory that holds this rank's parameters.

Nothing is copied here. What workers need is written once (`lends`); at each refit addresses are looked at again, and
sent only if something moved (an offload, a `.data` swap, an optimizer that allocated anew).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

import msgspec
import torch

from mbridge.live import reader
from mbridge.pieces import Piece, TensorSpec

from .errors import PlanMismatchError, SyncError
from .messages import Lends, Loan
from .transports.base import Transport


class Lender:
    """One per trainer rank, with the same calls as a Filler.

    `sources` is a live view of its local tensors: each access reads them as they are now.
    """

    def __init__(
        self,
        rank: int,
        tensors: Sequence[TensorSpec],
        owned: Sequence[Piece],
        sources: Mapping[str, torch.Tensor],
        transport: type[Transport],
    ) -> None:
        """Raises TransportError if the memory cannot be shared."""
        self._sources, self._transport = sources, transport
        number = {spec.name: i for i, spec in enumerate(tensors)}
        owned = [piece for piece in owned if piece.box.numel]
        for piece in owned:
            spec, found = tensors[number[piece.hf_name]], sources[piece.local_name].dtype
            if found != spec.dtype:  # as on the bucket path
                raise PlanMismatchError(
                    f"local tensor {piece.local_name!r} must be {spec.dtype}, found {found}", tensor=piece.hf_name
                )
        self._names = list(dict.fromkeys(piece.local_name for piece in owned))
        local = {name: i for i, name in enumerate(self._names)}
        self._planned = [(sources[name].dtype, sources[name].numel()) for name in self._names]
        self._devices = {sources[name].device for name in self._names}
        self._read = reader(sources, self._names)
        self._places: list[Sequence[object]] = []
        self._stamp = transport.stamp()
        self._is_looked_at = False  # in this refit, in step 0
        self._loan = self._lend()  # the last one
        self._unconfirmed: Loan | None = None  # sent in a refit that has not succeeded
        self._lends = Lends(
            rank=rank,
            tensors=[
                (name, str(dtype).removeprefix("torch."), numel)
                for name, (dtype, numel) in zip(self._names, self._planned, strict=True)
            ],
            pieces=[
                (
                    number[piece.hf_name],
                    piece.box.start,
                    piece.box.stop,
                    local[piece.local_name],
                    piece.region.offset,
                    piece.region.stride,
                )
                for piece in owned
            ],
            loan=self._loan,
        )

    def lends(self) -> Lends:
        """What a worker that attaches now has to know. Raises SyncError."""
        self._look(self._transport.stamp())
        return msgspec.structs.replace(self._lends, loan=self._loan)

    def begin(self, sources: Mapping[str, torch.Tensor]) -> None:
        """Use these local tensors until `end`."""
        if sources is not self._sources:
            self._sources, self._read = sources, reader(sources, self._names)

    def fill(self, bucket: int) -> Loan | None:
        """Step 0: finish this rank's writes to its parameters. Where they are now, if they moved. Raises SyncError.

        If nothing that is lent was freed, workers may read it, and thousands of parameters are looked at while they do
        (step 1): to find one that is somewhere else now is rare, and costs another copy.
        """
        stamp = self._transport.stamp()
        if bucket > 0:
            known = self._unconfirmed
            if not self._is_looked_at:
                self._look(stamp)
            return None if self._unconfirmed is known else self._unconfirmed
        self._is_looked_at = stamp != self._stamp
        if self._is_looked_at:
            self._look(stamp)
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return self._unconfirmed

    def _look(self, stamp: object) -> None:
        """Lend anew if something moved."""
        is_same = self._current() == self._places
        if not (is_same and (stamp == self._stamp or self._transport.is_current(self._loan.segments))):
            loan = self._lend()
            if loan != self._loan:
                self._unconfirmed = self._loan = loan
        self._stamp = stamp

    def end(self, *, succeeded: bool) -> None:
        """The refit is over. Whether the workers have heard of what moved is sure only if it succeeded."""
        if succeeded:
            self._unconfirmed = None

    def _current(self) -> list[Sequence[object]]:
        """Where the tensors are, and how they lie there: for each aspect, of all tensors."""
        try:
            tensors = self._read()
        except KeyError as error:
            name = str(error.args[0])
            raise PlanMismatchError(f"the models no longer have local tensor {name!r}", tensor=name) from error
        aspects = (torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride, attrgetter("dtype"))
        return [list(map(aspect, tensors)) for aspect in aspects]

    def _lend(self) -> Loan:
        tensors = {}
        for name, (dtype, numel) in zip(self._names, self._planned, strict=True):
            tensor = self._sources.get(name)
            if tensor is None:
                raise PlanMismatchError(f"the models no longer have local tensor {name!r}", tensor=name)
            if tensor.dtype != dtype or tensor.numel() != numel or not tensor.is_contiguous():
                raise PlanMismatchError(
                    f"local tensor {name!r} must be {dtype}, contiguous, with {numel} elements; found {tensor.dtype}, "
                    f"shape {list(tensor.shape)}, stride {list(tensor.stride())}",
                    tensor=name,
                )
            if tensor.device not in self._devices:
                raise SyncError(
                    f"local tensor {name!r} was on {', '.join(map(str, self._devices))} when the syncer was built and "
                    f"is on {tensor.device} now; bring it back before sync(), or build the syncer with path='bucket'",
                    tensor=name,
                )
            tensors[name] = tensor
        lent = self._transport.lend(tensors)
        self._places = self._current()  # after lending, which may move CPU memory once
        return Loan(list(lent.segments), [lent.places[name] for name in self._names])
