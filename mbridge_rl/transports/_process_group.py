"""Process groups of our own, beside whatever the application has: nothing is registered in torch's world.

Members meet at a TCPStore of our own (`serve`, `connect`). Each group is one ProcessGroupGloo or ProcessGroupNCCL
object over a prefix of its keys. No wait is native: operations are polled, so every wait has a deadline, other threads
run, and the caller can be told meanwhile that waiting is pointless (`breathe`).
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ..errors import DeadlineError, TransportError

Breathe = Callable[[], None]
BREATH_S = 0.01  # at least so much lies between two calls of `breathe`
LONGEST_PAUSE_S = 0.0002  # between two looks at an operation
MEETING_PAUSE_S = 0.05  # between two looks at the store; a thousand members are then 20,000 questions a second
EXIT_PATIENCE_S = 2.0  # how long a process that ends waits for groups that it gave up
# TCPStore asks for the name of each address that it connects, which takes 5 s where a name server does not answer.
STORE_PATIENCE_S = 20.0
NUM_GLOO_THREADS = 2  # as many operations of one group are under way at once
# A member may post a receive long before the sender has the bytes: torch's own timer must not be the first to go off.
NATIVE_PATIENCE = 4
# torch's watchdog would end the whole process when a peer dies. We find out ourselves, and abort.
NCCL_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_environment_lock = threading.Lock()


def no_breath() -> None:
    """For those who have nobody to listen to while they wait."""


class Meeting(NamedTuple):
    """Where the members of a group meet. Equal on all of them."""

    host: str  # numeric, as the members reach it
    port: int
    prefix: str  # of the keys: unique among all groups that ever meet there


def backend_for(device: torch.device) -> str:
    """The backend that moves tensors of `device`: "nccl" or "gloo"."""
    return "nccl" if device.type == "cuda" else "gloo"


def serve(host: str, deadline_s: float) -> TCPStore:
    """A store that listens on `host` (a numeric address of this machine), on a free port: `.port`. Lives as long as the
    object. Raises TransportError if that address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    timeout = timedelta(seconds=deadline_s)
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((host, 0))
            listener.listen(4096)  # all members come at once
            port = listener.getsockname()[1]
            # By itself it would listen on all interfaces. The descriptor is the store's from here on.
            file = listener.detach()
            return TCPStore(host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=file)
        except (OSError, dist.DistError) as error:
            reason = getattr(error, "strerror", None) or _first_line(error)
            raise TransportError(f"cannot listen on {host}: {reason}", phase="connect") from error


def connect(host: str, port: int, deadline_s: float) -> tuple[TCPStore, str]:
    """A client of the store at `host`:`port`, and the address of this machine that it is reached from.

    Raises TransportError if nobody listens there.
    """
    try:
        # torch retries for the whole deadline and prints its stack; a plain connection says at once what is wrong.
        with socket.create_connection((host, port), timeout=deadline_s) as probe:
            own = str(probe.getsockname()[0])
        patience = timedelta(seconds=max(deadline_s, STORE_PATIENCE_S))
        return TCPStore(host, port, None, False, patience, wait_for_workers=False), own
    except (OSError, dist.DistError) as error:
        raise TransportError(
            f"cannot reach the store at {host}:{port}: {_first_line(error)}", phase="connect"
        ) from error


class Operation:
    """One operation under way. Keeps its tensors alive."""

    def __init__(self, group: Group, work: Any, what: str, tensors: Sequence[torch.Tensor]) -> None:
        self._group, self._work, self._what, self._tensors = group, work, what, tensors

    @property
    def is_complete(self) -> bool:
        """Whether it has ended, well or not."""
        return bool(self._work.is_completed())

    def wait(self, breathe: Breathe = no_breath) -> None:
        """Until it is complete; on a GPU too. `breathe` is called now and then, and ends the wait by raising.

        Raises DeadlineError after the group's `deadline_s`, TransportError if it failed or its group was aborted.
        """
        deadline_s = self._group.deadline_s
        end = time.monotonic() + deadline_s
        next_breath, pause_s = time.monotonic() + BREATH_S, 20e-6
        while not self.is_complete and not self._group.is_aborted:
            now = time.monotonic()
            if now >= end:
                raise DeadlineError(f"waited {deadline_s:g} s for {self._what}", phase="stream")
            if now >= next_breath:
                breathe()
                next_breath = now + BREATH_S
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        if self._group.is_aborted:
            raise TransportError(f"gave up {self._what}", phase="stream")
        try:
            self._work.wait()
        except RuntimeError as error:
            raise TransportError(f"{self._what} failed: {_first_line(error)}", phase="stream") from error


