"""One unmodified command under a fresh rollout.

The command finds the proxy through the variables that agents' SDKs read anyway. Its standard
streams are ours, signals reach it, and its exit code is ours; from that code comes the rollout's
end state.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self
from urllib.parse import quote

from lightning_proxy.client.proxy import ProxyClient
from lightning_proxy.errors import InvalidInput, LightningError
from lightning_proxy.runner.process import how_it_ended
from lightning_proxy.store.records import ErrorClass

log = logging.getLogger(__name__)

# The proxy's settings hold its token and its upstream's key, vLLM's what its environment does;
# compose.yaml takes the token from LIGHTNING_TOKEN.
_SECRETS = re.compile(r"LIGHTNING_(PROXY__|ENGINE__|TOKEN$)", re.IGNORECASE)

EXIT_NOT_FOUND = 127  # as shells have it
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_FORWARDED = (*_STOPPING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
_FROM_THE_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # which sends them to the command as well


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """What the new rollout is to be; None leaves it to the proxy."""

    rollout_id: str | None = None
    task_id: str | None = None
    role: str | None = None


def run_command(argv: Sequence[str], proxy: ProxyClient, wanted: RolloutRequest | None = None) -> int:
    """Register a rollout, run ``argv`` under it, record how it ended; returns the command's exit code.

    InvalidInput without a command; what ``ProxyClient.request`` raises if the rollout cannot be
    registered (then nothing is run). A rollout whose end cannot be recorded costs a warning.
    """
    if not argv:
        raise InvalidInput(
            "no command to run: put it behind --, as in `lightning-proxy run -- python agent.py`"
        )
    if shutil.which(argv[0]) is None:
        sys.stderr.write(f"lightning-proxy: {argv[0]}: command not found\n")
        return EXIT_NOT_FOUND
    wanted = wanted or RolloutRequest()
    request = {"rollout_id": wanted.rollout_id, "task_id": wanted.task_id, "role": wanted.role}
    rollout = proxy.request("POST", "/api/rollouts", {k: v for k, v in request.items() if v is not None})
    env = {**passed_on(os.environ), **agent_environment(proxy.url, rollout, wanted.role)}
    with _Signals() as signals:
        command = subprocess.Popen(argv, env=env)
        signals.go_to(command)
        code = command.wait()
    end = _end_state(code, signals.received)
    try:
        proxy.request(
            "PATCH",
            f"/api/rollouts/{quote(rollout['rollout_id'], safe='')}",
            {name: value for name, value in end.items() if value is not None},
        )
    except LightningError as error:
        log.warning("the end of rollout %s was not recorded: %s", rollout["rollout_id"], error)
    return code if code >= 0 else 128 - code


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """What of our own environment an agent gets: not the secrets of the proxy, which open everything."""
    return {name: value for name, value in environment.items() if not _SECRETS.match(name)}


def agent_environment(
    proxy_url: str, rollout: Mapping[str, Any], role: str | None = None, *, attempt: int | None = None
) -> dict[str, str]:
    """The variables through which an unmodified agent finds the proxy, as this rollout.

    The address is the one by which *we* reached the proxy, not the one the proxy believes in.
    """
    root = proxy_url.rstrip("/")
    base = f"{root}/rollout/{quote(rollout['rollout_id'], safe='')}"
    if attempt is not None:
        base += f"/attempt/{attempt}"
    if role is not None:
        base += f"/role/{quote(role, safe='')}"
    key = rollout["api_key"]
    of_attempt = {} if attempt is None else {"LIGHTNING_ATTEMPT": str(attempt)}
    return {
        "OPENAI_BASE_URL": f"{base}/v1",
        "OPENAI_API_BASE": f"{base}/v1",  # llama-index and older SDKs
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": base,  # its SDKs add /v1 themselves
        "ANTHROPIC_API_KEY": key,
        "LIGHTNING_ROLLOUT_ID": rollout["rollout_id"],
        "LIGHTNING_REWARD_URL": f"{root}/reward",
        **of_attempt,
    }


class _Signals:
    """Passes on to the command what we are sent, from before it starts until after it ended."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._command: subprocess.Popen[bytes] | None = None
        self._at_terminal = sys.stdin is not None and sys.stdin.isatty()

    def __enter__(self) -> Self:
        self._before = {signum: signal.signal(signum, self._forward) for signum in _FORWARDED}
        # Where it is inherited as ignored, the kernel keeps no exit code for us.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def go_to(self, command: subprocess.Popen[bytes]) -> None:
        """From now on, and what came before."""
        self._command = command
        for signum in self.received:
            command.send_signal(signum)

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        self.received.append(signum)
        if self._command is not None and not (self._at_terminal and signum in _FROM_THE_TERMINAL):
            self._command.send_signal(signum)


def _end_state(code: int, received: Sequence[int]) -> dict[str, str | None]:
    """What is told of the end. The proxy adds what the last calls met: that may be the root cause."""
    if stopped := [signum for signum in received if signum in _STOPPING]:
        return {"state": "cancelled", "reason": f"stopped by {signal.Signals(stopped[0]).name}"}
    if code == 0:
        return {"state": "succeeded", "reason": None}
    reason = how_it_ended(code)
    return {"state": "failed", "reason": reason, "error_class": ErrorClass.AGENT_CRASH.value}
