# SPDX-License-Identifier: Apache-2.0
"""What a rule of your own may be written with; import it from here.

* ``+ - *`` and calls of `divide` and `sqrt`; ``0.0 - x`` for a negation;
* ``where(a < b, this, that)``, whose condition is one comparison (``< <= > >= == !=``);
* `maximum`, `minimum`, `absolute`, `sign`, and functions of your own written in the same way;
* assignments to plain names, ``a, b = function(...)``, ``for _ in range(3):``, one ``return``;
* literals that float32 holds exactly: 0.5, not 0.1 (pass such a number to the optimizer).

`integer_power`, `power`, `exp` and `log` are for a ``prepare`` or a turn, which run in float64; a
sweep over elements is refused with them. Everything else is refused when the rule is decorated,
with its file and line (`RuleError`): ``/``, ``**``, ``abs``, ``if``, ``and`` and calls of other
libraries do not mean the same, to the last bit, everywhere.

Example:
    >>> from pyupdate.language import absolute, divide, maximum, sign, where
    >>> absolute(-3.0), divide(1.0, 0.0), maximum(2.0, 5.0), sign(-0.5), where(1.0 > 2.0, 3.0, 4.0)
    (3.0, inf, 5.0, -1.0, 4.0)
"""

from .kernels.language import (
    RuleError,
    absolute,
    divide,
    maximum,
    minimum,
    sign,
    sqrt,
    where,
)
from .kernels.own import rule
from .kernels.scalar import exp, integer_power, log, power

__all__ = [
    "RuleError",
    "absolute",
    "divide",
    "exp",
    "integer_power",
    "log",
    "maximum",
    "minimum",
    "power",
    "rule",
    "sign",
    "sqrt",
    "where",
]
