"""Where idempotency records are kept: in memory, in the database, in Redis; all three behave alike."""

from backend.app.core.idempotency_stores.memory import MemoryStore
from backend.app.core.idempotency_stores.record import Answer, IdempotencyStore, Record, RecordKey, State
from backend.app.core.idempotency_stores.redis_store import RedisStore
from backend.app.core.idempotency_stores.sql import SqlStore

__all__ = [
    "Answer",
    "IdempotencyStore",
    "MemoryStore",
    "Record",
    "RecordKey",
    "RedisStore",
    "SqlStore",
    "State",
]
