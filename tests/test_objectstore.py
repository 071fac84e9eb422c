"""Object stores that misbehave: what is tried again, what is said at once, what is never read. Against a server that answers as it is told.

Waits are on trio's clock, which jumps: a test takes no longer than its requests.
"""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from botocore.exceptions import TokenRetrievalError

from storage.errors import Busy, Corrupt, FusefsError, NoSpace, NotFound, NotPermitted, Unavailable
from storage.hosts import clients, objectstore
from storage.hosts.buckets import features
from storage.hosts.credentials import Credentials
from storage.hosts.directory import DirectoryHost
from storage.hosts.objectstore import ObjectStoreHost
from storage.hosts.opening import open_host
from storage.hosts.s3_locks import S3Locks
from storage.hosts.urls import parse_url
from storage.seams import Seams
from tests.fakes import make_seams
from tests.mounting import wait_until


@dataclass
class Answer:
    """What the server says to one request. `hang`: seconds before anything of it; `held`: not before `Server.release` is set. `drop`: no
    answer, the connection is closed."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    held: bool = False
    drop: bool = False
    #: Seconds for which it takes its time to read what it is sent.
    slow: float = 0.0


def refusal(status: int, code: str, message: str = "because") -> Answer:
    return Answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())


OK = Answer(headers={"ETag": '"tag"'})
CONTENT = Answer(200, b"0123456789", {"ETag": '"tag"', "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"})


class Server:
    """Answers in order, the last one again and again; keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [OK]
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        #: Answers of which somebody has not read the end.
        self.cut_off = 0
        self.release = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                for part in range(10):
                    self.rfile.read(length // 10 + (length % 10 if part == 9 else 0))
                    time.sleep(outer.answers[0].slow / 10)
                outer.asked.append((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if answer.held:
                    outer.release.wait(60)
                if answer.hang:
                    time.sleep(answer.hang)
                if answer.drop:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in answer.headers:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    try:
                        for start in range(0, len(answer.body), 2**20):
                            self.wfile.write(answer.body[start : start + 2**20])
                    except OSError:
                        self.close_connection = True
                        outer.cut_off += 1

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

            def log_message(self, format: str, *args: object) -> None:
                return None

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def url(server: Server, tmp_path: Path) -> str:
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = key\naws_secret_access_key = HIDE\n")
    return f"s3://bucket/pre?credentials={tmp_path}/keys&endpoint={server.endpoint}&region=here"


@pytest.fixture
async def host(url: str) -> ObjectStoreHost:
    return await ObjectStoreHost.open(parse_url(url), make_seams())


Call = Callable[[ObjectStoreHost], object]


@pytest.mark.parametrize(
    "trouble",
    [refusal(503, "SlowDown"), refusal(500, "InternalError"), Answer(502), Answer(504), Answer(429), Answer(drop=True)],
    ids=["503", "500", "502", "504", "429", "dropped"],
)
async def test_what_may_pass_is_tried_again(
    host: ObjectStoreHost, server: Server, trouble: Answer, autojump_clock: trio.testing.MockClock
) -> None:
    server.answers = [trouble, trouble, CONTENT]
    assert await host.get("a", 100) == b"0123456789"
    server.answers = [trouble, trouble, OK]
    assert await host.put("a", b"data") == '"tag"'
    server.answers = [trouble, OK]
    await host.delete("a")
    assert [method for method, _, _ in server.asked] == ["GET"] * 3 + ["PUT"] * 3 + ["DELETE"] * 2


async def test_trying_ends_and_waits_grow(host: ObjectStoreHost, server: Server, autojump_clock: trio.testing.MockClock) -> None:
    server.answers = [refusal(503, "SlowDown", "later")]
    started = trio.current_time()
    with pytest.raises(Unavailable, match="503 SlowDown later"):
        await host.get("a", 100)
    assert len(server.asked) == objectstore.ATTEMPTS
    whole = objectstore.FIRST_WAIT * (2 ** (objectstore.ATTEMPTS - 1) - 1)
    assert whole / 2 <= trio.current_time() - started <= whole


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (refusal(404, "NoSuchBucket"), Unavailable, "there is no bucket 'bucket' at http://127.0.0.1"),
        (refusal(404, "NoSuchKey"), NotFound, "there is no a/b"),
        (refusal(403, "AccessDenied"), Unavailable, "may not do this: writing a/b: 403 AccessDenied"),
        (refusal(403, "SignatureDoesNotMatch"), Unavailable, "refuses the credentials"),
        (refusal(403, "InvalidAccessKeyId"), Unavailable, "/keys"),
        (refusal(400, "ExpiredToken"), Unavailable, "refuses the credentials"),
        (refusal(403, "RequestTimeTooSkewed"), Unavailable, "set the clock"),
        (refusal(301, "PermanentRedirect"), Unavailable, r"\?region="),
        (refusal(400, "AuthorizationHeaderMalformed", "expecting 'eu-1'"), Unavailable, r"expecting 'eu-1'\); name it with \?region="),
        (refusal(403, "QuotaExceeded"), NoSpace, "is full"),
        (Answer(507), NoSpace, "is full"),
        (refusal(409, "OperationAborted"), (Busy, Unavailable), "a/b"),
        (refusal(400, "InvalidRequest", "no \x1b[31m such\nthing " + "x" * 5000), Unavailable, r"\\x1b"),
        (Answer(200), Unavailable, "no tag|ETag"),
        (Answer(418, b"not XML <Code>"), Unavailable, "418"),
    ],
)
async def test_what_cannot_be_helped_is_said_at_once(
    host: ObjectStoreHost, server: Server, answer: Answer, kind: type[FusefsError], says: str, autojump_clock: trio.testing.MockClock
) -> None:
    server.answers = [answer]
    with pytest.raises(kind, match=says) as caught:
        await host.put("a/b", b"data")
    assert len(server.asked) == 1
    message = str(caught.value)
    assert len(message) < 800
    assert message.isprintable()
    assert "HIDE" not in message


async def test_deleting_without_the_right_is_not_permitted(host: ObjectStoreHost, server: Server) -> None:
    server.answers = [refusal(403, "AccessDenied")]
    with pytest.raises(NotPermitted, match="may not delete a/b"):
        await host.delete("a/b")
    server.answers = [refusal(404, "NoSuchBucket")]
    with pytest.raises(Unavailable, match="no bucket"):
        await host.delete("a/b")


@pytest.mark.parametrize(
    "lost", [refusal(500, "InternalError"), Answer(504), Answer(drop=True), Answer(400)], ids=["500", "504", "dropped", "400"]
)
async def test_a_conditional_put_that_may_have_happened_is_not_tried_again(
    host: ObjectStoreHost, server: Server, lost: Answer, autojump_clock: trio.testing.MockClock
) -> None:
    """Its own first try could be what makes the second one lose: then the caller would take itself for somebody else."""
    server.answers = [lost, refusal(412, "PreconditionFailed")]
    with pytest.raises(Unavailable):
        await host.put_if("a", b"data", None)
    assert len(server.asked) == 1


async def test_a_conditional_put_that_was_put_off_is_tried_again(
    host: ObjectStoreHost, server: Server, autojump_clock: trio.testing.MockClock
) -> None:
    server.answers = [refusal(503, "SlowDown"), OK]
    assert await host.put_if("a", b"data", '"old"') == '"tag"'
    assert [headers["if-match"] for _, _, headers in server.asked] == ['"old"'] * 2
    server.answers = [refusal(412, "PreconditionFailed")]
    with pytest.raises(Busy, match="changed by somebody else"):
        await host.put_if("a", b"data", None)
    assert server.asked[-1][2]["if-none-match"] == "*"


async def test_a_conditional_put_to_a_bucket_that_is_gone_is_no_lost_race(host: ObjectStoreHost, server: Server) -> None:
    server.answers = [refusal(404, "NoSuchBucket")]
    with pytest.raises(Unavailable, match="no bucket"):
        await host.put_if("a", b"data", '"old"')


@pytest.mark.parametrize("answer", [refusal(416, "InvalidRange"), refusal(200, "x")], ids=["no such range", "another document"])
async def test_an_answer_that_fits_no_question_is_an_error_of_our_own(host: ObjectStoreHost, server: Server, answer: Answer) -> None:
    """Whatever a host answers to whatever it was asked: any other exception would end the mount."""
    server.answers = [answer]

    async def listed() -> object:
        return [entry async for entry in host.list("a/")]

    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: host.get("a/b", 100),
        lambda: host.get_range("a/b", 0, 10),
        lambda: host.tag("a/b"),
        lambda: host.level("a/"),
        listed,
        lambda: host.put("a/b", b"data"),
        lambda: host.put_if("a/b", b"data", None),
        lambda: host.delete("a/b"),
    ]
    for call in calls:
        with suppress(FusefsError):
            await call()


