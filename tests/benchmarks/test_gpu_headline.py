"""``python -m benchmarks.gpu.headline --tiny``, and the parts of the GPU benchmarks that a CPU can check."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import checkpoint_filter_fn

from benchmarks.accuracy.resolution import at_resolution
from benchmarks.gpu.few_blocks import few_block_counts, ramp_counts
from benchmarks.gpu.headline import measure_headline
from benchmarks.gpu.headline_run import HeadlineOptions, found_rows
from benchmarks.gpu.images import ResidentImages, blended, shifted
from benchmarks.gpu.sizes import SizesOptions, measure_sizes, plan_of_counts
from benchmarks.gpu.trained_rows import order_of
from benchmarks.training.train_cifar10 import CLASSES, MEAN, STD
from patchslim.errors import BudgetUnreachable, InputRejected, UsageError
from patchslim.macs import macs_of
from slimming.models.reader import reader_of
from slimming.search.distillation import Distillation
from slimming.search.few_blocks import AUTO

IMAGES = torch.arange(8 * 3 * 16 * 16, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(8, 3, 16, 16)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=48, embed_dim=48, depth=6, num_heads=3).eval()


def small_tar(path: Path, images: int, seed: int) -> Path:
    """A tar of class folders of random 32 px images, as CIFAR-10's are."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as archive:
        for number in range(images):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
            member = tarfile.TarInfo(f"{CLASSES[number % 10]}/{number:04d}.jpg")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)
    return path


@pytest.mark.slow
def test_every_row_is_measured_and_a_second_call_goes_on(tmp_path: Path) -> None:
    options = HeadlineOptions(
        tiny=True,
        data=str(small_tar(tmp_path / "test.tar", 40, 0)),
        train_data=str(small_tar(tmp_path / "train.tar", 60, 1)),
        output=tmp_path / "headline.json",
    )
    result = measure_headline(options)
    rows = {row["name"]: row for row in result["rows"]}
    slim, ramp = rows["slim-40.0%"], rows["ramp-40.0%"]
    assert min(slim["reduction"], ramp["reduction"], rows["ToMe-40.0%"]["reduction"]) >= 0.4
    assert len(set(slim["counts"][:-1])) <= 1 + AUTO  # dense and the cuts; the last block has the head's token
    assert {row["kind"] for row in rows.values()} == {"original", "training-free", "distilled", "fine-tuned"}
    recipe = rows["slim-40.0%-distilled"]["recipe"]
    assert (recipe["distill"], recipe["lr"], recipe["features"]) == (1, options.distill_lr, Distillation.features)
    tuned = [row for name, row in rows.items() if name.endswith("-finetuned")]
    assert len({row["recipe"]["epochs"] for row in tuned}) == 1
    assert len(tuned) == 4
    assert rows["slim-40.0%-finetuned"]["kl"] != slim["kl"] != rows["slim-40.0%-distilled"]["kl"]
    assert (tmp_path / "headline-slim-40.0.safetensors").exists()

    kept = [row for row in result["rows"] if row["name"] != "slim-40.0%-finetuned"]
    options.output.write_text(json.dumps({**result, "rows": kept}))
    again = measure_headline(options)
    assert again["rows"][:-1] == kept
    fields = ("top1", "correct", "recipe")
    assert {name: again["rows"][-1][name] for name in fields} == {name: rows["slim-40.0%-finetuned"][name] for name in fields}


@pytest.mark.slow
def test_every_variant_is_timed_beside_the_dense_model(tmp_path: Path) -> None:
    result = measure_sizes(SizesOptions(tiny=True, output=tmp_path / "sizes.json"))
    assert json.loads((tmp_path / "sizes.json").read_text()) == result
    for first in range(0, len(result["rows"]), 5):
        rows = {row["variant"]: row for row in result["rows"][first : first + 5]}
        assert set(rows) == {"dense", "ramp", "few-block", "lost", "ToMe"}
        assert rows["dense"]["speedup"] == rows["dense"]["macs_ratio"] == 1
        assert all(1.8 < row["macs_ratio"] < 1.9 for name, row in rows.items() if name != "dense")
    assert [(row["dtype"], row["batch"]) for row in result["rows"][::5]] == [("fp32", 1), ("fp32", 2), ("bf16", 2)]


