from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.errors import StoreError, StoreUnavailable, UnknownTarget
from lightning_proxy.store import Span, Store, Writer
from tests.store.support import make_span, output_of, start_script


@pytest.fixture
async def writer(db: Path) -> AsyncIterator[Writer]:
    """A started writer that gives up on a lock within 20 ms."""
    started = Writer(db, busy_timeout_s=0.02, max_pending=50)
    started.start()
    yield started
    await started.close(timeout_s=1)


@contextmanager
def locked(db: Path) -> Iterator[None]:
    """Another connection writes and does not come to an end."""
    with closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  it changes in the writer's thread
            await asyncio.sleep(0.005)


@asynccontextmanager
async def busy(writer: Writer) -> AsyncIterator[None]:
    """Its thread is at work for the length of a block: what is submitted meanwhile is taken together."""
    begun, over = threading.Event(), threading.Event()

    def work(_: Store) -> None:
        begun.set()
        over.wait(60)

    at_work = writer.submit(work)
    await until(begun.is_set)
    try:
        yield
    finally:
        over.set()
    await at_work


async def test_a_future_has_the_result_once_it_is_committed(writer: Writer, db: Path) -> None:
    span_id = await writer.submit_span(make_span())
    with Store.open(db) as reader:
        assert reader.get_span(span_id).rollout_id == "r1"
    assert await writer.submit(lambda store: store.create_rollout(rollout_id="r2")[1])
    assert (writer.pending, writer.dropped, writer.last_error) == (0, 0, None)


async def test_jobs_run_in_order_and_in_a_thread_of_their_own(writer: Writer) -> None:
    ran: list[int] = []
    threads: set[int] = set()

    def job(index: int, _: Store) -> None:
        ran.append(index)
        threads.add(threading.get_ident())

    await asyncio.gather(*[writer.submit(partial(job, index)) for index in range(600)])
    assert ran == list(range(600))
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


async def test_what_waits_is_committed_together(writer: Writer) -> None:
    trace: list[str] = []
    await writer.submit(lambda store: store.connection.set_trace_callback(trace.append))
    async with busy(writer):
        trace.clear()
        spans = [writer.submit_span(make_span()) for _ in range(20)]
    await asyncio.gather(*spans)
    assert trace.count("COMMIT") == 2  # of what kept it busy, and of these
    assert not any(statement.startswith("SAVEPOINT") for statement in trace)


async def test_an_exception_fails_only_its_own_future_and_undoes_only_its_own_writes(
    writer: Writer, db: Path
) -> None:
    def broken(store: Store) -> None:
        store.create_rollout(rollout_id="undone")
        raise ZeroDivisionError

    before = writer.submit_span(make_span(rollout_id="before"))
    failing = writer.submit(broken)
    unknown = writer.submit(lambda store: store.add_reward(value=1.0, rollout_id="nobody"))
    impossible = writer.submit_span(make_span(rollout_id="impossible", response=None))
    after = writer.submit_span(make_span(rollout_id="after"))
    with pytest.raises(ZeroDivisionError):
        await failing
    with pytest.raises(UnknownTarget):
        await unknown
    with pytest.raises(StoreError, match="CHECK"):
        await impossible
    assert await before < await after
    assert writer.healthy
    with Store.open(db) as reader:
        assert {each.rollout.rollout_id for each in reader.list_rollouts()} == {"before", "after"}


async def test_a_cancelled_waiter_does_not_stop_the_others(writer: Writer) -> None:
    cancelled, kept = writer.submit_span(make_span()), writer.submit_span(make_span())
    cancelled.cancel()
    await kept
    assert await writer.submit(lambda store: store.stats()["spans"]) == 2


async def test_while_locked_nothing_fails_and_afterwards_all_is_there_in_order(
    writer: Writer, db: Path
) -> None:
    await writer.submit_span(make_span(rollout_id="before"))
    with locked(db):
        spans = [writer.submit_span(make_span(rollout_id=f"r{index:02}")) for index in range(40)]
        reward = writer.submit(lambda store: store.add_reward(value=1.0, rollout_id="r39"))
        await until(lambda: not writer.healthy)
        await asyncio.sleep(0.2)
        assert not any(future.done() for future in spans)
        assert not reward.done()
        assert writer.pending == 41
        assert writer.last_error is not None
        assert "locked" in writer.last_error
        with Store.open(db) as reader:
            assert reader.stats()["spans"] == 1
    ids = await asyncio.gather(*spans)
    await reward
    await until(lambda: writer.healthy)
    assert ids == sorted(ids)
    assert writer.dropped == 0
    with Store.open(db) as reader:
        assert reader.stats()["spans"] == 41


