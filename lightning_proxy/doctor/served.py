"""The proxy, and the engine behind it."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from lightning_proxy.client import ProxyClient
from lightning_proxy.config import Settings, for_policy
from lightning_proxy.doctor.finding import Finding, note, ok, problem
from lightning_proxy.errors import EngineUnreachable, LightningError
from lightning_proxy.store import Store

_PATIENCE_S = 5.0
# vLLM's development routes that a change of weights takes.
_CONTROL = ("/pause", "/resume", "/collective_rpc")


def proxy(client: ProxyClient) -> Generator[Finding, None, bool | None]:
    """Whether it lets calls through, which is returned too; ``None`` where it does not answer."""
    try:
        _, body = client.send("GET", "/readyz")
        waits_for = json.loads(body)["waits_for"]
    except EngineUnreachable:
        to_do = "`lightning-proxy serve`; or say with --proxy where it is"
        yield problem("proxy", f"nothing answers at {client.url}", to_do)
        return None
    except (ValueError, LookupError, TypeError):
        yield problem("proxy", f"what answers at {client.url} is no lightning-proxy", "[train] proxy_url")
        return None
    if waits_for:
        yield problem("proxy", f"{client.url} holds calls back: {'; '.join(waits_for)}")
        return False
    yield ok("proxy", f"{client.url} is ready: OPENAI_BASE_URL={client.url}/v1")
    return True


def same_database(settings: Settings, client: ProxyClient, store: Store) -> Iterator[Finding]:
    """Whether the proxy writes to the file that `train` would read."""
    try:
        before, theirs, after = store.stats(), client.get("/api/stats"), store.stats()
    except LightningError as error:
        yield problem("proxy", str(error))
        return
    if not all(before[name] <= theirs[name] <= after[name] for name in ("spans", "rewards", "rollouts")):
        yield problem(
            "database",
            f"the proxy's is another one: it has {theirs['spans']} calls and {theirs['rewards']} rewards, "
            f"{settings.store.db.resolve()} has {after['spans']} and {after['rewards']}",
            "`serve` and `train` must name the same [store] db: a relative path is one of where each begins",
        )


def engines(settings: Settings, through: ProxyClient | None) -> Iterator[Finding]:
    """What they are, and what of them training relies on.

    That of ``[policy]`` is asked through the proxy where that is ready, else at the address in the settings,
    as those of further policies are. One that the proxy starts has no address there: it is not asked.
    """
    key = settings.proxy.upstream_api_key
    main = through or _at(settings.proxy.upstream, key)
    further = ((each.name, _at(each.upstream, key)) for each in settings.policies)
    for name, client in ((settings.policy.name, main), *further):
        if client is None:
            continue
        try:
            yield from _engine(for_policy(settings, name), client)
        except EngineUnreachable:
            text = f"nothing answers at {client.url}"
            yield problem(_about(name), text, "start it, or mend `upstream` in the settings")


def _engine(settings: Settings, client: ProxyClient) -> Iterator[Finding]:
    name = settings.policy.name
    about = _about(name)
    models = _asked(client, "/v1/models")
    try:
        mine = {str(model["id"]): model for model in models["data"]}
    except (LookupError, TypeError):
        yield note(about, "it lists no models as OpenAI's API does: what it serves is not known")
        return
    if name not in mine:
        to_do = f"start vLLM with --served-model-name {name}, or set [policy] name to what agents ask for"
        yield problem(about, f"no model {name!r} is served; there are {', '.join(mine) or 'none'}", to_do)
    elif mine[name].get("owned_by") != "vllm":
        to_do = "calls are recorded as text, for SFT elsewhere; RL needs vLLM's token ids"
        yield note(about, f"{name!r} is served by something that is not vLLM", to_do)
    else:
        yield from _vllm(settings, client, mine[name])


def _vllm(settings: Settings, client: ProxyClient, model: Mapping[str, Any]) -> Iterator[Finding]:
    name, longest = settings.policy.name, model.get("max_model_len")
    about = _about(name)
    it = f"vLLM {_asked(client, '/version').get('version')} serves {name!r}"
    routes = _asked(client, "/openapi.json").get("paths")
    if routes is None:
        yield note(about, f"{it}; it hides its routes, so whether weights can be changed is not known")
    elif missing := [path for path in _CONTROL if path not in routes]:
        to_do = "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment (`serve --model` does)"
        yield problem(about, f"{it}, but its weights cannot be changed: no {', '.join(missing)}", to_do)
    else:
        yield ok(about, f"{it}; its weights can be changed")
    rows = settings.train.max_row_tokens
    if isinstance(longest, int) and longest > rows:
        text = f"it reads up to {longest} tokens, and training leaves out rows of more than {rows}"
        yield note(about, text, "[train] max_row_tokens, as far as memory goes: docs/full-size.md")


def _at(upstream: str | None, key: str | None) -> ProxyClient | None:
    return ProxyClient(upstream.rstrip("/").removesuffix("/v1"), key, _PATIENCE_S) if upstream else None


def _about(policy: str) -> str:
    return f"engine of {policy}"


def _asked(client: ProxyClient, path: str) -> dict[str, Any]:
    """The answer, a JSON object; {} where there is none. Raises ``EngineUnreachable``."""
    status, text = client.send("GET", path)
    try:
        answer = json.loads(text) if status == HTTPStatus.OK else {}
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
