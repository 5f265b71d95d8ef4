"""Secrets are taken out of what is written down."""

from __future__ import annotations

import pytest

from rise_ops.errors import StoreError
from rise_ops.redaction import error_text, redacted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG"),
        ("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE"),
        ("AWS_SESSION_TOKEN", "FwoGZXIvYXdzEBYaD"),
        ("OPENLINEAGE_API_KEY", "ol-0123456789"),
        ("HF_TOKEN", "hf_abcdefghijkl"),
        ("PREFECT_API_AUTH_STRING", "admin:hunter22"),
    ],
)
def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert redacted(f"a {value}, and {value}.") == "a ***, and ***."


def test_secrets_in_a_json_value_are_hidden_and_what_is_beside_them_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__AUTH", '{"type": "api_key_of_mine", "apiKey": "ol-0123456789"}')
    assert redacted("api_key_of_mine ol-0123456789") == "api_key_of_mine ***"


def test_a_secret_that_holds_another_goes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdef")
    monkeypatch.setenv("B_TOKEN", "abcdefghij")
    assert redacted("abcdefghij abcdef") == "*** ***"


def test_a_short_value_and_other_variables_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "test")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert redacted("test in eu-central-1") == "test in eu-central-1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://me:pass@host/a", "GET https://***@host/a"),
        ("https://h/a?X-Amz-Signature=abc&x=1", "https://h/a?X-Amz-Signature=***&x=1"),
        ("https://h/a?X-Amz-Credential=a/b&sig=zz", "https://h/a?X-Amz-Credential=***&sig=***"),
        ("s3://bucket/a@b/c has 3 rows", "s3://bucket/a@b/c has 3 rows"),
        ("token count = 5, tokens=7", "token count = 5, tokens=7"),
    ],
)
def test_urls(text: str, expected: str) -> None:
    assert redacted(text) == expected


def test_an_error_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    assert error_text(StoreError("no wJalrXUtnFEMI here")) == "StoreError: no *** here"
