"""Reading a recipe: TOML, then overrides, then what stages inherit, then validation, with errors in the recipe's terms.

`[defaults]` holds any key of a stage; each `[[stage]]` inherits what it does not set. Overrides are `key.path=value`, with
a stage, an eval set or a list entry chosen by name or index: `stage.math.lr=1e-5`. Unknown keys are errors that name the
nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rlpost.config import Recipe, RecipeError, StageConfig, Table


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, validate.

    Raises:
        RecipeError: naming every wrong key at once.
    """
    return build_recipe(read_tree(path, "recipe"), overrides)


def read_tree(path: Path, kind: str) -> dict[str, Any]:
    """The parsed file.

    Raises:
        RecipeError: there is none, or it is not TOML.
    """
    if not path.is_file():
        raise RecipeError(f"no {kind} at {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error


def build_recipe(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """As `load_recipe`, from the parsed file."""
    raw = override_tree(tree, overrides)
    defaults = raw.pop("defaults", {})
    if not isinstance(defaults, dict):
        raise RecipeError(f"defaults = {defaults!r} is a value, not a table of stage keys")
    unknown = set(defaults) - set(StageConfig.model_fields)
    if unknown:
        raise RecipeError("\n".join(_unknown_key(f"defaults.{key}", key, StageConfig) for key in sorted(unknown)))
    if isinstance(raw.get("stage"), list):
        raw["stage"] = [_inherit(defaults, stage) if isinstance(stage, dict) else stage for stage in raw["stage"]]
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(problem) for problem in error.errors())) from None


def override_tree(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy with each key.path=value in its place."""
    raw: dict[str, Any] = _thaw(tree)
    for override in overrides:
        _apply_override(raw, override)
    return raw


def _inherit(defaults: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """The stage over the defaults; `algo` merges key by key unless the stage names another algorithm."""
    merged = {**defaults, **stage}
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if key in stage and other not in stage:
            merged.pop(other, None)
    default_algo, algo = defaults.get("algo"), stage.get("algo")
    if isinstance(default_algo, dict) and isinstance(algo, dict):
        name = default_algo.get("name")
        if algo.get("name", name) == name:
            merged["algo"] = {**default_algo, **algo}
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r} is not of the form key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = path.strip().split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        node = _child(node, key, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        raise RecipeError(f"override {override!r}: say which entry of the list, then which key of it")
    if not isinstance(node, dict):
        raise RecipeError(f"override {override!r}: {'.'.join(parents)} is a value, not a table")
    node[last] = value


def _child(node: Any, key: str, where: str) -> Any:
    if isinstance(node, dict):
        return node.setdefault(key, {})
    if isinstance(node, list):
        for index, entry in enumerate(node):
            if key == str(index) or (isinstance(entry, dict) and entry.get("name") == key):
                return entry
        names = [entry.get("name") if isinstance(entry, dict) else entry for entry in node]
        raise RecipeError(f"{where}: no such entry; there are {names}")
    raise RecipeError(f"{where} is a value, not a table")


def _thaw(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _thaw(value) for key, value in node.items()}
    return [_thaw(value) for value in node] if isinstance(node, list) else node


def explain(problem: Any, table: type[BaseModel] = Table) -> str:
    """One line for one of pydantic's errors, in the file's own terms.

    Args:
        table: the file's keys are those of the tables that derive from it.
    """
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown_key(location, str(problem["loc"][-1]), *_tables(table))
    if problem["type"] == "missing":
        return f"{location}: this key is required"
    given = problem["input"]
    shown = f" (got {given!r})" if not isinstance(given, dict | list | tuple | BaseModel) else ""
    return f"{location or 'recipe'}: {problem['msg'].removeprefix('Value error, ')}{shown}"


def _unknown_key(location: str, key: str, *tables: type[BaseModel]) -> str:
    known = sorted({name for table in tables for name in table.model_fields})
    if key in known:
        return f"{location}: {key!r} is a key of other tables and has no meaning in this one: leave it out"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if key in known:
        return f"{location}: {key!r} is a key of other tables and has no meaning in this one: leave it out"
    return f"{location}: no such key" + (f"; did you mean {close[0]!r}?" if close else f"; known keys: {known}")


def _tables(table: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Every table a recipe can hold: `table` and all that derive from it."""
    yield table
    for derived in table.__subclasses__():
        yield from _tables(derived)
