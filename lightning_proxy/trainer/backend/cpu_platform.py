"""verl on a CPU: a platform for it, registered at verl's own extension point.

Importing this module is enough, and it must come before any other import of verl: verl asks for the
platform while its modules load.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

# `import verl` runs before anything can be registered, and would look for accelerators with
# external commands. With the name set it asks for this platform, at its first use, further down.
if not torch.cuda.is_available():
    os.environ["VERL_PLATFORM"] = "cpu"

from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform


class _CpuDevice(ModuleType):
    """``torch.cpu`` with the functions that verl expects of ``torch.<device>``."""

    def __init__(self) -> None:
        super().__init__("lightning_proxy_cpu_device")
        self.__dict__.update({name: value for name, value in vars(torch.cpu).items() if name[:2] != "__"})

    @staticmethod
    def memory_allocated(device: object = None) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

    @staticmethod
    def mem_get_info(device: object = None) -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    @staticmethod
    def empty_cache() -> None:
        return None

    @staticmethod
    def set_device(device: object) -> None:
        return None

    get_rng_state = staticmethod(torch.get_rng_state)
    set_rng_state = staticmethod(torch.set_rng_state)
    manual_seed = staticmethod(torch.manual_seed)
    manual_seed_all = staticmethod(torch.manual_seed)


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):  # type: ignore[misc]
    """The CPU as verl's accelerator: gloo, no streams, no device memory."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CpuDevice()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


if os.environ.get("VERL_PLATFORM") == "cpu":
    set_platform(CpuPlatform())
