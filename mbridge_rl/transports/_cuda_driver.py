"""The few calls of the CUDA driver API that sharing memory takes, through ctypes on libcuda.

torch shares CUDA memory tensor by tensor, with reference counts kept between the processes. Here one handle for each
allocation is enough (a model's ten thousand parameters lie in few), and who lends outlives who borrows.
Driver calls, unlike those of the runtime, leave no "last error" behind that torch would find at its next kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import cache
from typing import NamedTuple

from ..errors import TransportError

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_POINTER_ATTRIBUTE_BUFFER_ID = 7
_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1
_MEMHOSTREGISTER_PORTABLE = 1


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


# A CUdeviceptr is an unsigned 64-bit integer, a CUdevice an int, a CUcontext an opaque pointer. All return a CUresult.
_SIGNATURES = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemGetAddressRange_v2": (POINTER(c_uint64), POINTER(c_size_t), c_uint64),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuIpcGetMemHandle": (POINTER(_IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), _IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
}


class Allocation(NamedTuple):
    """Device memory as one call to the driver allocated it. `number` is never used again in its process."""

    base: int
    num_bytes: int
    number: int


class Driver:
    """Every call raises TransportError, with the driver's own words, if it fails.

    Those on device memory need the context of its device: `with driver.context_of(index)`.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._library = ctypes.CDLL(library)
            for name, argtypes in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = argtypes, c_int
        except (OSError, AttributeError) as error:
            raise TransportError(f"no usable CUDA driver ({library}): {error}") from error
        self._call("cuInit", 0)

    @contextmanager
    def context_of(self, index: int) -> Iterator[None]:
        """Make the context that torch uses on device `index` current in this thread, where it may not be yet."""
        device, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(device), index)
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                self._call("cuCtxPopCurrent_v2", byref(c_void_p()))
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    def allocation_at(self, address: int) -> Allocation:
        """The allocation that holds `address`."""
        base, num_bytes = c_uint64(), c_size_t()
        self._call("cuMemGetAddressRange_v2", byref(base), byref(num_bytes), address)
        return Allocation(base.value, num_bytes.value, self.number_at(base.value))

    def number_at(self, address: int) -> int:
        """The number of the allocation that holds `address`: no other one of this process ever has it."""
        number = c_uint64()
        self._call("cuPointerGetAttribute", byref(number), _POINTER_ATTRIBUTE_BUFFER_ID, c_uint64(address))
        return number.value

    def export(self, base: int) -> bytes:
        """The handle by which other processes open the allocation at `base`; each time the same."""
        handle = _IpcHandle()
        self._call("cuIpcGetMemHandle", byref(handle), base)
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Map another process's allocation; its address here.

        The driver counts: opening it again gives the same address, and as many `close` unmap it.
        """
        if len(handle) != HANDLE_BYTES:
            raise TransportError(f"a CUDA IPC handle has {HANDLE_BYTES} bytes, found {len(handle)}")
        address = c_uint64()
        self._call(
            "cuIpcOpenMemHandle_v2",
            byref(address),
            _IpcHandle.from_buffer_copy(handle),
            _IPC_MEM_LAZY_ENABLE_PEER_ACCESS,
        )
        return address.value

    def close(self, address: int) -> None:
        """Undo one `open`."""
        self._call("cuIpcCloseMemHandle", address)

    def pin(self, address: int, num_bytes: int) -> None:
        """Page-lock host memory, for all contexts."""
        self._call("cuMemHostRegister_v2", address, num_bytes, _MEMHOSTREGISTER_PORTABLE)

    def unpin(self, address: int) -> None:
        """Undo `pin`."""
        self._call("cuMemHostUnregister", address)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise TransportError(f"{name} failed: {self._describe(status)}")

    def _describe(self, status: int) -> str:
        name, words = c_char_p(), c_char_p()
        self._library.cuGetErrorName(status, byref(name))
        self._library.cuGetErrorString(status, byref(words))
        return f"{(name.value or b'error').decode()} ({status}: {(words.value or b'unknown').decode()})"


@cache
def driver() -> Driver:
    """The driver of this process: there is one. Raises TransportError if there is none."""
    return Driver()
