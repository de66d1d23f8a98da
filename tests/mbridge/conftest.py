"""The pool of real ranks that the tests of mbridge.megatron use, for those of the bridge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.megatron.conftest import RankPool


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pool = RankPool(tmp_path_factory.mktemp("bridge_ranks"))
    yield pool
    pool.close()