async def test_more_than_the_limit_is_not_read(host: ObjectStoreHost, server: Server) -> None:
    server.answers = [Answer(200, b"x" * 10, {**CONTENT.headers, "Content-Length": str(10**12)})]
    with pytest.raises(Corrupt, match="1000000000000"):
        await host.get("a", 100)


async def test_an_answer_to_a_range_is_cut_off_where_the_range_ends(host: ObjectStoreHost, server: Server) -> None:
    """Whatever its headers say: a host that sends without end takes neither memory nor time."""
    body = bytes(range(256)) * 2**18
    server.answers = [Answer(206, body, {**CONTENT.headers, "Content-Range": f"bytes 0-99/{len(body)}"})]
    assert await host.get_range("a", 0, 100) == body[:100]
    wait_until(lambda: server.cut_off == 1, "the connection is closed")


async def test_what_breaks_off_is_not_taken_for_the_whole(
    host: ObjectStoreHost, server: Server, autojump_clock: trio.testing.MockClock
) -> None:
    server.answers = [Answer(200, b"0123", {**CONTENT.headers, "Content-Length": "10", "Connection": "close"})]
    with pytest.raises(Unavailable):
        await host.get("a", 100)


async def test_where_ranges_are_not_read_objects_are_read_whole_and_the_last_one_kept(host: ObjectStoreHost, server: Server) -> None:
    server.answers = [CONTENT]
    assert await host.get_range("a", 2, 3) == b"234"
    assert not host.capabilities.ranges
    asked = len(server.asked)
    assert await host.get_range("a", 8, 10) == b"89"
    assert await host.get_range("a", 20, 10) == b""
    assert len(server.asked) == asked
    await host.put("a", b"another")
    assert await host.get_range("a", 0, 1) == b"0"
    assert len(server.asked) == asked + 2


