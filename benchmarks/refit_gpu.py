"""One case of the GPU benchmark: refits of a live vLLM from a Megatron trainer on the same GPU.

    python benchmarks/refit_gpu.py --shape qwen2.5-7b --paths direct,bucket --verify --keep --soak 1000 --json a.json
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/refit_gpu.py \
        --shape qwen3-30b-a3b --tp 2 --ep 2 --paths direct --json d.json

Needs no checkpoint: vLLM starts with dummy weights, the trainer with random ones. Several trainer ranks share the GPU
over gloo. The JSON is written anew after each stage: what was measured stays when a later one fails, which is then in
`errors`. Times are wall seconds around `sync()` on rank 0, medians; the limit is one plain copy of
8 GB by the same process, before the models are made. Without a GPU it runs small shapes, as a dry run.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from gpu_engine import config_folder, engine_options, greedy, shut_down
from gpu_trainer import bridge_of, change_one_element, fill
from measure import about, copy_limit, device_used_bytes, print_table, row, turn, write_json
from shapes import SHAPES, make_config

from mbridge import destroy_parallel, init_parallel
from mbridge_rl import SyncReport, WeightSyncer
from mbridge_rl.engines.vllm import start_llm

DEADLINE_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--etp", type=int, help="default: 1 if --ep is more than 1, else --tp")
    parser.add_argument("--paths", default="direct", help="one or several of direct, bucket, auto: a,b")
    parser.add_argument("--engine", choices=("eager", "graphs"), default="eager")
    parser.add_argument("--quantization", help="of vLLM, such as fp8 (online)")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--verify", action="store_true", help="checksums, and that a changed element is found")
    parser.add_argument("--keep", action="store_true", help="a refit while requests are in flight")
    parser.add_argument("--soak", type=int, default=0, help="so many more refits by the first path")
    parser.add_argument("--json", type=Path)
    Case(parser.parse_args()).run()


class Case:
    """Trainer, engine and result of one run. Every rank runs every stage; rank 0 has the engine and the result."""

    llm: Any = None
    syncer: WeightSyncer

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.perf_counter()
        init_parallel(tp=args.tp, ep=args.ep, etp=args.etp or (1 if args.ep > 1 else args.tp))
        self.rank = dist.get_rank()
        self.num_bytes = 0
        self.limit = 0.0
        self.result: dict[str, Any] = {
            **about(), "shape": args.shape, "engine": args.engine, "quantization": args.quantization,
            "trainer": {"ranks": dist.get_world_size(), "tp": args.tp, "ep": args.ep, "etp": args.etp},
            "rows": [], "paths": {}, "tokens": {}, "memory": {}, "seconds": {}, "errors": {},
        }  # fmt: skip

    def run(self) -> None:
        with ExitStack() as stack:
            booted = self.stage("boot", self.boot)
            if self.rank == 0:
                stack.enter_context(turn())
            self.measure(booted)
        if self.rank == 0 and self.result["rows"]:
            print_table(self.result["rows"])
        if self.llm is not None:
            shut_down(self.llm)
        destroy_parallel()
        os._exit(0 if not self.result["errors"] else 1)  # nothing of an engine or a peer may hold this process up

    def measure(self, booted: bool) -> None:
        args = self.args
        if booted:
            if self.rank == 0:
                self.limit = self.result["memcpy_gb_s"] = copy_limit()
            for number, path in enumerate(args.paths.split(",")):
                if not self.stage(f"{path}: connect", lambda p=path: self.connect(p)):
                    continue
                self.stage(f"{path}: refit", lambda p=path: self.refit(p))
                if args.verify:
                    self.stage(f"{path}: verify", lambda p=path: self.verify(p))
                self.stage(f"{path}: tokens", lambda p=path: self.tokens(p))
                if number == 0:
                    self.stage("change", self.change)
                    if args.soak:
                        self.stage("soak", self.soak)
                self.stage(f"{path}: close", self.syncer.close)
            if args.keep:
                self.stage("keep", self.keep)

    def stage(self, name: str, action: Callable[[], None]) -> bool:
        """Run one stage, write what is known so far. Whether every rank succeeded."""
        start = time.perf_counter()
        failed = torch.zeros(1)
        try:
            action()
        except Exception:  # noqa: BLE001  the other stages go on; this one's words are in the result
            self.result["errors"][name] = traceback.format_exc()[-3000:]
            print(f"rank {self.rank}, {name}:\n{traceback.format_exc()}", flush=True)
            failed += 1
        if dist.get_world_size() > 1:  # then it is gloo: NCCL takes no two ranks on one GPU
            dist.all_reduce(failed)
        self.result["seconds"][name] = round(time.perf_counter() - start, 2)
        self.result["seconds"]["all"] = round(time.perf_counter() - self.started, 2)
        if self.rank == 0 and self.args.json is not None:
            write_json(self.result, self.args.json, quiet=True)
            print(f"{self.result['seconds']['all']:7.1f} s  {name}: {'FAILED' if failed else 'ok'}", flush=True)
        return not failed

    def boot(self) -> None:
        """The engine starts in its process while this one builds the trainer's model."""
        args = self.args
        if self.rank == 0:
            self.mark("empty")
        folder = make_config(args.shape, config_folder())
        self.bridge = bridge = bridge_of(args.shape)
        if self.rank:
            bridge.get_model()
        else:
            import vllm  # noqa: F401  here, not in the thread: two imports at once can meet half-made modules

            options = engine_options(args.shape, graphs=args.engine == "graphs", quantization=args.quantization)
            self.thread = ThreadPoolExecutor(1)  # kept: the engine's process may be tied to the thread that made it
            coming = self.thread.submit(start_llm, str(folder), worker_extension_cls="gpu_engine.Probe", **options)
            try:
                bridge.get_model()
            finally:
                self.llm = coming.result()
            self.result["num_graphs"] = self.llm.collective_rpc("probe_num_graphs")[0]
        fill(self.bridge, 1)

    def connect(self, path: str) -> None:
        self.mark(f"{path}: before")
        start = time.perf_counter()
        self.syncer = WeightSyncer(self.bridge, self.llm, path=path, deadline_s=DEADLINE_S)
        self.result["paths"][path] = {"connect_s": time.perf_counter() - start}
        self.mark(f"{path}: connected")

    def refit(self, path: str) -> None:
        found = self.result["paths"][path]
        first, _ = self.timed()
        found["first_refit_s"] = first
        runs = [self.timed() for _ in range(self.args.warm_up + self.args.repeat)][self.args.warm_up :]
        self.mark(f"{path}: refitted")
        times, reports = [wall for wall, _ in runs], [report for _, report in runs]
        last, self.num_bytes = reports[-1], reports[-1].num_bytes
        found |= {
            "wall_s": times,
            "total_s": median(report.total_s for report in reports),
            "phases_s": {name: median(r.phases.get(name, 0.0) for r in reports) for name in last.phases},
            "calls_s": {name: median(r.calls_s.get(name, 0.0) for r in reports) for name in last.calls_s},
            "fill_s": median(report.fill_s for report in reports),
            "load_s": median(report.load_s for report in reports),
            "groups": dict(Counter(last.paths.values())),
            "reasons": dict(list(last.reasons.items())[:8]),
            "num_reasons": len(last.reasons),
            "num_tensors": last.num_tensors,
            "num_buckets": last.num_buckets,
            "trainer_extra_bytes": last.trainer_extra_bytes,
            "engine_extra_bytes": last.engine_extra_bytes,
            "syncers_copy_limit_gb_s": last.copy_limit_gb_s,
        }
        if self.rank == 0:
            self.result["rows"].append(row(f"mbridge {path}", times, last.num_bytes, self.limit))
            print(last, flush=True)

    def verify(self, path: str) -> None:
        """A verified refit; a comparison alone; and one element changed in the trainer, which must be found."""
        wall, report = self.timed(verify="full")
        checked = self.syncer.verify("full")
        name, put_back = change_one_element(self.bridge)
        spoiled = self.syncer.verify("full")
        put_back()
        in_sync = report.verification
        self.result["paths"][path]["verify"] = {
            "sync_verify_s": wall,
            "in_sync": {"wrong": len(in_sync.wrong), "unchecked": len(in_sync.unchecked), "s": in_sync.seconds},
            "compared": checked.num_compared,
            "of": checked.num_tensors,
            "wrong": dict(list(checked.wrong.items())[:5]),
            "unchecked": dict(list(checked.unchecked.items())[:5]),
            "num_unchecked": len(checked.unchecked),
            "seconds": checked.seconds,
            "after_change_of": name,
            "found": dict(list(spoiled.wrong.items())[:5]),
        }

    def tokens(self, path: str) -> None:
        """What the engine answers now; paths that sent the same weights must agree."""
        if self.rank == 0:
            self.result["tokens"][path] = greedy(self.llm)
            changed = self.result["tokens"].get("changed")
            if changed is not None:
                self.result["paths"][path]["same_tokens_as_first_path"] = changed == self.result["tokens"][path]

    def change(self) -> None:
        """Other weights in the trainer: the engine's answers must change with the next refit."""
        fill(self.bridge, 2)
        self.timed()
        if self.rank == 0:
            changed = greedy(self.llm)
            self.result["tokens"]["changed"] = changed
            self.result["tokens_changed"] = changed != self.result["tokens"].get(self.args.paths.split(",")[0])

    def soak(self) -> None:
        self.mark("soak: before")
        times = [self.timed()[0] for _ in range(self.args.soak)]
        self.mark("soak: after")
        self.result["soak"] = {"refits": len(times), "median_s": median(times), "max_s": max(times)}

    def keep(self) -> None:
        """A refit in the middle of two long answers, which go on with the new weights."""
        from gpu_keep import refit_in_the_middle

        path = self.args.paths.split(",")[0]
        with WeightSyncer(self.bridge, self.llm, path=path, deadline_s=DEADLINE_S, in_flight="keep") as syncer:
            syncer.sync()
            syncer.sync()  # the first refit of the direct path is not like the others
            old = greedy(self.llm, num_tokens=128) if self.rank == 0 else []
            fill(self.bridge, 3)
            if self.rank == 0:
                self.result["keep"] = refit_in_the_middle(self.llm, syncer.sync, old)
            else:
                syncer.sync()

    def timed(self, **options: Any) -> tuple[float, SyncReport]:
        start = time.perf_counter()
        report = self.syncer.sync(**options)
        return time.perf_counter() - start, report

    def mark(self, when: str) -> None:
        """Memory in use: of the whole GPU, of this process's allocator, of the engine's."""
        if self.rank == 0:
            engine = self.llm.collective_rpc("probe_memory")[0] if self.llm is not None else {}
            own = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
            self.result["memory"][when] = {"gpu": device_used_bytes(), "trainer_reserved": own, "engine": engine}


if __name__ == "__main__":
    main()
