"""What a layer states of itself: bounds of its value, its derivatives and their Lipschitz constants on a set.

All are of a map f(theta, Z), in Euclidean norms of the flattened arguments: J = df/dZ, D = df/dtheta, the second
derivatives as bilinear maps. Where f is only C^1 with a Lipschitz derivative, they are Lipschitz constants.

Source: paper A, section 1.2 of THEORY_PAPERS and Proposition 4.3; II.2.7 for the names a, b, c.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Regularity:
    """Upper bounds, and one lower bound, of one layer on a stated set.

    value: sup ||f||.  J: sup ||df/dZ||.  D: sup ||df/dtheta||.  a: sup ||d2f/dZ2||.  b: sup ||d2f/dtheta dZ||.
    c: sup ||d2f/dtheta2||.  J_lower: inf of the smallest singular value of J over the output side, J J^T.
    """

    value: float
    J: float
    D: float = 0.0
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    J_lower: float = 0.0

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if not number >= 0.0:  # NaN too
                raise ValueError(f"Regularity: {name} must be a number of at least 0 or infinity, got {number}.")
        if math.isinf(self.J_lower):
            raise ValueError("Regularity: J_lower is a lower bound and must be finite, got infinity. Use 0 if unknown.")
