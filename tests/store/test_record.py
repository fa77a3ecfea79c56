"""The stored record: what goes in comes out within the codec's bound, and what is damaged never comes out at all."""

from __future__ import annotations

import itertools
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vista.errors import RecordError
from vista.store.record import (
    CHECKSUM,
    CODECS,
    DTYPES,
    ENTRY,
    HEADER,
    KINDS,
    LARGEST,
    LONGEST_KEY,
    Record,
    decode,
    decode_tokens,
    encode,
    error_bound,
    unpack,
    user_key,
)

GOLDEN = Path(__file__).parent / "records"
VERSION = "0123456789abcdef"
ARABIC_7 = "\N{ARABIC-INDIC DIGIT SEVEN}"  # int() reads it as 7
TOKENS = np.array([[1.0, -3.0, 127.0], [0.0, 0.0, 0.0], [-2.0, 254.0, 8.0]], np.float32)  # exact in every codec
SMALL = Record(
    "tokens", VERSION, b"s:anna", 1_700_000_000_000_000, 12_345,
    {"recent_item": np.array([7, 8], np.int32), "tokens": np.array([[1.0, -127.0]], np.float32)},
)  # fmt: skip


def golden(kind: str, codec: str) -> Path:
    return GOLDEN / f"{kind}-{codec}.record"


def golden_record(kind: str) -> Record:
    """What the files of tests/store/records hold, in values that every codec keeps exactly."""
    recent = {
        "recent_item": np.array([5, 2_000_000_000], np.int32),
        "recent_action": np.array([1, 0], np.int16),
        "recent_timestamp_us": np.array([1_700_000_000_000_000, 1_700_000_000_000_001], np.int64),
        "recent_gap_us": np.array([-1, 1], np.int64),
    }
    cold = {
        "memory_0": np.arange(-6, 6, dtype=np.float32).reshape(2, 3, 2) / 8,
        "memory_1": np.array([[-128, 127]], np.int8),
        "first_us": np.array([1_699_999_999_999_999], np.int64),
    }
    arrays = {"tokens": recent | {"tokens": TOKENS}, "state": recent | cold, "border": {
        "border_num_events": np.array([64, 128], np.int64),
        "memory_0": np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2),
    }}[kind]  # fmt: skip
    return Record(kind, VERSION, user_key("zoë"), 1_700_000_000_000_001, 130, arrays)


def seal(content: bytes) -> bytes:
    """A record with these bytes, its size and checksum made right again."""
    size = struct.pack("<I", len(content) + CHECKSUM.size)
    content = content[: HEADER.size - 4] + size + content[HEADER.size :]
    return content + CHECKSUM.pack(zlib.crc32(content))


def forged(blob: bytes, place: int, new: bytes) -> bytes:
    """A record with other bytes from a place on and a checksum that agrees with them, as only a wrong writer makes."""
    return seal(blob[:place] + new + blob[place + len(new) : -CHECKSUM.size])


def assert_same(ours: Record, theirs: Record) -> None:
    """Equal to the last bit."""
    assert replace(ours, arrays={}) == replace(theirs, arrays={})
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, array in ours.arrays.items():
        other = theirs.arrays[name]
        assert (array.dtype, array.shape, array.tobytes()) == (other.dtype, other.shape, other.tobytes()), name


# -- there and back


