"""Secrets are taken out of what is written down."""

from __future__ import annotations

import json

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
        ("PROXY_AUTHORIZATION", "Basic YWRtaW4="),
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
    ("name", "value"),
    [
        ("GIT_AUTHOR_NAME", "sketch"),
        ("SSH_AUTH_SOCK", "/tmp/agent.7"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/run/identity"),
        ("OPENLINEAGE__TRANSPORT__AUTH__TYPE", "api_key"),
        ("AWS_AUTH_MODE", "signed"),
        ("PREFECT_AUTH_METHOD", "string"),
    ],
)
def test_what_is_only_about_a_secret_is_left(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert redacted(f"the {value} here") == f"the {value} here"


def test_hiding_one_secret_uncovers_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_TOKEN", "api_key")
    monkeypatch.setenv("TWO_TOKEN", "abc&defgh")
    assert redacted("?api_key=planted") == "?***=***"
    assert redacted("?token=abc&defgh&x=1") == "?token=***&x=1"


def test_secrets_are_found_in_the_form_that_urls_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/XUt+nF=")
    assert redacted("?k=wJalr%2FXUt%2BnF%3D, wJalr/XUt%2BnF%3D, wJalr/XUt+nF=.") == "?k=***, ***, ***."


@pytest.mark.timeout(20)  # in linear time they take a fraction of a second
@pytest.mark.parametrize(
    "part",
    [
        "x-amz-",
        "://",
        "://a",
        "://a:",
        "a://b@",
        "a@",
        "://@/",
        "token=",
        "?sig=&",
        "://u:p@/",
        "-",
        "@",
        "a",
        "'://",
        ":1",
    ],
)
def test_a_hostile_text_takes_no_time(part: str) -> None:
    text = part * (200_000 // len(part))
    assert len(redacted(text)) <= 2 * len(text)
    assert len(redacted("s3://" + text)) <= 2 * len(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://me:pass@host/a", "GET https://***@host/a"),
        ("https://h/a?X-Amz-Signature=abc&x=1", "https://h/a?X-Amz-Signature=***&x=1"),
        ("https://h/a?X-Amz-Credential=a/b&sig=zz", "https://h/a?X-Amz-Credential=***&sig=***"),
        ("postgresql://u:p@ss@host/db", "postgresql://***@host/db"),
        ("s3://u:pa/ss@host/db", "s3://***@host/db"),
        ("https://me@mail.org:pa/ss@host", "https://***@host"),
        ("redis://:p?ss@host:6379/0", "redis://***@host:6379/0"),
        ("https://u:12345@host", "https://***@host"),
        ("https://me@host/a@b", "https://***@host/a@b"),
        ("s3://raw/a,https://u:pass@host/b", "s3://raw/a,https://***@host/b"),
        ("'https://u:p@host/a' of 'x@y'", "'https://***@host/a' of 'x@y'"),
        ("http://127.0.0.1:9000/a@b/c", "http://127.0.0.1:9000/a@b/c"),
        ("https://host/a, me@mail.org", "https://host/a, me@mail.org"),
        ("s3://bucket/a@b/c has 3 rows", "s3://bucket/a@b/c has 3 rows"),
        ("token count = 5, tokens=7", "token count = 5, tokens=7"),
    ],
)
def test_urls(text: str, expected: str) -> None:
    assert redacted(text) == expected


def test_an_error_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    assert error_text(StoreError("no wJalrXUtnFEMI here")) == "StoreError: no *** here"


def test_secrets_in_nested_settings_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = {
        "type": "http",
        "url": "https://lineage.example",
        "auth": {"type": "api_key", "apiKey": "planted-5d2e"},
    }
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT", json.dumps(transport))
    assert (
        redacted("sent planted-5d2e to https://lineage.example by http")
        == "sent *** to https://lineage.example by http"
    )