async def test_a_hung_request_is_given_up_and_its_thread_ends(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(clients, "REQUEST_SECONDS", 0.6)
    host = await ObjectStoreHost.open(parse_url(url), Seams())
    server.answers = [Answer(hang=2.0)]
    with trio.move_on_after(0.1) as scope:
        await host.put("a", b"data")
    assert scope.cancelled_caught
    with pytest.raises(Unavailable, match="an earlier change of a hangs"):
        await host.put("a", b"other")
    while host.at_work:
        await trio.sleep(0.05)
    server.answers = [OK]
    await host.put("a", b"other")
    monkeypatch.setattr(objectstore, "ATTEMPTS", 1)
    server.answers = [Answer(hang=2.0)]
    with pytest.raises(Unavailable, match="no answer in time"):
        await host.get("a", 10)


@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", "SignatureDoesNotMatch"])
async def test_what_versions_and_locks_are_asked_for_names_the_clock_too(url: str, server: Server, code: str) -> None:
    """It is no lack of rights, and the bucket has not said that it has no lock."""
    server.answers = [refusal(403, code)]
    locks = await S3Locks.open(parse_url(url), make_seams(real_threads=True), "COMPLIANCE")
    with pytest.raises(Unavailable, match="clock"):
        await locks.put("a/b", b"1", 0, new=False)
    with pytest.raises(Unavailable, match="clock"):
        await locks.remove("a/b", "version")
    with pytest.raises(Unavailable, match="clock"):
        await ObjectStoreHost.open(parse_url(url), make_seams(real_threads=True), look=True)


async def test_hosts_that_hang_all_at_once_do_not_keep_disks_from_being_asked(url: str, server: Server, tmp_path: Path) -> None:
    """Staging is on a disk of this machine: it goes on while nothing of the network does."""
    seams = Seams()
    hosts = [await ObjectStoreHost.open(parse_url(url.replace("/pre", f"/pre{number}")), seams) for number in range(5)]
    server.answers = [Answer(held=True)]
    async with trio.open_nursery() as nursery:
        for host in hosts:
            for number in range(objectstore.SLOTS):
                nursery.start_soon(host.get, f"a{number}", 1)
        while sum(host.at_work for host in hosts) < 5 * objectstore.SLOTS:
            await trio.sleep(0.01)
        with trio.fail_after(60):
            disk = await DirectoryHost.open(str(tmp_path / "disk"), seams, create=True)
            await disk.put("a", b"1")
        assert sum(host.at_work for host in hosts) == 5 * objectstore.SLOTS
        nursery.cancel_scope.cancel()
    server.release.set()
    while sum(host.at_work for host in hosts):
        await trio.sleep(0.01)


async def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    server = Server()
    server.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "HIDE")
    with pytest.raises(Unavailable, match=r"cannot be reached: .*; check the endpoint"):
        await (await open_host(parse_url(f"s3://bucket?endpoint={server.endpoint}"), make_seams())).get("a", 1)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await (await open_host(parse_url("s3://bucket?endpoint=http://no-such-name.invalid"), make_seams())).get("a", 1)


