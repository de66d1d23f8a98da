"""Models the time of one refit at 8 to 1,024 GPUs from measured parts. Writes a page, its data and a plot.

    python benchmarks/scaling.py benchmarks/results/scaling.md

Reads the parts from the JSON files of runs beside it (h200/, h200-x2/). What nobody measured is in ASSUMED, and on the
page.
Half of the GPUs train, half serve; colocated, all do both. The model is arithmetic on bytes, links and messages.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from mbridge_rl.messages import Loaded

NUM_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GPUS_PER_HOST = 8
BUCKET_GB = 0.5369  # 512 MiB
ASSUMED = {
    "network_gb_s": 45.0,  # 90% of one 400 Gbit/s adapter for each GPU
    "hop_s": 20e-6,  # from host to host, in each bucket: a broadcast passes through all hosts in a chain
}


@dataclass(frozen=True)
class Model:
    """A model and how it is split."""

    name: str
    num_gb: float
    num_tensors: int
    tp: int
    pp: int
    ep: int
    engine_tp: int

    @property
    def trainer_gpus(self) -> int:
        """Of one replica; experts are spread over its data-parallel ranks too."""
        return self.pp * max(self.tp, self.ep)


MODELS = (
    Model("Qwen2.5-7B", 15.2, 339, 2, 1, 1, 1),
    Model("Qwen3-30B-A3B", 61.1, 18867, 2, 1, 4, 2),
    Model("Qwen3-235B-A22B", 470.2, 36945, 4, 4, 8, 8),
)
WAYS = ("broadcast", "broadcast, loads as copies", "sharded, loads as copies", "colocated, direct")


@dataclass(frozen=True)
class Parts:
    """What was measured. Seconds and GB/s (1e9)."""

    nvlink_gb_s: float  # raw NCCL broadcast between two GPUs
    slot_share: float  # of it, up to the worker's slot
    copy_gb_s: float  # of a plain copy on a GPU
    load_gb_s: float  # of vLLM's loader, the part that grows with bytes
    load_tensor_s: float  # the part that grows with tensors
    bucket_s: float  # between a bucket's loading and the next one's
    fixed_s: float  # enter, pause, commit, resume
    direct_fixed_s: float  # the direct path's time beyond one copy
    message_s: float  # that rank 0 needs for one message: measured here, on a CPU

    @classmethod
    def of(cls, folder: Path) -> Parts:
        wire = json.loads((folder / "h200-x2/qwen2.5-7b-broadcast.json").read_text())
        dense = wire["paths"]["collective"]
        moe = json.loads((folder / "h200/qwen3-30b-a3b.json").read_text())
        alone = json.loads((folder / "h200/qwen2.5-7b-alone.json").read_text())
        gb = [result["rows"][0]["bytes"] / 1e9 for result in (wire, moe)]
        tensors = [dense["num_tensors"], moe["paths"]["bucket"]["num_tensors"]]
        loads = [dense["load_s"], moe["paths"]["bucket"]["load_s"]]
        # Two runs, two unknowns: load_s = tensors * load_tensor_s + gb / load_gb_s
        tensor_s = (loads[1] * gb[0] - loads[0] * gb[1]) / (tensors[1] * gb[0] - tensors[0] * gb[1])
        nvlink = wire["raw"]["best GB/s"]
        first_s = gb[0] / dense["num_buckets"] / nvlink
        phases = dense["phases_s"]
        direct = alone["rows"][0]
        return cls(
            nvlink_gb_s=nvlink,
            slot_share=0.95,  # gpu_collective.py speed: 346 of 364 GB/s
            copy_gb_s=alone["memcpy_gb_s"],
            load_gb_s=gb[0] / (loads[0] - tensors[0] * tensor_s),
            load_tensor_s=tensor_s,
            bucket_s=max(0.0, (phases["stream"] - loads[0] - first_s) / dense["num_buckets"]),
            fixed_s=sum(seconds for name, seconds in phases.items() if name != "stream"),
            direct_fixed_s=direct["seconds"] - direct["bytes"] / 1e9 / alone["memcpy_gb_s"],
            message_s=message_seconds(),
        )


def message_seconds(count: int = 1000) -> float:
    """Seconds that one end needs for a message over a socket of this host: half of both ends, the best of 25."""
    context = zmq.Context()
    ours, theirs = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    port = ours.bind_to_random_port("tcp://127.0.0.1")
    theirs.setsockopt(zmq.IDENTITY, b"w")
    theirs.connect(f"tcp://127.0.0.1:{port}")
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Loaded)
    times = []
    for _ in range(25):
        start = time.perf_counter()
        for number in range(count):
            theirs.send(encoder.encode(Loaded(1, number, 0.1)))
            decoder.decode(ours.recv_multipart()[1])
        times.append((time.perf_counter() - start) / count)
    context.destroy(linger=0)
    return min(times) / 2


def colocated(model: Model, num_gpus: int, parts: Parts) -> dict[str, float]:
    """Every worker copies its share from the trainers' memory on its host. None if a replica spans hosts."""
    if model.trainer_gpus > GPUS_PER_HOST:
        return {}
    share = model.num_gb / model.engine_tp
    crossing = share * (1 - 1 / model.trainer_gpus)
    copy_s = (share - crossing) / parts.copy_gb_s + crossing / parts.nvlink_gb_s
    control_s = 2 * 2 * 2 * num_gpus * parts.message_s  # two steps, to trainers and workers, and back
    return {
        "wire": copy_s,
        "control": control_s,
        "total": parts.direct_fixed_s + copy_s + control_s,
        "link_gb": crossing,
    }


