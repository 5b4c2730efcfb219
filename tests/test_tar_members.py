"""The tar reader: whatever is cut, damaged or not a tar is an error, never a shorter list of members."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, cast

import pytest

from make_data import encoded, image_bytes, pixels, tar_bytes
from pipeline import tar_members as tar_members_py
from pipeline.errors import ShardDamaged, ShardError, ShardTruncated, ShardUnreadable
from pipeline.records import ObjectInfo
from pipeline.tar_members import BLOCK, CHUNK_BYTES, MAX_EXTENDED_HEADER_BYTES, MAX_PADDING_BYTES, Member, tar_members

LONG = "folder/" + "x" * 150 + "/" + "ü" * 40 + ".jpg"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
CHECKSUM = range(148, 156)


def read(data: bytes, listed: int | None = None, keep: int = 1 << 20, **options: Any) -> list[Member]:
    shard = ObjectInfo("x.tar", len(data) if listed is None else listed, "")
    return list(tar_members(io.BytesIO(data), shard, lambda name: keep, **options))


def small_members(long_name: bool) -> list[tuple[str, bytes]]:
    """Data of half a block, of none, of a whole block, and of a block and a bit."""
    first = LONG if long_name else "a.jpg"
    return [(first, b"a" * 256), ("a.txt", b""), ("b.jpg", b"b" * BLOCK), ("b.txt", b"c" * (BLOCK + 1))]


def small_tar(format: str) -> tuple[bytes, int]:
    """The tar with its two end blocks and nothing behind them, and where its last data block ends."""
    data = tar_bytes(small_members(format != "ustar"), FORMATS[format])
    data_end = len(data.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK
    return data[: data_end + 2 * BLOCK], data_end


def header(name: str, size: int = 0, type: bytes = b"0", **fields: Any) -> bytearray:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, type
    for field, value in fields.items():
        setattr(info, field, value)
    return bytearray(info.tobuf(tarfile.GNU_FORMAT))


def sealed(block: bytearray) -> bytes:
    """With the checksum that belongs to it, as a hostile or odd writer would set it."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:BLOCK])
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)
LAST = bytes(header("last.jpg", 4)) + padded(b"last")  # shows that the reader is still in step


@pytest.mark.parametrize("format", FORMATS)
def test_a_tar_cut_at_any_byte_is_an_error_unless_all_data_and_one_end_block_are_there(format: str) -> None:
    whole, data_end = small_tar(format)
    members = read(whole)
    assert [(m.name, m.data) for m in members] == small_members(format != "ustar")
    for cut in range(len(whole)):
        with pytest.raises(ShardTruncated):  # fewer bytes than were listed
            read(whole[:cut], listed=len(whole))
        if cut >= data_end + BLOCK:
            assert read(whole[:cut]) == members
        else:
            with pytest.raises(ShardTruncated):
                read(whole[:cut])


def test_without_the_end_marker_required_only_a_cut_between_members_passes() -> None:
    whole, data_end = small_tar("ustar")
    boundaries = {0: None, 1024: 1, 1536: 2, 2560: 3, data_end: 4}
    for cut in range(0, data_end + 1, 64):
        if boundaries.get(cut):
            assert len(read(whole[:cut], require_end_marker=False)) == boundaries[cut]
            with pytest.raises(ShardTruncated, match="were listed"):  # the store said there was more
                read(whole[:cut], listed=len(whole), require_end_marker=False)
        else:
            with pytest.raises(ShardTruncated):
                read(whole[:cut], require_end_marker=False)


def test_more_bytes_than_were_listed_is_an_error_too() -> None:
    whole, _ = small_tar("ustar")
    with pytest.raises(ShardTruncated, match=f"gave {len(whole)} bytes where {len(whole) - 1} were listed"):
        read(whole, listed=len(whole) - 1)


