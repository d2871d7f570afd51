"""How a GPU's memory is split between vLLM and the update, and what else they take: from a model's shape.

    python -m benchmarks.memory Qwen/Qwen3-8B --lora-rank 32 --micro-batch-tokens 8192 --utilization 0.5

Weights, gradients, optimiser and KV cache are exact. What the update gathers, its activations and vLLM's own
needs are estimates, made to lie above what was measured (docs/full-size.md).
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

GIB = 1 << 30
CARD_GIB = 79.1  # what is left to programs of a card sold as 80 GB
SPARE_GIB = 4.0  # CUDA's own, and what the allocator cannot use, of two processes on one card
_ENGINE_OVERHEAD_GIB = 3.0  # vLLM's activations, CUDA graphs and workspace, at up to 8192 batched tokens
_PIECE_GIB = 1.0  # logits that go through a softmax at once, in float32


@dataclass(frozen=True, slots=True)
class Shape:
    """Values of a model's config.json, by the names that they have there."""

    model_type: str  # qwen2, qwen3, llama
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each linear map of one layer: q, k, v, o, gate, up, down."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return (
            (hidden, q),
            (hidden, kv),
            (hidden, kv),
            (q, hidden),
            (hidden, inner),
            (hidden, inner),
            (inner, hidden),
        )

    @property
    def layer_parameters(self) -> int:
        """Of one layer: its linear maps and norms, Qwen2's biases of q, k, v, Qwen3's norms of q, k."""
        q, k, v = (outputs for _, outputs in self.projections[:3])
        extra = {"qwen2": q + k + v, "qwen3": 2 * self.head_dim}.get(self.model_type, 0)
        return sum(inputs * outputs for inputs, outputs in self.projections) + 2 * self.hidden_size + extra

    @property
    def outer_parameters(self) -> int:
        """Embeddings, output head where it has weights of its own, and the last norm."""
        matrices = 1 if self.tie_word_embeddings else 2
        return matrices * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them; tied ones once."""
        return self.num_hidden_layers * self.layer_parameters + self.outer_parameters

    def adapter_parameters(self, rank: int) -> int:
        """Of a LoRA adapter of this rank on every linear map of every layer, as verl makes it."""
        return self.num_hidden_layers * rank * sum(map(sum, self.projections))

    @property
    def cache_bytes_per_token(self) -> int:
        """KV cache in bfloat16: a key and a value per layer and KV head."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * 2


