"""The store: one class, whose parts are told room by room in the files beside this one."""

from __future__ import annotations

from lightning_proxy.store.claims import Claims
from lightning_proxy.store.comparison import Comparisons
from lightning_proxy.store.judgements import Judgements
from lightning_proxy.store.records import Rollout, RolloutSummary
from lightning_proxy.store.rollouts import rollout_from
from lightning_proxy.words import RolloutState

_SUMMARIES = """
SELECT r.*,
  (SELECT count(*) FROM attempts AS a WHERE a.rollout_id = r.rollout_id) AS attempts,
  (SELECT max(number) FROM attempts AS a WHERE a.rollout_id = r.rollout_id) AS last_attempt,
  (SELECT count(*) FROM spans AS s WHERE s.rollout_id = r.rollout_id) AS spans,
  (SELECT count(error_class) FROM spans AS s WHERE s.rollout_id = r.rollout_id) AS errors,
  (SELECT max(ended_at) FROM spans AS s WHERE s.rollout_id = r.rollout_id) AS last_span_at
FROM rollouts AS r WHERE {where} ORDER BY r.created_at DESC, r.rollout_id DESC LIMIT ?"""

_STATS = """
SELECT
  (SELECT count(*) FROM rollouts) AS rollouts,
  (SELECT count(*) FROM rollouts WHERE state = 'open') AS rollouts_open,
  (SELECT count(*) FROM rollouts WHERE incomplete IS NOT NULL) AS rollouts_incomplete,
  (SELECT count(*) FROM spans) AS spans,
  (SELECT count(*) FROM spans WHERE error_class IS NOT NULL) AS spans_failed,
  (SELECT count(*) FROM spans) - (SELECT count(*) FROM spans WHERE fidelity <> 'exact') AS spans_exact,
  (SELECT count(*) FROM rewards) AS rewards,
  (SELECT count(*) FROM training_runs) AS runs,
  (SELECT count(*) FROM training_runs WHERE state = 'committed') AS runs_committed,
  (SELECT count(*) FROM policy_versions) AS versions,
  (SELECT coalesce(max(ended_at), 0.0) FROM spans
   WHERE span_id = (SELECT max(span_id) FROM spans)) AS last_span_at"""


class Store(Judgements, Comparisons, Claims):
    """Everything that is recorded, in one SQLite file; see :meth:`Connection.open`.

    Synchronous, for one thread at a time; several processes may each have one open. Every method
    that writes does so in one transaction, or in the caller's where one has begun. Any method may
    raise ``StoreUnavailable``.
    """

    def list_rollouts(
        self,
        *,
        state: RolloutState | None = None,
        task_id: str | None = None,
        limit: int = 100,
        before: float | None = None,
    ) -> list[RolloutSummary]:
        """Rollouts, newest first; ``before`` is the ``created_at`` to go on from."""
        wanted = {"r.state = ?": state and state.value, "r.task_id = ?": task_id, "r.created_at < ?": before}
        where = " AND ".join(clause for clause, value in wanted.items() if value is not None) or "1"
        values = [value for value in wanted.values() if value is not None]
        summaries = []
        for row in self.rows(_SUMMARIES.format(where=where), (*values, limit)):
            rewards = self.counting_rewards_of_attempt(row["rollout_id"], row["last_attempt"] or 1)
            summaries.append(
                RolloutSummary(
                    rollout=rollout_from(row),
                    attempts=row["attempts"],
                    spans=row["spans"],
                    errors=row["errors"],
                    reward=self.rule.return_of(rewards),
                    last_span_at=row["last_span_at"],
                )
            )
        return summaries

    def rollouts_after(
        self,
        after: tuple[float, str] | None,
        *,
        since: float | None = None,
        until: float | None = None,
        limit: int = 100,
    ) -> list[Rollout]:
        """Rollouts, oldest first; ``after`` is the ``(created_at, rollout_id)`` to go on from."""
        wanted = {
            "(created_at, rollout_id) > (?, ?)": after or (),
            "created_at >= ?": () if since is None else (since,),
            "created_at < ?": () if until is None else (until,),
        }
        where = " AND ".join(clause for clause, values in wanted.items() if values) or "1"
        parameters = [value for values in wanted.values() for value in values]
        sql = f"SELECT * FROM rollouts WHERE {where} ORDER BY created_at, rollout_id LIMIT ?"
        return [rollout_from(row) for row in self.rows(sql, (*parameters, limit))]

    def stats(self) -> dict[str, int | float]:
        """Counts of everything, the Unix time of the newest span's end (0.0: none) and the file's bytes."""
        counts: dict[str, int | float] = dict(self.rows(_STATS)[0])
        counts["bytes"] = self.scalar("PRAGMA page_count") * self.scalar("PRAGMA page_size")
        return counts
