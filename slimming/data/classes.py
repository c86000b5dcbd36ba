"""The names of the classes, in the order of the model's answers: one order for all data sets of a run.

They come from ``--class-map``, else from the weights' own file, else from the class folders of the training split (or of a data
set without splits), in natural order, as timm numbers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from patchslim.errors import InputRejected
from patchslim.files import read_bounded

_MAX_MAP_BYTES = 16 << 20
_SHOWN = 8


def read_class_map(path: Path) -> list[str]:
    """Return the names in a class map as timm has it: a text file, one name a line, in the order of the model's answers.

    Raises ``InputRejected`` where the file cannot be read, or a name is empty or given twice.
    """
    if path.suffix.lower() == ".pkl":
        raise InputRejected(
            f"--class-map {path}: is a pickle: write the names into a .txt file, one a line, in the model's order"
        )
    try:
        lines = read_bounded(path, _MAX_MAP_BYTES, "class map").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputRejected(f"--class-map {path}: is not UTF-8 text; give one class name a line") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        line = names.index("") + 1 if names else 1
        raise InputRejected(f"--class-map {path}: line {line} is empty; give one class name a line")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputRejected(f"--class-map {path}: {twice[:100]!r} is given twice")
    return names


def agreed_classes(trained: Sequence[str], named: Sequence[tuple[str, Sequence[str]]], say: Callable[[str], None]) -> list[str]:
    """Return the class names of a run, in order; empty where nothing names them.

    ``trained`` are the names that the weights' file gives (empty: none), ``named`` the data sets' addresses and class names,
    the one that is measured on first. Names are compared, never their number alone; where the weights' names are other
    words for as many classes (ImageNet's numbers and English), the order of the folders counts, and ``say`` is told.
    Raises ``InputRejected`` where names overlap and differ.
    """
    known = [(address, list(names)) for address, names in named if names]
    if not known:
        return list(trained)
    address, classes = known[0]
    for other, names in known[1:]:  # a data set may have images of some classes only
        if set(classes) <= set(names):
            address, classes = other, names
        elif not set(names) <= set(classes) and not set(names).isdisjoint(classes):
            raise InputRejected(
                f"{address} and {other} have different classes: {described(set(classes) - set(names))} and "
                f"{described(set(names) - set(classes))}: give those of the model with --class-map FILE"
            )
    if not trained or set(classes) <= set(trained):
        return list(trained) or classes
    if set(classes).isdisjoint(trained) and len(classes) == len(trained):
        say(
            f"{address}: the weights name other classes ({described(trained)}), so the folders count in their own order "
            f"({described(classes)}): give --class-map FILE if the model was trained in another order"
        )
        return classes
    raise InputRejected(
        f"{address}: {described(set(classes) - set(trained))}: not among the {len(trained)} classes of the weights "
        f"({described(trained)}): pass data of those classes, or --class-map FILE"
    )


def target_map(labels: Sequence[str], classes: Sequence[str], where: str) -> tuple[list[int] | None, str]:
    """Return the index in ``classes`` of each of ``labels`` (None where both are equal), and a note on classes without images.

    Raises ``InputRejected`` naming the labels that are not among ``classes``; ``where`` is the data set's name in messages.
    """
    if list(labels) == list(classes):
        return None, ""
    index = {name: place for place, name in enumerate(classes)}
    if unknown := [label for label in labels if label not in index]:
        raise InputRejected(
            f"{where}: {described(unknown)}: not among the {len(classes)} classes that the model is trained on "
            f"({described(classes)}): rename or move the folder, or give the model's classes with --class-map FILE"
        )
    absent = [name for name in classes if name not in set(labels)]
    note = f"{where}: no images of {len(absent)} of the {len(classes)} classes ({described(absent)})" if absent else ""
    return [index[label] for label in labels], note


def check_utf8(names: Sequence[str], where: str) -> None:
    """Raise ``InputRejected`` for a class name that is not UTF-8: a manifest could not hold it. ``where`` is its data set."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputRejected(f"{where}: the class {name!a} has a name that is not UTF-8: rename it") from error


def described(names: Sequence[str] | set[str]) -> str:
    """Return the first eight names, separated by commas; a set is sorted first."""
    shown = sorted(names) if isinstance(names, set) else list(names)
    return ", ".join(name[:60] for name in shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
