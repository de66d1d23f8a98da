"""The collective lane over gloo on a CPU: refits against raw broadcasts of the same bytes, to one engine and to two.

    python benchmarks/collective.py --json benchmarks/results/collective.json
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/collective.py --json collective-tp2.json

The trainer has one rank, or TP2 under torchrun: then rank 1 brings its pieces to rank 0, which broadcasts. Engines are
worker processes with plain tensors, so loading is one copy. Refits and raw broadcasts alternate, round by round, in the
same processes: a busy neighbour hits both. Then one refit under torch.profiler on every process: with --timeline, a
drawing of which bucket was gathered, broadcast and loaded when. Goals: 80% of raw; a fleet of two at most 1.2x of one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from collective_worker import MeasuredWorker, Raw, Span, Trace
from gpu_trainer import bridge_of, fill
from measure import about, copy_limit, print_table, row, write_json
from multi_gpu_engine import WorkerEngine, digests
from multi_gpu_places import settle
from shapes import SHAPES

from mbridge import init_parallel
from mbridge_rl import WeightSyncer
from mbridge_rl.transports._process_group import Meeting, serve
from mbridge_rl.transports.base import COLLECTIVE

DEADLINE_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--fleets", default="1,2", help="numbers of engines, one after the other")
    parser.add_argument("--bucket-mib", type=int, help="default: chosen by the syncer")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--timeline", type=Path, help="PNG")
    parser.add_argument("--json", type=Path)
    Collective(parser.parse_args()).run()


class _Run(NamedTuple):
    wall_s: float
    cpu_s: float
    outcome: Any


class Collective:
    """Every rank runs every step; rank 0 has the engines and the result."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        settle("", simulate=True)
        init_parallel(tp=int(os.environ.get("WORLD_SIZE", "1")))
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.bridge = bridge_of(args.shape)
        self.bridge.get_model()
        fill(self.bridge, 1)
        self.specs = self.bridge.plan(self.bridge.models).tensors
        self.limit = copy_limit() if self.rank == 0 else 0.0
        self.result: dict[str, Any] = {
            **about(), "kind": "collective", "shape": args.shape, "trainer": {"ranks": self.num_ranks},
            "memcpy_gb_s": self.limit, "rows": [], "fleets": {},
        }  # fmt: skip

    def run(self) -> None:
        for number in map(int, self.args.fleets.split(",")):
            self.fleet(number)
        if self.rank == 0:
            fleets = self.result["fleets"]
            if {"1", "2"} <= fleets.keys():
                for what in ("refit_s", "raw_s"):
                    self.result[f"two_to_one_{what}"] = fleets["2"][what] / fleets["1"][what]
            print_table(self.result["rows"])
            write_json(self.result, self.args.json)
        dist.barrier()
        os._exit(0)

    def fleet(self, number: int) -> None:
        """Refits of `number` engines, raw broadcasts to them beside."""
        engines = []
        if self.rank == 0:
            engines = [WorkerEngine(self.specs, "", simulate=True, kind=MeasuredWorker) for _ in range(number)]
        bucket_bytes = self.args.bucket_mib << 20 if self.args.bucket_mib else None
        syncer = WeightSyncer(
            self.bridge, engines, transport=COLLECTIVE, bucket_bytes=bucket_bytes, deadline_s=DEADLINE_S
        )
        with syncer, ThreadPoolExecutor(max(1, number)) as pool:
            raws = self.rounds(syncer, engines, pool)
            spans = self.timeline(syncer, engines)
        exported = digests(dict(self.bridge.export_weights(self.bridge.models)))
        if self.rank == 0:
            found = self.result["fleets"][str(number)] = raws
            found["is_exact"] = all(engine.holds(exported) for engine in engines)
            found["overlap"] = overlap(spans)
            if number == 1:
                self.result["timeline"] = spans
                if self.args.timeline is not None:
                    draw(spans, self.args.timeline, self.title(raws))
        for engine in engines:
            engine.kill()
        dist.barrier()

    def rounds(self, syncer: WeightSyncer, engines: list[WorkerEngine], pool: ThreadPoolExecutor) -> dict[str, Any]:
        layout, names = syncer.layout, ["trainer", *(f"engine {i}" for i in range(len(engines)))]
        raw = store = None
        if self.rank == 0:
            store = serve("127.0.0.1", DEADLINE_S)
            meeting, size = Meeting("127.0.0.1", store.port, "raw"), layout.bucket_bytes
            joining = [pool.submit(e.call, "raw_join", meeting, i + 1, names, size) for i, e in enumerate(engines)]
            raw = Raw(meeting, 0, names, size, torch.device("cpu"))
            for joined in joining:
                joined.result()
        refits: list[_Run] = []
        raws: list[_Run] = []
        for _ in range(self.args.warm_up + self.args.repeat):
            dist.barrier()
            refits.append(self.run_once(engines, syncer.sync))
            if raw is not None:
                raws.append(self.run_once(engines, partial(self.raw_round, raw, engines, pool, layout.num_bytes)))
                print(f"{len(engines)} engines: {refits[-1].wall_s:.3f} s, raw {raws[-1].wall_s:.3f} s", flush=True)
        cpu_s: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(cpu_s, statistics.median(run.cpu_s for run in refits))
        if raw is None:
            return {}
        raw.close()
        for engine in engines:
            engine.call("raw_close")
        found = self.found(refits[self.args.warm_up :], raws[self.args.warm_up :], syncer, len(engines))
        return found | {"refit_cpu_s": sum(cpu_s), "raw_cpu_s": statistics.median(run.cpu_s for run in raws)}

    @staticmethod
    def raw_round(raw: Raw, engines: list[WorkerEngine], pool: ThreadPoolExecutor, num_bytes: int) -> None:
        others = [pool.submit(engine.call, "raw_run", num_bytes) for engine in engines]
        raw.run(num_bytes)
        for other in others:
            other.result()

    def run_once(self, engines: list[WorkerEngine], action: Callable[[], Any]) -> _Run:
        """Wall seconds of `action`, and CPU seconds of this process and the engines'."""
        before = time.process_time() + sum(engine.call("cpu_s") for engine in engines)
        start = time.perf_counter()
        outcome = action()
        wall_s = time.perf_counter() - start
        return _Run(wall_s, time.process_time() + sum(engine.call("cpu_s") for engine in engines) - before, outcome)

    def found(self, refits: list[_Run], raw_runs: list[_Run], syncer: WeightSyncer, number: int) -> dict[str, Any]:
        layout, reports = syncer.layout, [run.outcome for run in refits]
        walls, raws = [run.wall_s for run in refits], [run.wall_s for run in raw_runs]
        engines = "1 engine" if number == 1 else f"{number} engines"
        rows = [
            row(f"refit of {engines}", walls, layout.num_bytes, self.limit),
            row(f"raw broadcast to {engines}", raws, layout.num_bytes, self.limit),
        ]
        self.result["rows"] += rows
        return {
            "refit_s": rows[0]["seconds"],
            "raw_s": rows[1]["seconds"],
            # of each round: both had the same neighbours
            "share_of_raw": statistics.median(raw / wall for raw, wall in zip(raws, walls, strict=True)),
            "stream_share_of_raw": statistics.median(
                raw / report.phases["stream"] for raw, report in zip(raws, reports, strict=True)
            ),
            "best_share_of_raw": min(raws) / min(walls),
            "walls_s": walls,
            "raws_s": raws,
            "phases_s": {n: statistics.median(r.phases.get(n, 0.0) for r in reports) for n in reports[-1].phases},
            "fill_s": statistics.median(report.fill_s for report in reports),
            "load_s": statistics.median(report.load_s for report in reports),
            "num_buckets": layout.num_buckets,
            "bucket_bytes": layout.bucket_bytes,
            "num_bytes": layout.num_bytes,
        }

    def timeline(self, syncer: WeightSyncer, engines: list[WorkerEngine]) -> dict[str, list[Span]]:
        """One refit under a profiler on every process."""
        for engine in engines:
            engine.call("trace")
        trace = Trace()
        syncer.sync()
        everyone: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(everyone, trace.stop())
        spans = {f"trainer rank {rank}": own for rank, own in enumerate(everyone)}
        spans |= {f"engine {i}": engine.call("traced") for i, engine in enumerate(engines)}
        first = min((span.start for own in spans.values() for span in own), default=0.0)
        return {who: [Span(s.what, s.start - first, s.stop - first) for s in own] for who, own in spans.items()}

    def title(self, found: dict[str, Any]) -> str:
        layout = f"TP{self.num_ranks} trainer" if self.num_ranks > 1 else "trainer of one rank"
        return (
            f"{self.args.shape}, {found['num_bytes'] / 1e9:.2f} GB in {found['num_buckets']} buckets, {layout}, gloo: "
            f"refit at {100 * found['share_of_raw']:.0f}% of a raw broadcast"
        )


