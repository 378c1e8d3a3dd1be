"""Pages and cards from the templates in `templates/`: one engine, one style sheet.

All that an HTML page shows is escaped, because names and commands come from files; what is HTML already (a drawn
figure) says so as `markupsafe.Markup`. A value that a template names but that is not given is an error.
"""

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

# How huggingface_hub's cards put metadata and body together.
CARD = "---\n{{ card_data }}\n---\n\n{{ body }}"


def render(template: str, **values: Any) -> str:
    """The text of `templates/{template}` with these values."""
    return _ENVIRONMENT.get_template(template).render(values)


def markdown_line(text: object) -> str:
    """Text that stays in its line and in its cell of a Markdown table, and is no HTML, link, picture or code."""
    return re.sub(r"([\\|\[\]`])", r"\\\1", " ".join(str(text).split())).replace("<", "&lt;")


_ENVIRONMENT = Environment(
    loader=PackageLoader("vla0_trl"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["line"] = markdown_line
