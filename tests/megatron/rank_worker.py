"""One rank of a `RankPool` (conftest.py): runs functions of test files on request, importing Megatron-Core only once.

Started as `python rank_worker.py FD`; requests and replies are pickles on that inherited pipe, whose end is its own.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist


def load(path: str) -> ModuleType:
    """The module in a test file, by its path, so that no import mode of pytest matters."""
    name = f"ranks_of_{abs(hash(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def run(request: dict[str, Any]) -> Any:
    from mbridge.megatron import destroy_parallel

    store = dist.FileStore(request["store"], request["world_size"])
    dist.init_process_group(
        "gloo",
        store=store,
        rank=request["rank"],
        world_size=request["world_size"],
        timeout=timedelta(seconds=request["timeout_s"]),
    )
    try:
        return getattr(load(request["path"]), request["function"])(**request["kwargs"])
    finally:
        destroy_parallel()


def main() -> None:
    torch.set_num_threads(1)
    pipe = Connection(int(sys.argv[1]))
    while True:
        try:
            request = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            reply = (True, run(request))
        except BaseException:  # noqa: BLE001 - whatever happened is the test's to see
            reply = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))


if __name__ == "__main__":
    main()
