"""lightning-proxy: a transparent proxy that turns any running agent into a learning one.

The rooms, in the order in which data walks through them:

``config``     settings: defaults, ``lightning.toml``, environment, flags
``store``      what was recorded: spans, rollouts, rewards, tasks, policy versions, training runs
``redaction``  takes out of spans what must not be kept
``proxy``      forwards calls to the model, captures them, swaps the weights behind itself
``trainer``    drains the store into transitions, updates the policy, publishes it
``client``     one HTTP request to the proxy; ``lightning_proxy.reward(...)``
``runner``     runs unmodified agent commands as rollouts, one or a whole pool of tasks
``exchange``   what was recorded, out into other tools' formats, and what others recorded, in
``demo``       the whole loop on one machine, with a tiny model and a tool-using agent
``cli``        the command line: parse, call one function, print

Proxy, trainer and runner never import one another: they meet in the store and over HTTP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_proxy.client import Receipt as Receipt
    from lightning_proxy.client import reward as reward

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``reward`` and what it returns, loaded when they are first used: importing this costs nothing."""
    if name in ("reward", "Receipt"):
        from lightning_proxy import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
