"""The few calls of the CUDA driver that engines need, through ctypes: no torch, no CUDA toolkit.

Executed on an H200 by ``tests/project/test_cuda.py``, which a machine without a GPU skips.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

from patchslim.errors import Unavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@functools.cache
def _driver() -> ctypes.CDLL | None:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@functools.cache
def local_target() -> str | None:
    """Return the architecture of the first visible GPU, as ``sm89``; None without a driver or a GPU."""
    driver, count = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    _check(driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device), "cuDeviceGetAttribute")
    _check(driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device), "cuDeviceGetAttribute")
    return f"sm{major.value}{minor.value}"


def device_name() -> str | None:
    """Return the name of the first visible GPU; None without a driver or a GPU."""
    driver = _driver()
    if driver is None or local_target() is None:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    _check(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    _check(driver.cuDeviceGetName(name, len(name), device), "cuDeviceGetName")
    return name.value.decode()


def driver_version() -> str | None:
    """Return the newest CUDA that the driver supports, as ``13.2``; None without a driver."""
    driver, version = _driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


class Stream:
    """A CUDA stream on the first visible GPU, with copies to and from buffers of its memory.

    Raises:
        Unavailable: there is no driver, or a driver call fails.
    """

    def __init__(self) -> None:
        driver = _driver()
        if driver is None or local_target() is None:
            raise Unavailable("no CUDA driver or no visible GPU on this machine")
        self._driver = driver
        context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        # The primary context is the one that the CUDA runtime inside TensorRT uses.
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), "cuDevicePrimaryCtxRetain")
        _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        _check(driver.cuStreamCreate(ctypes.byref(stream), 1), "cuStreamCreate")  # 1: CU_STREAM_NON_BLOCKING
        self.handle = stream.value or 0

    def allocate(self, size: int) -> int:
        """Return the device address of ``size`` new bytes; ``free`` gives them back."""
        address = ctypes.c_uint64()
        _check(self._driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)), "cuMemAlloc")
        return address.value

    def free(self, address: int) -> None:
        _check(self._driver.cuMemFree_v2(ctypes.c_uint64(address)), "cuMemFree")

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy the C-contiguous ``array`` to device memory, in stream order."""
        source = ctypes.c_void_p(array.ctypes.data)
        size, stream = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.handle)
        _check(self._driver.cuMemcpyHtoDAsync_v2(ctypes.c_uint64(address), source, size, stream), "cuMemcpyHtoDAsync")

    def download(self, array: NDArray[Any], address: int) -> None:
        """Fill the C-contiguous ``array`` from device memory, and wait until the stream has done all its work."""
        destination = ctypes.c_void_p(array.ctypes.data)
        size, stream = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.handle)
        _check(self._driver.cuMemcpyDtoHAsync_v2(destination, ctypes.c_uint64(address), size, stream), "cuMemcpyDtoHAsync")
        self.wait()

    def wait(self) -> None:
        """Wait until the stream has done all its work."""
        _check(self._driver.cuStreamSynchronize(ctypes.c_void_p(self.handle)), "cuStreamSynchronize")

    def event(self) -> int:
        """Return a new event, which takes the time when it is recorded; the context's end destroys it."""
        event = ctypes.c_void_p()
        _check(self._driver.cuEventCreate(ctypes.byref(event), 0), "cuEventCreate")
        return event.value or 0

    def record(self, event: int) -> None:
        """Let the GPU take the time in ``event`` when the stream has done what it was given so far."""
        _check(self._driver.cuEventRecord(ctypes.c_void_p(event), ctypes.c_void_p(self.handle)), "cuEventRecord")

    def seconds_between(self, start: int, end: int) -> float:
        """Return the seconds between two recorded events, waiting until the second one is reached."""
        _check(self._driver.cuEventSynchronize(ctypes.c_void_p(end)), "cuEventSynchronize")
        milliseconds = ctypes.c_float()
        status = self._driver.cuEventElapsedTime(ctypes.byref(milliseconds), ctypes.c_void_p(start), ctypes.c_void_p(end))
        _check(status, "cuEventElapsedTime")
        return milliseconds.value / 1e3

    def close(self) -> None:
        """Destroy the stream and release the context; the object cannot be used afterwards."""
        _check(self._driver.cuStreamDestroy_v2(ctypes.c_void_p(self.handle)), "cuStreamDestroy")
        _check(self._driver.cuDevicePrimaryCtxRelease_v2(0), "cuDevicePrimaryCtxRelease")


def _check(status: int, call: str) -> None:
    if status != 0:
        raise Unavailable(f"the CUDA driver refused {call} with error {status}")