async def test_on_google_cloud_storage_conditions_are_generations(server: Server, tmp_path: Path) -> None:
    """No emulator of its protocol does conditional puts: this is what is sent, and how answers are taken."""
    key = {"gcs_base_url": server.endpoint, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    (tmp_path / "key.json").write_text(json.dumps(key))
    host = await open_host(parse_url(f"gs://bucket/pre?credentials={tmp_path}/key.json&endpoint={server.endpoint}"), make_seams())
    server.answers = [Answer(headers={**CONTENT.headers, "x-goog-generation": "1700"})]
    assert await host.put_if("a", b"1", None) == "1700"
    assert await host.put_if("a", b"1", "1600") == "1700"
    assert await host.put("a", b"1") == "1700"
    assert await host.tag("a") == "1700"
    conditions = [headers.get("x-goog-if-generation-match") for _, _, headers in server.asked]
    assert conditions == ["0", "1600", None, None]
    with pytest.raises(Busy):
        await host.put_if("a", b"1", "bogus")
    assert len(server.asked) == 4
    server.answers = [refusal(412, "PreconditionFailed")]
    with pytest.raises(Busy):
        await host.put_if("a", b"1", "1600")
    server.answers = [refusal(404, "NoSuchBucket")]
    with pytest.raises(Unavailable, match="no bucket 'bucket'"):
        await host.get("a", 1)


async def test_a_service_in_trouble_has_not_said_that_its_bucket_has_no_lock(
    url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else everything would be put without locks until the next mount."""
    server.answers = [refusal(503, "SlowDown")]
    with pytest.raises(Unavailable, match="what its bucket keeps: 503"):
        await open_host(parse_url(url), Seams())
    for answer in (refusal(501, "NotImplemented"), refusal(403, "AccessDenied"), refusal(400, "MalformedXML")):
        server.answers = [answer]
        assert not (await open_host(parse_url(url), Seams())).capabilities.object_lock


# ------------------------------------------------------------------------------------------------------------- listing


def page(*names: str, more: str = "") -> Answer:
    entries = "".join(
        f"<Contents><Key>pre/{name}</Key><Size>7</Size><LastModified>2025-01-01T00:00:00.000Z</LastModified></Contents>" for name in names
    )
    token = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{more}</NextContinuationToken>" if more else ""
    return Answer(200, f"<?xml version='1.0'?><ListBucketResult><Name>bucket</Name>{token}{entries}</ListBucketResult>".encode())


async def test_a_listing_that_breaks_off_goes_on_behind_the_last_name(
    host: ObjectStoreHost, server: Server, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "PAGE", 2)
    server.answers = [page("v/a", "v/b", more="next"), refusal(503, "SlowDown"), page("v/c")]
    assert [name async for name, _ in host.list("v/")] == ["v/a", "v/b", "v/c"]
    assert "start-after=pre%2Fv%2Fb" in server.asked[2][1]


async def test_a_listing_that_cannot_go_on_is_no_short_one(
    host: ObjectStoreHost, server: Server, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "PAGE", 1)
    server.answers = [page("v/a", more="next"), refusal(503, "SlowDown")]
    found = []
    with pytest.raises(Unavailable):
        async for name, _ in host.list("v/"):
            found.append(name)
    assert found == ["v/a"]


async def test_what_has_no_name_of_ours_is_not_listed(host: ObjectStoreHost, server: Server) -> None:
    server.answers = [page("v/a", "v/~x", "v/a b", "w/c", "v/d")]
    assert [name async for name, _ in host.list("v/")] == ["v/a", "v/d"]
    server.answers = [page("v/a", "v/../x")]
    with pytest.raises(Unavailable, match=r"cannot be listed, remove it: .*pre/v/../x"):
        _ = [name async for name, _ in host.list("v/")]


# --------------------------------------------------------------------------------------------------------- credentials


async def test_the_first_place_that_is_named_has_the_credentials(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the URL before the environment; a profile before the environment; the environment last."""
    (tmp_path / "home").write_text(
        "[default]\naws_access_key_id = of-default\naws_secret_access_key = x\n[p]\naws_access_key_id = of-p\naws_secret_access_key = x\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

    async def key_used(text: str) -> str:
        await (await open_host(parse_url(text), make_seams())).put("a", b"")
        return server.asked[-1][2]["authorization"].split("Credential=")[1].split("/")[0]

    plain = f"s3://bucket?endpoint={server.endpoint}"
    assert await key_used(plain) == "of-default"
    assert await key_used(plain + "&profile=p") == "of-p"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert await key_used(plain) == "of-environment"
    assert await key_used(plain + "&profile=p") == "of-p"
    assert await key_used(url) == "key"


async def test_credentials_that_cannot_be_renewed_are_said_at_once(
    host: ObjectStoreHost, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expired(_: Credentials) -> dict[str, Any]:
        raise TokenRetrievalError(provider="sso", error_msg="log in again")

    monkeypatch.setattr(Credentials, "__call__", expired)
    with pytest.raises(Unavailable, match=r"cannot be had .*log in again.*; see .*keys"):
        await host.put("a", b"")
    assert server.asked == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s3://bucket?profile=nobody", "no profile 'nobody' in ~/.aws"),
        ("s3://bucket?credentials={tmp}/missing", "cannot be read: No such file"),
        ("s3://bucket?credentials={tmp}/empty", "empty"),
        ("s3://bucket?credentials={tmp}/junk", "junk"),
        ("s3://bucket", "no credentials found"),
        ("az://container", "account=NAME"),
        ("az://container?account=a&credentials={tmp}/empty", "no connection string"),
        ("gs://bucket?credentials={tmp}/missing", "cannot be read"),
        ("gs://bucket?credentials={tmp}/junk", "no file of credentials"),
    ],
)
async def test_missing_credentials_are_said_with_their_place(text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "junk").write_bytes(b"\x00\xff[no\n")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Unavailable, match=says):
        await open_host(parse_url(text.format(tmp=tmp_path)), make_seams())


async def test_an_object_may_be_sent_for_longer_than_an_answer_may_be_silent(
    url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow line: nothing is answered before all is sent."""
    monkeypatch.setattr(clients, "SILENCE_SECONDS", 0.5)
    server.answers = [Answer(headers={"ETag": '"tag"'}, slow=1.5)]
    host = await ObjectStoreHost.open(parse_url(url), Seams())
    # More than what the sockets' buffers take at once.
    assert await host.put("volumes/x", bytes(16 * 2**20))
    assert [method for method, _, _ in server.asked] == ["PUT"]


def test_a_bucket_that_cannot_be_asked_what_it_is_for_says_what_the_system_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the name of a library's class."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(Unavailable, match="cannot be reached: Connection refused; check the endpoint"):
            features(parse_url(f"s3://bucket?endpoint=http://127.0.0.1:{port}"))
