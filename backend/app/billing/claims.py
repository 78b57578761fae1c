"""Claims: a purchase, or a customer with all of theirs, finds the user it belongs to by a person's word.

Guests pay without saying who they are, so their purchases wait. An admin binds one by hand, or the
seller hands out a signed link that binds it to whoever is logged in when it is opened. Never by an
e-mail address: who typed one in has not shown that it is theirs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from backend.app.billing import store_admin, store_state
from backend.app.billing.apply import Effects
from backend.app.billing.domain.decide import Decision, EntitlementChange
from backend.app.billing.domain.facts import (
    SOURCE_KINDS,
    About,
    ClaimFact,
    CustomerId,
    SubjectId,
    Tie,
    Translation,
    Via,
)
from backend.app.billing.domain.state import State
from backend.app.billing.grants import action_event, record
from backend.app.billing.store_claims import claim_events
from backend.app.billing.webhooks import BillingWebhooks
from backend.app.core.clock import Clock, from_unix, to_unix
from backend.app.core.database import Database, Tx
from backend.app.core.errors import Conflict, InvalidParameters, InvalidRequest, NotFound
from backend.app.core.ids import new_id
from backend.app.core.server_keys import signing_key

# What a person can claim; a grant names its user itself.
CLAIMABLE_KINDS = SOURCE_KINDS - {"grant"}
# Long enough for an e-mail to be read after a holiday week, short enough that a forgotten one is no risk.
LINK_DAYS_DEFAULT = 7
LINK_DAYS_MAX = 30
# An account's and a source's id of 255 characters each, an expiry, a UUID and a signature, in base64.
TOKEN_CHARACTERS_MAX = 1_024
CLAIM_LINKS = "claim-links"
# The smallest step of time that every store keeps.
ONE_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is claimed, for whom and why: a source, or a customer with all that is theirs.

    `may_move`: also what belongs to another user now.
    """

    user_id: str
    source: SubjectId | None = None
    customer: CustomerId | None = None
    reason: str
    may_move: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What a claim came to: the sources that are the user's by it, whose they were, and what changed for whom."""

    wanted: Wanted
    sources: tuple[SubjectId, ...]
    moved_from: tuple[str, ...]
    changes: tuple[EntitlementChange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimLink:
    """A signed link's token, and when it ends."""

    token: str
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sealed:
    """What a token says."""

    link_id: str
    source: SubjectId
    expires_at: datetime


class Claims:
    """Binds the purchases of one deployment to users."""

    def __init__(
        self, *, database: Database, webhooks: BillingWebhooks, clock: Clock, livemode: bool
    ) -> None:
        self._database = database
        self._webhooks = webhooks
        self._clock = clock
        self._livemode = livemode

    def source(self, key: str, account: str) -> SubjectId:
        """The name of a source; InvalidParameters where the key is of no kind that can be claimed."""
        source = SubjectId(account, self._livemode, key)
        if source.kind not in CLAIMABLE_KINDS or not source.object_id:
            kinds = ", ".join(sorted(CLAIMABLE_KINDS))
            raise InvalidParameters.named(
                "body", "source", message=f"<kind>:<id> is expected, with one of the kinds {kinds}"
            )
        return source

    def customer(self, customer_id: str, account: str) -> CustomerId:
        """The name of a customer."""
        return CustomerId(account, self._livemode, customer_id)

    async def claim(self, wanted: Wanted, *, actor: str, action_id: str) -> Claimed:
        """Binds what is wanted, with all that waited for it, in one transaction.

        `action_id` is the same each time one wish is carried out again.

        Raises:
            NotFound: nothing was ever heard of the source.
            Conflict: it belongs to another user, and `may_move` was not said.
        """
        effects = Effects(actor=actor)
        async with self._database.transaction() as tx:
            claimed = await self._bind(tx, wanted, effects, action_id=action_id)
        self._webhooks.count(effects)
        return claimed

    async def create_link(self, source: SubjectId, *, days: int, actor: str) -> ClaimLink:
        """A link by which the user who opens it gets a source.

        Raises:
            NotFound: nothing was ever heard of the source.
            Conflict: it has its user already.
        """
        effects = Effects(actor=actor)
        now = self._clock.now()
        # Whole seconds, because the token says it so.
        expires_at = from_unix(to_unix(now + timedelta(days=days)))
        link_id = new_id()
        async with self._database.transaction() as tx:
            state = await _locked(tx, source, None, None)
            if state.sources[source].user_id is not None:
                raise Conflict("It belongs to a user already.")
            key = await signing_key(tx, CLAIM_LINKS, now=now)
            await record(
                tx,
                effects,
                action_event(
                    "claim_link.created", link_id, livemode=source.livemode, at=now, account=source.account
                ),
                user_id=None,
                resource=("source", source.key),
                details={"account": source.account, "expires_at": expires_at.isoformat()},
                now=now,
            )
        self._webhooks.count(effects)
        sealed = _Sealed(link_id=link_id, source=source, expires_at=expires_at)
        return ClaimLink(token=_token(sealed, key), expires_at=expires_at)

    async def claim_by_link(self, token: str, user_id: str, *, actor: str) -> Claimed:
        """Binds a link's source to the user; the same user may send it again, and nothing more happens.

        Raises:
            InvalidRequest: the link is not one of ours, or too old.
            Conflict: another user has used it, or has the source by now.
        """
        effects = Effects(actor=actor)
        now = self._clock.now()
        async with self._database.transaction() as tx:
            sealed = _opened(token, await signing_key(tx, CLAIM_LINKS, now=now))
            if now >= sealed.expires_at:
                raise InvalidRequest("The claim link has expired.")
            if await store_admin.use_claim_link(tx, sealed.link_id, user_id, now=now) != user_id:
                raise Conflict("The claim link was used already.")
            wanted = Wanted(user_id=user_id, source=sealed.source, reason=f"claim link {sealed.link_id}")
            claimed = await self._bind(tx, wanted, effects, action_id=sealed.link_id)
        self._webhooks.count(effects)
        return claimed

    async def _bind(self, tx: Tx, wanted: Wanted, effects: Effects, *, action_id: str) -> Claimed:
        now = self._clock.now()
        account = (wanted.source or wanted.customer or ("",))[0]
        event = action_event("claim.made", action_id, livemode=self._livemode, at=now, account=account)
        is_first = bool(await claim_events(tx, [event.key], now=now))
        if not is_first:
            # An earlier attempt of the same action has done it; since then it may have been moved.
            state = await _locked(tx, wanted.source, wanted.customer, wanted.user_id)
            if _other_owners(state, wanted):
                raise Conflict("It belongs to another user by now.")
            return _claimed(wanted, state, ())
        state = await _locked(tx, wanted.source, wanted.customer, wanted.user_id)
        others = _other_owners(state, wanted)
        if others and not wanted.may_move:
            raise Conflict(
                f"It belongs to another user ({', '.join(others)}); say `move` to take it from there."
            )
        # The newest word holds, so it must be newer than those before it, whatever the workers' clocks say.
        latest = await store_admin.newest_claim_at(tx, _sources_of(state, wanted), wanted.customer)
        as_of = now if latest is None else max(now, latest + ONE_MICROSECOND)
        event = action_event("claim.made", action_id, livemode=self._livemode, at=as_of, account=account)
        fact = ClaimFact(
            event_id=event.id,
            event_type=event.type,
            as_of=as_of,
            user_id=wanted.user_id,
            actor=effects.actor or "",
            reason=wanted.reason,
        )
        decision = await self._webhooks.apply(tx, event, _translation(state, wanted, fact), effects)
        await record(
            tx,
            effects,
            event,
            user_id=wanted.user_id,
            resource=_resource(wanted),
            details={"account": account, "reason": wanted.reason, "moved_from": others},
            now=now,
        )
        return _claimed(wanted, state, others, decision)


def _sources_of(state: State, wanted: Wanted) -> list[SubjectId]:
    """The sources that are claimed: the one, or all of the customer's."""
    if wanted.customer is not None:
        return _sources_of_customer(state, wanted.customer)
    assert wanted.source is not None, "either a source or a customer is claimed"
    return [wanted.source]


def _sources_of_customer(state: State, customer: CustomerId) -> list[SubjectId]:
    return sorted(
        source_id
        for source_id, owned in state.sources.items()
        if owned.customer_id is not None
        and CustomerId(source_id.account, source_id.livemode, owned.customer_id) == customer
    )


def _other_owners(state: State, wanted: Wanted) -> list[str]:
    """The other users that something of what is wanted belongs to."""
    owners = {state.sources[source_id].user_id for source_id in _sources_of(state, wanted)}
    if wanted.customer is not None:
        owners.add(state.user_of_customer(wanted.customer))
    return sorted(owner for owner in owners if owner is not None and owner != wanted.user_id)


def _translation(state: State, wanted: Wanted, fact: ClaimFact) -> Translation:
    if wanted.customer is None:
        assert wanted.source is not None, "either a source or a customer is claimed"
        key = wanted.source.key
        return Translation(subject=key, facts=(About(key=key, fact=fact),))
    # A source that names another user itself follows the customer only by a word of its own.
    named = [
        source_id
        for source_id in _sources_of(state, wanted)
        if state.sources[source_id].user_id not in (None, wanted.user_id)
    ]
    return Translation(
        customer_id=wanted.customer.id,
        facts=(
            # Of several words about a customer the tie keeps the newest only; here each of them stays.
            About(key=f"cus:{wanted.customer.id}", fact=replace(fact, is_of_customer=True)),
            *(About(key=source_id.key, fact=fact) for source_id in named),
        ),
        ties=(
            Tie(
                customer_id=wanted.customer.id,
                user_id=wanted.user_id,
                via=Via.ADMIN,
                occurred_at=fact.as_of,
                event_id=fact.event_id,
            ),
        ),
    )


async def _locked(
    tx: Tx, source: SubjectId | None, customer: CustomerId | None, user_id: str | None
) -> State:
    """What is claimed and whom it concerns, held until the transaction ends; NotFound for an unheard-of source."""
    named = store_state.Parties(
        subjects=frozenset({source} if source else ()),
        customers=frozenset({customer} if customer else ()),
        users=frozenset({user_id} if user_id is not None else ()),
    )
    if customer is not None:
        # All locks are taken at once, and a claim may concern each of the customer's sources.
        seen = await store_state.load_state(tx, await store_state.load_parties(tx, named))
        named = replace(named, subjects=frozenset(_sources_of_customer(seen, customer)))
    state, _ = await store_state.load_locked(tx, named)
    if source is not None and source not in state.sources:
        raise NotFound("Nothing was ever heard of this source.")
    return state


def _claimed(
    wanted: Wanted, state: State, moved_from: Iterable[str], decision: Decision | None = None
) -> Claimed:
    return Claimed(
        wanted=wanted,
        sources=tuple(_sources_of(state, wanted)),
        moved_from=tuple(moved_from),
        changes=decision.changes if decision else (),
    )


def _resource(wanted: Wanted) -> tuple[str, str]:
    if wanted.customer is not None:
        return "customer", wanted.customer.id
    assert wanted.source is not None, "either a source or a customer is claimed"
    return "source", wanted.source.key


def _token(sealed: _Sealed, key: bytes) -> str:
    """`<what it says>.<its HMAC-SHA256>`, both base64url without padding."""
    said = json.dumps(
        [
            sealed.link_id,
            sealed.source.account,
            sealed.source.livemode,
            sealed.source.key,
            to_unix(sealed.expires_at),
        ],
        separators=(",", ":"),
    ).encode("ascii")
    return f"{_base64(said)}.{_base64(hmac.digest(key, said, hashlib.sha256))}"


def _opened(token: str, key: bytes) -> _Sealed:
    """What a genuine token says; InvalidRequest for any other."""
    refusal = InvalidRequest("The claim link is not genuine.")
    said_text, _, signature_text = token.partition(".")
    try:
        said, signature = _bytes(said_text), _bytes(signature_text)
    except (ValueError, binascii.Error) as error:
        raise refusal from error
    # Signed first, read second: only what we wrote is parsed.
    if not hmac.compare_digest(hmac.digest(key, said, hashlib.sha256), signature):
        raise refusal
    link_id, account, livemode, source_key, expires_unix = json.loads(said)
    return _Sealed(
        link_id=link_id,
        source=SubjectId(account, livemode, source_key),
        expires_at=from_unix(expires_unix),
    )


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _bytes(text: str) -> bytes:
    encoded = text.encode("ascii")
    return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
