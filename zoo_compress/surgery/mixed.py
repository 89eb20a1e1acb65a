"""Classes made at run time, of a model's own class and one that adds to it, whose instances can be pickled and copied all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Made = tuple[Callable[[type, type], type], type, type]
"""The function that made a class, and what of: the class that adds, and the model's own, which may be made in turn."""


class Mixed:
    """Base of classes that add to a model's own. A class made of one says of what in `_made`; a pickle names that, and no class made."""

    _made: Made

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_empty, (_parts(type(self)),), *reduced[2:])


def _parts(cls: type) -> Any:
    """A class, or of a made one the function, the class that adds and the parts of the model's own."""
    made = vars(cls).get("_made")
    return cls if made is None else (made[0], made[1], _parts(made[2]))


def _empty(parts: Any) -> Any:
    """An instance without contents of the class that these parts make."""

    def whole(parts: Any) -> type:
        return parts if isinstance(parts, type) else parts[0](parts[1], whole(parts[2]))

    cls: Any = whole(parts)
    return cls.__new__(cls)
