"""Trainer ranks agree on the plan, once, while a syncer is built. The only use of torch.distributed in mbridge_rl.

Each rank makes an `Offer`; every rank sees all offers and comes to the same conclusion, so that a disagreement is the
same error on every rank and never a hang.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import torch
import torch.distributed as dist

from mbridge.pieces import Box, Piece, check_cover

from .buckets import Layout
from .errors import Failure, PlanMismatchError, raised

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mbridge.plan import TrainerPlan


class Offer(msgspec.Struct, frozen=True):
    """What one rank brings. Rank 0 adds how it is reached and where the buckets are."""

    failure: Failure | None = None  # why this rank cannot take part
    digest: str = ""
    owned: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []  # HF name, start, stop
    pid: int = 0
    host: str = ""
    endpoint: str = ""
    token: str = ""
    server_key: str = ""  # public; of a hub that encrypts
    lanes: dict[int, tuple[str, str]] = {}  # lane -> path and transport


class Shared(msgspec.Struct, frozen=True):
    """What one rank tells the others later, while lanes are opened."""

    failure: Failure | None = None
    values: dict[int, Any] = {}  # by lane


def agree(mine: Offer, plan: TrainerPlan | None, group: ProcessGroup | None) -> list[Offer]:
    """All ranks' offers, or the same error on every rank.

    Raises the first rank's own failure; PlanMismatchError if digests differ, naming the first difference; PlanError if
    the owned pieces of all ranks do not cover every tensor exactly once.
    """
    offers = [msgspec.msgpack.decode(payload, type=Offer) for payload in exchange(msgspec.msgpack.encode(mine), group)]
    for offer in offers:
        if offer.failure is not None:
            raise raised(offer.failure)
    if plan is None:
        raise PlanMismatchError("this rank has neither a plan nor a reason")
    if len({offer.digest for offer in offers}) > 1:
        _raise_difference(offers, plan, group)
    boxes: dict[str, list[Box]] = {spec.name: [] for spec in plan.tensors}
    for rank, offer in enumerate(offers):
        for name, start, stop in offer.owned:
            if name not in boxes:
                raise PlanMismatchError(
                    f"trainer rank {rank} owns a piece of {name!r}, which is not in the plan", tensor=name
                )
            boxes[name].append(Box(start, stop))
    for spec in plan.tensors:
        check_cover(spec.name, spec.shape, boxes[spec.name])
    return offers


def share(failure: Failure | None, values: Mapping[int, Any], group: ProcessGroup | None) -> list[dict[int, Any]]:
    """Every rank's `values` (plain strings, numbers, lists and dicts by lane), in rank order; or the first failure."""
    mine = msgspec.msgpack.encode(Shared(failure, dict(values)))
    everyone = [msgspec.msgpack.decode(payload, type=Shared) for payload in exchange(mine, group)]
    for shared in everyone:
        if shared.failure is not None:
            raise raised(shared.failure)
    return [shared.values for shared in everyone]


def digest_of(plan_digest: str, layout: Layout, path: str) -> str:
    """Of everything that must be equal on all ranks: the plan, how it lies in buckets, and the path it takes."""
    return hashlib.sha256(repr((plan_digest, layout, path)).encode()).hexdigest()


def owned_boxes(owned: Sequence[Piece]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Pieces as an Offer carries them."""
    return [(piece.hf_name, piece.box.start, piece.box.stop) for piece in owned]


def _raise_difference(offers: list[Offer], plan: TrainerPlan, group: ProcessGroup | None) -> NoReturn:
    """All ranks come here together. Compares rank 0's plan with that of the first rank whose digest differs."""
    lines = [f"{t.name} {list(t.shape)} {t.dtype}" for t in plan.tensors]
    lines += [f"fusion group {', '.join(g)}" for g in plan.fusion_groups]
    plans = [msgspec.msgpack.decode(p, type=list[str]) for p in exchange(msgspec.msgpack.encode(lines), group)]
    other = next(rank for rank, offer in enumerate(offers) if offer.digest != offers[0].digest)
    pairs = zip([*plans[0], *[""] * len(plans[other])], [*plans[other], *[""] * len(plans[0])], strict=True)
    for position, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            raise PlanMismatchError(
                f"trainer ranks 0 and {other} have different plans; the first difference is entry {position}: "
                f"rank 0 has {ours or 'nothing more'}, rank {other} has {theirs or 'nothing more'}",
                origin=f"trainer rank {other}",
                phase="connect",
            )
    raise PlanMismatchError(
        f"trainer ranks 0 and {other} have the same tensors in the same order, but different digests: "
        "bucket_bytes, path, the topology or the family's table differs",
        origin=f"trainer rank {other}",
        phase="connect",
    )


def world(group: ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, number of ranks) in `group`, by default of the whole job; (0, 1) without torch.distributed."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def exchange(payload: bytes, group: ProcessGroup | None = None) -> list[bytes]:
    """Every rank's `payload`, in rank order, on every rank. Plain byte tensors: nothing is pickled.

    Blocks until all ranks have called it, at most for the process group's own timeout.
    """
    _, num_ranks = world(group)
    if num_ranks == 1:
        return [payload]
    device = (
        torch.device("cpu") if "gloo" in dist.get_backend(group) else torch.device("cuda", torch.cuda.current_device())
    )
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks)]
    dist.all_gather(lengths, torch.tensor([len(payload)], dtype=torch.int64, device=device), group=group)
    size = max(int(length) for length in lengths)
    mine = torch.zeros(size, dtype=torch.uint8)
    mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    parts = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(num_ranks)]
    dist.all_gather(parts, mine.to(device), group=group)
    return [part[: int(length)].cpu().numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]
