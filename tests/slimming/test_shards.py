"""WebDataset shards by index: timm's order, images and classes; nothing held but the index; damage named by shard and key."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchslim.errors import InputRejected
from slimming.data.shards import ShardReader, shards_of
from slimming.data.source import calibration_set, evaluation_set, fingerprint_of, load_tensors


def encoded(number: int, kind: str = "PNG") -> bytes:
    """An image of one colour, which tells its number."""
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, number // 256, 7)).save(stream, kind)
    return stream.getvalue()


def number_in(stream: Any) -> int:
    red, green, _ = Image.open(stream).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    return int(red) + 256 * int(green)


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # type: ignore[assignment]  # a fraction: kept in an extended header
            tar.addfile(info, io.BytesIO(content))


def write_shard(path: Path, numbers: range, suffix: str = "png") -> None:
    files = []
    for number in numbers:
        files += [(f"{number:05}.{suffix}", encoded(number)), (f"{number:05}.cls", str(number % 7).encode())]
    write_tar(path, files)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """60 images in three shards whose names are not in the order of their writing."""
    paths = [tmp_path / f"data-train-{place:04}.tar" for place in (2, 0, 1)]
    for path in paths:
        first = 20 * int(path.stem[-4:])
        write_shard(path, range(first, first + 20))
    return paths


def test_order_images_and_classes_are_those_of_timm(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    from timm.data import create_dataset

    splits: dict[str, Any] = {"filenames": [], "shard_lengths": [], "num_samples": 40, "name": "train"}
    for shard, kind in enumerate(("jpg", "webp")):
        splits["filenames"].append(f"some-train-{shard:04}.tar")
        splits["shard_lengths"].append(20)
        with webdataset.TarWriter(str(tmp_path / splits["filenames"][-1])) as writer:
            for number in range(20 * shard, 20 * shard + 20):
                image = encoded(9 * number, {"jpg": "JPEG", "webp": "WEBP"}[kind])
                sample = {"__key__": f"n01/{number:06}", kind: image, "cls": number % 5, "json": {"number": number}}
                writer.write(sample | ({"png": encoded(1)} if number == 3 else {}))  # a second image: jpg comes first
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": splits}}))
    streamed = list(create_dataset("wds/", root=str(tmp_path), split="train", is_training=False, batch_size=1))
    images = calibration_set(f"wds/{tmp_path}", 99)
    assert (len(streamed), images.indices) == (40, range(40))
    for index, (image, target) in enumerate(streamed):
        found = images.samples[index]
        assert (found[0].tobytes(), found[0].size, found[1]) == (image.tobytes(), image.size, target)


def test_nothing_but_the_index_is_held(tmp_path: Path) -> None:
    count, shards, weight = 4000, 4, 4096
    for shard in range(shards):
        each = count // shards
        files = [(f"{n}.{s}", c) for n in range(each) for s, c in (("jpg", bytes(weight)), ("cls", b"1"))]
        write_tar(tmp_path / f"train-{shard}.tar", files)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        reader = ShardReader(*shards_of(tmp_path, "train"))
        indexed, peak = (traced - before for traced in tracemalloc.get_traced_memory())
        tracemalloc.reset_peak()
        for index in range(0, count, 7):
            with reader[index][0] as stream:
                assert len(stream.read()) == weight
        read, reading_peak = (traced - before for traced in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    assert len(reader) == count
    assert reader.held_bytes == 16 * count + 8 * (shards + 1)
    assert indexed < 24 * count + 65536  # of 16 MB of images
    assert peak < 64 * count + 1_000_000
    assert read < indexed + 65536
    assert reading_peak < indexed + 65536 + 8 * weight
    assert len(pickle.dumps(reader)) < 17 * count + 4096


def share(reader: ShardReader, indices: range, results: Any) -> None:
    results.put([(index, number_in(reader[index][0]), reader[index][1]) for index in indices])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_their_own_shares(shards: list[Path], method: str) -> None:
    reader = ShardReader(shards)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    for rank in (0, 1):
        context.Process(target=share, args=(reader, range(rank, 60, 2), results)).start()
    found = results.get(timeout=120) + results.get(timeout=120)
    assert sorted(found) == [(number, number, number % 7) for number in range(60)]


def test_loader_workers_read_at_once(shards: list[Path]) -> None:
    images = calibration_set(f"wds/{shards[0].parent}", 99)
    images.samples[0]  # what this process has read before the fork must not matter
    images.samples.transform = lambda image: torch.tensor(image.getpixel((0, 0))[0])
    order = np.random.default_rng(0).permutation(np.tile(np.arange(60), 5)).tolist()
    subset = torch.utils.data.Subset(images.samples, order)
    loader = torch.utils.data.DataLoader(subset, batch_size=3, num_workers=3, multiprocessing_context="fork")
    batches = list(loader)
    assert torch.cat([numbers for numbers, _ in batches]).tolist() == order
    assert torch.cat([targets for _, targets in batches]).tolist() == [number % 7 for number in order]


def test_draws_are_of_all_shards_and_read_forwards(shards: list[Path]) -> None:
    address = f"wds/{shards[0].parent}"
    images = calibration_set(address, 30, seed=4)
    numbers = [number_in(images.samples.reader[index][0]) for index in images.indices]
    assert numbers == sorted(set(numbers)) == list(images.indices)
    assert {number // 20 for number in numbers} == {0, 1, 2}
    assert calibration_set(address, 30, seed=4).indices == images.indices != calibration_set(address, 30, seed=5).indices
    assert fingerprint_of(calibration_set(address, 30, seed=4)) == fingerprint_of(images)
    assert fingerprint_of(calibration_set(address, 30, seed=5)) != fingerprint_of(images)
    for path in shards:
        path.rename(path.with_name(path.name.replace("train", "val")))
    spread = evaluation_set(address, 6)
    assert (spread.split, list(spread.indices)) == ("val", [0, 10, 20, 30, 40, 50])


def test_the_split_is_in_the_shards_names(tmp_path: Path) -> None:
    names = ["train.tar", "my-train-0001.tar", "train_003.tar", "train-00001-of-00002.tar", "TRAIN07.tar"]
    for name in [*names, "pretrain-01.tar", "test-train-x.tar", "trainer.tar", "val-train.txt", "train-test-0.tar"]:
        (tmp_path / name).touch()
    assert sorted(path.name for path in shards_of(tmp_path, "train")[0]) == sorted(names)
    assert [path.name for path in shards_of(tmp_path, "test")[0]] == ["train-test-0.tar"]
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0.tar").touch()
    assert shards_of(tmp_path, "val")[0] == [tmp_path / "val" / "0.tar"]
    with pytest.raises(InputRejected, match=r"no shard is named like validation-0000\.tar"):
        shards_of(tmp_path, "validation")


def test_what_the_info_file_says_goes(tmp_path: Path) -> None:
    info, part = tmp_path / "info.json", {"filenames": ["a.tar", "gone.tar"], "alt_label": "label/fine"}
    info.write_text(json.dumps({"splits": {"train": part, "val": {"filenames": ["gone.tar"]}}}))
    write_shard(tmp_path / "train-0.tar", range(3))
    fields = [{"label": {"fine": 4}}, {"label": {"fine": -1}}, {"label/fine": 6}]  # -1: left out
    files = [
        (f"{n}.{s}", c)
        for n, field in enumerate(fields)
        for s, c in (("png", encoded(n)), ("json", json.dumps(field).encode()))
    ]
    write_tar(tmp_path / "a.tar", files)
    images = calibration_set(f"wds/{tmp_path}", 9)  # a.tar alone is here, and the shard named train is not of the split
    assert [(number_in(stream), target) for stream, target in map(images.samples.reader.__getitem__, images.indices)] == [
        (0, 4),
        (2, 6),
    ]
    with pytest.raises(InputRejected, match=r"validation is not among .*names 1 shard\(s\), and none of them is here"):
        evaluation_set(f"wds/{tmp_path}", 9)
    too_long = json.dumps({"splits": {"train": {"filenames": ["a" * 5000]}}})
    nested = '{"a":' * 9000 + "1" + "}" * 9000
    for text in (
        *("{", "[]", '{"splits": 3}', '{"splits": {"train": {"filenames": 3}}}', '{"splits": {"train": []}}'),
        *(too_long, nested, "[" * 100_000),
    ):
        info.write_text(text)
        with pytest.raises(InputRejected, match=r"info\.json"):
            calibration_set(f"wds/{tmp_path}", 9)


def cut(share_of: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * share_of)])


def overwrite(path: Path) -> None:
    content = path.read_bytes()
    place = content.rindex(b"00029.png")
    path.write_bytes(content[:place] + b"?" + content[place + 1 :])


def pack(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def replace_by(*files: tuple[str, bytes]) -> Callable[[Path], None]:
    return lambda path: write_tar(path, [("k0.png", encoded(0)), ("k0.cls", b"1"), *files])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (cut(0.5), "truncated"),
        (cut(0), "truncated at byte 0"),
        (
            lambda path: path.write_bytes(path.read_bytes()[: path.read_bytes().rindex(b"4") // 512 * 512 + 512]),
            "end of the archive",
        ),
        (overwrite, "damaged at byte"),
        (lambda path: path.write_bytes(b"no tar" * 999), "damaged at byte 0"),
        (pack, "compressed tar has no random access"),
        (replace_by(("k1.cls", b"1")), r"sample k1: has no image .* among its files \(cls\)"),
        (replace_by(("k1.png", b"")), r"sample k1: has no \.cls file"),
        (replace_by(("k1.png", b""), ("k1.cls", b"cat")), r"sample k1: its \.cls is not an integer: b'cat'"),
        (replace_by(("k1.png", b""), ("k1.cls", b"9" * 12)), "sample k1: its class .* out of range"),
        (replace_by(("k1.png", b""), ("k1.cls", b"9" * 99)), r"sample k1: its \.cls file has 99 bytes; at most 64"),
        (replace_by(("k1.png", b""), ("k1.PNG", b""), ("k1.cls", b"1")), r"sample k1: has two \.png"),
    ],
    ids=["half", "empty", "no end", "header", "garbage", "gzip", "no image", "no class", "word", "huge", "long", "twice"],
)
def test_a_damaged_shard_is_named(shards: list[Path], damage: Callable[[Path], None], fault: str) -> None:
    bad = shards[2]
    damage(bad)
    with pytest.raises(InputRejected, match=fault) as raised:
        calibration_set(f"wds/{bad.parent}", 5)
    assert str(raised.value).startswith(f"{bad}: ")


@pytest.mark.parametrize("name", ["val-0.tar.gz", "val-0.tgz", "val-0.tar.zst"])
def test_packed_shards_are_refused_by_name(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / "test-0.tar", range(3))
    write_shard(tmp_path / name, range(3))
    with pytest.raises(InputRejected, match="no random access: unpack") as raised:
        evaluation_set(f"wds/{tmp_path}", 5)  # and the test split does not silently take its place
    assert name in str(raised.value)


@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_damaged_image_is_named_by_shard_and_key(shards: list[Path], batch_size: int) -> None:
    content = shards[0].read_bytes()
    place = content.index(b"\x89PNG", content.index(b"00047.png"))
    shards[0].write_bytes(content[:place] + bytes(8) + content[place + 8 :])
    images = calibration_set(f"wds/{shards[0].parent}", 99)
    with pytest.raises(InputRejected, match=r"data-train-0002\.tar: sample 00047: not an image") as raised:
        list(load_tensors(images, lambda image: torch.tensor(image.getpixel((0, 0))), batch_size))
    assert raised.value.exit_code == 3


def test_a_shard_that_changes_meanwhile_is_refused(shards: list[Path]) -> None:
    images = calibration_set(f"wds/{shards[0].parent}", 99)
    write_shard(shards[0], range(100, 110))
    images.samples[0]
    with pytest.raises(InputRejected, match=r"0002\.tar: sample at byte \d+: the shard was changed"):
        images.samples[59]
    shards[0].unlink()
    with pytest.raises(InputRejected, match=r"0002\.tar: sample at byte"):
        fingerprint_of(images)


def test_an_index_beyond_the_end(shards: list[Path]) -> None:
    reader = ShardReader(shards)
    for index in (-1, 60):
        with pytest.raises(IndexError):
            reader[index]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"null",
        b"[1]",
        b'"label"',
        b'{"label": 1e999}',
        b'{"label": NaN}',
        b'{"label": [0]}',
        b"\xff",
    ],
    ids=range(10),
)
def test_broken_records_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", encoded(0)), ("0.json", content)])
    with pytest.raises(InputRejected, match=r"a\.tar: sample 0: "):
        ShardReader([tmp_path / "a.tar"], "label")
    (tmp_path / "info.json").write_bytes(content)
    with pytest.raises(InputRejected, match=r"info\.json"):
        shards_of(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"one", b"9" * 5000, b"1e3", b"99999999999", b"\xff"], ids=range(6))
def test_classes_that_are_no_small_integers_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", encoded(0)), ("0.cls", content)])
    with pytest.raises(InputRejected, match=r"a\.tar: sample 0: "):
        ShardReader([tmp_path / "a.tar"])
