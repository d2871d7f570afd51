"""What the update engine does otherwise than verl's: an adapter's base in bfloat16, softmax in pieces."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_proxy.errors import TrainingError
from lightning_proxy.trainer.backend import open_backend
from lightning_proxy.trainer.checkpoint import read_layout
from lightning_proxy.trainer.sampling import PLAIN, Sampling
from tests.trainer.conftest import recipe
from tests.trainer.gradients import worker_of
from tests.trainer.rows import random_rows
from tests.trainer.tiny_model import write_tiny_model

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # verl and torch warn about themselves

LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def bfloat16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bfloat16"), dtype="bfloat16")


def test_frozen_weights_stay_in_bfloat16_where_they_are_stored_so_and_the_adapter_does_not(
    bfloat16_model: Path,
) -> None:
    import torch

    backend = open_backend(recipe(**LORA), bfloat16_model)
    module = worker_of(backend).engine.module
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in module.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}  # the rotary frequencies
    backend.close()


def test_weights_stored_in_float32_stay_so(tiny_model: Path) -> None:
    import torch

    backend = open_backend(recipe(**LORA), tiny_model)
    assert {p.dtype for p in worker_of(backend).engine.module.parameters()} == {torch.float32}
    backend.close()


def test_an_adapter_on_a_bfloat16_base_learns_as_on_the_same_base_in_float32(
    bfloat16_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_proxy.trainer.backend import engine

    rows = random_rows([9, 14, 5])
    found = []
    for in_bfloat16 in (True, False):
        monkeypatch.setattr(engine, "stored_in_bfloat16", lambda model, answer=in_bfloat16: answer)
        backend = open_backend(recipe(**LORA), bfloat16_model)
        before = backend.logprobs(rows)
        norms = [backend.update(rows)["grad_norm"] for _ in range(3)]
        found.append((before, norms, backend.logprobs(rows)))
        weights = tmp_path / str(in_bfloat16)
        weights.mkdir()
        backend.export(weights, bfloat16_model)
        kept = {info.dtype for file in read_layout(weights).values() for info in file.values()}
        assert kept == {"BF16"}
        backend.close()
    for half, whole in zip(*found, strict=True):
        np.testing.assert_allclose(half, whole, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[0][0], found[0][2], atol=1e-2)


def test_a_state_with_a_bfloat16_base_goes_on_where_it_was(bfloat16_model: Path, tmp_path: Path) -> None:
    rows = random_rows([9, 14, 5])
    first = open_backend(recipe(**LORA), bfloat16_model)
    first.update(rows)
    first.save_state(tmp_path)
    expected = first.update(rows), first.logprobs(rows)
    first.close()
    second = open_backend(recipe(**LORA), bfloat16_model)
    second.load_state(tmp_path)
    assert second.update(rows) == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(second.logprobs(rows), expected[1], atol=1e-6)
    second.close()


def test_softmax_in_pieces_gives_the_values_and_gradients_of_softmax_at_once() -> None:
    import torch

    from lightning_proxy.trainer.backend import engine

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, 11, generator=generator)
    labels = torch.randint(0, 11, (23,), generator=generator)
    results = []
    codes = torch.zeros_like(labels)
    for at_once in (1 << 28, 5 * 11, 1):  # all, five tokens, one
        given = logits.clone().requires_grad_()
        logprobs, entropy = (
            engine.piecewise(partial(function, (PLAIN,)), given, labels, codes, at_once=at_once)
            for function in (engine._logprobs, engine._entropy)
        )
        (logprobs.sin() + entropy.cos()).sum().backward()  # type: ignore[no-untyped-call]
        results.append([logprobs.detach(), entropy.detach(), given.grad])
    expected = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(results[0][0], expected)
    for pieces in results[1:]:
        torch.testing.assert_close(pieces, results[0])


@pytest.mark.parametrize("lora", [{}, LORA])
def test_weights_are_exported_file_by_file_and_not_all_held_in_main_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    from lightning_proxy.trainer.backend import worker

    whole = write_tiny_model(tmp_path / "whole")
    base, new = tmp_path / "base", tmp_path / "new"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(base, max_shard_size="20KB")
    new.mkdir()
    layout = read_layout(base)
    assert len(layout) > 2
    backend = open_backend(recipe(**lora), base)
    own = worker_of(backend)
    read: list[str] = []
    written_after: dict[str, int] = {}
    source, save = own._merged_weights if lora else own.engine.get_per_tensor_param, worker._save

    def watched(*given: Any, **options: Any) -> Any:
        made = source(*given, **options)
        return noting(made) if lora else (noting(made[0]), made[1])

    def noting(weights: Any) -> Any:
        for name, weight in weights:
            read.append(name)
            yield name, weight

    def noted(tensors: Any, path: Path) -> None:
        written_after[path.name] = len(read)
        save(tensors, path)

    monkeypatch.setattr(
        *((own, "_merged_weights") if lora else (own.engine, "get_per_tensor_param")), watched
    )
    monkeypatch.setattr(worker, "_save", noted)
    backend.export(new, base)
    backend.close()
    assert read_layout(new) == layout
    assert min(written_after.values()) < len(read) / 2


def test_an_export_that_lacks_weights_of_the_base_says_which(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, other = write_tiny_model(tmp_path / "base"), tmp_path / "other"
    other.mkdir()
    tensors = load_file(base / "model.safetensors")
    backend = open_backend(recipe(), base)
    tensors["model.extra.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(TrainingError, match=r"has no model\.extra\.weight, as .*other has"):
        backend.export(tmp_path, other)
    backend.close()


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(0.7), Sampling(0.9, top_k=5, top_p=0.9)])
def test_logits_are_never_copied_whole_whatever_the_rows_lengths_and_the_sampling(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from lightning_proxy.trainer.backend import engine

    made: list[int] = []

    class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            old = {each.untyped_storage()._cdata for each in args if isinstance(each, torch.Tensor)}
            if type(result) is torch.Tensor and result.untyped_storage()._cdata not in old:
                made.append(result.numel())
            return result

    def watched(self: Any, *, output: Any, **rest: Any) -> Any:
        sizes.append(output.logits.numel())
        with Allocations():  # type: ignore[no-untyped-call]
            return original(self, output=output, **rest)

    sizes: list[int] = []
    original = engine.UpdateEngine.prepare_model_outputs
    monkeypatch.setattr(engine.UpdateEngine, "prepare_model_outputs", watched)
    monkeypatch.setattr(engine, "_AT_ONCE", 1000)
    rows = random_rows([30, 17, 9], samplings=(PLAIN, sampling))
    backend = open_backend(recipe(micro_batch_tokens=1000), tiny_model)
    backend.update(rows)
    backend.close()
    assert len(sizes) == 1
    assert max(made) <= sizes[0] / 3


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_rows_without_padding_learn_what_padded_ones_learn(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, entropy_coef: float
) -> None:
    """What flash-attention is given; here PyTorch's own attention takes it."""
    from lightning_proxy.trainer.backend import verl_backend, worker

    monkeypatch.setattr(worker, "_PACKED_ATTENTION", "sdpa")
    rows = random_rows([30, 17, 9, 25], samplings=(PLAIN, Sampling(0.7), Sampling(0.9, top_k=5)))
    settings = recipe(learning_rate=1e-3, micro_batch_tokens=64, entropy_coef=entropy_coef)
    own, found = verl_backend.worker_config, []
    for packed in (False, True):
        monkeypatch.setattr(
            verl_backend, "worker_config", lambda *given, packed=packed: replace(own(*given), packed=packed)
        )
        backend = open_backend(settings, tiny_model)
        before = backend.logprobs(rows)
        metrics = [backend.update(rows) for _ in range(3)]
        found.append((before, metrics, backend.logprobs(rows)))
        backend.close()
    (before, metrics, after), (packed_before, packed_metrics, packed_after) = found
    np.testing.assert_allclose(packed_before, before, atol=1e-5)
    assert packed_metrics[0] == pytest.approx(metrics[0], rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(packed_after, after, atol=1e-3)


def test_flash_attention_is_not_used_unless_asked_for_and_refused_where_it_is_not_installed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from lightning_proxy.trainer.backend import verl_backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not verl_backend.worker_config(recipe(device="cuda"), tiny_model).packed
    assert verl_backend.worker_config(recipe(device="cuda", flash_attention=True), tiny_model).packed
    with pytest.raises(TrainingError, match="flash_attention = true needs a GPU"):
        verl_backend.worker_config(recipe(flash_attention=True), tiny_model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="flash_attention = true, but flash_attn is not installed"):
        verl_backend.worker_config(recipe(device="cuda", flash_attention=True), tiny_model)


@pytest.mark.timeout(900)  # it imports verl
def test_what_compares_a_gpu_with_the_cpu_finds_the_cpu_equal_to_itself() -> None:
    words = [sys.executable, "-m", "benchmarks.cuda_update", "agree", "--devices", "cpu"]
    found = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=800)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [line for line in found.stdout.splitlines() if line.startswith("cpu, float32")]
    assert len(lines) == 2
    assert all("before 0.0e+00, after 0.0e+00; weights 0.0e+00 of at most" in line for line in lines)


