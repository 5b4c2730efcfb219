"""infra/storage-policies: the files for S3 allow every request that the jobs make, told from a real server's traffic,
and nothing in the folders that the jobs only read is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from fault_proxy import Fault, Rule, fault_proxy
from make_data import write_checkpoint, write_shards
from make_training import settings
from pipeline import storage

POLICIES = Path(__file__).parent.parent / "infra" / "storage-policies"
OUTPUTS = {"aws-tokenize.json": "tokens", "aws-read-tokens.json": "tokens", "aws-train.json": "models"}
WRITES = {"s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}


@dataclass
class Recorder(Rule):
    """A rule that spoils nothing and knows what was asked for."""

    asked: set[tuple[str, str]] = field(default_factory=set)

    def fires(self, method: str, path: str) -> bool:
        self.asked.add((method, path))
        return False


@dataclass(frozen=True)
class Request:
    """In the words of policies. `prefix`: of a listing."""

    action: str
    resource: str
    prefix: str | None = None


def request(method: str, target: str) -> Request:
    url = urlsplit(target)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    query = parse_qs(url.query, keep_blank_values=True)
    if not key:
        assert method in ("GET", "HEAD"), f"{method} {target} is nothing that a job should ask for"
        return Request("s3:ListBucket", f"arn:aws:s3:::{bucket}", query.get("prefix", [""])[0])
    verb = "Abort" if method == "DELETE" and "uploadId" in query else method
    actions = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "POST": "s3:PutObject",
               "DELETE": "s3:DeleteObject", "Abort": "s3:AbortMultipartUpload"}  # fmt: skip
    return Request(actions[verb], f"arn:aws:s3:::{bucket}/{key}")


def of_two_buckets(asked: Request, output: str) -> Request:
    """As if the folder `output` of the test's bucket were in a bucket of its own, by the policies' names of them."""
    folder = (asked.resource.partition("/")[2] or asked.prefix or "").partition("/")[0]
    bucket = "OUTPUT-BUCKET" if folder == output else "INPUT-BUCKET"
    return replace(asked, resource=re.sub(r":::test-bucket(?=/|$)", f":::{bucket}", asked.resource))


def as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else value


def allowed(statements: list[dict[str, Any]], asked: Request) -> bool:
    """The part of S3's rules that these files use."""
    for one in statements:
        prefixes = one.get("Condition", {}).get("StringLike", {}).get("s3:prefix")
        if (
            asked.action in as_list(one["Action"])
            and any(fnmatchcase(asked.resource, wanted) for wanted in as_list(one["Resource"]))
            and (prefixes is None or any(fnmatchcase(asked.prefix or "", wanted) for wanted in prefixes))
        ):
            return True
    return False


def refused(name: str, asked: set[tuple[str, str]]) -> list[Request]:
    statements = json.loads((POLICIES / name).read_text())["Statement"]
    requests = (of_two_buckets(request(*pair), OUTPUTS[name]) for pair in sorted(asked))
    return [one for one in requests if not allowed(statements, one)]


def dvae(port: int, *arguments: str) -> None:
    environment = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        storage.publish(storage.join(url, path.name), path.read_bytes())


def server_port() -> int:
    return urlsplit(os.environ["AWS_ENDPOINT_URL"]).port or 0


