"""Which endpoint a call goes to: by role or model, to one that the settings name, else to the main one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from lightning_proxy.config import UpstreamSettings
from lightning_proxy.errors import ConfigError

from .engine import Engine
from .providers import ProviderServer
from .served import Served
from .upstream import Upstream
from .wires import Wire
from .wires.base import Json
from .wires.messages import MessagesWire
from .wires.messages_request import has_inline_system
from .wires.responses import ResponsesWire
from .wires.responses_tools import special_tools

_REMEMBERED = 1000  # models
_NOWHERE: Mapping[str, Any] = MappingProxyType({})


@dataclass(slots=True)
class Endpoint:
    """Where calls go, and what may be asked of it."""

    upstream: Upstream
    engine: Engine
    capture: str  # `proxy.capture`
    models: tuple[str, ...] = ()  # names and patterns; the main endpoint takes what is left
    provider: ProviderServer | None = None
    served: Served | None = None  # the policy that runs there
    also_for: str | None = None  # another policy's name, whose calls of some roles come here

    def policy_of(self, model: object) -> tuple[str | None, int | None]:
        """The policy and version that a call for ``model`` is answered by; None: not ours, or not known."""
        served = self.served
        if served is None or not isinstance(model, str) or model not in (served.policy, self.also_for):
            return None, None
        version = served.switch.version
        return (None, None) if version is None else (served.policy, version)

    def broke(self, error: Exception) -> None:
        """The connection of a call failed, or broke off in mid-answer."""
        if self.served is not None:
            self.served.broke(error)

    async def gives_tokens(self, headers: Mapping[str, str]) -> bool:
        """Whether it can be asked for token ids. ``headers``: the agent's, with the key to ask by."""
        if self.capture == "auto":
            return bool(await self.engine.is_vllm(headers))
        return self.capture == "tokens"

    async def informed(self, wire: Wire, request: Json, headers: Mapping[str, str]) -> Wire:
        """The wire for a request, knowing of the engine what its translation depends on."""
        if isinstance(wire, ResponsesWire):
            return await self._responses(request, headers)
        if isinstance(wire, MessagesWire) and has_inline_system(request):
            return MessagesWire(await self.engine.keeps_inline_system(request.get("model"), headers))
        return wire

    def note_logprobs_mode(self, sampling: dict[str, Any], request: Json, headers: Mapping[str, str]) -> None:
        """Add to a call's sampling parameters, that its logprobs will be those of what it is sampled from."""
        self.engine.note_logprobs_mode(sampling, request.get("model"), headers)

    async def _responses(self, request: Json, headers: Mapping[str, str]) -> ResponsesWire:
        probe, model = self.engine.responses, request.get("model")
        habits = await probe.habits(model, headers)
        if habits is None or not habits.translates:
            return ResponsesWire(habits)
        return ResponsesWire(habits, await probe.echo(special_tools(request), model, headers))

    async def start(self) -> None:
        """Open what it needs."""
        await self.upstream.start(await self.provider.start() if self.provider else None)

    async def close(self) -> None:
        """Close it again."""
        await self.upstream.close()
        if self.provider is not None:
            await self.provider.close()


class Upstreams:
    """All endpoints. The first whose models fit takes a call.

    ``by_role``: where calls of a role go though they ask for the main endpoint's policy.
    """

    def __init__(
        self, main: Endpoint, others: Sequence[Endpoint] = (), by_role: Mapping[str, Endpoint] = _NOWHERE
    ) -> None:
        self.main = main
        self.others = tuple(others)
        self._by_role = dict(by_role)
        self._by_model: dict[str, Endpoint] = {}

    def role_matters(self, model: object) -> bool:
        """Whether the endpoint for a model depends on the role."""
        return bool(self._by_role) and self.main.served is not None and model == self.main.served.policy

    def of(self, model: object, role: str | None = None) -> Endpoint:
        """The endpoint for a model, and for a role where that matters."""
        if role is not None and role in self._by_role and self.role_matters(model):
            return self._by_role[role]
        if not self.others or not isinstance(model, str):
            return self.main
        found = self._by_model.get(model)
        if found is None:
            fits = (one for one in self.others if any(fnmatchcase(model, name) for name in one.models))
            found = next(fits, self.main)
            if len(self._by_model) < _REMEMBERED:
                self._by_model[model] = found
        return found

    async def start(self) -> None:
        """Open every endpoint."""
        for endpoint in (self.main, *self.others):
            await endpoint.start()

    async def close(self) -> None:
        """Close every endpoint."""
        for endpoint in (self.main, *self.others):
            await endpoint.close()


def endpoint_of(settings: UpstreamSettings, token: str | None) -> Endpoint:
    """An endpoint as the settings describe it. ``token``: the proxy's own, which must not travel.

    Raises ConfigError where its key cannot be found.
    """
    key = _key_of(settings)
    if settings.provider is not None:
        server = ProviderServer(settings.provider, key=key, base=settings.url, models=settings.models)
        base = f"http://{settings.provider}/v1"  # a name for messages: the connection is a socket of ours
        # Where the provider has a key, the agent's is replaced by a word that nobody reads.
        upstream = Upstream(base, key and "kept-by-the-provider", token)
        return Endpoint(upstream, Engine(base), "text", settings.models, server)
    assert settings.url is not None, "UpstreamSettings sees to it"
    upstream = Upstream(settings.url, key, token)
    return Endpoint(upstream, Engine(settings.url, key), settings.capture, settings.models)


def _key_of(settings: UpstreamSettings) -> str | None:
    for_whom = f"the upstream for {', '.join(settings.models)}"
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env)
        if not key:
            raise ConfigError(f"{for_whom}: api_key_env names {settings.api_key_env}, which is not set")
        return key
    if settings.api_key_file is not None:
        try:
            key = settings.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{for_whom}: api_key_file cannot be read: {error}") from error
        if not key:
            raise ConfigError(f"{for_whom}: api_key_file {settings.api_key_file} is empty")
        return key
    return None
