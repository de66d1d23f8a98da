"""Buckets by broadcast, to workers on other GPUs and hosts: gloo for CPU tensors, NCCL for CUDA tensors.

No memory is shared: each sender and each worker has slots of its own (broadcaster.py, broadcast_slots.py). What this
file has is where they meet: a store that trainer rank 0 serves.
"""

from __future__ import annotations

import secrets
from typing import ClassVar, Self

import torch
from torch._C._distributed_c10d import TCPStore

from ..errors import TransportError
from ._process_group import serve
from .base import Address, Transport

STORE_DEADLINE_S = 120.0  # longest that one question to the store may take


class Collective(Transport):
    """The meeting place of a collective lane. Its creator, trainer rank 0, serves the store."""

    name: ClassVar[str] = "collective"
    is_shared: ClassVar[bool] = False

    def __init__(self, host: str, port: int, token: str, store: TCPStore | None = None) -> None:
        self.host, self.port, self.token = host, port, token
        self._store = store

    @classmethod
    def create(cls, slot_bytes: int, host: str = "127.0.0.1") -> Self:
        """Serve the store on `host`, a numeric address of this machine that all members reach."""
        store = serve(host, STORE_DEADLINE_S)
        return cls(host, store.port, secrets.token_hex(16), store)

    @classmethod
    def open(cls, address: Address) -> Self:
        return cls(str(address["host"]), int(address["port"]), str(address["token"]))

    @property
    def address(self) -> Address:
        return {"host": self.host, "port": self.port, "token": self.token}

    def slot(self, index: int) -> torch.Tensor:
        raise TransportError("transport collective shares no memory: each member has slots of its own")

    def everyone_attached(self) -> None:
        pass

    def close(self) -> None:
        self._store = None


TRANSPORT = Collective