@pytest.mark.server
@pytest.mark.ray
def test_tokenising_asks_for_nothing_that_its_policy_refuses(s3: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [5, 11])
    upload(tmp_path / "shards", f"{s3}/images")
    storage.publish(f"{s3}/images/made-cut.tar", (tmp_path / "shards" / "made-000000.tar").read_bytes()[:1500])
    upload(write_checkpoint(tmp_path / "checkpoint"), f"{s3}/models/dvae")
    config = {"checkpoint": f"{s3}/models/dvae", "shards": f"{s3}/images/*.tar", "output": f"{s3}/tokens/images",
              "batch_size": 8, "attempts": 1, "max_failed_shards": 1}  # fmt: skip
    (tmp_path / "t.yaml").write_text(json.dumps(config))
    recorder = Recorder(Fault.HANG, "any", "any")
    with fault_proxy(server_port(), [recorder]) as proxy:
        dvae(proxy.port, "tokenize", str(tmp_path / "t.yaml"))
        storage.remove(f"{s3}/images/made-cut.tar")
        dvae(proxy.port, "tokenize", str(tmp_path / "t.yaml"), "--prune")  # resumes, and drops what is there no more
    asked = {request(*pair) for pair in recorder.asked}
    assert {one.action for one in asked} >= {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"}
    assert refused("aws-tokenize.json", recorder.asked) == []
    assert [one for one in asked if one.action in WRITES and "/tokens/" not in one.resource] == []

    recorder.asked.clear()
    with fault_proxy(server_port(), [recorder]) as proxy:
        for command in ("status", "verify", "stats"):
            dvae(proxy.port, command, f"{s3}/tokens/images")
    assert recorder.asked and refused("aws-read-tokens.json", recorder.asked) == []


@pytest.mark.server
@pytest.mark.training
def test_training_asks_for_nothing_that_its_policy_refuses(s3: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "train", (5, 23, 11))
    write_shards(tmp_path / "val", (7,))
    upload(tmp_path / "train", f"{s3}/images/train")
    upload(tmp_path / "val", f"{s3}/images/val")
    shards = {"train_shards": f"{s3}/images/train/*.tar", "val_shards": f"{s3}/images/val/*.tar"}
    plain = settings(tmp_path, output=f"{s3}/models/trained", steps=12, data=shards, checkpoint={"keep_last": 1})
    (tmp_path / "t.yaml").write_text(json.dumps(plain))
    recorder = Recorder(Fault.HANG, "any", "any")
    with fault_proxy(server_port(), [recorder]) as proxy:
        dvae(proxy.port, "train", str(tmp_path / "t.yaml"))
    asked = {request(*pair) for pair in recorder.asked}
    assert {one.action for one in asked} >= {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"}
    assert refused("aws-train.json", recorder.asked) == []


def test_a_request_elsewhere_is_refused() -> None:
    for asked in ("PUT /test-bucket/images/a.tar", "DELETE /test-bucket/models/dvae/model.json",
                  "GET /test-bucket?list-type=2&prefix=other/", "GET /other/images/a.tar"):  # fmt: skip
        method, _, path = asked.partition(" ")
        assert refused("aws-tokenize.json", {(method, path)}) != []


def test_buckets_in_each_others_place_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        "aws-tokenize.json": ["GET /test-bucket/images/a.tar", "GET /test-bucket?list-type=2&prefix=images/"],
        "aws-train.json": ["PUT /test-bucket/models/model.json", "GET /test-bucket?list-type=2&prefix=models/"],
        "aws-read-tokens.json": ["GET /test-bucket/tokens/run.json", "GET /test-bucket?list-type=2&prefix=tokens/"],
    }
    swapped = {"INPUT-BUCKET": "OUTPUT-BUCKET", "OUTPUT-BUCKET": "INPUT-BUCKET"}
    for name, lines in asked.items():
        pairs = {(method, path) for method, _, path in (line.partition(" ") for line in lines)}
        assert refused(name, pairs) == []
        text = (POLICIES / name).read_text()
        (tmp_path / name).write_text(re.sub("|".join(swapped), lambda found: swapped[found[0]], text))
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules[__name__], "POLICIES", tmp_path)
            assert len(refused(name, pairs)) == 2


def test_the_policies_of_other_clouds_allow_no_more_than_objects() -> None:
    azure = json.loads((POLICIES / "azure-output-role.json").read_text())
    assert azure["Actions"] == [] and all("/containers/blobs/" in action for action in azure["DataActions"])
    lines = (POLICIES / "gcp-output-role.yaml").read_text().splitlines()
    permissions = [line.split("- ")[1] for line in lines if line.startswith("  - ")]
    assert permissions and all(permission.startswith("storage.objects.") for permission in permissions)