def flipped(data: bytes, start: int, end: int, masks: Sequence[int] = (1, 32, 128, 255)) -> Iterator[tuple[int, bytes]]:
    """Each byte from start to end with one of its bits flipped, and with all of them."""
    for position in range(start, end):
        for mask in masks:
            yield position, data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def test_every_flipped_bit_of_a_header_is_noticed() -> None:
    """The checksum is the sum of the 512 bytes of a header, its own eight taken as spaces."""
    whole, _ = small_tar("ustar")
    members, harmless = read(whole), set()
    for start in (m.offset - BLOCK for m in members if m.offset):
        for position, damaged in flipped(whole, start, start + BLOCK, [1 << bit for bit in range(8)]):
            try:
                assert read(damaged) == members
                harmless.add(position - start)
            except ShardDamaged:
                pass
    assert harmless <= set(CHECKSUM)  # a blank there may be a space or a NUL


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_a_bit_flipped_in_a_long_name_is_noticed_or_gives_another_name(format: str) -> None:
    """Long names stand in the data of an extended header, which no checksum covers."""
    whole, _ = small_tar(format)
    members = read(whole)
    assert members[0].offset is not None
    for _, damaged in flipped(whole, BLOCK, members[0].offset - BLOCK):
        with contextlib.suppress(ShardDamaged):
            first, *others = read(damaged)
            assert (first.size, first.offset, first.data) == (256, members[0].offset, members[0].data)
            assert others == members[1:]


def test_every_flipped_bit_of_the_end_marker_is_noticed() -> None:
    whole, data_end = small_tar("ustar")
    for _, damaged in flipped(whole, data_end, len(whole)):
        with pytest.raises(ShardDamaged):
            read(damaged)


def test_flipped_bits_in_data_give_other_data_in_the_same_members() -> None:
    whole, _ = small_tar("ustar")
    names = [m.name for m in read(whole)]
    for _, damaged in flipped(whole, BLOCK, BLOCK + 256):
        members = read(damaged)
        assert [m.name for m in members] == names
        assert members[0].data != b"a" * 256


@pytest.mark.parametrize("format", FORMATS)
def test_random_damage_gives_members_or_a_shard_error_and_nothing_else(format: str) -> None:
    whole, _ = small_tar(format)
    rng, num_refused = random.Random(7), 0
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(damaged))
            damaged[place : place + rng.choice((0, 1, 1, 8, BLOCK))] = rng.randbytes(rng.choice((0, 1, 1, 8, BLOCK)))
        try:
            assert all(member.size >= 0 and member.name for member in read(bytes(damaged)))
        except ShardError:
            num_refused += 1
    assert 0 < num_refused < 3000  # both outcomes were met


@pytest.mark.parametrize("format", FORMATS)
def test_names_sizes_and_offsets_are_those_of_tarfile(format: str) -> None:
    names = ["a.jpg", "dir/b.jpg", "d" * 90 + "/" + "e" * 60 + ".jpg"]
    names += [] if format == "ustar" else [LONG, "n" * 300 + ".jpg", "deep/" * 60 + "x.png"]
    data = tar_bytes([(name, name.encode() * 9) for name in names], FORMATS[format])
    with tarfile.open(fileobj=io.BytesIO(data)) as reference:
        expected = [(i.name, i.size, i.offset_data) for i in reference]
    members = read(data)
    assert [(m.name, m.size, m.offset) for m in members] == expected
    assert [m.name for m in members] == names
    assert all(m.offset is not None and data[m.offset : m.offset + m.size] == m.data for m in members)


def test_a_pax_size_counts_more_than_the_headers() -> None:
    record = b"12 size=400\n"
    extended = bytes(header("pax", len(record), b"x")) + padded(record)
    data = extended + bytes(header("a.jpg", 0)) + padded(b"z" * 400) + LAST + END
    assert [(m.name, m.size, m.data) for m in read(data)] == [("a.jpg", 400, b"z" * 400), ("last.jpg", 4, b"last")]


