"""What travels: float32 untouched, bfloat16 rounded to the nearest of its values, ties to the even one."""

import struct
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.methods.parts.wire import decode, encode


def nearest_bfloat16(value):
    """bfloat16 is sign, 8 bits of exponent and 7 of fraction: the upper half of a float32. Take the closer one of the
    two neighbours in exact arithmetic (a float64 holds them all), the one with an even last bit on ties."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    around = [(bits >> 16) << 16, ((bits >> 16) + 1) << 16]
    values = [struct.unpack("<f", struct.pack("<I", b & 0xFFFFFFFF))[0] for b in around]
    down, up = abs(value - values[0]), abs(values[1] - value)
    if down == up:
        return values[0] if (bits >> 16) % 2 == 0 else values[1]
    return values[0] if down < up else values[1]


@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), max_size=20))
def test_bfloat16_is_the_nearest(values):
    vector = np.array(values, np.float32)
    assert decode(encode(vector, "bfloat16")).tolist() == [nearest_bfloat16(float(x)) for x in vector]


def test_bfloat16_by_hand():
    """Near 1 the step is 2⁻⁷: 1 + 2⁻⁸ is a tie and goes down to the even 1, 1 + 3·2⁻⁸ is one and goes up to 1 + 2⁻⁶.
    1.0 is 0x3F80."""
    vector = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2.5, 0], np.float32)
    wire = encode(vector, "bfloat16")
    assert wire.dtype == np.int16
    assert wire[0] == 0x3F80
    assert wire.nbytes * 2 == vector.nbytes
    decoded = decode(wire)
    assert decoded.dtype == np.float32
    assert decoded.tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7, -2.5, 0]
    assert np.array_equal(encode(decoded, "bfloat16"), wire)


def test_float32_travels_as_it_is():
    vector = np.random.default_rng(0).normal(size=100).astype(np.float32)
    wire = encode(vector, "float32")
    assert wire.nbytes == 400
    assert decode(wire).tobytes() == vector.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_that_cannot_be_written_are_no_trouble(dtype):
    """Ray hands out read-only arrays; torch warns about sharing those."""
    vector = np.ones(3, np.float32)
    vector.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wire = encode(vector, dtype)
        wire.flags.writeable = False
        assert decode(wire).tolist() == [1, 1, 1]
