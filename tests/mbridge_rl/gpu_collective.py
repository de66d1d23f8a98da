"""The collective transport on two GPUs over NCCL: run by hand, prints one JSON line for each case.

    python -m tests.mbridge_rl.gpu_collective [CASE ...] [--simulate]

`--simulate` runs the same over gloo on the CPU. Each case has processes of its own, one for each GPU, and a limit of
time: a case that hangs is reported and does not stop the others. The exit code is the number of cases that failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mbridge.pieces import Box, Piece, Region, TensorSpec
from mbridge_rl.agreement import owned_boxes
from mbridge_rl.broadcast_slots import BroadcastSlots
from mbridge_rl.broadcaster import Broadcaster
from mbridge_rl.buckets import part_view, plan_buckets
from mbridge_rl.errors import SyncError
from mbridge_rl.messages import Grouping
from mbridge_rl.transports._process_group import Group, Meeting, backend_for, serve

HOST = "127.0.0.1"
DEADLINE_S = 60.0  # the first NCCL communicator of a process takes seconds
SHORT_S = 5.0
LIMIT_S = 100.0  # of a case
WATCHDOG_S = 12.0  # after an error the process must still be there so much later: torch's watchdog did not end it
NUM_ROUNDS, NUM_WARM_UP = 10, 3


class Place(NamedTuple):
    """Where a process of a case runs, and how it meets the other."""

    rank: int
    port: int
    device: str
    simulate: bool
    pipe: Connection

    @property
    def own_device(self) -> torch.device:
        return torch.device(self.device)

    def join(self, generation: int, deadline_s: float = DEADLINE_S) -> Group:
        meeting = Meeting(HOST, self.port, f"raw/{generation}")
        return Group(meeting, self.rank, ["process 0", "process 1"], self.own_device, deadline_s)

    def numbers(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).to(self.own_device)

    def zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.uint8, device=self.own_device)

    def synchronize(self) -> None:
        if self.own_device.type == "cuda":
            torch.cuda.synchronize(self.own_device)

    def check_broadcast(self, group: Group, seed: int) -> None:
        count = (1 << 20) + seed
        tensor = self.numbers(count, seed) if self.rank == 0 else self.zeros(count)
        group.broadcast(tensor, 0, f"broadcast {seed}").wait()
        assert tensor.equal(self.numbers(count, seed)), f"broadcast {seed} brought other bytes"


def application_group(place: Place) -> None:
    """What a trainer has anyway: a default group, with the same backend."""
    backend = backend_for(place.own_device)
    store = dist.PrefixStore("application", dist.TCPStore(HOST, place.port, None, False))  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=2)


def check_application(place: Place) -> None:
    total = torch.ones(1000, device=place.own_device)
    dist.all_reduce(total)
    assert total.sum().item() == 2000, "the application's group is broken"


# --- cases: called in both processes ----------------------------------------------------------------------------------


def exact(place: Place) -> dict[str, Any]:
    """Broadcasts and exchanges of all kinds of sizes, beside the application's group; groups come and go."""
    application_group(place)
    seconds = []
    for generation in (1, 2, 3):
        started = time.perf_counter()
        group = place.join(generation)
        seconds.append(round(time.perf_counter() - started, 3))
        for source in (0, 1):
            for count in (1, 255, 3 << 20):
                tensor = place.numbers(count, source) if place.rank == source else place.zeros(count)
                group.broadcast(tensor, source, "a broadcast").wait()
                assert tensor.equal(place.numbers(count, source))
        for sizes in ([0, 1000], [0, 0], [777, 3 << 20]):
            mine, other = place.numbers(sum(sizes), place.rank), place.numbers(sum(sizes), 1 - place.rank)
            # Process 0 sends sizes[0] to itself and sizes[1] to process 1, which sends the other way round.
            sent_bytes = sizes if place.rank == 0 else sizes[::-1]
            received_bytes = [sent_bytes[0], sizes[1]] if place.rank == 0 else [sizes[1], sent_bytes[1]]
            received = place.zeros(sum(received_bytes))
            group.exchange(received, mine, received_bytes, sent_bytes, "an exchange").wait()
            kept = mine[: sizes[0]] if place.rank == 0 else mine[sizes[1] :]
            came = other[: sizes[1]] if place.rank == 0 else other[sizes[0] :]
            expected = torch.cat([kept, came] if place.rank == 0 else [came, kept])
            assert received.equal(expected), f"exchange of {sizes}"
        check_application(place)
        group.close()
    check_application(place)
    return {"join_s": seconds}


