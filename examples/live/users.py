"""Users of a running agent: they ask, and some tell later whether the answer was right.

The agent is a process that is told two variables. Users know questions and right answers, as users do; of the
proxy they know the address of ``/reward`` and the ``response_id`` that the agent shows with its answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Self

import aiohttp

from examples.calculator.tasks import CalculatorTask, make_task
from lightning_proxy.errors import LightningError
from lightning_proxy.experiment.grade import is_right

_PATIENCE_S = 120.0  # of users, for an answer


@dataclass(frozen=True, slots=True)
class Habits:
    """How users behave; seconds of the clock on the wall."""

    users: int = 12
    pause_s: float = 0.6  # mean, between an answer and the next question
    rate: float = 0.5  # of answers that get a thumb
    delay_s: tuple[float, float] = (60.0, 180.0)  # from the answer to the thumb
    mistaken: float = 0.15  # thumbs that are the wrong one at first
    correct_after_s: tuple[float, float] = (20.0, 60.0)


@dataclass(frozen=True, slots=True)
class Answered:
    """One question that was answered."""

    at: float  # monotonic
    response_id: str
    right: bool


class AgentDied(LightningError):
    """The agent has ended, or answers no more: agent.log tells why."""


class Agent:
    """The agent's process: questions in, answers out, many at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, command: Sequence[str], env: Mapping[str, str], log: IO[Any]) -> Self:
        """``env`` is all that it is told."""
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=log, env=dict(env)
        )
        return cls(process)

    async def ask(self, name: str, question: str) -> dict[str, Any]:
        """Its answer; AgentDied if there is none."""
        stdin = self._process.stdin
        assert stdin is not None
        assert self._reading is not None
        if self._reading.done():
            raise AgentDied
        self._waiting[name] = asyncio.get_running_loop().create_future()
        stdin.write(json.dumps({"id": name, "question": question}).encode() + b"\n")
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await self._waiting[name]
        except TimeoutError:
            raise AgentDied from None

    async def __aenter__(self) -> Self:
        self._reading = asyncio.ensure_future(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)  # AgentDied told its users already

    async def _read(self) -> None:
        """Hands out answers until there are no more; then nobody waits in vain, whatever the reason."""
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                said = json.loads(line)
                self._waiting.pop(said["id"]).set_result(said)
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(AgentDied())


class Crowd:
    """Users at work, all with the same habits. ``answered`` and ``thumbs`` grow while they are."""

    def __init__(self, agent: Agent, url: str, habits: Habits, seed: int) -> None:
        self._agent = agent
        self._url = f"{url}/reward"
        self._habits = habits
        self._seed = seed
        self._rng = random.Random(seed)
        self._asked = 0
        self._over = False
        self._posting: set[asyncio.Task[Any] | None] = set()
        self.answered: list[Answered] = []
        self.failed = 0
        self.refused = 0  # thumbs that the proxy did not take
        self.thumbs = 0
        self.corrected = 0

    async def work(self, seconds: float, tell: Callable[[Crowd], None]) -> None:
        """All of them ask for so long; thumbs that are not due by then are never put.

        One that is under way arrives: what is counted is what the proxy has.
        """
        until = time.monotonic() + seconds
        self._over = False
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            later: list[asyncio.Task[None]] = []
            users = [
                group.create_task(self._use(until, group, session, later)) for _ in range(self._habits.users)
            ]
            while not all(user.done() for user in users):
                await asyncio.sleep(1.0)
                tell(self)
            self._over = True
            for task in later:
                if task not in self._posting:
                    task.cancel()

    async def _use(
        self,
        until: float,
        group: asyncio.TaskGroup,
        session: aiohttp.ClientSession,
        later: list[asyncio.Task[None]],
    ) -> None:
        """One user: ask, look, and perhaps decide to tell later."""
        while time.monotonic() < until:
            await asyncio.sleep(self._rng.expovariate(1 / self._habits.pause_s))
            task = self._next_question()
            said = await self._agent.ask(task.task_id, task.question)
            if said["response_id"] is None:
                self.failed += 1
                continue
            right = is_right(said["answer"], task.answer)
            self.answered.append(Answered(time.monotonic(), said["response_id"], right))
            if self._rng.random() < self._habits.rate:
                later.append(group.create_task(self._tell(session, said["response_id"], right)))

    def _next_question(self) -> CalculatorTask:
        self._asked += 1
        return make_task(self._seed, "train", self._asked)

    async def _tell(self, session: aiohttp.ClientSession, response_id: str, right: bool) -> None:
        """A thumb, late; the wrong one at first now and then, and the right one after a while."""
        habits = self._habits
        mistaken = self._rng.random() < habits.mistaken
        wait, then = self._rng.uniform(*habits.delay_s), self._rng.uniform(*habits.correct_after_s)
        await asyncio.sleep(wait)
        if not await self._post(session, response_id, right != mistaken):
            return
        self.thumbs += 1
        if mistaken and not self._over:
            await asyncio.sleep(then)
            posted = await self._post(session, response_id, right)
            self.corrected += posted  # not in one line: others count while this one waits

    async def _post(self, session: aiohttp.ClientSession, response_id: str, up: bool) -> bool:
        """Whether the thumb was taken."""
        body = {"response_id": response_id, "thumb": "up" if up else "down"}
        task = asyncio.current_task()
        self._posting.add(task)
        try:
            async with session.post(self._url, json=body) as response:
                response.raise_for_status()
        except aiohttp.ClientError:
            self.refused += 1
            return False
        finally:
            self._posting.discard(task)
        return True
