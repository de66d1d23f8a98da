"""Conformance suites: what every transport and every engine must do. For our own tests and for those of third parties.

    check_transport("my_transport")
    check_engine(make_engine, read)

Both run small named cases (`TRANSPORT_CASES`, `ENGINE_CASES`) and raise AssertionError that begins with the case's name
and says what was violated. To have each case be a test of its own:

    @pytest.mark.parametrize("case", ENGINE_CASES)
    def test_my_engine(case):
        check_engine(make_engine, read, cases=[case])

`WholeBridge` is the smallest trainer: one rank, whole HF tensors.
"""

from __future__ import annotations

from .bridge import LiveView, StridedBridge, WholeBridge
from .models import ReferenceModule, changed
from .suites import ENGINE_CASES, TRANSPORT_CASES, check_engine, check_transport

__all__ = [
    "ENGINE_CASES",
    "TRANSPORT_CASES",
    "LiveView",
    "ReferenceModule",
    "StridedBridge",
    "WholeBridge",
    "changed",
    "check_engine",
    "check_transport",
]
