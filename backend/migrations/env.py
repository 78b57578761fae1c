"""Alembic's entry: runs migrations on the connection that `core/migrations.py` hands over."""

from alembic import context

from backend.app.audit import models as audit_models
from backend.app.billing import models as billing_models
from backend.app.core import api_keys, idempotency, server_keys
from backend.app.core.database import metadata
from backend.app.ops import outbox

# Imported for their tables; named so that nobody takes the imports for leftovers.
TABLE_MODULES = (audit_models, billing_models, api_keys, idempotency, server_keys, outbox)

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
