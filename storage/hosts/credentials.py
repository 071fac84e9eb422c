"""Credentials for object stores: found in the usual places when a host is opened, never stored.

| scheme | without parameters | `?profile=NAME` | `?credentials=FILE` |
|---|---|---|---|
| `s3` | what AWS tools use: environment, `~/.aws`, container, instance | that profile in `~/.aws` | a file like `~/.aws/credentials` |
| `gs` | environment, `gcloud`'s own file, instance | | a service account's JSON key |
| `az` | environment (`AZURE_STORAGE_...`, `AZURE_CLIENT_...`), managed identity | | a storage account's connection string |

Everything here blocks (files, and at worst the instance's metadata service): it is for threads.
"""

from __future__ import annotations

import configparser
import os
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from storage.errors import Unavailable
from storage.hosts.urls import HostURL

#: How long what the chain of providers said is used before it is asked again; it renews short-lived credentials by itself.
TTL = timedelta(minutes=5)
MAX_FILE = 65536


class Credentials:
    """What an S3 client signs with: obstore calls it whenever what it has is older than TTL."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def __call__(self) -> dict[str, Any]:
        now = self._found.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + TTL,
        }

    def __repr__(self) -> str:
        return "<Credentials>"


def s3_session(url: HostURL) -> Any:
    """A boto3 session with the credentials of an s3 URL. Unavailable says which place has none."""
    # Only here: a volume without such hosts does not wait for the import, nor hold it in memory.
    import boto3
    import botocore.exceptions
    import botocore.session

    profile, file = url.parameter("profile"), url.parameter("credentials")
    core = botocore.session.Session()
    core.register_component("data_loader", _loader())
    if file is not None:
        _read(url, file)
        core.set_config_variable("credentials_file", file)
        # Its own profile and no other source: the environment must not stand in for a file that somebody named.
        profile = profile or "default"
    where = f"in {file}" if file is not None else "in ~/.aws"
    try:
        session = boto3.Session(botocore_session=core, profile_name=profile, region_name=url.parameter("region"))
        found = session.get_credentials()
    except botocore.exceptions.ProfileNotFound:
        raise Unavailable(f"host {url.base}: there is no profile {profile!r} {where}; add it, or name another with ?profile=") from None
    except (botocore.exceptions.BotoCoreError, configparser.Error, ValueError) as error:
        raise Unavailable(f"host {url.base}: credentials {where} cannot be used: {error}") from error
    if found is None:
        if profile is not None:
            remedy = "add aws_access_key_id and aws_secret_access_key there"
            raise Unavailable(f"host {url.base}: profile {profile!r} {where} has no credentials; {remedy}")
        remedy = "name them with ?profile= or ?credentials=, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise Unavailable(f"host {url.base}: no credentials found; {remedy}")
    return session


@lru_cache(maxsize=1)
def _loader() -> Any:
    """Of the service's description, a megabyte of JSON: read once for all hosts."""
    import botocore.loaders

    return botocore.loaders.create_loader()


def azure_settings(url: HostURL) -> dict[str, str]:
    """Account and credentials for obstore: from the connection string in the URL's file, if it names one. Unavailable."""
    settings: dict[str, str] = {}
    file = url.parameter("credentials")
    if file is not None:
        fields = dict(part.strip().partition("=")[::2] for part in _read(url, file).replace("\n", ";").split(";") if part.strip())
        names = {"AccountName": "account_name", "AccountKey": "account_key", "SharedAccessSignature": "sas_key", "BlobEndpoint": "endpoint"}
        settings = {ours: fields[theirs] for theirs, ours in names.items() if fields.get(theirs)}
        if "account_key" not in settings and "sas_key" not in settings:
            raise Unavailable(f"host {url.base}: {file} is no connection string: it has neither AccountKey= nor SharedAccessSignature=")
    if account := url.parameter("account"):
        settings["account_name"] = account
    if not settings.get("account_name") and not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        raise Unavailable(f"host {url.base} names no storage account; add ?account=NAME")
    return settings


def google_settings(url: HostURL) -> dict[str, str]:
    """Where obstore finds a service account's key, if the URL names a file; else it looks in the usual places. Unavailable."""
    file = url.parameter("credentials")
    if file is None:
        return {}
    _read(url, file)
    return {"service_account": file}


def _read(url: HostURL, file: str) -> str:
    try:
        with open(file, encoding="utf-8") as stream:
            return stream.read(MAX_FILE)
    except OSError as error:
        raise Unavailable(f"host {url.base}: the credentials in {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Unavailable(f"host {url.base}: {file} is no file of credentials") from None