def speed(place: Place) -> dict[str, Any]:
    """Our broadcast, and a whole send path, against torch's broadcast in the application's group: the same bytes."""
    application_group(place)
    group = place.join(1)
    bucket_bytes, num_buckets = (16 << 20, 8) if place.simulate else (512 << 20, 16)
    slots = [place.zeros(bucket_bytes) for _ in range(2)]

    def raw() -> None:
        for k in range(num_buckets):
            dist.broadcast(slots[k % 2], 0)

    def ours() -> None:
        operations = []
        for k in range(num_buckets):
            if k >= 2:
                operations[k - 2].wait()
            operations.append(group.broadcast(slots[k % 2], 0, f"bucket {k}"))
        for operation in operations[-2:]:
            operation.wait()

    path = send_path(place, bucket_bytes, num_buckets)
    ways: dict[str, Callable[[], object]] = {"raw": raw, "group": ours, "send_path": path}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(NUM_WARM_UP + NUM_ROUNDS):  # in turn, so that what disturbs disturbs all
        for name, way in ways.items():
            check_application(place)
            place.synchronize()
            started = time.perf_counter()
            way()
            place.synchronize()
            if number >= NUM_WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    total = bucket_bytes * num_buckets
    medians = {name: sorted(s)[len(s) // 2] for name, s in seconds.items()}
    result: dict[str, Any] = {f"{name}_gb_s": round(total / s / 1e9, 2) for name, s in medians.items()}
    return (
        result
        | {f"{name}_share": round(medians["raw"] / s, 3) for name, s in medians.items() if name != "raw"}
        | {"num_bytes": total, "bucket_bytes": bucket_bytes}
    )


def send_path(place: Place, bucket_bytes: int, num_buckets: int) -> Callable[[], object]:
    """All buckets of a model from a Broadcaster (process 0) into BroadcastSlots (process 1), checked once."""
    columns, num_tensors = 4096, 4 * num_buckets
    rows = bucket_bytes // 4 // columns // 2
    specs = [TensorSpec(f"t{i}", (rows, columns), torch.bfloat16) for i in range(num_tensors)]
    layout = plan_buckets(specs, [(spec.name,) for spec in specs], bucket_bytes)
    assert layout.num_buckets == num_buckets
    region = Region.contiguous((rows, columns))
    owned = [Piece(spec.name, Box.whole(spec.shape), spec.name, region) for spec in specs]
    grouping = Grouping(1, HOST, place.port, backend_for(place.own_device), DEADLINE_S, [(0, 0)])
    if place.rank == 0:
        mover = Broadcaster(layout, [owned_boxes(owned)], owned, 0, place.own_device, "path")
        values = {s.name: torch.full(s.shape, i % 200, dtype=s.dtype, device=place.device) for i, s in enumerate(specs)}

        def send() -> None:
            mover.begin(values)
            for bucket in range(num_buckets):
                mover.fill(bucket, grouping if bucket == 0 else None)
            mover.end(succeeded=True)

        send()
        return send
    arrivals = BroadcastSlots(layout, [0] * num_buckets, (0, 0), place.own_device, "path")

    def receive(is_checked: bool = False) -> None:
        arrivals.join(grouping)
        for bucket, parts in enumerate(layout.by_bucket()):
            arrivals.receive(bucket)
            for part in parts if is_checked else ():
                view = part_view(arrivals.slot(bucket % 2), specs[part.tensor], part)
                assert bool((view == part.tensor % 200).all()), f"{specs[part.tensor].name} is wrong"

    receive(is_checked=True)
    return receive


def killed(place: Place) -> dict[str, Any]:
    """A peer dies: an error at the deadline, no end of this process, and a group with its successor."""
    if place.rank == 1 and not place.pipe.recv():  # the successor begins here
        place.check_broadcast(place.join(2), 2)
        return {}
    group = place.join(1, SHORT_S)
    place.check_broadcast(group, 1)
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    result = failing(place, group)
    place.check_broadcast(place.join(2), 2)
    return result


def stopped(place: Place) -> dict[str, Any]:
    """A peer hangs: an error at the deadline on both sides, and both meet again."""
    group = place.join(1, SHORT_S)
    place.check_broadcast(group, 1)
    place.pipe.send(os.getpid())
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # the parent continues it when the other has raised
    else:
        time.sleep(0.5)
    result = failing(place, group, survives_s=0.0)
    place.pipe.send("raised")
    place.check_broadcast(place.join(2), 2)
    return result


def interrupted(place: Place) -> dict[str, Any]:
    """The caller learns by other ways that waiting is pointless, and gives up at once."""

    class EnoughError(SyncError):
        pass

    group = place.join(1)
    place.check_broadcast(group, 1)
    seconds = 0.0
    if place.rank == 0:
        started = time.perf_counter()

        def breathe() -> None:
            if time.perf_counter() - started > 0.5:
                raise EnoughError("told so")

        operation = group.broadcast(place.zeros(64 << 20), 0, "a bucket nobody takes")
        try:
            operation.wait(breathe)
            raise AssertionError("nobody took the bucket, but it was sent")
        except EnoughError:
            pass
        group.close()
        group.wait_ended()
        place.synchronize()
        seconds = time.perf_counter() - started
        assert seconds < DEADLINE_S / 2, f"giving up took {seconds} s"
    else:
        time.sleep(1.0)
        group.close()
    place.check_broadcast(place.join(2), 2)
    return {"seconds": round(seconds, 3)}


def failing(place: Place, group: Group, survives_s: float = WATCHDOG_S) -> dict[str, Any]:
    """A broadcast without the peer: how it ends, how long that and the abort take, and that the device still works."""
    started = time.perf_counter()
    tensor = place.zeros(64 << 20)
    try:
        group.broadcast(tensor, 0, "bucket 3").wait()
        raise AssertionError("the peer did not take part, but the broadcast succeeded")
    except SyncError as error:
        text, raised_s = f"{type(error).__name__}: {error}", time.perf_counter() - started
    assert raised_s < 2 * SHORT_S + 5
    assert "bucket 3" in text
    started = time.perf_counter()
    group.close()
    group.wait_ended()
    place.synchronize()  # the kernel that waited for the peer has ended
    aborted_s = time.perf_counter() - started
    assert aborted_s < 20, f"abort took {aborted_s} s"
    assert place.zeros(1000).add(1).sum().item() == 1000, "the device is of no use any more"
    time.sleep(survives_s)
    return {"error": text, "raised_s": round(raised_s, 3), "aborted_s": round(aborted_s, 3)}


# --- the parent -------------------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[Place], dict[str, Any]]] = {
    "exact": exact,
    "speed": speed,
    "killed": killed,
    "stopped": stopped,
    "interrupted": interrupted,
}


def run_process(case: str, place: Place) -> None:
    try:
        if place.own_device.type == "cuda":
            torch.cuda.set_device(place.own_device)
        place.pipe.send({"ok": True, **CASES[case](place)})
    except Exception as error:  # noqa: BLE001  whatever it is, the parent shall print it
        place.pipe.send({"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
    sys.stdout.flush()
    os._exit(0)


def run_case(case: str, simulate: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    store = serve(HOST, DEADLINE_S)
    processes, pipes = [], []

    def start(rank: int) -> None:
        here, there = context.Pipe()
        place = Place(rank, store.port, "cpu" if simulate else f"cuda:{rank}", simulate, there)
        process = context.Process(target=run_process, args=(case, place))
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)

    started = time.perf_counter()
    try:
        for rank in (0, 1):
            start(rank)
        if case == "killed":
            pipes[1].send(True)
            processes[1].join(LIMIT_S)
            start(1)
            pipes[2].send(False)
        if case == "stopped":
            _ = expect(pipes[0]), (pid := expect(pipes[1]))
            assert expect(pipes[0]) == "raised"
            os.kill(pid, signal.SIGCONT)
            assert expect(pipes[1]) == "raised"
        answers = [expect(pipe) for pipe in ([pipes[0], pipes[2]] if case == "killed" else pipes)]
    except (TimeoutError, EOFError, AssertionError) as error:
        answers = [{"ok": False, "error": f"{type(error).__name__}: {error}"}]
    finally:
        for process in processes:
            process.kill()
            process.join()
    ok = all(isinstance(answer, dict) and answer["ok"] for answer in answers)
    return {"case": case, "ok": ok, "seconds": round(time.perf_counter() - started, 1), "processes": answers}


def expect(pipe: Connection) -> Any:
    if not pipe.poll(LIMIT_S):
        raise TimeoutError(f"nothing came for {LIMIT_S:g} s")
    return pipe.recv()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="by default all")
    parser.add_argument("--simulate", action="store_true", help="gloo on the CPU")
    arguments = parser.parse_args()
    if not arguments.simulate and torch.cuda.device_count() < 2:
        parser.error(f"two GPUs are needed, this process sees {torch.cuda.device_count()}; or pass --simulate")
    num_failed = 0
    for case in arguments.cases or CASES:
        result = run_case(case, arguments.simulate)
        num_failed += not result["ok"]
        print(json.dumps(result), flush=True)
    return num_failed


if __name__ == "__main__":
    sys.exit(main())
