"""When a mark that is not the MD5 of an object means damage, and when that its bucket has no MD5s."""

from __future__ import annotations

import hashlib
import random

import pytest

from pipeline.md5_marks import ENOUGH_STRANGERS, Md5Marks, PartedMd5, Verdict


@pytest.fixture
def marks() -> Md5Marks:
    return Md5Marks()


def test_a_bucket_of_which_nothing_is_known_may_have_md5s(marks: Md5Marks) -> None:
    assert marks.may_be_md5s("s3://b")


def test_a_bucket_has_none_after_several_objects_that_differ_and_none_that_matched(marks: Md5Marks) -> None:
    *first, last = [f"s3://b/{n}" for n in range(ENOUGH_STRANGERS)]
    for url in first:
        assert marks.differed("s3://b", url) is Verdict.UNKNOWN and marks.may_be_md5s("s3://b")
    assert marks.differed("s3://b", last) is Verdict.NO_MD5S and not marks.may_be_md5s("s3://b")


def test_one_object_that_differs_again_and_again_says_nothing_of_its_bucket(marks: Md5Marks) -> None:
    for _ in range(2 * ENOUGH_STRANGERS):
        assert marks.differed("s3://b", "s3://b/damaged") is Verdict.UNKNOWN
    assert marks.may_be_md5s("s3://b")


@pytest.mark.parametrize("num_before", range(ENOUGH_STRANGERS + 2))
def test_once_one_object_matched_each_that_differs_is_damaged(marks: Md5Marks, num_before: int) -> None:
    for n in range(num_before):
        marks.differed("s3://b", f"s3://b/{n}")
    marks.matched("s3://b")
    for n in range(2 * ENOUGH_STRANGERS):
        assert marks.differed("s3://b", f"s3://b/other-{n}") is Verdict.DAMAGED
    assert marks.may_be_md5s("s3://b")


def test_a_bucket_says_nothing_of_another(marks: Md5Marks) -> None:
    marks.matched("s3://a")
    for n in range(ENOUGH_STRANGERS):
        marks.differed("s3://b", f"s3://b/{n}")
    assert not marks.may_be_md5s("s3://b") and marks.may_be_md5s("s3://c")
    assert marks.differed("s3://c", "s3://c/0") is Verdict.UNKNOWN


@pytest.mark.parametrize("num_bytes", [1, 99, 100, 101, 200, 250])
@pytest.mark.parametrize("step", [1, 33, 100, 1000])
def test_the_md5_of_parts_does_not_depend_on_how_the_bytes_come(num_bytes: int, step: int) -> None:
    data, found = random.Random(0).randbytes(num_bytes), PartedMd5(100)
    for start in range(0, num_bytes, step):
        found.update(data[start : start + step])
    parts = [hashlib.md5(data[start : start + 100]).digest() for start in range(0, num_bytes, 100)]
    assert found.digest() == hashlib.md5(b"".join(parts)).digest()
