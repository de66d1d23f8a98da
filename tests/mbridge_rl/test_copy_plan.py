"""Copy tables: what they copy, compared with plain loops over elements; what they merge; whom they refuse."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch

from mbridge.pieces import Box, Copy, Piece, Region, join
from mbridge_rl.copy_plan import CopyTable, Executor, TorchExecutor, executor_for
from mbridge_rl.errors import PlanMismatchError
from tests.mbridge_rl.random_copies import Case, random_case

CPU = torch.device("cpu")


def by_loops(case: Case) -> dict[str, torch.Tensor]:
    """The destinations after the copies, one element at a time."""
    result = {name: tensor.clone() for name, tensor in case.destinations.items()}
    for copy in case.copies:
        for index in itertools.product(*map(range, copy.source.shape)):
            a = copy.source.offset + sum(i * s for i, s in zip(index, copy.source.stride, strict=True))
            b = copy.destination.offset + sum(i * s for i, s in zip(index, copy.destination.stride, strict=True))
            result[copy.destination_name][b] = case.sources[copy.source_name][a]
    return result


def table_of(case: Case) -> CopyTable:
    dtypes = [{name: t.dtype for name, t in tensors.items()} for tensors in (case.sources, case.destinations)]
    return CopyTable.of(case.copies, *dtypes)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.uint8, torch.uint8),
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.int32, torch.int64),
    ],
    ids=str,
)
def test_random_copies(source: torch.dtype, destination: torch.dtype) -> None:
    shapes_seen = set()
    for seed in range(80):
        case = random_case(random.Random(seed), source, destination, [1, 2, 5, 6, 8])
        table = table_of(case)
        expected = by_loops(case)
        executor = executor_for(table, CPU)
        executor.bind(case.sources, case.destinations)
        executor.run()
        for name, tensor in expected.items():
            assert torch.equal(bits(case.destinations[name]), bits(tensor)), (seed, name)
        assert table.num_bytes == sum(copy.box.numel for copy in case.copies) * destination.itemsize
        shapes_seen |= {len(copy.source.shape) for copy in case.copies}
    assert {0, 1, 2, 3} <= shapes_seen


def run(copies: list[Copy], sources: dict[str, torch.Tensor], destinations: dict[str, torch.Tensor]) -> CopyTable:
    case = Case(copies, sources, destinations, [], {})
    table, expected = table_of(case), by_loops(case)
    executor = TorchExecutor(table)
    executor.bind(sources, destinations)
    executor.run()
    for name, tensor in expected.items():
        assert torch.equal(destinations[name], tensor)
    return table


def coded(numel: int, first: int = 1) -> torch.Tensor:
    return torch.arange(first, first + numel, dtype=torch.int32)


def test_a_column_shard_is_one_copy() -> None:
    copy = Copy("w", Box((0, 0), (6, 4)), "a", Region.contiguous((6, 4)), "b", Region(4, (6, 4), (8, 1)))
    table = run([copy], {"a": coded(24)}, {"b": torch.zeros(48, dtype=torch.int32)})
    assert [tuple(c) for c in table.copies.tolist()] == [(0, 0, 0, 4, 6, 4, 4, 1, 8, 1)]


def test_a_transpose_is_one_copy_that_reads_along_rows() -> None:
    copy = Copy("w", Box((0, 0), (6, 4)), "a", Region(0, (6, 4), (1, 6)), "b", Region.contiguous((6, 4)))
    table = run([copy], {"a": coded(24)}, {"b": torch.zeros(24, dtype=torch.int32)})
    assert [tuple(c) for c in table.copies.tolist()] == [(0, 0, 0, 0, 6, 4, 1, 6, 4, 1)]


def test_a_transposed_destination_has_columns_along_the_destination() -> None:
    copy = Copy("w", Box((0, 0), (6, 4)), "a", Region.contiguous((6, 4)), "b", Region(0, (6, 4), (1, 6)))
    table = run([copy], {"a": coded(24)}, {"b": torch.zeros(24, dtype=torch.int32)})
    assert [tuple(c) for c in table.copies.tolist()] == [(0, 0, 0, 0, 4, 6, 1, 4, 6, 1)]


def test_interleaved_qkv_of_two_ranks() -> None:
    """Megatron's (group, q q k v) rows to an engine's q rows, k rows, v rows."""
    head, hidden, groups = 2, 3, 4
    destination = {"q": 0, "k": 2 * groups * head, "v": 3 * groups * head}
    owned, wanted = [], []
    for rank in range(2):
        row = 0
        for group in range(rank * 2, rank * 2 + 2):
            for name, heads in (("q", 2), ("k", 1), ("v", 1)):
                first = group * heads * head
                box = Box((first, 0), (first + heads * head, hidden))
                owned.append(Piece(name, box, f"rank{rank}", Region.contiguous(box.shape, row * hidden)))
                row += heads * head
    for name, first in destination.items():
        box = Box.whole((groups * head * (2 if name == "q" else 1), hidden))
        wanted.append(Piece(name, box, "qkv", Region.contiguous(box.shape, first * hidden)))
    numel = 4 * groups * head * hidden
    sources = {f"rank{rank}": coded(numel // 2, 1000 * rank) for rank in range(2)}
    table = run(list(join(owned, wanted)), sources, {"qkv": torch.zeros(numel, dtype=torch.int32)})
    assert len(table) == 12


def test_copies_that_continue_each_other_are_one() -> None:
    def copy(source: str, first: int, size: int, to: int) -> Copy:
        regions = Region.contiguous((size,), first), Region.contiguous((size,), to)
        return Copy("w", Box((to,), (to + size,)), source, regions[0], "b", regions[1])

    copies = [
        copy("a", 20, 5, 20),
        copy("a", 0, 10, 0),
        copy("a", 10, 10, 10),
        copy("a", 26, 4, 25),  # a gap in the source
        copy("c", 30, 4, 29),  # another source
    ]
    table = run(copies, {"a": coded(30), "c": coded(34, 100)}, {"b": torch.zeros(33, dtype=torch.int32)})
    assert table.copies["cols"].tolist() == [25, 4, 4]
    assert [(e.name, e.numel) for e in table.sources] == [("a", 30), ("c", 34)]
    assert [(e.name, e.numel) for e in table.destinations] == [("b", 33)]


def test_a_run_that_begins_where_a_first_row_ends_is_a_copy_of_its_own() -> None:
    shard = Copy("w", Box((0, 0), (2, 4)), "a", Region(0, (2, 4), (8, 1)), "b", Region(0, (2, 4), (8, 1)))
    rest = Copy("w", Box((0, 4), (1, 8)), "a", Region(4, (1, 4), (8, 1)), "b", Region(4, (1, 4), (8, 1)))
    table = run([shard, rest], {"a": coded(16)}, {"b": torch.zeros(16, dtype=torch.int32)})
    assert len(table) == 2


def test_no_copies_and_empty_copies() -> None:
    empty = Copy("w", Box((0, 0), (0, 4)), "a", Region.contiguous((0, 4)), "b", Region.contiguous((0, 4)))
    for copies in ([], [empty]):
        table = CopyTable.of(copies, {}, {})
        assert (len(table), table.num_bytes) == (0, 0)
        executor = TorchExecutor(table)
        executor.bind({}, {})
        executor.run()


def pair() -> tuple[Executor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    copy = Copy("w", Box((0, 0), (2, 3)), "a", Region(1, (2, 3), (4, 1)), "b", Region.contiguous((2, 3)))
    table = CopyTable.of([copy], {"a": torch.float32}, {"b": torch.float32})
    return TorchExecutor(table), {"a": torch.arange(8.0).view(2, 4)}, {"b": torch.zeros(2, 3)}


def test_a_tensor_that_moved_is_followed() -> None:
    executor, sources, destinations = pair()
    executor.bind(sources, destinations)
    executor.run()
    assert destinations["b"].tolist() == [[1, 2, 3], [5, 6, 7]]
    sources["a"].mul_(10)  # in place: seen without a bind
    executor.run()
    assert destinations["b"].tolist() == [[10, 20, 30], [50, 60, 70]]
    old, sources["a"] = sources["a"], torch.ones(2, 4)
    executor.bind(sources, destinations)
    executor.run()
    assert destinations["b"].eq(1).all()
    sources["a"].data = old  # the same object, elsewhere
    executor.bind(sources, destinations)
    executor.run()
    assert destinations["b"].tolist() == [[10, 20, 30], [50, 60, 70]]


def test_parameters_and_inference_tensors_are_written() -> None:
    for make in (lambda: torch.nn.Parameter(torch.zeros(2, 3)), torch.inference_mode()(lambda: torch.zeros(2, 3))):
        executor, sources, _ = pair()
        destination = make()
        executor.bind(sources, {"b": destination})
        executor.run()
        assert destination.tolist() == [[1, 2, 3], [5, 6, 7]]


def test_released_means_unbound() -> None:
    executor, sources, destinations = pair()
    executor.bind(sources, destinations)
    executor.release()
    with pytest.raises(AssertionError, match="bind before run"):
        executor.run()
    executor.bind(sources, destinations)
    executor.run()
    assert destinations["b"].tolist() == [[1, 2, 3], [5, 6, 7]]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "no local tensor 'a'"),
        (torch.zeros(2, 4, dtype=torch.float64), r"must be torch.float32.*found torch.float64"),
        (torch.zeros(4, 2).t(), r"contiguous.*stride \[1, 2\]"),
        (torch.zeros(7), r"with 8 elements.*shape \[7\]"),
    ],
)
def test_a_tensor_that_is_not_as_planned_is_named(found: torch.Tensor | None, words: str) -> None:
    executor, sources, destinations = pair()
    executor.bind(sources, destinations)
    wrong = {} if found is None else {"a": found}
    with pytest.raises(PlanMismatchError, match=words) as caught:
        executor.bind(wrong, destinations)
    assert caught.value.failure.tensor == "a"


def test_a_name_without_a_dtype_is_refused() -> None:
    copy = Copy("w", Box((0,), (2,)), "a", Region.contiguous((2,)), "b", Region.contiguous((2,)))
    with pytest.raises(PlanMismatchError, match="'b'"):
        CopyTable.of([copy], {"a": torch.float32}, {})


def test_twenty_thousand_copies_are_planned_in_a_second() -> None:
    copies = []
    for i in range(20_000):
        box, layer, expert = Box.whole((768, 2048)), i // 128, i % 128
        source = Region(0, (768, 2048), (1, 768)) if i % 3 == 0 else Region.contiguous((768, 2048))
        destination = Region(expert * 768 * 4096, (768, 2048), (4096, 1))
        copies.append(Copy(f"w{i}", box, f"s{i}", source, f"d{layer}", destination))
    sources = {f"s{i}": torch.bfloat16 for i in range(20_000)}
    destinations = {f"d{i}": torch.bfloat16 for i in range(157)}
    start = time.perf_counter()
    table = CopyTable.of(copies, sources, destinations)
    assert time.perf_counter() - start < 1.0
    assert len(table) == 20_000
    assert table.num_bytes == 20_000 * 768 * 2048 * 2
