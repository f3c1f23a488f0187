"""A page of text, tables and figures, as Markdown and as one self-contained HTML file."""

import html as html_escapes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from fp4jax.comparison.figures import svg


@dataclass(frozen=True)
class Table:
    """Cells are text; the columns after the first are numbers or words, aligned right if `numbers`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True


@dataclass(frozen=True)
class Section:
    """`figures`: names of the page's figures, after the tables."""

    title: str
    paragraphs: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[str]


@dataclass(frozen=True)
class Page:
    """`summary`: what a reader in a hurry reads."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    figures: Mapping[str, Figure]


def markdown(page: Page) -> str:
    """Figures are linked as PNG files beside it."""
    parts = [f"# {page.title}", *page.summary]
    for section in page.sections:
        parts += [f"## {section.title}", *section.paragraphs]
        parts += [_markdown_table(table) for table in section.tables]
        parts += [f"![{name.replace('_', ' ')}]({name}.png)" for name in section.figures]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rule = ["---"] + ["---:" if table.numbers else "---"] * (len(table.header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (table.header, rule, *table.rows))


def html(page: Page) -> str:
    """Reads on a phone, in the dark and on paper; loads nothing."""
    parts = [f"<h1>{_inline(page.title)}</h1>", '<div class="summary">']
    parts += [f"<p>{_inline(line)}</p>" for line in page.summary] + ["</div>"]
    for section in page.sections:
        parts += [f"<section><h2>{_inline(section.title)}</h2>"]
        parts += [f"<p>{_inline(paragraph)}</p>" for paragraph in section.paragraphs]
        parts += [_html_table(table) for table in section.tables]
        parts += [f'<figure role="img" aria-label="{name.replace("_", " ")}">{svg(page.figures[name])}</figure>'
                  for name in section.figures]  # fmt: skip
        parts.append("</section>")
    return _DOCUMENT.format(title=html_escapes.escape(page.title), style=_STYLE, body="\n".join(parts))


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    kind = "numbers" if table.numbers else "words"
    return f'<div class="table"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _inline(text: str) -> str:
    """Escaped, with `code` and **strong** as Markdown writes them."""
    text = html_escapes.escape(text).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    for mark, tag in (("`", "code"), ("**", "strong")):
        pieces = text.split(mark)
        text = "".join(f"<{tag}>{piece}</{tag}>" if i % 2 else piece for i, piece in enumerate(pieces))
    return text


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1a1a1a; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.summary { border-left: 4px solid #0072b2; padding: .1rem 1rem; background: #f3f7fa; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
.numbers th + th, .numbers td + td { text-align: right; }
td:first-child { white-space: nowrap; }
code { font-size: .9em; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; }
@media (max-width: 40rem) { .numbers td { white-space: nowrap; } }
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .table { overflow: visible; }
}
"""
