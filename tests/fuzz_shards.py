"""Damaged shards through the real route, and what an independent reading says of each.

    python tests/fuzz_shards.py --cases 5000 --seed 1      prints the figures as JSON; exit code 1: something was lost

The independent reading is Python's tarfile and WebDataset's grouping rules, written here a second time. A shard is
either refused with a ShardError, and then nothing is published, or its rows and errors together are the samples of
that reading, one each, in order. The reading is of the tar before it was damaged; where damage may make another good
tar (blocks spliced, members moved), of the damaged bytes. A sample with one good image and good metadata must be a row.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import resource
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.parquet as pq

from fuzz_images import good_images
from fuzz_tars import GOOD_JSON, GOOD_TEXTS, Case, make_case
from make_data import FakeTokenizer, fake_table, listed, peak_bytes
from pipeline.errors import ShardError
from pipeline.images import ImageSpec
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import ShardTask
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker

IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"}
COLUMNS = (
    MetadataColumn("caption", "txt"),
    MetadataColumn("score", "json.score", "float32"),
    MetadataColumn("n", "json.n", "int64"),
)
CASE_TIME_LIMIT_S = 20
ADDRESS_SPACE_BYTES = 4 << 30  # of the whole process; what is asked for and never touched counts as well
CASE_MEMORY_LIMIT_BYTES = 400 << 20  # that one case may add to the peak of the process


@dataclass
class Expected:
    """One sample of the independent reading. `row`: it must be one; `error`: it must not be."""

    key: str
    members: list[tuple[str, bytes | None]] = field(default_factory=list)  # extension, data of a file
    repeated: bool = False

    @property
    def images(self) -> list[bytes | None]:
        plain = [data for extension, data in self.members if extension in IMAGE_EXTENSIONS]
        dotted = [data for extension, data in self.members if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
        return plain or dotted

    def metadata(self, extension: str) -> list[bytes | None]:
        return [data for name, data in self.members if name == extension]

    @property
    def must_fail(self) -> bool:
        chosen = self.metadata("txt"), self.metadata("json")
        return (
            self.repeated
            or len(self.images) != 1
            or None in self.images
            or any(None in c or len(c) > 1 for c in chosen)
        )

    @property
    def must_be_row(self) -> bool:
        good = {data for _, data in good_images()}
        texts, jsons = self.metadata("txt"), self.metadata("json")
        return not self.must_fail and {*self.images} <= good and {*texts} <= {*GOOD_TEXTS} and {*jsons} <= {*GOOD_JSON}


def split(name: str) -> tuple[str, str] | None:
    """(key, extension) by WebDataset's rules: at the first dot of the base name; `__x__` at the front is no sample."""
    first, _, _ = name.partition("/")
    if first.startswith("__") and first.endswith("__") and len(first) >= 4:
        return None
    if name.startswith("__") and "__" in first[2:] and first.endswith("__"):
        return None
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot:
        return None
    if stem:
        return folder + slash + stem, extension.lower()
    # `folder/.x.jpg`: the rule is a pattern that then takes the folder, slash and all, for the key.
    return (folder + slash, extension.lower()) if folder + slash and "." not in folder else None


def name_of(member: tarfile.TarInfo, data: bytes) -> str:
    """The name by the standards where tarfile is lax: it takes an empty PAX path for a name (POSIX: as if it were not
    there), and the prefix field for a folder where the magic is not ustar's (GNU tar keeps times there)."""
    header = data[member.offset_data - 512 : member.offset_data]
    (name, _, _), (prefix, _, _) = header[:100].partition(b"\0"), header[345:500].partition(b"\0")
    is_ustar = header[257:263] == b"ustar\0"
    full = member.name.encode("utf-8", "surrogateescape")
    if member.pax_headers.get("path") == "":
        full = prefix + b"/" + name if prefix and is_ustar else name
    elif prefix and not is_ustar and "path" not in member.pax_headers:
        full = full.removeprefix(prefix + b"/")
    return full.decode("utf-8", "backslashreplace")


def independent_reading(data: bytes) -> list[Expected]:
    """The samples of a tar, as tarfile sees it. Raises tarfile.TarError, OSError or EOFError where it sees none."""
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    found: list[Expected] = []
    seen: set[str] = set()
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", errorlevel=2) as tar:
        for member in tar:
            pair = None if member.isdir() else split(name_of(member, data))
            if pair is None:
                continue
            if not found or found[-1].key != pair[0]:
                found.append(Expected(pair[0], repeated=pair[0] in seen))
                seen.add(pair[0])
            file = tar.extractfile(member) if member.isreg() else None
            found[-1].members.append((pair[1], file.read() if file else None))
    return found


@dataclass
class Figures:
    """What became of the cases of one kind."""

    cases: int = 0
    rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # shards, by reason
    errors: Counter[str] = field(default_factory=Counter)  # samples, by reason


