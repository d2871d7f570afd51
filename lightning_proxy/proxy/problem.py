"""Errors of our own, in the shape that OpenAI's clients read."""

from __future__ import annotations

import logging

import orjson
from aiohttp import web

log = logging.getLogger(__name__)


def problem(status: int, code: str, message: str) -> web.Response:
    """An error of our own."""
    body = orjson.dumps({"error": {"message": message, "type": "lightning_proxy_error", "param": None,
                                   "code": code}})  # fmt: skip
    return web.Response(status=status, body=body, content_type="application/json")


def unreachable(base: str, error: Exception) -> web.Response:
    """502: the endpoint at ``base`` did not answer."""
    log.warning("upstream %s is not reachable: %r", base, error)
    return problem(502, "upstream_unreachable", f"the model endpoint {base} did not answer: {error}")