def all_tokens(codec: str) -> st.SearchStrategy[np.ndarray]:
    """Tokens up to the codec's largest value, the smallest subnormal numbers and zeros among them."""
    largest = float(np.float32(LARGEST[codec]))
    largest = largest if largest <= LARGEST[codec] else float(np.nextafter(np.float32(largest), np.float32(0)))
    numbers = st.floats(-largest, largest, width=32, allow_subnormal=True)
    return hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 5)), elements=numbers)


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None)
@given(data=st.data())
def test_tokens_come_back_within_the_bound(codec, data):
    tokens = data.draw(all_tokens(codec))
    back = decode(encode(replace(SMALL, arrays={"tokens": tokens}), codec), VERSION)
    found = back.arrays["tokens"]
    assert (found.dtype, found.shape) == (np.float32, tokens.shape)
    error = np.abs(found.astype(np.float64) - tokens)
    assert (error <= error_bound(tokens, codec)).all()
    assert replace(back, arrays={}) == replace(SMALL, arrays={})


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1.7e-43, -1e-40, 1e-38, 1.0, 65504.0, -3e38])
def test_tokens_of_one_value(codec, value):
    """One value throughout, from zero over the smallest subnormal number to nearly the largest of all."""
    tokens = np.full((3, 4), value, np.float32)
    if abs(value) > LARGEST[codec]:
        with pytest.raises(RecordError, match=r"tokens reach 3e\+38, codec float16 ends at 65504; use float32"):
            encode(replace(SMALL, arrays={"tokens": tokens}), codec)
        return
    found = decode(encode(replace(SMALL, arrays={"tokens": tokens}), codec)).arrays["tokens"]
    assert (np.abs(found.astype(np.float64) - tokens) <= error_bound(tokens, codec)).all()
    assert value != 0 or not found.any()


@pytest.mark.parametrize("codec", CODECS)
def test_the_bound_is_no_wider_than_needed(codec):
    """Among many values some come near half a step away, so a bound of less would be broken."""
    tokens = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    error = np.abs(decode(encode(replace(SMALL, arrays={"tokens": tokens}), codec)).arrays["tokens"] - tokens)
    bound = error_bound(tokens, codec)
    assert (error <= bound).all()
    assert codec == "float32" or (error > 0.9 * bound).any()


def test_one_large_token_does_not_cost_the_others_precision():
    tokens = np.array([[1e30, 1e29], [1.0, 0.25]], np.float32)
    found = decode(encode(replace(SMALL, arrays={"tokens": tokens}), "int8")).arrays["tokens"]
    assert np.abs(found[1] - tokens[1]).max() <= 0.5001 / 127


@settings(deadline=None)
@given(data=st.data())
def test_everything_else_comes_back_to_the_bit(data):
    """Any array of any type that a record knows, not-a-numbers included, whatever the codec."""
    shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=3)
    arrays = data.draw(
        st.dictionaries(
            st.text("abcdefgh_0123", min_size=1, max_size=24),
            st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, shapes)),
            max_size=4,
        )
    )
    int64 = st.integers(-(2**63), 2**63 - 1)
    key = user_key(data.draw(st.one_of(st.text(), int64)))
    record = Record(data.draw(st.sampled_from(KINDS)), VERSION, key, data.draw(int64), data.draw(int64), arrays)
    assert_same(decode(encode(record, data.draw(st.sampled_from(CODECS))), VERSION), record)


def test_arrays_that_lie_otherwise_in_memory_come_back_the_same():
    big, turned = np.arange(6, dtype=">i4").reshape(2, 3), np.arange(6, dtype=np.float64).reshape(2, 3).T
    back = decode(encode(replace(SMALL, arrays={"big": big, "turned": turned, "part": turned[::2]}))).arrays
    assert back["big"].dtype == np.dtype("<i4")
    assert np.array_equal(back["big"], big)
    assert np.array_equal(back["turned"], turned)
    assert np.array_equal(back["part"], turned[::2])


@pytest.mark.parametrize("codec", CODECS)
def test_many_at_once_equal_one_by_one(codec):
    rng = np.random.default_rng(1)
    blobs = []
    for user in range(5):
        arrays = {"recent_item": np.arange(user, dtype=np.int32), "tokens": rng.normal(size=(6, 7)).astype(np.float32)}
        blobs.append(encode(replace(SMALL, user_key=user_key(user), arrays=arrays), codec))
    together = decode_tokens([unpack(blob, VERSION) for blob in blobs])
    assert together.dtype == np.float32
    assert np.array_equal(together, np.stack([decode(blob).arrays["tokens"] for blob in blobs]))
    place = np.full((7, 6, 7), np.nan, np.float32)
    decode_tokens([unpack(blob) for blob in blobs], out=place[1:6])
    assert np.array_equal(place[1:6], together)
    assert np.isnan(place[[0, 6]]).all()


