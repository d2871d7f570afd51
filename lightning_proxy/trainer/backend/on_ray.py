"""Several workers of the update, each a Ray actor; on CPUs as on GPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import lightning_proxy.trainer.backend.cpu_platform  # noqa: F401  isort: skip  must precede verl

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from lightning_proxy.errors import LightningError, TrainingError
from lightning_proxy.trainer.backend.worker import UpdateWorker, WorkerConfig

_PATIENCE_S = 300.0  # for GPUs that another job, or the last pass, is about to leave


class OnRay:
    """As many workers as are asked for. Opening fails whole: nothing of it stays on the cluster."""

    def __init__(self, config: WorkerConfig, count: int) -> None:
        self._places: list[PlacementGroup] = []
        self._started = not ray.is_initialized()
        if self._started:
            joins = "RAY_ADDRESS" in os.environ  # a cluster that runs already: its resources are its own
            ray.init(
                num_cpus=None if joins or config.device == "cuda" else count,
                include_dashboard=False,
                log_to_driver=False,  # from a thread, past stdout_to_stderr
                logging_level="warning",
            )
        try:
            self._group = self._open(config, count)
        except BaseException:
            self.close()  # the next pass of this process would find Ray started, and the GPUs taken
            raise

    def call(self, method: str, *arguments: object) -> Any:
        """Run the method on every worker; the first one's answer.

        ``TrainingError`` where a worker died or failed; what it raised of our own goes through.
        """
        try:
            return getattr(self._group, method)(*arguments)[0]
        except LightningError:  # Ray's errors for what a worker raised are of that class as well
            raise
        except ray.exceptions.RayError as error:
            raise TrainingError(f"{method} failed on a worker of the update: {error}") from error

    def close(self) -> None:
        """End the workers and give back their places, and Ray where we started it."""
        places, self._places = self._places, []
        try:
            for place in places:
                remove_placement_group(place)  # ends what runs there
        finally:
            if self._started:
                ray.shutdown()

    def _open(self, config: WorkerConfig, count: int) -> Any:
        kind = "GPU" if config.device == "cuda" else "CPU"
        self._reserve(count, kind)
        layout = [place.bundle_count for place in self._places]
        pool = RayResourcePool(process_on_nodes=layout, use_gpu=kind == "GPU", max_colocate_count=1)
        pool.pgs = self._places  # verl would wait for its own without end
        group = RayWorkerGroup(
            resource_pool=pool,
            ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(UpdateWorker), config=config),
            device_name=config.device,
        )
        try:
            ray.get([worker.__ray_ready__.remote() for worker in group.workers])
        except ray.exceptions.RayError as error:
            raise TrainingError(f"[train] workers = {count}: one did not start: {error}") from error
        return group

    def _reserve(self, count: int, kind: str) -> None:
        """A place for each worker: where there is room now, else where there may be soon."""
        room = _room(kind)
        try:
            layout = workers_per_node(count, _free(kind), kind)
        except TrainingError:
            layout = workers_per_node(count, room, kind)
        bundle = {"CPU": 1.0, kind: 1.0}
        self._places = [placement_group([bundle] * each, strategy="STRICT_PACK") for each in layout]
        until = time.monotonic() + _PATIENCE_S
        if not all(place.wait(max(0.0, until - time.monotonic())) for place in self._places):
            raise TrainingError(
                f"[train] workers = {count} want {layout} {kind}s, each number on one node of Ray, and a CPU "
                f"with each; after {_PATIENCE_S:g} s {_free(kind)} were free, of {room} that the nodes have. "
                "Another job holds them (`ray status`), or a pass that has not ended"
            )


def workers_per_node(count: int, room: Sequence[int], kind: str) -> list[int]:
    """As few nodes of the cluster as hold the workers, the same number on each: verl wants that.

    ``room``: how many each node could hold, one per ``kind`` (GPU, CPU). ``TrainingError`` where it
    cannot be done.
    """
    largest_first = sorted(room, reverse=True)
    for nodes, smallest in enumerate(largest_first, start=1):
        if count % nodes == 0 and smallest >= count // nodes:
            return [count // nodes] * nodes
    raise TrainingError(
        f"[train] workers = {count} cannot be spread evenly over Ray's nodes, which have {largest_first} "
        f"{kind}s"
    )


def _room(kind: str) -> list[int]:
    """How many each node has."""
    return [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]


def _free(kind: str) -> list[int]:
    """How many each node has that nobody holds; nodes may be missing for a moment after Ray's start."""
    free = ray._private.state.available_resources_per_node()  # verl asks there too
    return [int(resources.get(kind, 0)) for resources in free.values()]
