"""Token ids and logprobs as bytes: int32 and float32, little-endian, whatever this machine is."""

from __future__ import annotations

import sys
from array import array
from typing import TypeVar

_Number = TypeVar("_Number", int, float)

_INT = "i"
_FLOAT = "f"
_SWAP = sys.byteorder == "big"

if array(_INT).itemsize != 4 or array(_FLOAT).itemsize != 4:
    raise ImportError("lightning_proxy.store needs a platform whose C int and float have 4 bytes")


def pack_ids(ids: array[int]) -> bytes:
    """Token ids, ``array('i')``, as int32 little-endian. Raises ``TypeError`` for any other array."""
    if ids.typecode != _INT:
        raise TypeError(f"token ids must be an array('i'), not array({ids.typecode!r})")
    return _swapped(ids).tobytes() if _SWAP else ids.tobytes()


def unpack_ids(data: bytes) -> array[int]:
    """What :func:`pack_ids` packed. Raises ``ValueError`` where ``data`` is cut."""
    ids: array[int] = array(_INT)
    ids.frombytes(data)
    if _SWAP:
        ids.byteswap()
    return ids


def pack_logprobs(logprobs: array[float]) -> bytes:
    """Logprobs, ``array('f')``, as float32 little-endian. Raises ``TypeError`` for any other array."""
    if logprobs.typecode != _FLOAT:
        raise TypeError(f"logprobs must be an array('f'), not array({logprobs.typecode!r})")
    return _swapped(logprobs).tobytes() if _SWAP else logprobs.tobytes()


def unpack_logprobs(data: bytes) -> array[float]:
    """What :func:`pack_logprobs` packed. Raises ``ValueError`` where ``data`` is cut."""
    logprobs: array[float] = array(_FLOAT)
    logprobs.frombytes(data)
    if _SWAP:
        logprobs.byteswap()
    return logprobs


def _swapped(values: array[_Number]) -> array[_Number]:
    copy = values[:]
    copy.byteswap()
    return copy
