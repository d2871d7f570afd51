"""``python -m lightning_proxy.cli``, where the console script is not on the path."""

from lightning_proxy.cli import app

app()
