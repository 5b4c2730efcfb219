"""How a URL is spelled, taken apart and shown. No I/O: storage.py opens what they name."""

from __future__ import annotations

import os
import re
from pathlib import Path

_WEB_QUERY = re.compile("[?#]")
_SIGNED_QUERY = re.compile(
    r"[?#](?=(?:[^?#]*&)?(?:versionid|sig|sas|sv|se|token|[a-z_-]*(?:signature|credential|key|secret|password|token)"
    r"|x-(?:amz|goog)-[a-z-]*|awsaccesskeyid|googleaccessid)=)",
    re.IGNORECASE,
)
# Neither looks ahead without end: a text of a million letters or question marks would take an hour.
_URL = re.compile(r"\w[\w+.-]{0,63}://[^\s'\"<>]+")
_QUERY = re.compile(r"\?[^\s'\"<>?=]*=[^\s'\"<>]*")  # of a path whose host a client leaves out: GET /b/x.tar?sig=...
_SIGNATURE = re.compile(
    r"(?<![\w-])(sig|sas|token|x-(?:amz|goog)-[a-z-]+|awsaccesskeyid|googleaccessid"
    r"|[a-z_-]*(?:signature|credential|secret|password|_token|access_?key))=[^\s'\"<>&,;]+",
    re.IGNORECASE,
)
_ONE_SLASH = re.compile("(s3a?|gs|gcs|az|abfss?|https?|file|memory):/(?!/)")
_ALIASES = {"s3a": "s3", "gcs": "gs"}


def normalize(url: str) -> str:
    """The one spelling of a URL: local paths absolute and without `file://`, one name for a scheme, no trailing
    slash. Raises BadUrl where it is another thing than was meant."""
    from pipeline.errors import BadUrl  # errors.py imports this module

    if not url.strip():
        raise BadUrl("an empty URL names nothing: is a variable of the shell not set?")
    if _ONE_SLASH.match(url):
        raise BadUrl(f"{public_url(url)} has one slash after its scheme: write {url.replace(':/', '://', 1)}")
    if url.startswith("file://"):
        url = url.removeprefix("file://")
        url = url.removeprefix("localhost") if url.startswith("localhost/") else url
    if "://" not in url:
        path = os.path.abspath(Path(url).expanduser())  # noqa: PTH100 - resolve() would follow links
        return "/" + path.lstrip("/")  # it leaves two slashes
    scheme, separator, rest = url.rstrip("/").partition("://")
    return f"{_ALIASES.get(scheme, scheme)}{separator}{rest}"


def public_url(url: str) -> str:
    """`url` without credentials: what may be hashed, stored and shown. A web address loses its query string and
    fragment. Elsewhere `?` and `#` may stand in a name, so only what looks like a signature or a version is cut off."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    end = _WEB_QUERY if is_web(url) else _SIGNED_QUERY
    host, slash, path = end.split(rest, maxsplit=1)[0].partition("/")
    if not scheme.startswith(("abfs", "wasb")):  # there it is container@account
        host = host.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}"


def public_text(text: str) -> str:
    """`text` with every URL in it made public, and every other query and signature hidden: the messages of a store's
    client like to quote requests whole."""
    pieces, end = [], 0
    for match in _URL.finditer(text):
        pieces += [_hidden(text[end : match.start()]), public_url(match[0])]
        end = match.end()
    return "".join([*pieces, _hidden(text[end:])])


def _hidden(text: str) -> str:
    return _SIGNATURE.sub(r"\1=…", _QUERY.sub("?…", text))


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def base_name(url: str) -> str:
    """The last name of its path. (A plan asks for millions: urllib and pathlib take ten times as long.)"""
    path = public_url(url).partition("://")[2].partition("/")[2] if "://" in url else url
    return path.rstrip("/").rpartition("/")[2]


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def is_glob(url: str) -> bool:
    if is_web(url):  # its question mark begins a query, its brackets hold an address
        return "*" in public_url(url)
    return re.search(r"[*?\[]", url) is not None


def glob_folder(url: str) -> str:
    """What stands before the first wildcard, up to a slash."""
    folder = re.split(r"[*?\[]", url)[0].rpartition("/")[0]
    return f"{folder}/" if folder.endswith(":/") else folder
