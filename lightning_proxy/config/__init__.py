"""Settings: defaults < ``lightning.toml`` < environment < flags.

``settings``  every setting there is, with type, default, range and meaning (read this first)
``train``     the tables of the trainer, likewise
``policies``  the entries of ``[[policies]]``; ``per_policy`` makes settings for each
``load``      puts the four sources together; names the key, where it stands and what is allowed
``template``  the commented ``lightning.toml`` and ``docs/settings.md``, generated from ``settings``

Imports nothing of ours but ``errors``.
"""

from lightning_proxy.config.load import load_settings
from lightning_proxy.config.per_policy import for_policy, policy_names
from lightning_proxy.config.settings import RedactionSettings, Settings, UpstreamSettings

__all__ = ["RedactionSettings", "Settings", "UpstreamSettings", "for_policy", "load_settings", "policy_names"]
