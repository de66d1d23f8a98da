"""Checks the Triton kernels bit by bit against torch, then measures them. Needs CUDA, torch and triton; no pytest.

python tests/mbridge_rl/gpu_kernels.py              # check and measure, about a minute
python tests/mbridge_rl/gpu_kernels.py --sweep      # measure other tunings too
TRITON_INTERPRET=1 python tests/mbridge_rl/gpu_kernels.py --device cpu --cases 20    # check only, without a GPU
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from mbridge.pieces import Box, Copy, Piece, Region
from mbridge_rl.checksum import TUNING as CHECKSUM_TUNING
from mbridge_rl.checksum import checksums_by_torch, checksums_by_triton
from mbridge_rl.copy_plan import TUNING as COPY_TUNING
from mbridge_rl.copy_plan import CopyTable, Executor, TorchExecutor, TritonExecutor
from mbridge_rl.patches import Tuning, Tunings
from tests.mbridge_rl.random_copies import random_case

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [
    (BF16, BF16),
    (torch.uint8, torch.uint8),
    (F32, F32),
    (torch.float64, torch.float64),
    (F32, BF16),
    (BF16, F32),
    (F32, F16),
    (F16, F32),
    (F16, BF16),
    (BF16, F16),
    (torch.complex128, torch.complex128),  # these two go through torch, in part or whole
    (torch.int32, torch.int64),
]
# Triton's interpreter does not round these as a GPU does.
NOT_INTERPRETED = [(F32, BF16), (F16, BF16), (BF16, F16)]
SIZES = [[1, 2, 7, 33, 100], [8, 16, 64, 96, 200], [2, 8, 24, 1032]]
# Small chunks, so that small cases have many; the size of a tile would mean to compile all again.
SMALL = COPY_TUNING.rows._replace(chunk_elements=2048)
EXPERTS, FFN, HIDDEN = 128, 768, 2048  # Qwen3-30B-A3B: 48 layers x 128 experts x (gate, up, down)
MATRICES = 48 * EXPERTS * 3


class Bench(NamedTuple):
    name: str
    table: CopyTable
    sources: dict[str, torch.Tensor]
    destinations: dict[str, torch.Tensor]
    pieces: tuple[list[Piece], list[Piece]]  # what each side holds afterwards
    plan_s: float


def check(device: torch.device, num_cases: int) -> None:
    """Destinations are equal, also where nothing is copied to; checksums are equal."""
    rng, copies, pieces = random.Random(0), 0, 0
    all_sizes = SIZES if device.type == "cuda" else [[1, 2, 7, 33], [8, 16, 96]]
    pairs = [pair for pair in PAIRS if device.type == "cuda" or pair not in NOT_INTERPRETED]
    for number in range(num_cases):
        source, destination = pairs[number % len(pairs)]
        sizes = all_sizes[number // len(pairs) % len(all_sizes)]
        case = random_case(rng, source, destination, sizes, str(device))
        table = table_of(case.copies, case.sources, case.destinations)
        expected = {name: tensor.clone() for name, tensor in case.destinations.items()}
        run(TorchExecutor(table), case.sources, expected)
        for tunings in (COPY_TUNING, Tunings(SMALL, SMALL)):
            found = {name: tensor.clone() for name, tensor in case.destinations.items()}
            run(TritonExecutor(table, device, tunings), case.sources, found)
            for name, tensor in expected.items():
                same = torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8))
                assert same, f"case {number}, {source} to {destination}, {tunings}: {name} differs"
        if source.itemsize <= 8:
            sums = checksums_by_torch(case.pieces, case.shapes, case.sources)
            for tuning in (CHECKSUM_TUNING, *COPY_TUNING, SMALL):
                found_sums = checksums_by_triton(case.pieces, case.shapes, case.sources, device, tuning)
                assert sums == found_sums, f"case {number}, {source}, {tuning}: checksums differ"
            pieces += len(sums)
        copies += len(table)
    print(f"{num_cases} random cases: {copies} copies and {pieces} checksums are equal to those of torch", flush=True)


def run(executor: Executor, sources: dict[str, torch.Tensor], destinations: dict[str, torch.Tensor]) -> None:
    executor.bind(sources, destinations)
    executor.run()


def table_of(copies: list[Copy], sources: dict[str, torch.Tensor], destinations: dict[str, torch.Tensor]) -> CopyTable:
    return CopyTable.of(copies, *({n: t.dtype for n, t in side.items()} for side in (sources, destinations)))


def benches(source: torch.Tensor, destination: torch.Tensor) -> Iterator[Bench]:
    """Two flat bf16 tensors as the experts of a model, in the layouts of several trainers."""
    size = FFN * HIDDEN
    box, plain = Box.whole((HIDDEN, FFN)), Region.contiguous((HIDDEN, FFN))
    half = FFN // 2  # 768 bytes
    left, right = Box((0, 0), (HIDDEN, half)), Box((0, half), (HIDDEN, FFN))
    layouts = {
        "contiguous": [(box, plain)],
        "column shards, rows of 768 bytes": [
            (left, Region.contiguous((HIDDEN, half))),
            (right, Region.contiguous((HIDDEN, half), HIDDEN * half)),
        ],
        "transposed": [(box, Region(0, (HIDDEN, FFN), (1, HIDDEN)))],
    }
    for name, layout in layouts.items():
        count = min(MATRICES, source.numel() // size)
        yield bench(name, source, destination, count, layout)
    count = min(MATRICES, source.numel() // size) // 2
    yield bench("fp32 to bf16", source.view(F32), destination, count, layouts["contiguous"])


def bench(
    name: str, source: torch.Tensor, destination: torch.Tensor, count: int, layout: list[tuple[Box, Region]]
) -> Bench:
    size, shape = FFN * HIDDEN, (HIDDEN, FFN)
    sources = {f"s{i}": source[i * size : (i + 1) * size] for i in range(count)}
    layers = -(-count // EXPERTS)
    packed = EXPERTS * size
    destinations = {f"d{i}": destination[i * packed : min((i + 1) * packed, count * size)] for i in range(layers)}
    copies, held, stored = [], [], []
    for i in range(count):
        into = Region.contiguous(shape, i % EXPERTS * size)
        target = Piece(f"hf{i}", Box.whole(shape), f"d{i // EXPERTS}", into)
        stored.append(target)
        for box, region in layout:
            held.append(Piece(f"hf{i}", box, f"s{i}", region))
            copies.append(Copy(f"hf{i}", box, f"s{i}", region, target.local_name, target.part(box)))
    start = time.perf_counter()
    table = table_of(copies, sources, destinations)
    return Bench(name, table, sources, destinations, (held, stored), time.perf_counter() - start)


def milliseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median time on the device, after one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def measure(device: torch.device, sweep: bool) -> None:
    free, _ = torch.cuda.mem_get_info(device)
    matrices = min(MATRICES, int(free * 0.92) // (2 * 2 * FFN * HIDDEN))
    numel = matrices * FFN * HIDDEN
    source = torch.empty(numel, dtype=BF16, device=device)
    destination = torch.empty_like(source)
    # Values that a cast to bf16 changes but no NaN: the two halves of a float have the exponents of small numbers.
    source.view(torch.int16).random_(0, 0x4000)
    print(f"{torch.cuda.get_device_name(device)}: {matrices} matrices of {FFN} x {HIDDEN}, {numel * 2 / 1e9:.1f} GB")
    limit = milliseconds(lambda: destination.copy_(source))
    report("one copy_ of all", limit, 4 * numel)
    copy_tunings = [COPY_TUNING]
    sum_tunings = [CHECKSUM_TUNING]
    if sweep:
        for warps in (4, 8):
            for tile in (1024, 2048, 4096):
                own = [Tuning(tile, chunk, warps) for chunk in (tile, 8 << 10, 16 << 10, 32 << 10)]
                copy_tunings += [Tunings(tuning, tuning) for tuning in own]
                sum_tunings += [Tuning(tile, chunk, warps) for chunk in (32 << 10, 128 << 10)]
    shapes = {f"hf{i}": (HIDDEN, FFN) for i in range(matrices)}
    for case in benches(source, destination):
        width = next(iter(case.sources.values())).dtype.itemsize
        for tunings in copy_tunings:
            executor = TritonExecutor(case.table, device, tunings)
            start = time.perf_counter()
            executor.bind(case.sources, case.destinations)
            bound = time.perf_counter()
            executor.bind(case.sources, case.destinations)
            again = time.perf_counter()
            destination.zero_()
            took = milliseconds(executor.run)
            report(
                f"{case.name} {describe(tunings, COPY_TUNING)}",
                took,
                case.table.num_bytes // 2 * (2 + width),
                f"plan {case.plan_s * 1e3:.0f} ms, bind {(bound - start) * 1e3:.0f} ms, again "
                f"{(again - bound) * 1e3:.1f} ms, table {executor.table_bytes / 2**20:.1f} MiB",
            )
        if width == 2:
            held, stored = (
                checksums_by_triton(pieces, shapes, tensors, device)
                for pieces, tensors in zip(case.pieces, (case.sources, case.destinations), strict=True)
            )
            parts = len(held) // len(stored)
            sums = [sum(held[i : i + parts]) for i in range(0, len(held), parts)]
            assert all((a - b) % (1 << 64) == 0 for a, b in zip(sums, stored, strict=True)), case.name
        else:
            for i in range(0, len(case.sources), 997):
                a, b = case.sources[f"s{i}"].to(BF16), case.destinations[f"d{i // EXPERTS}"]
                first = i % EXPERTS * a.numel()
                assert torch.equal(a.view(torch.int16), b[first : first + a.numel()].view(torch.int16)), case.name
        if case.name in ("contiguous", "transposed"):
            for tuning in sum_tunings:
                measure_checksums(case, shapes, device, tuning)


def measure_checksums(case: Bench, shapes: dict[str, tuple[int, ...]], device: torch.device, tuning: object) -> None:
    """The whole call on the clock, and the kernels alone by the profile of a second call."""
    assert isinstance(tuning, type(CHECKSUM_TUNING))
    checksums_by_triton(case.pieces[0][:1], shapes, case.sources, device, tuning)
    torch.cuda.synchronize()
    start = time.perf_counter()
    checksums_by_triton(case.pieces[0], shapes, case.sources, device, tuning)
    took = (time.perf_counter() - start) * 1e3
    report(
        f"checksums, {case.name} {describe(tuning, CHECKSUM_TUNING)}",
        kernel_milliseconds(lambda: checksums_by_triton(case.pieces[0], shapes, case.sources, device, tuning)),
        case.table.num_bytes,
        f"whole call {took:.0f} ms",
    )


def kernel_milliseconds(work: Callable[[], object]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in profile.key_averages() if "_sum" in event.key) / 1e3


def describe(tuning: object, default: object) -> str:
    return "" if tuning == default else str(tuple(tuning))  # type: ignore[arg-type]


def report(name: str, took_ms: float, num_bytes: int, more: str = "") -> None:
    print(f"  {name:55} {took_ms:8.2f} ms {num_bytes / took_ms / 1e6:8.0f} GB/s   {more}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--cases", type=int, default=240)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    start = time.perf_counter()
    check(device, options.cases)
    print(f"checked in {time.perf_counter() - start:.0f} s", flush=True)
    if device.type == "cuda":
        measure(device, options.sweep)
        print(f"all in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
