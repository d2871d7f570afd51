"""The directory of an experiment: a copy of the model, a configuration, and the proxy that serves them."""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_proxy.client import ProxyClient
from lightning_proxy.config import load_settings
from lightning_proxy.errors import LightningError
from lightning_proxy.experiment.processes import Children, ExperimentFailed

START_TIMEOUT_S = 600.0
_MARKER = "this-is-a-lightning-demo"  # as in directories that were made when the demo was the only one

Say = Callable[[str], None]


def prepare(workdir: Path, model: Path) -> Path:
    """An empty directory with a copy of the model in it; what an earlier experiment left there is removed.

    ExperimentFailed if something else is in it, or the model is missing.
    """
    workdir = workdir.resolve()
    if not (model / "model.safetensors").is_file():
        raise ExperimentFailed(
            f"there is no model in {model}: it comes with the repository, and can be built again"
        )
    if workdir.exists() and any(workdir.iterdir()):
        if not (workdir / _MARKER).exists():
            raise ExperimentFailed(
                f"{workdir} holds something that no experiment made: name an empty directory, or a new one"
            )
        shutil.rmtree(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / _MARKER).touch()
    shutil.copytree(model, workdir / "model")
    return workdir


def write_config(workdir: Path, settings: Mapping[str, Any], *, policy: str, port: int | None = None) -> Path:
    """A lightning.toml for two cores and a tiny model, on a free port unless one is given.

    ``settings`` has further ones, by table; they win.
    """
    import tomli_w

    whole = _defaults(workdir, policy, port or free_port())
    for name, value in settings.items():
        whole[name] = {**whole.get(name, {}), **value} if isinstance(value, Mapping) else value
    path = workdir / "lightning.toml"
    path.write_text(tomli_w.dumps(whole), encoding="utf-8")
    return path


def _defaults(workdir: Path, policy: str, port: int) -> dict[str, Any]:
    return {
        "proxy": {"port": port},
        "store": {"db": str(workdir / "lightning.db")},
        "policy": {"name": policy, "model": str(workdir / "model")},
        "engine": {
            "args": [
                *("--max-model-len", "2048", "--max-num-seqs", "64", "--dtype", "float32"),
                *("--enforce-eager", "--distributed-executor-backend", "uni"),
            ],
            "log": str(workdir / "engine.log"),
            # On few cores vLLM's separate worker process costs more than the work: both ends wait for each
            # other spinning. Three rollouts a second with it, eight without. The first variable is what vLLM
            # on CPU asks before it allows "uni".
            "env": {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": "1",
            },
        },
        "train": {
            "proxy_url": f"http://127.0.0.1:{port}",
            "runs_dir": str(workdir / "runs"),
            "learning_rate": 2e-4,
            "adam_eps": 1e-5,  # 1e-8 lets a model as small as this collapse
            "epochs": 2,
            "mini_batch_rows": 32,
            "threads": 1,
            "device": "cpu",
            "watch_interval_s": 0.2,
        },
    }


def command_of(name: str, workdir: Path) -> list[str]:
    """``lightning-proxy NAME`` with the experiment's configuration."""
    return [sys.executable, "-m", "lightning_proxy.cli", name, "--config", str(workdir / "lightning.toml")]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(workdir: Path, say: Say) -> Iterator[tuple[Children, ProxyClient]]:
    """The proxy of ``workdir``'s configuration, with vLLM under it."""
    proxy = ProxyClient(load_settings(config=workdir / "lightning.toml").train.proxy_url)
    with Children() as children:
        say(f"starting vLLM behind the proxy at {proxy.url} (up to a minute); logs are in {workdir}")
        serve = [*command_of("serve", workdir), "--model", str(workdir / "model")]
        children.start("serve", serve, workdir / "serve.log")
        _wait_until_ready(proxy, children, workdir / "serve.log")
        yield children, proxy


def _wait_until_ready(proxy: ProxyClient, children: Children, log: Path) -> None:
    """Until vLLM answers behind the proxy; ExperimentFailed if ``serve`` ends, or it takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    reason = "nothing listens yet"
    while time.monotonic() < deadline:
        children.check()
        try:
            proxy.get("/readyz")
            return
        except LightningError as error:
            reason = str(error)
        time.sleep(0.25)
    raise ExperimentFailed(f"not ready after {START_TIMEOUT_S:.0f} s: {reason}", log)
