"""A checkpoint on disk: which tensors it has, and whether it may be shown to an engine.

Reads the safetensors format itself (an 8-byte length, a JSON header, the data), so that neither
torch nor the weights in memory are needed to judge a checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_proxy.errors import CheckpointInvalid

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_CHUNK = 1 << 22  # elements looked at at once
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file; its data are the bytes ``start`` to ``end`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


Layout = dict[str, dict[str, TensorInfo]]  # file name -> tensor name -> tensor


def read_layout(directory: Path) -> Layout:
    """The tensors of each ``*.safetensors`` file. ``CheckpointInvalid`` where there is none, or it is cut."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointInvalid(f"{directory} holds no *.safetensors file")
    return {file.name: _read_header(file) for file in files}


def validate(directory: Path, base: Path) -> None:
    """Raise ``CheckpointInvalid`` unless the checkpoint could stand in for ``base``.

    The same tensors with the same shapes and dtypes, all numbers finite, and each other file that
    the base has (configuration, tokenizer ...). An engine that is pointed at less may die of it.
    """
    missing = [name for name in companion_files(base) if not (directory / name).is_file()]
    if missing or not (directory / "config.json").is_file():
        raise CheckpointInvalid(f"{directory} lacks {', '.join(missing) or 'config.json'}")
    layout = read_layout(directory)
    found, expected = _by_name(layout), _by_name(read_layout(base))
    if found.keys() != expected.keys():
        different = sorted(found.keys() ^ expected.keys())
        raise CheckpointInvalid(f"{directory}: other tensors than in {base}: {', '.join(different[:5])} ...")
    for name, tensor in found.items():
        if (tensor.dtype, tensor.shape) != (expected[name].dtype, expected[name].shape):
            raise CheckpointInvalid(
                f"{directory}: {name} is {tensor.dtype} {tensor.shape}, "
                f"in {base} it is {expected[name].dtype} {expected[name].shape}"
            )
    for file, tensors in layout.items():
        for name, tensor in tensors.items():
            if not _finite(directory / file, tensor):
                raise CheckpointInvalid(f"{directory}: {name} holds numbers that are not finite")


def companion_files(directory: Path) -> list[str]:
    """Names of the files beside the weights: configuration, tokenizer, chat template, index ..."""
    weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
    return sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.is_file() and entry.suffix not in weights and not entry.name.startswith(".")
    )


def _by_name(layout: Layout) -> dict[str, TensorInfo]:
    return {name: tensor for tensors in layout.values() for name, tensor in tensors.items()}


def _read_header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_LARGEST_HEADER, size - 8):
                raise CheckpointInvalid(f"{path} is not a whole safetensors file")
            header = json.loads(file.read(length))
        tensors = {
            name: TensorInfo(
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointInvalid(f"{path} is not a whole safetensors file: {error}") from error
    if any(tensor.end > size for tensor in tensors.values()):
        raise CheckpointInvalid(f"{path} is cut: {size} bytes are less than its header says")
    return tensors


def _finite(path: Path, tensor: TensorInfo) -> bool:
    dtype = "<u2" if tensor.dtype == "BF16" else _FLOATS.get(tensor.dtype)
    if dtype is None or tensor.start == tensor.end:
        return True  # integers are always finite
    count = (tensor.end - tensor.start) // np.dtype(dtype).itemsize
    values = np.memmap(path, dtype=dtype, mode="r", offset=tensor.start, shape=(count,))
    for start in range(0, count, _CHUNK):
        chunk = values[start : start + _CHUNK]
        # bfloat16 has float32's exponent: all of its bits set means infinite or not a number.
        finite = (chunk & 0x7F80) != 0x7F80 if tensor.dtype == "BF16" else np.isfinite(chunk)
        if not finite.all():
            return False
    return True
