"""docs/accuracy.md keeps its word: every number of its tables is what the committed results say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from slimming.search.few_blocks import NEGLIGIBLE
from tests.helpers.commands import door_here

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "accuracy" / "results"
MEASURED = re.findall(r"<!-- results: (\S+) -->\n(\|.*?)\n\n", PAGE, flags=re.DOTALL)
MORE_IMAGES = "cifar10-vit_ti-4096"
Table = dict[str, dict[str, str]]


def table(text: str) -> Table:
    """A Markdown table as ``cells[row][column]``; names of columns and rows without what sets them off."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    columns = [name.replace(" %", "%").replace(".0%", "%") for name in head[1:]]
    return {row[0].strip("*").removeprefix("ours: "): dict(zip(columns, row[1:], strict=True)) for row in rows}


def shown(name: str) -> Table:
    """What ``benchmarks.accuracy.tables --show`` prints of a results file: top-1 and its range, not what follows a comma."""
    done = door_here([sys.executable, "-m", "benchmarks.accuracy.tables", "--show", str(RESULTS / f"{name}.json")])
    assert done.returncode == 0, done.stderr
    (text,) = re.findall(r"^(\| MACs removed .*?)\n\n", done.stdout, flags=re.DOTALL | re.MULTILINE)
    return {row: {column: cell.split(",")[0] for column, cell in cells.items()} for row, cells in table(text).items()}


@pytest.mark.parametrize(("name", "text"), MEASURED, ids=[name for name, _ in MEASURED])
def test_a_table_is_what_the_results_say(name: str, text: str) -> None:
    results = shown(name)
    wanted = {}
    for row, cells in table(text).items():
        found = shown(MORE_IMAGES)["similarity, closed-form"] if row == "the same, from 4,096 images" else results[row]
        wanted[row] = {column: found[column] for column in cells}
    assert table(text) == wanted


def test_there_are_three_of_them_with_ours_and_both_references() -> None:
    assert sorted(name for name, _ in MEASURED) == ["cifar10", "cifar10-vit_ti", "digits"]
    for _, text in MEASURED:
        assert {"similarity, closed-form", "ToMe", "ToMe, last block cut", "EViT, best form"} <= set(table(text))


@pytest.mark.parametrize(
    ("mark", "images", "dense"),
    [
        ("alternatives", 2000, "2,000 held-out images (78.15 % dense)"),
        ("distilled", 5000, "5,000 held-out images (78.98 % dense)"),
    ],
)
def test_the_alternatives_are_what_their_file_says(mark: str, images: int, dense: str) -> None:
    ((text, command),) = re.findall(rf"<!-- {mark} -->\n(\|.*?)\n\n```sh\nuv run (.*?)\n```", PAGE, flags=re.DOTALL)
    results = json.loads((ROOT / "benchmarks" / "results" / f"cifar10-{mark}.json").read_text(encoding="utf-8"))
    assert results["command"] == command
    cells = [cell for row in table(text).values() for cell in row.values() if cell]
    wanted = [
        f"{100 * row['top1']:.2f}, {row['kl']:.4f} (-{100 * row['reduction']:.1f} %)"
        for row in results["rows"]
        if row["row"] != "dense"
    ]
    assert sorted(cells) == sorted(wanted)
    assert dense in PAGE
    assert (results["evaluation"]["images"], f"{100 * results['model']['top1']:.2f} % dense" in dense) == (images, True)


def test_the_fine_tuned_rows_are_what_the_results_say() -> None:
    (text,) = re.findall(r"<!-- fine-tuned -->\n(\|.*?)\n\n", PAGE, flags=re.DOTALL)
    small, ti = shown("cifar10"), shown("cifar10-vit_ti")
    rows = json.loads((RESULTS / "cifar10-vit_ti.json").read_text(encoding="utf-8"))["rows"]
    draw = {
        f"{row['budget']:.0%}": f"{100 * row['top1']:.2f}"
        for row in rows
        if (row["method"], row["fit"], row["seed"], row["finetune"]) == ("similarity", "closed-form", 0, None)
    }
    wanted = [
        small["similarity, closed-form, fine-tuned 2 x 50000 images"],
        small["paper, closed-form, fine-tuned 2 x 50000 images"],
        ti["similarity, closed-form, fine-tuned 1 x 12800 images"],
        draw,
    ]
    for cells, found in zip(table(text).values(), wanted, strict=True):
        assert cells == {column: found.get(column, "") for column in cells}


def test_the_latency_rows_are_what_the_results_say() -> None:
    (text,) = re.findall(r"<!-- latency -->\n\|.*?\n\|.*?\n(\|.*?)\n\n", PAGE, flags=re.DOTALL)
    wanted = []
    for name in ("cifar10-vit_ti-latency", "cifar10-latency"):
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for tome, evit in zip(found["summary"][::2], found["summary"][1::2], strict=True):
            line = [f"{tome['ratio_to_dense']:.3f}", f"{100 * tome['top1']:.2f}", f"{100 * tome['rival_top1']:.2f}"]
            if evit["reached"]:
                line.append(f"{100 * evit['rival_top1']:.2f}")
            else:
                fastest = next(row for row in found["rows"] if row.get("latency_ms") == evit["rival_fastest_ms"])
                line.append(f"not that fast ({100 * evit['rival_fastest_top1']:.2f} at {fastest['ratio_to_dense']:.3f})")
            wanted.append(line)
    assert [[cell.strip() for cell in row.strip("|").split("|")][1:] for row in text.splitlines()] == wanted


def test_a_kl_that_the_search_takes_for_nothing_is_next_to_nothing_in_every_table() -> None:
    """``slimming.search.few_blocks.NEGLIGIBLE``: what merging loses a nat, wherever it diverges enough to tell."""
    lost = []
    for name, _ in MEASURED:
        rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        dense = next(row["top1"] for row in rows if row["method"] == "dense")
        ours = [row for row in rows if row["method"] in ("similarity", "blocks-auto") and not row["finetune"]]
        lost += [100 * (dense - row["top1"]) / row["kl"] for row in ours if row["kl"] > 0.005]
    assert len(lost) > 40
    assert round(NEGLIGIBLE * max(lost), 2) == 0.13  # as docs/method.md says