def overlap(spans: dict[str, list[Span]]) -> dict[str, float]:
    """Seconds of each kind of work on any process, and of all together: less than their sum, if they overlap."""
    kinds = {span.what for own in spans.values() for span in own}
    by_kind = {what: _covered([s for own in spans.values() for s in own if s.what == what]) for what in sorted(kinds)}
    return by_kind | {"all": _covered([span for own in spans.values() for span in own])}


def _covered(spans: list[Span]) -> float:
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0.0, span.stop - max(span.start, end))
        end = max(end, span.stop)
    return total


COLOURS = {"gather": "#e08214", "fill": "#8073ac", "broadcast": "#1b7837", "load": "#2166ac"}


def draw(spans: dict[str, list[Span]], target: Path, title: str) -> None:
    """A lane for each process and kind of work; a bar for each bucket, with its number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lanes = [(who, what) for who, own in spans.items() for what in COLOURS if any(s.what == what for s in own)]
    figure, axis = plt.subplots(figsize=(11, 0.8 + 0.42 * len(lanes)), layout="constrained")
    for place, (who, what) in enumerate(lanes):
        bars = sorted((s for s in spans[who] if s.what == what), key=lambda s: s.start)
        for bucket, bar in enumerate(bars):
            width = (bar.stop - bar.start) * 1e3
            shade = 1.0 if bucket % 2 == 0 else 0.6
            axis.barh(place, width, left=bar.start * 1e3, color=COLOURS[what], alpha=shade, height=0.8)
            axis.text((bar.start + bar.stop) * 500, place, str(bucket), ha="center", va="center", fontsize=7, color="w")
    axis.set_yticks(range(len(lanes)), [f"{who}: {what}" for who, what in lanes], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("ms; each bar is a bucket, from when it was begun until it was complete")
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
