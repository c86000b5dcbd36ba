"""Attacks on what a bundle's records say: JSON that is none, fields that lie, verdicts and figures that are forged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.attacks.bundles import Change, Damage, add, attack, edit, in_both, in_manifest, in_plan, replaced, seal

for _text, _words in (
    ("", ("empty",)),
    ("{", ("Invalid JSON",)),
    ("[]", ("object",)),
    ("{}", ("Field required",)),
    ("\xff", ("Invalid JSON",)),
    ("[" * 100_000, ("Invalid JSON",)),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, ("not a valid manifest",)),
    ("{" + ",".join(f'"{n}":0' for n in range(20_000)) + "}", ("names", "allowed")),
    ("[" + "[]," * 1_000_000 + "[]]", ("lists and objects",)),
):
    add(
        f"a manifest {_text[:8]!r} of {len(_text)} characters",
        3,
        ("manifest.json", *_words),
        replaced("manifest.json", _text.encode("latin-1"), sealed=False),
    )


def in_text(old: str, new: str, name: str = "manifest.json") -> Damage:
    """Replace the first ``old`` in a JSON file's text."""

    def damage(bundle: Path) -> None:
        text = (bundle / name).read_text()
        assert old in text
        (bundle / name).write_text(text.replace(old, new, 1))
        if name != "manifest.json":
            seal(bundle)

    return damage


for _name, _old, _new, _words in (
    ("NaN", '"crop_pct": 0.9', '"crop_pct": NaN', ("crop_pct",)),
    ("a number that no float holds", '"agreeing": 10', '"agreeing": 1' + "0" * 400, ("agreeing",)),
    ("an integer of 5000 digits", '"agreeing": 10', '"agreeing": 1' + "0" * 5000, ("not a valid manifest",)),
    ("a fraction of 400 digits", '"crop_pct": 0.9', '"crop_pct": 1e400', ("crop_pct",)),
    ("a name twice", '"name": "tiny"', '"name": "a", "name": "tiny"', ("'name'", "twice")),
    ("a name twice further in", '"crop_pct": 0.9', '"crop_pct": 0.8, "crop_pct": 0.9', ("'crop_pct'", "twice")),
    ("true for the version", '"schema_version": 1', '"schema_version": true', ("schema_version",)),
    ("1.0 for the version", '"schema_version": 1', '"schema_version": 1.0', ("schema_version",)),
    ("true for a count", '"images": 10', '"images": true', ("images",)),
    ("text for a number", '"crop_pct": 0.9', '"crop_pct": "0.9"', ("crop_pct",)),
):
    add(f"{_name} in the manifest", 3, ("manifest.json", *_words), in_text(_old, _new))
add("a name twice in the plan", 3, ("plan.json", "twice"), in_text('"mode"', '"mode": "stale", "mode"', "plan.json"))
add("a name twice in the report", 3, ("parity.json", "twice"), in_text('"gate"', '"gate": 1, "gate"', "parity.json"))
add("true for a MAC in the plan", 3, ("plan.json", "head_macs"), in_plan(lambda p: p["geometry"].update(head_macs=True)))

