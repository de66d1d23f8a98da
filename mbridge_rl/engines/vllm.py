"""vLLM, refitted through its own weight-transfer interface: an in-process `vllm.LLM`, or the URL of a `vllm serve`.

The engine must have been started with `weight_transfer_config={"backend": "mbridge"}` (`--weight-transfer-config
'{"backend": "mbridge"}'`); vLLM finds the backend through the entry point `vllm.general_plugins`, which calls
`register`. A server also needs `VLLM_SERVER_DEV_MODE=1` for its weight-transfer routes.
"""

from __future__ import annotations

import http.client
import inspect
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import EngineError, EngineGoneError, EngineLoadError
from ..messages import Invitation
from .base import Engine, InFlight

if TYPE_CHECKING:
    from vllm import LLM

BACKEND = "mbridge"
# torchrun's variables describe the trainer's job; a vLLM child that reads them may join the wrong world, or wait for
# torchrun's own store.
TORCHRUN_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
TORCHRUN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


def register() -> None:
    """Entry point `vllm.general_plugins`: tell vLLM about the backend. May run several times in one process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "mbridge_rl.engines.vllm_worker", "MBridgeWeightTransferEngine"
        )


@contextmanager
def without_torchrun() -> Iterator[None]:
    """Hide torchrun's environment variables from child processes that are started inside."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _is_torchruns(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def start_llm(model: str, **options: Any) -> LLM:
    """`vllm.LLM(model, **options)` with the backend `mbridge`, safe inside a rank of torchrun."""
    from vllm import LLM

    options.setdefault("weight_transfer_config", {"backend": BACKEND})
    with without_torchrun():
        return LLM(model=model, **options)


class _VLLM(Engine):
    """vLLM's four calls, by whichever way they are made."""

    @abstractmethod
    def _call(self, method: str, **arguments: Any) -> Any:
        """Make a weight-transfer call. Raises EngineError."""

    def attach(self, invitation: Invitation) -> None:
        self._call("init_weight_transfer_engine", init_info={"invitation": msgspec.to_builtins(invitation)})

    def update(self, attempt: int, version: int, moves: bool) -> None:
        self._call("start_weight_update")
        self._call("update_weights", update_info={"attempt": attempt, "version": version, "moves": moves})

    def close_session(self) -> None:
        self._call("finish_weight_update")


