"""What a page says about the sizes of a chain, without a weight: from chain.json, configs and headers."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from cbd_hub.chain import Chain
from cbd_hub.errors import ArgumentError, SizeError, SizeFormatError
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest import Evaluation
from cbd_hub.plans import anchor_config, plan_in
from cbd_hub.remote import bytes_needed
from cbd_hub.sizes import format_bytes, format_size, parse_bytes


BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a parameter
_ANY = 0.99  # the nearest size that can be made, however far


@dataclass(frozen=True)
class Point:
    """A measured size of the curve: loss in nats per token and its standard error; in bits per byte too where the chain has several vocabularies."""

    size: int
    loss: float
    stderr: float | None
    strategy: str
    dataset: str
    tokens: int
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class Snap:
    """A size that the slider snaps to."""

    size: int
    name: str
    kind: Literal["anchor", "recommended"]


@dataclass(frozen=True)
class Facts:
    """A size in numbers.

    Attributes:
        name: The size in three digits, or the anchor's name.
        parameters: Unique parameters that come out.
        layers: Layers.
        hidden: Hidden width.
        ffn: FFN width.
        memory: Bytes of the weights by dtype.
        download: Bytes of weights that a load from the Hub fetches into an empty cache.
        loss: Expected loss in nats per token; None where the chain was not measured.
        stderr: Its standard error.
        bits_per_byte: The loss in bits per byte, where the chain has several vocabularies.
        strategy: ``anchor``, ``blend`` or ``patch``.
        small: The smaller neighbour.
        large: The larger neighbour; the same at an anchor's size.
        position: Where between them it lies, 0 to 1.
        trough: Why it is a poor choice, where the measured curve says so.
    """

    name: str
    parameters: int
    layers: int
    hidden: int
    ffn: int
    memory: dict[str, int]
    download: int
    loss: float | None
    stderr: float | None
    bits_per_byte: float | None
    strategy: str
    small: str
    large: str
    position: float
    trough: str | None

    def data(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Scale:
    """The slider: sizes in units of a thousand, a million, ... parameters.

    Example:
        >>> Scale.of(64_052_928, 134_515_008)
        Scale(factor=1000000, unit='million', low=64.0, high=134.6, step=0.1)
    """

    factor: int
    unit: str
    low: float
    high: float
    step: float

    @classmethod
    def of(cls, smallest: int, largest: int) -> Scale:
        """The scale of a chain, in steps of a round number near a three-hundredth of it."""
        exponent = min(max(int(math.log10(smallest)) // 3 * 3, 0), 9)
        factor = int(10**exponent)
        unit = {0: "single", 3: "thousand", 6: "million", 9: "billion"}[exponent]
        span = max(largest - smallest, 1) / factor
        digits = -math.floor(math.log10(span / 300))
        step = 10.0**-digits
        low, high = math.floor(smallest / factor / step), math.ceil(largest / factor / step)
        return cls(factor, unit, round(low * step, max(digits, 0)), round(max(high, low + 1) * step, max(digits, 0)), round(step, max(digits, 0)))

    def value(self, size: int) -> float:
        """A size on the slider."""
        return min(max(round(round(size / self.factor / self.step) * self.step, 9), self.low), self.high)

    def share(self, size: int) -> float:
        """Where a size is on the slider, 0 to 1."""
        return (size / self.factor - self.low) / (self.high - self.low)


class Picker:
    """The sizes of an opened chain."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.manifest = chain.manifest
        self.files = chain.files.glanced
        self.smallest, self.largest = self.manifest.anchors[-1].parameters, self.manifest.anchors[0].parameters
        self.scale = Scale.of(self.smallest, self.largest)
        self._facts = functools.lru_cache(512)(self._made)
        self._plans = functools.lru_cache(512)(lambda size: plan_in(self.files, size, tolerance=_ANY))

    @property
    def name(self) -> str:
        """What the chain is called: its repo, else its own name."""
        return self.chain.name if self.files.revision is None else self.files.name

    @functools.cached_property
    def snaps(self) -> list[Snap]:
        """Anchors and recommended sizes, rising."""
        found = {size: Snap(size, format_size(size), "recommended") for link in self.manifest.links for size in link.recommended_sizes}
        found.update({anchor.parameters: Snap(anchor.parameters, anchor.name, "anchor") for anchor in self.manifest.anchors})
        return [found[size] for size in sorted(found)]

    @functools.cached_property
    def points(self) -> list[Point]:
        """All that was measured, in rising size."""
        found = [self._point(entry.size, entry, entry.strategy) for link in self.manifest.links for entry in link.curve]
        found += [self._point(anchor.parameters, anchor.evaluations[-1], "anchor") for anchor in self.manifest.anchors if anchor.evaluations]
        return sorted(found, key=lambda point: (point.size, point.strategy))

    @functools.cached_property
    def bridged(self) -> bool:
        """Whether the chain has several vocabularies, so that its sizes compare in bits per byte alone."""
        return len({anchor.tokenizer_sha256 for anchor in self.manifest.anchors}) > 1

    @property
    def unit(self) -> str:
        """Of the losses that are shown."""
        return "bits per byte" if self.bridged else "nats per token"

    def _bits(self, size: int, loss: float | None) -> float | None:
        """A loss in bits per byte, as its side of the chain has them; None in a chain of one vocabulary."""
        known = next((anchor.evaluations[-1] for anchor in self.manifest.neighbours(size) if anchor.evaluations), None)
        if not self.bridged or loss is None or known is None or known.bits_per_byte is None:
            return None
        return loss * known.bits_per_byte / known.loss

    def _point(self, size: int, entry: Evaluation, strategy: str) -> Point:
        dataset = entry.dataset.rpartition("/")[2] if entry.dataset.startswith("/") else entry.dataset  # a place on the owner's machine says nothing to others
        bits = self._bits(size, entry.loss) if entry.bits_per_byte is None else entry.bits_per_byte
        return Point(size, entry.loss, entry.stderr, strategy, dataset, entry.tokens, bits)

    def size(self, wish: str | int) -> int:
        """The parameters that come out for a wish.

        Raises:
            SizeError: If it cannot be read, lies outside the chain, or across a bridge.
        """
        return self.plan(wish).parameters

    def plan(self, wish: str | int) -> Plan:
        """The plan of the nearest size that can be made."""
        plan: Plan = self._plans(self.manifest.size(wish.strip() if isinstance(wish, str) else wish))
        return plan

    def at(self, value: float) -> int:
        """The size that a place of the slider means: a snap that is near, an end of a gap that no size can lie in, else the size itself."""
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ArgumentError("the slider has no number; move it, or type a size in its range")
        wanted = min(max(round(value * self.scale.factor), self.smallest), self.largest)
        snap = min(self.snaps, key=lambda snap: abs(snap.size - wanted))
        if abs(snap.size - wanted) <= max(0.006 * (self.scale.high - self.scale.low), 0.75 * self.scale.step) * self.scale.factor:
            return snap.size
        for link in self.manifest.links:
            small, large = self.manifest.anchor(link.small).parameters, self.manifest.anchor(link.large).parameters
            if link.kind == "bridge" and small < wanted < large:
                return small if wanted - small < large - wanted else large
        return self.size(wanted)

    def stand(self, size: int) -> float:
        """The slider's place that means a size; the nearest one where none does."""
        near = self.scale.value(size)
        around = (round(near + steps * self.scale.step, 9) for steps in (0, -1, 1, -2, 2))
        return next((place for place in around if self.scale.low <= place <= self.scale.high and self.at(place) == size), near)

    def place(self, most: int) -> float:
        """The slider's highest place whose size is at most so many parameters."""
        value = self.scale.value(most)
        while self.at(value) > most and value > self.scale.low:
            value = round(value - self.scale.step, 9)
        return value

    def fits(self, budget: str, dtype: str = "float32") -> int:
        """The largest size whose weights take no more than a memory such as "512MB".

        Raises:
            SizeError: If it cannot be read, or holds not even the smallest size.
            ArgumentError: If there is no such dtype.
        """
        if dtype not in BYTES:
            raise ArgumentError(f"dtype {dtype[:40]!r} is not known; choose one of {', '.join(BYTES)}")
        if not budget.strip():
            raise SizeError('no memory was given; write a number and a unit, such as "512MB"')
        text = budget.strip()
        try:
            parsed = parse_bytes(text if text.upper().endswith("B") else f"{text}B")
        except SizeFormatError:
            raise SizeFormatError(f'memory "{text[:40]}" cannot be read; write a number and a unit, such as "512MB" or "1.5GiB"') from None
        least = self.smallest * BYTES[dtype]
        if parsed < least:
            raise SizeError(f"{format_bytes(parsed)} hold no size of this chain in {dtype}: the smallest takes {format_bytes(least)}; give more, or a narrower dtype")
        plan = plan_in(self.files, memory_budget=min(4 * parsed // BYTES[dtype], 4 * self.largest), dtype="float32", tolerance=_ANY)
        return plan.parameters

    def facts(self, wish: str | int) -> Facts:
        """A size in numbers."""
        facts: Facts = self._facts(self.size(wish))
        return facts

    def _made(self, size: int) -> Facts:
        plan = self.plan(size)
        small, large = self.manifest.anchor(plan.small), self.manifest.anchor(plan.large)
        needed = sum(
            bytes_needed(self.files, anchor, anchor_config(self.files, anchor), rows)
            for name, rows in plan.rows().items() for anchor in [self.manifest.anchor(name)]
        )
        position = 1.0 if small is large else (size - small.parameters) / (large.parameters - small.parameters)
        return Facts(
            small.name if small is large else format_size(size), plan.parameters, plan.shape.layers, plan.shape.hidden, plan.shape.ffn,
            {name: width * plan.parameters for name, width in BYTES.items()}, needed, plan.expected, self._stderr(plan), self._bits(size, plan.expected),
            plan.strategy, plan.small, plan.large, position, plan.trough,
        )

    def _stderr(self, plan: Plan) -> float | None:
        """The standard error at a size, read between the points as the loss is."""
        if plan.expected is None:
            return None
        ends = {self.manifest.anchor(name).parameters for name in (plan.small, plan.large)}
        around = [
            point for point in self.points
            if point.stderr is not None and (point.size in ends if point.strategy == "anchor" else point.strategy == plan.strategy and min(ends) < point.size < max(ends))
        ]
        return float(np.interp(np.log(plan.parameters), [math.log(point.size) for point in around], [point.stderr or 0.0 for point in around])) if around else None

    def snippet(self, wish: str | int) -> str:
        """The Python lines that make a size."""
        facts = self.facts(wish)
        wanted = f'"{facts.name}"' if facts.strategy == "anchor" else f"{facts.parameters:_}"
        pinned = "" if self.files.revision is None else f', revision="{self.files.revision}"'
        return "\n".join([
            "# pip install cbd-hub", "from cbd_hub import CBDModel, Chain", "",
            f"chain = {json.dumps(self.files.name, ensure_ascii=False)}",
            f"model = CBDModel.from_chain(chain, size={wanted}{pinned})   # {facts.name}: a plain {plain_name(self.files, facts.large)}",
            f"tokenizer = Chain.from_pretrained(chain{pinned}).tokenizer({wanted})", "",
            'inputs = tokenizer("The history of the city begins", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        ])


def plain_name(files: Any, anchor: str) -> str:
    """The transformers class of an anchor's model."""
    names: Sequence[str] = anchor_config(files, files.manifest.anchor(anchor)).architectures or ["transformers model"]
    return names[0]
