"""The ways of the control routes to the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_proxy.errors import InvalidInput, StoreUnavailable
from lightning_proxy.proxy.threads import OneThread
from lightning_proxy.redaction import Redactor
from lightning_proxy.store import Store, Writer

T = TypeVar("T")
_STORE_PATIENCE_S = 15.0


class Access:
    """Changes go through the one writer, questions through a connection of their own."""

    def __init__(
        self,
        writer: Writer,
        read: Callable[[Callable[[Store], Any]], Any],
        redactor: Redactor | None = None,
    ) -> None:
        """``read`` asks the store and blocks: it is called in a thread of its own."""
        self._writer = writer
        self._read_blocking = read
        self._redactor = redactor
        self._reading = OneThread("control-reads")

    def kept(self, fields: dict[str, Any], *names: str) -> dict[str, Any]:
        """``fields`` as they may be written: the named ones, which people write, without what rules find.

        Raises ``InvalidInput`` where one cannot be searched.
        """
        kept = dict(fields)
        for name in names:
            if self._redactor is not None and name in fields:
                try:
                    kept[name] = self._redactor.value(fields[name])
                except InvalidInput as error:
                    raise InvalidInput(f"{name} is {error}") from error
        return kept

    async def write(self, change: Callable[[Store], T], *, for_who_waits: bool = False) -> T:
        """Run a change through the one writer; return when it is durable.

        ``for_who_waits``: a change that is of no use, or does harm, where whoever asked has gone.
        """
        future = self._writer.submit(change)
        try:
            done, _ = await asyncio.wait((future,), timeout=_STORE_PATIENCE_S)
        except asyncio.CancelledError:
            if for_who_waits:
                future.cancel()
            raise
        if not done:
            future.cancel()  # not begun, it is left out; if it is being written, a key makes that safe
            raise StoreUnavailable(
                f"the store is not writing ({self._writer.last_error or 'busy'}); try again, with the same "
                "idempotency_key"
            )
        return future.result()

    async def read(self, question: Callable[[Store], T]) -> T:
        """Ask the store a question."""
        answer: T = await self._reading.run(self._read_blocking, question)
        return answer
