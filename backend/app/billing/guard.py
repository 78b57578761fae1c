"""A door in the seller's own FastAPI application that opens only for who has an entitlement.

guard = EntitlementGuard(entitlements, user_id=signed_in_user)

@app.post("/copy-trades", dependencies=[Depends(guard.require_entitlement("copy_trading"))])
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends

from backend.app.billing.domain.catalog import Feature, FeatureType
from backend.app.billing.domain.facts import FeatureValue
from backend.app.billing.entitlements import EntitlementService, FeatureCheck
from backend.app.core.errors import Forbidden


class EntitlementMissing(Forbidden):
    """The user's plan does not include this."""

    slug, title = "entitlement-missing", "Not included in the plan"


class EntitlementGuard:
    """Makes dependencies that let a request through, or refuse it with 403.

    `user_id` is the application's own dependency: who is signed in. It is the application that refuses
    strangers; the guard never reads an id from the request itself.
    """

    def __init__(self, entitlements: EntitlementService, *, user_id: Callable[..., Any]) -> None:
        self._entitlements = entitlements
        self._user_id = user_id

    def require_entitlement(
        self, key: str, *, at_least: FeatureValue | None = None
    ) -> Callable[..., Awaitable[FeatureCheck]]:
        """A dependency that gives the feature's check to the handler.

        It passes what is granted (docs/feature-checks.md), or with `at_least` a limit of that size or a
        level of that rank. At request time it raises EntitlementMissing (403), and StoreUnavailable (503)
        where nobody can tell: an outage is no denial.

        Raises:
            ValueError: at once, for a feature or a level that the catalog does not have, so that a misspelt
                one fails at start and not with the first customer.
        """
        feature = self._entitlements.catalog.features.get(key)
        if feature is None:
            raise ValueError(f"the catalog has no feature {key!r}")
        if at_least is not None and (feature.type is FeatureType.BOOLEAN or not feature.fits(at_least)):
            raise ValueError(f"{key}: {at_least!r} is no value to compare with")

        async def check_entitlement(user_id: str = Depends(self._user_id)) -> FeatureCheck:
            check = await self._entitlements.check(user_id, key)
            enough = check.granted if at_least is None else _reaches(feature, check.value, at_least)
            if not enough:
                raise EntitlementMissing
            return check

        return check_entitlement


def _reaches(feature: Feature, value: FeatureValue, at_least: FeatureValue) -> bool:
    if feature.type is FeatureType.LEVEL:
        return feature.levels.index(str(value)) >= feature.levels.index(str(at_least))
    return int(value) >= int(at_least)
