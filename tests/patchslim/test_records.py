"""Records as JSON files: every refusal names file, field and fault; a write is whole or leaves what was there."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest
from pydantic import Field, ValidationError, model_validator

from patchslim.errors import InputRejected
from patchslim.files import copy_verified, read_bounded, read_verified
from patchslim.records import MAX_JSON_BYTES, Count, StrictRecord, VersionOne, atomic_path, load_record, save_record


class Point(StrictRecord):
    x: float
    labels: list[str] = Field(default=[])


class Line(StrictRecord):
    name: str
    points: list[Point] = Field(min_length=2)
    width: Count = 1

    @model_validator(mode="after")
    def _check(self) -> Line:
        if self.points[0] == self.points[-1]:
            raise ValueError("points: the line ends where it starts")
        return self


LINE = Line(name="Küste 海岸", points=[Point(x=0.1), Point(x=1e-300, labels=["a\nb", '"'])])


def test_what_is_saved_is_read_back_and_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.json", "sub/two.json"):
        save_record(tmp_path / name, LINE)
        assert load_record(tmp_path / name, Line, "line") == LINE
    data = (tmp_path / "one.json").read_bytes()
    assert data == (tmp_path / "sub" / "two.json").read_bytes()
    assert data.endswith(b"}\n")
    assert "Küste 海岸" in data.decode("utf-8")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["one.json", "sub", "two.json"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", "the file is empty"),
        (b"{", "line: Invalid JSON: EOF"),
        (b"\xff\xfe\x00", "line: Invalid JSON"),
        (b"[" * 100_000, "line: Invalid JSON: recursion limit"),
        (b"[]", "line: Input should be an object"),
        (b'{"name": "a"}', "points: Field required"),
        (b'{"name": 1, "points": [{"x": 0}, {"x": 1}]}', "name: Input should be a valid string"),
        (b'{"name": "a", "points": [{"x": 0}, {"x": true}]}', r"points\.1\.x: Input should be a valid number"),
        (b'{"name": "a", "points": [{"x": 0}, {"x": "1"}]}', r"points\.1\.x: Input should be a valid number"),
        (b'{"name": "a", "points": [{"x": 0}, {"x": NaN}]}', r"points\.1\.x: .*finite"),
        (b'{"name": "a", "points": [{"x": 0}, {"x": 1, "y": 2}]}', r"points\.1\.y: Extra inputs are not permitted"),
        (b'{"name": "a", "points": [{"x": 0}, {"x": 1}], "width": 0}', "width: .*greater than or equal to 1"),
        (
            b'{"name": "a", "points": [{"x": 0}, {"x": 1}, {"x": 0}]}',
            "line: .*points: the line ends where it starts",
        ),
    ],
)
def test_a_file_that_is_no_such_record_is_refused_by_field(text: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a line.json"
    path.write_bytes(text)
    with pytest.raises(InputRejected, match=rf"a line\.json: not a valid line: {fault}") as refused:
        load_record(path, Line, "line")
    assert str(refused.value).startswith(f"{path}: ")
    assert len(str(refused.value)) < 1000  # a hostile file is not printed
    assert refused.value.exit_code == 3


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"absent\.json: is missing: it cannot be read as a line"):
        load_record(tmp_path / "absent.json", Line, "line")
    with pytest.raises(InputRejected, match=rf"{tmp_path.name}: cannot be read as a line: Is a directory"):
        load_record(tmp_path, Line, "line")


def test_no_more_is_read_than_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    text = LINE.model_dump_json().encode()
    with path.open("wb") as file:
        file.write(text + b" " * (MAX_JSON_BYTES - len(text)))
    assert load_record(path, Line, "line") == LINE
    os.truncate(path, 1 << 33)  # sparse
    with pytest.raises(InputRejected, match=rf"large\.json: not a valid line: .* {MAX_JSON_BYTES} bytes"):
        load_record(path, Line, "line")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b'{"name": "a", "points": [' + b"1," * 10**6 + b"1]}", r"points\.0: Input should be an object"),
        (b'{"name": "a", "points": [{"x": 0, "labels": [' + b"1," * 10**6 + b"1]}]}", r"points\.0\.labels\.0: Input should be"),
        (
            b"{" + b",".join(b'"%d":1' % number for number in range(10**5)) + b"}",
            "an object of 100000 names, and at most 10000",
        ),
    ],
)
def test_a_million_faults_take_no_more_memory_than_the_first(text: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / "line.json").write_bytes(text)
    with pytest.raises(InputRejected, match=fault):
        load_record(tmp_path / "line.json", Line, "line")
    if b"points" in text:
        with pytest.raises(ValidationError) as faults:
            Line.model_validate_json(text)
        assert faults.value.error_count() == 1


def test_what_a_file_claims_or_holds_is_not_copied_for_each_fault(tmp_path: Path) -> None:
    class Wide(StrictRecord):
        a: int
        b: int
        c: int
        d: int

    held = b'{"unknown": [' + b'"xxxxxxxxxxxxxxxxxxxxxxxxxxxxx",' * 30_000 + b'""]}'
    (tmp_path / "wide.json").write_bytes(held)
    tracemalloc.start()
    try:
        with pytest.raises(InputRejected, match="a: Field required"):
            load_record(tmp_path / "wide.json", Wide, "record")
        of_file = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with pytest.raises(InputRejected, match="more than the 10 bytes"):
            read_bounded(tmp_path / "wide.json", 10, "record")
        assert len(read_bounded(tmp_path / "wide.json", 1 << 31, "record")) == len(held)
        of_limit = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert of_file < 6 * len(held)  # its bytes and one tree of objects
    assert of_limit < 6 * len(held)  # not the two gigabytes that were allowed


def test_lists_without_end_are_refused_before_they_are_made(tmp_path: Path) -> None:
    (tmp_path / "line.json").write_bytes(b'{"name": [' + b"[]," * 1_000_000 + b"[]]}")
    with pytest.raises(InputRejected, match="holds more than 1000000 lists and objects"):
        load_record(tmp_path / "line.json", Line, "line")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "line.json"
    save_record(path, LINE)
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        save_record(path, LINE.model_copy(update={"name": "a lone surrogate: \ud800"}))

    def fail_halfway() -> None:
        with atomic_path(path) as part:
            part.write_text("half")
            assert part.parent == path.parent  # a rename across file systems would not be atomic
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["line.json"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (('"width":1', '"width":1,"width":2'), "'width': is given twice"),
        (('"x":0.1', '"x":0.1,"x":0.1'), "'x': is given twice"),
        (('"x":0.1', '"x":true'), "valid number"),
        (('"width":1', '"width":true'), "valid integer"),
        (('"width":1', '"width":1' + "0" * 400), "less than or equal"),
        (('"version":1', '"version":true'), "must be the number 1"),
        (('"version":1', '"version":1.0'), "must be the number 1"),
    ],
)
def test_what_readers_would_take_for_different_things(tmp_path: Path, change: tuple[str, str], word: str) -> None:
    class Versioned(Line):
        version: VersionOne = 1

    text = Versioned(**LINE.model_dump()).model_dump_json()
    (tmp_path / "line.json").write_text(text)
    assert load_record(tmp_path / "line.json", Versioned, "line").version == 1
    assert change[0] in text
    (tmp_path / "line.json").write_text(text.replace(*change, 1))
    with pytest.raises(InputRejected, match=word):
        load_record(tmp_path / "line.json", Versioned, "line")


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "zero"):
        with pytest.raises(InputRejected, match=f"{path.name}: is not a regular file"):
            load_record(path, Line, "line")
    save_record(tmp_path / "line.json", LINE)
    (tmp_path / "link.json").symlink_to(tmp_path / "line.json")
    assert load_record(tmp_path / "link.json", Line, "line") == LINE


def test_bytes_are_those_of_the_digest(tmp_path: Path) -> None:
    path, data = tmp_path / "file", b"some bytes"
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert read_verified(path, len(data), sha256) == data
    copy_verified(path, len(data), sha256, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    (tmp_path / "link").symlink_to(path)
    for place, size, digest in ((path, 9, sha256), (path, 11, sha256), (path, 10, "0" * 64), (tmp_path / "link", 10, sha256)):
        with pytest.raises(InputRejected):
            read_verified(place, size, digest)
        with pytest.raises((InputRejected, OSError)):
            copy_verified(place, size, digest, tmp_path / f"copy {size} {digest} {place.name}")
