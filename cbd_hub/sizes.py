"""Sizes, bytes, times and rates in text and in numbers, and figures with their errors: the only place that knows how "138M" is read and written."""

from __future__ import annotations

import math
import re
from decimal import ROUND_HALF_UP, Decimal
from numbers import Integral, Real
from typing import Any

from cbd_hub.errors import ArgumentError, SizeFormatError


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "min": Decimal(60)}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s*", re.IGNORECASE | re.ASCII)


def _split(text: str) -> tuple[Decimal, int]:
    match = _PATTERN.fullmatch(text) if len(text) <= 32 else None
    if match is None or not Decimal(match[1]):
        raise SizeFormatError(f'size "{text[:40]}" cannot be read; write a number and a unit, such as "138M", "1.1B", "54K" or 138000000')
    return Decimal(match[1]), _UNITS[match[2].upper()]


def as_int(value: Any) -> Any:
    """A whole number of any kind, such as numpy's or 117e6, as an int; anything else as it is.

    Example:
        >>> import numpy as np
        >>> as_int(np.int64(7)), as_int(117e6), as_int(True), as_int("7"), as_int(0.5)
        (7, 117000000, True, '7', 0.5)
    """
    whole = (isinstance(value, Integral) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole else value


def check_counts(**values: Any) -> None:
    """Refuse what is no whole number of 1 or more; None says nothing.

    Raises:
        ArgumentError: Naming the first.
    """
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ArgumentError(f"{name}={value!r} is no whole number of 1 or more; give one")


def parse_size(size: str | int) -> int:
    """A count of parameters from text such as "138M" or from an int.

    Raises:
        SizeFormatError: If the text is not a positive number with the unit K, M, B or T, or the int is not positive.

    Example:
        >>> parse_size("1.1B"), parse_size("54K"), parse_size(138)
        (1100000000, 54000, 138)
    """
    if isinstance(size, str):
        number, unit = _split(size)
        return int((number * unit).to_integral_value(ROUND_HALF_UP))
    size = as_int(size)
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise SizeFormatError(f'size={size!r} is not a size; give a positive int or text such as "138M"')
    return size


def parse_bytes(wish: str | int, name: str = "memory_budget") -> int:
    """A count of bytes from text such as "300MB" (decimal), "1.5GiB" (binary) or "1024", or from an int; ``name`` is what an error calls it.

    Raises:
        SizeFormatError: If it is none.

    Example:
        >>> parse_bytes("300MB"), parse_bytes("1.5GiB"), parse_bytes("1024"), parse_bytes(1024)
        (300000000, 1610612736, 1024, 1024)
    """
    if isinstance(wish, str) and len(wish) <= 32:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*|\s*\d+\s*", wish, re.IGNORECASE)
        if match and match[1] is None and int(wish):
            return int(wish)
        if match and match[1] is not None and Decimal(match[1]):
            power = " KMGT".index(match[2].upper() or " ")
            return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)
    wish = as_int(wish)
    if isinstance(wish, bool) or not isinstance(wish, int) or wish <= 0:
        raise SizeFormatError(f'{name}={wish!r} is no count of bytes; write a number and a unit, such as "300MB" or "1.5GiB", or a whole number of bytes above 0')
    return wish


def parse_seconds(wish: str | float, name: str = "max_latency") -> float:
    """Seconds from text such as "20ms" or "1.5s", or from a number of them; ``name`` is what an error calls it.

    Raises:
        SizeFormatError: If it is no time above 0.

    Example:
        >>> parse_seconds("20ms"), parse_seconds("1.5 s"), parse_seconds("2min"), parse_seconds(3)
        (0.02, 1.5, 120.0, 3.0)
    """
    if isinstance(wish, str) and len(wish) <= 32:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|min)?\s*", wish, re.IGNORECASE | re.ASCII)
        if match and Decimal(match[1]):
            return float(Decimal(match[1]) * _SECONDS[(match[2] or "s").lower()])
    elif _above_zero(wish):
        return float(wish)
    raise SizeFormatError(f'{name}={_shortly(wish)} is no time; write a number and a unit, such as "20ms" or "1.5s", or seconds above 0')


def parse_rate(wish: str | float, name: str = "min_tokens_per_second") -> float:
    """A number above 0, also from text; ``name`` is what an error calls it.

    Raises:
        SizeFormatError: If it is none.

    Example:
        >>> parse_rate("20"), parse_rate(7.5)
        (20.0, 7.5)
    """
    if isinstance(wish, str) and len(wish) <= 32 and re.fullmatch(r"\s*(\d+(\.\d*)?|\.\d+)\s*", wish, re.ASCII):
        wish = float(wish)
    if not isinstance(wish, str) and _above_zero(wish):
        return float(wish)
    raise SizeFormatError(f"{name}={_shortly(wish)} is no rate; give tokens a second above 0, such as 20")


def _above_zero(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _shortly(value: Any) -> str:
    return f'"{value[:40]}"' if isinstance(value, str) else repr(value)[:40]


def matches(text: str, parameters: int) -> bool:
    """Whether a size, rounded to the digits of the text, is what the text says, and within 5% of it, which one digit alone need not mean.

    Example:
        >>> matches("135M", 134_515_008), matches("134M", 134_515_008), matches("3B", 3_085_938_688), matches("1B", 1_235_814_400)
        (True, False, True, False)
    """
    number, unit = _split(text)
    return (Decimal(parameters) / unit).quantize(number, ROUND_HALF_UP) == number and abs(parameters - number * unit) <= number * unit / 20


def format_size(parameters: int) -> str:
    """A size in three significant digits, without trailing zeros.

    Example:
        >>> format_size(134_515_008), format_size(64_000_123), format_size(1_100_000_000), format_size(999_999)
        ('135M', '64M', '1.1B', '1M')
    """
    rounded = Decimal(f"{parameters:.3g}")
    unit = next((name for name, factor in reversed(_UNITS.items()) if rounded >= factor), "")
    number = (rounded / _UNITS[unit]).normalize()
    return f"{number:f}{unit}"


def format_bytes(count: float) -> str:
    """Bytes in decimal units.

    Example:
        >>> format_bytes(538_090_408), format_bytes(900)
        ('538 MB', '900 B')
    """
    for unit in _BYTE_UNITS:
        if count < 999.5 or unit == _BYTE_UNITS[-1]:
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """A time in three significant digits.

    Example:
        >>> format_seconds(0.0204), format_seconds(1.5), format_seconds(310.2)
        ('20.4 ms', '1.5 s', '310 s')
    """
    return f"{Decimal(f'{seconds * 1000:.3g}'):f} ms" if seconds < 0.9995 else f"{Decimal(f'{seconds:.3g}'):f} s"


def with_error(value: float, stderr: float | None, spec: str = ".3f") -> str:
    """A figure with its standard error, where it has one; ``spec`` as in a format.

    Example:
        >>> with_error(3.0751, 0.0749), with_error(0.02, None, "+.3f")
        ('3.075 ± 0.075', '+0.020')
    """
    return f"{value:{spec}}" + ("" if stderr is None else f" ± {stderr:{spec.lstrip('+')}}")
