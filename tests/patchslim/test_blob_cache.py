"""Kept bytes come back whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchslim.blob_cache import keep_blob, kept_blob


def test_what_is_damaged_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "new" / "a.blob"
    assert kept_blob(path) is None
    keep_blob(path, b"compiled")
    assert kept_blob(path) == b"compiled"
    assert not caplog.messages
    whole = path.read_bytes()
    changed = [whole[:at] + b"\0" + whole[at + 1 :] for at in (0, 31, 32, 39)]
    for damaged in (whole[:-1], whole + b"x", whole[1:], b"", *changed):
        path.write_bytes(damaged)
        assert kept_blob(path) is None, damaged
        assert caplog.messages == [f"{path}: is not used, since it is damaged; it is made anew"]
        caplog.clear()
    keep_blob(path, b"")
    assert kept_blob(path) == b""
    assert [one.name for one in path.parent.iterdir()] == ["a.blob"]


def test_a_file_in_the_folders_place_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    keep_blob(tmp_path / "cache" / "a.blob", b"compiled")
    assert kept_blob(tmp_path / "cache" / "a.blob") is None
