"""What a pass learns by: one algorithm, one file, one class, chosen by ``[train] algorithm`` here.

Drain, lease, mini-batches, optimiser, export, probe, promotion are the same for all of them (``steps``).
``base`` says what an algorithm is asked for; ``rl``, ``sft`` and ``dpo`` are the three. ``candidates`` is
what the latter two share: what was drained, as far as likelihood can be learnt from it; ``demonstrations``
makes training tokens of what somebody said would have been right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_proxy.trainer.algorithms.base import Algorithm, Bench
from lightning_proxy.trainer.algorithms.dpo import Dpo
from lightning_proxy.trainer.algorithms.rl import Rl
from lightning_proxy.trainer.algorithms.sft import Sft


def algorithm_of(bench: Bench) -> Algorithm[Any]:
    """The algorithm that the settings name."""
    algorithms: dict[str, Callable[[Bench], Algorithm[Any]]] = {"rl": Rl, "sft": Sft, "dpo": Dpo}
    return algorithms[bench.settings.train.algorithm](bench)
