"""Classes are known by name: one order for all splits, the weights' own where they name them, ``--class-map`` before all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from patchslim.errors import InputRejected
from slimming.data.classes import agreed_classes, read_class_map
from slimming.data.source import ImageSet, calibration_set, class_names_of, evaluation_set, fingerprint_of
from slimming.options import ModelOptions
from slimming.session import class_names, open_session, training_images
from tests.helpers.checkpoints import plain_state
from tests.helpers.commands import door_here
from tests.helpers.timm_models import TINY

ARGUMENTS = tuple(f"{key}={value}" for key, value in TINY.items() if key != "num_classes")
VIT = "vit_tiny_patch16_224"


def fill(folder: Path, *classes: str, count: int = 3) -> Path:
    for place, name in enumerate(classes):
        for number in range(count):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 20 * place + number, np.uint8)).save(path)
    return folder


def found(images: ImageSet) -> set[tuple[str, str]]:
    """(folder of the file, name of the class that it is given)."""
    reader: Any = images.samples.reader  # type: ignore[attr-defined]
    return {(Path(reader.filename(index)).parent.name, images.labels[images.samples[index][1]]) for index in images.indices}


def test_a_class_of_the_evaluation_split_is_that_of_its_name(tmp_path: Path) -> None:
    fill(tmp_path / "train", "ant", "bee", "cat")
    fill(tmp_path / "val", "bee", "cat")
    images = evaluation_set(str(tmp_path), None)
    assert images.labels == ["ant", "bee", "cat"]
    assert found(images) == {("bee", "bee"), ("cat", "cat")}
    assert images.notes == (f"{tmp_path}/val: no images of 1 of the 3 classes (ant)",)


def test_a_name_that_training_lacks_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", "ant", "bee", "cat")
    fill(tmp_path / "val", "bee", "cat", "dog")
    with pytest.raises(InputRejected, match=r"val: dog: not among the 3 classes .* trained on \(ant, bee, cat\)"):
        evaluation_set(str(tmp_path), None)
    (tmp_path / "map.txt").write_text("cat\ndog\nbee\nant\n")
    names = read_class_map(tmp_path / "map.txt")
    assert found(evaluation_set(str(tmp_path), None, names)) == {(name, name) for name in ("bee", "cat", "dog")}
    assert evaluation_set(str(tmp_path), None, names).labels == ["cat", "dog", "bee", "ant"]


def test_the_map_decides_the_fingerprint(tmp_path: Path) -> None:
    fill(tmp_path, "ant", "bee")
    one, other = (evaluation_set(str(tmp_path), None, names) for names in (["ant", "bee"], ["bee", "ant"]))
    assert fingerprint_of(one) != fingerprint_of(other)
    assert fingerprint_of(one) == fingerprint_of(evaluation_set(str(tmp_path), None))


def test_a_val_folder_that_lacks_a_class_works_at_the_door(tmp_path: Path) -> None:
    fill(tmp_path / "train", "ant", "bee", "cat")
    fill(tmp_path / "val", "bee", "cat")
    options = ModelOptions(model=VIT, model_arg=ARGUMENTS, weights="random", data=str(tmp_path))
    evaluated = evaluation_set(str(tmp_path), None, class_names(options))
    session = open_session(options, evaluated)
    assert session.loaded.module.num_classes == 3
    fill(tmp_path / "val", "dog")
    command = [
        sys.executable,
        "-m",
        "slimming.run",
        "--model",
        VIT,
        "--weights",
        "random",
        "--data",
        str(tmp_path),
        "--eval-images",
        "2",
    ]
    result = door_here([*command, "-o", str(tmp_path / "plan.json")])
    assert result.returncode == 3
    assert "dog: not among the 3 classes" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_weights_own_labels_are_the_order(tmp_path: Path) -> None:
    fill(tmp_path / "data", "ant", "bee", "cat")
    weights = tmp_path / "w.safetensors"
    labels = ["cat", "x", "bee", "y", "ant", "z", "w"]
    save_file(plain_state(), weights, metadata={"patchslim": json.dumps({"labels": labels})})
    options = ModelOptions(model=VIT, model_arg=ARGUMENTS, weights=str(weights), data=str(tmp_path / "data"))
    assert class_names(options) == labels
    evaluated = evaluation_set(options.data, None, labels)
    assert found(evaluated) == {("ant", "ant"), ("bee", "bee"), ("cat", "cat")}
    assert "no images of 4 of the 7 classes (x, y, z, w)" in evaluated.notes[0]
    assert open_session(options, evaluated).loaded.module.num_classes == 7
    fill(tmp_path / "data", "dog")
    with pytest.raises(InputRejected, match=r"data: dog: not among the 7 classes of the weights \(cat, x, bee"):
        class_names(options)


def test_what_is_fine_tuned_on_has_the_same_classes(tmp_path: Path) -> None:
    data, more = fill(tmp_path / "data", "bee", "cat"), fill(tmp_path / "more", "ant", "bee", "cat")
    options = ModelOptions(model=VIT, weights="random", data=str(data), train_data=str(more), finetune_epochs=1)
    assert class_names(options) == ["ant", "bee", "cat"]  # the widest
    assert found(training_images(options)) == {(name, name) for name in ("ant", "bee", "cat")}
    (tmp_path / "more" / "cat").rename(tmp_path / "more" / "dog")
    with pytest.raises(
        InputRejected, match="have different classes: cat and ant, dog: give those of the model with --class-map"
    ):
        class_names(options)


def test_names_decide_and_not_their_number() -> None:
    said: list[str] = []
    assert agreed_classes([], [("a", [])], said.append) == []
    assert agreed_classes(["x", "y"], [("a", [])], said.append) == ["x", "y"]
    assert agreed_classes([], [("a", ["x", "y"]), ("b", ["u", "v", "w"])], said.append) == ["x", "y"]
    assert not said
    assert agreed_classes(["tench", "shark"], [("a", ["n01", "n02"])], said.append) == ["n01", "n02"]
    assert "a: the weights name other classes (tench, shark)" in said[0]
    for names in (["n01"], ["tench", "n02"]):
        with pytest.raises(InputRejected, match="not among the 2 classes of the weights"):
            agreed_classes(["tench", "shark"], [("a", names)], said.append)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "line 1 is empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\na\n", "'a' is given twice"),
        (b"\xff\xfe\n", "not UTF-8"),
    ],
)
def test_class_maps_that_are_none(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(InputRejected, match=fault):
        read_class_map(tmp_path / "map.txt")
    (tmp_path / "map.pkl").write_bytes(content)
    with pytest.raises(InputRejected, match=r"a pickle: write the names into a \.txt file"):
        read_class_map(tmp_path / "map.pkl")


def test_files_that_are_left_out_are_said(tmp_path: Path) -> None:
    fill(tmp_path / "train", "ant", "bee")
    fill(tmp_path / "val", "ant", "bee")
    (tmp_path / "val" / "bee" / "x.gif").touch()
    assert class_names_of(str(tmp_path)) == ["ant", "bee"]
    assert calibration_set(str(tmp_path), 9).notes == ()
    (note,) = evaluation_set(str(tmp_path), None).notes
    assert "val: 1 file(s) left out (1 .gif; read are .bmp" in note
