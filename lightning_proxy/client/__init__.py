"""Speaks to a running proxy's own routes. Standard library only: agents' environments may load it.

``proxy``    one HTTP request, with errors that say what to do
``rewards``  ``lightning_proxy.reward(...)``, which posts a reward

May import ``errors``.
"""

from lightning_proxy.client.proxy import ProxyClient
from lightning_proxy.client.rewards import Receipt, reward

__all__ = ["ProxyClient", "Receipt", "reward"]
