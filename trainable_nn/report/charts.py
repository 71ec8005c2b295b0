"""A figure of matplotlib as an SVG that stands inside a page: its colours follow the page, and it says in words what it shows."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

from ..plotting import STYLES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.7, 3.3)  # inches: about as wide as a phone, so that its text is as large there as it says
COLOURS = {
    **{style["color"].lower(): f"var(--series-{index + 1})" for index, style in enumerate(STYLES)},
    "#000000": "var(--ink)",
    "#ffffff": "var(--card)",
    "#b0b0b0": "var(--line)",
    "#cccccc": "var(--line)",
}
FONT = "font-family: 'DejaVu Sans', Verdana, sans-serif"  # about as wide as what the figure was laid out for
NOT_FOR_A_PAGE = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", re.DOTALL)


def chart(name: str, draw: Callable[[Axes], None], *, title: str, description: str) -> str:
    """The SVG of what ``draw`` puts on a pair of axes; ``name`` makes its ids unique on the page."""
    import matplotlib

    figure = new_figure(*SIZE)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    draw(axes)
    axes.set_title("")  # the page has it above, in its own type
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return _for_page(name, written.getvalue(), title, description)


def _for_page(name: str, svg: str, title: str, description: str) -> str:
    svg = NOT_FOR_A_PAGE.sub("", svg).strip()
    svg = re.sub(r'\sid="([^"]*)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # a page of HTML needs none
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: COLOURS.get(found.group(), found.group()), svg)
    svg = re.sub(r'font-family: [^;"]*', FONT, svg)
    box = re.search(r'viewBox="([^"]*)"', svg).group(1)
    head = (
        f'<svg viewBox="{box}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return re.sub(r"<svg\b[^>]*>", lambda found: head, svg, count=1)