def remote(model: Model, num_gpus: int, parts: Parts, *, sharded: bool, loads_as_copies: bool) -> dict[str, float]:
    """Trainers and engines on GPUs of their own."""
    num_trainers = num_workers = num_gpus // 2
    if num_trainers < model.trainer_gpus or num_workers < model.engine_tp:
        return {}
    is_one_host = num_gpus <= GPUS_PER_HOST
    link = parts.nvlink_gb_s if is_one_host else ASSUMED["network_gb_s"]
    num_buckets = math.ceil(model.num_gb / BUCKET_GB)
    num_engines, num_hosts = num_workers // model.engine_tp, max(1, num_workers // GPUS_PER_HOST)
    if sharded:  # each worker gets its share only, from all trainers, which share the engines among them
        incoming = model.num_gb / model.engine_tp
        outgoing = model.num_gb * num_engines / num_trainers
        hops_s = 0.0
    else:  # stage after stage: one sender at a time, and every worker gets everything
        incoming = outgoing = model.num_gb
        hops_s = 0.0 if is_one_host else num_buckets * num_hosts * ASSUMED["hop_s"]
    wire_s = max(incoming, outgoing) / (link * parts.slot_share) + hops_s
    if loads_as_copies:
        load_s = incoming / parts.copy_gb_s
    else:
        load_s = model.num_tensors * parts.load_tensor_s + model.num_gb / model.engine_tp / parts.load_gb_s
    # The gather within a stage runs while the bucket before is broadcast: all but the sender's own part crosses once.
    gather_link = parts.nvlink_gb_s if model.trainer_gpus // model.pp <= GPUS_PER_HOST else ASSUMED["network_gb_s"]
    gather_s = 0.0 if sharded else model.num_gb * (1 - model.pp / model.trainer_gpus) / gather_link
    control_s = 2 * num_buckets * (num_trainers + num_workers) * parts.message_s
    slowest = max(wire_s, load_s + num_buckets * parts.bucket_s, gather_s, control_s)
    first_s = wire_s / num_buckets + load_s / num_buckets  # what nothing overlaps
    return {
        "wire": wire_s,
        "load": load_s,
        "gather": gather_s,
        "control": control_s,
        "total": parts.fixed_s + first_s + slowest,
        "link_gb": max(incoming, outgoing),
    }


def predict(way: str, model: Model, num_gpus: int, parts: Parts) -> dict[str, float]:
    if way == "colocated, direct":
        return colocated(model, num_gpus, parts)
    return remote(model, num_gpus, parts, sharded="sharded" in way, loads_as_copies="copies" in way)


