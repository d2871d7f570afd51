"""Policies and their versions: which weights there are, and which of them serve.

A version that has not served yet follows its parent and nothing else. So one that was made while another
took over (an operator's rollback, another trainer's version) neither undoes that nor is undone by it.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import orjson

from lightning_proxy.errors import Conflict, UnknownTarget
from lightning_proxy.store.connection import Connection
from lightning_proxy.store.records import PolicyVersion, RunState, VersionStatus
from lightning_proxy.store.rollouts import encode


class Policies(Connection):
    """The policies' part of the store."""

    def add_base_version(self, policy: str, path: str | Path) -> PolicyVersion:
        """Enter what the user brought as version 0, active; or give back the version 0 that is there.

        Raises ``Conflict`` where version 0 lies elsewhere.
        """
        with self.transaction():
            if not self.list_versions(policy):
                base = PolicyVersion(policy, 0, str(path), VersionStatus.ACTIVE, created_at=time.time())
                self.insert_version(base)
            present = self.get_version(policy, 0)
            if present.path != str(path):
                raise Conflict(
                    f"policy {policy!r} began with the weights in {present.path}, not in {path}: "
                    "give the new weights a policy name of their own, or start a new database"
                )
            return present

    def get_version(self, policy: str, version: int) -> PolicyVersion:
        """One version. Raises ``UnknownTarget``."""
        row = self.row("SELECT * FROM policy_versions WHERE policy = ? AND version = ?", (policy, version))
        if row is None:
            raise UnknownTarget(f"no version {version} of the policy {policy!r}")
        return _version_from(row)

    def list_versions(self, policy: str | None = None) -> list[PolicyVersion]:
        """Versions of one policy or of all, newest first, policy by policy."""
        where, parameters = ("WHERE policy = ?", (policy,)) if policy is not None else ("", ())
        rows = self.rows(f"SELECT * FROM policy_versions {where} ORDER BY policy, version DESC", parameters)
        return [_version_from(row) for row in rows]

    def active_version(self, policy: str) -> PolicyVersion | None:
        """The version that serves."""
        return self._newest(policy, VersionStatus.ACTIVE)

    def staged_version(self, policy: str) -> PolicyVersion | None:
        """The newest version that was made and has not taken over yet."""
        return self._newest(policy, VersionStatus.STAGED)

    def next_version(self, policy: str) -> int:
        """The number of the version to be made next."""
        sql = "SELECT coalesce(max(version) + 1, 0) FROM policy_versions WHERE policy = ?"
        return int(self.scalar(sql, (policy,)))

    def activate_version(self, policy: str, version: int, note: str | None = None) -> PolicyVersion:
        """Let a version serve; the former one is retired, with ``note`` as the reason.

        Raises ``UnknownTarget``; ``Conflict`` for a rejected one, and for a staged one whose parent no
        longer serves.
        """
        with self.transaction():
            present = self.get_version(policy, version)
            self.expect_may_serve(present)
            if present.status is VersionStatus.ACTIVE:
                return present
            self.connection.execute(
                "UPDATE policy_versions SET status = 'retired', note = ? "
                "WHERE policy = ? AND status = 'active'",
                (note, policy),
            )
            self.connection.execute(
                "UPDATE policy_versions SET status = 'active', note = NULL WHERE policy = ? AND version = ?",
                (policy, version),
            )
            return self.get_version(policy, version)

    def expect_may_serve(self, version: PolicyVersion) -> None:
        """Raise ``Conflict`` for a rejected version, and for a staged one whose parent no longer serves."""
        if version.status is VersionStatus.REJECTED:
            note = version.note or "no reason given"
            raise Conflict(f"version {version.version} of {version.policy!r} was rejected: {note}")
        if version.status is VersionStatus.STAGED:
            self._expect_in_line(version)

    def reject_if_out_of_line(self, policy: str, version: int) -> PolicyVersion:
        """The version as it is now; rejected first, where it is staged and its parent no longer serves.

        Raises ``UnknownTarget``.
        """
        present = self.get_version(policy, version)
        if present.status is not VersionStatus.STAGED or self._out_of_line(present) is None:
            return present  # nothing is written, so a locked database is none in the way
        with self.transaction():
            present = self.get_version(policy, version)
            if present.status is VersionStatus.STAGED and (why := self._out_of_line(present)) is not None:
                self.withdraw_version(policy, version, why)
            return self.get_version(policy, version)

    def withdraw_version(self, policy: str, version: int, note: str) -> None:
        """Reject a version for nothing that lies in itself: another like it may be made of the same.

        So its run forgets the name of its work, by which repetitions are known. Raises as
        :meth:`reject_version`.
        """
        with self.transaction():
            self.reject_version(policy, version, note)
            self.connection.execute(
                "UPDATE training_runs SET report = json_remove(report, '$.work') WHERE run_id = ?",
                (self.get_version(policy, version).run_id,),
            )

    def reject_version(self, policy: str, version: int, note: str) -> None:
        """Refuse a version that has not served, and give back all that its training run drained.

        Rejecting it again changes nothing. Raises ``UnknownTarget``, ``Conflict`` for one that has served.
        """
        with self.transaction():
            present = self.get_version(policy, version)
            if present.status is VersionStatus.REJECTED:
                return
            if present.status not in (VersionStatus.STAGED, VersionStatus.CANARY):
                raise Conflict(
                    f"version {version} of {policy!r} is {present.status.value}: only one that has not taken "
                    "over can be rejected; roll back instead"
                )
            self.connection.execute(
                "UPDATE policy_versions SET status = 'rejected', note = ? WHERE policy = ? AND version = ?",
                (note, policy, version),
            )
            self.connection.execute(
                "UPDATE training_runs SET state = ?, error = ? WHERE run_id = ? AND state = ?",
                (
                    RunState.FAILED.value,
                    f"version {version} was rejected: {note}",
                    present.run_id,
                    RunState.COMMITTED.value,
                ),
            )

    def stage_version(self, version: PolicyVersion) -> None:
        """Enter a version that is to follow its parent, in the caller's transaction.

        Raises ``Conflict`` where its parent no longer serves, where another version is staged already, or
        where its number is taken.
        """
        self._expect_in_line(version)
        if (other := self.staged_version(version.policy)) is not None:
            raise Conflict(
                f"version {other.version} of {version.policy!r} was staged meanwhile: version "
                f"{version.version} would take its place, or be lost"
            )
        self.insert_version(replace(version, status=VersionStatus.STAGED))

    def insert_version(self, version: PolicyVersion) -> None:
        """Enter a new version, in the caller's transaction. Raises ``Conflict`` if its number is taken."""
        taken = "SELECT 1 FROM policy_versions WHERE policy = ? AND version = ?"
        if self.rows(taken, (version.policy, version.version)):
            raise Conflict(f"policy {version.policy!r} already has a version {version.version}")
        self.connection.execute(
            "INSERT INTO policy_versions "
            "(policy, version, path, status, created_at, parent, run_id, probe, note) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                version.policy,
                version.version,
                version.path,
                version.status.value,
                version.created_at or time.time(),
                version.parent,
                version.run_id,
                None if version.probe is None else encode(version.probe),
                version.note,
            ),
        )

    def _expect_in_line(self, version: PolicyVersion) -> None:
        if (why := self._out_of_line(version)) is not None:
            raise Conflict(f"version {version.version} of {version.policy!r} cannot take over: {why}")

    def _out_of_line(self, version: PolicyVersion) -> str | None:
        """Why the version cannot be the next to serve; ``None`` where its parent serves."""
        active = self.active_version(version.policy)
        if (None if active is None else active.version) == version.parent:
            return None
        made_from = "no other version" if version.parent is None else f"version {version.parent}"
        serves = "none serves" if active is None else f"version {active.version} serves now"
        return f"it was made from {made_from}, but {serves}"

    def _newest(self, policy: str, status: VersionStatus) -> PolicyVersion | None:
        row = self.row(
            "SELECT * FROM policy_versions WHERE policy = ? AND status = ? ORDER BY version DESC LIMIT 1",
            (policy, status.value),
        )
        return None if row is None else _version_from(row)


def _version_from(row: sqlite3.Row) -> PolicyVersion:
    values = dict(row)
    values["status"] = VersionStatus(values["status"])
    values["probe"] = None if values["probe"] is None else orjson.loads(values["probe"])
    return PolicyVersion(**values)
