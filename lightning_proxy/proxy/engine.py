"""vLLM's control routes: what kind of engine it is, pausing, reloading, probing.

The routes are vLLM's development routes (``VLLM_SERVER_DEV_MODE=1``), measured on 0.31.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp

from lightning_proxy.errors import EngineError, EngineRefused, EngineUnreachable

from .question import NobodyThere, Question
from .responses_probe import ResponsesProbe

_QUICK = aiohttp.ClientTimeout(total=5)
_PASSING = frozenset((401, 403, 408, 429))
_RELOAD = aiohttp.ClientTimeout(total=600)
_BESIDE = aiohttp.ClientTimeout(total=60)  # of what no call waits for: a busy engine has a queue
_MODE, _PROCESSED, _UNKNOWN = "logprobs_mode", "processed_logprobs", "unknown"
_RESUME = aiohttp.ClientTimeout(total=60)
_NO_SUCH_ROUTE = frozenset((404, 405, 501))


class NeverReached(EngineUnreachable):
    """No connection came about: the engine has seen nothing of the request."""


class _TookTooLong(EngineUnreachable):
    """No answer in time: it may only be busy."""


class NoSuchRoute(EngineRefused):
    """The engine does not have this control route."""


class _NotNow(EngineRefused):
    """A refusal that another moment, or another key, may take away."""


class Faulty(_NotNow):
    """An error of the engine's own: it may have done what it was asked all the same."""


class _BadRequest(EngineRefused):
    """Status 400."""