def draw(table: dict[str, dict[str, dict[int, dict[str, float]]]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(table), figsize=(12, 4), sharey=True, layout="constrained")
    for axis, (model, by_way) in zip(panels, table.items(), strict=True):
        for (way, by_size), mark in zip(by_way.items(), "os^D", strict=True):
            points = [(n, found["total"]) for n, found in by_size.items() if found]
            if points:
                axis.plot(*zip(*points, strict=True), marker=mark, label=way, linewidth=1.4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(NUM_GPUS, [str(n) for n in NUM_GPUS], fontsize=8)
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.25)
    panels[0].set_ylabel("one refit, s (modelled)")
    panels[0].legend(fontsize=8)
    figure.savefig(target, dpi=130)
    plt.close(figure)


TEXT = """\
# One refit at 8 to 1,024 GPUs: a model from measured parts

`python benchmarks/scaling.py benchmarks/results/scaling.md` writes this page, `scaling.json` and the plot.
**Nothing here was run on more than 2 GPUs**: it is arithmetic on what was measured on one and two H200.

![modelled time of a refit]({picture})

## Measured parts

| part | value | from |
|---|---|---|
| NVLink, raw NCCL broadcast | {p.nvlink_gb_s:.0f} GB/s | `h200-x2/qwen2.5-7b-broadcast.json` |
| of it, up to the worker's slot | {slot_percent:.0f}% | `tests/mbridge_rl/gpu_collective.py speed` |
| plain copy on a GPU | {p.copy_gb_s:.0f} GB/s | `h200/qwen2.5-7b-alone.json` |
| vLLM's loader | {tensor_us:.0f} us a tensor + 1 s for each {p.load_gb_s:.0f} GB | two equations: the first file, \
and the bucket path of `h200/qwen3-30b-a3b.json` |
| from one bucket to the next | {bucket_ms:.2f} ms | the first file: stream beyond loading |
| enter, pause, commit, resume | {fixed_ms:.1f} ms | the first file |
| direct path beyond its copy | {direct_ms:.1f} ms | `h200/qwen2.5-7b-alone.json` |
| one control message at rank 0 | {message_us:.0f} us | half of both ends, on the CPU that made this page |

{check}

## Assumptions

- Hosts of {gpus} GPUs, one adapter of 400 Gbit/s for each, of which 90% is reached ({network:.0f} GB/s). Within a host,
  NVLink as measured.
- A broadcast is a chain: the sender sends each byte once, each host adds {hop_us:.0f} us to each bucket. One sender at
  a time (buckets come in a fixed order), so stages do not add bandwidth.
- Half of the GPUs train and half serve; colocated, all do both. Trainers are split as named below, engines by TP; all
  replicas of an engine take part. Buckets of 512 MiB.
- What overlaps costs the slowest of: wire, loading (with the step from bucket to bucket), gathering, and rank 0's
  messages (one to each trainer and worker for each bucket, and an answer). Then the fixed part and the first bucket.
- "loads as copies": as if a worker copied each bucket by a recorded table, as the direct path does, instead of through
  vLLM's loader. "sharded": a worker gets 1/TP of the bytes, from all trainer ranks, which share the engines among them
  (only the adapter limits: no congestion in the network).
- Colocated, a worker's own GPU holds 1/N of a trainer replica of N GPUs; the rest it reads over NVLink (less if both
  are split alike). A replica that spans hosts has no direct path.

## What it says

- Within a host, loading bounds a MoE's broadcast, not the wire: a table of copies in place of vLLM's loader is worth
  more than any change of the transport. Between hosts the one adapter of the one sender bounds it: several senders at
  once would help, or `mode="sharded"`, which takes 1/TP of the bytes to each worker.
- At 1,024 GPUs (sharded: from 128 to 512 on) rank 0's messages bound everything, as each bucket costs two for every
  process. More bytes in a bucket, several buckets in a message, or one speaker for each host would move that.
- The direct path does not depend on the number of GPUs but for those messages.

## Seconds of one refit

"""


def page(parts: Parts, table: dict[str, dict[str, dict[int, dict[str, float]]]], picture: str, check: str) -> str:
    text = TEXT.format(
        p=parts,
        picture=picture,
        check=check,
        gpus=GPUS_PER_HOST,
        slot_percent=100 * parts.slot_share,
        tensor_us=1e6 * parts.load_tensor_s,
        bucket_ms=1e3 * parts.bucket_s,
        fixed_ms=1e3 * parts.fixed_s,
        direct_ms=1e3 * parts.direct_fixed_s,
        message_us=1e6 * parts.message_s,
        network=ASSUMED["network_gb_s"],
        hop_us=1e6 * ASSUMED["hop_s"],
    )
    lines = [line for model in MODELS for line in _seconds(model, table[model.name])] + _bytes(table)
    return text + "\n".join(lines) + "\n"


def _seconds(model: Model, by_way: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    split = f"trainer TP{model.tp} PP{model.pp} EP{model.ep}, engines TP{model.engine_tp}"
    lines = [
        f"**{model.name}** ({model.num_gb:g} GB, {model.num_tensors:,} tensors; {split})",
        "",
        "| GPUs | " + " | ".join(by_way) + " | broadcast: wire / load / gather / control |",
        "|---|" + "---|" * (len(by_way) + 1),
    ]
    for size in NUM_GPUS:
        cells = [f"{found['total']:.3f}" if (found := by_way[way][size]) else "" for way in by_way]
        if not any(cells):
            continue
        found = by_way["broadcast"][size]
        stages = " / ".join(f"{found[k]:.3f}" for k in ("wire", "load", "gather", "control")) if found else ""
        lines.append(f"| {size} | " + " | ".join(cells) + f" | {stages} |")
    return [*lines, ""]


def _bytes(table: dict[str, dict[str, dict[int, dict[str, float]]]]) -> list[str]:
    lines = [
        "GB over the busiest link in one refit (sender's or worker's adapter; colocated: NVLink into one GPU):",
        "",
        "| model | broadcast | sharded, 64 GPUs | sharded, 1,024 GPUs | colocated |",
        "|---|---|---|---|---|",
    ]
    sharded = "sharded, loads as copies"
    at = [("broadcast", 1024), (sharded, 64), (sharded, 1024), ("colocated, direct", 8)]
    for name, by_way in table.items():
        gb = [f"{cell['link_gb']:.1f}" if (cell := by_way[way][size]) else "" for way, size in at]
        lines.append(f"| {name} | " + " | ".join(gb) + " |")
    return lines


def checked(parts: Parts, folder: Path) -> str:
    """What the model says of the run that its parts are from, and of another."""
    wire = json.loads((folder / "h200-x2/qwen2.5-7b-broadcast.json").read_text())
    measured = wire["rows"][0]["seconds"]
    num_gb = wire["rows"][0]["bytes"] / 1e9
    seven = Model("", num_gb, wire["paths"]["collective"]["num_tensors"], 1, 1, 1, 1)
    said = remote(seven, 2, parts, sharded=False, loads_as_copies=False)["total"]
    thirty = remote(Model("", 61.1, 18867, 1, 1, 1, 1), 2, parts, sharded=False, loads_as_copies=False)["total"]
    return (
        f"Check: for the 7B on two GPUs the model says {said * 1e3:.0f} ms, {measured * 1e3:.0f} were measured (its\n"
        f"own source); for the 30B-A3B on two GPUs {thirty * 1e3:,.0f} ms, 1,299 were seen (not a source)."
    )


def main() -> None:
    target = Path(sys.argv[1])
    parts = Parts.of(target.parent)
    table = {
        model.name: {way: {n: predict(way, model, n, parts) for n in NUM_GPUS} for way in WAYS} for model in MODELS
    }
    draw(table, target.with_suffix(".png"))
    target.write_text(page(parts, table, target.with_suffix(".png").name, checked(parts, target.parent)))
    data: dict[str, Any] = {"measured": asdict(parts), "assumed": ASSUMED, "models": [asdict(m) for m in MODELS]}
    target.with_suffix(".json").write_text(json.dumps(data | {"seconds": table}, indent=1) + "\n")
    print(target.read_text())


if __name__ == "__main__":
    main()
