"""The fake vLLM as a process: ``python -m tests.engine.fake_engine --port 8000``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import deque
from pathlib import Path

import uvloop

from tests.engine.model import Model
from tests.engine.rules import read_rules
from tests.engine.script import Script
from tests.engine.server import KEPT_REQUESTS, FakeEngine


async def _run(args: argparse.Namespace) -> None:
    model = Model(args.tokens, args.bytes_per_token)
    engine = FakeEngine(
        model=model,
        name=args.model,
        owner=args.owner,
        weights=args.weights,
        refuse_token_ids=args.refuse_token_ids,
        script=Script(delay_s=args.delay_s, chunk_delay_s=args.chunk_delay_s),
        rules=read_rules(args.rules) if args.rules else (),
    )
    engine.requests = deque(maxlen=args.keep_requests)
    engine.on_death = lambda: sys.exit(1)
    port = await engine.start(args.port)
    print(f"fake engine on http://127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Run one engine until interrupted."""
    parser = argparse.ArgumentParser(description="A fake vLLM. A stream has tokens + 2 events.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--model", default="policy", help="the served model's name")
    parser.add_argument("--owner", default="vllm", help="owned_by in /v1/models")
    parser.add_argument("--tokens", type=int, default=64, help="length of an answer")
    parser.add_argument("--bytes-per-token", type=int, default=1)
    parser.add_argument("--delay-s", type=float, default=0.0, help="before the first byte")
    parser.add_argument("--chunk-delay-s", type=float, default=0.0, help="between tokens")
    parser.add_argument("--weights", type=Path, help="directory whose *.safetensors decide the logprobs")
    parser.add_argument("--refuse-token-ids", action="store_true", help="400 for return_token_ids")
    parser.add_argument("--rules", type=Path, help="JSON file of replies chosen by the request; see rules.py")
    parser.add_argument("--keep-requests", type=int, default=KEPT_REQUESTS)
    args = parser.parse_args()
    try:
        uvloop.run(_run(args))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
