"""All checks, in the order of the data's way round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_proxy.client import ProxyClient
from lightning_proxy.config import Settings, for_policy, policy_names
from lightning_proxy.doctor import machine, recorded, served
from lightning_proxy.doctor.finding import Finding, problem
from lightning_proxy.errors import LightningError
from lightning_proxy.store import PolicyVersion, Store


def examine(settings: Settings) -> Iterator[Finding]:
    """What there is to say, as it is found out; nothing is changed, sent to the model or written."""
    names = policy_names(settings)
    yield from machine.packages(settings)
    yield from machine.database(settings)
    active = _active_versions(settings, names)
    for name in names:
        yield from machine.weights(for_policy(settings, name), active.get(name))
    proxy = ProxyClient(settings.train.proxy_url, settings.proxy.token, timeout_s=5.0)
    ready = yield from served.proxy(proxy)
    yield from served.engines(settings, proxy if ready else None)
    if not settings.store.db.is_file():
        return
    try:
        with Store.open(settings.store.db, create=False) as store:
            if ready is not None:
                yield from served.same_database(settings, proxy, store)
            yield from recorded.calls(store)
            for name in names:
                yield from recorded.training(for_policy(settings, name), store)
    except LightningError as error:
        yield problem("database", str(error))


def _active_versions(settings: Settings, names: Sequence[str]) -> dict[str, PolicyVersion | None]:
    """By policy; empty where the database cannot be read, which is told later."""
    try:
        with Store.open(settings.store.db, create=False) as store:
            return {name: store.active_version(name) for name in names}
    except LightningError:
        return {}
