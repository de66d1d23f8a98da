"""Process groups of our own: they meet, move bytes, end in time, and leave the application's groups alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mbridge_rl.errors import DeadlineError, SyncError, TransportError
from mbridge_rl.transports._process_group import Group, Meeting, backend_for, connect, serve
from mbridge_rl.transports.base import builtin_transports, transport_class
from mbridge_rl.transports.collective import Collective
from tests.mbridge_rl.ranks import Outcome, run_ranks

CPU = torch.device("cpu")
DEADLINE_S = 20.0
SHORT_S = 2.0
GENEROUS_S = 30.0  # more than any wait of a test may take, less than a hang


def raise_errors(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error


def meeting_of_all(rank: int, host: str = "127.0.0.1") -> tuple[Any, Meeting]:
    """Rank 0 serves a store and tells the others over the application's own group."""
    store = serve(host, DEADLINE_S) if rank == 0 else None
    port = torch.tensor([store.port if store else 0])
    dist.broadcast(port, 0)
    return store, Meeting(host, int(port), "token/1/all")


def join(rank: int, num_ranks: int, meeting: Meeting, deadline_s: float = DEADLINE_S) -> Group:
    return Group(meeting, rank, [f"member {r}" for r in range(num_ranks)], CPU, deadline_s)


def numbers(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- moving bytes -----------------------------------------------------------------------------------------------------


def broadcasts(rank: int, num_ranks: int) -> None:
    _store, meeting = meeting_of_all(rank)
    group = join(rank, num_ranks, meeting)
    for source in range(num_ranks):
        for count in (1, 255, 3 << 20):
            tensor = numbers(count, source) if rank == source else torch.zeros(count, dtype=torch.uint8)
            group.broadcast(tensor, source, "a test").wait()
            assert tensor.equal(numbers(count, source))
    # Two under way at once, in one order everywhere.
    pair = [numbers(1 << 20, k) if rank == 0 else torch.zeros(1 << 20, dtype=torch.uint8) for k in range(2)]
    operations = [group.broadcast(tensor, 0, "a test") for tensor in pair]
    for k, operation in enumerate(operations):
        operation.wait()
        assert operation.is_complete
        assert pair[k].equal(numbers(1 << 20, k))
    dist.barrier()
    group.close()
    with pytest.raises(TransportError, match="given up"):
        group.broadcast(pair[0], 0, "a test")


def test_broadcast(tmp_path: Path) -> None:
    raise_errors(run_ranks(3, tmp_path, broadcasts))


def exchanges(rank: int, num_ranks: int) -> None:
    _store, meeting = meeting_of_all(rank)
    group = join(rank, num_ranks, meeting)
    sizes = [
        [(5 * a + 3 * b) % 4 * 1000 for b in range(num_ranks)] for a in range(num_ranks)
    ]  # sender, receiver; some 0
    blocks = [numbers(sizes[rank][b], 10 * rank + b) for b in range(num_ranks)]
    for _ in range(3):
        sent = torch.cat(blocks)
        received_bytes = [sizes[a][rank] for a in range(num_ranks)]
        received = torch.zeros(sum(received_bytes), dtype=torch.uint8)
        group.exchange(received, sent, received_bytes, sizes[rank], "a test").wait()
        assert received.equal(torch.cat([numbers(sizes[a][rank], 10 * a + rank) for a in range(num_ranks)]))
    empty, none = torch.empty(0, dtype=torch.uint8), [0] * num_ranks
    group.exchange(empty, empty, none, none, "nothing").wait()
    dist.barrier()


def test_exchange(tmp_path: Path) -> None:
    raise_errors(run_ranks(4, tmp_path, exchanges))


def alone(rank: int, num_ranks: int) -> None:
    _store, meeting = meeting_of_all(rank)
    group = join(0, 1, meeting)
    group.broadcast(torch.ones(3, dtype=torch.uint8), 0, "a test").wait()
    group.close()
    group.close()


def test_a_group_of_one(tmp_path: Path) -> None:
    raise_errors(run_ranks(1, tmp_path, alone))


def beside_the_application(rank: int, num_ranks: int) -> None:
    before = dict(dist.distributed_c10d._world.pg_map)
    _store, meeting = meeting_of_all(rank)
    group = join(rank, num_ranks, meeting)
    total = torch.ones(1)
    dist.all_reduce(total)
    operation = group.broadcast(torch.zeros(1 << 20, dtype=torch.uint8), 0, "a test")
    dist.all_reduce(total)
    operation.wait()
    assert dict(dist.distributed_c10d._world.pg_map) == before, "a group was registered in torch's world"
    group.abort()
    dist.all_reduce(total)
    assert total.item() == num_ranks**3


def test_the_applications_group_is_untouched(tmp_path: Path) -> None:
    raise_errors(run_ranks(2, tmp_path, beside_the_application))


# --- meeting ----------------------------------------------------------------------------------------------------------


def test_the_store_listens_on_its_address_alone() -> None:
    store = serve("127.0.0.1", DEADLINE_S)
    _, own = connect("127.0.0.1", store.port, DEADLINE_S)
    assert own == "127.0.0.1"
    with pytest.raises(OSError, match="refused"):  # another loopback address of this host
        socket.create_connection(("127.0.0.2", store.port), timeout=DEADLINE_S)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(TransportError, match=r"cannot listen on 192\.0\.2\.1"):
        serve("192.0.2.1", DEADLINE_S)


def test_no_store() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(TransportError, match=f"127.0.0.1:{port}"):
        Group(Meeting("127.0.0.1", port, "x"), 0, ["me", "you"], CPU, DEADLINE_S)


def test_who_did_not_come_is_named() -> None:
    store = serve("127.0.0.1", DEADLINE_S)
    names = ["trainer rank 0", "worker 0 of engine 3"]
    with pytest.raises(DeadlineError, match=r"waited 0\.5 s for worker 0 of engine 3 to join"):
        Group(Meeting("127.0.0.1", store.port, "x"), 0, names, CPU, 0.5)


class ToldError(Exception):
    """What a caller of ours raises out of `breathe`."""


def test_a_wait_for_members_ends_when_the_caller_says_so() -> None:
    store = serve("127.0.0.1", DEADLINE_S)
    breaths = iter(range(5))

    def breathe() -> None:
        if next(breaths, None) is None:
            raise ToldError

    with pytest.raises(ToldError):
        Group(Meeting("127.0.0.1", store.port, "x"), 0, ["me", "you"], CPU, DEADLINE_S, breathe=breathe)


def told_while_waiting(rank: int, num_ranks: int) -> float:
    _store, meeting = meeting_of_all(rank)
    group = join(rank, num_ranks, meeting)
    started = time.monotonic()
    if rank == 0:
        breaths = iter(range(5))

        def breathe() -> None:
            if next(breaths, None) is None:
                raise ToldError

        with pytest.raises(ToldError):
            group.broadcast(torch.zeros(3, dtype=torch.uint8), 1, "bucket 3 to come").wait(breathe)
    seconds = time.monotonic() - started
    dist.barrier()
    return seconds


def test_a_wait_for_bytes_ends_when_the_caller_says_so(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, told_while_waiting)
    raise_errors(outcomes)
    assert outcomes[0].value < DEADLINE_S / 2


def late(rank: int, num_ranks: int) -> str:
    _store, meeting = meeting_of_all(rank)
    if rank == num_ranks - 1:
        time.sleep(SHORT_S / 2)
    group = join(rank, num_ranks, meeting)
    tensor = torch.full((3,), rank, dtype=torch.uint8)
    group.broadcast(tensor, 1, "a test").wait()
    dist.barrier()
    return str(tensor.tolist())


def test_a_member_that_comes_late(tmp_path: Path) -> None:
    outcomes = run_ranks(3, tmp_path, late)
    raise_errors(outcomes)
    assert [o.value for o in outcomes] == ["[1, 1, 1]"] * 3


def too_late(rank: int, num_ranks: int) -> str:
    _store, meeting = meeting_of_all(rank)
    if rank == 1:
        dist.barrier()  # until the other has given up
    try:
        join(rank, num_ranks, meeting, 1.0)
    except SyncError as error:
        answer = f"{type(error).__name__}: {error}"
    if rank == 0:
        dist.barrier()
    dist.barrier()
    join(rank, num_ranks, Meeting(meeting.host, meeting.port, "token/2/all"))  # the next generation is not disturbed
    return answer


def test_a_member_that_comes_when_the_others_have_given_up(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, too_late)
    raise_errors(outcomes)
    assert "for member 1 to join" in outcomes[0].value
    assert outcomes[1].value.startswith(("TransportError", "DeadlineError"))


# --- failures ---------------------------------------------------------------------------------------------------------


def error_of(wait: Callable[[], None]) -> tuple[str, float]:
    started = time.monotonic()
    with pytest.raises(SyncError) as caught:
        wait()
    assert caught.value.failure.phase == "stream"
    return f"{type(caught.value).__name__}: {caught.value}", time.monotonic() - started


def killed_peer(rank: int, num_ranks: int) -> tuple[str, float]:
    _store, meeting = meeting_of_all(rank)
    group = join(rank, num_ranks, meeting)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return error_of(lambda: group.broadcast(torch.zeros(8 << 20, dtype=torch.uint8), 0, "bucket 3 to come").wait())


def test_a_killed_member_is_an_error_at_once(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, killed_peer)
    raise_errors(outcomes)
    text, seconds = outcomes[0].value
    assert text.startswith("TransportError: bucket 3 to come failed")
    assert seconds < DEADLINE_S / 2


def stopped_peer(rank: int, num_ranks: int, ends_by: str) -> tuple[str, float] | None:
    _store, meeting = meeting_of_all(rank)
    group = join(rank, num_ranks, meeting, SHORT_S if ends_by == "deadline" else DEADLINE_S)
    pid = torch.tensor([os.getpid()])
    dist.broadcast(pid, 1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    while "T (stopped)" not in Path(f"/proc/{int(pid)}/status").read_text():
        time.sleep(0.01)
    operation = group.broadcast(torch.zeros(64 << 20, dtype=torch.uint8), 0, "bucket 3 to arrive")
    if ends_by == "abort":
        threading.Timer(0.3, group.abort).start()
    try:
        found = error_of(operation.wait)
        started = time.monotonic()
        group.close()
        del operation, group
        return found[0], found[1] + time.monotonic() - started
    finally:
        os.kill(int(pid), signal.SIGCONT)


def test_a_stopped_member_is_an_error_at_the_deadline(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, stopped_peer, "deadline")
    raise_errors(outcomes)
    text, seconds = outcomes[0].value
    assert text.startswith("DeadlineError: waited 2 s for bucket 3 to arrive")
    assert SHORT_S <= seconds < GENEROUS_S / 2


def test_abort_from_another_thread_ends_a_wait(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, stopped_peer, "abort")
    raise_errors(outcomes)
    text, seconds = outcomes[0].value
    assert text.startswith("TransportError: gave up bucket 3 to arrive")
    assert seconds < DEADLINE_S / 2


def dead_neighbour(rank: int, num_ranks: int) -> bool | None:
    """Member 1 is dead, member 2 is stopped, and member 0 waits for the stopped one."""
    _store, meeting = meeting_of_all(rank)
    group = join(rank, num_ranks, meeting)
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(num_ranks)]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    if rank:
        os.kill(os.getpid(), signal.SIGKILL if rank == 1 else signal.SIGSTOP)
        return None
    while "T (stopped)" not in Path(f"/proc/{int(pids[2])}/status").read_text():
        time.sleep(0.01)
    time.sleep(0.3)  # that the end of member 1 is known
    operation = group.broadcast(torch.zeros(3, dtype=torch.uint8), 2, "bucket 3 to come")
    time.sleep(0.1)
    was_pending = not operation.is_complete
    group.abort()
    group.wait_ended()
    end = time.monotonic() + DEADLINE_S / 2
    while not operation.is_complete and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(int(pids[2]), signal.SIGKILL)
    return was_pending and operation.is_complete


def test_abort_ends_what_is_under_way_also_beside_a_dead_member(tmp_path: Path) -> None:
    outcomes = run_ranks(3, tmp_path, dead_neighbour)
    raise_errors(outcomes)
    assert outcomes[0].value


def aborting_peer(rank: int, num_ranks: int) -> tuple[str, float] | None:
    _store, meeting = meeting_of_all(rank)
    group = join(rank, num_ranks, meeting)
    if rank == 1:
        dist.barrier()
        group.abort()
        dist.barrier()
        return None
    operation = group.broadcast(torch.zeros(64 << 20, dtype=torch.uint8), 0, "bucket 3 to arrive")
    dist.barrier()
    found = error_of(operation.wait)
    dist.barrier()
    return found


def test_an_abort_reaches_the_others(tmp_path: Path) -> None:
    """Also where no operation is under way on the side that aborts."""
    outcomes = run_ranks(2, tmp_path, aborting_peer)
    raise_errors(outcomes)
    text, seconds = outcomes[0].value
    assert text.startswith("TransportError: bucket 3 to arrive failed")
    assert seconds < DEADLINE_S / 2


def other_threads(rank: int, num_ranks: int) -> int:
    """How often another thread ran during a second of waiting: for a member, and for bytes."""
    _store, meeting = meeting_of_all(rank)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.01):
            ticks[0] += 1

    threading.Thread(target=tick, daemon=True).start()
    if rank == 1:
        time.sleep(0.5)
    group = join(rank, num_ranks, meeting)
    if rank == 1:
        time.sleep(0.5)
    group.broadcast(torch.zeros(3, dtype=torch.uint8), 1, "a test").wait()
    stop.set()
    dist.barrier()
    return ticks[0]


