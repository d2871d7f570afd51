"""Which try a span is, and by which digest its conversation is found again."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations


@migrations()
def retries_and_conversations(db: Database) -> None:
    """Which try a span is, and by which digest its conversation is found again."""
    db.execute("ALTER TABLE spans ADD COLUMN retry INTEGER NOT NULL DEFAULT 0")
    db.execute("ALTER TABLE spans ADD COLUMN conversation BLOB")  # 16 bytes; see proxy/conversation.py
    db.execute("CREATE INDEX spans_by_conversation ON spans (conversation) WHERE conversation IS NOT NULL")
