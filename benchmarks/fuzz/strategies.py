"""Records drawn by Hypothesis from their JSON Schema: a valid record of which some fields have other values of the right type.

Mutations of a file's text seldom reach a rule that ties fields together; these seldom reach anything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import BaseModel

#: Bytes that a record is drawn from.
_BUFFERS = (256, 1024, 4096, 1 << 14)
_MOST_ITEMS = 5
_EDGES = (-(2**63), -1, 0, 1, 2, 5, 8, 255, 10**6, 2**31, 2**53 + 1, 2**63, 2**64)
_REAL_EDGES = (-1e300, -1.0, 0.0, 1e-300, 0.5, 1.0, 100.0, 1e300)
_TEXT = st.text(max_size=12) | st.sampled_from(("model.onnx", "plan.json", "images", "0" * 64, "../x", "cpu", "fp32"))
_LEFT = 6  # of so many fields and one, all but one keep their value
_NOTHING = object()


def drawn_records(kind: type[BaseModel], valid: dict[str, Any]) -> Callable[[Random], str]:
    """Return what draws the JSON of a ``kind`` by its schema, most of its fields as in ``valid``."""
    schema = kind.model_json_schema()
    strategy = _values(schema, schema.get("$defs", {}), valid)
    drawn: list[Any] = []

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def keep(record: Any) -> None:
        drawn.append(record)

    draw: Callable[[bytes], bytes | None] = keep.hypothesis.fuzz_one_input  # type: ignore[attr-defined]

    def record(rng: Random) -> str:
        drawn.clear()
        for size in _BUFFERS[rng.randrange(len(_BUFFERS)) :]:  # one that is too short for what it begins draws nothing
            draw(rng.randbytes(size))
            if drawn:
                break
        return json.dumps(drawn[-1] if drawn else {})

    return record


def _values(schema: dict[str, Any], known: dict[str, Any], there: Any = _NOTHING) -> SearchStrategy[Any]:
    """The JSON values that a schema of pydantic's allows, but for rules that it cannot say; in an object, mostly ``there``."""
    if "$ref" in schema:
        return _values(known[schema["$ref"].rpartition("/")[2]], known, there)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([_values(each, known, there) for each in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "object":
        return _object(schema, known, there if isinstance(there, dict) else {})
    if kind == "array":
        return _array(schema, known, there if isinstance(there, list) else [])
    if kind == "string":
        return st.from_regex(schema["pattern"], fullmatch=True) if "pattern" in schema else _TEXT
    if kind in ("integer", "number"):
        return _numbers(schema, whole=kind == "integer")
    return {"boolean": st.booleans(), "null": st.none()}.get(str(kind), st.none() | st.booleans() | _TEXT)


def _object(schema: dict[str, Any], known: dict[str, Any], there: dict[str, Any]) -> SearchStrategy[Any]:
    properties = {
        name: _mostly(there.get(name, _NOTHING), _values(each, known, there.get(name, _NOTHING)))
        for name, each in schema.get("properties", {}).items()
    }
    if not properties:
        more = schema.get("additionalProperties")
        return st.dictionaries(_TEXT, _values(more if isinstance(more, dict) else {}, known), max_size=_MOST_ITEMS)
    needed = {*schema.get("required", ()), *there}
    return st.fixed_dictionaries(
        {name: each for name, each in properties.items() if name in needed},
        optional={name: each for name, each in properties.items() if name not in needed},
    )


def _array(schema: dict[str, Any], known: dict[str, Any], there: list[Any]) -> SearchStrategy[Any]:
    if "prefixItems" in schema:
        return st.tuples(*(_values(each, known) for each in schema["prefixItems"])).map(list)
    least, most = schema.get("minItems", 0), schema.get("maxItems", _MOST_ITEMS)
    items = schema.get("items", {})
    drawn = st.lists(_values(items, known), min_size=least, max_size=max(least, min(most, _MOST_ITEMS)))
    if not there:
        return drawn
    changed = [_mostly(value, _values(items, known, value)) for value in there[:_MOST_ITEMS]]  # one by one, and in its order
    return drawn | st.tuples(*changed).map(list) | st.permutations(there[:_MOST_ITEMS])


def _numbers(schema: dict[str, Any], *, whole: bool) -> SearchStrategy[Any]:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -math.inf))
    high = schema.get("maximum", schema.get("exclusiveMaximum", math.inf))
    edges = [value for value in (*_EDGES, *(() if whole else _REAL_EDGES)) if low <= value <= high]
    if whole:
        return st.sampled_from(edges) | st.integers(max(-2, low), min(max(9, low), high))
    return st.sampled_from(edges) | st.floats(max(low, -1e9), min(high, 1e9))


def _mostly(value: Any, drawn: SearchStrategy[Any]) -> SearchStrategy[Any]:
    if value is _NOTHING:
        return drawn
    return st.integers(0, _LEFT).flatmap(lambda which: drawn if which == _LEFT else st.just(value))