MANIFEST: tuple[tuple[str, Change, str], ...] = (
    ("another version", lambda m: m.update(schema_version=2), "schema_version"),
    ("an unknown field", lambda m: m.update(colour="red"), "colour"),
    ("a reduction that does not follow", lambda m: m["macs"].update(reduction=0.9), "reduction"),
    ("a drop without its counts", lambda m: m["rungs"][1].update(top1_drop=0.1), "top1_drop"),
    ("an engine said to have passed", lambda m: m["engine"].update(status="passed"), "its rung says otherwise"),
    ("no graph that runs", lambda m: [one.update(max_error=None) for one in m["onnx"]], "nothing could be checked"),
    ("a bfloat16 graph that runs", lambda m: m["onnx"][1].update(dtype="bfloat16"), "bfloat16"),
    ("a file listed twice", lambda m: m["files"].append(m["files"][0]), "twice"),
    ("a file not listed", lambda m: m["files"].pop(4), "lacks"),
    ("a graph not recorded", lambda m: m["onnx"].pop(1), "model-fp16.onnx"),
    ("a graph recorded twice", lambda m: m["onnx"].append(m["onnx"][0]), "twice"),
    ("a label too few", lambda m: m["labels"].pop(), "labels"),
    ("another size of images", lambda m: m["inputs"][0].update(shape=["batch", 3, 9, 9]), "input_size"),
    ("text for a size", lambda m: m["files"][0].update(size="1"), "size"),
    ("images of any size", lambda m: m["preprocessing"].update(crop_pct=1e-9, rule=None), "more than 67108864 pixels"),
    ("images of endless size", lambda m: m["preprocessing"].update(crop_pct=5e-324, rule=None), "more than 67108864 pixels"),
    ("a layout that no plan has", lambda m: m["macs"].update(layout="loose"), "'split' or 'packed'"),
    ("a rule that is another", lambda m: m["preprocessing"]["rule"].update(colours="L"), "rule: is not the one"),
    ("a rule that stretches", lambda m: m["preprocessing"]["rule"]["resize"].update(side="both"), "rule: is not the one"),
    ("pictures without a rule", lambda m: m["preprocessing"].update(rule=None), "no preprocessing.rule"),
    ("a picture that is not there", lambda m: m["golden_images"][0].update(path="golden/9.png"), "lacks golden/9.png"),
    ("a picture of two rows", lambda m: m["golden_images"][0].update(path="golden/1.png"), "a path or a row is listed twice"),
    ("two pictures of a row", lambda m: m["golden_images"][0].update(row=1), "a path or a row is listed twice"),
    ("a picture out of the bundle", lambda m: m["golden_images"][0].update(path="../0.png"), "plain relative path"),
    ("a graph out of the bundle", lambda m: m["onnx"][0].update(path="/etc/passwd"), "plain relative path"),
    ("an engine out of the bundle", lambda m: m["engine"].update(files=["../x.engine"]), "plain relative path"),
    ("two inputs", lambda m: m["inputs"].append(m["inputs"][0]), "inputs"),
    ("a free number of classes", lambda m: m["outputs"][0].update(shape=["batch", "batch"]), "labels"),
    ("a stage named by control characters", lambda m: m["onnx"][0].update(stage="\x1b[2J"), "onnx.0.stage"),
)
for _name, _change, _word in MANIFEST:
    add(f"a manifest with {_name}", 3, ("manifest.json", _word), in_manifest(_change))


def no_nesting(plan: dict[str, Any]) -> None:
    plan["kept"][1] = [0, 3, 4]
    plan["kept"][0] = [0, 1, 2, 3]


PLAN: tuple[tuple[str, Change, str], ...] = (
    ("without a mode", lambda p: p.pop("mode"), "mode: Field required"),
    ("with an unknown field", lambda p: p.update(colour="red"), "colour: Extra inputs"),
    ("of unsorted tokens", lambda p: p["kept"].__setitem__(1, [0, 3, 2]), "kept[1]: indices must be sorted and unique"),
    ("that drops what the head reads", lambda p: p["kept"].__setitem__(2, [1]), "kept[2]: lacks a token that the head reads"),
    ("that is not nested", no_nesting, "kept[1]: not nested in kept[0]"),
    ("of another grid", lambda p: p.update(grid=[2, 3]), "is not 1 prefix tokens + a 2 x 3 grid"),
    ("with text for a width", lambda p: p["geometry"].update(embed_dim="8"), "geometry.embed_dim"),
    ("with NaN", lambda p: p["origin"].update(value=float("nan")), "origin.value"),
)
for _name, _change, _word in PLAN:
    add(f"a plan {_name}", 3, ("plan.json", "not a valid plan", _word), in_plan(_change))
add("a plan of lists too deep", 3, ("plan.json", "not a valid plan", "Invalid JSON"), replaced("plan.json", b"[" * 100_000))
OTHER_PLANS: tuple[tuple[str, Change, str], ...] = (
    ("model", lambda p: p.update(model="another"), "model of the plan: another"),
    ("head", lambda p: p["geometry"].update(head_macs=49), "macs.dense of the plan"),
    ("width", lambda p: p["geometry"].update(packed_qkv=False, embed_dim=9), "macs.dense of the plan"),
    ("merging, which costs MACs", lambda p: p.update(merged_into=[-1, 2, -1, -1, 3]), "macs.slim of the plan"),
)
for _name, _change, _word in OTHER_PLANS:
    add(f"a valid plan of another {_name}", 3, ("plan.json", _word), in_plan(_change))


