"""Safetensors files and a backend made with NumPy alone, for the tests that need no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_proxy.trainer.batches import Floats, Rows

Arrays = Mapping[str, NDArray[np.generic]]
_PLAIN: Arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.uint16)}
_NAMES = {"float32": "F32", "float16": "F16", "float64": "F64", "uint16": "BF16", "int64": "I64"}


def write_safetensors(path: Path, arrays: Arrays) -> None:
    """The format as its specification says; ``uint16`` stands for bfloat16."""
    header, data = {}, b""
    for name, values in arrays.items():
        raw = values.tobytes()
        header[name] = {
            "dtype": _NAMES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_checkpoint(directory: Path, **changes: NDArray[np.generic]) -> Path:
    """A checkpoint of two tensors; ``changes`` replace or add some."""
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    write_safetensors(directory / "model.safetensors", {**_PLAIN, **changes})
    return directory


class PaperBackend:
    """A ``Backend`` whose weights never change."""

    def __init__(self, **changes: NDArray[np.generic]) -> None:
        self.changes = changes

    def logprobs(self, rows: Rows) -> Floats:
        return np.zeros(len(rows.tokens), dtype=np.float32)

    def update(self, rows: Rows) -> Mapping[str, float]:
        return {"pg_loss": 0.0, "grad_norm": 0.0}

    def export(self, directory: Path, base: Path) -> None:
        write_safetensors(directory / "model.safetensors", {**_PLAIN, **self.changes})

    def export_adapter(self, directory: Path, base: Path) -> None:
        (directory / "adapter_config.json").write_text("{}")

    def save_state(self, directory: Path) -> None:
        (directory / "state").write_text("state")

    def load_state(self, directory: Path, *, optimizer: bool = True) -> None:
        assert (directory / "state").read_text() == "state"

    def close(self) -> None:
        return None
