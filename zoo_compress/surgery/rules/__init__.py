"""What each ATen operation does to the terms of its operands' dimensions.

A rule is one function, registered under the names of the operations it serves:

    @rule("flip")
    def _flip(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dims: Sequence[int], **_: Any) -> list[Term]: ...

It gets the tracer, the operation's output and the operation's arguments under their names in its schema, unifies what must be equal, and
returns the terms of the output (a list of lists where there are several outputs; a function that gives a list where asking freezes axes).
A dimension that the operation does not read keeps its term; a plain number in its place would drop what ties it to others.

Operations of other libraries are named with theirs (`torchvision::roi_align`). What changes a tensor's shape in place has the rule of the
operation that does not. Operations that torch tags as pointwise need no rule. An operation without a rule freezes every axis it touches.
"""

from . import lookup, norms, pointwise, products, rearrange, reduce  # noqa: F401 - importing registers the rules
from .base import COSTLY, RULES, elementwise, rule
from .products import attention

__all__ = ["COSTLY", "RULES", "attention", "elementwise", "rule"]
