"""Draw docs/pipeline.svg, the picture of the whole in the README: ``python docs/make_pipeline.py``."""

from __future__ import annotations

from html import escape
from pathlib import Path

FILE = Path(__file__).with_name("pipeline.svg")
WIDTH, HEIGHT = 1000, 318
STAGES = (  # heading, two lines, the command that does this part alone, colours of fill and edge
    ("Your model", "timm ViT: weights", "and some images", "", "#f3f4f6", "#6b7280"),
    ("Plan", "which patches each", "block can do without", "slimming.run", "#e0ecff", "#2563eb"),
    ("Slim ONNX", "those tokens cut out:", "fixed shapes, plain ops", "graph_passes.run", "#e3f6e8", "#15803d"),
    ("Engine", "ONNX Runtime or", "TensorRT-RTX", "export.run", "#fdeede", "#c2410c"),
    ("Bundle", "one folder to check", "and serve, no PyTorch", "validate.run", "#f1e8fd", "#7e22ce"),
)
RUNGS = ("PyTorch original", "PyTorch slim", "ONNX slim, FP32", "ONNX slim, FP16", "engine")


def text(x: float, y: float, words: str, size: int = 14, colour: str = "#374151", extra: str = "") -> str:
    """One line of centred text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="middle"{extra}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, edge: str) -> str:
    """A rounded box."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" stroke="{edge}"/>'


def arrow(x: float, y: float, length: float) -> str:
    """An arrow to the right."""
    return f'<path d="M{x:g} {y:g} h{length - 7:g}" stroke="#6b7280" stroke-width="2" fill="none" marker-end="url(#head)"/>'


def render() -> str:
    """The text of the SVG file."""
    parts = [box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "#ffffff", "#d1d5db")]
    width, gap = 166, 29
    for index, (heading, first, second, command, fill, edge) in enumerate(STAGES):
        x = 27 + index * (width + gap)
        centre = x + width / 2
        parts.append(box(x, 26, width, 112, fill, edge))
        parts.append(text(centre, 52, heading, 17, edge, ' font-weight="bold"'))
        parts += [text(centre, 77, first), text(centre, 96, second)]
        if command:
            parts.append(text(centre, 124, command, 12, edge, ' font-family="monospace"'))
        if index:
            parts.append(arrow(x - gap + 3, 82, gap - 5))
    parts.append(
        text(
            WIDTH / 2,
            178,
            "The same held-out images go through every stage, so each loss is laid at the stage that caused it",
            15,
        )
    )
    for index, rung in enumerate(RUNGS):
        x = 27 + index * (width + gap)
        parts += [box(x, 196, width, 40, "#ffffff", "#9ca3af"), text(x + width / 2, 221, rung)]
        if index:
            parts.append(arrow(x - gap + 3, 216, gap - 5))
    parts.append(text(WIDTH / 2, 268, "top-1 with its interval, agreement and logit error, stage by stage", 15))
    parts.append(
        text(WIDTH / 2, 294, "more loss than you allow: exit code 5, and no bundle", 15, "#b91c1c", ' font-weight="bold"')
    )
    head = '<marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
    head += '<path d="M0 0 L8 4 L0 8 z" fill="#6b7280"/></marker>'
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif" '
    )
    title = "Model, plan, slim ONNX, engine and bundle; each stage is compared with the one before"
    return "\n".join([f'{opening}role="img">', f"<title>{title}</title>", f"<defs>{head}</defs>", *parts, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