@pytest.mark.parametrize(
    ("count", "room", "expected"),
    [
        (4, [8, 4], [4]),
        (8, [0, 8], [8]),  # the head node lends its GPUs to vLLM
        (16, [8, 0, 8], [8, 8]),
        (12, [8, 8], [6, 6]),
        (6, [2, 2, 2], [2, 2, 2]),
    ],
)
def test_workers_go_to_as_few_nodes_as_hold_them_the_same_number_on_each(
    count: int, room: list[int], expected: list[int]
) -> None:
    from lightning_proxy.trainer.backend.on_ray import workers_per_node

    assert workers_per_node(count, room, "GPU") == expected


@pytest.mark.parametrize(("count", "room"), [(16, [8]), (9, [8, 8]), (4, []), (10, [8, 2])])
def test_more_workers_than_the_nodes_hold_evenly_are_refused(count: int, room: list[int]) -> None:
    from lightning_proxy.trainer.backend.on_ray import workers_per_node

    with pytest.raises(TrainingError, match=rf"workers = {count} cannot be spread evenly .* GPUs"):
        workers_per_node(count, room, "GPU")


@pytest.mark.parametrize(("device", "world"), [("cpu", 1), ("cuda", 1), ("cuda", 16)])
def test_workers_wait_for_one_that_reads_or_writes_a_large_model(
    device: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's own limit is ten minutes."""
    from datetime import timedelta

    import torch.distributed as dist

    from lightning_proxy.trainer.backend import worker

    asked: dict[str, object] = {}
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **rest: asked.update(rest, backend=backend)
    )
    worker._join_process_group(device)
    assert asked["timeout"] == timedelta(hours=2)
    assert asked["backend"] == ("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