@attack(3, "plan.json", "tokens per block")
def a_plan_of_fewer_blocks(bundle: Path) -> None:
    edit(bundle / "plan.json", lambda plan: plan["kept"].pop())
    seal(bundle)


@attack(3, "plan.json", "plan_digest")
def a_plan_that_is_not_the_one_named(bundle: Path) -> None:
    seal(bundle, lambda record: record.update(plan_digest="0" * 64))


@attack(3, "parity.json", "engine")
def records_that_disagree(bundle: Path) -> None:
    edit(bundle / "parity.json", lambda record: record["engine"].update(precision="int8"))
    seal(bundle)


@attack(5, "parity.json", "onnx-slim")
def a_build_that_failed_its_gate(bundle: Path) -> None:
    in_both(lambda record: record["rungs"][2].update(status="failed"))(bundle)
    edit(bundle / "parity.json", lambda record: record.update(passed=False))
    seal(bundle)


def slim(**fields: Any) -> Change:
    """Change the rung of the slim model."""
    return lambda record: record["rungs"][1].update(fields)


#: One image of ten was lost, and the status says that this passed a gate of 0.2 points.
LOSSY = {"lost": 1, "top1": 90.0, "top1_drop": 10.0, "agreeing": 9, "agreement": 90.0, "drop_interval": None}
add(
    "figures that fail their own gate",
    5,
    ("the build did not pass its gate of 0.2 points: pytorch-slim",),
    in_both(slim(**LOSSY)),
)
for _fields in ({"non_finite": 3}, {"max_error": 0.5}, {"max_error": None, "mean_error": None}):
    _damage = in_both(lambda record, fields=_fields: record["rungs"][2].update(fields))  # type: ignore[misc]
    add(f"figures {_fields} said to have passed", 5, ("did not pass its gate of 0.2 points: onnx-slim",), _damage)

FIGURES: tuple[tuple[str, Change, str], ...] = (
    ("another interval", slim(drop_interval=[-0.1, 0.1]), "drop_interval: [-0.1, 0.1] is not [-16."),
    ("another top-1", slim(top1=90.0), "do not lead from top1 100.0 to 90.0"),
    ("a top-1 between two images", slim(top1=99.0), "99.0 % is no whole number of 10 images"),
    ("a top-5 below top-1", slim(top5=90.0), "top1: 100.0 is more than top5, 90.0"),
    ("more images than there are", slim(lost=1, gained=1), "agreeing, lost, gained: 10 + 1 + 1 are more than 10"),
    ("no counts", slim(lost=None, gained=None, top1_drop=None, drop_interval=None), "lacks lost and gained"),
    ("no agreement", slim(agreeing=None, agreement=None), "lacks agreeing"),
    ("a later stage to compare with", slim(compared_to="engine"), "'engine' is no earlier stage"),
    ("a status that hides", slim(status="not executed"), "its status is 'not executed', and by its figures 'passed'"),
    ("no tolerance", lambda record: record["rungs"][2].update(tolerance=None), "lacks a tolerance"),
    (
        "an endless tolerance",
        lambda record: record["rungs"][2].update(tolerance=1e30),
        "tolerance: 1e+30 is more than an export allows",
    ),
    ("another number of images", lambda r: r["evaluation"].update(images=2000), "10 images, and evaluation names 2000"),
    ("images without number", lambda r: r["evaluation"].update(images=1 << 31), "evaluation.images"),
    ("a smaller error", slim(max_error=1e-9), "max_error: 1e-09, and golden.npz alone shows 1e-05"),
    ("less agreement", slim(agreeing=9, agreement=90.0), "agreeing: 9 of 10 images, and golden.npz alone"),
)
for _name, _change, _word in FIGURES:
    add(f"figures with {_name}", 3, (_word,), in_both(_change))

