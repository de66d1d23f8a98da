"""Engine workers that are killed or stopped during a refit by NCCL: what every trainer rank sees, and what comes after.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/multi_gpu_faults.py --json f.json

The trainer has two ranks, TP2, one on each GPU; the engine is a worker process on the second GPU with plain tensors.
Each scenario: a good refit, the fault, then a fresh engine joins (`add_engine`, which rebuilds the communicator) and
one more refit. What the worker holds is compared byte by byte with the trainer's export, by hashes. Prints JSON: the
error of each rank and after how many seconds. `--simulate`: gloo on the CPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from gpu_trainer import bridge_of, fill
from measure import about, print_table, write_json
from multi_gpu_engine import WorkerEngine, digests
from multi_gpu_places import settle
from shapes import SHAPES

from mbridge import init_parallel
from mbridge_rl import WeightSyncer
from mbridge_rl.errors import SyncError
from mbridge_rl.messages import Fill
from mbridge_rl.transports.base import COLLECTIVE

AT_BUCKET = 2
# name -> the signal, and who sends it when
FAULTS: dict[str, tuple[signal.Signals, str]] = {
    "killed in its loader": (signal.SIGKILL, "loader"),
    "stopped before the refit": (signal.SIGSTOP, "before"),  # the sender's broadcast waits on its GPU
    "killed while a bucket is sent": (signal.SIGKILL, "fill"),
    "stopped in its loader": (signal.SIGSTOP, "loader"),
}
GRACE_S = 15.0  # beyond the deadline: a rank that hears nothing from rank 0 waits so much longer


class FaultySyncer(WeightSyncer):
    """Calls `fault` once when bucket AT_BUCKET is to be filled."""

    fault: Callable[[], None] | None = None

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> Any:
        if message.bucket == AT_BUCKET and self.fault is not None:
            fault, self.fault = self.fault, None
            fault()
        return super()._fill(message, breathe)


class Faults:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.perf_counter()
        settle(args.trainer_gpus, simulate=args.simulate)
        init_parallel(tp=int(os.environ.get("WORLD_SIZE", "1")), timeout_s=600.0)
        self.rank, self.seed = dist.get_rank(), 0
        self.bridge = bridge_of(args.shape)
        self.bridge.get_model()
        self.specs = self.bridge.plan(self.bridge.models).tensors
        self.result: dict[str, Any] = {
            **about(), "kind": "faults", "shape": args.shape, "simulated": args.simulate, "deadline_s": args.deadline_s,
            "backend": dist.get_backend(), "trainer": {"ranks": dist.get_world_size(), "tp": dist.get_world_size()},
            "rows": [], "scenarios": {}, "seconds": {}, "errors": {},
        }  # fmt: skip

    def run(self) -> None:
        self.engine = self.fresh()
        self.change()
        try:
            self.syncer = FaultySyncer(
                self.bridge,
                self.engine,
                transport=COLLECTIVE,
                deadline_s=self.args.deadline_s,
                bucket_bytes=self.args.bucket_mib << 20,
            )
            self.result["num_buckets"] = self.syncer.layout.num_buckets
            for name in self.args.only or FAULTS:
                self.scenario(name, *FAULTS[name])
        except Exception:  # noqa: BLE001  its words are in the result; what came before stays
            self.result["errors"][f"rank {self.rank}"] = traceback.format_exc()[-3000:]
            print(f"rank {self.rank}:\n{traceback.format_exc()}", flush=True)
        self.write()
        if self.rank == 0:
            if self.result["rows"]:
                print_table(self.result["rows"])
            print(self.result["scenarios"], flush=True)
        if self.engine is not None:
            self.engine.kill()
        is_good = not self.result["errors"] and all(s["is_good"] for s in self.result["scenarios"].values())
        os._exit(0 if is_good else 1)

    def scenario(self, name: str, number: signal.Signals, when: str) -> None:
        found: dict[str, Any] = {}
        found["good_s"], _ = self.timed(self.sync)
        found["good_exact"] = self.is_exact()
        self.say(f"{name}: a good refit, {found['good_s']:.2f} s")
        self.change()
        if self.engine is not None:
            pid = self.engine.process.pid
            assert pid is not None
            if when == "loader":
                self.engine.signal_at(self.specs[len(self.specs) // 2].name, number)
            elif when == "fill":
                self.syncer.fault = lambda: os.kill(pid, number)
            else:
                os.kill(pid, number)
        seconds, error = self.timed(self.sync)
        mine = (seconds, type(error).__name__, str(error))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        found["errors"] = everyone
        self.say(f"{name}: {everyone}")
        old = self.engine
        if old is not None:
            old.kill()
            self.engine = self.fresh()
        found["remove_s"], error = self.timed(lambda: self.syncer.remove_engine(old))
        if error is not None:
            raise error
        found["add_s"], error = self.timed(lambda: self.syncer.add_engine(self.engine))
        if error is not None:
            raise error
        found["added_exact"] = self.is_exact()
        self.say(f"{name}: a fresh engine joined, {found['add_s']:.2f} s")
        self.change()
        found["after_s"], error = self.timed(self.sync)
        found["after_exact"] = error is None and self.is_exact()
        limit_s = self.args.deadline_s + GRACE_S
        found["is_good"] = bool(
            found["good_exact"]
            and all(kind != "NoneType" and s < limit_s for s, kind, _ in everyone)
            and found["added_exact"]
            and found["after_exact"]
        )
        self.result["scenarios"][name] = found
        self.result["rows"].append(
            {
                "fault": name,
                "good": found["is_good"],
                "refit_s": found["good_s"],
                "raised_s": max(s for s, _, _ in everyone),
                "error": ", ".join(sorted({kind for _, kind, _ in everyone})),
                "add_s": found["add_s"],
                "next_s": found["after_s"],
            }
        )
        self.write()
        self.say(f"{name}: {self.result['rows'][-1]}")

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"{time.perf_counter() - self.started:7.1f} s  {text}", flush=True)

    def sync(self) -> None:
        self.syncer.sync()

    def timed(self, action: Callable[[], object]) -> tuple[float, SyncError | None]:
        start, error = time.perf_counter(), None
        try:
            action()
        except SyncError as raised:
            error = raised
        return time.perf_counter() - start, error

    def change(self) -> None:
        self.seed += 1
        fill(self.bridge, self.seed)

    def is_exact(self) -> bool:
        """Whether the worker holds exactly what the trainer exports now."""
        exported = digests(dict(self.bridge.export_weights(self.bridge.models)))
        return self.engine is None or self.engine.holds(exported)

    def fresh(self) -> WorkerEngine | None:
        if self.rank:
            return None
        return WorkerEngine(self.specs, self.args.engine_gpu, simulate=self.args.simulate)

    def write(self) -> None:
        self.result["seconds"]["all"] = round(time.perf_counter() - self.started, 1)
        if self.rank == 0:
            write_json(self.result, self.args.json, quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-moe-small")
    parser.add_argument("--trainer-gpus", default="0,1")
    parser.add_argument("--engine-gpu", default="1")
    parser.add_argument("--bucket-mib", type=int, default=32)
    parser.add_argument("--deadline-s", type=float, default=20.0)
    parser.add_argument("--only", action="append", choices=FAULTS)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--json", type=Path)
    Faults(parser.parse_args()).run()


if __name__ == "__main__":
    main()
