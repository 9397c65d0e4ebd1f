"""The page of a report: one HTML file without scripts, into which nothing is loaded."""
from dataclasses import dataclass
from typing import Any

import numpy as np

from timm_multilabel.reports.embedding_map import Coloring
from timm_multilabel.reports.head_section import HeadSection
from timm_multilabel.reports.templates import render_template

_GREY = '#e4e4e4'  # lighter than a class that is called gray


@dataclass(frozen=True)
class Map:
    """Images on a plane.

    Args:
        places: Where (P, 2), from 0 to 1.
        titles: What each is (P,).
        colorings: By head; a single one named '' where there are no heads.
        count: Images of the split.
    """
    places: np.ndarray
    titles: list[str]
    colorings: dict[str, Coloring]
    count: int


@dataclass(frozen=True)
class Page:
    """What a report says. Texts are plain: whatever they hold is escaped here.

    Args:
        title: The run.
        facts: Pairs of what and how much, below the title.
        notes: What is worth knowing of this report, such as images that are not there.
        command: The command line that means this run.
        command_note: What it is.
        settings: args.yaml.
        recipe: The run has phases, which only `settings` tells.
        curves: Their picture.
        mean: The row of the mean over heads, as those of `HeadSection.metrics`, or None.
        heads: The heads.
        map: The map, or why there is none.
        views: Photos, each a list of pictures of its views, or why there are none.
        views_note: What they are.
    """
    title: str
    facts: list[tuple[str, str]]
    notes: list[str]
    command: str
    command_note: str
    settings: str
    recipe: bool
    curves: str
    mean: tuple[str, str, str, str] | None
    heads: list[HeadSection]
    map: Map | str
    views: list[list[str]] | str
    views_note: str


def render(page: Page) -> str:
    """The page as HTML."""
    drawn = _draw_map(page.map) if isinstance(page.map, Map) else None
    return render_template('report.html', page=page, map=drawn)


def _draw_map(found: Map) -> dict[str, Any]:
    """Circles with a class for each head's color, and the style and legend of each head."""
    circles = []
    for point, (x, y) in enumerate(found.places.tolist()):
        classes = ' '.join(
            f'h{head}c{coloring.of_point[point]}' for head, coloring in enumerate(found.colorings.values())
            if coloring.of_point[point] >= 0)
        circles.append({
            'x': f'{10 + 780 * x:.1f}', 'y': f'{590 - 580 * y:.1f}', 'classes': classes,
            'title': found.titles[point]})
    heads = []
    for head, (name, coloring) in enumerate(found.colorings.items()):
        legend = list(zip(coloring.colors, coloring.names, strict=True))
        styles = [(f'h{head}c{color}', value) for color, value in enumerate(coloring.colors)]
        heads.append({
            'name': name, 'number': head, 'styles': styles,
            'legend': legend + ([(_GREY, coloring.rest)] if coloring.rest else [])})
    return {'circles': circles, 'heads': heads, 'grey': _GREY, 'shown': len(circles), 'count': found.count}
