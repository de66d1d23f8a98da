"""`inspect`: the family of a checkpoint, and what one rank of a topology stores of it. Arithmetic on the config."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from ..bridge import AutoBridge, Bridge
from ..checkpoint import Checkpoint, holds_weights
from ..families import Family, find_family
from ..hf_config import normalise
from ..pieces import Piece
from ..plan import Stored, Table, hf_names, stored_by
from ..topology import Coordinates, Topology
from .display import print_table, readable_bytes
from .expected import Expected, Naming, expected_tensors, layers_of_rank


class Described(NamedTuple):
    """A checkpoint's bridge, family and table."""

    bridge: Bridge
    family: Family
    table: Table
    num_layers: int


def describe(path: str, dtype: torch.dtype | None, ignore_config_fields: Sequence[str]) -> Described:
    """Open a checkpoint. `dtype` None: the one in which most of it is on disk."""
    bridge = AutoBridge.from_pretrained(path, ignore_config_fields=ignore_config_fields)
    chosen = dtype or dtype_on_disk(bridge)
    if chosen is not bridge.dtype:
        bridge = AutoBridge.from_pretrained(path, dtype=chosen, ignore_config_fields=ignore_config_fields)
    config = normalise(bridge.raw_config)
    if config.get("num_nextn_predict_layers"):
        # The bridge builds only those MTP layers of which the checkpoint has weights.
        config["num_nextn_predict_layers"] = bridge.megatron_config().transformer.get("mtp_num_layers") or 0
    family = find_family(config.get("model_type"))
    layers = int(config["num_hidden_layers"])
    return Described(bridge, family, Table(family.rows(config), layers, chosen), layers)


def dtype_on_disk(bridge: Bridge) -> torch.dtype:
    """The dtype of most bytes of the files, else the one that the config names, else bfloat16."""
    assert bridge.path is not None
    if holds_weights(bridge.path):
        sizes: dict[torch.dtype, int] = {}
        checkpoint = Checkpoint.open(bridge.path)
        for name, spec in checkpoint.specs.items():
            if name not in checkpoint.odd_dtypes and spec.dtype is not torch.float64:
                sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
        if sizes:
            return max(sizes, key=lambda dtype: sizes[dtype])
    named = bridge.raw_config.get("dtype") or bridge.raw_config.get("torch_dtype")
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return known.get(str(named), torch.bfloat16)


def inspect(
    path: str,
    topology: Topology,
    *,
    rank: int,
    naming: Naming,
    dtype: torch.dtype | None,
    layers_first: int | None,
    layers_last: int | None,
    ignore_config_fields: Sequence[str],
    as_json: bool,
) -> None:
    """Print it. Raises MBridgeError for a config or sizes that do not go together."""
    model = describe(path, dtype, ignore_config_fields)
    at = topology.coordinates(rank)
    layers = layers_of_rank(model.num_layers, topology, at, layers_first, layers_last)
    padded = model.bridge.megatron_config(topology.tp).gpt["vocab_size"]
    expected = expected_tensors(model.table, topology, at, naming=naming, padded_vocab=padded, layers=layers)
    stored = stored_by(model.table, topology, at, [e.spec for e in expected])
    if as_json:
        print(json.dumps(_as_json(model, topology, at, rank, layers, expected, stored), indent=2))
        return
    _print_model(model)
    local = sum(math.prod(e.spec.shape) for e in expected)
    size = sum(e.spec.num_bytes for e in expected)
    print(f"rank         {rank} of {topology.world_size}: {sizes_of(topology)}; here {_place(topology, at)}")
    print(f"it stores    {local:,} parameters, {readable_bytes(size)}, layers {_ranges(layers)}")
    print()
    print_table(
        ("local tensor", "shape", "HF tensors, and the part of each that is here"),
        _rows(expected, stored, at, topology),
    )


def _print_model(model: Described) -> None:
    tensors = model.table.tensors()
    parameters = sum(math.prod(spec.shape) for spec in tensors)
    folder = model.bridge.path
    assert folder is not None
    print(f"family       {', '.join(model.family.model_types)}")
    print(f"parameters   {parameters:,} in {len(tensors)} HF tensors, {model.num_layers} layers")
    print(f"as           {_short(model.table.dtype)}, {readable_bytes(sum(spec.num_bytes for spec in tensors))}")
    if holds_weights(folder):
        checkpoint = Checkpoint.open(folder)
        on_disk = sum(math.prod(spec.shape) for spec in checkpoint.specs.values())
        fp8 = f", {len(checkpoint.scaled)} of them fp8" if checkpoint.scaled else ""
        num_files = len(set(checkpoint.files.values()))
        files = "1 file" if num_files == 1 else f"{num_files} files"
        print(f"on disk      {on_disk:,} parameters in {len(checkpoint.specs)} tensors{fp8}, {files}")
    else:
        print("on disk      a config, no weights")


