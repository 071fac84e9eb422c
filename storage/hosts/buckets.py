"""What obstore cannot do on S3: boto3, with the same credentials. Blocks, so it is for threads, and bounded like obstore's client."""

from __future__ import annotations

import ssl
from typing import Any

from storage.errors import Unavailable
from storage.hosts.clients import CONNECT_SECONDS, DEFAULT_REGION, SILENCE_SECONDS, endpoint_of
from storage.hosts.credentials import s3_session
from storage.hosts.failures import refusal_of
from storage.hosts.urls import HostURL


def s3_client(url: HostURL) -> Any:
    """A boto3 client for the service of an s3 URL; bucket and prefix are `url.bucket` and `url.prefix`. Unavailable: no credentials."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    session = s3_session(url)
    endpoint = endpoint_of(url, session)
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=SILENCE_SECONDS,
        retries={"total_max_attempts": 2, "mode": "standard"},
        s3={"addressing_style": "path"} if endpoint is not None else {},
        # Not every service knows the checksums that newer clients send unasked.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return session.client("s3", region_name=session.region_name or DEFAULT_REGION, endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise Unavailable(f"host {url.base} cannot be used: {error}") from error


def features(url: HostURL) -> tuple[bool, bool]:
    """(does the bucket keep versions, has it Object Lock), as far as it tells. Unavailable where it does not answer, or not now."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = s3_client(url)
    try:
        try:
            versions = client.get_bucket_versioning(Bucket=url.bucket).get("Status") == "Enabled"
        except ClientError as error:
            _must_be_an_answer(url, error)
            return False, False
        try:
            lock = client.get_object_lock_configuration(Bucket=url.bucket).get("ObjectLockConfiguration", {})
        except ClientError as error:
            _must_be_an_answer(url, error)
            return versions, False
        return versions, versions and lock.get("ObjectLockEnabled") == "Enabled"
    except BotoCoreError as error:
        raise Unavailable(f"host {url.base} cannot be reached: {_cause(error)}; check the endpoint, and the network") from error
    finally:
        client.close()


def _cause(error: BaseException) -> str:
    """What the system said, at the end of a chain of libraries whose own texts repeat the request's address; else the error's kind."""
    at: BaseException | None = error
    seen: list[BaseException] = []
    while at is not None and at not in seen:
        if isinstance(at, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({at.verify_message})"
        if isinstance(at, ssl.SSLError):
            return f"it does not speak TLS ({(at.reason or 'SSL').replace('_', ' ').lower()})"
        if isinstance(at, OSError) and at.strerror:
            return at.strerror
        seen.append(at)
        # botocore keeps what it wraps in its arguments, urllib3 in `reason` or the context.
        at = _first_error(getattr(at, "kwargs", {}).get("error"), getattr(at, "reason", None), at.__cause__, at.__context__)
    return type(error).__name__


def _first_error(*candidates: object) -> BaseException | None:
    return next((found for found in candidates if isinstance(found, BaseException)), None)


def _must_be_an_answer(url: HostURL, error: Any) -> None:
    """Not known to the service, or not for us to know: then it is not relied on, and what is really wrong other calls will say. But a
    service that is in trouble, or does not take our clock or credentials, has not said that the bucket has no lock: Unavailable."""
    refused = refusal_of(str(error.response.get("Error", {}).get("Code", "")), url)
    if refused is not None:
        raise refused from error
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if status == 429 or (status >= 500 and status != 501):
        raise Unavailable(f"host {url.base}: asking what its bucket keeps: {status}; it will be asked again") from error
