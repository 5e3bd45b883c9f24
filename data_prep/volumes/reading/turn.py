"""Turns that a user states for a scan whose affine names its axes wrongly.

A turn is three letters: where the directions that the header calls right, anterior and superior
really point.  LPS undoes an affine that was written in LPS coordinates (ITK, DICOM) and is read as
RAS; LAS exchanges left and right; RAS says that the header was looked at and is right.
"""

from __future__ import annotations

import numpy as np

AS_STATED = "RAS"
WORDS = {"L": "left", "R": "right", "P": "posterior", "A": "anterior", "I": "inferior",
         "S": "superior"}
_PAIRS = ("LR", "PA", "IS")


def turn_of(matrix: np.ndarray) -> str:
    """The name of a signed permutation [3, 3], header directions to true ones."""
    axes = np.abs(matrix).argmax(axis=0)
    return "".join(_PAIRS[axis][int(matrix[axis, column] > 0)] for column, axis in enumerate(axes))


def turn_matrix(turn: str) -> np.ndarray:
    """[4, 4], header mm to true mm.

    Raises
    ------
    ValueError
        No three letters, one of each pair L R, P A, I S.
    """
    axes = [next((axis for axis, pair in enumerate(_PAIRS) if letter in pair), -1)
            for letter in turn]
    if sorted(axes) != [0, 1, 2]:
        raise ValueError(f"{turn!r} is no turn: three letters are expected, one of each pair L R, "
                         "P A and I S, such as LPS")
    matrix = np.eye(4)
    matrix[:3, :3] = 0
    for column, (axis, letter) in enumerate(zip(axes, turn, strict=True)):
        matrix[axis, column] = 1 if letter == _PAIRS[axis][1] else -1
    return matrix
