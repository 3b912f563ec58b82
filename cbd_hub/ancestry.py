"""What a model that was cut says of the one that it was cut from, in a file beside its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cbd_hub.errors import WeightsError, one_line
from cbd_hub.files import write_bytes
from cbd_hub.hub import KEPT_FILE
from cbd_hub.interpolation.plan import Kept


@dataclass(frozen=True)
class Ancestry:
    """Which units of another model one was cut from.

    Training keeps them: `ChainDistiller` writes the file beside what it saves, and `assemble_chain` reads it, so that both anchors have common coordinates without being aligned.

    Attributes:
        kept: The units.
        parent: `weights_sha256` of the other model.
    """

    kept: Kept
    parent: str

    def save(self, folder: Path) -> None:
        """Write them into a model's folder."""
        write_bytes(folder / KEPT_FILE, save({"parent": np.frombuffer(bytes.fromhex(self.parent), np.uint8), **self.kept.arrays()}))

    @classmethod
    def read(cls, folder: Path) -> Ancestry | None:
        """Those of a model's folder; None where it says nothing of them.

        Raises:
            WeightsError: If the file cannot be used.
        """
        path = folder / KEPT_FILE
        if not path.is_file():
            return None
        try:
            arrays = load(path.read_bytes())
            return cls(Kept.read(arrays), arrays["parent"].tobytes().hex())
        except (OSError, SafetensorError, TypeError, KeyError, AttributeError) as error:  # numpy lacks some of safetensors' dtypes
            raise WeightsError(f"{path} does not say which units were kept ({one_line(error)}); copy it again from the folder of the cut, or remove it") from error