class Engine:
    """The engine behind an upstream base URL (``http://host:port/v1``)."""

    def __init__(self, base: str, key: str | None = None) -> None:
        self._base = base.rstrip("/")
        self._root = self._base.removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._is_vllm: Question[bool] = Question("is it vLLM?")
        self._keeps_inline_system: Question[bool] = Question("does it keep system messages in place?")
        self._tells_processed: Question[bool] = Question("which logprobs does it tell?")
        self._unmarked: deque[dict[str, Any]] = deque(maxlen=1000)  # calls that wait for this answer
        self.responses = ResponsesProbe(self._base, key)

    async def is_vllm(self, headers: Mapping[str, str] = MappingProxyType({})) -> bool | None:
        """Whether the engine gives token ids; ``None`` while it does not say. Asked until it does.

        ``headers``: the agent's, for an engine that answers to its key only.
        """
        if self._is_vllm.answer is not None:
            return self._is_vllm.answer
        key = _key_in(headers)

        async def ask() -> bool | None:
            try:
                answer = await self._call("GET", f"{self._base}/models", timeout=_QUICK, headers=key)
            except NeverReached as error:
                raise NobodyThere from error
            except (EngineUnreachable, _NotNow):
                return None
            except EngineRefused:
                answer = {}
            models = answer.get("data") if isinstance(answer, dict) else None
            return isinstance(models, list) and any(
                isinstance(model, dict) and model.get("owned_by") == "vllm" for model in models
            )

        return await self._is_vllm.told(key, ask)

    async def keeps_inline_system(
        self, model: object, headers: Mapping[str, str] = MappingProxyType({})
    ) -> bool | None:
        """Whether the chat template takes system messages anywhere; ``None`` while it is not known.

        vLLM tries its template on such a conversation when it starts, and where it fails makes them
        part of the first system message of a Messages request. ``/tokenize`` tells the same.
        """
        if self._keeps_inline_system.answer is not None or not isinstance(model, str):
            return self._keeps_inline_system.answer
        key = _key_in(headers)
        turns = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]
        question = {"model": model, "messages": turns, "add_generation_prompt": False}

        async def ask() -> bool | None:
            try:
                url = f"{self._root}/tokenize"
                await self._call("POST", url, json=question, timeout=_QUICK, headers=key)
            except NeverReached as error:
                raise NobodyThere from error
            except _BadRequest:
                return False
            except (EngineUnreachable, EngineRefused):
                return None
            return True

        return await self._keeps_inline_system.told(key, ask)

    def note_logprobs_mode(
        self, sampling: dict[str, Any], model: object, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Add to a call's sampling that its logprobs are those after temperature and cuts, where they are.

        No call waits for that: it is asked beside the first ones, and added when the answer comes. One
        that ends before says so: it is not trained on as if it had been the other.
        vLLM's ``--logprobs-mode``: ``raw_logprobs`` (the default) or ``processed_logprobs``. Two tokens'
        logprobs differ by the same at every temperature where they are raw, by twice as much at half
        the temperature where they are processed.
        """
        if self._tells_processed.answer is not None:
            _mark(sampling, processed=self._tells_processed.answer)
        elif isinstance(model, str):
            sampling[_MODE] = _UNKNOWN
            self._unmarked.append(sampling)
            key, name = _key_in(headers), model
            self._tells_processed.begun(key, lambda: self._ask_logprobs_mode(name, key))

    async def _ask_logprobs_mode(self, model: str, key: Mapping[str, str]) -> bool | None:
        try:
            plain, sharper = [await self._gap(model, at, key) for at in (1.0, 0.5)]
        except NeverReached as error:
            raise NobodyThere from error
        except _BadRequest:
            processed = False
        except (EngineUnreachable, EngineRefused):
            return None
        else:
            processed = sharper > 1.5 * plain > 0
        while self._unmarked:
            _mark(self._unmarked.popleft(), processed=processed)
        return processed

    async def _gap(self, model: str, temperature: float, headers: Mapping[str, str]) -> float:
        """By how much the logprobs of the two likeliest tokens after a fixed prompt differ."""
        request = {"model": model, "prompt": "1", "max_tokens": 1, "logprobs": 2, "temperature": temperature,
                   "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}  # fmt: skip
        answer = await self._call(
            "POST", f"{self._base}/completions", json=request, timeout=_BESIDE, headers=headers
        )
        try:
            first, second = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values())[-2:]
            return float(second) - float(first)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EngineRefused(f"the engine told no logprobs of its likeliest tokens: {error!r}") from error

    async def healthy(self) -> bool:
        """Whether the engine answers at all."""
        return bool(await self.is_there())

    async def is_there(self) -> bool | None:
        """Whether the engine answers at all; ``None`` where it may only be slow."""
        try:
            await self._call("GET", f"{self._base}/models", timeout=_QUICK)
        except _TookTooLong:
            return None
        except EngineUnreachable:
            return False
        except EngineRefused:
            return True
        return True

    async def answers(self) -> None:
        """Return as soon as the engine answers."""
        while not await self.healthy():  # noqa: ASYNC110 - another process: there is no event
            await asyncio.sleep(1.0)

    async def pause(self) -> None:
        """Stop between two tokens and keep every request. Where the answer is lost, it may have stopped."""
        await self._call("POST", f"{self._root}/pause?mode=keep", timeout=_RELOAD)

    async def resume(self) -> None:
        """Go on. An engine without such a route cannot be paused. Raises EngineError: it may not go on."""
        with suppress(NoSuchRoute):
            await self._call("POST", f"{self._root}/resume", timeout=_RESUME)

    async def generates(self, model: str) -> bool:
        """Whether it makes a token, which one that is paused does not."""
        request = {"model": model, "prompt": "1", "max_tokens": 1}
        try:
            await self._call("POST", f"{self._base}/completions", json=request, timeout=_QUICK)
        except EngineError:
            return False
        return True

    async def reload_weights(self, path: Path) -> None:
        """Replace the weights by those in a directory. It must hold valid ones: vLLM dies of others."""
        request = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        await self._call("POST", f"{self._root}/collective_rpc", json=request, timeout=_RELOAD)

    async def prompt_logprobs(self, model: str, token_ids: list[int]) -> list[float]:
        """Logprobs of ``token_ids[1:]``, each given the ids before it."""
        request = {"model": model, "prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0,
                   "temperature": 0.0}  # fmt: skip
        answer = await self._call("POST", f"{self._base}/completions", json=request, timeout=_RELOAD)
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
            return [
                float(entry[str(token)]["logprob"])
                for token, entry in zip(token_ids[1:], entries[1:], strict=True)
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineRefused(
                f"the engine answered the probe without prompt logprobs: {error!r}"
            ) from error

    async def _call(
        self,
        method: str,
        url: str,
        *,
        timeout: aiohttp.ClientTimeout,
        json: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        """One request on a connection of its own: a pooled one may have died in a pause."""
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session,
                session.request(method, url, json=json, headers=headers) as response,
            ):
                text = await response.text()
                if response.status >= 400:
                    raise _kind_of(response.status)(_refusal(method, url, response.status, text))
                if "json" not in response.content_type or not text:
                    return None
                return await response.json()
        except aiohttp.ClientConnectorError as error:
            raise NeverReached(f"{method} {url}: {error!r}") from error
        except TimeoutError as error:
            raise _TookTooLong(f"{method} {url}: {error!r}") from error
        except aiohttp.ClientError as error:
            raise EngineUnreachable(f"{method} {url}: {error!r}") from error
        except ValueError as error:  # neither text nor JSON, whatever it says it is
            raise EngineRefused(f"{method} {url} cannot be read: {error!r}") from error


def _mark(sampling: dict[str, Any], *, processed: bool) -> None:
    sampling.pop(_MODE, None)
    if processed:
        sampling[_MODE] = _PROCESSED


def _kind_of(status: int) -> type[EngineRefused]:
    if status in _NO_SUCH_ROUTE:
        return NoSuchRoute
    if status >= 500:
        return Faulty
    if status in _PASSING:
        return _NotNow
    return _BadRequest if status == 400 else EngineRefused


def _key_in(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in ("Authorization", "x-api-key") if name in headers}


def _refusal(method: str, url: str, status: int, text: str) -> str:
    hint = ""
    if status in (404, 405) and not url.endswith(("/models", "/completions")):
        hint = "; weights can be changed only where vLLM runs with VLLM_SERVER_DEV_MODE=1"
    return f"{method} {url} answered {status}: {text[:500]}{hint}"
