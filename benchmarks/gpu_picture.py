# SPDX-License-Identifier: Apache-2.0
"""The SVG that `gpu.py` leaves: a bar a contestant, model by model."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape


def drawn(results: dict[str, Any]) -> str:
    """Bars: the milliseconds of every contestant, model by model."""
    y, lines = 30, []
    for model, found in results.items():
        times = found.get("milliseconds", {})
        if not times:
            continue
        y += 26
        lines.append(f'<text x="10" y="{y}" font-weight="bold">{escape(model)}</text>')
        longest = max(times.values())
        for name, ms in times.items():
            y += 18
            width = 400.0 * ms / longest
            colour = "#1f77b4" if name.startswith("pyupdate") else "#aaaaaa"
            rate = f"{ms:.3f} ms, {found['GB/s of those bytes'][name]:,.0f} GB/s"
            lines.append(f'<text x="10" y="{y}">{escape(name)}</text>')
            lines.append(
                f'<rect x="150" y="{y - 11}" width="{width:.1f}" height="13" fill="{colour}"/>'
            )
            lines.append(f'<text x="{156 + width:.1f}" y="{y}">{rate}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{y + 20}" '
        'font-family="sans-serif" font-size="12">'
    )
    title = "A step of AdamW, float32: median, and the bytes of ours by it"
    top = ['<rect width="100%" height="100%" fill="white"/>']
    top.append(f'<text x="10" y="20" font-size="15">{title}</text>')
    return "\n".join([head, *top, *lines, "</svg>"]) + "\n"
