"""Rollouts of live traffic that died in silence: nobody says that they ended, so it is concluded.

Honestly, and no further: a rollout whose last call failed, or whose last tool call nobody answered, did
not go on. One that fell silent after an ordinary answer may have come to its end, and stays open.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

from lightning_proxy.errors import StoreError
from lightning_proxy.store import ErrorClass, Span, Store, Writer, last_call

from .call import parse_request
from .findings import awaits_result

log = logging.getLogger(__name__)
_INTERVAL_S = 60.0
_AT_ONCE = 500  # calls looked at in one transaction


async def watch_for_silence(writer: Writer, silence_s: float) -> None:
    """Look for silent rollouts every minute, for ever; 0 looks for none."""
    if not silence_s:
        return
    while True:
        await asyncio.sleep(min(_INTERVAL_S, silence_s))
        before = time.time() - silence_s
        try:
            while await writer.submit(partial(close_silent, before=before, silence_s=silence_s)):
                pass
        except StoreError as error:
            log.warning("silent rollouts were not looked for: %s", error)


def close_silent(store: Store, before: float, silence_s: float) -> bool:
    """End the rollouts that died before then; true where there is more to look at."""
    silent, more = store.fallen_silent(before, _AT_ONCE)
    for rollout_id in silent:
        after = died_after(store.list_spans(rollout_id=rollout_id, limit=8))
        if after is not None:
            reason = f"silent for {silence_s:g} s after {after}"
            store.fail_rollout(rollout_id, reason, ErrorClass.SILENT_DEATH, presumed=True)
    return more


def died_after(spans: list[Span]) -> str | None:
    """What a silent rollout's last calls (newest first) ended with, where it cannot have been its end."""
    last = last_call(spans)
    if spans and spans[0].error_class == ErrorClass.CLIENT_DISCONNECT:
        return "its agent left in the middle of an answer"
    if last is None:
        return None
    if last.error_class is not None:
        return "a call that failed"
    if any(found.error_class is ErrorClass.AGENT_LOOP for found in last.findings):
        return "it repeated itself"
    return "a tool call that nobody answered" if awaits_result(last, parse_request(last.request)) else None