def test_many_at_once_of_nobody():
    assert decode_tokens([]).shape == (0, 0, 0)


def test_many_at_once_refuse_what_does_not_belong_together():
    blob, other = encode(SMALL, "int8"), encode(SMALL, "float32")
    wider = encode(replace(SMALL, arrays={"tokens": np.zeros((1, 3), np.float32)}), "int8")
    state = encode(replace(SMALL, kind="state", arrays={"first_us": np.zeros(1, np.int64)}))
    for second, reason in [(other, "different codecs"), (wider, "different codecs or shapes"), (state, "no tokens")]:
        with pytest.raises(RecordError, match=reason):
            decode_tokens([unpack(blob), unpack(second)])


# -- the format is pinned


@pytest.mark.parametrize(
    ("kind", "codec"), [*itertools.product(["tokens"], CODECS), ("state", "int8"), ("border", "int8")]
)
def test_records_written_by_format_version_1_are_read_and_still_written(kind, codec):
    """The files never change: a change of the layout is a new format version with files of its own."""
    expected = golden_record(kind)
    blob = golden(kind, codec).read_bytes()
    assert_same(decode(blob, VERSION), expected)
    assert blob == encode(expected, codec)


def test_a_record_made_by_hand_as_the_page_says():
    """Byte by byte after docs/record-format.md, with nothing of the code."""
    key, version = b"s:anna", VERSION.encode()
    table = b"".join([
        b"recent_item".ljust(24, b"\0") + bytes([4, 1]) + b"\0\0" + struct.pack("<4I", 2, 0, 0, 0),
        b"tokens".ljust(24, b"\0") + bytes([2, 2]) + b"\0\0" + struct.pack("<4I", 1, 2, 0, 0),
        b"tokens.scale".ljust(24, b"\0") + bytes([0, 1]) + b"\0\0" + struct.pack("<4I", 1, 0, 0, 0),
    ])  # fmt: skip
    body = struct.pack("<2i", 7, 8) + struct.pack("<2b", 1, -127) + struct.pack("<f", 1.0)
    size = 48 + 6 + 44 * 3 + len(body) + 4
    header = b"VSTA" + struct.pack("<H", 1) + bytes([0, 3]) + struct.pack("<2H", 3, 6)
    header += struct.pack("<2q", 12_345, 1_700_000_000_000_000) + version + struct.pack("<I", size)
    content = header + key + table + body
    assert len(header) == 48
    assert encode(SMALL, "int8") == content + struct.pack("<I", zlib.crc32(content))


# -- what is refused


@pytest.mark.parametrize("codec", CODECS)
def test_a_record_cut_short_anywhere_is_refused(codec):
    blob = encode(SMALL, codec)
    for length in range(len(blob)):
        with pytest.raises(RecordError, match="truncated"):
            decode(blob[:length])