class Fuzzer:
    """One worker that takes case after case, as an actor does; a fault of one case must not reach the next."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.figures, self.problems = folder, dict[str, Figures](), list[str]()
        table = fake_table(columns=COLUMNS, image_spec=ImageSpec(size=16, small="upscale").to_json())
        self.output = OutputPrefix(str(folder / "out"))
        self.worker = TokenizeWorker(FakeTokenizer(), TokenizeJob(self.output, table, batch_size=4, decode_threads=2))

    def run(self, case: Case) -> None:
        """Counts the case; notes a problem where it was not treated as it must."""
        figures = self.figures.setdefault(case.kind, Figures())
        figures.cases += 1
        path = self.folder / case.name
        path.write_bytes(case.data)
        task = ShardTask(listed(path), part_name(str(path)))
        part, errors = Path(self.output.part(task.part)), Path(self.output.errors(task.part))
        try:
            with time_limit(CASE_TIME_LIMIT_S):
                self.worker.tokenize(task)
        except ShardError as error:
            figures.refused[error.reason] += 1
            self._check_refusal(case, error, [part, errors])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
            self.problems.append(f"{case.kind} {case.name}: {type(error).__name__}: {error}"[:500])
        else:
            rows = pq.read_table(part).to_pylist()
            failed = pq.read_table(errors).to_pylist() if errors.exists() else []
            figures.rows += len(rows)
            figures.errors.update(row["reason"] for row in failed)
            self.problems += [f"{case.kind} {case.name}: {problem}" for problem in compare(case, rows, failed)]
        for left in (path, part, errors):
            left.unlink(missing_ok=True)

    def _check_refusal(self, case: Case, error: ShardError, published: list[Path]) -> None:
        if any(path.exists() for path in published):
            self.problems.append(f"{case.kind} {case.name}: refused, and yet published")
        if case.data == case.intact or case.kind in ("intact", "long names", "bad images", "bad metadata"):
            self.problems.append(f"{case.kind} {case.name}: a good tar was refused: {error}")

    def close(self) -> None:
        self.worker.close()


def compare(case: Case, rows: list[dict[str, Any]], failed: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with what was published for a case."""
    try:
        expected = independent_reading(case.data if case.intact is None else case.intact)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield f"was read, where tarfile says {type(error).__name__}: {error}"
        return
    found = sorted([*rows, *failed], key=lambda row: row["index"])
    if [row["key"] for row in found] != [sample.key for sample in expected]:
        yield f"has {[row['key'] for row in found]}, not {[sample.key for sample in expected]}"
        return
    if [row["index"] for row in found] != list(range(len(expected))):
        yield f"has indices {[row['index'] for row in found]}"
    for row, sample in zip(found, expected, strict=True):
        if "tokens" not in row and sample.must_be_row:
            yield f"{sample.key}: good, and refused: {row['reason']}: {row['message']}"
        if "tokens" in row and sample.must_fail:
            yield f"{sample.key}: has a row, and must not"
        if "tokens" in row and not sample.must_fail:
            yield from compare_row(case, row, sample)


def compare_row(case: Case, row: dict[str, Any], sample: Expected) -> Iterator[str]:
    (image,) = sample.images
    assert image is not None
    if row["size"] != len(image):
        yield f"{sample.key}: {row['size']} bytes, not {len(image)}"
    if row["offset"] is not None and case.data[row["offset"] : row["offset"] + row["size"]] != image:
        yield f"{sample.key}: its bytes are not where its row says"
    if (row["offset"] is None) != case.data.startswith(b"\x1f\x8b"):
        yield f"{sample.key}: offset {row['offset']}"
    for data in sample.metadata("txt"):
        if data is not None and (row["caption"] or "").encode() != data:
            yield f"{sample.key}: caption {row['caption']!r}"


class TookTooLong(BaseException):
    """Not an Exception: nothing on the way may take it for a fault of the shard."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def ring(_: int, __: FrameType | None) -> None:
        raise TookTooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(cases: range, seed: int, folder: Path) -> dict[str, Any]:
    """Runs the cases; the figures, ready for JSON."""
    digest, started, first_peak = hashlib.sha256(), time.monotonic(), 0
    with closing(Fuzzer(folder)) as fuzzer:
        for number in cases:
            print(f"case {number}", file=sys.stderr, flush=True)  # noqa: T201 - what killed the process, should it die
            case = make_case(seed, number)
            digest.update(case.data)
            before = peak_bytes()
            first_peak = first_peak or before
            try:
                fuzzer.run(case)
            except TookTooLong as error:
                fuzzer.problems.append(f"{case.kind} {case.name}: {error}")
            if peak_bytes() - before > CASE_MEMORY_LIMIT_BYTES:
                fuzzer.problems.append(f"{case.kind} {case.name}: took {(peak_bytes() - before) >> 20} MiB")
    kinds = fuzzer.figures
    num_rows, num_errors = sum(f.rows for f in kinds.values()), sum(f.errors.total() for f in kinds.values())
    seconds = time.monotonic() - started
    return {
        "seed": seed, "cases": len(cases), "sha256_of_cases": digest.hexdigest(), "problems": fuzzer.problems,
        "rows": num_rows, "errors": num_errors, "refused": sum(f.refused.total() for f in kinds.values()),
        "errors_by_reason": dict(sum((f.errors for f in kinds.values()), Counter())),
        "refused_by_reason": dict(sum((f.refused for f in kinds.values()), Counter())),
        "seconds": round(seconds, 1), "images_per_second": round((num_rows + num_errors) / seconds, 1),
        "peak_mib": peak_bytes() >> 20, "peak_mib_before_the_first_case": first_peak >> 20,
        "by_kind": {
            kind: {"cases": f.cases, "rows": f.rows, "errors": dict(f.errors), "refused": dict(f.refused)}
            for kind, f in sorted(kinds.items())
        },
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(range(options.first, options.first + options.cases), options.seed, Path(folder))
    print(json.dumps(result, indent=1))  # noqa: T201
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
