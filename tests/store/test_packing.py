from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_proxy.store import packing
from lightning_proxy.store.packing import pack_ids, pack_logprobs, unpack_ids, unpack_logprobs

int32s = st.lists(st.integers(-(2**31), 2**31 - 1))
float32s = st.lists(st.floats(width=32, allow_nan=False))


@given(int32s)
def test_ids_come_back_as_they_were(ids: list[int]) -> None:
    assert unpack_ids(pack_ids(array("i", ids))) == array("i", ids)


@given(float32s)
def test_logprobs_come_back_as_they_were(logprobs: list[float]) -> None:
    assert unpack_logprobs(pack_logprobs(array("f", logprobs))) == array("f", logprobs)


@given(int32s, float32s)
def test_bytes_are_little_endian(ids: list[int], logprobs: list[float]) -> None:
    assert pack_ids(array("i", ids)) == struct.pack(f"<{len(ids)}i", *ids)
    assert pack_logprobs(array("f", logprobs)) == struct.pack(f"<{len(logprobs)}f", *logprobs)


def test_a_big_endian_machine_swaps_and_leaves_the_callers_array_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, logprobs = array("i", [1, -2]), array("f", [0.5])
    plain = pack_ids(ids), pack_logprobs(logprobs)
    monkeypatch.setattr(packing, "_SWAP", True)
    assert pack_ids(ids) == plain[0][3::-1] + plain[0][:3:-1]
    assert pack_logprobs(logprobs) == plain[1][::-1]
    assert unpack_ids(pack_ids(ids)) == ids
    assert unpack_logprobs(pack_logprobs(logprobs)) == logprobs
    assert ids == array("i", [1, -2])


def test_arrays_of_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="array\\('i'\\)"):
        pack_ids(array("q", [1]))
    with pytest.raises(TypeError, match="array\\('f'\\)"):
        pack_logprobs(array("d", [1.0]))


def test_cut_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        unpack_ids(b"\0\0\0")