GRANTS: tuple[tuple[int, dict[str, float], str], ...] = (
    (0, {"max_error": 1e30}, "max_error: 1e+30 is more than an export allows"),
    (0, {"max_error": 0.05}, "max_error: 0.05 is more than an export allows"),
    (0, {"min_agreement": 0.0}, "min_agreement: 0 is less than an export asks for, 100"),
    (1, {"max_error": 0.3}, "model-fp16.onnx: max_error: 0.3 is more"),
    (1, {"min_agreement": 89.0}, "model-fp16.onnx: min_agreement: 89 is less"),
)
for _index, _grant, _word in GRANTS:
    _damage = in_manifest(lambda record, at=_index, fields=_grant: record["onnx"][at].update(fields))  # type: ignore[misc]
    add(f"a manifest that grants itself {json.dumps(_grant)}", 3, (_word,), _damage)


@attack(0)
def names_that_are_control_characters_and_markup(bundle: Path) -> None:
    """All of it is a right bundle, whose words must not reach a terminal as they are, nor be taken for rich's markup."""
    odd = "\x1b[2J\x07\u202e[/]\n[bold red]"
    change = in_both(lambda record: [record["evaluation"].update(data=odd), record["rungs"][3].update(note=odd)])
    change(bundle)
    in_manifest(lambda record: record.update(name=odd, labels=[odd * n for n in range(1, 7)], tools={odd: odd}))(bundle)


def in_report(change: Change) -> Damage:
    """Change the parity report alone and seal it."""

    def damage(bundle: Path) -> None:
        edit(bundle / "parity.json", change)
        seal(bundle)

    return damage


COMPARISONS: tuple[tuple[str, Change, str], ...] = (
    (
        "a candidate that never ran",
        lambda c: c["candidate"].update(stage="engine"),
        "engine with 10 images is no",
    ),
    ("fewer images", lambda c: c.update(images=9), "with 9 images is no stage that ran"),
    ("a better top-1", lambda c: c["candidate"].update(top1=90.0), "its top1 and top5 are not those of its rung"),
    ("another original", lambda c: c["original"].update(stage="onnx-slim"), "onnx-slim is not the original, pytorch"),
    ("a p-value that is none", lambda c: c.update(mcnemar=2.0), "comparison.mcnemar"),
    ("a p-value of its own", lambda c: c.update(mcnemar=0.5), "is not what 0 lost and 0 gained give"),
    (
        "a class that changed",
        lambda c: c["classes"].append({"label": 0, "images": 3, "original": 3, "candidate": 1}),
        "their changes do not add up",
    ),
    ("a worst image of endless divergence", lambda c: c.update(divergence=float("inf")), "comparison.divergence"),
)
for _name, _change, _word in COMPARISONS:
    add(f"a comparison with {_name}", 3, ("parity.json", _word), in_report(lambda r, change=_change: change(r["comparison"])))
add(
    "answers that may depend on their batch as they like",
    3,
    ("rungs: onnx-slim: batches: tolerance: 1e+30",),
    in_both(lambda r: r["rungs"][2]["batches"].update(tolerance=1e30)),
)
add(
    "answers that depend on their batch",
    5,
    ("did not pass its gate", "onnx-slim"),
    in_both(lambda r: r["rungs"][2]["batches"].update(max_error=1.0)),
)
add(
    "a gate of confidence that ten images cannot give",
    5,
    ("did not pass its gate", "pytorch-slim, onnx-slim"),
    in_report(lambda r: r["gate"].update(rule="confidence")),
)
add("a rule of the gate that is none", 3, ("parity.json", "gate.rule"), in_report(lambda r: r["gate"].update(rule="hope")))
add(
    "SHA256SUMS of something else",
    3,
    ("SHA256SUMS", "is not the digests"),
    replaced("SHA256SUMS", b"0" * 64 + b"  model.onnx\n"),
)
add("SHA256SUMS without an end", 3, ("SHA256SUMS", "bytes allowed"), replaced("SHA256SUMS", b"0" * (1 << 20)))
add("a latency sheet that is none", 3, ("latency.json", "Field required"), replaced("latency.json", b"{}"))
add(
    "a latency sheet of a later version",
    3,
    ("latency.json", "schema_version"),
    replaced("latency.json", b'{"schema_version": 2}'),
)
