"""One HTTP request to the proxy's control routes."""

from __future__ import annotations

import http.client
import ipaddress
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lightning_proxy.errors import (
    Conflict,
    EngineRefused,
    EngineUnreachable,
    InvalidInput,
    LightningError,
    StoreUnavailable,
    UnknownTarget,
)

_BY_STATUS: dict[int, type[LightningError]] = {
    400: InvalidInput,
    404: UnknownTarget,
    409: Conflict,
    503: StoreUnavailable,
}


@dataclass(frozen=True, slots=True)
class ProxyClient:
    """The proxy at ``url`` (without ``/v1``); ``token`` where it asks for one."""

    url: str
    token: str | None = None
    timeout_s: float = 30.0

    def get(self, path: str) -> Any:
        """The answer as parsed JSON; raises as ``request`` does."""
        return self.request("GET", path)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Send ``body`` as JSON; returns the parsed answer.

        InvalidInput, UnknownTarget, Conflict or StoreUnavailable for what the proxy answers with 400,
        404, 409 and 503, EngineRefused for any other refusal, EngineUnreachable where nothing answers.
        """
        status, text = self.send(method, path, body)
        if status >= 400:
            raise self._refusal(status, text)
        return self._parsed(text)

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """The same, returning status and body whatever they are; EngineUnreachable without an answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers, method=method)
        try:
            with self._opener().open(request, timeout=self.timeout_s) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineUnreachable(
                f"no proxy answers at {self.url} ({getattr(error, 'reason', error)}): start one with "
                "`lightning-proxy serve`, or say where it is"
            ) from None

    def _opener(self) -> urllib.request.OpenerDirector:
        """An HTTP proxy named in the environment is not asked for this machine's own addresses."""
        host = urlsplit(self.url).hostname or ""
        try:
            local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = False
        return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def _parsed(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise EngineRefused(
                f"what answers at {self.url} is no lightning-proxy: it sent {text[:80]!r}"
            ) from None

    def _refusal(self, status: int, text: bytes) -> LightningError:
        try:
            message = str(json.loads(text)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return EngineRefused(
                f"what answers at {self.url} is no lightning-proxy: status {status}, {text[:80]!r}"
            )
        if status in (401, 403):
            message += "; give it as proxy.token in lightning.toml or as LIGHTNING_PROXY__TOKEN"
        return _BY_STATUS.get(status, EngineRefused)(message)
