"""A hook of mkdocs: links to files of the repository lead to pages with their text, and snippets may name objects.

``[words](../examples/pinn.py)``, which works on a code host, leads on the site to a page that shows the file; pictures
are copied. ``--8<-- "examples/pinn.py:PINN.training_step"`` includes the lines of a function, method or class.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)(?=[)#])")
SNIPPET = re.compile(r'(--8<-- "[\w./]+\.py):([A-Za-z_][\w.]*)"')
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".md": "markdown"}


def lines_of(path: Path, name: str) -> str:
    """``first:last`` of the object ``name`` in a Python file, such as ``Class.method``."""
    node: Any = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        found = [one for one in node.body if getattr(one, "name", None) == part]
        if not found:
            raise PluginError(f"A page includes {name} of {path}, which has no {part}.")
        node = found[0]
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    return f"{first}:{node.end_lineno}"


def page_of(path: str, config: Any) -> File:
    """What the site shows of the file or folder ``path``: a picture as it is, all else as a page with its text."""
    file = ROOT / path
    if file.suffix in (".png", ".svg"):
        return File.generated(config, f"source/{path}", abs_src_path=str(file))
    if file.is_dir():
        text = "\n".join(f"* {one.name}" for one in sorted(file.iterdir()) if not one.name.startswith(("_", ".")))
    else:
        language = LANGUAGES.get(file.suffix, "text")
        text = f"~~~~~{language}\n{file.read_text(encoding='utf-8')}\n~~~~~"
    head = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n"
    return File.generated(config, f"source/{path}.md", content=f"{head}\n# {path}\n\n{text}\n")


def target_of(link: str, uri: str) -> str | None:
    """The file or folder of the repository that a link of the page ``uri`` leads to; None if it is one of ``docs``."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri), link))
    return None if target.startswith("docs/") else target


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file of the repository that a page has a link to."""
    for uri, text in [(file.src_uri, file.content_string) for file in files.documentation_pages()]:
        for target in {target_of(link, uri) for _, link in LINK.findall(text)} - {None}:
            if not (ROOT / target).exists():
                raise PluginError(f"{uri} has a link to {target}, which does not exist.")
            own = page_of(target, config)
            if files.get_file_from_path(own.src_uri) is None:
                files.append(own)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links that leave the folder of the pages, and names of objects in snippets."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown

    def link(match: re.Match[str]) -> str:
        target = target_of(match[2], uri)
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(page_of(target, config).src_uri, posixpath.dirname(uri) or ".")

    markdown = SNIPPET.sub(lambda m: f'{m[1]}:{lines_of(ROOT / m[1].split(chr(34))[1], m[2])}"', markdown)
    return LINK.sub(link, markdown)
