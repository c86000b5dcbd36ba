"""Mutations of valid files, drawn from one ``Random``: of bytes, and of the structure that a format's own parser accepts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from google.protobuf.message import Message  # type: ignore[import-untyped,unused-ignore]

_TEXTS = (
    "",
    "\0",
    "..",
    "../x",
    "/etc/passwd",
    "a" * 5000,
    "\x1b[31m",
    "\ud800",
    "é" * 99,
    "NaN",
    "1",
    "-1",
    "null",
    "%s",
    "\\",
    "C:\\x",
)
_NUMBERS = (0, 1, -1, 2, 3, 7, 127, 255, 256, 65535, 2**24, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, -(2**63), 2**64)
#: Text that ``json.dumps`` would not write, put in place of a value.
_RAW = (
    "1" + "0" * 400,
    "-1" + "0" * 5000,
    "1e999",
    "-1e-999",
    "NaN",
    "-Infinity",
    "1.0",
    "01",
    "1" * 20_000,
    "true",
    "null",
    '"\\ud800"',
    '"\\u0000"',
    "[" * 150 + "]" * 150,
    "[" * 5000 + "]" * 5000,
    "[" * 100_000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '{"a":1,"a":2}',
    "[" + "0," * 3000 + "0]",
    "",
    ",",
    "'x'",
    "0x10",
)
_MARK = "@raw "


def mutate_bytes(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """``data`` with one to six faults: flipped bits, numbers, cuts, repeats, insertions, a splice with one of ``others``."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        size = len(changed)
        at, run = rng.randrange(size + 1), rng.choice((1, 2, 4, 8, 16, 64, 512))
        kind = rng.randrange(9)
        if kind == 0 and at < size:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < size:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(_NUMBERS) % (1 << 8 * width)
            changed[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 3:
            del changed[at:]
        elif kind == 4:
            del changed[at : at + run]
        elif kind == 5:
            changed[at:at] = changed[at : at + run] * rng.choice((1, 1, 2, 50))
        elif kind == 6:
            changed[at:at] = rng.randbytes(run)
        elif kind == 7 and others:
            other = rng.choice(others)
            changed[at:] = other[rng.randrange(len(other) + 1) :]
        else:
            changed[at : at + run] = bytes(run) if rng.random() < 0.5 else b"\xff" * run
    return bytes(changed)


def mutate_json(rng: Random, text: str) -> bytes:
    """A JSON text with one to three of its values, names or brackets changed; now and then its bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, text.encode())
    holder: list[Any] = [json.loads(text)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, holder)
    changed = json.dumps(holder[0])
    for number, raw in enumerate(_RAW):
        changed = changed.replace(f'"{_MARK}{number}"', raw)
    if rng.random() < 0.05 and changed.startswith("{"):  # the whole object's names twice
        changed = changed[:-1] + "," + changed[1:]
    return changed.encode("utf-8", "surrogatepass")


def _change(rng: Random, holder: list[Any]) -> None:
    place: Any = holder
    while True:  # walk down, and stop somewhere on the way
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        value = place[key]
        if not (isinstance(value, (dict, list)) and value) or rng.random() < 0.15:
            break
        place = value
    kind = rng.randrange(8)
    if kind == 0:
        del place[key]
        if place is holder:
            holder.append(rng.choice((None, [], {}, 0, "")))
    elif kind == 1:
        place[key] = f"{_MARK}{rng.randrange(len(_RAW))}"
    elif kind == 2:
        place[key] = rng.choice((None, True, False, [], {}, "", 0, 1.5, [value], {"": value}))
    elif kind == 3 and isinstance(value, (int, float)):
        whole = float(value) if abs(value) < 10**300 else 0
        place[key] = rng.choice((value + 1, value - 1, -value, value * 10**9, whole, str(value)))
    elif kind == 4:
        place[key] = rng.choice(_NUMBERS)
    elif kind == 5:
        place[key] = rng.choice(_TEXTS)
    elif kind == 6 and isinstance(place, dict):
        name = rng.choice((*_TEXTS, "schema_version", str(key) + " "))
        place[name] = value
        if rng.random() < 0.5:
            del place[key]
    elif isinstance(value, list) and value:
        rng.choice((value.reverse, value.clear, lambda: value.extend(value[:3] * rng.choice((1, 1000)))))()
    elif isinstance(value, str):
        place[key] = mutate_bytes(rng, value.encode("utf-8", "replace")).decode("utf-8", "replace")
    else:
        place[key] = {"a": [value, value]}


def mutate_message(rng: Random, message: Message) -> None:
    """Change one to three fields somewhere in a protobuf message: numbers, names, bytes, entries left out or twice."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_message(rng, message)


def _change_message(rng: Random, message: Message) -> None:
    while True:
        present = message.ListFields()
        inner = [field for field, _ in present if field.type == field.TYPE_MESSAGE]
        if not inner or rng.random() < 0.25:
            break
        value = getattr(message, rng.choice(inner).name)
        message = (value[rng.randrange(len(value))]) if hasattr(value, "add") else value
    known = not present or rng.random() < 0.15
    field = rng.choice(message.DESCRIPTOR.fields) if known else rng.choice(present)[0]
    repeated = hasattr(getattr(message, field.name), "extend")
    if rng.random() < 0.12:
        message.ClearField(field.name)
        return
    if field.type == field.TYPE_MESSAGE:
        value = getattr(message, field.name)
        if not repeated:
            value.SetInParent()
        elif len(value):
            at = rng.randrange(len(value))
            rng.choice((lambda: value.add().CopyFrom(value[at]), lambda: value.pop(at), value.add))()
        else:
            value.add()
        return
    drawn = _scalar(rng, field)
    try:
        if not repeated:
            setattr(message, field.name, drawn)
        elif (values := getattr(message, field.name)) and rng.random() < 0.7:
            values[rng.randrange(len(values))] = drawn
        else:
            values.append(drawn)
    except (ValueError, TypeError):  # out of the field's range, or an enum without that number
        message.ClearField(field.name)


def _scalar(rng: Random, field: Any) -> Any:
    if field.type == field.TYPE_STRING:
        text = rng.choice((*_TEXTS, "Conv", "Loop", "images", "logits", "wq0", "head", "", "0", "batch", "ai.onnx"))
        return text if text.isprintable() or text == "\0" else "?"
    if field.type == field.TYPE_BYTES:
        return rng.choice((b"", b"\xff", rng.randbytes(rng.randrange(40)), bytes(1100)))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    if field.type == field.TYPE_INT32 or field.type == field.TYPE_ENUM:
        return rng.choice((*range(26), -1, 127, 2**31 - 1, -(2**31)))
    return rng.choice([number for number in _NUMBERS if -(2**63) <= number < 2**63])
