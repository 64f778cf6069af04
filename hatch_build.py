"""README.md as an index of packages shows it: links that are relative here lead to the repository there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def with_absolute_links(text: str, repository: str, tag: str) -> str:
    """Links to files as links to those of ``tag`` in ``repository``, pictures as their contents.

    >>> with_absolute_links("[a](docs/a.md#b) ![p](p.png) [c](https://c.org) [d](#d)", "https://host/us/it/", "v1")
    '[a](https://host/us/it/blob/v1/docs/a.md#b) ![p](https://host/us/it/raw/v1/p.png) [c](https://c.org) [d](#d)'
    """

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['words']}]({repository.rstrip('/')}/{kind}/{tag}/{link['file']})"

    return re.sub(r"(?P<picture>!?)\[(?P<words>[^\]]*)\]\((?!#|[a-z]+:)(?P<file>[^)\s]+)\)", absolute, text)


class CustomMetadataHook(MetadataHookInterface):
    """The ``readme`` of pyproject.toml; without a ``Repository`` in ``project.urls`` it is README.md as it stands."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        if repository:
            text = with_absolute_links(text, repository, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