def test_a_record_with_any_byte_changed_to_any_other_is_refused():
    blob = bytearray(encode(SMALL))
    for place, old in enumerate(bytes(blob)):
        for new in set(range(256)) - {old}:
            blob[place] = new
            with pytest.raises(RecordError):
                decode(bytes(blob))
        blob[place] = old
    assert_same(decode(bytes(blob)), SMALL)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda blob: b"", "truncated: 0 bytes"),
        (lambda blob: blob + b"\0", "truncated or overlong: 205 bytes where the header says 204"),
        (lambda blob: blob + blob, "truncated or overlong"),
        (lambda blob: b"PK\3\4" + blob[4:], "not a record"),
        (lambda blob: forged(blob, 4, b"\2\0"), "format version 2: this vista reads 1 to 1; update it"),
        (lambda blob: forged(blob, 4, b"\0\0"), "format version 0"),
        (lambda blob: forged(blob, 6, b"\4"), "unknown kind 4"),
        (lambda blob: forged(blob, 7, b"\4"), "unknown kind 0 or codec 4"),
        (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "checksum mismatch.*summarize the user again"),
        (lambda blob: forged(blob, 8, b"\xff\xff"), "the table of arrays reaches beyond"),
        (lambda blob: forged(blob, 10, b"\xff\xff"), "the user key or the table of arrays reaches beyond"),
        (lambda blob: forged(blob, 54 + 24, b"\x08"), "array 0 has unknown type 8"),
        (lambda blob: forged(blob, 54 + 25, b"\0"), "array 0 has unknown type 4 or 0 dimensions"),
        (lambda blob: forged(blob, 54 + 25, b"\5"), "5 dimensions"),
        (lambda blob: forged(blob, 54 + 28, struct.pack("<I", 2**31)), "array 0 of shape .* reaches beyond"),
        (lambda blob: forged(blob, 54 + 25, b"\4\0\0" + struct.pack("<4I", *[2**16] * 4)), "array 0 of shape"),
        (lambda blob: forged(blob, 54 + 28, struct.pack("<I", 1)), "4 bytes belong to no array"),
        (lambda blob: seal(blob[: -CHECKSUM.size] + b"\0\0"), "2 bytes belong to no array"),
        (lambda blob: seal(blob[: -CHECKSUM.size - 1]), "array 2 of shape"),
        (lambda blob: forged(blob, 7, b"\0"), "tokens of type int8 .* not what codec float32 writes"),
        (lambda blob: forged(blob, 54 + 2 * 44, b"x"), "not what codec int8 writes"),
        (lambda blob: forged(blob, 54 + 44 + 24, b"\6"), "tokens of type uint8"),
        (lambda blob: forged(blob, 54 + 44 + 25, b"\1\0\0" + struct.pack("<I", 2)), r"of type int8 and shape \(2,\)"),
        (lambda blob: forged(blob, 54 + 44 + 28, struct.pack("<2I", 2, 1)), r"of type int8 and shape \(2, 1\)"),
    ],
)
def test_a_bad_record_is_refused_with_its_reason(damage, reason):
    with pytest.raises(RecordError, match=reason):
        decode(damage(encode(SMALL, "int8")))


def test_another_model_version_is_refused_only_where_one_is_named():
    blob = encode(SMALL)
    with pytest.raises(RecordError, match=f"belongs to model version {VERSION}, not fedcba9876543210"):
        decode(blob, "fedcba9876543210")
    assert decode(blob).version == VERSION


@settings(deadline=None, max_examples=300)
@given(
    codec=st.sampled_from(CODECS),
    changes=st.lists(st.tuples(st.integers(0, 203), st.integers(0, 255)), min_size=1, max_size=4),
)
@example(codec="int8", changes=[(28, 0xFF)])  # a version that is not UTF-8
@example(codec="int8", changes=[(54, 0xFF)])  # a name that is not UTF-8
def test_a_record_forged_anywhere_is_read_or_refused(codec, changes):
    """With a checksum that agrees: whatever a wrong writer wrote, a reader gets a record or a RecordError."""
    content = bytearray(encode(SMALL, codec)[: -CHECKSUM.size])
    for place, value in changes:
        if place < len(content):
            content[place] = value
    try:
        found = decode(seal(bytes(content)))
    except RecordError:
        return
    assert found.kind in KINDS
    assert all(1 <= array.ndim <= 4 for array in found.arrays.values())


