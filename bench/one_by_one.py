"""Tollkeeper without group commit, to be compared with: `serve`, but each event has a transaction of its own."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from backend.app.billing import webhooks
from backend.app.billing.committer import Committer
from backend.app.cli import main
from backend.app.core.database import POOL_CONNECTIONS_MAX


def one_by_one(
    work: Callable[[Sequence[Any]], Coroutine[Any, Any, Sequence[Any]]], *, lanes: int
) -> Committer[Any, Any]:
    """A committer whose batches are of one; side by side run as many as there are connections, whatever `lanes` says."""
    del lanes
    return Committer(work, lanes=POOL_CONNECTIONS_MAX, batch_items_max=1)


if __name__ == "__main__":
    webhooks.Committer = one_by_one  # type: ignore[assignment,attr-defined]  # in place of the class, for this process
    main()
