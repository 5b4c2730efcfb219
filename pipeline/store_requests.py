"""One request to a store: asked again while its failure may pass, then given a name. Knows no store's client: it goes
by what their errors say of themselves."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    stop_all,
    wait_random_exponential,
)

from pipeline.errors import PipelineError, StorageError
from pipeline.urls import is_local, public_text, public_url

PATIENCE_S = 60.0  # a server that is started again, a storm of "slow down"
WRITE_TRIES = 3  # at least: one write that hangs may take all the patience
MAX_PAUSE_S = 8.0
log = logging.getLogger(__name__)
T = TypeVar("T")

_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING_ERRNOS = {
    errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN,
}  # fmt: skip
_PASSING_STATUSES = {408, 409, 425, 429}  # and all from 500 on but 501
_PASSING_CODES = {  # bytes that did not come, or came damaged, on their way to the store
    "RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
}  # fmt: skip
# Of botocore, aiohttp, azure-core and google-auth: no answer, or half of one. None of them is imported here.
_PASSING_NAMES = {
    "HTTPClientError", "EndpointConnectionError", "ConnectTimeoutError", "ResponseParserError", "IncompleteRead",
    "IncompleteReadError", "ClientConnectionError", "ClientPayloadError", "ServiceRequestError",
    "ServiceResponseError", "TransportError",
}  # fmt: skip
_FINAL_NAMES = {"ResourceExistsError", "SSLError", "SSLCertVerificationError", "CertificateError"}


class ShortAnswer(OSError):
    """A store gave other than the bytes that were asked for."""

    def __init__(self, given: int, asked: int) -> None:
        super().__init__(f"gave {given} bytes where {asked} were asked for")


def request(action: str, url: str, call: Callable[[], T], *, writes: bool = False) -> T:
    """What `call` gives. Raises StorageError with the action and the URL, whatever the store's client raises; a missing
    object stays FileNotFoundError, but where one is written it is the bucket or the folder that is missing."""
    may_pass = (lambda error: False) if is_local(url) else is_passing
    try:
        return patiently(f"{action} {public_url(url)}", call, may_pass, WRITE_TRIES if writes else 1)
    except PipelineError:
        raise
    except Exception as error:  # each store's client raises its own kinds, botocore's are no OSError
        missing = isinstance(error, FileNotFoundError)
        if missing and not writes:
            raise
        remedy = "; check the bucket or the folder" if missing else ""
        message = f"cannot {action} {public_url(url)}: {type(error).__name__}: {error}{remedy}"
        raise StorageError(public_text(message)) from error


def patiently(what: str, call: Callable[[], T], may_pass: Callable[[BaseException], bool], min_tries: int = 1) -> T:
    """Call again, with growing pauses, while `may_pass` says so of what it raises; then raise it, after PATIENCE_S and
    `min_tries`."""

    def say(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause_s = state.next_action.sleep if state.next_action else 0.0
        log.warning(
            "cannot %s: %s; trying again in %.1f s", what, public_text(f"{type(error).__name__}: {error}"), pause_s
        )

    return Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_all(stop_after_delay(PATIENCE_S), stop_after_attempt(min_tries)),
        wait=wait_random_exponential(multiplier=0.5, max=MAX_PAUSE_S),
        before_sleep=say,
        reraise=True,
    )(call)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed in a while."""
    if isinstance(error, _FINAL) or not isinstance(error, Exception):
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & (_FINAL_NAMES | _PASSING_NAMES):
        return not names & _FINAL_NAMES
    answers = list(_answers(error))
    if answers:
        return any(_is_passing_answer(*answer) for answer in answers)
    return isinstance(error, TimeoutError | ConnectionError) or (
        isinstance(error, OSError) and error.errno in _PASSING_ERRNOS
    )


def is_changed(error: BaseException) -> bool:
    """Whether the store refused because the object is not the one that the request named."""
    return any(status == 412 for status, _ in _answers(error))


def _is_passing_answer(status: int, code: str) -> bool:
    return code in _PASSING_CODES or status in _PASSING_STATUSES or (status >= 500 and status != 501)


def _answers(error: BaseException | None) -> Iterator[tuple[int, str]]:
    """(HTTP status, the store's own code) of what a store answered: clients hide it in what they raise, or in its
    cause."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
        else:  # aiohttp, azure-core, gcsfs
            found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
            status, code = next((value for value in found if isinstance(value, int)), None), ""
        if status is not None and 400 <= status < 600:
            yield status, code
        error = error.__cause__
