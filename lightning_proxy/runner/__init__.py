"""Runs an unmodified agent command as one rollout, and speaks to the proxy's control routes.

``command``  the command under a fresh rollout: its environment, its signals, its end (read this first)
``client``   one HTTP request to the proxy, with errors that say what to do

Standard library only, beside ``errors``: the proxy may be on another machine.
"""

from lightning_proxy.runner.client import ProxyClient
from lightning_proxy.runner.command import RolloutRequest, run_command

__all__ = ["ProxyClient", "RolloutRequest", "run_command"]
