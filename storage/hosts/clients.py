"""obstore's clients for the URLs of object stores: where they connect, with which credentials, and how long they wait."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, cast

from obstore.store import AzureStore, GCSStore, S3Store

from storage.errors import FusefsError, Unavailable
from storage.hosts.credentials import Credentials, azure_settings, google_settings, s3_session
from storage.hosts.failures import STORE_ERRORS
from storage.hosts.urls import HostURL

#: Seconds: to get a connection; without a byte of an answer; for a whole request, so that a thread always ends.
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 20.0
REQUEST_SECONDS = 180.0
DEFAULT_REGION = "us-east-1"

Store = S3Store | GCSStore | AzureStore


def make_store(url: HostURL, silence: float | None = None) -> Store:
    """obstore's client for a URL; blocks. `silence`: seconds without a byte of an answer, if not SILENCE_SECONDS; while an object is sent
    there is none. Unavailable, BadArgument."""
    endpoint = url.parameter("endpoint")
    options: Any = {
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=SILENCE_SECONDS if silence is None else silence),
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "user_agent": "fusefs",
    }
    once: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=REQUEST_SECONDS)}
    common: Any = {"prefix": url.prefix or None, "client_options": options, "retry_config": once}
    try:
        if url.scheme == "s3":
            session = s3_session(url)
            endpoint = endpoint_of(url, session)
            settings: dict[str, Any] = {"region": session.region_name or DEFAULT_REGION, "disable_bulk_delete": True}
            if endpoint is not None:
                settings["endpoint"] = endpoint
            # At AWS itself the bucket belongs into the name; a dot in it would not go with the certificate.
            settings["virtual_hosted_style_request"] = endpoint is None and "." not in url.bucket
            options["allow_http"] = _is_plain(endpoint)
            return S3Store(
                url.bucket, config=cast(Any, settings), credential_provider=cast(Any, Credentials(session.get_credentials())), **common
            )
        if url.scheme == "az":
            settings = dict(azure_settings(url))
            if endpoint is not None:
                settings["endpoint"] = endpoint
            options["allow_http"] = _is_plain(settings.get("endpoint"))
            return AzureStore(url.bucket, config=cast(Any, settings), **common)
        settings = dict(google_settings(url))
        if endpoint is not None:
            settings["base_url"] = endpoint
        options["allow_http"] = _is_plain(endpoint)
        return GCSStore(url.bucket, config=cast(Any, settings), **common)
    except STORE_ERRORS as error:
        if isinstance(error, FusefsError):
            raise
        said = str(error).partition("\n\nDebug source")[0]
        raise Unavailable(f"host {url.base} cannot be used: {said[:300]}") from error


def endpoint_of(url: HostURL, session: Any) -> str | None:
    """Where an s3 URL's service answers: as the URL says, else as the profile or the environment does; None: at AWS."""
    if (named := url.parameter("endpoint")) is not None:
        return named
    if (usual := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")) is not None:
        return usual
    if session.profile_name not in session.available_profiles:
        return None
    configured = session._session.get_scoped_config().get("endpoint_url")
    return configured if isinstance(configured, str) else None


def _is_plain(endpoint: str | None) -> bool:
    return endpoint is not None and endpoint.startswith("http:")