async def test_the_oldest_spans_are_dropped_past_the_limit_and_their_rollouts_marked(
    writer: Writer, db: Path
) -> None:
    await writer.submit_span(make_span(rollout_id="before"))
    with locked(db):
        job = writer.submit(lambda store: store.create_rollout(rollout_id="kept"))
        spans = [writer.submit_span(make_span(rollout_id=f"r{index:02}")) for index in range(60)]
        await until(lambda: not writer.healthy)
        await until(lambda: [n for n, future in enumerate(spans) if future.done()] == list(range(10)))
        assert writer.dropped == 10
        await until(lambda: writer.pending == 51)
    results = await asyncio.gather(*spans, return_exceptions=True)
    assert all(isinstance(result, StoreUnavailable) for result in results[:10])
    assert all(isinstance(result, int) for result in results[10:])
    assert (await job)[1]
    with Store.open(db) as reader:
        marked = {s.rollout.rollout_id for s in reader.list_rollouts() if s.rollout.incomplete is not None}
    assert marked == {f"r{index:02}" for index in range(10)}


async def test_the_oldest_spans_are_dropped_past_the_bytes_that_may_wait(db: Path) -> None:
    writer = Writer(db, busy_timeout_s=0.02, max_pending_bytes=100_000)
    writer.start()
    await writer.submit_span(make_span(rollout_id="before"))
    with locked(db):
        spans = [
            writer.submit_span(make_span(rollout_id=f"r{index}", request=b"x" * 30_000)) for index in range(6)
        ]
        await until(lambda: not writer.healthy)
        await until(lambda: writer.dropped == 3)
        larger = writer.submit_span(make_span(rollout_id="larger", request=b"x" * 200_000))
        await until(lambda: writer.dropped == 6)
    results = await asyncio.gather(*spans, return_exceptions=True)
    assert all(isinstance(result, StoreUnavailable) for result in results)
    assert isinstance(await larger, int), "the newest one is kept, however large"
    await writer.close()
    with Store.open(db) as reader:
        marked = {s.rollout.rollout_id for s in reader.list_rollouts() if s.rollout.incomplete is not None}
    assert marked == {f"r{index}" for index in range(6)}


async def test_a_full_database_keeps_everything_waiting_until_there_is_room(writer: Writer, db: Path) -> None:
    stores: list[Store] = []
    await writer.submit(stores.append)
    connection = stores[0].connection
    await writer.submit_span(make_span(rollout_id="before"))
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages + 30}")
    made = [make_span(rollout_id=f"r{i}", request=os.urandom(10_000)) for i in range(30)]
    async with busy(writer):  # the first ones by themselves would find room
        spans = [writer.submit_span(span) for span in made]
    await until(lambda: not writer.healthy)
    await asyncio.sleep(0.1)
    assert not any(future.done() for future in spans)
    assert writer.last_error is not None
    assert "full" in writer.last_error
    connection.execute("PRAGMA max_page_count=1000000")
    assert len(set(await asyncio.gather(*spans))) == 30
    with Store.open(db) as reader:
        assert reader.stats()["spans"] == 31


async def test_a_file_system_that_takes_no_more_bytes_keeps_everything_waiting(
    writer: Writer, db: Path
) -> None:
    await writer.submit_span(make_span(rollout_id="before"))
    made = [make_span(rollout_id=f"r{i}", request=os.urandom(10_000)) for i in range(20)]
    size = db.with_name(db.name + "-wal").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, hard))
    try:
        async with busy(writer):  # the first ones by themselves would find room
            spans = [writer.submit_span(span) for span in made]
        await until(lambda: not writer.healthy)
        assert not any(future.done() for future in spans)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(set(await asyncio.gather(*spans))) == 20
    assert writer.healthy
    with Store.open(db) as reader:
        assert reader.stats()["spans"] == 21
        assert reader.scalar("PRAGMA integrity_check") == "ok"


