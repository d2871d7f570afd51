"""The update on CUDA: whether it is the CPU's, and what a full-size model takes. Weights are random.

    python -m benchmarks.cuda_update agree
    python -m benchmarks.cuda_update size Qwen/Qwen3-8B --lora-rank 32

``agree`` makes the same updates of a small model on both devices and prints by how much they differ. ``size``
prints time and peak memory of each step of an update, beside what ``memory`` expects.
Random weights take the time and memory that trained ones take. It needs the extra `train` and one GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import GIB, SHAPES, Shape, update_gib
from lightning_proxy.config.train import TrainSettings
from lightning_proxy.trainer.backend import open_backend
from lightning_proxy.trainer.batches import Rows
from lightning_proxy.trainer.sampling import PLAIN, Sampling

SMALL = Shape("qwen3", 256, 768, 4, 8, 4, 32, 4096, False)
_AGREE = {"adam_eps": 1e-5, "micro_batch_tokens": 512, "lora_alpha": 16}
_LEARNING_RATE = {0: 1e-4, 8: 1e-3}  # by LoRA rank
_UPDATES = 3


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    agree = commands.add_parser("agree")
    agree.add_argument("--devices", nargs="+", default=["cpu", "cuda"])
    one = commands.add_parser("device")  # what `agree` runs for each device
    one.add_argument("device")
    one.add_argument("directory", type=Path)
    size = commands.add_parser("size")
    size.add_argument("model", choices=sorted(SHAPES))
    size.add_argument("--lora-rank", type=int, default=0)
    size.add_argument("--row-tokens", type=int, default=4096)
    size.add_argument("--rows", type=int, default=8)
    size.add_argument("--mixed", action="store_true", help="lengths from a quarter of --row-tokens up to it")
    size.add_argument("--temperature", type=float, default=1.0, help="that the tokens were sampled at")
    size.add_argument("--longest", type=int, default=0, help="tokens of one more row, updated alone")
    size.add_argument("--micro-batch-tokens", type=int, default=8192)
    size.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.command == "agree":
        compare_devices(given.devices)
    elif given.command == "device":
        update_small_models(given.device, given.directory)
    else:
        with tempfile.TemporaryDirectory() as directory:
            measure(given, Path(directory))


def random_rows(lengths: Sequence[int], vocabulary: int, *, seed: int = 0, temperature: float = 1.0) -> Rows:
    """Rows of random tokens, the second half of each trained, with random advantages."""
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    mask = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    advantages = np.repeat(generator.normal(size=len(lengths)), lengths)
    zeros = np.zeros(total, dtype=np.float32)
    return Rows(
        tokens=generator.integers(0, vocabulary, total),
        mask=mask,
        logprobs=zeros,
        advantages=np.where(mask, advantages, 0).astype(np.float32),
        weights=(mask / mask.sum()).astype(np.float32),
        sampling=mask.astype(np.int16),
        raw=np.zeros(total, dtype=np.bool_),
        importance=mask.astype(np.float32),
        reference=zeros,
        versions=np.zeros(total, dtype=np.int64),
        offsets=offsets,
        rollouts=tuple(map(str, range(len(lengths)))),
        samplings=(PLAIN, Sampling(temperature)),
    )


def write_random_model(shape: Shape, directory: Path, *, dtype: str, device: str) -> Path:
    """A model of this shape with random weights, in Hugging Face layout; returns its directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    fields = dataclasses.asdict(shape)
    fields |= {"max_position_embeddings": 32768, "dtype": dtype, "pad_token_id": None}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return directory


