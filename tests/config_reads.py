"""Which config keys a program reads, by following names through the source from its main().

A function counts as reachable if a reachable function mentions its name and a module that the
program imports, directly or not, defines it. So the answer has every key that is read, and some
keys whose function is never called.
"""

import ast
import re
from functools import cache
from pathlib import Path

from MaxNano import config_schema

PACKAGE = Path(__file__).resolve().parents[1] / "MaxNano"
CONFIG_MODULES = {"MaxNano.pyconfig", "MaxNano.config_schema", "MaxNano.stage_configs"}
CONFIG_NAMES = {"config", "_config", "saved", "known"}  # variables that hold a config


def _keys_in(node: ast.AST) -> set[str]:
    """The config keys that one node of a syntax tree reads."""
    keys = config_schema.base_keys().keys()
    if isinstance(node, ast.Attribute) and node.attr in keys:
        owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
        return {node.attr} if owner in CONFIG_NAMES else set()
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "_" in node.value:
        return {node.value} & keys
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return {node.slice.value} & keys
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else r"\w+" for v in node.values)
        pattern = "".join(parts)
        is_layout = re.match(r"(ici|dcn)_", pattern)
        return {key for key in keys if is_layout and re.fullmatch(pattern, key)}
    return set()


def _scan(tree: ast.AST) -> tuple[set[str], set[str]]:
    """(names that a piece of source mentions, config keys that it reads)."""
    names, keys = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        keys |= _keys_in(node)
    return names, keys


def _definitions(tree: ast.Module):
    """(name, syntax tree) of functions, methods, classes without methods, and assignments."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                is_method = isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
                is_special = is_method and part.name.startswith("__")
                yield (part.name if is_method and not is_special else node.name), part
            yield from ((node.name, base) for base in node.bases)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.If):
            yield "__main__", node


def _imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@cache
def _package() -> tuple[dict[str, set[str]], dict[str, list]]:
    """(module -> its imports, name -> [(module, names mentioned, keys read)])."""
    imports, definitions = {}, {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("MaxNano", *path.relative_to(PACKAGE).with_suffix("").parts)
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if "templates" in parts or module in CONFIG_MODULES:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports[module] = _imports(tree)
        for name, node in _definitions(tree):
            definitions.setdefault(name, []).append((module, *_scan(node)))
    return imports, definitions


@cache
def keys_read(program: str) -> set[str]:
    """The keys that MaxNano/<program>.py (download: data/download.py) may read outside pyconfig."""
    imports, definitions = _package()
    start = config_schema.module_of(program)
    modules, waiting = set(), {start}
    while waiting:
        module = waiting.pop()
        if module in imports and module not in modules:
            modules.add(module)
            waiting |= imports[module]
    keys, seen, waiting = set(), set(), {"main", "__main__"}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for module, names, read in definitions.get(name, ()):
            if module in modules and (name not in ("main", "__main__") or module == start):
                keys |= read
                waiting |= names - seen
    return keys


def keys_of_config_modules() -> set[str]:
    """The keys that pyconfig itself reads, to derive and check others."""
    sources = [(PACKAGE / f"{name}.py").read_text() for name in ("pyconfig", "stage_configs")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    values = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return values & config_schema.base_keys().keys()
