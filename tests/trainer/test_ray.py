"""The same update on two Ray workers as in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightning_proxy.errors import CheckpointInvalid, TrainingError
from lightning_proxy.trainer.backend import open_backend
from lightning_proxy.trainer.batches import Rows
from lightning_proxy.trainer.checkpoint import read_layout
from tests.conftest import wait_until
from tests.trainer.conftest import recipe
from tests.trainer.rows import random_rows

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore"),
]  # verl, torch and ray warn about themselves


def odd_rows() -> Rows:
    """An odd number of rows of different lengths, the last of them long: shares cannot be equal."""
    return random_rows([*np.random.default_rng(0).integers(4, 20, 8), 60])


@pytest.mark.timeout(900)  # three processes import verl: a minute alone, more on a busy machine
def test_two_ray_workers_make_the_update_that_one_makes_in_process(tiny_model: Path, tmp_path: Path) -> None:
    assert_workers_agree(tiny_model, tmp_path, algorithm="rl")


@pytest.mark.timeout(900)
def test_so_they_do_with_the_likelihood_that_sft_and_dpo_learn_by(tiny_model: Path, tmp_path: Path) -> None:
    assert_workers_agree(tiny_model, tmp_path, algorithm="dpo")


def assert_workers_agree(tiny_model: Path, tmp_path: Path, algorithm: str) -> None:
    rows = odd_rows()
    logprobs, metrics = {}, {}
    for workers in (2, 1):
        settings = recipe(workers=workers, learning_rate=1e-3, micro_batch_tokens=70, algorithm=algorithm)
        backend = open_backend(settings, tiny_model)
        try:
            before = backend.logprobs(rows)
            steps = [backend.update(rows) for _ in range(3)]
            if workers == 2:
                directory = tmp_path / "weights"
                directory.mkdir()
                backend.export(directory, tiny_model)
                assert read_layout(directory).keys() == read_layout(tiny_model).keys()
                state = tmp_path / "state"
                state.mkdir()
                backend.save_state(state)
                backend.update(rows)
                backend.load_state(state)
            logprobs[workers], metrics[workers] = (before, backend.logprobs(rows)), steps
        finally:
            backend.close()
    np.testing.assert_allclose(logprobs[2][0], logprobs[1][0], atol=1e-5)
    np.testing.assert_allclose(logprobs[2][1], logprobs[1][1], atol=1e-3)
    for two, one in zip(metrics[2], metrics[1], strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


@pytest.mark.timeout(900)
def test_workers_join_a_cluster_that_runs_already_and_spread_over_its_nodes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        backend = open_backend(recipe(workers=2), tiny_model)
        try:
            busy = [node for node in ray.nodes() if node["Alive"]]
            assert sorted(node["Resources"].get("CPU", 0) for node in busy) == [1, 1]
            # One worker on each; Ray's own view of it follows a moment later.
            wait_until(lambda: ray.available_resources().get("CPU", 0) == 0)
            assert np.isfinite(backend.update(odd_rows())["grad_norm"])
            backend.export(tmp_path, tiny_model)
            assert read_layout(tmp_path).keys() == read_layout(tiny_model).keys()
        finally:
            backend.close()
    finally:
        cluster.shutdown()


@pytest.fixture
def small_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster that runs already, of one node with two CPUs; its address is in the environment."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.timeout(900)
def test_a_cluster_that_is_too_small_is_refused_and_left(small_cluster: str, tiny_model: Path) -> None:
    import ray

    with pytest.raises(TrainingError, match=r"workers = 3 cannot be spread evenly"):
        open_backend(recipe(workers=3), tiny_model)
    assert not ray.is_initialized()


@pytest.mark.timeout(900)
def test_a_busy_cluster_is_waited_for_no_longer_than_said_and_nothing_stays_reserved(
    small_cluster: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from lightning_proxy.trainer.backend import on_ray

    monkeypatch.setattr(on_ray, "_PATIENCE_S", 2.0)
    ray.init(log_to_driver=False)  # by somebody else in this process: it stays
    try:
        taken = ray.util.placement_group([{"CPU": 1}])
        assert taken.wait(60)
        with pytest.raises(TrainingError, match=r"want \[2\] CPUs.*\[1\] were free, of \[2\]"):
            open_backend(recipe(workers=2), tiny_model)
        assert ray.is_initialized()
        ray.util.remove_placement_group(taken)
        again = ray.util.placement_group([{"CPU": 1}, {"CPU": 1}])
        assert again.wait(60)
    finally:
        ray.shutdown()


@pytest.mark.timeout(900)
def test_a_worker_that_cannot_start_fails_the_pass_and_leaves_the_cluster_as_it_was(
    small_cluster: str, tiny_model: Path, tmp_path: Path
) -> None:
    import ray

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny_model / "config.json").read_text())  # and no weights
    with pytest.raises(TrainingError, match=r"(?s)workers = 2: one did not start.*broken"):
        open_backend(recipe(workers=2), broken)
    assert not ray.is_initialized()
    ray.init(log_to_driver=False)
    try:
        assert ray.util.placement_group([{"CPU": 1}, {"CPU": 1}]).wait(60)
    finally:
        ray.shutdown()


@pytest.mark.timeout(900)
def test_a_worker_that_dies_between_two_updates_is_a_failed_pass_and_no_more(
    small_cluster: str, tiny_model: Path
) -> None:
    import ray

    backend = open_backend(recipe(workers=2), tiny_model)
    try:
        ray.kill(backend._workers._group.workers[1])  # type: ignore[attr-defined]
        with pytest.raises(TrainingError, match=r"logprobs failed on a worker of the update: .*died"):
            backend.logprobs(odd_rows())
    finally:
        backend.close()
    assert not ray.is_initialized()


def test_what_a_worker_raises_on_purpose_keeps_its_class() -> None:
    import ray

    from lightning_proxy.trainer.backend.on_ray import OnRay

    class Workers:
        def __init__(self, cause: Exception) -> None:
            self._error = ray.exceptions.RayTaskError("update", "the traceback", cause).as_instanceof_cause()

        def update(self) -> None:
            raise self._error

    def call(cause: Exception) -> None:
        failing = OnRay.__new__(OnRay)
        failing._group = Workers(cause)
        failing.call("update")

    with pytest.raises(CheckpointInvalid):
        call(CheckpointInvalid("not finite"))
    with pytest.raises(TrainingError, match=r"(?s)update failed on a worker.*the traceback"):
        call(RuntimeError("CUDA out of memory"))
