"""An extension of griffe: examples in docstrings are code, where mkdocstrings would read ``>>>`` as a quote."""

import re
from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Puts fences around doctests."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of an object when it was read."""
        if obj.docstring is not None:
            value = re.sub(r"^>>> .*(?:\n.+)*", "\n```pycon\n\\g<0>\n```", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = value