def test_other_threads_run_while_one_waits(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, other_threads)
    raise_errors(outcomes)
    assert outcomes[0].value > 20


# --- the transport ----------------------------------------------------------------------------------------------------


def test_the_transport_is_a_meeting_place() -> None:
    assert "collective" in builtin_transports()
    assert transport_class("collective") is Collective
    assert not Collective.is_shared
    place = Collective.create(1000)
    other = Collective.open(place.address)
    assert (other.host, other.port, other.token) == (place.host, place.port, place.token)
    assert len(other.token) >= 32
    connect(other.host, other.port, DEADLINE_S)
    with pytest.raises(TransportError, match="slots of its own"):
        other.slot(0)
    other.close()
    place.everyone_attached()
    place.close()
    with pytest.raises(TransportError, match="cannot reach"):
        connect(other.host, other.port, 1.0)


def test_the_backend_follows_the_device() -> None:
    assert backend_for(CPU) == "gloo"
    assert backend_for(torch.device("cuda", 1)) == "nccl"


# --- two hosts --------------------------------------------------------------------------------------------------------

HOSTS = ("10.213.77.1", "10.213.77.2")
IN_NAMESPACE = """
import sys, torch
from mbridge_rl.transports._process_group import Group, Meeting, serve
rank, host, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = None
if rank == 0:
    store = serve(host, 20.0)
    port = store.port
    print(port, flush=True)
group = Group(Meeting(host, port, "x"), rank, ["host a", "host b"], torch.device("cpu"), 20.0)
tensor = torch.arange(256, dtype=torch.uint8).repeat(1000) if rank == 0 else torch.zeros(256000, dtype=torch.uint8)
group.broadcast(tensor, 0, "a test").wait()
assert tensor.equal(torch.arange(256, dtype=torch.uint8).repeat(1000))
group.exchange(tensor[:3] if rank == 0 else tensor[:0], tensor[:0] if rank == 0 else tensor[7:10],
               [0, 3] if rank == 0 else [0, 0], [0, 0] if rank == 0 else [3, 0], "a test").wait()
assert rank or tensor[:3].tolist() == [7, 8, 9]
print("exact", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def namespaces() -> Any:
    """Two network namespaces that see each other over one wire, and nothing else: no name server."""
    names = [f"mbridge-{os.getpid()}-{i}" for i in range(2)]
    wires = [f"mb{os.getpid() % 100000}-{i}" for i in range(2)]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add {wires[0]} netns {names[0]} type veth peer name {wires[1]} netns {names[1]}",
        *(f"ip -n {n} address add {h}/24 dev {w}" for n, h, w in zip(names, HOSTS, wires, strict=True)),
        *(f"ip -n {name} link set lo up" for name in names),
        *(f"ip -n {n} link set {w} up" for n, w in zip(names, wires, strict=True)),
    ]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_two_hosts(namespaces: list[str]) -> None:
    def start(rank: int, port: str) -> subprocess.Popen[str]:
        command = [
            "ip",
            "netns",
            "exec",
            namespaces[rank],
            sys.executable,
            "-c",
            IN_NAMESPACE,
            str(rank),
            HOSTS[0],
            port,
        ]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    first = start(0, "0")
    assert first.stdout is not None
    processes = [first, start(1, first.stdout.readline().strip())]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "exact"  # or nothing, if it has ended
    finally:
        for process in processes:
            process.kill()
            process.wait()
