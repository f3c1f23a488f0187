"""Hooks of mkdocs.yml: pages that stand outside of docs/, the reference, and links into the repository.

The reference is made from the tables of contents in fp4jax/__init__.py and fp4jax/data/__init__.py, which import
nothing; a page of it without an entry is an error. A link from a page to a
file of the repository becomes a copy of that file in the site, so the site can be read without the repository; a link
to a file that is not there is an error.
"""

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

import fp4jax  # noqa: E402  its table of contents alone: nothing is loaded
import fp4jax.data  # noqa: E402  likewise

# Page of the site ← file of the repository.
OUTSIDE = {"results.md": "RESULTS.md", "contributing.md": "CONTRIBUTING.md"}
SPECIAL = {ROOT / "README.md": "index.md", **{ROOT / source: page for page, source in OUTSIDE.items()}}
COPIES = "repository"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Completes the navigation: reference pages, then what docs/ holds and mkdocs.yml does not list."""
    listed = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    rest = sorted(path.name for path in DOCS.glob("*.md") if path.name not in listed)
    reference = next(section["Reference"] for section in config.nav if "Reference" in section)
    reference[:0] = [{module: _page(module)} for module in _reference()]
    config.nav.append({"More": [*rest, {"Contributing": "contributing.md"}]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here and the files that pages link to."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for module, entries in _reference().items():
        files.append(File.generated(config, _page(module), content=_reference_page(module, entries)))
    sources = [*DOCS.glob("*.md"), *(ROOT / source for source in OUTSIDE.values())]
    linked = {path for source in sources for path in _linked_files(source)}
    for path in sorted(linked):
        target = f"{COPIES}/{path.relative_to(ROOT)}"
        files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Points links at pages and copies instead of at files of the repository."""
    source = ROOT / OUTSIDE[page.file.src_uri] if page.file.src_uri in OUTSIDE else DOCS / page.file.src_uri
    if not source.exists():  # a page of the reference
        return markdown

    def replace(match: re.Match) -> str:
        target = _target(source, match[2])
        return match[0] if target is None else match[1] + _uri(target) + match[3]

    return LINK.sub(replace, markdown)


def on_page_content(html: str, page, config: MkDocsConfig, files: Files) -> str:
    """Raises on a page of the reference that came out empty."""
    if page.file.src_uri.startswith("reference/") and "doc-heading" not in html:
        raise PluginError(f"{page.file.src_uri} has no entry: is what it documents loaded from elsewhere?")
    return html


def _reference() -> dict[str, list[str]]:
    """Module → its public names in full, in the order of its table of contents; none: all that it defines itself."""
    found = {}
    for name, module in fp4jax._DEFINED_IN.items():
        found.setdefault(module, []).append(f"{module}.{name}")
    for module in ("recipe_types", *fp4jax._MODULES):
        found.setdefault(f"fp4jax.{module}", [])
    found["fp4jax.data"] = [f"{module}.{name}" for name, module in fp4jax.data._DEFINED_IN.items()]
    return found


def _page(module: str) -> str:
    return f"reference/{module.removeprefix('fp4jax.')}.md"


def _reference_page(module: str, entries: list[str]) -> str:
    title = f"# {module}\n\n"
    if entries:
        return title + "".join(f"::: {entry}\n\n" for entry in entries)
    return title + f"::: {module}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"


def _target(source: Path, link: str) -> Path | None:
    """The file of the repository that a relative link of `source` names; None for addresses."""
    if re.match(r"\w+:|/", link):
        return None
    path = (source.parent / link).resolve()
    if not path.is_file():
        raise PluginError(f"{source.relative_to(ROOT)} links to {link}, which is not in the repository")
    return path


def _uri(path: Path) -> str:
    """Where a file of the repository is in the site."""
    if path in SPECIAL:
        return SPECIAL[path]
    return str(path.relative_to(DOCS)) if path.is_relative_to(DOCS) else f"{COPIES}/{path.relative_to(ROOT)}"


def _linked_files(source: Path) -> set[Path]:
    """Files outside of docs/ that a page links to."""
    targets = {_target(source, match[2]) for match in LINK.finditer(source.read_text(encoding="utf-8"))} - {None}
    return {path for path in targets if path not in SPECIAL and not path.is_relative_to(DOCS)}