async def test_closing_writes_what_waits(db: Path) -> None:
    writer = Writer(db)
    writer.start()
    spans = [writer.submit_span(make_span()) for _ in range(1000)]
    await writer.close()
    assert len({future.result() for future in spans}) == 1000
    assert writer.pending == 0
    await writer.close()
    with pytest.raises(StoreError, match="closed"):
        writer.submit_span(make_span())


async def test_closing_while_locked_ends_and_says_what_is_lost(writer: Writer, db: Path) -> None:
    with locked(db):
        span = writer.submit_span(make_span())
        await writer.close(timeout_s=0.1)
        with pytest.raises(StoreUnavailable, match="locked"):
            await span
    assert writer.dropped == 1


async def test_a_job_that_would_end_the_thread_fails_alone_and_the_writer_goes_on(
    writer: Writer, db: Path
) -> None:
    spans = [writer.submit_span(make_span())]
    fatal = writer.submit(lambda _: sys.exit("on purpose"))
    spans.append(writer.submit_span(make_span()))
    with pytest.raises(StoreUnavailable, match="on purpose"):
        await fatal
    assert len(set(await asyncio.gather(*spans))) == 2
    await until(lambda: writer.healthy)
    assert (writer.dropped, writer.pending) == (0, 0)
    with Store.open(db) as reader:
        assert reader.stats()["spans"] == 2


async def test_a_span_that_would_end_the_thread_is_given_up_and_its_rollout_marked(
    writer: Writer, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Store.write_span

    def write(store: Store, span: Span) -> int:
        if span.rollout_id == "poison":
            raise SystemExit("on purpose")
        return written(store, span)

    monkeypatch.setattr(Store, "write_span", write)
    await writer.submit(lambda store: store.create_rollout(rollout_id="poison"))
    bad, good = (writer.submit_span(make_span(rollout_id=name)) for name in ("poison", "r1"))
    with pytest.raises(StoreUnavailable, match="on purpose"):
        await bad
    await good
    assert writer.dropped == 1
    with Store.open(db) as reader:
        assert "could not be written" in (reader.get_rollout("poison").incomplete or "")
        assert reader.get_rollout("r1").incomplete is None


async def test_a_connection_that_cannot_roll_back_is_replaced_and_nothing_is_lost(
    writer: Writer, db: Path
) -> None:
    await writer.submit_span(make_span(rollout_id="before"))
    times = iter(range(2))

    class Broken:
        """A disk that is away while a transaction is rolled back."""

        def __init__(self, connection: sqlite3.Connection) -> None:
            self._connection = connection

        def __getattr__(self, name: str) -> Any:
            return getattr(self._connection, name)

        def execute(self, sql: str, *values: Any) -> Any:
            if sql == "ROLLBACK":
                raise sqlite3.OperationalError("disk I/O error")
            return self._connection.execute(sql, *values)

    def job(store: Store) -> None:
        if next(times, None) is not None:
            store.connection = Broken(store.connection)  # type: ignore[assignment]
            raise StoreUnavailable("disk I/O error")

    job_done, span = writer.submit(job), writer.submit_span(make_span())
    await job_done
    await span
    with Store.open(db) as reader:
        assert reader.stats()["spans"] == 2


async def test_starting_without_a_database_that_can_be_opened_says_why(db: Path) -> None:
    with pytest.raises(UnknownTarget, match="no database"):
        Writer(db, create=False).start()
    with pytest.raises(StoreError, match="not been started"):
        Writer(db).submit_span(make_span())


def test_a_loop_that_ended_without_closing_does_not_hold_the_process_up(db: Path) -> None:
    script = """
        import asyncio, sys
        from lightning_proxy.store import Writer
        from tests.store.support import make_span

        async def main() -> None:
            writer = Writer(sys.argv[1])
            writer.start()
            for _ in range(500):
                writer.submit_span(make_span())

        asyncio.run(main())
        print("ended")
    """
    assert output_of(start_script(script, db)) == ["ended"]


async def test_two_writers_of_one_file_lose_nothing(db: Path) -> None:
    writers = [Writer(db), Writer(db)]
    for writer in writers:
        writer.start()
    ids: set[int] = set()
    for _ in range(20):
        ids.update(
            await asyncio.gather(*[writer.submit_span(make_span()) for writer in writers for _ in range(5)])
        )
    for writer in writers:
        await writer.close()
    assert len(ids) == 200