# From the config.json of each repository on huggingface.co.
SHAPES = {
    "Qwen/Qwen3-4B-Instruct-2507": Shape("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen/Qwen3-8B": Shape("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "Qwen/Qwen3-14B": Shape("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
    "Qwen/Qwen3-32B": Shape("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False),
    "Qwen/Qwen2.5-32B-Instruct": Shape("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-Coder-7B-Instruct": Shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "meta-llama/Llama-3.2-3B-Instruct": Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "meta-llama/Llama-3.1-8B-Instruct": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}


def update_gib(shape: Shape, *, lora_rank: int, tokens: int, workers: int = 1) -> dict[str, float]:
    """Peak of the update on one GPU, in GiB, by what it is for.

    ``tokens``: of the largest micro-batch (``train.micro_batch_tokens``, or one longer row). With LoRA the
    base is in bfloat16 and frozen; without, weights, gradients and AdamW's two moments are float32, each
    sharded over the ``workers``.
    """
    trained = shape.adapter_parameters(lora_rank) if lora_rank else shape.parameters
    frozen = shape.parameters if lora_rank else 0
    outer = 2 * shape.outer_parameters  # gathered in bfloat16 for the whole step
    layers = 2 * 2 * shape.layer_parameters  # one in use, the next one being gathered
    # Gradients of embeddings and head before they are sharded, in bfloat16 and float32.
    reduced = 0 if lora_rank else 12 * shape.vocab_size * shape.hidden_size
    inputs = 2 * shape.num_hidden_layers * shape.hidden_size  # of each layer, bfloat16
    layer = 2 * (16 * shape.hidden_size + 6 * shape.intermediate_size)
    logits = 2 * 2 * shape.vocab_size  # and their gradient, bfloat16
    return {
        "frozen weights": 2 * frozen / workers / GIB,
        "trained weights": 4 * trained / workers / GIB,
        "gradients": 4 * trained / workers / GIB,
        "optimiser": 8 * trained / workers / GIB,
        "gathered": (outer + layers + reduced) / GIB,
        "layers' inputs": tokens * inputs / GIB,
        # Not at the same time: the head's forward and backward pass, a layer computed again for its own.
        "logits or layer": max(tokens * logits / GIB + 2 * _PIECE_GIB, tokens * layer / GIB),
    }


def load_gib(shape: Shape, *, lora_rank: int, workers: int = 1) -> float:
    """Peak on one GPU while the trainer's state is loaded, in GiB.

    What is trained, and its moments, are there twice; with LoRA the frozen base once.
    """
    trained = shape.adapter_parameters(lora_rank) if lora_rank else shape.parameters
    return ((2 * shape.parameters if lora_rank else 0) + 2 * 12 * trained) / workers / GIB


def engine_gib(shape: Shape, *, utilization: float, gpus: int = 1) -> dict[str, float]:
    """What vLLM takes of each of its ``gpus`` (tensor parallel), in GiB; what is left over is KV cache."""
    weights = 2 * shape.parameters / gpus / GIB
    return {
        "weights": weights,
        "overhead": _ENGINE_OVERHEAD_GIB,
        "KV cache": utilization * CARD_GIB - weights - _ENGINE_OVERHEAD_GIB,
    }


def cache_tokens(shape: Shape, *, utilization: float, gpus: int = 1) -> int:
    """Tokens that the KV cache holds, over all of vLLM's GPUs."""
    room = engine_gib(shape, utilization=utilization, gpus=gpus)["KV cache"] * GIB * gpus
    return int(room / shape.cache_bytes_per_token)


def host_gib(shape: Shape, *, workers_here: int = 1) -> float:
    """Main memory that the update takes of its first worker's host, in GiB: the whole model in float32.

    While it is read, with LoRA too. Where head and embeddings are tied, verl has each worker read it. An
    export holds the tensors of one file at a time.
    """
    return 4 * shape.parameters * (workers_here if shape.tie_word_embeddings else 1) / GIB


def versions_at_once(keep_versions: int) -> int:
    """On disk: the one that serves, those kept, the guard's best, and one being written."""
    return keep_versions + 3


def disk_gib(shape: Shape, *, lora_rank: int) -> float:
    """One version on disk: bfloat16 weights, and what is trained in float32 with its moments."""
    trained = shape.adapter_parameters(lora_rank) if lora_rank else shape.parameters
    return (2 * shape.parameters + 12 * trained) / GIB


def split(given: argparse.Namespace) -> list[str]:
    """The split in words, as the files of examples/full_size have it."""
    shape = SHAPES[given.model]
    rank, workers = given.lora_rank, given.workers
    update = update_gib(shape, lora_rank=rank, tokens=given.micro_batch_tokens, workers=workers)
    load = load_gib(shape, lora_rank=rank, workers=workers)
    engine = engine_gib(shape, utilization=given.utilization, gpus=given.engine_gpus)
    cached = cache_tokens(shape, utilization=given.utilization, gpus=given.engine_gpus)
    most = max(sum(update.values()), load) + (0 if given.apart else sum(engine.values()))
    host = host_gib(shape, workers_here=min(workers, given.workers_per_host))
    disk, most_versions = disk_gib(shape, lora_rank=rank), versions_at_once(given.keep_versions)
    lines = [
        f"{given.model}, {shape.parameters / 1e9:.2f} billion parameters; GiB per GPU, of {CARD_GIB}:",
        f"  vLLM    {sum(engine.values()):5.1f}  {_listed(engine)} ({cached:,} tokens)",
        f"  update  {sum(update.values()):5.1f}  {_listed(update)}",
        f"  loading {load:5.1f}  the trainer's state, before the update",
        f"  at once {most:5.1f}  at most, {'of the update alone' if given.apart else 'of both'}",
        f"  host    {host:5.1f}  of main memory, of the first worker's host, while the model is read",
        f"  disk    {disk:5.0f}  a version, {most_versions * disk:.0f} at once: {most_versions} of them",
    ]
    return [part for line in lines for part in textwrap.wrap(line, 104, subsequent_indent=" " * 17)]


def _listed(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {size:.1f}" for name, size in sizes.items() if size)


def main(words: Sequence[str] | None = None) -> None:
    """Print the split."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--lora-rank", type=int, default=0, help="0: full weights")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=1, help="GPUs of the update")
    parser.add_argument("--workers-per-host", type=int, default=8, help="most of them")
    parser.add_argument("--keep-versions", type=int, default=1, help="train.keep_versions")
    parser.add_argument("--utilization", type=float, default=0.9, help="vLLM's --gpu-memory-utilization")
    parser.add_argument("--engine-gpus", type=int, default=1, help="vLLM's --tensor-parallel-size")
    parser.add_argument("--apart", action="store_true", help="vLLM and the update are not on the same GPU")
    print("\n".join(split(parser.parse_args(words))))


if __name__ == "__main__":
    main()
