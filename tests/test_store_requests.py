"""What is asked again, and what is not. Errors are those that the clients of the stores really raise."""

from __future__ import annotations

import errno
import logging
import ssl
from collections.abc import Iterator

import aiohttp
import pytest
from botocore import exceptions as boto
from fsspec.exceptions import FSTimeoutError
from multidict import CIMultiDict, CIMultiDictProxy
from s3fs.errors import translate_boto_error
from yarl import URL

from pipeline import store_requests
from pipeline.errors import StorageError
from pipeline.store_requests import is_changed, is_passing, request


def cut_body() -> Exception:
    """What aiohttp makes of a body that ends early; its cause has a code that is no answer of the server's."""
    error = aiohttp.ClientPayloadError("Response payload is not completed")
    error.__cause__ = aiohttp.http_exceptions.ContentLengthError("received 1000 of 4096 bytes")
    return error


def s3_error(status: int, code: str) -> Exception:
    """As s3fs raises it."""
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(boto.ClientError(answer, "PutObject"))  # type: ignore[no-any-return]


def web_error(status: int) -> Exception:
    request_info = aiohttp.RequestInfo(URL("http://h/x"), "GET", CIMultiDictProxy(CIMultiDict()), URL("http://h/x"))
    return aiohttp.ClientResponseError(request_info, (), status=status)


class AzureError(Exception):
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


PASSING = [
    s3_error(503, "SlowDown"), s3_error(503, "ServiceUnavailable"), s3_error(500, "InternalError"),
    s3_error(400, "RequestTimeout"), s3_error(400, "BadDigest"), s3_error(409, "OperationAborted"),
    s3_error(429, "TooManyRequests"), s3_error(502, "502"), s3_error(400, "XAmzContentSHA256Mismatch"),
    web_error(503), web_error(429), AzureError(503),
    boto.EndpointConnectionError(endpoint_url="http://h"), boto.ReadTimeoutError(endpoint_url="http://h"),
    boto.ConnectTimeoutError(endpoint_url="http://h"), boto.ConnectionClosedError(endpoint_url="http://h"),
    boto.HTTPClientError(error=OSError()), aiohttp.ServerDisconnectedError(), cut_body(),
    FSTimeoutError(), TimeoutError(), ConnectionResetError(), BrokenPipeError(), OSError(errno.EIO, "i/o"),
]  # fmt: skip
FINAL = [
    s3_error(404, "NoSuchKey"), s3_error(403, "AccessDenied"), s3_error(400, "InvalidArgument"),
    s3_error(412, "PreconditionFailed"), s3_error(501, "NotImplemented"), s3_error(400, "InvalidBucketName"),
    s3_error(403, "SignatureDoesNotMatch"), web_error(403), web_error(404), AzureError(401),
    boto.NoCredentialsError(), boto.ParamValidationError(report="wrong"), boto.SSLError(endpoint_url="h", error=""),
    ssl.SSLCertVerificationError("no"), FileNotFoundError(), FileExistsError(), PermissionError(),
    IsADirectoryError(), OSError(errno.ENOSPC, "full"), ValueError(), TypeError(), RuntimeError(), KeyboardInterrupt(),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_asked_again(error: Exception) -> None:
    assert is_passing(error)


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_will_not_pass_is_not_asked_again(error: BaseException) -> None:
    assert not is_passing(error)


def test_a_refused_condition_is_known_as_one_however_deep_it_is_hidden() -> None:
    refused = OSError(errno.EBUSY, "no longer exists")
    refused.__cause__ = s3_error(412, "PreconditionFailed")
    assert is_changed(refused) and is_changed(web_error(412)) and not is_passing(refused)
    assert not is_changed(s3_error(404, "NoSuchKey")) and not is_changed(OSError(errno.EINVAL, "invalid"))


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(store_requests, "MAX_PAUSE_S", 0.0)
    yield


def failing(times: int, error: Exception, tries: list[int]) -> str:
    tries.append(1)
    if len(tries) <= times:
        raise error
    return "done"


def test_waiting_is_said_with_its_cause_and_without_credentials(hurry: None, caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []
    error = ConnectionResetError("s3://user:s3cr3t@bucket/k reset")
    with caplog.at_level(logging.WARNING):
        assert request("read", "s3://user:s3cr3t@bucket/k", lambda: failing(3, error, tries)) == "done"
    assert len(tries) == 4
    assert "cannot read s3://bucket/k: ConnectionResetError: s3://bucket/k reset; trying again in 0.0 s" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_a_local_disk_is_never_asked_again(hurry: None) -> None:
    tries: list[int] = []
    with pytest.raises(StorageError, match="cannot read /x: OSError"):
        request("read", "/x", lambda: failing(1, OSError(errno.EIO, "i/o"), tries))
    assert len(tries) == 1


def test_a_store_that_stays_away_is_given_up_with_its_last_error(hurry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_requests, "PATIENCE_S", 0.05)
    with pytest.raises(StorageError, match=r"cannot write s3://b/k: OSError: .*SlowDown"):
        request("write", "s3://b/k", lambda: failing(10**9, s3_error(503, "SlowDown"), []), writes=True)
