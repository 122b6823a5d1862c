"""A page of text, tables and pictures, written as Markdown and as one HTML file that needs no other."""

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

from elmo_jax.errors import InputError

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1rem 4rem; color: #1b1f24; background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-bottom: .25rem; border-bottom: 2px solid #0072B2; }
p { max-width: 44rem; }
.table { overflow-x: auto; margin: 1rem 0; border: 1px solid #d8dee4; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: inherit; }
thead tr { background: #eaf3f9; }
tbody tr { background: #fff; border-top: 1px solid #e6eaee; }
tbody tr:nth-child(even) { background: #f8fafb; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
.figures:has(> :only-child) { max-width: 44rem; }
figure { margin: .5rem 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: #4b5560; font-size: .9rem; }
code { background: #f1f4f6; border-radius: 4px; padding: .1em .3em; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { font-size: 15px; padding: .5rem .75rem 3rem; }
  th, td { padding: .3rem .25rem; font-size: .72rem; white-space: normal; }
  th:first-child, td:first-child { min-width: 5.2rem; }
}
"""


class Page:
    """Blocks from top to bottom.

    Args:
        title: of the page.

    Example:
        >>> page = Page("Results")
        >>> page.table(["method", "accuracy"], [["SVD", "0.91"]])
        >>> print(page.markdown(Path(".")))
        # Results
        <BLANKLINE>
        | method | accuracy |
        | --- | ---: |
        | SVD | 0.91 |
        <BLANKLINE>
    """

    def __init__(self, title: str):
        self.title = title
        self._blocks: list[tuple[str, object]] = []

    def heading(self, text: str) -> None:
        """A section begins."""
        self._blocks.append(("heading", text))

    def text(self, text: str) -> None:
        """A paragraph; what stands between backticks is code."""
        self._blocks.append(("text", text))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column names the rows."""
        self._blocks.append(("table", [list(head), *map(list, rows)]))

    def figures(self, *drawn: tuple[Path, str, str]) -> None:
        """PNG files side by side, each with what kind of picture it is, and the sentence under it."""
        self._blocks.append(("figures", drawn))

    def write(self, path: Path) -> None:
        """Write ``path.md``, which links to the pictures, and ``path.html``, which holds them."""
        try:
            path.with_suffix(".md").write_text(self.markdown(path.parent), encoding="utf-8")
            path.with_suffix(".html").write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}.html: cannot be written ({error.strerror}); see --output") from None

    def markdown(self, folder: Path) -> str:
        """The page as Markdown, for a file in that folder."""
        out = [f"# {self.title}"]
        for kind, block in self._blocks:
            if kind == "heading":
                out.append(f"## {block}")
            elif kind == "text":
                out.append(str(block))
            elif kind == "table":
                out.append(_markdown_table(block))
            else:
                for path, kind, caption in _drawn(block):
                    target = Path(os.path.relpath(path, folder)).as_posix()
                    out.append(f"![{kind}](<{target}>)\n\n{caption}")
        return "\n\n".join(out) + "\n"

    def html(self) -> str:
        """The page as HTML, its pictures within."""
        out = []
        for kind, block in self._blocks:
            if kind == "heading":
                out.append(f"<h2>{html.escape(str(block))}</h2>")
            elif kind == "text":
                out.append(f"<p>{_inline(str(block))}</p>")
            elif kind == "table":
                out.append(_html_table(block))
            else:
                figures = "".join(_html_figure(*figure) for figure in _drawn(block))
                out.append(f'<div class="figures">{figures}</div>')
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
            + "\n".join(out)
            + "\n</body>\n</html>\n"
        )


def _drawn(block: object) -> Sequence[tuple[Path, str, str]]:
    return block  # pyright: ignore[reportReturnType]


def _inline(text: str) -> str:
    """Escaped text, with code between backticks."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _markdown_table(block) -> str:
    head, *rows = ([str(cell).replace("|", "\\|") for cell in row] for row in block)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _html_table(block) -> str:
    head, *rows = block
    first = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="table"><table><thead><tr>{first}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _html_figure(path: Path, kind: str, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    alt, said = html.escape(kind), html.escape(caption)
    return f'<figure><img src="{source}" alt="{alt}"><figcaption>{said}</figcaption></figure>'
