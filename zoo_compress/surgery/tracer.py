"""State of one analysis: what is known of every tensor's dimensions while the model runs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import ne
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..structure import unify as u
from ..structure.terms import Term, concat, factors, product
from ..structure.unify import Variable
from .scales import Scales, Use
from .sizes import Computed, Setting, Size, origins, sides

MODEL_ERRORS = (Exception,)
"""What a model may raise when it is called in a way it does not take: some have classes of errors of their own."""


class Tracer:
    """Knows the term of every dimension of every tensor met so far, and collects links and costs.

    Attributes:
        links: Pairs of terms whose sizes must stay equal.
        costs: One term per convolution or matrix product, whose size is its number of multiply-accumulates for the whole batch.
        fused_costs: The same for the two products inside `scaled_dot_product_attention`.
        shared_costs: Those of `costs` whose operands do not come from the image: relative positions put through an MLP, latent queries.
        scales: What numbers scaled, and which attributes are attention's own scale.
        mixed: Dimensions along which elements influence each other.
        reduced: Dimensions that a sum, mean, maximum or the like has taken away.
        unknown: Operations that no rule knew and that froze an axis.
        modules: Stack of (path, module) being run.
        born: Uniform dimensions made so far.
        seen: Identities of the tensors that operations have met.
        loose: By identity, tensors that operations have made and none has read since.
        untrained: Why the model does not run in training mode, if it does not.
        met: Size → the terms of that size that dimensions had so far.
        kernel_sides: Dimensions of convolution kernels that lie along the image; their sizes have nothing to do with the input's.
        groups: The number of groups of the latest grouped operation, for the function rule that knows where the number came from.
        hashable: Whether numbers computed from sizes may be keys. What a cache gives for one depends on what ran before, so at first not.
        calls: The torch functions that the model called, with the numbers it gave them; see `unseen.call`.
        listening: Whether calls are those of the model's forward pass.
        running: How many torch functions that the model called are running, one within the other.
        stated: The plain numbers that the running function was given, if it has no handler.
        accounted: Identity of a number that a function was given → how often its handler knew what it means.
    """

    def __init__(self) -> None:
        self.links: list[tuple[Term, Term]] = []
        self.costs: list[Term] = []
        self.fused_costs: list[Term] = []
        self.shared_costs: list[Term] = []
        self.scales = Scales()
        self.mixed: list[Term] = []
        self.reduced: list[Term] = []
        self.outputs: list[list[Term]] = []
        self.unknown: Counter[str] = Counter()
        self.untrained: str | None = None
        self.modules: list[tuple[str, torch.nn.Module]] = []
        self.operation = ""
        self.groups: Term = 1
        self.seen: set[int] = set()
        self.loose: dict[int, torch.Tensor] = {}
        self.met: dict[int, dict[Term, None]] = {}
        self.quiet = False
        self._storages: dict[int, list[weakref.ref[torch.Tensor]]] = {}
        self.born: list[Variable] = []
        self.kernel_sides: set[Variable] = set()
        self.hashable = False
        self.calls: list[tuple[str, tuple[float | None, ...]]] = []
        self.listening = False
        self.running = 0
        self.stated: list[int] = []
        self.accounted: Counter[int] = Counter()
        self._kept: dict[Any, tuple[tuple[Term, ...], str, Callable[[], bool] | None]] = {}
        self._sizes_known = False

    @property
    def where(self) -> str:
        """Where the model is now, for messages."""
        path = self.modules[-1][0] if self.modules else ""
        return f"{path}: {self.operation}" if path else self.operation

    def dims(self, tensor: torch.Tensor) -> list[Term]:
        """One term per dimension of a tensor; of a tensor that nothing is known of, its sizes as plain numbers."""
        known = getattr(tensor, "_zc_dims", None)
        if callable(known):
            self.set(tensor, known())
            return self.dims(tensor)
        if known is None or len(known) != tensor.ndim or any(map(ne, map(u.size_of, known), tensor.shape)):
            known = self._of_storage(tensor)
        return list(known)

    def set(self, tensor: torch.Tensor, terms: Sequence[Term]) -> None:
        """Record the terms of a tensor's dimensions."""
        shape = tuple(int(n) for n in tensor.shape)
        sizes = tuple(u.size_of(t) for t in terms)
        if sizes != shape:
            raise AssertionError(f"{self.where}: rule gave sizes {sizes} for a tensor of shape {shape}")
        tensor._zc_dims = tuple(terms)  # type: ignore[attr-defined]
        for size, term in zip(sizes, terms, strict=True):
            if not isinstance(term, int):
                self.met.setdefault(size, {})[term] = None
        sharing = self._storages.setdefault(_storage(tensor), [])
        sharing[:] = [ref for ref in sharing if ref() is not None]
        sharing.append(weakref.ref(tensor))

    def _of_storage(self, tensor: torch.Tensor) -> Sequence[Term]:
        """The terms of a tensor that no operation made: another object for a tensor that is known (`as_subclass`, `nn.Parameter(x)`), or
        one from outside. Another object for other elements of a known one freezes that."""
        alike = [other for ref in self._storages.get(_storage(tensor), ()) if (other := ref()) is not None and other is not tensor]
        for other in alike:
            if _place(other) == _place(tensor):
                self.set(tensor, self.dims(other))
                return self.dims(tensor)
        self.freeze_all(alike, f"{self.where} reads its memory as another tensor, which cannot be traced")
        return [int(n) for n in tensor.shape]

    def set_constant(self, tensor: torch.Tensor) -> None:
        """Record that no axis runs along a tensor."""
        self.set(tensor, [int(n) for n in tensor.shape])

    def set_alike(self, tensor: torch.Tensor) -> None:
        """Remember that all elements of a new tensor are alike."""
        tensor._zc_alike = True  # type: ignore[attr-defined]

    @staticmethod
    def is_alike(tensor: torch.Tensor) -> bool:
        """Whether all elements of a tensor are known to be alike: zeros that nothing was written into."""
        return hasattr(tensor, "_zc_alike")

    def written(self, values: Any) -> None:
        """Something was written into a tensor: its elements, and those of all that share its memory, need not be alike any more."""
        for leaf in tree_leaves(values):
            for ref in self._storages.get(_storage(leaf), ()) if isinstance(leaf, torch.Tensor) else ():
                if (other := ref()) is not None and self.is_alike(other):
                    del other._zc_alike  # type: ignore[attr-defined]

    @staticmethod
    def waits(tensor: torch.Tensor) -> bool:
        """Whether the terms of a tensor's dimensions are worked out only when something uses it."""
        return callable(getattr(tensor, "_zc_dims", None))

    def set_when_asked(self, tensor: torch.Tensor, terms: Callable[[], Sequence[Term]]) -> None:
        """Have the terms of a tensor's dimensions worked out when something first uses it: many never are, and they cost axes."""
        tensor._zc_dims = terms  # type: ignore[attr-defined]

    def give(self, tensor: torch.Tensor, terms: Sequence[Term] | Callable[[], Sequence[Term]]) -> None:
        """Record what an operation made of a tensor. One that was there before, into which it wrote, holds the same elements under either
        name."""
        known = getattr(tensor, "_zc_dims", None)
        if callable(terms):
            if known is None:
                return self.set_when_asked(tensor, terms)
            terms = terms()
        known = known() if callable(known) else known
        if known is not None and tuple(map(u.size_of, known)) == tuple(tensor.shape):  # else it was resized
            for old, new in zip(known, terms, strict=True):
                self.unify(old, new)
        self.set(tensor, terms)

    def hand_on(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """Another tensor holds the same elements."""
        for name in ("_zc_dims", "_zc_image"):
            if hasattr(tensor, name):
                setattr(other, name, getattr(tensor, name))

    def forget(self, tensor: torch.Tensor) -> None:
        """A tensor has got another shape: what was known of its dimensions does not hold any more."""
        if hasattr(tensor, "_zc_dims"):
            del tensor._zc_dims

    def is_constant(self, tensor: torch.Tensor) -> bool:
        """Whether no axis is known to run along the tensor."""
        return all(isinstance(u.resolve(t), int) for t in self.dims(tensor))

    @staticmethod
    def is_image(tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed from the image."""
        return hasattr(tensor, "_zc_image")

    @staticmethod
    def mark_image(tensor: torch.Tensor) -> None:
        """Remember that a tensor was computed from the image."""
        tensor._zc_image = True  # type: ignore[attr-defined]

    @contextmanager
    def sizes_known(self) -> Iterator[None]:
        """Within, sizes that regroup or cut dimensions are accounted for by the caller."""
        before, self._sizes_known = self._sizes_known, True
        try:
            yield
        finally:
            self._sizes_known = before

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Within, operations run without rules: the caller knows what the whole of them does."""
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within, operations follow their rules but cost nothing: they are not part of the model's forward pass."""
        kept = len(self.costs), len(self.fused_costs), len(self.shared_costs), len(self.mixed), self.unknown.copy()
        try:
            yield
        finally:
            del self.costs[kept[0] :], self.fused_costs[kept[1] :], self.shared_costs[kept[2] :], self.mixed[kept[3] :]
            self.unknown = kept[4]

    def unify(self, a: Term, b: Term) -> None:
        """Two dimensions hold the same elements."""
        u.unify(a, b, f"{self.where} with a fixed size of {u.size_of(a)}" if _fixed(a) or _fixed(b) else self.where)

    def group(self, number: int) -> Term:
        """The number of groups of an operation. Where the caller doesn't account for it, it is a number of the code's and stays."""
        self.groups = Variable(number, hint="g", piece=True) if number > 1 and self._sizes_known else int(number)
        return self.groups

    def uniform(self, size: int) -> Variable:
        """A new dimension along which all elements are alike: it may become whatever it meets."""
        variable = Variable(size, piece=True)
        variable.uniform = True
        self.born.append(variable)
        return variable

    def settle(self, before: int) -> None:
        """A function whose sizes nobody accounts for has ended: dimensions it made up and did not match with others keep their size."""
        for variable in self.born[before:]:
            if variable.bound is None:
                variable.bound = variable.size

    def regroup(self, terms: list[Term], sizes: Sequence[int]) -> list[Term]:
        """What `view` does to dimensions. Axes split by sizes of unknown origin are frozen."""
        return self._restructure(terms, lambda: u.regroup(terms, list(sizes), self.where))

    def slices(self, term: Term, sizes: Sequence[int]) -> list[Term]:
        """Consecutive parts of a dimension. Axes cut by sizes of unknown origin are frozen."""
        return self._restructure([term], lambda: u.slices(term, list(sizes), self.where))

    def _restructure(self, terms: list[Term], work: Any) -> list[Term]:
        before = [u.resolve(t) for t in terms]
        out = work()
        if not self._sizes_known and before != [u.resolve(t) for t in terms]:
            for term in terms:
                u.freeze(term, f"{self.where} splits it by sizes that cannot be traced")
        return out

    def meet(self, size: int, term: Term) -> None:
        """The code says that a dimension `term` has this size; remember where the number came from."""
        term = u.resolve(term)
        self.account(size)
        if isinstance(size, Size):
            less, over = u.resolve(size.less), u.resolve(size.over)
            self.link(u.resolve(size.term), concat(product(over, term), less))
        elif isinstance(size, Computed):
            self.keep((term, *origins(size)), f"{self.operation} cuts or shapes it by a number that the model's code computes")
        elif size != -1:
            u.fix(term, f"{self.where} writes its size as the number {int(size)}")

    def account(self, number: Any) -> None:
        """The handler of the running function knows what one of the numbers means that the function was given."""
        self.accounted[id(number)] += 1

    def equal(self, a: Size, b: Size) -> None:
        """The model's own code has found two sizes equal, and goes on as it does because they are."""
        self.link(*sides(a, b))

    def combine(self, setting: Setting) -> None:
        """A module's float attribute goes into arithmetic, where it cannot be followed."""
        self.scales.uses.append(Use(setting))

    def keep(self, terms: Sequence[Term], reason: str, unless: Callable[[], bool] | None = None) -> None:
        """Sizes may not change, because of what became of numbers computed from them.

        Args:
            terms: The sizes.
            reason: In words a user can read.
            unless: What is asked when all is known; if it holds, the sizes may change after all.
        """
        varying = tuple(term for term in terms if not isinstance(term, int))
        if varying and not self.quiet:
            path = self.modules[-1][0] if self.modules else ""
            key = (varying, reason) if unless is None else object()
            self._kept.setdefault(key, (varying, f"{path}: {reason}" if path else reason, unless))

    def settle_numbers(self) -> None:
        """Freeze the sizes that have to be kept. Call this when the terms of all attributes are known."""
        self.scales.settle(self)
        for terms, reason, unless in self._kept.values():
            if any(map(u.is_free, terms)) and not (unless is not None and unless()):
                for term in terms:
                    u.freeze(term, reason)

    def link(self, a: Term, b: Term) -> None:
        """Two sizes are equal. An attribute not seen before simply is the other side; what holds by itself is not kept."""
        a, b = cancelled(u.resolve(a), u.resolve(b))
        if _unknown_attribute(b):
            a, b = b, a
        if a == b:
            return
        if isinstance(a, Variable) and _unknown_attribute(a):
            if a.frozen is not None:
                u.freeze(b, a.frozen)
            a.bound = b
        else:
            self.links.append((a, b))

    def always_equal(self, a: Term, b: Term) -> bool:
        """Whether two sizes are equal at any choice of widths, as they are written or by a link."""
        pair = cancelled(u.resolve(a), u.resolve(b))
        linked = (cancelled(u.resolve(left), u.resolve(right)) for left, right in self.links)
        return pair[0] == pair[1] or any(pair in (link, link[::-1]) for link in linked)

    def adopt(self, size: int, variable: Term) -> None:
        """A dimension whose elements are all alike takes its structure from where its size came."""
        variable = u.resolve(variable)
        if isinstance(variable, Variable) and isinstance(size, Size) and u.resolve(size.less) == 0 and u.resolve(size.over) == 1:
            found = u.resolve(size.term)
            if not (isinstance(found, Variable) and found.attribute is not None):
                variable.bound = found
                self.account(size)
                return
        self.meet(size, variable)

    def read_size(self, size: int, term: Term) -> int:
        """A size read from a tensor, tagged with the term of its dimension."""
        return size if _fixed(term) else Size(size, term)

    def freeze_all(self, values: Any, reason: str) -> bool:
        """Freeze every axis of every tensor in a tree of values; True if there was one that was free."""
        found = False
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                found |= self.freeze(self.dims(leaf), reason)
        return found

    @staticmethod
    def freeze(terms: Iterable[Term], reason: str) -> bool:
        """Freeze every axis of these terms; True if there was one that was free."""
        found = False
        for term in terms:
            found |= u.is_free(term)
            u.freeze(term, reason)
        return found


def _storage(tensor: torch.Tensor) -> int:
    """Identity of the memory a tensor reads, with data or without; of one that has no single memory, such as a sparse one, its own."""
    try:
        with torch._C.DisableTorchFunction():  # nothing that the model does
            return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Which elements of its memory a tensor reads."""
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def named_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, each tensor once."""
    return [*model.named_parameters(), *model.named_buffers()]


def cancelled(a: Term, b: Term) -> tuple[Term, Term]:
    """Two sizes that are equal, without the factors they share."""
    left, right = list(factors(a)), list(factors(b))
    for factor in factors(a):
        if factor in right:
            left.remove(factor)
            right.remove(factor)
    return product(*left), product(*right)


def _unknown_attribute(term: Term) -> bool:
    return isinstance(term, Variable) and term.attribute is not None and term.bound is None


def _fixed(term: Term) -> bool:
    return isinstance(u.resolve(term), int)