def test_an_empty_pax_path_leaves_the_headers_name() -> None:
    record = b"8 path=\n"
    data = bytes(header("pax", len(record), b"x")) + padded(record) + LAST + END
    assert [m.name for m in read(data)] == ["last.jpg"]


def test_global_pax_headers_and_long_link_names_are_stepped_over() -> None:
    record = b"13 comment=x\n"
    first = bytes(header("g", len(record), b"g")) + padded(record)
    link_name = bytes(header("././@LongLink", 5, b"K")) + padded(b"long\0")
    assert [m.name for m in read(first + link_name + LAST + END)] == ["last.jpg"]


@pytest.mark.parametrize(
    "records",
    [b"no length", b"9999999 path=x\n", b"0 path=x\n", b"8 path=x", b"10 path=xy", b"\xff", b"9" * 5000 + b" path=x\n",
     b"11 size=\xc2\xb2\n", b"12 size=-40\n", b"9" * 7 + b" size=1\n", b"5020 size=" + b"9" * 5008 + b"\n"],
    ids=range(11),
)  # fmt: skip
def test_damaged_pax_records_are_an_error(records: bytes) -> None:
    data = bytes(header("pax", len(records), b"x")) + padded(records) + LAST + END
    with pytest.raises(ShardDamaged):
        read(data)


def test_many_pax_records_cost_no_more_than_their_bytes() -> None:
    records = b"6 a=b\n" * (MAX_EXTENDED_HEADER_BYTES // 6)  # a reader that copies the rest each time takes minutes
    data = bytes(header("pax", len(records), b"x")) + padded(records) + LAST + END
    assert [m.name for m in read(data)] == ["last.jpg"]


def test_an_extended_header_larger_than_any_name_is_an_error_in_bounded_memory() -> None:
    size = MAX_EXTENDED_HEADER_BYTES + 1
    data = bytes(header("pax", size, b"x")) + padded(bytes(size)) + LAST + END
    with pytest.raises(ShardDamaged, match="extended header"):
        read(data)


@pytest.mark.parametrize("type", [b"x", b"L"])
def test_an_extended_header_without_its_member_is_an_error(type: bytes) -> None:
    record = b"12 path=abc\n"
    data = bytes(header("extended", len(record), type)) + padded(record) + END
    with pytest.raises(ShardDamaged, match="member is missing"):
        read(data)


def test_an_extended_header_without_records_wants_its_member_too() -> None:
    data = bytes(header("pax", 0, b"x")) + END
    with pytest.raises(ShardDamaged, match="member is missing"):
        read(data)


@pytest.mark.parametrize("second", [b"x", b"L"])
def test_two_extended_headers_that_name_one_member_are_refused_for_readers_differ_on_them(second: bytes) -> None:
    """tarfile believes the first, others the second; a sample must not depend on that."""
    pax = bytes(header("pax", 14, b"x")) + padded(b"14 path=a.jpg\n")
    data = b"b.jpg" if second == b"L" else b"14 path=b.jpg\n"
    again = bytes(header("again", len(data), second)) + padded(data)
    with pytest.raises(ShardDamaged, match=r"two extended headers set .'path'."):
        read(pax + again + LAST + END)
    times = bytes(header("pax", 12, b"x")) + padded(b"12 mtime=77\n")
    assert [m.name for m in read(times + again + LAST + END)] == ["b.jpg"]


@pytest.mark.parametrize(("size", "data"), [(0, b"long.jpg"), (1, b"long.jpg"), (4, b"\0\0\0\0"), (0, b"")])
def test_a_long_name_whose_size_is_another_is_refused_for_readers_differ_on_it(size: int, data: bytes) -> None:
    with pytest.raises(ShardDamaged, match="long name"):
        read(bytes(header("long", size, b"L")) + padded(data) + LAST + END)
    for size in (8, 9):  # with and without the zero at its end
        (member,) = read(bytes(header("long", size, b"L")) + padded(b"long.jpg") + LAST + END)
        assert member.name == "long.jpg"


@pytest.mark.parametrize("record", [b"10 size=4\n", b"14 path=a.jpg\n", b"22 GNU.sparse.major=1\n"])
def test_a_global_header_that_names_or_measures_members_is_refused(record: bytes) -> None:
    """POSIX has it count for all members that follow; nobody writes that, so it is damage or malice."""
    with pytest.raises(ShardDamaged, match="global header"):
        read(bytes(header("pax", len(record), b"g")) + padded(record) + LAST + END)


def test_sparse_members_are_refused_by_name() -> None:
    with pytest.raises(ShardDamaged, match=r"holes\.jpg.*S"):
        read(bytes(header("holes.jpg", 0, tarfile.GNUTYPE_SPARSE)) + LAST + END)
    info = tarfile.TarInfo("holes.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with pytest.raises(ShardDamaged, match=r"holes\.jpg.*sparse"):
        read(info.tobuf(tarfile.PAX_FORMAT) + LAST + END)


@pytest.mark.parametrize("type", [b"V", b"M", b"D", b"N", b"X", b"?"])
def test_member_types_that_we_do_not_know_are_an_error(type: bytes) -> None:
    with pytest.raises(ShardDamaged, match="not supported"):
        read(bytes(header("odd.jpg", 0, type)) + LAST + END)


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_members_without_data(type: bytes) -> None:
    block = header("link.jpg", 0, type, linkname="a.jpg")
    block[124:136] = b"00000001000\0"  # some writers give a link the size of what it points to
    link, last = read(sealed(block) + LAST + END)
    assert (link.name, link.size, link.data, link.is_file) == ("link.jpg", 0, None, False)
    assert last.data == b"last"


@pytest.mark.parametrize("size", [b"00000000000\0", b"00000001000\0"])
def test_directories_are_no_members_and_have_no_data_whatever_their_size_says(size: bytes) -> None:
    block = header("folder/", 0, tarfile.DIRTYPE)
    block[124:136] = size  # POSIX: the size of a directory is a quota, not a length
    assert [m.name for m in read(sealed(block) + LAST + END)] == ["last.jpg"]


def test_old_and_contiguous_types_are_files() -> None:
    data = b"".join(bytes(header(f"{n}.jpg", 4, t)) + padded(b"data") for n, t in enumerate((b"\0", b"7")))
    assert [(m.is_file, m.data) for m in read(data + END)] == [(True, b"data"), (True, b"data")]


def test_sizes_in_base_256_are_read() -> None:
    block = header("a.jpg", 0)
    block[124:136] = b"\x80" + (5).to_bytes(11, "big")
    assert [m.data for m in read(sealed(block) + padded(b"12345") + LAST + END)] == [b"12345", b"last"]
    assert header("big", 9 << 30)[124] == 0x80  # how tarfile writes it
    with pytest.raises(ShardTruncated, match=str(9 << 30)):
        read(bytes(header("big", 9 << 30)) + bytes(5000))


def test_checksums_of_signed_bytes_are_accepted_as_old_writers_made_them() -> None:
    block = header("ü.jpg", 0)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in block)
    assert [m.name for m in read(bytes(block) + END)] == ["ü.jpg"]


def test_what_gnu_tar_keeps_where_ustar_has_a_prefix_is_no_part_of_the_name() -> None:
    block = header("a.jpg")
    block[345:369] = b"14735412345\0" * 2  # times of access and change, of an incremental archive
    assert [m.name for m in read(sealed(block) + END)] == ["a.jpg"]


def test_a_negative_size_is_an_error() -> None:
    block = header("a.jpg", 0)
    block[124:136] = b"-0000000512\0"
    with pytest.raises(ShardDamaged, match="negative"):
        read(sealed(block) + END)


def test_names_that_are_not_utf8_are_kept_readable_and_apart() -> None:
    blocks = [header("n.jpg") for _ in range(2)]
    for number, block in enumerate(blocks):
        block[:6] = b"\xe9%d.jpg" % number
    assert [m.name for m in read(b"".join(map(sealed, blocks)) + END)] == ["\\xe90.jpg", "\\xe91.jpg"]


@pytest.mark.parametrize(
    "data",
    [b"PK\x03\x04" + bytes(600), b"<html>" + b"x" * 600, b'{"a": 1}' * 100, image_bytes(0, "PNG", 300, 300),
     b"\n" * 512, b"0" * 10240],
    ids=["zip", "html", "json", "png", "newlines", "digits"],
)  # fmt: skip
def test_what_is_not_a_tar_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(ShardDamaged, match="not a tar"):
        read(data)


def test_no_bytes_at_all_is_an_error_and_a_tar_without_members_is_none() -> None:
    with pytest.raises(ShardTruncated, match="is empty"):
        read(b"")
    assert read(tar_bytes([])) == []


def test_a_lost_tail_of_zeros_is_not_taken_for_the_end_of_the_archive() -> None:
    lost = bytes(MAX_PADDING_BYTES + BLOCK)
    assert [m.name for m in read(LAST + bytes(MAX_PADDING_BYTES))] == ["last.jpg"]  # a writer of large records
    for data in (LAST + lost + bytes(BLOCK), lost + bytes(BLOCK)):
        with pytest.raises(ShardDamaged, match="zero bytes"):
            read(data)


def test_two_archives_one_behind_the_other_are_an_error_not_the_first_one() -> None:
    whole, _ = small_tar("ustar")
    with pytest.raises(ShardDamaged, match="behind its end"):
        read(whole + whole)


def test_a_gzipped_tar_gives_the_same_members_without_offsets() -> None:
    whole, _ = small_tar("gnu")
    members = read(gzip.compress(whole))
    assert [(m.name, m.data, m.offset) for m in members] == [(m.name, m.data, None) for m in read(whole)]


def test_a_gzipped_tar_cut_at_any_byte_is_an_error() -> None:
    data = gzip.compress(small_tar("ustar")[0], mtime=0)
    for cut in range(len(data)):
        for listed in (cut, len(data)):
            with pytest.raises(ShardTruncated):
                read(data[:cut], listed=listed)


def test_a_gzipped_tar_whose_second_half_is_missing_at_a_member_boundary_is_an_error() -> None:
    whole, _ = small_tar("ustar")
    first, second = gzip.compress(whole[:1536]), gzip.compress(whole[1536:])
    assert len(read(first + second)) == 4
    with pytest.raises(ShardTruncated, match="without an end-of-archive block"):
        read(first)


def test_every_flipped_bit_of_a_gzipped_tar_is_noticed_or_harmless() -> None:
    data = gzip.compress(small_tar("ustar")[0], mtime=0)
    members, harmless = [(m.name, m.data) for m in read(data)], set()
    for position, damaged in flipped(data, 0, len(data)):
        try:
            assert [(m.name, m.data) for m in read(damaged)] == members
            harmless.add(position)
        except ShardError:
            pass
    assert harmless <= {*range(10), len(data) - 9}  # flags, time and system; the bits that fill up the last byte


class Slow(io.RawIOBase):
    """Gives a few bytes at a time, as a socket may."""

    def __init__(self, data: bytes) -> None:
        self._data, self._rng = io.BytesIO(data), random.Random(3)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, self._rng.randint(1, 300)))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_short_reads_change_nothing(pack: Callable[[bytes], bytes]) -> None:
    data = pack(small_tar("gnu")[0])
    shard = ObjectInfo("x.tar", len(data), "")
    members = list(tar_members(cast(BinaryIO, Slow(data)), shard, lambda name: 1 << 20))
    assert members == read(data)


class ClientError(Exception):
    """As botocore's, which is no OSError."""


@pytest.mark.parametrize(
    "error", [OSError("connection reset"), ClientError("SlowDown at https://u:pw@h/x.tar?sig=sec")]
)
def test_a_store_that_fails_makes_the_shard_unreadable_and_tells_no_secret(error: Exception) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 2 * BLOCK:
                raise error
            return super().read(size)

    whole, _ = small_tar("ustar")
    shard = ObjectInfo("https://user:pw@h/x.tar?sig=sec", len(whole), "")
    with pytest.raises(ShardUnreadable, match=r"reset|SlowDown") as raised:
        list(tar_members(Failing(whole), shard, lambda name: 1 << 20))
    assert str(raised.value).startswith("https://h/x.tar: ")
    assert "pw" not in str(raised.value) and "sec" not in str(raised.value)


class Zeros(io.RawIOBase):
    """A member of any size, made up while it is read."""

    def __init__(self, before: bytes, zeros: int, after: bytes) -> None:
        self._parts: Iterator[bytes] = self._pieces(before, zeros, after)
        self._buffer = b""

    @staticmethod
    def _pieces(before: bytes, zeros: int, after: bytes) -> Iterator[bytes]:
        yield before
        piece = bytes(1 << 20)
        for _ in range(zeros >> 20):
            yield piece
        yield after

    def read(self, size: int = -1) -> bytes:
        while len(self._buffer) < size and (piece := next(self._parts, b"")):
            self._buffer += piece
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data


def test_a_member_of_two_gigabytes_is_stepped_over_in_bounded_memory() -> None:
    size = 2 << 30
    first = bytes(header("huge.jpg", size))
    stream = Zeros(first, size, LAST + END)
    shard = ObjectInfo("x.tar", len(first) + size + len(LAST + END), "")
    tracemalloc.start()
    try:
        huge, last = tar_members(cast(BinaryIO, stream), shard, lambda name: 1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (huge.name, huge.size, huge.data) == ("huge.jpg", size, None)
    assert (last.data, last.offset) == (b"last", 2 * BLOCK + size)
    assert peak < 4 * CHUNK_BYTES  # that of the stream above is among it


def test_only_what_is_wanted_is_kept() -> None:
    data = tar_bytes([("a.jpg", b"a" * 10), ("a.txt", b"b" * 10), ("a.json", b"")])
    wanted = {"a.jpg": 10, "a.txt": 9}
    members = list(tar_members(io.BytesIO(data), ObjectInfo("x", len(data), ""), lambda name: wanted.get(name, 0)))
    assert [(m.name, m.size, m.data) for m in members] == [
        ("a.jpg", 10, b"a" * 10),
        ("a.txt", 10, None),
        ("a.json", 0, b""),
    ]


def test_a_tar_that_gnu_tar_might_have_written_with_large_records_is_read() -> None:
    from PIL import Image

    picture = encoded(Image.fromarray(pixels(1)), "PNG")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("./x.png")
        info.size = len(picture)
        tar.addfile(info, io.BytesIO(picture))
    assert [(m.name, m.data) for m in read(out.getvalue() + bytes(512 << 10))] == [("./x.png", picture)]


def test_the_stream_is_asked_for_few_large_chunks() -> None:
    data = tar_bytes([(f"{n}.jpg", bytes(3000)) for n in range(4000)])
    asked: list[int] = []

    class Asked(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    shard = ObjectInfo("x", len(data), "")
    members = list(tar_members(cast(BinaryIO, Asked(data)), shard, lambda name: 1 << 20))
    assert [m.offset for m in members] == [BLOCK + n * 7 * BLOCK for n in range(4000)]
    assert all(m.data == bytes(3000) for m in members)
    assert len(asked) <= len(data) // CHUNK_BYTES + 3


def test_members_that_straddle_the_chunks_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    data = tar_bytes([(f"{n}.jpg", rng.randbytes(rng.randrange(3000))) for n in range(30)])
    whole, packed = read(data), read(gzip.compress(data))
    for chunk in (2, 7, 511, 512, 513, 1024, 5000):
        monkeypatch.setattr(tar_members_py, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(tar_members_py, "UNPACKED_BYTES", chunk)
        assert read(data) == whole
        assert read(gzip.compress(data)) == packed
