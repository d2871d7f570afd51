"""The gradient of a mini-batch's loss, as the update engine computes it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_proxy.trainer.backend import Backend
from lightning_proxy.trainer.batches import Rows


def worker_of(backend: Backend) -> Any:
    return backend._workers._worker  # type: ignore[attr-defined]


def gradients(backend: Backend, rows: Rows) -> tuple[dict[str, float], dict[str, np.ndarray[Any, Any]]]:
    worker = worker_of(backend)
    with worker.engine.train_mode():
        metrics = worker.accumulate(rows)
        found = {
            name: parameter.grad.full_tensor().numpy().copy()
            for name, parameter in worker.engine.module.named_parameters()
        }
    return metrics, found


def assert_same_gradients(some: dict[str, Any], others: dict[str, Any]) -> None:
    assert some.keys() == others.keys()
    for name in some:
        np.testing.assert_allclose(np.asarray(some[name]), np.asarray(others[name]), atol=1e-5, err_msg=name)
