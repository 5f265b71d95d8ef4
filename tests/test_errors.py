"""Named errors: what the command line exits with, and what is worth trying again."""

from __future__ import annotations

import inspect

import pytest

from rise_ops import errors
from rise_ops.errors import ConfigError, CurationError, MissingObjectError, StoreError, TransientError, is_transient

NAMED = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, Exception) and kind.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", NAMED)
def test_every_named_error_is_a_curation_error(kind: type[Exception]) -> None:
    assert issubclass(kind, CurationError)
    assert kind.__doc__


@pytest.mark.parametrize("kind", [kind for kind in NAMED if issubclass(kind, CurationError)])
def test_only_a_wrong_configuration_exits_2(kind: type[CurationError]) -> None:
    assert kind.exit_code == (2 if issubclass(kind, ConfigError) else 1)


@pytest.mark.parametrize("kind", NAMED)
def test_only_transient_errors_are_tried_again(kind: type[Exception]) -> None:
    assert is_transient(kind("x", "where")) == (kind is TransientError)


def test_a_missing_object_is_an_error_of_the_store() -> None:
    assert issubclass(MissingObjectError, StoreError)


@pytest.mark.parametrize("error", [ConnectionResetError(), BrokenPipeError(), TimeoutError(), ConnectionRefusedError()])
def test_network_faults_are_tried_again(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [ValueError(), KeyError(), OSError(28, "No space left"), FileNotFoundError(), PermissionError(), MemoryError()],
)
def test_other_faults_are_not(error: Exception) -> None:
    assert not is_transient(error)


@pytest.mark.parametrize("name", ["ReadTimeoutError", "ConnectionClosedError", "ServerDisconnectedError"])
def test_faults_of_network_clients_are_known_by_name(name: str) -> None:
    assert is_transient(type(name, (Exception,), {})())


def test_faults_derived_from_those_of_network_clients_are_known_too() -> None:
    base = type("ClientConnectorError", (Exception,), {})
    assert is_transient(type("ClientConnectorDNSError", (base,), {})())
