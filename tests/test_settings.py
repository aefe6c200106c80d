"""Settings: a bad value is one clear error that names the variable, and never shows a secret."""

from __future__ import annotations

import pytest

from flip_observability.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields.values():
        monkeypatch.delenv(str(field.alias), raising=False)


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = Settings.load()
    assert settings.local_dev
    assert settings.hub_url == "http://localhost:8000"
    assert settings.service_key_header == "X-Internal-Service-Key"
    assert settings.bucket == "s3://default-bucket"
    assert (settings.net_id, settings.hub_contract, settings.end_run_seconds) == ("default", "2026-05", 5)


@pytest.mark.parametrize("url", ["https://hub.example/api", "https://hub.example/api/", " https://hub.example/api// "])
def test_the_base_url_may_end_in_a_slash(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("FLIP_API_INTERNAL_URL", url)
    assert Settings.load().hub_url == "https://hub.example/api"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOCAL_DEV", "perhaps"),
        ("FLIP_API_INTERNAL_URL", "hub.example/api"),
        ("FLIP_API_INTERNAL_URL", "ftp://hub.example"),
        ("FLIP_API_INTERNAL_URL", "http://"),
        ("FLIP_API_INTERNAL_URL", "http://hub.example:port"),
        ("FLIP_API_INTERNAL_URL", "http://user:hunter2@hub.example"),
        ("FLIP_API_INTERNAL_URL", "http://hub.example/?a=b"),
        ("INTERNAL_SERVICE_KEY_HEADER", "X Key"),
        ("INTERNAL_SERVICE_KEY_HEADER", ""),
        ("INTERNAL_SERVICE_KEY_HEADER", "X-Key\r\nX-Other"),
        ("INTERNAL_SERVICE_KEY_HEADER", "X-Kéy"),
        ("INTERNAL_SERVICE_KEY_HEADER", "X-Key:"),
        ("INTERNAL_SERVICE_KEY_HEADER", "X" * 129),
        ("INTERNAL_SERVICE_KEY_HEADER", "Host"),
        ("INTERNAL_SERVICE_KEY_HEADER", "content-length"),
        ("INTERNAL_SERVICE_KEY_HEADER", "Transfer-Encoding"),
        ("INTERNAL_SERVICE_KEY_HEADER", "CONNECTION"),
        ("INTERNAL_SERVICE_KEY_HEADER", "Content-Type"),
        ("INTERNAL_SERVICE_KEY_HEADER", "Cookie"),
        ("INTERNAL_SERVICE_KEY_HEADER", "User-Agent"),
        ("INTERNAL_SERVICE_KEY_HEADER", "traceparent"),
        ("INTERNAL_SERVICE_KEY", "hunter2\nX-Other: 1"),
        ("INTERNAL_SERVICE_KEY", " hunter2"),
        ("UPLOADED_FEDERATED_DATA_BUCKET", "s3://"),
        ("UPLOADED_FEDERATED_DATA_BUCKET", "s3:// a b"),
        ("UPLOADED_FEDERATED_DATA_BUCKET", "http://bucket"),
        ("UPLOADED_FEDERATED_DATA_BUCKET", "file://relative/dir"),
        ("NET_ID", ""),
        ("NET_ID", "a\nb"),
        ("FLIP_HUB_CONTRACT", "2030-01"),
        ("FLIP_RETENTION_DAYS", "0"),
        ("FLIP_OUTBOX_MAX_AGE_HOURS", "many"),
        ("FLIP_END_RUN_SECONDS", "-1"),
    ],
)
def test_a_bad_value_is_named_without_showing_secrets(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    text = str(caught.value)
    assert text.startswith(f"Bad settings: {name}: ")
    assert "\n" not in text
    assert "hunter2" not in text
    assert caught.value.__cause__ is None


def test_several_bad_values_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NET_ID", "")
    monkeypatch.setenv("FLIP_HUB_CONTRACT", "x")
    with pytest.raises(SettingsError, match=r"NET_ID: .*; FLIP_HUB_CONTRACT: "):
        Settings.load()


def test_a_hub_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_DEV", "false")
    with pytest.raises(SettingsError, match="INTERNAL_SERVICE_KEY: is empty"):
        Settings.load()
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "hunter2")
    assert "hunter2" not in repr(Settings.load())


@pytest.mark.parametrize("name", ["X-Internal-Service-Key", "Authorization", "x_key~1"])
def test_a_header_of_its_own_for_the_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("INTERNAL_SERVICE_KEY_HEADER", name)
    assert Settings.load().service_key_header == name


@pytest.mark.parametrize(
    ("url", "in_clear"),
    [
        ("https://hub.example/api", False),
        ("http://localhost:8000", False),
        ("http://127.8.0.1/api", False),
        ("http://[::1]:8000/api", False),
        ("http://[::ffff:127.0.0.1]/api", False),
        ("http://hub.localhost", False),
        ("http://hub.example/api", True),
        ("http://flip-api.flip.local:8000/api", True),
        ("http://10.0.0.7/api", True),
        ("http://localhost.example", True),
    ],
)
def test_whether_the_key_goes_out_unencrypted(monkeypatch: pytest.MonkeyPatch, url: str, in_clear: bool) -> None:
    monkeypatch.setenv("LOCAL_DEV", "false")
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "hunter2")
    monkeypatch.setenv("FLIP_API_INTERNAL_URL", url)
    assert Settings.load().sends_key_in_clear is in_clear
    monkeypatch.setenv("FLIP_HUB_TRUSTED_NETWORK", "true")
    assert not Settings.load().sends_key_in_clear
