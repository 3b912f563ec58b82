"""Top-k log-probabilities as a few bytes, and back: one block of text at a time.

A block's (token, position) pairs are sorted as one list of numbers, ``token x positions + position``, and kept by their gaps: a token that the
teacher considers at many positions of a block costs a few bits at each. Log-probabilities are kept in equal steps below the likeliest
outcome, the mass of all other tokens as one more outcome, and are normalised when read, so that they and the rest sum to 1 exactly. Each byte
plane is compressed with a code of its own, all in one zlib stream.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from cbd_hub.errors import ArgumentError, DataError


BITS = (4, 16)
_RANGE = 16.0  # nats below the likeliest outcome; what lies deeper is kept as if it lay there
_TAIL_RANGE = 24.0  # nats below certainty


@dataclass(frozen=True)
class TopCodec:
    """How top-k log-probabilities are kept.

    Args:
        top_k: Tokens listed at each position.
        bits: Precision: log-probabilities come in ``2**bits`` steps over 16 nats below the likeliest outcome.
        vocab_size: Tokens of the vocabulary.

    Raises:
        ArgumentError: If one is out of its range.

    Example:
        >>> codec = TopCodec(top_k=2, bits=8, vocab_size=50)
        >>> data = codec.encode(np.array([[7, 3]]), np.log([[0.5, 0.25]]), np.log([0.25]))
        >>> ids, log_probs = codec.decode(data, positions=1)
        >>> ids.tolist(), np.exp(log_probs).round(2).tolist()
        ([[3, 7]], [[0.25, 0.5]])
    """

    top_k: int
    bits: int
    vocab_size: int

    def __post_init__(self) -> None:
        if not BITS[0] <= self.bits <= BITS[1]:
            raise ArgumentError(f"bits={self.bits} is outside {BITS[0]} to {BITS[1]}; give 8 unless you have measured otherwise")
        if not 1 <= self.top_k < self.vocab_size:
            raise ArgumentError(f"top_k={self.top_k} is outside 1 to {self.vocab_size - 1}, the vocabulary less one; give another top_k")

    @property
    def step(self) -> float:
        """Distance of two neighbouring log-probabilities, in nats."""
        return _RANGE / 2**self.bits

    @property
    def worst(self) -> float:
        """The most that rounding can cost at any position: KL between the k + 1 outcomes before and after, in nats.

        Rounding moves a log-probability by at most half a step, and a KL between distributions whose log-ratios span a step is at most
        ``step**2 / 8`` (Hoeffding's lemma); outcomes deeper than the range add at most their raised mass.
        """
        return self.step**2 / 8 + (self.top_k + 1) * float(np.exp(2 * self.step - _RANGE))

    def _planes(self, positions: int) -> tuple[int, int]:
        """Bytes of a gap, and of a level."""
        return _gap_bytes(self.vocab_size, positions), 1 if self.bits <= 8 else 2

    def encode(self, ids: np.ndarray, log_probs: np.ndarray, log_rest: np.ndarray) -> bytes:
        """The bytes of one block.

        Args:
            ids: Listed tokens, shape (positions, k), distinct at a position, in any order.
            log_probs: Their log-probabilities, shape (positions, k).
            log_rest: Log-probability of any other token, shape (positions,).
        """
        positions = len(ids)
        outcomes = np.concatenate([log_probs, log_rest[:, None]], 1).astype(np.float64)
        depth = (outcomes.max(1, keepdims=True) - outcomes) / self.step
        levels = np.minimum(np.rint(depth), 2**self.bits - 1).astype(np.int64)
        keys = (ids.astype(np.int64) * positions + np.arange(positions)[:, None]).ravel()
        order = np.argsort(keys)
        gaps = np.diff(keys[order], prepend=-1) - 1
        of_gaps, of_levels = self._planes(positions)
        packer = zlib.compressobj(9, strategy=zlib.Z_RLE)
        data = []
        for numbers, count in ((gaps, of_gaps), (levels[:, :-1].ravel()[order], of_levels), (levels[:, -1], of_levels)):
            for plane in range(count):
                data += [packer.compress((numbers >> 8 * plane & 255).astype(np.uint8).tobytes()), packer.flush(zlib.Z_SYNC_FLUSH)]
        return b"".join([*data, packer.flush()])

    def decode(self, data: bytes, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Listed tokens, rising at each position, int64, and their log-probabilities, float32, each of shape (positions, k).

        Args:
            data: What `encode` gave.
            positions: How many positions they are of.

        Raises:
            DataError: If these are not the bytes of so many positions.
        """
        k, total = self.top_k, positions * self.top_k
        of_gaps, of_levels = self._planes(positions)
        expected = total * (of_gaps + of_levels) + positions * of_levels
        reader = zlib.decompressobj()
        try:
            raw = reader.decompress(data, expected + 1)
        except (zlib.error, TypeError) as error:
            raise DataError(f"the top tokens are no zlib stream ({error})") from error
        if len(raw) != expected or not reader.eof or reader.unused_data:
            raise DataError(f"the top tokens are not the {expected:,} bytes of {positions:,} positions with {k} tokens each")
        planes = np.frombuffer(raw, np.uint8)

        def numbers(start: int, length: int, count: int) -> np.ndarray:
            found = np.zeros(length, np.int64)
            for plane in range(count):
                found |= planes[start + plane * length : start + (plane + 1) * length].astype(np.int64) << 8 * plane
            return found

        keys = np.cumsum(numbers(0, total, of_gaps) + 1) - 1
        if total and (keys.min() < 0 or keys.max() >= self.vocab_size * positions):
            raise DataError(f"a top token is not below the vocabulary's size, {self.vocab_size:,}")
        ids, place = np.divmod(keys, max(positions, 1))
        order = np.argsort(place, kind="stable")
        if (place[order].reshape(positions, k) != np.arange(positions)[:, None]).any():
            raise DataError(f"a position has more or fewer than {k} top tokens")
        levels = np.concatenate([
            numbers(total * of_gaps, total, of_levels)[order].reshape(positions, k),
            numbers(total * (of_gaps + of_levels), positions, of_levels)[:, None],
        ], 1)
        log_probs = levels * -self.step
        log_probs -= np.log(np.exp(log_probs).sum(1, keepdims=True))
        return ids[order].reshape(positions, k), log_probs[:, :k].astype(np.float32)


@dataclass(frozen=True)
class TailCodec:
    """How draws from the tokens that are not listed are kept: by the gaps of their sorted numbers, as the listed ones, and one byte for a log-probability.

    Args:
        draws: Tokens drawn at each position.
        vocab_size: Tokens of the vocabulary.

    Example:
        >>> codec = TailCodec(draws=2, vocab_size=50)
        >>> ids, log_probs = codec.decode(codec.encode(np.array([[9, 9]]), np.log([[0.25, 0.25]])), positions=1)
        >>> ids.tolist(), np.exp(log_probs).round(1)
        ([[9, 9]], array([[0.2, 0.2]], dtype=float32))
    """

    draws: int
    vocab_size: int

    def encode(self, ids: np.ndarray, log_probs: np.ndarray) -> bytes:
        """The bytes of one block, from tokens and their log-probabilities, each of shape (positions, draws)."""
        positions = len(ids)
        keys = (ids.astype(np.int64) * positions + np.arange(positions)[:, None]).ravel()
        order = np.argsort(keys, kind="stable")
        levels = np.rint(np.clip(-log_probs.astype(np.float64), 0, _TAIL_RANGE) / _TAIL_RANGE * 255).astype(np.uint8).ravel()[order]
        gaps = np.diff(keys[order], prepend=0)
        planes = [(gaps >> 8 * plane & 255).astype(np.uint8).tobytes() for plane in range(_gap_bytes(self.vocab_size, positions))]
        return zlib.compress(b"".join([*planes, levels.tobytes()]), 9)

    def decode(self, data: bytes, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens, rising at each position, int64, and their log-probabilities, float32, each of shape (positions, draws).

        Raises:
            DataError: If these are not the bytes of so many positions.
        """
        total, count = positions * self.draws, _gap_bytes(self.vocab_size, positions)
        reader = zlib.decompressobj()
        try:
            raw = reader.decompress(data, total * (count + 1) + 1)
        except (zlib.error, TypeError) as error:
            raise DataError(f"the draws are no zlib stream ({error})") from error
        if len(raw) != total * (count + 1) or not reader.eof or reader.unused_data:
            raise DataError(f"the draws are not the {total * (count + 1):,} bytes of {positions:,} positions with {self.draws} each")
        planes = np.frombuffer(raw, np.uint8).reshape(count + 1, total)
        keys = np.cumsum(sum(planes[plane].astype(np.int64) << 8 * plane for plane in range(count)))
        if total and keys.max() >= self.vocab_size * positions:
            raise DataError(f"a drawn token is not below the vocabulary's size, {self.vocab_size:,}")
        ids, place = np.divmod(keys, max(positions, 1))
        order = np.argsort(place, kind="stable")
        if (place[order].reshape(positions, self.draws) != np.arange(positions)[:, None]).any():
            raise DataError(f"a position has more or fewer than {self.draws} draws")
        log_probs = planes[count][order].astype(np.float32) * np.float32(-_TAIL_RANGE / 255)
        return ids[order].reshape(positions, self.draws), log_probs.reshape(positions, self.draws)


def _gap_bytes(vocab_size: int, positions: int) -> int:
    """Bytes of the largest gap between two places in a block."""
    return -(-(vocab_size * positions - 1).bit_length() // 8) or 1


def rounding_kl(log_probs: np.ndarray, log_rest: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """What rounding costs at each position: KL between the k + 1 outcomes before and after, in nats, shape (positions,).

    Args:
        log_probs: Log-probabilities of the listed tokens before, shape (positions, k).
        log_rest: Log-probability of any other token before, shape (positions,).
        kept: Log-probabilities of the listed tokens after, in the same order, shape (positions, k).
    """
    before = np.concatenate([log_probs, log_rest[:, None]], 1).astype(np.float64)
    before -= np.log(np.exp(before).sum(1, keepdims=True))
    after = kept.astype(np.float64)
    rest = np.maximum(1 - np.exp(after).sum(1, keepdims=True), np.finfo(np.float32).eps)  # as the loss reads it
    mass = np.exp(before)
    cost = np.where(mass > 0, mass * (before - np.concatenate([after, np.log(rest)], 1)), 0.0).sum(1)
    return np.maximum(cost, 0.0)