@pytest.mark.parametrize("counts_of", [few_block_counts, ramp_counts])
def test_counts_meet_the_budget_and_use_it(model: Any, counts_of: Any) -> None:
    reader = reader_of(model, "vit")
    dense = macs_of([reader.tokens] * 6, reader.tokens, reader.geometry())
    for reduction in (0.3, 0.45):
        counts = counts_of(model, "vit", reduction)
        found = 1 - macs_of(counts, reader.tokens, reader.geometry()) / dense
        assert reduction <= found < reduction + 0.1  # ten tokens: coarse steps
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 1
    with pytest.raises(BudgetUnreachable):
        counts_of(model, "vit", 0.99)
    falls = [before > after for before, after in zip([reader.tokens, *counts], counts[:-1], strict=False)]
    assert sum(falls) == AUTO if counts_of is few_block_counts else sum(falls) > 2


def test_dropped_tokens_go_into_kept_patches_or_nowhere(model: Any) -> None:
    counts = [10, 7, 7, 4, 3, 1]
    merged, lost = (plan_of_counts(model, "vit", counts, merges=merges) for merges in (True, False))
    assert merged.counts == lost.counts == counts
    assert lost.merged_into is None
    assert merged.merged_into is not None
    assert all(into != 0 for token, into in enumerate(merged.merged_into) if token not in merged.kept[-2])


def test_batches_depend_on_their_step_alone() -> None:
    for labelled in (True, False):
        feed = ResidentImages(torch.zeros(8, 3, 32, 32, dtype=torch.uint8).random_(), torch.arange(8), 48, 4, 7, labelled)
        whole, later = list(feed(0, 4)), list(feed(2, 4))
        for (images, targets), (again, same) in zip(whole[2:], later, strict=True):
            assert torch.equal(images, again)
            assert torch.equal(targets, same)
        assert whole[0][0].shape == (4, 3, 48, 48)
        assert not torch.equal(whole[0][0], whole[1][0])
    assert all(not targets.any() for _, targets in whole)


def test_moved_images_are_windows_of_the_reflected_border_or_their_mirrors() -> None:
    drawn = shifted(IMAGES, torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for image, found in zip(IMAGES, drawn, strict=True):
        padded = torch.nn.functional.pad(image.float()[None] / 255, (2, 2, 2, 2), mode="reflect")[0]
        windows = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        wanted = [(window - mean) / std for window in (*windows, *(window.flip(-1) for window in windows))]
        assert any(torch.allclose(found, window) for window in wanted)


def test_blended_images_lie_between_two_of_the_batch() -> None:
    images = torch.eye(6)[:, :, None, None].expand(6, 6, 1, 2)
    mixed = blended(images, torch.Generator().manual_seed(1))[:, :, 0, 0]
    assert torch.allclose(mixed.sum(1), torch.ones(6))
    assert bool((mixed >= 0).all())
    assert bool(((mixed > 1e-6).sum(1) <= 2).all())


def test_another_resolution_answers_as_timm_does_on_resized_images(model: Any) -> None:
    images = torch.randn(2, 3, 48, 48)
    lower = at_resolution(model, 32)
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=6, num_heads=3).eval()
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    resized = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        assert torch.allclose(lower(images), other(resized), atol=1e-4)
    assert model.patch_embed.img_size == (48, 48)


def test_the_headline_is_trained_first() -> None:
    names = ["dense", "slim-45.0%", "ramp-45.0%", "slim-46.2%", "slim-60.0%", "at-176px"]
    assert order_of(dict.fromkeys(names))[:3] == ["dense", "slim-46.2%", "slim-60.0%"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"minutes": 0}, {"finetune_lr": 0}, {"distill_lr": 0}, {"distill_steps": 0}, {"budgets": (1.0,)}]
)
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        HeadlineOptions(**wrong).check()


def test_rows_of_another_device_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "headline.json"
    assert found_rows(path, "A") == {}
    path.write_text('{"device": {"name": "B"}, "rows": []}')
    with pytest.raises(InputRejected, match="results of B"):
        found_rows(path, "A")
    path.write_text("[]")
    with pytest.raises(InputRejected, match="not a results file"):
        found_rows(path, "A")