class Group:
    """One member of a group. Used by one thread, but for `abort`."""

    def __init__(
        self,
        meeting: Meeting,
        rank: int,
        names: Sequence[str],
        device: torch.device,
        deadline_s: float,
        *,
        backend: str | None = None,
        breathe: Breathe = no_breath,
    ) -> None:
        """Join as member `rank`, and wait for the others: `names` says who they are, in rank order.

        Raises DeadlineError, with the names of those who did not come, TransportError if the store or another member
        cannot be reached.
        """
        self.rank, self.names, self.device, self.deadline_s = rank, tuple(names), device, deadline_s
        self.backend = backend or backend_for(device)
        self.is_aborted = False
        self._ended = threading.Event()
        self._group: Any = None
        client, own_address = connect(meeting.host, meeting.port, deadline_s)
        store = PrefixStore(meeting.prefix, client)
        end = time.monotonic() + deadline_s
        self._meet(store, end, breathe)
        # All are there: what can still last is a member that ended just now. In a thread, since it cannot be polled.
        self._run(lambda: self._make(store, own_address), end, breathe)

    def broadcast(self, tensor: torch.Tensor, source: int, what: str) -> Operation:
        """Begin to copy `tensor` (contiguous uint8, of one size everywhere) from member `source` to all others."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        options.asyncOp = True
        options.timeout = self._native_timeout
        return self._begin(lambda group: group.broadcast([tensor], options), what, [tensor])

    def exchange(
        self, received: torch.Tensor, sent: torch.Tensor, received_bytes: list[int], sent_bytes: list[int], what: str
    ) -> Operation:
        """Begin to send `sent_bytes[r]` bytes of `sent` to each member r, in rank order, and to receive from each.

        Both are flat uint8 of exactly these sizes; 0 is a size too. All members take part. (Not `send` and `recv` of
        gloo: they can only be waited for, and a wait that times out breaks the whole group.)
        """
        options = dist.AllToAllOptions()
        options.asyncOp = True
        options.timeout = self._native_timeout
        return self._begin(
            lambda group: group.alltoall_base(received, sent, received_bytes, sent_bytes, options),
            what,
            [received, sent],
        )

    def abort(self) -> None:
        """End what is under way, here and (where connections break) at the others. From any thread, at once."""
        if self.is_aborted:
            return
        self.is_aborted = True
        leaving, self._group = [self._group], None
        # In a thread: NCCL's abort waits for kernels, and torch's own clean-up for operations under way.
        peers = [r for r in range(len(self.names)) if r != self.rank]
        arguments = (leaving, self.backend, peers, self._ended)
        thread = threading.Thread(target=_end, args=arguments, name="mbridge-end-group", daemon=True)
        # If it came back from native code while Python shuts down, the process would end with SIGABRT.
        atexit.register(thread.join, EXIT_PATIENCE_S)
        thread.start()

    def wait_ended(self, breathe: Breathe = no_breath) -> None:
        """After `abort`: until no operation touches its tensors any more, so that others may. Raises DeadlineError."""
        end = time.monotonic() + self.deadline_s
        while not self._ended.wait(BREATH_S):
            if time.monotonic() >= end:
                raise DeadlineError(
                    f"waited {self.deadline_s:g} s for a group that was given up to end", phase="stream"
                )
            breathe()

    def close(self) -> None:
        """Leave. Waits for nobody: what is under way ends with an error."""
        self.abort()

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _native_timeout(self) -> timedelta:
        return timedelta(seconds=NATIVE_PATIENCE * self.deadline_s)

    def _begin(self, start: Callable[[Any], Any], what: str, tensors: Sequence[torch.Tensor]) -> Operation:
        group = self._group
        if group is None:
            raise TransportError(f"cannot begin {what}: the group was given up", phase="stream")
        try:
            return Operation(self, start(group), what, tensors)
        except RuntimeError as error:
            raise TransportError(f"cannot begin {what}: {_first_line(error)}", phase="stream") from error

    def _meet(self, store: Store, end: float, breathe: Breathe) -> None:
        """Wait until all members are at the store."""
        try:
            store.set(f"here/{self.rank}", "")
            if store.add("num_here", 1) == len(self.names):
                store.set("all", "")
            pause_s = 0.001
            while not store.check(["all"]):
                if time.monotonic() >= end:
                    absent = [name for r, name in enumerate(self.names) if not store.check([f"here/{r}"])]
                    raise DeadlineError(
                        f"waited {self.deadline_s:g} s for {', '.join(absent[:5])}"
                        f"{f' and {len(absent) - 5} others' if len(absent) > 5 else ''} to join a group",
                        origin=absent[0] if len(absent) == 1 else "",
                        phase="stream",
                    )
                breathe()
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, MEETING_PAUSE_S)
        except RuntimeError as error:
            raise TransportError(f"the store of the group is gone: {_first_line(error)}", phase="stream") from error

    def _run(self, make: Callable[[], Any], end: float, breathe: Breathe) -> None:
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append(make())
            except RuntimeError as error:
                outcome.append(error)

        thread = threading.Thread(target=run, name="join group", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(BREATH_S)
            if time.monotonic() >= end + 1:  # its own timeout, which says more, comes first
                raise DeadlineError(
                    f"waited {self.deadline_s:g} s for {len(self.names)} members to connect", phase="stream"
                )
            breathe()
        if isinstance(outcome[0], RuntimeError):
            names = ", ".join(name for r, name in enumerate(self.names[:6]) if r != self.rank)
            raise TransportError(
                f"cannot connect to the other members of a group ({names}): {_first_line(outcome[0])}", phase="stream"
            ) from outcome[0]
        self._group = outcome[0]

    def _make(self, store: Store, own_address: str) -> Any:
        timeout = timedelta(seconds=self.deadline_s)
        if self.backend == "gloo":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            # By the interface that reaches the store: host names need not resolve, and may name another interface.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]
            options._timeout, options._threads = timeout, NUM_GLOO_THREADS
            return dist.ProcessGroupGloo(store, self.rank, len(self.names), options)
        with torch.cuda.device(self.device), _environment(NCCL_ENVIRONMENT):
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = self._native_timeout
            group = dist.ProcessGroupNCCL(store, self.rank, len(self.names), nccl)
        group.eager_connect_single_device(self.device)
        return group


def _end(leaving: list[Any], backend: str, peers: Sequence[int], ended: threading.Event) -> None:
    """End all operations of the group in `leaving`, say so, and drop it, which may last."""
    group = leaving.pop()
    try:
        if group is not None and backend == "nccl":
            group.abort()
        elif group is not None:
            _close_connections(group, peers)
    finally:
        ended.set()
    del group
    atexit.unregister(threading.current_thread().join)


def _close_connections(group: Any, peers: Sequence[int]) -> None:
    """ProcessGroupGloo has no abort. But a receive that times out closes all connections of its group, and with them
    ends all that is under way, at once. One from a dead member only fails, so each is asked: where connections are
    closed already, that fails at once.
    """
    nothing = torch.empty(1, dtype=torch.uint8)
    for peer in peers:
        with suppress(RuntimeError):
            group.recv([nothing], peer, 0).wait(timedelta(milliseconds=1))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """`variables` in the environment for the time of a call that reads them, as there is no other way to tell it."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(" This is typically")[0]
