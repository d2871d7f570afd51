"""A forwarder that captures nothing: aiohttp on both sides and uvloop, as little as possible."""

from __future__ import annotations

import argparse
import asyncio

import aiohttp
import uvloop
from aiohttp import web

_NOT_FORWARDED = {"host", "content-length", "transfer-encoding", "connection"}


async def _run(upstream: str, port: int) -> None:
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
    )

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in _NOT_FORWARDED
        }
        body = await request.read()
        async with session.request(
            request.method, upstream + request.path_qs, headers=headers, data=body
        ) as answer:
            kept = {"Content-Type": answer.headers["Content-Type"]}
            if answer.content_length is not None:
                return web.Response(status=answer.status, headers=kept, body=await answer.read())
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app, access_log=None, auto_decompress=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print(f"bare forwarder on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Forward until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True, help="scheme, host and port")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    uvloop.run(_run(args.upstream, args.port))


if __name__ == "__main__":
    main()