def _rows(
    expected: Sequence[Expected], stored: Stored, at: Coordinates, topology: Topology
) -> list[tuple[str, str, str]]:
    """One row for all tensors that differ only in their layer's or expert's number."""
    pieces: dict[str, dict[str, list[Piece]]] = {e.spec.name: {} for e in expected}
    for piece in stored.pieces:
        pieces[piece.local_name].setdefault(piece.hf_name, []).append(piece)
    alike: dict[Any, list[Expected]] = {}
    for tensor in expected:
        boxes = tuple(tuple(p.box for p in part) for part in pieces[tensor.spec.name].values())
        alike.setdefault((id(tensor.row), boxes), []).append(tensor)
    rows = []
    for tensors in alike.values():
        one = tensors[0]
        layers = sorted({t.layer for t in tensors if t.layer is not None})
        experts = sorted({t.expert for t in tensors if t.expert is not None})
        first = at.ep * (one.row.num_experts // topology.ep)
        name = _template(one, layers, experts)
        theirs = []
        for template, hf in zip(one.row.hf, _hf_names(one, first), strict=True):
            shown = template.replace("{layer}", _ranges(n + one.row.hf_offset for n in layers))
            shown = shown.replace("{expert}", _ranges(first + n for n in experts))
            theirs.append(f"{shown} {_part(pieces[one.spec.name].get(hf, []))}")
        rows.append((name, f"{list(one.spec.shape)} {_short(one.spec.dtype)}", "\n".join(theirs)))
    return rows


def _hf_names(tensor: Expected, first_expert: int) -> tuple[str, ...]:
    expert = None if tensor.expert is None else first_expert + tensor.expert
    return hf_names(tensor.row, tensor.layer, expert)


def _template(tensor: Expected, layers: Sequence[int], experts: Sequence[int]) -> str:
    """The local name with the numbers that it stands for."""
    for name in tensor.row.mcore:
        if name.replace("{layer}", str(tensor.layer)).replace("{expert}", str(tensor.expert)) == tensor.spec.name:
            return name.replace("{layer}", _ranges(layers)).replace("{expert}", _ranges(experts))
    raise AssertionError(f"{tensor.spec.name} is no name of its row")


def _part(pieces: Sequence[Piece]) -> str:
    """The boxes of one HF tensor as one if they join along one dim, as those of attention groups do."""
    if not pieces:
        return "-"  # a rank that holds padding only
    starts = [p.box.start for p in pieces]
    stops = [p.box.stop for p in pieces]
    low, high = tuple(map(min, zip(*starts, strict=True))), tuple(map(max, zip(*stops, strict=True)))
    if math.prod(b - a for a, b in zip(low, high, strict=True)) == sum(p.box.numel for p in pieces):
        return _slices(low, high)
    return " and ".join(_slices(p.box.start, p.box.stop) for p in pieces)


def _slices(start: Sequence[int], stop: Sequence[int]) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(start, stop, strict=True)) + "]"


def _ranges(numbers: Iterable[int]) -> str:
    """5; 0-3; 0-3,8-11 for sorted numbers of several."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs) or "none"


def sizes_of(topology: Topology) -> str:
    """As `tp=2, pp=1, ...`."""
    return ", ".join(f"{axis}={getattr(topology, axis)}" for axis in ("tp", "pp", "vpp", "ep", "etp", "dp"))


def _place(topology: Topology, at: Coordinates) -> str:
    return ", ".join(f"{axis} {getattr(at, axis)}" for axis in ("tp", "pp", "ep", "etp", "dp"))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_json(
    model: Described,
    topology: Topology,
    at: Coordinates,
    rank: int,
    layers: Sequence[int],
    expected: Sequence[Expected],
    stored: Stored,
) -> dict[str, Any]:
    pieces: dict[str, list[dict[str, Any]]] = {e.spec.name: [] for e in expected}
    for piece in stored.pieces:
        pieces[piece.local_name].append(
            {"hf_name": piece.hf_name, "start": piece.box.start, "stop": piece.box.stop, **asdict(piece.region)}
        )
    tensors = model.table.tensors()
    return {
        "family": list(model.family.model_types),
        "dtype": _short(model.table.dtype),
        "num_parameters": sum(math.prod(spec.shape) for spec in tensors),
        "num_tensors": len(tensors),
        "topology": asdict(topology),
        "rank": rank,
        "coordinates": asdict(at),
        "layers": list(layers),
        "local_parameters": sum(math.prod(e.spec.shape) for e in expected),
        "local_bytes": sum(e.spec.num_bytes for e in expected),
        "local_tensors": [
            {
                "name": e.spec.name,
                "shape": e.spec.shape,
                "dtype": _short(e.spec.dtype),
                "pieces": pieces[e.spec.name],
            }
            for e in expected
        ],
    }
