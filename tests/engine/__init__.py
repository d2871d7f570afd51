"""A fake vLLM: real HTTP on a real socket, a made-up model behind it, faults on demand.

==============  ==================================================================================
``model``       the made-up model: deterministic tokens, logprobs and tool calls (no I/O)
``shapes``      what vLLM 0.31 answers, field for field (no I/O)
``messages``    the same for Anthropic's Messages API (no I/O)
``responses``   the same for ``/v1/responses`` (no I/O)
``script``      what a test can ask of one request: a reply, a fault, a delay
``rules``       replies chosen by what a request says
``connection``  HTTP/1.1 on one socket, with the means to break it
``server``      the routes
``thread``      the engine in a thread, for tests
``fake_engine`` the engine as a process
==============  ==================================================================================

Tests compute what to expect with ``model.generate``, from the same request body.
"""

from tests.engine.model import Choice, Model, Reply, Step
from tests.engine.script import Script
from tests.engine.server import FakeEngine
from tests.engine.thread import EngineThread

__all__ = ["Choice", "EngineThread", "FakeEngine", "Model", "Reply", "Script", "Step"]
