"""The built-in data set: the same everywhere, balanced, and with no handwritten digit in both splits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slimming.data.digits import CLASSES, DEFAULT_LENGTH, SIZE, SPLITS, Digits, render, source_indices
from slimming.data.source import calibration_set, evaluation_set

ROOT = Path(__file__).parents[2]
DIGEST = (
    "import hashlib; from slimming.data.digits import render; "
    "print(hashlib.sha256(b''.join(render(s, i)[0].tobytes() for s in ('train', 'test') for i in (0, 7, 40_000))).hexdigest())"
)


def test_an_image_is_a_function_of_split_and_index() -> None:
    images = [(split, index) for split in SPLITS for index in (0, 7, 40_000)]
    content = b"".join(render(split, index)[0].tobytes() for split, index in images)
    backwards = b"".join(render(split, index)[0].tobytes() for split, index in reversed(images))
    assert content != backwards
    other = subprocess.run([sys.executable, "-c", DIGEST], cwd=ROOT, capture_output=True, text=True, check=True)
    assert hashlib.sha256(content).hexdigest() == other.stdout.strip()
    assert len({render(split, index)[0].tobytes() for split in SPLITS for index in range(20)}) == 40


def test_no_handwritten_digit_is_in_both_splits() -> None:
    train, test = set(source_indices("train").tolist()), set(source_indices("test").tolist())
    assert not train & test
    assert train | test == set(range(1797))
    assert len(test) / 1797 == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_has_its_share_and_labels_are_the_sources(split: str) -> None:
    from sklearn.datasets import load_digits

    targets = load_digits().target[source_indices(split)]
    counts = Counter(targets.tolist())
    assert sorted(counts) == list(range(10))
    assert all(0.05 < count / len(targets) < 0.15 for count in counts.values())
    for index in (0, 3, 1500):
        assert render(split, index)[1] == targets[index % len(targets)]


def test_the_digit_can_be_seen_where_it_is_said_to_be() -> None:
    brighter = 0
    for index in range(20):
        image, target, (x, y) = render("test", index)
        assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
        assert 0 <= target <= 9
        grey = np.asarray(image.convert("L"), dtype=np.float64)
        assert 40 <= x < SIZE - 40
        assert 40 <= y < SIZE - 40
        window = np.sort(grey[y - 40 : y + 40, x - 40 : x + 40].ravel())
        brighter += bool(window[-400:].mean() > window.mean() + 40)
    assert brighter >= 18


def test_the_data_set_is_map_style() -> None:
    digits = Digits("test", 5)
    assert (len(digits), digits.classes, len(Digits("train"))) == (5, CLASSES, DEFAULT_LENGTH["train"])
    image, target = digits[4]
    assert isinstance(image, Image.Image)
    assert (image.tobytes(), target) == (render("test", 4)[0].tobytes(), render("test", 4)[1])
    assert Digits("test", 5, transform=lambda image: image.size)[0][0] == (SIZE, SIZE)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            digits[index]
    assert len(list(digits)) == 5


def test_what_is_no_image_is_refused() -> None:
    for action in (lambda: render("test", -1), lambda: render("val", 0), lambda: Digits("val")):
        with pytest.raises(ValueError, match="digits has"):
            action()


def test_calibration_is_drawn_from_train_and_evaluation_is_the_head_of_test() -> None:
    first, again, other = (calibration_set("digits", 50, seed=seed) for seed in (1, 1, 2))
    assert first.indices == again.indices != other.indices
    assert len(set(first.indices)) == len(first) == 50
    assert first.split == "train"
    held_out = evaluation_set("digits", 30)
    assert (held_out.split, held_out.indices, held_out.labels) == ("test", list(range(30)), list(CLASSES))
    assert len(evaluation_set("digits", None)) == DEFAULT_LENGTH["test"]
