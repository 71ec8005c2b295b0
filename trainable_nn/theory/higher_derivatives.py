"""More constants of activations: sup |phi'''|, a Lipschitz constant of phi'', and sup |phi| where it is finite.

With them a bound of the curvature at a point holds beside it: |phi''(z + h)| <= |phi''(z)| + jerk |h|. Where phi''
jumps (softsign, elu) jerk is infinite. Each is rounded up at the ninth digit; the tests recompute them.
"""



JERKS = {
    "softplus": 0.0962250449,  # 1 / (6 sqrt 3)
    "softplus0": 0.0962250449,
    "tanh": 2.0,
    "sigmoid": 0.125,
    "gelu": 0.778769636,  # |z| (4 - z^2) times the normal density, at z^2 = (7 - sqrt 33) / 2
    "gelu_tanh": 0.776691451,
    "gelu1": 0.689845670,
    "silu": 0.308181516,
    "silu1": 0.280205946,
    "mish": 0.588412045,
    "erf1": 2.0,
    "arctan": 2.0,
    "isru": 3.0,
    "smooth_relu": 0.429325052,  # C3 / 2
}
LARGEST_VALUES = {"tanh": 1.0, "sigmoid": 1.0, "erf1": 0.886226926, "arctan": 1.570796327, "isru": 1.0}
LARGEST_VALUES["softsign"] = 1.0