def compare_devices(devices: Sequence[str]) -> None:
    """The same updates on each device, and the differences from the first one's in float32."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for dtype in ("float32", "bfloat16"):
            write_random_model(SMALL, directory / dtype, dtype=dtype, device="cpu")
        command = [sys.executable, "-m", "benchmarks.cuda_update", "device"]
        running = []
        for device in devices:
            hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
            own = directory / device
            running.append(subprocess.Popen([*command, device, str(own)], env=os.environ | hidden))
        if any(process.wait() for process in running):
            raise SystemExit("a device failed")
        for device in devices:
            for file in sorted((directory / device).glob("*.npz")):
                rank = file.stem.split("-")[1]
                first = np.load(directory / devices[0] / f"float32-{rank}.npz")
                report(f"{device}, {file.stem}", np.load(file), first)


def report(what: str, found: Any, expected: Any) -> None:
    """One line: how far logprobs before and after and the updates of the weights are from those expected."""
    moved, should = found["moved"], expected["moved"]
    print(
        f"{what:28} logprobs before {np.abs(found['before'] - expected['before']).max():.1e}, "
        f"after {np.abs(found['after'] - expected['after']).max():.1e}; weights "
        f"{np.abs(moved - should).max():.1e} of at most {np.abs(should).max():.1e}, "
        f"relative {np.linalg.norm(moved - should) / np.linalg.norm(should):.1e}; "
        f"grad norm {found['norms'][0]:.6f} for {expected['norms'][0]:.6f}"
    )


def update_small_models(device: str, directory: Path) -> None:
    """Update full weights and an adapter, in each precision, and keep what came out."""
    rows = random_rows([200, 150, 90, 256, 31], SMALL.vocab_size)
    directory.mkdir()
    for dtype in ("float32", "bfloat16") if device == "cuda" else ("float32",):
        for rank, rate in _LEARNING_RATE.items():
            how = {"device": device, "dtype": dtype, "lora_rank": rank, "learning_rate": rate}
            model = directory.parent / ("bfloat16" if rank else "float32")
            backend = open_backend(TrainSettings.model_validate(_AGREE | how), model)
            before = backend.logprobs(rows)
            started = exported(backend, model, directory / f"start-{dtype}-{rank}", rank)
            fresh = rows.with_logprobs(before)
            norms = [backend.update(fresh)["grad_norm"] for _ in range(_UPDATES)]
            moved = exported(backend, model, directory / f"{dtype}-{rank}", rank) - started
            np.savez(
                directory / f"{dtype}-{rank}.npz",
                before=before, after=backend.logprobs(rows), moved=moved, norms=np.array(norms),
            )  # fmt: skip
            backend.close()


def exported(backend: Any, model: Path, directory: Path, rank: int) -> Any:
    """The weights that are trained, end to end, as they are exported."""
    from safetensors.numpy import load_file

    directory.mkdir(exist_ok=True)
    (backend.export_adapter if rank else backend.export)(directory, model)
    files = sorted(directory.glob("*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    if not rank:
        return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])
    # What the adapter adds: its factors are not unique, and B begins at 0.
    downs = [name for name in sorted(tensors) if ".lora_A." in name]
    return np.concatenate([(tensors[n.replace("_A.", "_B.")] @ tensors[n]).ravel() for n in downs])


@contextmanager
def step(name: str, tokens: int = 0) -> Iterator[None]:
    """Print how long the block took and its peak memory; its failure is printed, and the next one tried."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    line: dict[str, Any] = {"step": name}
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what follows is still worth measuring
        line["failed"] = repr(error)[:300]
    if cuda:
        torch.cuda.synchronize()
    line["seconds"] = round(time.perf_counter() - started, 2)
    if tokens:
        line["tokens_per_second"] = round(tokens / line["seconds"])
    if cuda:
        line["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        line["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        line["now_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
    print(json.dumps(line), flush=True)


def measure(given: argparse.Namespace, directory: Path) -> None:
    """Each step of a pass on a model of this shape."""
    shape = SHAPES[given.model]
    rank = given.lora_rank
    largest = max(given.micro_batch_tokens, given.row_tokens)
    expected = update_gib(shape, lora_rank=rank, tokens=largest)
    print(
        {name: round(value, 1) for name, value in expected.items()}, "sum", round(sum(expected.values()), 1)
    )
    settings = TrainSettings(
        device=given.device, dtype="bfloat16", lora_rank=rank, learning_rate=1e-5,
        micro_batch_tokens=given.micro_batch_tokens, adam_eps=1e-8,
    )  # fmt: skip
    model = directory / "model"
    with step("write a random model"):
        write_random_model(shape, model, dtype="bfloat16", device=given.device)
    with step("open"):
        backend = open_backend(settings, model)
    shortest = given.row_tokens // 4 if given.mixed else given.row_tokens
    lengths = np.linspace(given.row_tokens, shortest, given.rows).astype(int).tolist()
    rows = random_rows(lengths, shape.vocab_size, temperature=given.temperature)
    tokens = len(rows.tokens)
    with step("logprobs", tokens):
        rows = rows.with_logprobs(backend.logprobs(rows))
    for number in (1, 2, 3):
        with step(f"update {number}", tokens):
            metrics = backend.update(rows)
    print({name: round(value, 6) for name, value in metrics.items()})
    if given.longest:
        alone = random_rows([given.longest], shape.vocab_size, temperature=given.temperature)
        expected = update_gib(shape, lora_rank=rank, tokens=given.longest)
        with step(
            f"update one row of {given.longest}, {sum(expected.values()):.1f} GiB expected", given.longest
        ):
            backend.update(alone)
    for name in ("weights", "adapter", "state"):
        (directory / name).mkdir()
    with step("export the weights"):
        backend.export(directory / "weights", model)
    if rank:
        with step("export the adapter"):
            backend.export_adapter(directory / "adapter", model)
    with step("save the state"):
        backend.save_state(directory / "state")
    with step("load the state"):
        backend.load_state(directory / "state")
    sizes = {
        path.name: round(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / GIB, 2)
        for path in sorted(directory.iterdir())
    }
    print("on disk, GiB:", sizes)


if __name__ == "__main__":
    main()
