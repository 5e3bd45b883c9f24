"""Random numbers as a pure function of (seed, position, stream, counter).

A sample's augmentation and masks must not depend on the batch, rank, device or moment that it is
drawn in.  So nothing is drawn from a generator: each number is a hash of its key, by the finaliser
of SplitMix64 (Steele, Lea & Flood 2014) in wrapping int64 arithmetic, which every device does
alike.  ``bits``, ``uniform`` and ``normal`` are bit-equal on CPU and GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_BYTES_STD = (4 * (0x100**2 - 1) / 12) ** 0.5  # of a sum of four bytes
_GOLDEN, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_INVERSE = pow(_GOLDEN, -1, 1 << 64)


def bits(seed: int, position_B: Tensor, stream: int, counter: int | Tensor) -> Tensor:
    """64 random bits for each sample and counter.

    Parameters
    ----------
    seed : the run's seed.
    position_B : int64 [B], global position of each sample.
    stream : names the use, so that two uses never share numbers.
    counter : a count n (counters 0..n-1), or int64 [1 or B, ...] counters.

    Returns
    -------
    int64 [B, n] or [B, ...]
    """
    if isinstance(counter, int):
        counter = torch.arange(counter, device=position_B.device)[None]
    start = _mix_int(_mix_int(seed & _MASK64) ^ (stream * _GOLDEN & _MASK64))
    key_B = _mix(position_B * _signed(_GOLDEN) ^ _signed(start))
    key = key_B.view(-1, *[1] * (counter.dim() - 1))
    if torch.compiler.is_compiling():
        # The same bits.  Inductor folds a product of a counter that it knows and a constant, which
        # does not wrap and exceeds int64; it knows nothing of a sum with the key.
        return _mix((counter + key * _signed(_INVERSE)) * _signed(_GOLDEN))
    return _mix(counter * _signed(_GOLDEN) + key)


def uniform(seed: int, position_B: Tensor, stream: int, counter: int | Tensor) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24; arguments as for ``bits``."""
    return _shift_right(bits(seed, position_B, stream, counter), 40).float() * 2.0**-24


def normal(seed: int, position_B: Tensor, stream: int, counter: int | Tensor) -> Tensor:
    """float32 of mean 0 and variance 1; arguments as for ``bits``, with two numbers to a counter.

    Each is the sum of four bytes (Irwin-Hall): bounded at 3.45 standard deviations and exact on
    every device, which logarithms and cosines are not.

    Returns
    -------
    [B, ..., 2 n]
    """
    drawn = bits(seed, position_B, stream, counter)
    even_bytes = 0x00FF00FF00FF00FF
    sums = (drawn & even_bytes).add_((drawn >> 8).bitwise_and_(even_bytes))  # of two, four a word
    sums += sums >> 16  # of four, in the lower halves of two int32; what is above them is cut off
    return ((sums.view(torch.int32) & 0xFFFF) - 2 * 0xFF).float().mul_(_BYTES_STD**-1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, shift: int) -> Tensor:
    """Logical shift: int64's own shift copies the sign bit."""
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _mix(x: Tensor) -> Tensor:
    """In place where it can be: large draws are bound by memory."""
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_signed(_MUL1))
    x ^= _shift_right(x, 27)
    x *= _signed(_MUL2)
    x ^= _shift_right(x, 31)
    return x


def _mix_int(x: int) -> int:
    x = (x ^ (x >> 30)) * _MUL1 & _MASK64
    x = (x ^ (x >> 27)) * _MUL2 & _MASK64
    return x ^ (x >> 31)
