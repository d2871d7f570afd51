from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_proxy.errors import CheckpointInvalid
from lightning_proxy.trainer.checkpoint import read_layout, validate
from tests.trainer.checkpoints import write_checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base")


def test_a_checkpoint_with_the_same_tensors_and_files_is_valid(base: Path, tmp_path: Path) -> None:
    validate(write_checkpoint(tmp_path / "new", a=np.full((2, 3), 7, np.float32)), base)


def test_the_layout_is_read_without_torch(base: Path) -> None:
    tensors = read_layout(base)["model.safetensors"]
    assert {name: (each.dtype, each.shape) for name, each in tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
    }


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a", np.array([[1, 2, np.nan], [1, 2, 3]], np.float32), "not finite"),
        ("a", np.array([[1, 2, np.inf], [1, 2, 3]], np.float32), "not finite"),
        ("b", np.array([0, 0x7F80, 0, 0], np.uint16), "not finite"),  # infinity in bfloat16
        ("b", np.array([0, 0xFFC0, 0, 0], np.uint16), "not finite"),  # not a number
        ("a", np.ones((3, 2), np.float32), "is F32"),
        ("a", np.ones((2, 3), np.float16), "is F16"),
        ("c", np.ones(1, np.float32), "other tensors"),
    ],
)
def test_a_checkpoint_that_could_kill_or_spoil_the_engine_is_refused(
    base: Path,
    tmp_path: Path,
    name: str,
    values: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    message: str,
) -> None:
    with pytest.raises(CheckpointInvalid, match=message):
        validate(write_checkpoint(tmp_path / "new", **{name: values}), base)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_checkpoint_without_configuration_or_tokenizer_is_refused(
    base: Path, tmp_path: Path, name: str
) -> None:
    new = write_checkpoint(tmp_path / "new")
    (new / name).unlink()
    with pytest.raises(CheckpointInvalid, match=f"lacks {name}"):
        validate(new, base)


@pytest.mark.parametrize("size", [0, 4, 30, -1])
def test_a_weights_file_that_was_cut_anywhere_is_refused(base: Path, tmp_path: Path, size: int) -> None:
    new = write_checkpoint(tmp_path / "new")
    weights = new / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointInvalid, match=r"whole safetensors|is cut"):
        validate(new, base)


def test_a_checkpoint_without_weights_is_refused(base: Path, tmp_path: Path) -> None:
    new = write_checkpoint(tmp_path / "new")
    (new / "model.safetensors").unlink()
    with pytest.raises(CheckpointInvalid, match="holds no"):
        validate(new, base)
