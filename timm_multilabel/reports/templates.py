"""HTML pages from the templates beside this file; whatever a value holds is escaped."""
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from timm_multilabel.escaping import shown


def render_template(name: str, **values: Any) -> str:
    """A page as HTML.

    Args:
        name: The file of the template.
        values: What it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    return environment.get_template(name).render(values)


def _shown(value: Any) -> Any:
    """What stands on the page of a value; what a macro has made is escaped already."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value
