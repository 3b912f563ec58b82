"""For mkdocstrings: the section ``Example:`` of a docstring is read as ``Examples:``, whose lines are code."""

from typing import Any

import griffe


class ExamplesSection(griffe.Extension):
    """Rename the section before docstrings are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
