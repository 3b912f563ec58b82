"""Shapes timed on this machine by models of random weights, and the times kept for later."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import constants
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from cbd_hub.configs import whole_config
from cbd_hub.errors import ArgumentError, StorageError
from cbd_hub.families import family_of
from cbd_hub.files import write_text
from cbd_hub.reporting import Report
from cbd_hub.shapes import config_for, parameter_count, shape_of
from cbd_hub.sizes import format_size
from cbd_hub.speed.measuring import Speed, measure_in_turns, measure_speed
from cbd_hub.speed.prediction import Probe, SpeedModel, terms
from cbd_hub.weights import LOADING, model_class, stored_shapes


logger = logging.getLogger(__name__)

CLOSE = 0.15  # a prediction further from what is measured is told of
_RECORD = 1  # of how a record is made: a change of it makes the old ones unread
_MOST_BYTES = 2 * 2**30  # weights of a model that is timed; deeper ones are timed in fewer layers
_BLOCK = 2**20
Positive = Annotated[float, Field(gt=0, lt=1e6)]


class _Kept(BaseModel):
    """The times of a shape in two depths: layers, seconds to the first token, seconds of a further one."""

    model_config = ConfigDict(extra="ignore")

    times: list[tuple[Annotated[int, Field(ge=1)], Positive, Positive]] = Field(min_length=1, max_length=8)


@dataclass
class Stopwatch:
    """The speed of shapes on one device, in one dtype, with torch's number of threads.

    Weights are random: their values do not change how long a product takes. Each shape is timed in its own depth and in a quarter of it, which tells
    what a layer costs from what the rest does.

    Attributes:
        dtype: Dtype of the weights.
        device: The device.
        attn_implementation: As transformers takes it; None for its choice.
        again: Whether to time also what was timed before.
        report: Called with what is done, how much of it, and of how much; None for a log line.
        fresh: Whether something has been timed, not read.
    """

    dtype: torch.dtype
    device: torch.device
    attn_implementation: str | None = None
    again: bool = False
    report: Report | None = None
    fresh: bool = False
    _known: dict[str, list[Probe]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Where it measures."""
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{device_name(self.device)}{threads.removesuffix('s') if threads == ', 1 threads' else threads}, {str(self.dtype).removeprefix('torch.')}"

    def model(self, *configs: Any) -> SpeedModel:
        """The speed model of shapes between some anchors, from their configs; timed where it was not before."""
        return SpeedModel.fit([probe for config in configs for probe in self._probes(config)])

    def speed(self, config: Any) -> Speed:
        """The predicted speed of an anchor, from its own times."""
        return self.model(config).at(terms(shape_of(config), config))

    def random_model(self, config: Any) -> Any:
        """A model of a config with random weights, where this measures.

        Raises:
            ArgumentError: If the device does not hold it.
        """
        options: dict[str, Any] = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        config = whole_config(config)
        plain_class = model_class(config, "a config")
        try:
            state = _random_state(stored_shapes(config), self.dtype, self.device)
            with LOADING, _no_bars():
                made = plain_class.from_pretrained(None, config=config, state_dict=state, dtype=self.dtype, device_map={"": self.device}, **options)
        except torch.OutOfMemoryError as error:
            raise ArgumentError(f"{self.device} has no room for {format_size(parameter_count(config))} to be timed; free it, or choose another device_map") from error
        return made.eval()

    def probe_models(self, config: Any) -> dict[int, Any]:
        """The models by which a config is timed, by their depth: its own, or as deep as memory is spent on, and a quarter of that."""
        shape = shape_of(config)
        block = terms(shape, config)[2] / shape.layers
        deep = max(1, min(shape.layers, int(_MOST_BYTES // (block * self.dtype.itemsize))))
        return {depth: self.random_model(config_for(shape.model_copy(update={"layers": depth}), config)) for depth in sorted({deep, max(1, deep // 4)}, reverse=True)}

    def check(self, model: Any, predicted: Speed) -> Speed | None:
        """Measure a made model shortly, and log where it is further from its prediction than 15%; None for a model on another device."""
        place = torch.device(model.device)
        if place.type != self.device.type or (place.index is not None and self.device.index is not None and place.index != self.device.index):
            return None
        measured = measure_speed(model)
        off = predicted.off(measured)
        how = logger.warning if abs(off) > CLOSE else logger.info
        how("predicted %.3g tokens a second, measured %.3g (%+.0f%%)", predicted.tokens_per_second, measured.tokens_per_second, 100 * off)
        return measured

    def _probes(self, config: Any) -> list[Probe]:
        shape, key = shape_of(config), self._key(config)
        store = record_path(key)
        name = store.name
        if name not in self._known:
            times = None if self.again else read_record(store)
            if times is None:
                times = self._time(config)
                write_record(store, key, times)
                self.fresh = True
            self._known[name] = [Probe(tuple(terms(shape.model_copy(update={"layers": layers}), config)), speed) for layers, speed in times.items()]
        return self._known[name]

    def _time(self, config: Any) -> dict[int, Speed]:
        """Speeds of a config in two depths."""
        what = f"timing {format_size(parameter_count(config))} ({shape_of(config).text}) on {self.text}"
        report = self.report
        if report is None:
            logger.info("%s, once", what)
        else:
            report(what, 0, None)
        models = self.probe_models(config)
        return dict(zip(models, measure_in_turns(list(models.values()), report=None if report is None else partial(report, what))))

    def _key(self, config: Any) -> dict[str, Any]:
        """All that a time depends on."""
        family = family_of(config)
        return {
            "record": _RECORD, "device": device_name(self.device), "cpus": os.cpu_count(), "machine": platform.machine(), "system": platform.system(),
            "threads": torch.get_num_threads(), "dtype": str(self.dtype), "attention": self.attn_implementation, "torch": torch.__version__,
            "transformers": version("transformers"), "model_type": config.model_type, "shape": shape_of(config).model_dump(),
            "layer_types": [str(kind) for kind in family.layer_types(config)], "parameters": parameter_count(config),
        }


@contextmanager
def _no_bars() -> Iterator[None]:
    """No bar of transformers for a model that nobody asked for."""
    from transformers.utils import logging as bars
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _random_state(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random tensors, one short draw repeated; ones where a tensor has one dimension, as norms want it."""
    draw = (0.02 * torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))).to(device, dtype)

    def filled(shape: tuple[int, ...]) -> Tensor:
        if len(shape) < 2:
            return torch.ones(shape, dtype=dtype, device=device)
        count = math.prod(shape)
        return draw.repeat(-(-count // _BLOCK))[:count].view(shape)

    return {name: filled(shape) for name, shape in shapes.items()}


def device_name(device: torch.device) -> str:
    """What a device is: the processor's or the accelerator's own name."""
    if device.type == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
        except OSError:
            found = ""
        return found or platform.processor() or platform.machine() or "cpu"
    properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    return str(getattr(properties(device), "name", device.type)) if properties is not None else device.type


def one_device(device_map: Any, default: torch.device) -> torch.device:
    """The one device that a ``device_map`` means; the default for None, and for the maps that transformers makes itself ("auto").

    Raises:
        ArgumentError: If it spreads a model over several, or names none.

    Example:
        >>> one_device({"": "cpu"}, torch.device("cuda")), one_device("auto", torch.device("cpu"))
        (device(type='cpu'), device(type='cpu'))
    """
    if isinstance(device_map, Mapping):
        places = list(dict.fromkeys(map(str, device_map.values())))
        if len(places) != 1:
            raise ArgumentError(f"device_map= spreads the model over {', '.join(places[:4]) or 'nothing'}, and its speed is predicted on one device; name one, such as device_map=\"cpu\"")
        device_map = next(iter(device_map.values()))
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return default
    return named_device(device_map)


def named_device(name: Any) -> torch.device:
    """The device of a name.

    Raises:
        ArgumentError: If there is none on which a speed can be measured.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ArgumentError(f'device {str(name)[:40]!r} is none on which a speed can be measured here; give one, such as "cpu" or "cuda:0"') from error
    if device.type == "meta":
        raise ArgumentError('device "meta" computes nothing; give one on which a speed can be measured, such as "cpu" or "cuda:0"')
    return device


def record_path(key: Mapping[str, Any]) -> Path:
    """Where the times of a key are kept."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]
    return Path(constants.HF_HOME) / "cbd_hub" / "speed" / f"{digest}.json"


def read_record(path: Path) -> dict[int, Speed] | None:
    """Kept times by depth; None where there are none that can be read."""
    try:
        kept = _Kept.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return {layers: Speed(first, token) for layers, first, token in kept.times}


def write_record(path: Path, key: Mapping[str, Any], times: Mapping[int, Speed]) -> None:
    """Keep times, whole or not at all; a cache that cannot be written is no reason to fail."""
    try:
        write_text(path, json.dumps({"key": dict(key), "times": [[layers, speed.first, speed.token] for layers, speed in times.items()]}, indent=1) + "\n")
    except StorageError as error:
        logger.info("the times are not kept: %s", error)
