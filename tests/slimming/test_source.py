"""Data of the user's own: folders, tar files and timm's named readers; what calibrates is never evaluated on."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchslim.errors import InputRejected
from slimming.data.source import ImageSet, calibration_set, evaluation_set, fingerprint_of, load_tensors, workers_for


def picture(number: int) -> Image.Image:
    """An image whose first pixel is its number."""
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    pixels[0, 0] = number
    return Image.fromarray(pixels)


def fill(folder: Path, numbers: range, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    for number in numbers:
        place = folder / classes[number % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number:03}.png")


def numbers_of(images: ImageSet) -> list[int]:
    return [int(np.asarray(images.samples[index][0])[0, 0, 0]) for index in images.indices]


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_a_folder_with_splits(tmp_path: Path) -> None:
    fill(tmp_path / "train", range(20))
    fill(tmp_path / "val", range(20, 30))
    fill(tmp_path / "test", range(30, 35))
    calibration, evaluation = calibration_set(str(tmp_path), 8), evaluation_set(str(tmp_path), None)
    assert (calibration.split, evaluation.split, calibration.share) == ("train", "val", "all")
    assert set(numbers_of(calibration)) <= set(range(20))
    assert (len(set(numbers_of(calibration))), sorted(numbers_of(evaluation))) == (8, list(range(20, 30)))
    assert calibration.labels == evaluation.labels == ["cat", "dog"]
    assert all(target == number % 2 for number, (_, target) in zip(numbers_of(evaluation), evaluation.samples, strict=True))
    few = evaluation_set(str(tmp_path), 4)
    assert {number % 2 for number in numbers_of(few)} == {0, 1}  # spread, so that every class is met
    assert evaluation.describe() == {"data": str(tmp_path), "split": "val", "share": "all", "images": 10}
    assert sorted(calibration_set(str(tmp_path), 99).indices) == list(range(20))


@pytest.mark.parametrize("layout", ["classes", "train only", "val and test", "tar"])
def test_undivided_data_is_divided_once_and_for_good(tmp_path: Path, layout: str) -> None:
    if layout == "val and test":
        fill(tmp_path / "data" / "val", range(20))
        fill(tmp_path / "data" / "test", range(20, 30))
    else:
        fill(tmp_path / "data" / ("train" if layout == "train only" else ""), range(30))
    address = str(tmp_path / "data")
    if layout == "tar":
        address = str(tmp_path / "data.tar")
        with tarfile.open(address, "w") as tar:
            tar.add(tmp_path / "data", ".")
    calibration, evaluation = calibration_set(address, 99, seed=1), evaluation_set(address, None)
    assert (calibration.split, calibration.share, evaluation.share) == ("none", "20%, disjoint", "80%, disjoint")
    assert (len(calibration), len(evaluation)) == (6, 24)
    assert sorted(numbers_of(calibration) + numbers_of(evaluation)) == list(range(30))
    assert calibration_set(address, 99, seed=2).indices == calibration.indices
    assert set(calibration_set(address, 3, seed=3).indices) < set(calibration.indices)
    assert evaluation.labels == ["cat", "dog"]


def test_a_local_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    fill(tmp_path / "data" / "train", range(10))
    fill(tmp_path / "data" / "validation", range(10, 16))
    address = f"hfds/{tmp_path / 'data'}"
    calibration, evaluation = calibration_set(address, 4), evaluation_set(address, None)
    assert (calibration.split, evaluation.split, evaluation.labels) == ("train", "validation", ["cat", "dog"])
    assert len(set(numbers_of(calibration)) & set(range(10))) == 4
    assert sorted(numbers_of(evaluation)) == list(range(10, 16))
    assert len(fingerprint_of(evaluation)) == 64


def write_shard(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            stream = io.BytesIO()
            picture(number).save(stream, "PNG")
            for suffix, content in (("jpg", stream.getvalue()), ("cls", str(number % 2).encode())):
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_local_shards(tmp_path: Path) -> None:
    splits = {}
    for split, numbers in (("train", range(12)), ("validation", range(12, 20))):
        write_shard(tmp_path / f"{split}-0.tar", numbers)
        size = len(numbers)
        splits[split] = {"name": split, "num_samples": size, "filenames": [f"{split}-0.tar"], "shard_lengths": [size]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    address = f"wds/{tmp_path}"
    calibration, evaluation = calibration_set(address, 5), evaluation_set(address, None)
    assert set(numbers_of(calibration)) <= set(range(12))
    assert len(set(numbers_of(calibration))) == 5
    assert sorted(numbers_of(evaluation)) == list(range(12, 20))
    assert all(evaluation.samples[index][1] == number % 2 for index, number in enumerate(numbers_of(evaluation)))
    batch, targets = next(load_tensors(evaluation, to_tensor))
    assert (tuple(batch.shape), sorted(targets.tolist())) == ((8, 3, 8, 8), [0] * 4 + [1] * 4)
    assert evaluation.describe() == {"data": address, "split": "validation", "share": "all", "images": 8}
    assert (len(calibration_set(address, 99)), len(evaluation_set(address, 3))) == (12, 3)
    assert fingerprint_of(calibration) == fingerprint_of(calibration_set(address, 5))
    assert fingerprint_of(calibration) != fingerprint_of(calibration_set(address, 5, seed=1))


def test_tensors_come_in_order_with_and_without_a_worker(tmp_path: Path) -> None:
    fill(tmp_path / "train", range(40))
    fill(tmp_path / "val", range(40, 45))
    images = calibration_set(str(tmp_path), 30, seed=4)
    wanted = numbers_of(images)
    for batch_size in (4, 32):  # more than four batches of 4: a worker decodes ahead
        batches = list(load_tensors(images, to_tensor, batch_size))
        assert [len(batch) for batch, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.cat([batch[:, 0, 0, 0] for batch, _ in batches]).int().tolist() == wanted
        assert torch.cat([targets for _, targets in batches]).tolist() == [number % 2 for number in wanted]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_damaged_image_is_named_and_never_replaced(tmp_path: Path, damage: str, batch_size: int) -> None:
    fill(tmp_path / "train", range(20))
    fill(tmp_path / "val", range(20, 22))
    bad = tmp_path / "train" / "dog" / "007.png"
    whole = bad.read_bytes()
    bad.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"no image at all", "empty": b""}[damage])
    images = calibration_set(str(tmp_path), 20)
    with pytest.raises(InputRejected, match=r"an image cannot be read: .*007\.png") as raised:
        list(load_tensors(images, to_tensor, batch_size))
    assert str(tmp_path) in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    ("prepare", "fault"),
    [
        (lambda path: None, "no such data; --data takes digits"),
        (lambda path: path.mkdir(), "cannot be read as class folders of images"),
        (lambda path: (path / "cat").mkdir(parents=True), "cannot be read as class folders of images"),
        (lambda path: path.write_text("not a folder"), "cannot be read as class folders of images"),
        (lambda path: fill(path, range(1)), r"1 image\(s\), too few for both"),
        (lambda path: (fill(path / "train", range(3)), (path / "val").mkdir()), "val: cannot be read"),
    ],
    ids=["missing", "empty", "empty class", "file", "one image", "empty split"],
)
def test_data_that_cannot_be_used(tmp_path: Path, prepare: Any, fault: str) -> None:
    prepare(tmp_path / "data")
    with pytest.raises(InputRejected, match=fault) as raised:
        evaluation_set(str(tmp_path / "data"), 5)
    assert str(tmp_path / "data") in str(raised.value)


@pytest.mark.parametrize(
    ("cores", "processes", "images", "workers"),
    [(2, 1, 1000, 1), (16, 1, 1000, 8), (64, 1, 1000, 8), (64, 8, 1000, 4), (16, 1, 32, 0)],
)
def test_loader_workers_are_half_of_a_process_s_share_of_the_cores(
    cores: int, processes: int, images: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers_for(images, 8) == workers


def test_workers_that_read_one_tar_file_do_not_move_each_others_place(tmp_path: Path) -> None:
    path, colours = tmp_path / "data.tar", np.random.default_rng(0).integers(0, 256, size=(60, 8, 8, 3), dtype=np.uint8)
    with tarfile.open(path, "w") as tar:
        for number, colour in enumerate(colours):
            content = io.BytesIO()
            Image.fromarray(colour).save(content, "png")
            info = tarfile.TarInfo(f"{'ab'[number % 2]}/{number:02}.png")
            info.size = len(content.getvalue())
            content.seek(0)
            tar.addfile(info, content)
    images = calibration_set(str(path), 60, apart=True)
    images.samples[0]  # opens the file here, before the workers are forked
    images.samples.transform = lambda image: torch.from_numpy(np.array(image))
    order = np.random.default_rng(0).permutation(np.tile(np.arange(60), 10)).tolist()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(images.samples, order), num_workers=4, batch_size=5)
    found = torch.cat([pixels for pixels, _ in loader])
    names = [int(Path(images.samples.reader.filename(index)).stem) for index in order]
    assert np.array_equal(found.numpy(), colours[names])
    images.samples.transform = None
    again = pickle.loads(pickle.dumps(images.samples))
    assert np.array_equal(np.array(again[7][0]), np.array(images.samples[7][0]))


@pytest.mark.parametrize("content", [b"", b"not a tar", None], ids=["empty", "garbage", "no images"])
def test_tar_files_that_cannot_be_used(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "data.tar"
    if content is None:
        with tarfile.open(path, "w") as tar:
            tar.add(__file__, "cat/note.txt")
    else:
        path.write_bytes(content)
    with pytest.raises(InputRejected, match="cannot be read as class folders"):
        calibration_set(str(path), 5)


def test_a_hub_name_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for address in ("hfds/nobody/nothing", f"wds/{tmp_path / 'absent'}", "tfds/nothing"):
        with pytest.raises(Exception, match=address) as raised:
            calibration_set(address, 5)
        assert raised.value.exit_code in (3, 4)  # type: ignore[attr-defined]


def test_the_fingerprint_is_of_images_classes_and_order(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "train", range(10))
    fill(tmp_path / "a" / "val", range(10, 15))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = fingerprint_of(calibration_set(str(tmp_path / "a"), 10))
    assert fingerprint_of(calibration_set(str(tmp_path / "b"), 10)) == first
    assert fingerprint_of(calibration_set(str(tmp_path / "a"), 9)) != first
    assert fingerprint_of(evaluation_set(str(tmp_path / "a"), None)) != first
    picture(200).save(tmp_path / "b" / "train" / "cat" / "004.png")
    assert fingerprint_of(calibration_set(str(tmp_path / "b"), 10)) != first
    digits = calibration_set("digits", 5, seed=1)
    assert fingerprint_of(digits) == fingerprint_of(calibration_set("digits", 5, seed=1))
    assert fingerprint_of(digits) != fingerprint_of(calibration_set("digits", 5, seed=2))
    assert fingerprint_of(evaluation_set("digits", 5)) != fingerprint_of(evaluation_set("digits", 6))


def test_a_link_to_no_image_is_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        fill(tmp_path / "images" / split, range(4))
    link = tmp_path / "images" / "val" / "dog" / "003.png"
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputRejected, match=r"003\.png"):
        fingerprint_of(evaluation_set(str(tmp_path / "images"), None))
