"""What the clients of buckets are told: endpoint, region, and the budget of `rise_ops.retry`.

Stores are reached through obstore, their tables also by Polars itself, sources through fsspec. The three name
their settings differently and mean the same; here they get the same. (The client of sources on S3 knows no limit for
the whole of a try: there, `try_seconds` is the longest silence. Other sources keep the limits of their own clients.)
Everything comes from the usual `AWS_*` variables when a connection is made.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from rise_ops import retry
from rise_ops.errors import ConfigError


def obstore_options(uri: str, *, tries: int) -> dict[str, Any]:
    """For a store at `uri`, whose client asks up to `tries` times."""
    budget = retry.BUDGET
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=budget.connect_seconds),
        "timeout": timedelta(seconds=budget.try_seconds),
    }
    backoff = {
        "init_backoff": timedelta(seconds=budget.first_pause),
        "max_backoff": timedelta(seconds=budget.longest_pause),
        "base": 2,
    }
    retries = {
        "max_retries": tries - 1,
        "retry_timeout": timedelta(seconds=budget.retry_seconds),
        "backoff": backoff,
    }
    options: dict[str, Any] = {"retry_config": retries, "client_options": client}
    if uri.startswith(("s3://", "s3a://")):
        endpoint = _s3_endpoint()
        options["region"] = _s3_region()
        # one request a key: some servers judge a request for many by the rights to the whole bucket, some have none
        options["disable_bulk_delete"] = True
        if endpoint:
            options["endpoint"] = endpoint
            client["allow_http"] = endpoint.startswith("http://")
    return options


def polars_options(uri: str) -> dict[str, Any]:
    """For Polars' own requests to objects of a store."""
    budget = retry.BUDGET
    options: dict[str, Any] = {
        "max_retries": budget.tries - 1,
        "retry_timeout_ms": int(budget.retry_seconds * 1000),
        "retry_init_backoff_ms": int(budget.first_pause * 1000),
        "retry_max_backoff_ms": int(budget.longest_pause * 1000),
        "connect_timeout": f"{int(budget.connect_seconds * 1000)}ms",
        "timeout": f"{int(budget.try_seconds * 1000)}ms",
    }
    if not uri.startswith(("s3://", "s3a://")):
        return options
    options |= {"aws_region": _s3_region(), "aws_virtual_hosted_style_request": "false"}
    endpoint = _s3_endpoint()
    if endpoint:
        options |= {"aws_endpoint_url": endpoint, "aws_allow_http": str(endpoint.startswith("http://")).lower()}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if os.environ.get(name):
            options[name.lower()] = os.environ[name]
    return options


def _s3_endpoint() -> str | None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        endpoint = os.environ.get(name)
        if endpoint and "@" in endpoint.partition("://")[2].partition("/")[0]:  # clients show it, and do not use it
            raise ConfigError(f"{name} holds a user or password; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if endpoint:
            return endpoint
    return None


def _s3_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def s3fs_options() -> dict[str, Any]:
    """For sources on S3. The client itself tries once: `rise_ops.sources` repeats what fails."""
    # The keys are passed on so that fsspec's cache of filesystems tells one set of credentials from another.
    environment, budget = os.environ.get, retry.BUDGET
    return {
        "key": environment("AWS_ACCESS_KEY_ID"),
        "secret": environment("AWS_SECRET_ACCESS_KEY"),
        "token": environment("AWS_SESSION_TOKEN"),
        "endpoint_url": _s3_endpoint(),
        "use_listings_cache": False,
        "local_expiry_check": True,  # by the ETag of each answer: what servers say to If-Match, the client may not know
        "client_kwargs": {"region_name": _s3_region()},
        "config_kwargs": {
            "connect_timeout": budget.connect_seconds,
            "read_timeout": budget.try_seconds,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        },
    }
