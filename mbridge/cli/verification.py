"""`verify`: whether mbridge moves a checkpoint into Megatron-Core, and back, without changing a bit.

Ranks load the checkpoint at the topology asked for and export it. Every tensor is compared with the files, which are
read by other code (files.py). Then logits in fp32 are compared with transformers', which knows nothing of mbridge.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, PeerError
from ..topology import Topology
from .display import Progress, readable_bytes
from .expected import layers_of_rank
from .inspection import Described, describe, sizes_of
from .ranks import run_ranks

LIMIT: Final = 1e-4  # of |logits - transformers'|, relative to the largest logit if that is above 1
FP32_BYTES: Final = 4
ROOM: Final = 1.3  # memory wanted, as a multiple of the weights'


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for. None: choose."""

    path: str
    topology: Topology
    dtype: torch.dtype | None
    layers_first: int | None
    layers_last: int | None
    against: Path | None
    forward: bool | None
    spec: str
    device: str
    timeout_s: float
    ignore_config_fields: tuple[str, ...]


def verify(request: Request) -> bool:
    """Print what was compared and every difference; returns whether there was none.

    Raises MBridgeError if it cannot be done: sizes that do not fit, a damaged file, a rank that died, or `forward`
    asked for where it cannot be had.
    """
    model = describe(request.path, request.dtype, request.ignore_config_fields)
    topology = request.topology
    layers_of_rank(
        model.num_layers, topology, topology.coordinates(0), request.layers_first, request.layers_last
    )  # raises before any process is started
    device = _device(request.device, topology.world_size)
    num_parameters = sum(math.prod(spec.shape) for spec in model.table.tensors())
    dtype = str(model.table.dtype).removeprefix("torch.")
    print(f"{model.bridge.path}: {', '.join(model.family.model_types)}, {num_parameters:,} parameters as {dtype}")
    print(f"split    {sizes_of(topology)}; {topology.world_size} x {device}")
    with tempfile.TemporaryDirectory(prefix="mbridge-verify-") as scratch, Progress() as progress:
        folder = Path(scratch)
        job = _job(request, model)
        skipped = _why_no_forward(request, model, num_parameters)
        if skipped is None:
            job["logits_to"] = scratch
            (found,) = run_ranks(
                {**job, "job": "reference"}, 1, device="cpu", timeout_s=request.timeout_s, on_progress=progress.update
            )
            skipped = found["skipped"]
        if skipped is not None and request.forward:
            raise PeerError(f"logits cannot be compared, as --forward asks: {skipped}")
        job["logits_to"] = None if skipped is not None else scratch
        results = run_ranks(
            {**job, "job": "weights"}, topology.world_size,
            device=device, timeout_s=request.timeout_s, on_progress=progress.update,
        )  # fmt: skip
        forward = _compare_logits(folder, job["vocab_size"]) if skipped is None else (None, f"skipped: {skipped}")
    return _report(results, forward)


def _job(request: Request, model: Described) -> dict[str, Any]:
    topology = request.topology
    uneven = {
        "num_layers_in_first_pipeline_stage": request.layers_first,
        "num_layers_in_last_pipeline_stage": request.layers_last,
    }
    return {
        "path": str(model.bridge.path),
        "against": str(request.against or model.bridge.path),
        "dtype": str(model.table.dtype).removeprefix("torch."),
        "rounded": request.dtype is not None,
        "spec": request.spec,
        "topology": {axis: getattr(topology, axis) for axis in ("tp", "pp", "vpp", "ep", "etp")},
        "extra_args": {name: value for name, value in uneven.items() if value is not None},
        "ignore_config_fields": list(request.ignore_config_fields),
        "vocab_size": int(model.bridge.raw_config["vocab_size"]),
    }


def _device(wanted: str, world_size: int) -> str:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and available < world_size:
        raise PeerError(
            f"--device cuda needs a GPU for each of {world_size} ranks, found {available}; use --device cpu"
        )
    return "cuda" if wanted != "cpu" and available >= world_size else "cpu"


def _why_no_forward(request: Request, model: Described, num_parameters: int) -> str | None:
    """None if the logits should be compared."""
    if request.forward is False:
        return "--no-forward"
    assert model.bridge.path is not None
    if Checkpoint.open(model.bridge.path).scaled:
        return "transformers does not load fp8 files in fp32"
    if request.forward is None:
        needed = int(ROOM * FP32_BYTES * num_parameters * request.topology.dp)
        free = _free_memory()
        if free is not None and needed > free:
            return f"fp32 models need {readable_bytes(needed)}, {readable_bytes(free)} are free; --forward tries anyway"
    return None


def _free_memory() -> int | None:
    """Bytes that new processes may take, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    (free,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(free) * 1024


def _compare_logits(folder: Path, vocab_size: int) -> tuple[bool, str]:
    expected = load_file(folder / "reference.safetensors")["logits"]
    files = sorted(folder.glob("part*.safetensors"), key=lambda file: int(file.stem.removeprefix("part")))
    if not files:
        raise CheckpointError("no rank of the last pipeline stage wrote logits")
    found = torch.cat([load_file(file)["logits"] for file in files], dim=-1)[..., :vocab_size]
    if found.shape != expected.shape:
        return False, f"logits have shape {list(found.shape)}, transformers' {list(expected.shape)}"
    largest = float(expected.abs().max())
    worst = float((found - expected).abs().max())
    limit = LIMIT * max(1.0, largest)
    equal = worst <= limit  # False for a NaN
    return equal, f"max |logits - transformers'| = {worst:.2g}, limit {limit:.2g}, logits up to {largest:.3g}"


def _report(results: list[dict[str, Any]], forward: tuple[bool | None, str]) -> bool:
    first = results[0]
    differences = [*first["differences"], *(f"{name}: in the files, not exported" for name in first["left"])]
    equal, text = forward
    if equal is False:
        differences.append(f"forward: {text}")
    print(f"load     {readable_bytes(sum(r['num_bytes'] for r in results))} read by all ranks")
    print(f"export   {first['num_tensors']} tensors compared bit for bit")
    print(f"forward  {text}")
    for note in first["notes"]:
        print(f"note     {note}")
    print(f"{len(differences)} differences", *differences, sep="\n  ")
    return not differences
