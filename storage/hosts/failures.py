"""What an object store's refusals mean: obstore's exceptions as kinds of ours, with the remedy, and whether asking again can help.

| answer | kind | again |
|---|---|---|
| 404, but the bucket is what is missing | Unavailable | no |
| 404 | NotFound | no |
| 412, 409, a condition that does not hold | Busy | no |
| 401, 403 for a clock that is wrong, wrong credentials, too few rights | Unavailable | no |
| 403 for a deletion that these credentials, or a lock, do not allow | NotPermitted | no |
| the bucket is in another region | Unavailable | no |
| quota, 507 | NoSpace | no |
| 429, 503, 500, 502, 504 | Unavailable | yes |
| no connection, no answer in time | Unavailable | yes |
| everything else | Unavailable | no |

What the service says of itself is shown, cut off, and never trusted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from obstore.exceptions import AlreadyExistsError, BaseError, InvalidPathError, PreconditionError, UnauthenticatedError

from storage.errors import Busy, FusefsError, NoSpace, NotFound, NotPermitted, Unavailable
from storage.hosts.urls import HostURL

#: What the store raises: "not found" is FileNotFoundError, errors of credential providers come as they are.
STORE_ERRORS = (BaseError, OSError, ValueError, RuntimeError)

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9_.-]{1,80})\s*</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,200})")
_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_CAUSE = re.compile(r'(?:message|error): "([^"\\]{1,200})"')
_REDIRECT = re.compile(r"[Rr]eceived redirect")
_PAST_END = re.compile(r"[Ww]anted range starting at")
_NO_RANGE = re.compile(r"non-partial response", re.IGNORECASE)

_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted", "InvalidBucketName"}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AuthenticationFailed",
    "InvalidAuthenticationInfo",
    "NoAuthenticationInformation",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidSecurity",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "TemporaryRedirect"}
_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "ServiceQuotaExceeded", "InsufficientCapacity", "EntityTooLarge"}
#: The service says that it has not done what was asked, for now.
_LATER = {429, 503}
_AGAIN = {408, 425, 500, 502, 504}


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed call: what to raise, and what may be tried."""

    error: FusefsError
    #: Can the same call succeed a moment later?
    again: bool = False
    #: Is it certain that nothing has been changed?
    untouched: bool = True
    #: The range begins at or behind the object's end.
    past_end: bool = False
    #: It answers requests for a range with the whole.
    no_ranges: bool = False


def failure_of(error: Exception, url: HostURL, doing: str, name: str) -> Failure:
    """`doing` and `name`: what was asked, as in "reading a/b"."""
    said, _, debug = str(error).partition("\n\nDebug source")
    status = int(match[1]) if (match := _STATUS.search(said)) else 0
    code = match[1] if (match := _CODE.search(said)) else ""
    host = f"host {url.base}"
    what = f"{doing} {name}".strip()
    answer = _answer(said, status, code)
    if _NO_RANGE.search(said):
        return Failure(Unavailable(f"{host} does not read ranges"), no_ranges=True)
    if status == 0 and isinstance(error, UnauthenticatedError):
        # Not the service: the place where short-lived credentials are renewed.
        why = said.rpartition("provider: ")[2][:200]
        return Failure(Unavailable(f"{host}: its credentials cannot be had ({why}); see {_place(url)}"))
    if isinstance(error, InvalidPathError):
        return Failure(Unavailable(f"{host}: {what}: an object there has a name that cannot be listed, remove it: {said[:200]}"))
    if status == 416 or (status == 0 and _PAST_END.search(said)):
        return Failure(Unavailable(f"{host}: {what}: {answer}"), past_end=True)
    if code in _NO_BUCKET:
        kind = "container" if url.scheme == "az" else "bucket"
        at = url.parameter("endpoint") or "its provider"
        return Failure(Unavailable(f"{host}: there is no {kind} {url.bucket!r} at {at} ({code}); make it, or mend the URL"))
    if isinstance(error, PreconditionError | AlreadyExistsError):
        return Failure(Busy(f"{host}: {name} was changed by somebody else; read it again"))
    if isinstance(error, FileNotFoundError):
        return Failure(NotFound(f"{host}: there is no {name}"))
    if code in _FULL or status == 507:
        return Failure(NoSpace(f"{host} is full: {what}: {answer}; raise its quota, free space or add a host"))
    if (refused := refusal_of(code, url)) is not None:
        return Failure(refused)
    if code in _REGION or status in (301, 307) or _REDIRECT.search(said):
        return Failure(Unavailable(f"{host}: the bucket is in another region ({answer}); name it with ?region="))
    if status == 401:
        return Failure(_wrong_credentials(url, "401"))
    if status == 403 and doing == "deleting":
        return Failure(NotPermitted(f"{host}: these credentials may not delete {name} ({answer})"))
    if status == 403:
        return Failure(Unavailable(f"{host}: these credentials may not do this: {what}: {answer}; grant it, or see {_place(url)}"))
    if status in _LATER:
        return Failure(Unavailable(f"{host}: {what}: {answer}"), again=True)
    if status in _AGAIN:
        return Failure(Unavailable(f"{host}: {what}: {answer}"), again=True, untouched=False)
    if status == 0 and (match := _KIND.search(debug)):
        return _broken(host, what, match[1], debug)
    return Failure(Unavailable(f"{host}: {what}: {answer}"), untouched=400 <= status < 500)


def refusal_of(code: str, url: HostURL) -> Unavailable | None:
    """Where it is not the request but who asks, or when, that the service does not take; None for any other code of S3 or Azure."""
    if code in _CLOCK:
        return Unavailable(f"host {url.base}: this machine's clock and the service's differ too much ({code}); set the clock (NTP)")
    return _wrong_credentials(url, code) if code in _CREDENTIALS else None


def _wrong_credentials(url: HostURL, said: str) -> Unavailable:
    return Unavailable(f"host {url.base} refuses the credentials ({said}); see {_place(url)}, and this machine's clock")


def _broken(host: str, what: str, kind: str, debug: str) -> Failure:
    """No answer at all."""
    causes = _CAUSE.findall(debug)
    cause = causes[-1] if causes else {"Timeout": "no answer in time"}.get(kind, "the connection broke")
    if kind == "Connect":
        return Failure(Unavailable(f"{host} cannot be reached: {cause}; check the endpoint, and the network"), again=True)
    return Failure(Unavailable(f"{host}: {what}: {cause}"), again=True, untouched=False)


def _answer(said: str, status: int, code: str) -> str:
    """What the service said, for a message: bounded, with no markup."""
    message = match[1] if (match := _MESSAGE.search(said)) else ""
    parts = [str(status) if status else "", code, message]
    text = " ".join(filter(None, parts)) or said.removeprefix("Generic S3 error: ")
    return text[:200]


def _place(url: HostURL) -> str:
    """Where the credentials come from, for a message."""
    if file := url.parameter("credentials"):
        return file
    if profile := url.parameter("profile"):
        return f"profile {profile!r} in ~/.aws"
    return {"s3": "AWS_ACCESS_KEY_ID and ~/.aws", "gs": "GOOGLE_APPLICATION_CREDENTIALS", "az": "AZURE_STORAGE_..."}[url.scheme]
