"""The messages of the product as templates, read from its source: what the errors of users' classes say.

An error is known by its class: whatever descends from one of `ROOTS` is shown to a user in the end, and nothing else
is.  Where a function makes its message of what it is given, what is listed is also what its callers give.  What a
message is told while the program runs is shown as `{name}`.
"""

from __future__ import annotations

import ast
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).resolve().parents[2]
SOURCES = [TOP / "src", TOP / "hypervisor", TOP / "agent"]

#: what a user gets to see, of the host, the agent, the library, and the command line's parser
ROOTS = {
    ("vmsandbox.errors", "SandboxError"),
    ("vmsandbox_agent.errors", "AgentError"),
    ("vmsandbox_hypervisor.errors", "HypervisorError"),
    ("argparse", "ArgumentTypeError"),
}
#: where pydantic makes a message of it
_VALIDATED = ("vmsandbox.config.", "vmsandbox.oci.")
#: more ways to say one message than these are not told apart
_MOST_WAYS = 12
_DEEPEST = 4
#: no words of its own
_HANDED_ON = re.compile(r"(\{\w+\}|\{…\})*")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Message:
    module: str
    error: str
    text: str


@dataclass
class _Module:
    name: str
    tree: ast.Module
    #: local name -> (module, name there), of what is imported; modules have no name there
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    constants: dict[str, ast.expr] = field(default_factory=dict)
    functions: dict[str, _Function] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)

    def home(self, value: ast.expr) -> tuple[str, str]:
        """Where what is named was defined: module and name."""
        match value:
            case ast.Name(id=name):
                return self.imported.get(name, (self.name, name))
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                return ".".join(filter(None, self.imported.get(module, (module, "")))), name
        return "", ""


@dataclass
class _Scope:
    """The function that an expression is in, and what its parameters are where they are known."""

    module: _Module
    function: _Function | None
    given: dict[str, list[str]]


def _modules() -> list[_Module]:
    found = []
    for source in SOURCES:
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            if not parts[0].startswith("vmsandbox") or "_pb2" in path.name or "testing" in parts:
                continue
            name = ".".join(parts).removesuffix(".__init__")
            found.append(_read(name, ast.parse(path.read_text())))
    return found


def _read(name: str, tree: ast.Module) -> _Module:
    module = _Module(name, tree)
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(source), names=names):
                for alias in names:
                    module.imported[alias.asname or alias.name] = (source, alias.name)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                module.functions.setdefault(node.name, node)
            case ast.ClassDef():
                module.classes[node.name] = node
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                module.constants[target] = value
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value):
                module.constants[target] = value
    return module


