"""Checks of a JSON schema before it is compiled to a grammar: its depth, and whether it has an end."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

MAX_DEPTH = 64  # objects and lists inside each other
MAX_ROUNDS = 50  # over the references of a schema


def check_depth(schema: Any) -> None:
    """Raise ValueError, in one line, for a schema that is nested too deeply."""
    level = [schema]
    for _ in range(MAX_DEPTH + 1):
        level = [child for value in level for child in _children(value)]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def check_end(schema: Any) -> None:
    """Raise ValueError, in one line, for a schema that only endless values satisfy.

    Time is bounded by the size of the schema times MAX_ROUNDS.
    """
    if not _has_end(schema):
        raise ValueError(
            "it requires itself without an end: make a property optional or permit null"
        )


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _has_end(schema: Any) -> bool:
    """Whether a finite value may satisfy a schema: the least fixed point over its references.

    True wherever that is not certain, and for what is invalid, which the compiler reports.
    """
    targets = {ref: _resolve(schema, ref) for ref in _references(schema)}
    ended: set[str] = {ref for ref, target in targets.items() if target is None}
    open_refs = [ref for ref in targets if ref not in ended]
    for _ in range(MAX_ROUNDS):
        count = len(ended)
        for ref in open_refs:
            if _is_finite(targets[ref], ended):
                ended.add(ref)
        if len(ended) == count:
            return _is_finite(schema, ended)
        # Chains of references end after two rounds, in whichever order they are written.
        open_refs = [ref for ref in reversed(open_refs) if ref not in ended]
    return True


def _references(schema: Any) -> set[str]:
    """The references within the schema, such as #/$defs/node."""
    references, level = set(), [schema]
    while level:
        for value in level:
            ref = value.get("$ref") if isinstance(value, dict) else None
            if isinstance(ref, str) and ref.startswith("#"):
                references.add(ref)
        level = [child for value in level for child in _children(value)]
    return references


def _resolve(schema: Any, ref: str) -> Any:
    """What a reference refers to, None if there is no such part."""
    names = ref[1:].split("/")
    if names[0]:
        return None  # an anchor
    for name in names[1:]:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list):
            schema = dict(enumerate(schema)).get(int(name) if name.isdecimal() else -1)
        else:
            schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


def _is_finite(schema: Any, ended: set[str]) -> bool:
    """Whether a finite value satisfies a schema if one does of the references in `ended` only."""
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return True
    ref = schema.get("$ref")
    if isinstance(ref, str) and ref.startswith("#") and ref not in ended:
        return False
    if not all(_is_finite(part, ended) for part in _list(schema, "allOf")):
        return False
    for key in ("anyOf", "oneOf"):
        options = _list(schema, key)
        if options and not any(_is_finite(option, ended) for option in options):
            return False
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    needed = {"object": _required_parts, "array": _required_items}
    return any(
        kind not in ("object", "array") or all(_is_finite(x, ended) for x in needed[kind](schema))
        for kind in types
    )


def _required_parts(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas of the properties that an object must have."""
    properties = schema.get("properties")
    for name in _list(schema, "required"):
        if isinstance(properties, dict) and isinstance(name, str) and name in properties:
            yield properties[name]
        elif "patternProperties" not in schema:
            yield schema.get("additionalProperties")


def _required_items(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas of the items that a list must have, each once."""
    least, first = schema.get("minItems"), _list(schema, "prefixItems")
    least = least if isinstance(least, int) else 0
    yield from first[: max(0, least)]
    if least > len(first):
        yield schema.get("items")


def _list(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []
