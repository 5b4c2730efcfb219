"""Shards for the fuzzer: intact ones of many shapes, and every way that their bytes are damaged."""

from __future__ import annotations

import gzip
import io
import itertools
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from fuzz_images import damaged_image, good_images

BLOCK = 512
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
GOOD_TEXTS = (b"a cat", "ein Häuschen".encode(), b"", b"two\nlines")
GOOD_JSON = (b'{"score": 0.5, "n": 3}', b"{}", b'{"n": null, "more": [1, {"deep": []}]}', b'{"score": 1, "score": 2}')
BAD_METADATA = (
    b"", b"{", b"[" * 5000, b'{"n":' * 900 + b"1" + b"}" * 900, b'{"n": 1' + b"0" * 6000 + b"}", b"\xff\xfe\xfd",
    b'{"n": NaN}', b'{"n": 1e999}', b'{"score": Infinity}', b'{"n": "12"}', b'{"n": 9223372036854775808}',
    b'{"n": 1, "n": {}}', b"\xef\xbb\xbf{}", b'{"score": "\\ud800"}', b"null", b"[1]", b'"x"', b"\0" * 2000,
    b'{"n": 1.5}', b'{"n": true}', b'{"score": 1e39}', b'{"n":' + b"[" * 4000 + b"]" * 4000 + b"}",
)  # fmt: skip

Entry = tuple[str, bytes, bytes]  # name, data, tar type


@dataclass(frozen=True)
class Case:
    """One shard to read. `intact`: the tar before it was damaged, where the damage cannot make a good tar with other
    samples in it; None where it can, so that only the damaged bytes say what is right."""

    kind: str
    name: str  # of the file
    data: bytes
    intact: bytes | None


def write_tar(entries: list[Entry], format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data, kind in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname, info.size, data = "elsewhere.jpg", 0, b""
            if kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE):
                info.size, data = 0, b""
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _key(rng: random.Random, n: int) -> str:
    return rng.choice([f"{n:06d}", f"img{n}", f"0/{n}", f"./sub.dir/{n}", f"ü{n}", f"{n} with blanks"])


def _sample(rng: random.Random, key: str, bad_image: float, bad_metadata: float) -> list[Entry]:
    """The members of one sample, of one of the shapes that occur."""
    extension, data = rng.choice(good_images())
    if rng.random() < bad_image:
        extension, data = damaged_image(rng)
    texts = BAD_METADATA if rng.random() < bad_metadata else GOOD_TEXTS
    jsons = BAD_METADATA if rng.random() < bad_metadata else GOOD_JSON
    image = (f"{key}.{extension}", data, tarfile.REGTYPE)
    caption = (f"{key}.txt", rng.choice(texts), tarfile.REGTYPE)
    record = (f"{key}.json", rng.choice(jsons), tarfile.REGTYPE)
    shapes: list[list[Entry]] = [[image, caption, record]] * 6 + [
        [image],
        [caption, record],
        [caption, image],
        [image, (f"{key}.seg.png", good_images()[5][1], tarfile.REGTYPE)],
        [(f"{key}.1.png", good_images()[5][1], tarfile.REGTYPE), caption],
        [image, (f"{key}.gif", b"second", tarfile.REGTYPE)],
        [image, caption, caption],
        [(image[0], b"", tarfile.SYMTYPE), caption],
        [image, (caption[0], b"", tarfile.LNKTYPE)],
    ]
    return rng.choice(shapes)


def entries(rng: random.Random, bad_image: float = 0.0, bad_metadata: float = 0.0, long: float = 0.0) -> list[Entry]:
    found: list[Entry] = []
    for n in range(rng.choice([1, 2, 3, 5, 9])):
        key = _key(rng, n) if rng.random() >= long else f"{n}-" + rng.choice("xyö/") * rng.randint(90, 700)
        found += _sample(rng, key.replace("//", "/"), bad_image, bad_metadata)
        odd = rng.random()
        if odd < 0.05 and len(found) > 1:
            found.append(rng.choice(found))  # a key again, or a member
        elif odd < 0.08 and len(found) > 3:
            at = rng.randrange(1, len(found) - 1)
            found[at], found[at + 1] = found[at + 1], found[at]
        elif odd < 0.15:
            aside = rng.choice(["__meta__.json", "README", ".hidden", "a.dir/", "folder/.x.jpg", "__x__/y.jpg"])
            found.append((aside, b"aside", tarfile.DIRTYPE if aside.endswith("/") else tarfile.REGTYPE))
    return found


def intact(rng: random.Random, long: float = 0.0) -> bytes:
    format = rng.choice(FORMATS if not long else FORMATS[1:])
    return write_tar(entries(rng, bad_image=0.1, bad_metadata=0.05, long=long), format)


def headers(data: bytes) -> list[int]:
    """Where each header block begins, those of long names and PAX records too."""
    found, at = [], 0
    while at + BLOCK <= len(data) and data[at] and data[at + 124 : at + 135].strip(b"\0 "):
        found.append(at)
        at += BLOCK + -(-int(data[at + 124 : at + 135], 8) // BLOCK) * BLOCK
    return found


def end(data: bytes) -> int:
    """Where the end-of-archive block begins."""
    last = headers(data)[-1]
    return last + BLOCK + -(-int(data[last + 124 : last + 135], 8) // BLOCK) * BLOCK


def mended(block: bytes) -> bytes:
    """The header with a checksum that is right again."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


# Damage. Each takes the generator and an intact tar.


def _cut_anywhere(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(end(data))]


def _cut_at_member(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([*headers(data), end(data)])]


def _cut_in_header(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice(headers(data)) + rng.randrange(1, BLOCK)]


def _cut_in_data(rng: random.Random, data: bytes) -> bytes:
    return data[: max(1, min(end(data) - 1, rng.choice(headers(data)) + BLOCK + rng.randrange(4000)))]


def _cut_in_end(rng: random.Random, data: bytes) -> bytes:
    return data[: end(data) + rng.randrange(BLOCK)]


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        changed[rng.randrange(end(data) + BLOCK)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_header(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[rng.choice(headers(data)) + rng.randrange(BLOCK)] = rng.randrange(256)
    return bytes(changed)


def _run(rng: random.Random, data: bytes) -> bytes:
    at, length = rng.randrange(end(data)), rng.choice([1, 100, 512, 3000, 20_000])
    filler = rng.choice([bytes(length), rng.randbytes(length), b"\xff" * length])
    return data[:at] + filler[: len(data) - at] + data[at + length :]


def _splice(rng: random.Random, data: bytes, step: int) -> bytes:
    """Pieces cut out, doubled, moved or put in, at multiples of `step`."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, to = (rng.randrange(len(data) // step + 1) * step for _ in range(2))
        length = rng.randint(1, 8) * step
        piece, rest = data[at : at + length], data[:at] + data[at + length :]
        data = rng.choice([
            rest, rest[:to] + piece + rest[to:],
            data[:to] + piece + data[to:], data[:to] + rng.randbytes(step) + data[to:],
        ])  # fmt: skip
    return data


def _shuffle(rng: random.Random, data: bytes) -> bytes:
    blocks = [data[n : n + BLOCK] for n in range(0, end(data), BLOCK)]
    first = rng.randrange(len(blocks))
    some = blocks[first : first + rng.randint(2, 12)]
    rng.shuffle(some)
    return b"".join([*blocks[:first], *some, *blocks[first + len(some) :]]) + data[end(data) :]


def _members_moved(rng: random.Random, data: bytes) -> bytes:
    """Whole members left out, doubled or in another order: always a good tar."""
    bounds = [*headers(data), end(data)]
    members = [data[a:b] for a, b in itertools.pairwise(bounds)]
    chosen = rng.choices(members, k=rng.randint(0, len(members) + 2))
    return b"".join(chosen) + data[end(data) :]


def _concatenated(rng: random.Random, data: bytes) -> bytes:
    other = intact(rng)
    first = rng.choice([data, data[: end(data)], data[: end(data) + BLOCK], data + bytes(rng.randrange(3000))])
    return first + other


EXTREME_NUMBERS = (
    b"77777777777\0", b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\x05", b"\x80" + b"\x7f" * 11,
    b"\x80\0\0\0\0\0\0\x02\0\0\0\0", b"            ", b"\0" * 12, b"9999999999a\0", b"0x000000010\0", b"0_1_0_0_0_0\0",
    b"00000000001 ", b"\x81" + b"\0" * 11, b"+0000000010\0", "٣٣٣".encode().ljust(12, b"\0"), b"00000100000\0",
)  # fmt: skip


def _extreme_header(rng: random.Random, data: bytes) -> bytes:
    at = rng.choice(headers(data))
    block = bytearray(data[at : at + BLOCK])
    match rng.randrange(7):
        case 0 | 1 | 2:
            block[124:136] = rng.choice(EXTREME_NUMBERS)
        case 3:
            block[156] = rng.choice(b"\x00\x01 012345678gxXLKSVDMN\xff")
        case 4:
            name = rng.choice([b"", b"/", b"../../etc/x.jpg", b"\xff" * 100, b"a" * 100, b"x\n.jpg", b".", b".jpg"])
            block[:100] = name.ljust(100, b"\0")
        case 5:
            block[345:500] = rng.choice([b"p" * 155, b"\xff" * 155, b"/".ljust(155, b"\0")])
        case 6:
            block[257:265] = rng.choice([b"\0" * 8, b"ustar  \0", b"ustar\x0000", rng.randbytes(8)])
    sealed = mended(bytes(block)) if rng.random() < 0.8 else bytes(block)
    return data[:at] + sealed + data[at + BLOCK :]


def extended(kind: bytes, records: bytes, size: bytes | None = None) -> bytes:
    """An extended header (`x` or `g` PAX, `L` or `K` GNU) and its data."""
    block = bytearray(tarfile.TarInfo("extended").tobuf(tarfile.USTAR_FORMAT))
    block[156:157] = kind
    block[124:136] = size or b"%011o\0" % len(records)
    return mended(bytes(block)) + records.ljust(-(-len(records) // BLOCK) * BLOCK, b"\0")


def _record(name: str, value: str) -> bytes:
    body = f" {name}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def _extended_bomb(rng: random.Random, data: bytes) -> bytes:
    """A hostile extended header before one of the members."""
    records = rng.choice([
        b"99999999999999999999 path=x\n", b"9" * 5000 + b" path=x\n", b"-5 path=x\n", b"0 path=x\n", b"3 x",
        b"11 path=x\n",
        _record("size", "99999999999999999999"), _record("size", "-1"), _record("size", "1.5"), _record("size", "٣"),
        _record("size", "9" * 18), _record("size", "0"), _record("size", ""), _record("path", "n" * 100_000 + ".jpg"),
        _record("path", "a\0b.jpg"), _record("GNU.sparse.major", "1"), _record("hdrcharset", "BINARY"),
        _record("path", "new.jpg") * 20_000, _record("comment", "c" * 3_000_000), b"", _record("path", "../x.png"),
        _record("path", "a.jpg") + _record("path", ""), rng.randbytes(700),
    ])  # fmt: skip
    kind = rng.choice([b"x"] * 4 + [b"g", b"L", b"K"])
    size = rng.choice([None] * 6 + [b"77777777777\0", b"\x80" + b"\x7f" * 11, b"00000000000\0"])
    at = rng.choice([*headers(data), *([] if kind == b"g" else [end(data)])])  # tarfile trips over a last global one
    return data[:at] + extended(kind, records, size) + data[at:]


def _gzip_damaged(rng: random.Random, data: bytes) -> bytes:
    packed = bytearray(gzip.compress(data, mtime=0))
    if rng.random() < 0.5:
        return bytes(packed[: rng.randrange(2, len(packed))])
    for _ in range(rng.choice([1, 1, 3])):
        packed[rng.randrange(2, len(packed))] ^= 1 << rng.randrange(8)
    return bytes(packed)


def _gzip_parts(rng: random.Random, data: bytes) -> bytes:
    """Several gzip streams one behind the other, and something behind the last."""
    at = rng.randrange(len(data))
    tail = rng.choice(
        [
            b"",
            b"",
            bytes(600),
            b"garbage",
            gzip.compress(b"", mtime=0),
            gzip.compress(bytes(3000), mtime=0),
            b"\x1f\x8b",
        ]
    )
    return gzip.compress(data[:at], mtime=0) + gzip.compress(data[at:], mtime=0) + tail


def _gzip_bomb(rng: random.Random, data: bytes) -> bytes:
    """A member, or what follows the end, that unpacks to a thousand times its bytes."""
    size = rng.choice([1 << 20, 20 << 20])
    name = rng.choice(["bomb.jpg", "bomb.json", "bomb.bin"])
    bomb = tarfile.TarInfo(name)
    bomb.size = size
    member = bomb.tobuf(tarfile.USTAR_FORMAT) + bytes(size)
    at = rng.choice(headers(data))
    return gzip.compress(rng.choice([data + bytes(size), data[:at] + member + data[at:]]), 1, mtime=0)


def _no_tar(rng: random.Random, _: bytes) -> bytes:
    return rng.choice([
        b"", bytes(rng.choice([1, 511, 512, 513, 1024, 10_240, 2 << 20])), rng.randbytes(rng.choice([1, 512, 5000])),
        b"<html>404 Not Found</html>", gzip.compress(b"", mtime=0), b"PK\x03\x04" * 300,
        gzip.compress(bytes(1024), mtime=0), b"\x1f\x8b",
        rng.choice(good_images())[1], bytes(512) + rng.randbytes(512), b"BZh91AY&SY" + rng.randbytes(600),
    ])  # fmt: skip


# What is cut, or altered in a gzip stream, can only be refused or be harmless: the intact tar says what is right.
FROM_INTACT: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "cut anywhere": _cut_anywhere,
    "cut at a member": _cut_at_member,
    "cut in a header": _cut_in_header,
    "cut in data": _cut_in_data,
    "cut in the end block": _cut_in_end,
    "gzip cut or flipped": _gzip_damaged,
    "gzip in parts": _gzip_parts,
}
# What is altered may be another good tar: the damaged bytes say what is right.
FROM_DAMAGED: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bits flipped": _flip,
    "a header's byte": _flip_header,
    "a run overwritten": _run,
    "spliced at blocks": lambda rng, data: _splice(rng, data, BLOCK),
    "spliced anywhere": lambda rng, data: _splice(rng, data, 1),
    "blocks shuffled": _shuffle,
    "members moved": _members_moved,
    "two tars": _concatenated,
    "extreme header": _extreme_header,
    "extended header": _extended_bomb,
    "gzip bomb": _gzip_bomb,
    "no tar": _no_tar,
}
WHOLE = ("intact", "long names", "bad images", "bad metadata")
KINDS = (*WHOLE, *FROM_INTACT, *FROM_DAMAGED)


def make_case(seed: int, number: int) -> Case:
    """The same case for the same seed and number; the kinds take turns."""
    rng = random.Random(f"{seed}-{number}")
    kind = KINDS[number % len(KINDS)]
    if kind in WHOLE:
        return _whole(rng, kind, number)
    before = intact(rng, long=rng.choice([0.0, 0.0, 0.3]))
    if kind in FROM_INTACT:
        data, truth = FROM_INTACT[kind](rng, before), before
    else:
        data, truth = FROM_DAMAGED[kind](rng, before), None
    if not data.startswith(b"\x1f\x8b") and kind != "no tar" and rng.random() < 0.15:
        data = gzip.compress(data, 1, mtime=0)
    return Case(kind, f"{number:06d}.tar", data, truth)


def _whole(rng: random.Random, kind: str, number: int) -> Case:
    format = rng.choice(FORMATS if kind != "long names" else FORMATS[1:])
    bad_image, bad_metadata = {"bad images": (0.8, 0.0), "bad metadata": (0.0, 0.6)}.get(kind, (0.0, 0.0))
    data = write_tar(entries(rng, bad_image, bad_metadata, long=0.7 if kind == "long names" else 0.0), format)
    packed = gzip.compress(data, 1, mtime=0) if rng.random() < 0.2 else data
    return Case(kind, f"{number:06d}.tar", packed, data)
