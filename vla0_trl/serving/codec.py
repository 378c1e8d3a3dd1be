"""openpi's messages: msgpack with NumPy arrays, read in a way that no sender can misuse.

An array is a map with the *bytes* keys `__ndarray__, data, dtype, shape`, a scalar one with `__npgeneric__, data,
dtype`. openpi's own reader hands `dtype` and `shape` to NumPy as they come: `"|O"` makes pointers of the sender's
bytes. This one takes booleans, integers and floats of 1 to 8 bytes whose size is that of their bytes, and bounds how
much memory a message can take. Needs msgpack and NumPy alone, because the LeRobot plugin contains a copy.
"""

import math
import re
from typing import Any

import msgpack
import numpy as np

MAX_DIMENSIONS = 8
MAX_ENTRIES = 65_536  # of all lists and maps of a message; arrays count as one map of four
MAX_LIST, MAX_MAP = 4096, 256
_DTYPE = re.compile(r"[|<>=]?(?:b1|[iu][1248]|f[248])")


class CodecError(ValueError):
    """These bytes are no message, or one that could do harm; says why in one line."""


def pack(message: Any) -> bytes:
    """A message -> bytes. Arrays of other things than booleans, integers and floats raise `CodecError`."""
    return msgpack.packb(message, default=_pack_numpy)


def unpack(data: bytes) -> Any:
    """Bytes -> the message; its arrays are read-only.

    `CodecError`: this is no whole message of msgpack, or an array of it is not what it says, or it is too large.
    """
    entries = 0

    def count(number: int) -> None:
        nonlocal entries
        entries += number
        if entries > MAX_ENTRIES:
            raise CodecError(f"the message has more than {MAX_ENTRIES} entries outside of arrays: send arrays")

    def list_hook(items: list) -> list:
        count(len(items) + 1)
        return items

    def object_hook(items: dict) -> Any:
        count(2 * len(items) + 1)
        return _unpack_numpy(items)

    try:
        return msgpack.unpackb(
            data,
            object_hook=object_hook,
            list_hook=list_hook,
            max_array_len=MAX_LIST,
            max_map_len=MAX_MAP,
            max_ext_len=0,
        )
    except CodecError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise CodecError(f"the message is not openpi's msgpack: {reason[:200]}") from error


def unpack_array(value: Any) -> Any:
    """An array in vla-eval's dialect, whose map has text for keys; checked in the same way."""
    if isinstance(value, dict) and "__ndarray__" in value:
        return _array(value.get("data"), _dtype(value.get("dtype")), value.get("shape"))
    return value


def _pack_numpy(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray | np.generic):
        if not _DTYPE.fullmatch(value.dtype.str):
            raise CodecError(f"arrays of {value.dtype} can't be sent: only booleans, integers and floats")
        if isinstance(value, np.ndarray):
            data = value.tobytes()
            return {b"__ndarray__": True, b"data": data, b"dtype": value.dtype.str, b"shape": list(value.shape)}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise CodecError(f"{type(value).__name__} can't be sent")


def _unpack_numpy(items: dict) -> Any:
    if b"__ndarray__" in items:
        return _array(items.get(b"data"), _dtype(items.get(b"dtype")), items.get(b"shape"))
    if b"__npgeneric__" in items:
        value, dtype = items.get(b"data"), _dtype(items.get(b"dtype"))
        if not isinstance(value, bool | int | float):
            raise CodecError(f"a scalar of {dtype} holds {type(value).__name__}")
        try:
            return dtype.type(value)
        except (OverflowError, ValueError) as error:
            raise CodecError(f"{repr(value)[:40]} is no {dtype}") from error
    if any(isinstance(key, bytes) for key in items):
        raise CodecError("a map has bytes for keys, and is neither an array nor a scalar of NumPy")
    return items


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise CodecError(f"dtype {repr(name)[:40]} is not a boolean, integer or float of 1 to 8 bytes")
    return np.dtype(name)


def _array(data: Any, dtype: np.dtype, shape: Any) -> np.ndarray:
    if not isinstance(data, bytes):
        raise CodecError(f"an array's data are {type(data).__name__}, not bytes")
    sizes = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not sizes or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise CodecError(f"shape {repr(shape)[:60]} is not a list of up to {MAX_DIMENSIONS} sizes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise CodecError(f"an array of {dtype} and shape {shape} needs other than the {len(data)} bytes that it has")
    if not data:
        raise CodecError(f"an array of shape {shape} is empty")
    array = np.frombuffer(data, dtype).reshape(shape)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))