@pytest.mark.parametrize(
    ("changes", "codec", "reason"),
    [
        ({}, "int4", "codec 'int4'"),
        ({"kind": "token"}, "int8", "kind 'token'"),
        ({"version": "v1"}, "int8", "model version 'v1'.* 16 bytes"),
        ({"version": VERSION + "0"}, "int8", "a version has 16 bytes"),
        ({"user_key": b"s:" + b"x" * LONGEST_KEY}, "int8", "user key of 482 bytes"),
        ({"arrays": {"a": np.zeros(3, bool)}}, "int8", "array 'a' of type bool"),
        ({"arrays": {"a": np.array(["x"])}}, "int8", "array 'a' of type <U1"),
        ({"arrays": {"a": np.array(1.0)}}, "int8", r"of type float64 and shape \(\) cannot"),
        ({"arrays": {"a": np.zeros((1, 1, 1, 1, 1), np.int8)}}, "int8", "cannot be stored"),
        ({"arrays": {"a" * 25: np.zeros(1, np.int8)}}, "int8", "cannot be stored"),
        ({"arrays": {"tokens": np.zeros(3, np.float32)}}, "int8", r"they are \(K, D\) float32"),
        ({"arrays": {"tokens": np.zeros((1, 3))}}, "float32", "tokens of type float64"),
        ({"arrays": {"tokens": np.full((1, 1), np.nan, np.float32)}}, "int8", "not finite: the model has diverged"),
        ({"arrays": {"tokens": np.full((1, 1), -np.inf, np.float32)}}, "float16", "not finite"),
        ({"arrays": {"tokens": np.full((1, 1), 65520, np.float32)}}, "float16", "tokens reach 65520, codec float16"),
        ({"arrays": {"tokens": np.full((1, 1), -3.4e38, np.float32)}}, "bfloat16", "codec bfloat16 ends at 3.38953e"),
        ({"arrays": {"tokens": np.full((1, 1), 3.402e38, np.float32)}}, "int8", "codec int8 ends at 3.4e"),
    ],
)
def test_what_has_no_place_in_a_record_is_not_written(changes, codec, reason):
    with pytest.raises(RecordError, match=reason):
        encode(replace(SMALL, **changes), codec)


# -- user keys


@pytest.mark.parametrize(
    ("user", "key"),
    [
        (7, b"i:7"), ("7", b"i:7"), (np.int64(7), b"i:7"), (-7, b"i:-7"), ("-7", b"i:-7"), (0, b"i:0"),
        (2**70, b"i:1180591620717411303424"),
        ("anna", b"s:anna"), ("i:7", b"s:i:7"), ("", b"s:"), ("a\0b", b"s:a\0b"), ("zoë", "s:zoë".encode()),
        ("07", b"s:07"), ("+7", b"s:+7"), (" 7", b"s: 7"), ("7\n", b"s:7\n"), ("-0", b"s:-0"), ("--7", b"s:--7"),
        ("-", b"s:-"), (ARABIC_7, b"s:" + ARABIC_7.encode()), ("²", "s:²".encode()), ("1_000", b"s:1_000"),
        (7.0, b"s:7.0"),
    ],
)  # fmt: skip
def test_the_key_of_a_user(user, key):
    assert user_key(user) == key


def test_only_an_integer_and_its_own_text_share_a_key():
    users = [7, "07", "+7", "7.0", ARABIC_7, "i:7", "s:7", "h:7", " 7", "7 "]
    assert len({user_key(user) for user in users}) == len(users)


@settings(deadline=None)
@given(st.text(max_size=2000), st.text(max_size=2000))
@example("9" * 5000, "9" * 4999)  # beyond what Python turns into an integer
@example("\ud800", "\ud801")  # bytes of a command line that are no text
@example("é" * 239, "é" * 239 + "a")  # the longest as it is, and the first that is hashed
@example("é" * 2000, "é" * 1999 + "e")
def test_every_string_has_a_key_of_its_own_that_fits(one, other):
    for user in (one, other):
        assert 2 <= len(user_key(user)) <= LONGEST_KEY
    assert (user_key(one) == user_key(other)) == (one == other)


def test_a_long_key_is_cut_and_hashed():
    longest, cut = user_key("x" * 478), user_key("x" * 479)
    assert longest == b"s:" + b"x" * 478
    assert cut.startswith(b"h:s:" + b"x" * 412)
    assert len(cut) == LONGEST_KEY


def test_the_layout_is_the_one_documented():
    """The sizes that docs/record-format.md gives."""
    assert (HEADER.size, ENTRY.size, CHECKSUM.size) == (48, 44, 4)
