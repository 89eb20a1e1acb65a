"""A recipe as YAML again, as short as it can be said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import RecipeError
from ..recipe import Recipe, methods_of
from ..training.config import one_line


def recipe_of(stored: Mapping[str, Any]) -> Recipe:
    """The recipe that a record holds.

    Raises:
        RecipeError: It is not one that this version reads.
    """
    try:
        stages = [_named({**stage, "method": _methods(stage["method"])} if stage.get("method") else stage) for stage in stored["stages"]]
        return Recipe.model_validate_json(json.dumps({**stored, "stages": stages}))
    except ValidationError as error:
        raise RecipeError(f"the record's recipe: expected one that this version reads: {one_line(error)}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError("the record's recipe: expected stages, each with its kind and settings, found something else") from error


def is_of(stored: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a record holds this recipe. Hashes do not tell: a record from before an option existed lacks the option's default.

    Args:
        stored: The recipe in a record.
        recipe: The recipe.
    """
    try:
        return recipe_of(stored).sha256 == recipe.sha256
    except RecipeError:
        return False


def to_yaml(recipe: Recipe) -> str:
    """A recipe file that reads as this recipe: what is left out has its default value."""
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    stages = []
    for stage, short in zip(recipe.stages, content["stages"], strict=True):
        methods = methods_of(stage)
        if methods:
            found = short["method"] if isinstance(short["method"], list) else [short["method"]]
            named = [_named({**body, "kind": method.kind}) for method, body in zip(methods, found, strict=True)]
            short["method"] = named if isinstance(short["method"], list) else named[0]
        ((kind, body),) = _named({**short, "kind": stage.kind}).items()
        stages.append({kind: body} if body else kind)
    return yaml.safe_dump({**content, "stages": stages}, sort_keys=False, allow_unicode=True, width=120).strip()


def _methods(found: Any) -> Any:
    """What a stage says about one method or several, with their names outside."""
    return [_named(method) for method in found] if isinstance(found, list) else _named(found)


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    return {config["kind"]: {key: value for key, value in config.items() if key != "kind"}}
