"""Random numbers as a pure function of (seed, position, stream, counter).

A sample's augmentation and masks must not depend on the batch, rank, device or moment that it is
drawn in.  So nothing is drawn from a generator: each number is a hash of its key, by the finaliser
of SplitMix64 (Steele, Lea & Flood 2014) in wrapping int64 arithmetic, which every device does
alike.  Integers, ``uniform`` and ``normal`` are bit-equal on CPU and GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


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
    return _mix(counter * _signed(_GOLDEN) + key)


def uniform(seed: int, position_B: Tensor, stream: int, counter: int | Tensor) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24; arguments as for ``bits``."""
    return _shift_right(bits(seed, position_B, stream, counter), 40).float() * 2.0**-24


def normal(seed: int, position_B: Tensor, stream: int, counter: int | Tensor) -> Tensor:
    """float32 of mean 0 and variance 1; arguments as for ``bits``.

    The sum of four 16-bit uniforms (Irwin-Hall): bounded at 3.46 standard deviations and exact on
    every device, which logarithms and cosines are not.
    """
    drawn = bits(seed, position_B, stream, counter)
    total = drawn & 0xFFFF
    for shift in (16, 32, 48):
        total = total + (_shift_right(drawn, shift) & 0xFFFF)
    return (total - 2 * 0xFFFF).float() * (3.0**0.5 / 0x10000)


def integers(seed: int, position_B: Tensor, stream: int, counter: int | Tensor,
             bound: int | Tensor) -> Tensor:
    """int64 in [0, bound); ``bound`` (< 2^31) broadcasts against the result."""
    return (_shift_right(bits(seed, position_B, stream, counter), 33) * bound) >> 31


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, shift: int) -> Tensor:
    """Logical shift: int64's own shift copies the sign bit."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MUL1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MUL2)
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    x = (x ^ (x >> 30)) * _MUL1 & _MASK64
    x = (x ^ (x >> 27)) * _MUL2 & _MASK64
    return x ^ (x >> 31)
