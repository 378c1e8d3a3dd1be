"""openpi's messages: what is sent is what is read, and nothing else is."""

import msgpack
import numpy as np
import pytest

from vla0_trl.serving.codec import MAX_ENTRIES, CodecError, pack, unpack


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "<i2", ">i4", "u4", "i8", "u8", "f2", "<f4", ">f8"])
def test_arrays_and_scalars_come_back(dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    message = unpack(pack({"a": array, "b": {"c": array[1, 2]}, "d": array[:, 1], "e": np.asarray(array[0, 1])}))
    for found, sent in ((message["a"], array), (message["d"], array[:, 1]), (message["e"], array[0, 1])):
        assert np.array_equal(found, sent) and found.dtype == sent.dtype.newbyteorder("=") and found.dtype.isnative
    assert message["b"]["c"] == array[1, 2] and np.asarray(message["b"]["c"]).dtype.kind == array.dtype.kind


def test_plain_values_come_back():
    message = {"prompt": "Schiebe den Würfel", "none": None, "list": [1, 2.5, True, "a", b"b"], "map": {"x": {}}}
    assert unpack(pack(message)) == message


def array(**changes) -> bytes:
    """A message whose array has one field changed."""
    fields = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "|u1", b"shape": [8]}
    return msgpack.packb({"image": {**fields, **{name.encode(): value for name, value in changes.items()}}})


def scalar(data, dtype: str = "<f8") -> bytes:
    return msgpack.packb({"x": {b"__npgeneric__": True, b"data": data, b"dtype": dtype}})


DTYPES = [
    "|O",
    "O8",
    "|V8",
    "|V99999999999",
    "|S8",
    "<U2",
    "<M8[ns]",
    "<m8",
    "<c8",
    "f16",
    "u1,u1",
    "",
    "float64",
    8,
    None,
]
HOSTILE = {
    **{f"dtype {dtype!r}": (array(dtype=dtype), "is not a boolean, integer or float") for dtype in DTYPES},
    **{f"scalar {dtype!r}": (scalar(1, dtype), "is not a boolean, integer or float") for dtype in DTYPES},
    "shape bomb": (array(shape=[2**20, 2**20]), "needs other than the 8 bytes"),
    "shape of zeros": (array(shape=[0, 2**30], data=b""), "is empty"),
    "shape beyond integers": (array(shape=[2**63]), "is not a list of up to 8 sizes"),
    "negative shape": (array(shape=[-1]), "is not a list of up to 8 sizes"),
    "shape of floats": (array(shape=[8.0]), "is not a list of up to 8 sizes"),
    "shape of booleans": (array(shape=[True] * 8), "is not a list of up to 8 sizes"),
    "many dimensions": (array(shape=[1] * 64 + [8]), "is not a list of up to 8 sizes"),
    "no shape": (array(shape=None), "is not a list of up to 8 sizes"),
    "data are text": (array(data="12345678"), "an array's data are str"),
    "data are numbers": (array(data=[1] * 8), "an array's data are list"),
    "scalar of bytes": (scalar(b"12345678"), "holds bytes"),
    "scalar too large": (scalar(2**63, "<i8"), "is no int64"),
    "keys are bytes": (msgpack.packb({b"image": 1}), "a map has bytes for keys"),
    "keys are numbers": (msgpack.packb({1: 1}), "not openpi's msgpack"),
    "extension": (msgpack.packb({"x": msgpack.ExtType(5, b"12")}), "not openpi's msgpack"),
    "timestamp": (msgpack.packb(msgpack.Timestamp(1, 1)), "not openpi's msgpack"),
    "half a message": (array()[:-3], "not openpi's msgpack"),
    "more than a message": (array() + b"\0", "not openpi's msgpack"),
    "nothing": (b"", "not openpi's msgpack"),
    "no UTF-8": (b"\xa2\xff\xff", "not openpi's msgpack"),
    "100,000 lists in each other": (b"\x91" * 100_000 + b"\xc0", "not openpi's msgpack"),
    "100,000 maps in each other": (b"\x81\xa1a" * 100_000 + b"\xc0", "not openpi's msgpack"),
    "a list that claims 2^32 entries": (b"\xdd\xff\xff\xff\xff", "not openpi's msgpack"),
    "a map that claims 2^32 entries": (b"\xdf\xff\xff\xff\xff", "not openpi's msgpack"),
    "bytes that claim to be 4 GB": (b"\xc6\xff\xff\xff\xff", "not openpi's msgpack"),
    "many empty maps": (msgpack.packb([[{}] * 4000] * 20), f"more than {MAX_ENTRIES} entries"),
}


@pytest.mark.parametrize("data, message", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_message_or_could_do_harm_is_one_line(data, message):
    with pytest.raises(CodecError, match=message.replace("^", r"\^")) as caught:
        unpack(data)
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["text"]), np.array(1j), object()])
def test_other_things_are_not_sent(value):
    with pytest.raises(CodecError, match="can't be sent"):
        pack({"x": value})