class VLLMEngine(_VLLM):
    """An in-process `vllm.LLM` (its EngineCore may be another process). While it is stale, use `generate` of this
    class:

    it raises EngineStaleError. `LLM.generate` itself serves no torn weights either: the scheduler is paused, so it
    waits.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._config = llm.llm_engine.vllm_config
        chosen = self._config.weight_transfer_config
        if chosen is None or chosen.backend != BACKEND:
            raise EngineError(
                f"this LLM was started with weight_transfer_config={chosen!r}; start it with "
                f'weight_transfer_config={{"backend": "{BACKEND}"}}, or with mbridge_rl.engines.vllm.start_llm'
            )
        self._has_version = "weight_version" in inspect.signature(llm.finish_weight_update).parameters

    @property
    def name(self) -> str:
        return f"vLLM {self._config.model_config.model}"

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`LLM.generate`, unless the engine is stale: then EngineStaleError."""
        self.check_serving()
        return self.llm.generate(*args, **kwargs)

    def num_workers(self) -> int:
        return int(self._config.parallel_config.world_size_across_dp)

    def pause(self, in_flight: InFlight) -> None:
        # Level 0 of vLLM's sleep pauses the scheduler and touches no memory.
        self._guarded(self.llm.sleep, level=0, mode=self._pause_mode(in_flight))

    def reset_cache(self) -> None:
        # Requests that were kept are computed again from their tokens, with the new weights.
        _check_reset(self._guarded(self.llm.reset_prefix_cache, reset_running_requests=True))

    def publish(self, version: int) -> None:
        if self._has_version:
            self._guarded(self.llm.update_weight_version, str(version))

    def resume(self) -> None:
        self._guarded(self.llm.wake_up, tags=["scheduling"])

    def detach(self) -> None:
        release = getattr(self.llm, "shutdown_weight_transfer_engine", None)
        if release is not None:
            self._guarded(release)

    def _pause_mode(self, in_flight: InFlight) -> str:
        is_in_process = not hasattr(self.llm.llm_engine.engine_core, "resources")
        if in_flight != "wait" or not is_in_process:
            return in_flight
        if self.llm.llm_engine.has_unfinished_requests():
            raise EngineError(
                "with VLLM_ENABLE_V1_MULTIPROCESSING=0 vLLM cannot wait for requests in flight: finish them before "
                'sync(), or pass in_flight="abort" or "keep"'
            )
        return "abort"

    def _call(self, method: str, **arguments: Any) -> Any:
        call = getattr(self.llm, method)
        return self._guarded(call, arguments) if arguments else self._guarded(call)

    def _guarded(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return call(*args, **kwargs)
        except EngineDeadError as error:
            raise EngineGoneError(f"{self.name} is dead; start a new engine", origin=self.name) from error
        except Exception as error:  # vLLM raises plain Exception for whatever happened in its core
            raise EngineLoadError(f"{self.name} failed in {call.__name__}: {error}", origin=self.name) from error


class VLLMServer(_VLLM):
    """A `vllm serve` at `url`, on this host or another (then the syncer needs `bind`).

    While it is stale its scheduler is paused: requests wait.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._timeout_s = timeout_s

    @property
    def name(self) -> str:
        return f"vLLM {self.url}"

    def num_workers(self) -> int:
        return int(self._request("GET", "get_world_size")["world_size"])

    def pause(self, in_flight: InFlight) -> None:
        self._request("POST", f"pause?mode={in_flight}&clear_cache=false")

    def reset_cache(self) -> None:
        answer = self._request("POST", "reset_prefix_cache?reset_running_requests=true")
        _check_reset(answer is None or answer.get("success", True))

    def publish(self, version: int) -> None:
        try:
            self._request("POST", "update_weight_version", {"new_version": str(version)})
        except EngineError as error:
            if not isinstance(error.__cause__, urllib.error.HTTPError) or error.__cause__.code != 404:
                raise
            # vLLM before 0.27 keeps no version; our workers do.

    def resume(self) -> None:
        self._request("POST", "resume")

    def detach(self) -> None:
        """The workers find the trainer's Goodbye when the next one comes; older servers have no route for it."""

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._request("POST", method, arguments)

    def _request(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if verb == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers=self._headers, method=verb)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            hint = ". Was the server started with VLLM_SERVER_DEV_MODE=1?" if error.code == 404 else ""
            detail = error.read().decode(errors="replace")[:500]
            raise EngineLoadError(
                f"{verb} {self.url}/{path} answered {error.code}: {detail}{hint}", origin=self.name
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineGoneError(f"cannot reach {self.url}/{path}: {error}", origin=self.name) from error
        return json.loads(text) if text else None


def wrap(thing: object) -> Engine | None:
    """VLLMServer for an http(s) URL, VLLMEngine for a vllm.LLM. vLLM is not imported to find out."""
    if isinstance(thing, str) and urllib.parse.urlsplit(thing).scheme in ("http", "https"):
        return VLLMServer(thing)
    vllm = sys.modules.get("vllm")
    if vllm is not None and isinstance(thing, vllm.LLM):
        return VLLMEngine(thing)
    return None


def _check_reset(succeeded: bool) -> None:
    if not succeeded:
        raise EngineLoadError("vLLM did not reset its prefix cache: something still holds blocks of it")


def _is_torchruns(name: str) -> bool:
    return name in TORCHRUN_VARIABLES or name.startswith(TORCHRUN_PREFIXES)
