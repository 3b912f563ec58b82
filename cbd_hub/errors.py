"""The errors of cbd_hub. Each message says what was asked, what was found and what to do.

Every class inherits from `CBDError` and from the built-in that callers already catch for that kind of mistake.
"""

from __future__ import annotations


class CBDError(Exception):
    r"""Any mistake that cbd_hub can explain, in one line.

    Example:
        >>> print(CBDError("no file " + chr(27) + "[31m" + chr(10)))  # what a stranger's file put there cannot drive a terminal
        no file \x1b[31m\n
    """

    def __str__(self) -> str:
        """The message, with what cannot be printed escaped."""
        return "".join(char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in super().__str__())


class ArgumentError(CBDError, ValueError):
    """An argument has a value, or a name, that cannot be used."""


class SizeError(CBDError, ValueError):
    """A size that lies outside the chain, cannot be realised, or (`SizeFormatError`) cannot be read."""


class SizeFormatError(SizeError, ArgumentError):
    """A size that cannot be read."""


class ArchitectureError(CBDError, ValueError):
    """A model architecture without an axis table, or models whose architectures do not fit together."""


class VocabularyMismatchError(CBDError, ValueError):
    """Two models or a text whose vocabularies do not fit."""


class ManifestError(CBDError, ValueError):
    """A chain.json that is missing, broken, newer than this version, or hostile."""


class RecipeError(CBDError, ValueError):
    """A recipe that cannot be read; the message names the line."""


class DataError(CBDError, ValueError):
    """Text that is missing, empty or too short."""


class WeightsError(CBDError, ValueError):
    """A checkpoint with a missing, extra or mis-shaped tensor."""


class TrainingError(CBDError, ArithmeticError):
    """A loss that is no longer a number."""


class IntegrityError(CBDError, OSError):
    """A file whose bytes are not the ones that were recorded."""


class StorageError(CBDError, OSError):
    """A file or folder that cannot be read or written."""


class BusyError(CBDError, RuntimeError):
    """No room or no turn for a request now; the same request may go through later."""


def one_line(error: BaseException) -> str:
    r"""The first line of an error's text, with the next one where it ends in a colon; or its kind.

    Example:
        >>> one_line(ValueError("field 'layers':\n    4 is too few\n"))
        "field 'layers': 4 is too few"
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[: 1 + lines[0].endswith(":")])[:160] if lines else type(error).__name__
