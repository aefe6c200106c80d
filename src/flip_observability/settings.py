"""Every environment variable of this package, in one class: read once, validated, explained.

OpenTelemetry (``OTEL_*``) and AWS (``AWS_*``) are configured by their own standard variables, not repeated here.
"""

from __future__ import annotations

import ipaddress
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from flip_observability._contract import ContractName, contract_of, installed_flip

LEDGER_FOLDER = "flip_observability"
"""The ledger's folder below an NVFLARE workspace root, when ``FLIP_OBSERVABILITY_DIR`` is not set."""

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
"""A token of HTTP."""
_TAKEN_HEADERS = frozenset(
    "accept accept-charset accept-encoding accept-language baggage connection content-encoding content-length "
    "content-type cookie date expect forwarded host keep-alive origin proxy-authenticate proxy-authorization "
    "proxy-connection range referer set-cookie te traceparent tracestate trailer transfer-encoding upgrade user-agent "
    "via".split()
)
"""Headers that HTTP, its client, a proxy or tracing write or read: a key in one of them is lost, seen or misread."""


class SettingsError(ValueError):
    """One clear sentence per setting that cannot be used. Never contains a secret's value."""


class Settings(BaseSettings):
    """What this server is told by its environment.

    Use :meth:`load`, which turns pydantic's report into one readable :class:`SettingsError`.
    """

    model_config = SettingsConfigDict(case_sensitive=True, extra="ignore", frozen=True, populate_by_name=True)

    local_dev: bool = Field(
        True,
        alias="LOCAL_DEV",
        description="No hub, no bucket: statuses are logged, results land in a local folder.",
    )
    hub_url: str = Field(
        "http://localhost:8000",
        alias="FLIP_API_INTERNAL_URL",
        description="Base URL of the Central Hub, with or without a trailing slash.",
    )
    hub_trusted_network: bool = Field(
        False,
        alias="FLIP_HUB_TRUSTED_NETWORK",
        description="The network to an `http://` hub is trusted: the service key may cross it unencrypted.",
    )
    service_key_header: str = Field(
        "X-Internal-Service-Key",
        alias="INTERNAL_SERVICE_KEY_HEADER",
        description="Name of the header that carries the service key.",
    )
    service_key: SecretStr = Field(
        SecretStr(""), alias="INTERNAL_SERVICE_KEY", description="The service key. A secret; needed unless LOCAL_DEV."
    )
    bucket: str = Field(
        "s3://default-bucket",
        alias="UPLOADED_FEDERATED_DATA_BUCKET",
        description="Where results go: `s3://bucket[/prefix]` or `file:///dir`.",
    )
    net_id: str = Field("default", alias="NET_ID", description="Which FL network this server is.")
    told_contract: Literal["auto", "2026-05", "2026-10"] = Field(
        "auto",
        alias="FLIP_HUB_CONTRACT",
        description="The hub's wire vocabulary: `2026-05` or `2026-10`; `auto` is that of the installed flip-utils, "
        "`2026-05` without one. An observer with `auto` speaks for each run as the run's own process did.",
    )
    directory: Path | None = Field(
        None,
        alias="FLIP_OBSERVABILITY_DIR",
        description="Folder of the ledger, on a local disk. Default: `<server workspace>/flip_observability`.",
    )
    retention_days: Annotated[float, Field(gt=0)] = Field(
        90, alias="FLIP_RETENTION_DAYS", description="Days that the history of finished, delivered runs is kept."
    )
    outbox_max_age_hours: Annotated[float, Field(gt=0)] = Field(
        72,
        alias="FLIP_OUTBOX_MAX_AGE_HOURS",
        description="Hours after which what is not a final status is given up. Final statuses never expire.",
    )
    end_run_seconds: Annotated[float, Field(ge=0, le=60)] = Field(
        5,
        alias="FLIP_END_RUN_SECONDS",
        description="Seconds that END_RUN may take, after the upload, to deliver the final status.",
    )
    results_max_gib: Annotated[float, Field(gt=0, le=5_000)] = Field(
        200,
        alias="FLIP_RESULTS_MAX_GIB",
        description="Size of all files of a run's results together, in GiB, holes of sparse files included; those that "
        "do not fit are left out of the archive.",
    )
    capture_exception_messages: bool = Field(
        False,
        alias="FLIP_CAPTURE_EXCEPTION_MESSAGES",
        description="Spans of failed calls of the hub and the bucket carry the exception's message and stack trace, "
        "failed uploads its message. Messages can quote patients' data: leave it off unless yours do not.",
    )
    metrics_recent_runs: Annotated[int, Field(ge=0, le=1_000)] = Field(
        50,
        alias="FLIP_METRICS_RECENT_RUNS",
        description="Finished runs that metrics tell of one by one, beside all that finished in the last 24 hours.",
    )

    @property
    def results_max_bytes(self) -> int:
        """The limit of a run's results, as the archive counts it."""
        return int(self.results_max_gib * 1024**3)

    @field_validator("told_contract", mode="before")
    @classmethod
    def _told_contract(cls, value: object) -> object:
        return value or "auto"

    @field_validator("hub_url")
    @classmethod
    def _hub_url(cls, value: str) -> str:
        value = value.strip()
        try:
            parts = urlsplit(value)
            _ = parts.port
        except ValueError:
            raise ValueError("is not a URL (expected something like https://hub.example/api)") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("needs a scheme and a host (expected something like https://hub.example/api)")
        if parts.username or parts.password:
            raise ValueError("must not hold a user name or password")
        if parts.query or parts.fragment:
            raise ValueError("must not have a query or a fragment")
        return value.rstrip("/")

    @field_validator("service_key_header")
    @classmethod
    def _service_key_header(cls, value: str) -> str:
        if not _HEADER_NAME.fullmatch(value):
            raise ValueError("is not the name of an HTTP header (letters, digits and hyphens, at most 128)")
        if value.lower() in _TAKEN_HEADERS:
            raise ValueError("is a header that HTTP needs for itself; choose one like X-Internal-Service-Key")
        return value

    @field_validator("service_key")
    @classmethod
    def _service_key(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if text != text.strip() or not text.isascii() or not (text.isprintable() or not text):
            raise ValueError("has spaces around it or characters that an HTTP header cannot carry")
        return value

    @field_validator("bucket")
    @classmethod
    def _bucket(cls, value: str) -> str:
        from flip_observability.results import Destination  # the one place that knows what a destination is

        Destination.parse(value)
        return value

    @field_validator("net_id")
    @classmethod
    def _net_id(cls, value: str) -> str:
        if not value or len(value) > 128 or not value.isprintable():
            raise ValueError("must be 1 to 128 printable characters")
        return value

    @model_validator(mode="after")
    def _key_for_a_hub(self) -> Settings:
        if not self.local_dev and not self.service_key.get_secret_value():
            raise ValueError("INTERNAL_SERVICE_KEY: is empty, and with LOCAL_DEV=false the hub needs it")
        return self

    @cached_property
    def hub_contract(self) -> ContractName:
        """The contract that was asked for or, where that is none, the one of the installed FLIP."""
        return contract_of(installed_flip()) if self.told_contract == "auto" else self.told_contract

    def contract_for(self, runs: str | None) -> ContractName:
        """The contract in which the hub is told of a run.

        Args:
            runs: the contract that the run's own process spoke; None when nobody knows. It counts unless this process
                was told one: an observer need not have the FLIP installed that the job has.
        """
        known = self.told_contract == "auto"
        return next((name for name in get_args(ContractName) if known and name == runs), self.hub_contract)

    @property
    def sends_key_in_clear(self) -> bool:
        """Whether the service key crosses a network unencrypted that nobody has said to be trusted."""
        parts = urlsplit(self.hub_url)
        return not (
            self.local_dev or self.hub_trusted_network or parts.scheme == "https" or _is_loopback(parts.hostname or "")
        )

    @classmethod
    def load(cls) -> Settings:
        """Read the environment.

        Raises:
            SettingsError: naming every variable that cannot be used and why, without the values of secrets.
        """
        try:
            return cls()
        except ValidationError as error:
            problems = []
            for item in error.errors(include_url=False, include_context=False, include_input=False):
                where = ".".join(str(part) for part in item["loc"])
                text = item["msg"].removeprefix("Value error, ")
                problems.append(f"{where}: {text}" if where else text)
            raise SettingsError("Bad settings: " + "; ".join(problems)) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