class Reader:
    def __init__(self) -> None:
        self.modules = {module.name: module for module in _modules()}
        self.errors = self._errors()

    def _errors(self) -> dict[tuple[str, str], str]:
        """Every class of errors for users, with the one it descends from that is nearest to it."""
        known = {home: home[1] for home in ROOTS}
        grown = True
        while grown:
            grown = False
            for module in self.modules.values():
                for name, node in module.classes.items():
                    bases = [base for base in map(module.home, node.bases) if base in known]
                    if bases and (module.name, name) not in known:
                        known[module.name, name], grown = name, True
        return known

    # -- what is called, and what is made of it --------------------------------------------------------------------

    def read(self) -> list[Message]:
        found = set()
        for module in self.modules.values():
            for node, function in _inside(module.tree, None):
                if isinstance(node, ast.Call):
                    for error, text in self._made(node, _Scope(module, function, {}), 0):
                        if not _HANDED_ON.fullmatch(text):
                            found.add(Message(module.name, error, text))
        return sorted(found)

    def _made(self, call: ast.Call, scope: _Scope, depth: int) -> list[tuple[str, str]]:
        """The errors that a call makes: itself, or in the function that it calls."""
        home = scope.module.home(call.func)
        if home in self.errors:
            return [(self.errors[home], text) for text in self._message(call, scope)]
        if home == (scope.module.name, "ValueError") and scope.module.name.startswith(_VALIDATED):
            return [("ValueError", text) for text in self._message(call, scope)]
        found = self._function(call, scope.module)
        if found is None or depth >= _DEEPEST:
            return []
        module, function = found
        given = self._given(call, function, scope)
        if not given:
            return []
        made: list[tuple[str, str]] = []
        inner = _Scope(module, function, given)
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and node is not call:
                for error, text in self._made(node, inner, depth + 1):
                    if any(way in text for ways in given.values() for way in ways):
                        made.append((error, text))
        return made

    def _message(self, call: ast.Call, scope: _Scope) -> list[str]:
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if "state" in keywords and "wanted" in keywords and call.args:
            wanted, state = (self._ways(keywords[name], scope) for name in ("wanted", "state"))
            ways = [["cannot "], wanted, [" "], self._ways(call.args[0], scope), [": it is "], state]
            if "remedy" in keywords:
                ways += [[": "], self._ways(keywords["remedy"], scope)]
            return _product(ways)
        if not call.args:
            return []
        return self._ways(call.args[0], scope)

    def _function(self, call: ast.Call, module: _Module) -> tuple[_Module, _Function] | None:
        source, name = module.home(call.func)
        if source in ("self", "cls"):
            source = module.name
        home = self.modules.get(source)
        return (home, home.functions[name]) if home and name in home.functions else None

    def _given(self, call: ast.Call, function: _Function, scope: _Scope) -> dict[str, list[str]]:
        """What the parameters are where the caller gives words."""
        names = [each.arg for each in function.args.posonlyargs + function.args.args]
        if names[:1] in (["self"], ["cls"]):
            names = names[1:]
        pairs = [*zip(names, call.args, strict=False), *((word.arg, word.value) for word in call.keywords if word.arg)]
        return {name: ways for name, value in pairs if (ways := self._words(value, scope))}

    def _words(self, value: ast.expr, scope: _Scope) -> list[str]:
        match value:
            case ast.Constant(value=str(text)):
                return [text] if " " in text else []
            case ast.JoinedStr() | ast.BinOp() | ast.IfExp():
                return [way for way in self._ways(value, scope) if " " in way]
            case ast.Name(id=name) if name in scope.given:
                return scope.given[name]
        return []

    # -- what an expression says -----------------------------------------------------------------------------------

    def _ways(self, value: ast.expr, scope: _Scope, depth: int = 0) -> list[str]:
        match value:
            case ast.Constant(value=text):
                return [str(text)]
            case ast.JoinedStr(values=parts):
                return _product([self._ways(part, scope, depth) for part in parts])
            case ast.FormattedValue(value=inner):
                return self._ways(inner, scope, depth)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return _product([self._ways(left, scope, depth), self._ways(right, scope, depth)])
            case ast.IfExp(body=body, orelse=other):
                return self._ways(body, scope, depth) + self._ways(other, scope, depth)
            case ast.Name(id=name):
                return self._named(name, scope, depth)
        return ["{" + _last(value) + "}"]

    def _named(self, name: str, scope: _Scope, depth: int) -> list[str]:
        if name in scope.given:
            return scope.given[name]
        unknown = ["{" + name + "}"]
        if depth >= _DEEPEST:
            return unknown
        values = [*_assigned(name, scope.function)] if scope.function else []
        if not values and scope.function and name in _parameters(scope.function):
            return unknown
        if not values and name in scope.module.constants:
            values = [scope.module.constants[name]]
        if not values or not all(_is_text(value) for value in values):
            return unknown
        return [way for value in values for way in self._ways(value, scope, depth + 1)][:_MOST_WAYS]


def _parameters(function: _Function) -> set[str]:
    found = function.args
    return {each.arg for each in [*found.posonlyargs, *found.args, *found.kwonlyargs]}


def _is_text(value: ast.expr) -> bool:
    match value:
        case ast.Constant(value=str()) | ast.JoinedStr():
            return True
        case ast.Constant(value=int() | float()):
            return not isinstance(value.value, bool)
        case ast.IfExp(body=body, orelse=other) | ast.BinOp(left=body, op=ast.Add(), right=other):
            return _is_text(body) and _is_text(other)
    return False


def _assigned(name: str, function: ast.AST) -> list[ast.expr]:
    found = []
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                found.append(value)
            case ast.For(target=target) | ast.comprehension(target=target) if name in ast.unparse(target):
                return []
            case ast.AugAssign(target=ast.Name(id=target)) if target == name:
                return []
    return found


def _product(parts: list[list[str]]) -> list[str]:
    return ["".join(way) for way in itertools.islice(itertools.product(*parts), _MOST_WAYS)]


def _last(value: ast.expr) -> str:
    match value:
        case ast.Name(id=name):
            return name
        case ast.Attribute(attr=name):
            return name
        case ast.Call(func=inner) | ast.Subscript(value=inner) | ast.Await(value=inner):
            return _last(inner)
    return "…"


def _inside(node: ast.AST, function: _Function | None) -> Iterator[tuple[ast.AST, _Function | None]]:
    """Every node below one, with the function that it is in."""
    for child in ast.iter_child_nodes(node):
        yield child, function
        inner = child if isinstance(child, _Function) else function
        yield from _inside(child, inner)


def listing() -> str:
    """All messages for people to read, module by module."""
    lines: list[str] = []
    for module, group in itertools.groupby(Reader().read(), key=lambda each: each.module):
        lines += ["", module, *(f"  {each.error}: {each.text}" for each in group)]
    return "\n".join(lines[1:]) + "\n"


if __name__ == "__main__":
    print(listing(), end="")
