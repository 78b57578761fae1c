"""Idempotency records in Redis or Valkey: fast, and for memories that may be lost without harm.

Each method is one Lua script and so one round trip. A flush, an eviction or a failover forgets
records; work that must never happen twice belongs into SqlStore.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from backend.app.core.errors import Unavailable
from backend.app.core.idempotency_stores.record import Answer, Record, RecordKey, State

_PREFIX = "tollkeeper:idempotency:"

# Leases go by the server's clock: the workers' clocks differ. `show` is every script's reply.
_COMMON = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local function integer(number) return string.format('%.0f', number) end
local function show()
  return {integer(now_ms), redis.call('HMGET', KEYS[1], 'operation', 'caller', 'key', 'fingerprint', 'state',
    'record_id', 'token', 'lease_until_ms', 'status', 'headers', 'body')}
end
local function is_held(token)
  local found = redis.call('HMGET', KEYS[1], 'token', 'state', 'lease_until_ms')
  return found[1] == token and found[2] == 'in_progress' and tonumber(found[3]) > now_ms
end
"""

_CLAIM = (
    _COMMON
    + """
local operation, caller, key, fingerprint, token = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local lease_ms, ttl_ms = tonumber(ARGV[6]), tonumber(ARGV[7])
local found = redis.call('HMGET', KEYS[1], 'state', 'fingerprint', 'lease_until_ms')
if not found[1] then
  redis.call('HSET', KEYS[1], 'operation', operation, 'caller', caller, 'key', key,
    'fingerprint', fingerprint, 'record_id', token)
elseif found[1] == 'completed' or found[2] ~= fingerprint or tonumber(found[3]) > now_ms then
  return show()
end
redis.call('HSET', KEYS[1], 'state', 'in_progress', 'token', token,
  'lease_until_ms', integer(now_ms + lease_ms))
redis.call('PEXPIRE', KEYS[1], integer(lease_ms + ttl_ms))
return show()
"""
)

_COMPLETE = (
    _COMMON
    + """
if not is_held(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'state', 'completed', 'status', ARGV[2], 'headers', ARGV[3], 'body', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return 1
"""
)

_MARK_AMBIGUOUS = (
    _COMMON
    + """
if not is_held(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'state', 'ambiguous')
return 1
"""
)

_RELEASE = (
    _COMMON
    + """
if not is_held(ARGV[1]) then return 0 end
return redis.call('DEL', KEYS[1])
"""
)

_READ = _COMMON + "return show()"

_REMEMBER = (
    _COMMON
    + """
local operation, caller, key, fingerprint, token = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'operation', operation, 'caller', caller, 'key', key, 'fingerprint', fingerprint,
    'record_id', token, 'token', token, 'state', 'completed', 'lease_until_ms', integer(now_ms),
    'status', ARGV[6], 'headers', ARGV[7], 'body', ARGV[8])
  redis.call('PEXPIRE', KEYS[1], ARGV[9])
end
return show()
"""
)


class RedisStore:
    """An IdempotencyStore in Redis >= 7 or Valkey >= 8; the client must hand out bytes and have its time-outs set."""

    def __init__(self, client: Redis) -> None:
        if client.connection_pool.connection_kwargs.get("decode_responses"):
            raise ValueError("RedisStore keeps bytes; build its client without decode_responses")
        self._claim = client.register_script(_CLAIM)
        self._complete = client.register_script(_COMPLETE)
        self._mark_ambiguous = client.register_script(_MARK_AMBIGUOUS)
        self._release = client.register_script(_RELEASE)
        self._read = client.register_script(_READ)
        self._remember = client.register_script(_REMEMBER)

    async def claim(
        self, key: RecordKey, fingerprint: str, token: str, *, lease_seconds: float, ttl_seconds: float
    ) -> Record:
        """See IdempotencyStore."""
        reply = await _run(
            self._claim,
            key,
            *(key.operation, key.caller, key.key, fingerprint, token),
            *(_ms(lease_seconds), _ms(ttl_seconds)),
        )
        return _record(reply)

    async def complete(self, key: RecordKey, token: str, answer: Answer, *, ttl_seconds: float) -> bool:
        """See IdempotencyStore."""
        reply = await _run(self._complete, key, token, *_answer_fields(answer), _ms(ttl_seconds))
        return bool(reply)

    async def mark_ambiguous(self, key: RecordKey, token: str) -> bool:
        """See IdempotencyStore."""
        return bool(await _run(self._mark_ambiguous, key, token))

    async def release(self, key: RecordKey, token: str) -> bool:
        """See IdempotencyStore."""
        return bool(await _run(self._release, key, token))

    async def read(self, key: RecordKey) -> Record | None:
        """See IdempotencyStore."""
        reply = await _run(self._read, key)
        is_absent = reply[1][0] is None
        return None if is_absent else _record(reply)

    async def remember(
        self, key: RecordKey, fingerprint: str, token: str, answer: Answer, *, ttl_seconds: float
    ) -> Record:
        """See IdempotencyStore."""
        reply = await _run(
            self._remember,
            key,
            *(key.operation, key.caller, key.key, fingerprint, token),
            *(*_answer_fields(answer), _ms(ttl_seconds)),
        )
        return _record(reply)


async def _run(script: Any, key: RecordKey, *arguments: str | bytes | int) -> Any:
    # Hashed, because any separator could also occur in a caller's id or key.
    parts = json.dumps([key.operation, key.caller, key.key]).encode()
    name = _PREFIX + hashlib.sha256(parts).hexdigest()
    with _redis_errors():
        return await script(keys=[name], args=list(arguments))


@contextlib.contextmanager
def _redis_errors() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise Unavailable from error


def _ms(seconds: float) -> int:
    # At least one: PEXPIRE with zero deletes at once.
    return max(1, round(seconds * 1000))


def _answer_fields(answer: Answer) -> tuple[int, str, bytes]:
    return answer.status, json.dumps(answer.headers), answer.body


def _record(reply: Any) -> Record:
    now_ms, fields = reply
    operation, caller, key, fingerprint, state, record_id, token, lease_until_ms, status, headers, body = (
        fields
    )
    answer = None
    if status is not None:
        answer = Answer(int(status), body, tuple((name, value) for name, value in json.loads(headers)))
    return Record(
        key=RecordKey(operation.decode(), caller.decode(), key.decode()),
        fingerprint=fingerprint.decode(),
        state=State(state.decode()),
        record_id=record_id.decode(),
        token=token.decode(),
        lease_seconds_left=(int(lease_until_ms) - int(now_ms)) / 1000,
        answer=answer,
    )
