"""Settings: TOMBOLA_* from the environment, parsed once, checked against each other, frozen."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from tombola.producers.brokers.registry import BROKER_SCHEMES, RESULT_SCHEMES, BrokerKind, any_of, find_kind, scheme_of
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.domain.signatures import Keyring
from tombola.producers.service_links import is_service_link
from tombola.producers.setting_types import HostNames, Networks, Origins, Validities
from tombola.producers.storage.chunks import IN_LIST_MAX

PREFIX = "TOMBOLA_"
SEED_BYTES_MIN = 16


class Settings(BaseSettings):
    """One field per TOMBOLA_* variable. URLs and the seed are secrets: a repr or a log never shows them.

    Build settings with `Settings.from_env()`, which collects all mistakes in one ConfigurationError.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    database_url: SecretStr = Field(
        default=SecretStr(""), description="SQLAlchemy URL of the ledger, mysql+pymysql://… or sqlite:///…"
    )
    broker_url: SecretStr = Field(
        default=SecretStr(""),
        description="where draws are queued: redis://… (a Stream) or amqp://… (a quorum queue)",
    )
    result_url: SecretStr = Field(
        default=SecretStr(""),
        description="where results are kept, redis://…; default: the broker, if that is Redis",
    )
    result_secret: SecretStr = Field(
        default=SecretStr(""),
        description="seals results in Redis, at least 32 hex digits; the same for workers, gateways and clients",
    )
    message_secret: SecretStr = Field(
        default=SecretStr(""),
        description="signs messages, at least 32 hex digits: workers draw for no message that it has not signed. "
        "Several, with commas: the first one signs, all of them verify",
    )
    accepted_only: bool = Field(
        default=False, description="workers draw for no message whose request is not accepted in the database"
    )
    seed: SecretStr = Field(
        default=SecretStr(""),
        description="the draws' secret seed, at least 32 hex digits; only workers need it. Several, with commas: "
        "the first one begins the next chain of epochs, the draws of former chains still need theirs",
    )
    seed_reveal_after_s: Annotated[float, Field(ge=60, le=31_536_000)] = Field(
        default=3600.0, description="the secret of an epoch is revealed this long after its end, if no draw of it waits"
    )
    batch_size_max: Annotated[int, Field(ge=1, le=IN_LIST_MAX)] = Field(
        default=800, description="draws fetched at once at most (above 900 MariaDB loses the lock order)"
    )
    claim_after_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=15.0,
        description="after this long without a sign of life a worker's draws are taken over (Redis)",
    )
    lock_wait_s: Annotated[int, Field(ge=1, le=50)] = Field(
        default=1, description="how long a statement may wait for a row lock"
    )
    tries_max: Annotated[int, Field(ge=1, le=20)] = Field(
        default=3, description="how often a batch is tried as a whole before it is split"
    )
    deliveries_max: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=5, description="a draw delivered more often is handled alone, and parked if it fails"
    )
    lanes: Annotated[int, Field(ge=1, le=16)] = Field(
        default=2,
        description="transactions that a large batch is split into, side by side, sharing no account",
    )
    result_ttl_s: Annotated[int, Field(ge=1)] = Field(
        default=86_400,
        description="how long Redis keeps a result; afterwards it is rebuilt from the database",
    )
    publish_timeout_s: Annotated[float, Field(gt=0, le=300)] = Field(
        default=10.0, description="how long the broker may take to confirm a message"
    )
    relay_after_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=10.0, description="an accepted draw that has not settled after this long is published again"
    )
    relay_tries_max: Annotated[int, Field(ge=1, le=100)] = Field(
        default=10, description="a draw published so often and never settled is given up"
    )
    request_timeout_s: Annotated[float, Field(gt=0, le=31_536_000)] = Field(
        default=86_400.0, description="an accepted draw is given up after this long, whatever the reason"
    )
    webhook_tries_max: Annotated[int, Field(ge=1, le=100)] = Field(
        default=24, description="what a webhook's receiver has not taken after so many attempts is dead; about 3 days"
    )
    webhook_timeout_s: Annotated[float, Field(gt=0, le=60)] = Field(
        default=10.0, description="how long a webhook's receiver may take to answer"
    )
    webhook_private: bool = Field(
        default=False,
        description="webhooks may also lead to private addresses, and by http: for receivers inside of your network",
    )
    retention_days: Annotated[float, Field(ge=0, le=36_500)] = Field(
        default=90.0, description="result texts and delivered fulfilments are dropped after this long; 0 keeps all"
    )
    points_valid_days: Validities = Field(
        default=(),
        description="points of these assets expire after so many days, by months: POINT=365, …; default: none do",
    )
    seal_after_s: Annotated[float, Field(ge=1, le=86_400)] = Field(
        default=60.0, description="ledger rows are sealed after this long, at least twice the time of a batch"
    )
    books_key: SecretStr = Field(
        default=SecretStr(""), description="signs the head of the sealed books; make one with `tombola books key`"
    )
    books_anchor: str = Field(
        default="", description="a folder outside of the database owner's reach, for signed checkpoints of the books"
    )
    books_anchor_every_s: Annotated[float, Field(ge=1, le=86_400)] = Field(
        default=300.0, description="how long after a checkpoint the next one is signed, if blocks were sealed"
    )
    receipt_key: SecretStr = Field(
        default=SecretStr(""),
        description="signs receipts of draws; make one with `tombola receipt-key make`. Several, with commas: the "
        "newest first",
    )
    gateway_auth: Literal["api-key", "none"] = Field(
        default="api-key", description="who may call the gateway: holders of an API key, or everybody who reaches it"
    )
    gateway_connections_max: Annotated[int, Field(ge=1, le=60_000)] = Field(
        default=5000, description="connections to one gateway process; one caller may wait on half of them"
    )
    gateway_rate_max: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=2000, description="draws and other requests a second that one caller may make to one gateway process"
    )
    backlog_max: Annotated[int, Field(ge=1, le=100_000_000)] = Field(
        default=200_000,
        description="with more accepted draws under way the gateway answers 429; one caller may have half of them",
    )
    idempotency_key_required: bool = Field(
        default=False, description="answer 400 to a draw without an Idempotency-Key instead of making one"
    )
    gateway_page: bool = Field(default=False, description="serve the demo page at /")
    cors_origins: Origins = Field(
        default=(), description="pages of these origins may call the gateway: https://shop.example, …, or *"
    )
    allowed_hosts: HostNames = Field(
        default=(),
        description="the names that gateway and console answer to: shop.example, *.shop.example; default: all",
    )
    trusted_proxies: Networks = Field(
        default=(),
        description="addresses and networks of proxies that say truly whom they speak for: 10.0.0.0/8, …",
    )
    remote_control: bool | None = Field(
        default=None,
        description="let `celery inspect` and `celery control` reach the workers; default: with Redis only",
    )
    log_format: Literal["auto", "text", "json"] = Field(
        default="auto", description="how logs are written; auto: text at a terminal, JSON otherwise"
    )
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = Field(
        default=0, description="where a gateway, a worker and a relay serve Prometheus metrics; 0: nowhere"
    )
    metrics_host: str = Field(
        default="127.0.0.1", min_length=1, description="the address that TOMBOLA_METRICS_PORT is on"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # from_env() passes the variables itself, so that a mapping other than os.environ works as well.
        return (init_settings,)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """Read TOMBOLA_* from `env` (default: the process's environment).

        Raises ConfigurationError for an unknown name, a value out of range, or values that do not fit together.
        """
        values = settings_in(os.environ if env is None else env)
        known = {PREFIX + name.upper(): name for name in cls.model_fields}
        for name in values:
            if name not in known:
                # Without the prefix, which would make all names similar.
                close = difflib.get_close_matches(name.removeprefix(PREFIX).lower(), known.values(), n=1)
                hint = (
                    f"; did you mean {PREFIX}{close[0].upper()}?"
                    if close
                    else f"; known are {', '.join(sorted(known))}"
                )
                raise ConfigurationError(f"unknown setting {name}{hint}")
        try:
            # Strings, each parsed by its field.
            parsed: dict[str, Any] = {known[name]: value for name, value in values.items()}
            return cls(**parsed)
        except ValidationError as error:
            raise ConfigurationError("; ".join(map(_one_line, error.errors()))) from None

    @field_validator("database_url")
    @classmethod
    def _database(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value():
            return value
        try:
            url = make_url(value.get_secret_value())
        except (ArgumentError, ValueError):  # ValueError quotes the port, which may be the end of a password
            raise ValueError("not a SQLAlchemy URL, such as mysql+pymysql://user:password@host/name") from None
        if url.drivername in ("mysql", "mariadb"):
            url = url.set(drivername="mysql+pymysql")
        if url.drivername == "mariadb+pymysql":
            url = url.set(drivername="mysql+pymysql")
        if url.drivername not in ("mysql+pymysql", "sqlite", "sqlite+pysqlite"):
            raise ValueError(
                f"{url.drivername} is not supported: use mysql+pymysql:// (also for MariaDB) or sqlite:///"
            )
        if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
            raise ValueError("an in-memory SQLite cannot be shared between processes: name a file")
        if not url.database:
            raise ValueError("name the database, too: mysql+pymysql://user:password@host/name")
        return SecretStr(url.render_as_string(hide_password=False))

    @field_validator("broker_url")
    @classmethod
    def _broker(cls, value: SecretStr) -> SecretStr:
        _check_scheme(value, BROKER_SCHEMES)
        return value

    @field_validator("result_url")
    @classmethod
    def _result(cls, value: SecretStr) -> SecretStr:
        _check_scheme(value, RESULT_SCHEMES)
        return value

    @field_validator("result_secret")
    @classmethod
    def _secret(cls, value: SecretStr) -> SecretStr:
        if text := value.get_secret_value():
            _check_secret(text)
        return value

    @field_validator("seed", "message_secret")
    @classmethod
    def _secrets(cls, value: SecretStr) -> SecretStr:
        for text in value.get_secret_value().split(",") if value.get_secret_value() else ():
            _check_secret(text.strip())
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.claim_after_s <= self.batch_time_s_max:
            raise ValueError(
                f"TOMBOLA_CLAIM_AFTER_S ({self.claim_after_s:g}) must be longer than a batch can take: "
                f"{self.batch_time_s_max:g}, from TOMBOLA_LOCK_WAIT_S and TOMBOLA_TRIES_MAX; "
                "otherwise another worker takes its draws over while they are being settled"
            )
        return self

    @property
    def batch_time_s_max(self) -> float:
        """How long one batch can take while the database is up, whatever locks other transactions hold.

        A batch waits once for all its accounts' locks. After that only a write can wait for a lock, once in each try;
        the last try begins at the end of this time (worker.settle.tries.settle), and has two writes.
        """
        return float(self.lock_wait_s * (self.tries_max + 3))

    @property
    def sealed_after_s(self) -> float:
        """How long after it was seen a ledger row is sealed: never while a batch of that time can still be running."""
        return max(self.seal_after_s, 2 * self.batch_time_s_max)

    @property
    def broker_kind(self) -> BrokerKind | None:
        """The kind of broker in TOMBOLA_BROKER_URL; None where that is not set."""
        return find_kind(self.broker_url.get_secret_value())

    @property
    def has_remote_control(self) -> bool:
        """Whether workers listen to Celery's remote control; the default depends on the kind of broker."""
        if self.remote_control is None:
            kind = self.broker_kind
            return kind is None or kind.has_remote_control
        return self.remote_control

    @property
    def seed_bytes(self) -> bytes:
        """The newest seed; raises ConfigurationError when none is set."""
        self.need("seed")
        return self.seeds[0]

    @property
    def seeds(self) -> tuple[bytes, ...]:
        """All seeds, the newest first; none where this process knows none."""
        return _secrets_in(self.seed)

    @property
    def result_secret_bytes(self) -> bytes:
        """The secret that seals results; empty where results are not sealed."""
        return bytes.fromhex(self.result_secret.get_secret_value())

    @property
    def keyring(self) -> Keyring:
        """The secrets that sign messages; an empty keyring where messages are not signed."""
        return Keyring(_secrets_in(self.message_secret))

    def need(self, name: str) -> str:
        """The secret called `name` in the clear; raises ConfigurationError when it is not set."""
        secret: SecretStr = getattr(self, name)
        value = secret.get_secret_value()
        if not value and name == "result_url" and (kind := self.broker_kind) is not None and kind.keeps_results:
            return self.need("broker_url")
        if not value:
            raise ConfigurationError(f"{PREFIX}{name.upper()} is not set: {type(self).model_fields[name].description}")
        return value

    def has(self, name: str) -> bool:
        """Whether `need(name)` returns a value."""
        try:
            return bool(self.need(name))
        except ConfigurationError:
            return False


# The folder where embedded mode keeps its state. Not a setting: it says where settings are found.
HOME_VARIABLE = "TOMBOLA_HOME"


def _secrets_in(several: SecretStr) -> tuple[bytes, ...]:
    texts = several.get_secret_value()
    return tuple(bytes.fromhex(text.strip()) for text in texts.split(",")) if texts else ()


def _check_secret(text: str) -> None:
    try:
        is_long_enough = len(bytes.fromhex(text)) >= SEED_BYTES_MIN
    except ValueError:
        is_long_enough = False
    if not is_long_enough:
        raise ValueError(f"at least {2 * SEED_BYTES_MIN} hex digits; make one with `openssl rand -hex 32`")


def settings_in(env: Mapping[str, str]) -> dict[str, str]:
    """The settings in `env`, known and unknown: all TOMBOLA_* names except those that Kubernetes adds."""
    return {
        name: value
        for name, value in env.items()
        if name.startswith(PREFIX) and name != HOME_VARIABLE and not is_service_link(name, value)
    }


def _check_scheme(value: SecretStr, schemes: tuple[str, ...]) -> None:
    text = value.get_secret_value()
    if text and scheme_of(text) not in schemes:
        # The value may hold a password: it is not repeated.
        raise ValueError(f"must begin with {any_of(schemes)}")


def _one_line(error: object) -> str:
    assert isinstance(error, dict)
    where = "".join(f"{PREFIX}{str(part).upper()}: " for part in error["loc"])
    return where + str(error["msg"]).removeprefix("Value error, ")
