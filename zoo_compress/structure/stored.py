"""Types of what stored records hold: every string and number that may come from a file has a form and a bound."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

MAX_SIZE = 2**31 - 1
MAX_ENTRIES = 65_536
MAX_TERM = 4096

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+$", max_length=128)]
AxisName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
Path = Annotated[str, StringConstraints(min_length=1, max_length=512)]
TermText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TERM)]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Width = Annotated[float, Field(gt=0, le=1)]
"""A fraction of every axis that can change."""
