"""CRC32C of anything that has a buffer."""

from __future__ import annotations

import ctypes

import google_crc32c

_BLOCK = 1 << 18  # a copy of this size stays in the cache


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """CRC32C (Castagnoli) of `data`, going on from `value`. Any contiguous buffer; copies nothing that is writable."""
    if isinstance(data, bytes):
        return int(google_crc32c.extend(value, data))
    view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
    if not view.readonly:
        # The extension takes only buffers that need no release; a ctypes array over the same memory is one.
        return int(google_crc32c.extend(value, (ctypes.c_char * view.nbytes).from_buffer(view)))
    for begin in range(0, view.nbytes, _BLOCK):
        value = int(google_crc32c.extend(value, bytes(view[begin : begin + _BLOCK])))
    return value
