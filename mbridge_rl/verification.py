"""Compares the checksums that trainers and engine workers send. Pure.

Checksums are additive over disjoint boxes (checksum.py), so a tensor's total over all trainer ranks must equal the sum
over the engine's boxes, however either side is sharded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from mbridge.errors import PlanError
from mbridge.pieces import Box, TensorSpec, check_cover

from .messages import Checked, Verification
from .protocol import Peer

MODULUS = 1 << 64
Held = dict[Box, dict[int, list[str]]]  # box -> checksum -> where it was found


def compare(tensors: Sequence[TensorSpec], checked: Mapping[Peer, Checked]) -> Verification:
    """Judge what all peers sent in answer to one Check about some of `tensors`."""
    totals: dict[int, int] = defaultdict(int)
    held: dict[int, Held] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    wrong: dict[str, str] = {}
    unchecked: dict[str, str] = {}
    for peer, message in sorted(checked.items()):
        for number, total in message.totals.items():
            if not 0 <= number < len(tensors):
                wrong[f"tensor {number}"] = f"{peer} sums up a tensor that there is not"
                continue
            totals[number] += total
        for number, start, stop, engine_name, total in message.boxes:
            if not 0 <= number < len(tensors) or len(start) != len(stop):
                wrong[engine_name] = f"{peer} says that it holds a box that there is not"
                continue
            held[number][Box(start, stop)][total % MODULUS].append(f"{engine_name} of {peer}")
        wrong |= dict.fromkeys(message.changed, f"changed in {peer} since it was loaded")
        unchecked |= message.unchecked
    num_compared = 0
    for number, total in totals.items():
        spec = tensors[number]
        if number not in held:
            unchecked.setdefault(spec.name, "the engine does not keep it as it is")
            continue
        problem = _cover_problem(spec, held[number])
        if problem:
            unchecked[spec.name] = problem
            continue
        num_compared += 1
        found = _disagreement(total % MODULUS, held[number])
        if found:
            wrong[spec.name] = found
    return Verification(num_compared, len(tensors), wrong, unchecked)


def _cover_problem(spec: TensorSpec, boxes: Held) -> str:
    """Why the engine's boxes cannot be added up, if they cannot."""
    try:
        check_cover(spec.name, spec.shape, list(boxes))
    except PlanError as error:
        return str(error)
    return ""


def _disagreement(total: int, boxes: Held) -> str:
    """Where the engine differs from the trainers' `total`, if it does."""
    replicas = next((sums for sums in boxes.values() if len(sums) > 1), None)
    if replicas is not None:
        return f"copies differ: {'; '.join(', '.join(places) for places in replicas.values())}"
    if sum(next(iter(sums)) for sums in boxes.values()) % MODULUS == total:
        return ""
    places = [place for sums in boxes.values() for names in sums.values() for place in names]
    return f"the values in {', '.join(places[:4])} are not the trainer's"
