"""One process of a job of `verify`: `python -m mbridge.cli.rank FD` (ranks.py starts it)."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from ..bridge import AutoBridge, Bridge
from ..errors import MBridgeError, PeerError
from ..megatron import forward_backward_func, init_parallel, read_topology, unwrap
from .files import DiskTensors, difference

COLLECTIVE_TIMEOUT_S: Final = 600.0
BATCH, LENGTH = 2, 64  # sequences whose logits are compared, and tokens in each

Job = dict[str, Any]


class Channel:
    """Messages to the process that started this one."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, kind: str, **message: Any) -> None:
        self._pipe.send_bytes(json.dumps({"kind": kind, **message}).encode())

    def leave_with_parent(self) -> None:
        """End this process when the other end closes, whatever it is doing then."""

        def watch() -> None:
            try:
                self._pipe.recv_bytes()
            except (EOFError, OSError):
                os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    pipe = Connection(int(sys.argv[1]))
    job: Job = json.loads(pipe.recv_bytes())
    channel = Channel(pipe)
    channel.leave_with_parent()
    try:
        result = {"weights": weights, "reference": reference}[job["job"]](job, channel)
    except MBridgeError as error:
        text = f"{type(error).__name__}: {error}"
        channel.send("error", text=text, is_peer_error=isinstance(error, PeerError))
        return 2
    channel.send("result", **result)
    return 0


def weights(job: Job, channel: Channel) -> dict[str, Any]:
    """Load, export and compare; then, if asked, the logits of an fp32 model of the same topology."""
    _start(job)
    dtype = getattr(torch, job["dtype"])
    bridge = _bridge(job, dtype)
    models = bridge.get_model(spec=job["spec"])
    # What is there before must not make a wrong load look right.
    for tensor in bridge.local_tensors(models).values():
        tensor.fill_(float("nan"))
    assert bridge.path is not None
    num_bytes = bridge.load_weights(models, bridge.path)
    result = {"num_bytes": num_bytes, **_compare(job, bridge, models, channel)}
    if job["logits_to"] is not None:
        if dtype is not torch.float32 or job["spec"] == "te":
            del models
            bridge.models.clear()
            gc.collect()
            bridge = _bridge(job, torch.float32)
            # Not TransformerEngine's layers: they multiply fp32 matrices in TF32.
            models = bridge.get_model(weight_path=bridge.path, spec="local")
        _save_logits(job, bridge, models)
    return result


def _start(job: Job) -> None:
    rank, size = job["rank"], job["world_size"]
    cuda = job["device"] == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(job["store"], size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    init_parallel(**job["topology"])


def _bridge(job: Job, dtype: torch.dtype) -> Bridge:
    bridge = AutoBridge.from_pretrained(job["path"], dtype=dtype, ignore_config_fields=job["ignore_config_fields"])
    bridge.set_extra_args(**job["extra_args"])
    return bridge


def _compare(job: Job, bridge: Bridge, models: Sequence[nn.Module], channel: Channel) -> dict[str, Any]:
    """Run the export on every rank; rank 0 compares what it yields with the files, in both directions."""
    compares = job["rank"] == 0
    disk = DiskTensors.open(Path(job["against"])) if compares else None
    left = set() if disk is None else set(disk.files)
    total, done = len(left), 0
    differences: list[str] = []
    for name, tensor in bridge.export_weights(models):
        if disk is None:
            continue
        channel.send("progress", phase="compare", done=done, total=total)
        done += 1
        if name not in disk.files:
            differences.append(f"{name}: exported {list(tensor.shape)}, not in the files")
            continue
        if name not in left:
            differences.append(f"{name}: exported twice")
        left.discard(name)
        found = tensor.cpu()
        for file in disk.files[name]:
            problem = difference(found, disk.read(name, file), rounded=job["rounded"])
            if problem is not None:
                differences.append(f"{name}: {problem} (in {file.name})")
    if compares:
        channel.send("progress", phase="compare", done=done, total=total)
    return {"differences": differences, "num_tensors": done, "left": sorted(left), "notes": disk.notes if disk else []}


def _save_logits(job: Job, bridge: Bridge, models: Sequence[nn.Module]) -> None:
    """Each tensor-parallel rank of the last stage writes its part of the vocabulary."""
    logits = _logits(models, tokens_of(job["vocab_size"]))
    at = read_topology()[1]
    if logits is not None and at.dp == 0:
        save_file({"logits": logits.float().cpu().contiguous()}, f"{job['logits_to']}/part{at.tp}.safetensors")


def _logits(models: Sequence[nn.Module], tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [batch, length, vocabulary of this rank] by Megatron-Core's own schedule; None before the last stage."""
    topology, _ = read_topology()
    device = next(unwrap(models[0]).parameters()).device
    tokens = tokens.to(device)
    batch, length = tokens.shape
    positions = torch.arange(length, device=device).expand(batch, length)
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)  # True is masked
    for chunk in models:
        chunk.eval()

    def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        next(data)
        return model(tokens, positions, causal), lambda logits, non_loss_data=True: logits

    # The interleaved schedule wants a multiple of the stages: all are the same micro-batch.
    count = topology.pp
    iterators = [iter(range(count)) for _ in models]
    several = len(models) > 1
    with torch.no_grad():
        outputs = forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if several else iterators[0],
            model=list(models) if several else models[0],
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[-1] if outputs else None


def tokens_of(vocab_size: int) -> torch.Tensor:
    """The same token ids [batch, length] for both sides."""
    tokens = torch.randint(0, vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(11))
    tokens[0, -1] = vocab_size - 1  # the row beside the padding
    return tokens


def reference(job: Job, channel: Channel) -> dict[str, Any]:
    """transformers' logits in fp32 on the CPU; `skipped` says why there are none."""
    try:
        import transformers
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        return {"skipped": f"transformers cannot be imported: {error}"}
    argument = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    channel.send("progress", phase="reference", done=0, total=1)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            job["path"], **{argument: torch.float32}, attn_implementation="eager", output_loading_info=True
        )
    except (ImportError, ValueError, KeyError, OSError) as error:
        return {"skipped": f"transformers cannot load the model: {error}"}
    missing = sorted(info["missing_keys"])
    if missing:
        return {"skipped": f"transformers finds no weights for {len(missing)} of its parameters, such as {missing[0]}"}
    model.eval()
    with torch.no_grad():
        logits = model(tokens_of(job["vocab_size"])).logits
    save_file({"logits": logits.contiguous()}, f"{job['logits_to']}/reference.safetensors")
    channel.send("progress", phase="reference", done=1, total=1)
    return {"skipped": None}


if __name__ == "__main__":
    sys.exit(main())
