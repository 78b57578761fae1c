"""The service's settings: environment variables, each also readable from the file that NAME_FILE points to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

# Stripe sends an event again for days, and tells of it for 30: a body that goes earlier could still be asked for.
RETENTION_MONTHS_MIN = 1
# A century; what is to be kept for ever is kept by not running the command.
RETENTION_MONTHS_MAX = 1_200


class NameFileSource(PydanticBaseSettingsSource):
    """Reads `NAME` from the file that the environment variable `NAME_FILE` names, without its final newline."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The file's text for one setting, or None where no file is named."""
        path = os.environ.get(f"{field_name.upper()}_FILE")
        if not path:
            return None, field_name, False
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{field_name.upper()}_FILE: can't read {path}: {error.strerror}") from error
        except UnicodeDecodeError:
            # Without its cause, which holds the file's content.
            raise ValueError(f"{field_name.upper()}_FILE: not UTF-8") from None
        return text.rstrip("\r\n"), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Every setting that a file provides."""
        values: dict[str, Any] = {}
        for name, field in self.settings_cls.model_fields.items():
            value, _, _ = self.get_field_value(field, name)
            if value is not None:
                values[name] = value
        return values


class Settings(BaseSettings):
    """All settings, checked once at start; the field's description is its line in docs/settings.md."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=False)

    database_url: str = Field(
        "sqlite:///./tollkeeper.db",
        description="Where everything is kept: `sqlite:///path` or `postgresql://...`.",
    )
    redis_url: str | None = Field(None, description="Optional fast path; the service is correct without it.")
    stripe_webhook_secret: SecretStr = Field(
        SecretStr(""),
        description=(
            "One or more `whsec_...`, comma separated, each optionally `name=whsec_...`. "
            "`serve` refuses to start without one. From a file it is read again when the file changes."
        ),
    )
    stripe_secret_key: SecretStr = Field(
        SecretStr(""),
        description="Reads against Stripe (`sk_...` or `rk_...`): settles what events alone leave open. Optional.",
    )
    stripe_api_base: str = Field(
        "https://api.stripe.com", description="Where those reads go; can be pointed at a double."
    )
    stripe_mode: Literal["test", "live"] = Field(
        "test",
        description="Which `livemode` this deployment grants for; the other is answered and counted, never granted.",
    )
    webhook_tolerance_seconds: int = Field(
        300, ge=1, le=86_400, description="How far a signature's `t` may lie in the past or the future."
    )
    webhook_replay_ttl_seconds: int = Field(
        600, ge=1, le=604_800, description="How long a seen signature is remembered: twice the tolerance."
    )
    webhook_body_bytes_max: int = Field(
        262_144, ge=1_024, le=16_777_216, description="A larger webhook body is refused with 413."
    )
    catalog_file: Path | None = Field(
        None,
        description="Plans, features, price map and access policy; default is the shipped `catalog.toml`.",
    )
    payload_retention_months: int = Field(
        13,
        ge=RETENTION_MONTHS_MIN,
        le=RETENTION_MONTHS_MAX,
        description=(
            "How many calendar months `tollkeeper retention` keeps the bodies of settled events. Nothing goes unless it is run."
        ),
    )
    alert_urls: SecretStr = Field(
        SecretStr(""),
        description="Apprise URLs of the owner's channels (Telegram, e-mail, Slack, ...), comma or space separated.",
    )

    @property
    def livemode(self) -> bool:
        """Stripe's word for the same choice as `stripe_mode`."""
        return self.stripe_mode == "live"

    @property
    def stripe_webhook_secret_file(self) -> Path | None:
        """The file the webhook secret came from, so that a rotation needs no restart."""
        path = os.environ.get("STRIPE_WEBHOOK_SECRET_FILE")
        return Path(path) if path else None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments first, then NAME_FILE, then NAME: a mounted secret wins over a leftover variable."""
        return init_settings, NameFileSource(settings_cls), env_settings
