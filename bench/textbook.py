"""The floor: a webhook handler as tutorials write it - FastAPI, SDK verification, ORM, four writes in one commit.

It is here to be compared with, and does what such handlers do: no more.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import stripe
from fastapi import FastAPI, HTTPException, Request
from sqlalchemy import JSON, BigInteger, DateTime, String, Text, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from bench.reading import read_simply

# As many as Tollkeeper's pool has, so that neither is short of connections.
POOL_CONNECTIONS = 10


class Base(DeclarativeBase):
    """The handler's own tables."""


class SeenEvent(Base):
    """An event id that was processed."""

    __tablename__ = "textbook_events"
    event_id: Mapped[str] = mapped_column(String, primary_key=True)
    # As it came: the SDK's own objects hold Decimals, which JSON does not take.
    payload: Mapped[str] = mapped_column(Text)


class Payment(Base):
    """A payment."""

    __tablename__ = "textbook_payments"
    id: Mapped[str] = mapped_column(String, primary_key=True)
    user_id: Mapped[str] = mapped_column(String, index=True)
    amount: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class Entitlement(Base):
    """A user's plan."""

    __tablename__ = "textbook_entitlements"
    user_id: Mapped[str] = mapped_column(String, primary_key=True)
    plan_code: Mapped[str] = mapped_column(String)


class Audit(Base):
    """An audit row."""

    __tablename__ = "textbook_audit"
    id: Mapped[str] = mapped_column(String, primary_key=True)
    action: Mapped[str] = mapped_column(String)
    details: Mapped[dict[str, Any]] = mapped_column(JSON)


async def create_tables(url: str) -> None:
    """Makes the handler's tables in an empty PostgreSQL database; not in the app, whose workers would race for it."""
    engine = create_async_engine(_with_driver(url))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()


def create_app() -> FastAPI:
    """The application; its settings come from the environment."""
    secret = os.environ["STRIPE_WEBHOOK_SECRET"]
    engine: AsyncEngine = create_async_engine(
        _with_driver(os.environ["DATABASE_URL"]), pool_size=POOL_CONNECTIONS, max_overflow=0
    )
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/api/v1/billing/webhooks")
    async def webhook(request: Request) -> dict[str, str]:
        body = await request.body()
        try:
            event = stripe.Webhook.construct_event(
                body, request.headers.get("Stripe-Signature", ""), secret
            ).to_dict()
        except (ValueError, stripe.SignatureVerificationError) as error:
            raise HTTPException(status_code=400) from error
        simple = read_simply(event)
        async with sessions() as session:
            if await session.scalar(select(SeenEvent).where(SeenEvent.event_id == event["id"])):
                return {"status": "duplicate"}
            session.add(SeenEvent(event_id=event["id"], payload=body.decode()))
            session.add(
                Payment(
                    id=str(uuid4()),
                    user_id=simple.user_id,
                    amount=simple.amount,
                    created_at=datetime.now(UTC),
                )
            )
            entitlement = await session.get(Entitlement, simple.user_id)
            if entitlement is None:
                session.add(Entitlement(user_id=simple.user_id, plan_code=simple.plan_code))
            else:
                entitlement.plan_code = simple.plan_code
            session.add(Audit(id=str(uuid4()), action="payment.event", details={"event_id": event["id"]}))
            await session.commit()
        return {"status": "success"}

    return app


def _with_driver(url: str) -> str:
    return url.replace("postgresql://", "postgresql+asyncpg://")
