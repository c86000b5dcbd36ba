"""The few calls of the CUDA driver that engines need, through ctypes: neither torch nor the CUDA toolkit is used.

``tests/project/test_cuda.py`` executes them, and has passed on an H200; a machine without a GPU skips it.
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
    """The driver's library, None where it is not installed."""
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

    Raises ``Unavailable`` where there is no driver or no GPU, or a call of the driver fails; so does every method.
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
        """Allocate ``size`` bytes of device memory, and return their address; ``free`` releases them."""
        address = ctypes.c_uint64()
        _check(self._driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)), "cuMemAlloc")
        return address.value

    def free(self, address: int) -> None:
        """Release what ``allocate`` returned."""
        _check(self._driver.cuMemFree_v2(ctypes.c_uint64(address)), "cuMemFree")

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy the C-contiguous ``array`` to device memory, after all that the stream was given before."""
        source = ctypes.c_void_p(array.ctypes.data)
        size, stream = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.handle)
        _check(self._driver.cuMemcpyHtoDAsync_v2(ctypes.c_uint64(address), source, size, stream), "cuMemcpyHtoDAsync")

    def download(self, array: NDArray[Any], address: int) -> None:
        """Copy device memory into the C-contiguous ``array``, and wait until the stream has finished."""
        destination = ctypes.c_void_p(array.ctypes.data)
        size, stream = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.handle)
        _check(self._driver.cuMemcpyDtoHAsync_v2(destination, ctypes.c_uint64(address), size, stream), "cuMemcpyDtoHAsync")
        self.wait()

    def wait(self) -> None:
        """Wait until the stream has finished all that it was given."""
        _check(self._driver.cuStreamSynchronize(ctypes.c_void_p(self.handle)), "cuStreamSynchronize")

    def event(self) -> int:
        """Create an event, which stores the time when it is recorded, and return its handle; it ends with the context."""
        event = ctypes.c_void_p()
        _check(self._driver.cuEventCreate(ctypes.byref(event), 0), "cuEventCreate")
        return event.value or 0

    def record(self, event: int) -> None:
        """Record ``event``: the GPU stores the time once the stream has finished what it was given so far."""
        _check(self._driver.cuEventRecord(ctypes.c_void_p(event), ctypes.c_void_p(self.handle)), "cuEventRecord")

    def seconds_between(self, start: int, end: int) -> float:
        """Wait until the second of two recorded events is reached, and return the seconds between them."""
        _check(self._driver.cuEventSynchronize(ctypes.c_void_p(end)), "cuEventSynchronize")
        milliseconds = ctypes.c_float()
        status = self._driver.cuEventElapsedTime(ctypes.byref(milliseconds), ctypes.c_void_p(start), ctypes.c_void_p(end))
        _check(status, "cuEventElapsedTime")
        return milliseconds.value / 1e3

    def close(self) -> None:
        """Destroy the stream and release the context; the object must not be used afterwards."""
        _check(self._driver.cuStreamDestroy_v2(ctypes.c_void_p(self.handle)), "cuStreamDestroy")
        _check(self._driver.cuDevicePrimaryCtxRelease_v2(0), "cuDevicePrimaryCtxRelease")


def _check(status: int, call: str) -> None:
    if status != 0:
        raise Unavailable(f"the CUDA driver's {call} failed with error {status}: see CUresult in the CUDA driver API")
