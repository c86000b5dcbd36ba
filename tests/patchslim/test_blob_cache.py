"""Kept bytes come back whole, or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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


def test_threads_keep_the_same_file_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As two runners of one cache folder do, and processes of two containers, which have the same number."""
    path = tmp_path / "a.blob"

    def keep(number: int) -> int:
        keep_blob(path, bytes([number]) * (1 << 20))
        kept = kept_blob(path)
        return 0 if kept is None else len(set(kept))

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(keep, range(80))) == {1}
    assert not caplog.messages
    assert [one.name for one in tmp_path.iterdir()] == ["a.blob"]


def test_a_file_in_the_folders_place_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    keep_blob(tmp_path / "cache" / "a.blob", b"compiled")
    assert kept_blob(tmp_path / "cache" / "a.blob") is None
