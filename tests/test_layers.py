"""The shape of the code: which way imports point, how large things are, what may stand nowhere."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "weft"
PATHS = sorted(ROOT.rglob("*.py"))
FILES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf8") for path in PATHS}
TREES = {name: ast.parse(text) for name, text in FILES.items()}

PLUGINS = ("algorithms", "transforms", "adapters", "tasks", "data", "samplers", "paces")
SMALL = {"signals": 0, "fingerprints": 1, "files": 1, "identity": 1, "secure": 2}
LEVEL = {"core": 0, **SMALL, **dict.fromkeys(PLUGINS, 2), "site": 3, "links": 4}
"""Part of weft -> its level; an import may point to a lower level or stay in its own part. All else is the top."""
TOP = 5
CORE_ALONE = "core imports torch, the standard library and itself"
SILENT = ("watch.py",)
"""Files whose functions do nothing on purpose: what watches a run overrides what it shows."""
FORBIDDEN = {
    "pickle": r"\bpickle\b(?!d)",
    "torch.load": r"\btorch\.load\b",
    "eval(": r"(?<![\w.])eval\(",
    "exec(": r"(?<![\w.])exec\(",
    "trust_remote_code": r"trust_remote_code\s*[=:]\s*(?!False)",
}
VAGUE = ("utils", "util", "base", "manager", "helper", "helpers", "handler")


# --- which way imports point


def part_of(module: str) -> str:
    """Return the part of weft that a module belongs to: weft.core.types -> core."""
    return module.split(".")[1] if "." in module else module


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every module that is imported at run time, those inside functions too, `TYPE_CHECKING` ones not."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        for below in tree.orelse:
            yield from imports(below)
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        if tree.level:
            yield "." * tree.level
        elif tree.module == "weft":
            yield from (f"weft.{alias.name}" for alias in tree.names)
        else:
            yield tree.module or ""
    for below in ast.iter_child_nodes(tree):
        yield from imports(below)


def wrong_arrows(file: str, tree: ast.AST) -> list[str]:
    """Name each import of a file (core/types.py) that points the wrong way."""
    part = file.split("/")[0].removesuffix(".py")
    level, wrong = LEVEL.get(part, TOP), []
    for module in imports(tree):
        outside = module.split(".")[0] != "weft"
        target = part_of(module)
        if module.startswith("."):
            wrong.append(f"{file} imports {module}: write the whole name")
        elif outside:
            if part == "core" and module.split(".")[0] not in {*sys.stdlib_module_names, "torch"}:
                wrong.append(f"{file} -> {module}: {CORE_ALONE}")
        elif part in PLUGINS and target not in (part, "core"):
            wrong.append(f"{file} -> {module}: a plug-in imports core and its own folder")
        elif target != part and LEVEL.get(target, TOP) >= level and level < TOP:
            wrong.append(f"{file} -> {module}: {part} is below {target} or beside it")
    return wrong


def test_imports_point_down() -> None:
    assert [arrow for file, tree in TREES.items() for arrow in wrong_arrows(file, tree)] == []


@pytest.mark.parametrize(
    ("file", "text", "arrow"),
    [
        ("core/round.py", "import numpy as np", "core/round.py -> numpy: core imports torch"),
        ("core/round.py", "def f():\n    from pydantic import Field", "core/round.py -> pydantic"),
        ("core/sums.py", "from weft.transforms.weigh import weigh", "core is below transforms"),
        ("core/sums.py", "from weft.files import write_safely", "core is below files or beside it"),
        ("tasks/causal_lm.py", "from weft.data.records import Record", "a plug-in imports core and its own folder"),
        ("site/site.py", "from weft.links import wire", "site/site.py -> weft.links: site is below links"),
        ("links/local.py", "from weft import plugins", "links/local.py -> weft.plugins: links is below plugins"),
        ("data/by.py", "from weft import plugins", "data/by.py -> weft.plugins: a plug-in imports core"),
        ("data/by.py", "from weft.files import sync_folder", "a plug-in imports core"),
        ("core/sums.py", "from . import types", "write the whole name"),
        ("files.py", "import weft.store", "files is below store"),
    ],
)
def test_an_arrow_back_is_named(file: str, text: str, arrow: str) -> None:
    (found,) = wrong_arrows(file, ast.parse(text))
    assert arrow in found


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/round.py", "import hashlib, torch\nfrom torch import nn\nfrom weft.core import trees"),
        ("core/types.py", "if TYPE_CHECKING:\n    from weft.site.site import Site"),
        ("tasks/causal_lm.py", "from weft.tasks.prompts import Piece\nfrom weft.core.types import Task"),
        ("files.py", "from weft.core.errors import RunError"),
        ("site/memory.py", "from weft.files import write_safely\nimport numpy"),
        ("links/local.py", "from weft.site.site import Site"),
        ("cli.py", "from weft import runs, job"),
    ],
)
def test_an_arrow_down_is_allowed(file: str, text: str) -> None:
    assert wrong_arrows(file, ast.parse(text)) == []


# --- sizes

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(function: Function) -> int:
    """Return the lines of a function without those of its docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    own = (function.end_lineno or 0) - function.lineno + 1
    return own - ((docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0)


def long_files(texts: dict[str, str]) -> list[str]:
    return [f"{name}: {len(text.splitlines())} lines" for name, text in texts.items() if text.count("\n") > 400]


def long_functions(tree: ast.AST) -> list[str]:
    return [node.name for node in functions(tree) if length(node) >= 40]


def positional(function: Function) -> int:
    """Count the parameters that a call may give without a name."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def is_plugin(file: str, function: Function) -> bool:
    """Tell whether a function makes a plug-in: its parameters are keys of a job, always given by name."""
    folder, _, name = file.partition("/")
    return folder in PLUGINS and name == f"{function.name}.py"


def test_no_file_is_long() -> None:
    assert long_files(FILES) == []


def test_nearly_all_functions_are_short() -> None:
    every = sum(1 for tree in TREES.values() for _ in functions(tree))
    found = [f"{file}: {name}" for file, tree in TREES.items() for name in long_functions(tree)]
    assert len(found) <= 0.05 * every, found


def test_nearly_all_functions_take_few_positional_parameters() -> None:
    """Three kinds take more and may: keys of a plug-in, options of a command, a signature of another library."""
    every = [(file, node) for file, tree in TREES.items() for node in functions(tree) if not is_plugin(file, node)]
    found = [f"{file}: {node.name} takes {positional(node)}" for file, node in every if positional(node) > 4]
    assert len(found) <= 0.05 * len(every), found


def test_sizes_are_measured() -> None:
    short, long = (f"def f():\n    '''Say.\n\n    more\n    '''\n{'    x = 1' + chr(10)}" * n for n in (1, 401))
    assert long_files({"a.py": short}) == []
    assert long_files({"b.py": long}) == ["b.py: 2406 lines"]
    body = "    x = 1\n"
    assert long_functions(ast.parse(f"def f():\n    'Say.'\n{body * 38}")) == []
    assert long_functions(ast.parse(f"def g():\n    'Say.'\n{body * 39}")) == ["g"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("def f(a, b, /, c, d=1, *, e): return a", 4),
        ("def f(self, a, b, c, d): return a", 4),
        ("def f(a, b, c, d, e): return a", 5),
        ("def f(*rows, **more): return 1", 0),
    ],
)
def test_positional_parameters_are_counted(text: str, count: int) -> None:
    assert [positional(node) for node in functions(ast.parse(text))] == [count]


# --- names and words


def empty(tree: ast.AST) -> list[str]:
    """Name the functions that do nothing, but those of a Protocol and those that only carry a command's options."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    protocols = [node for node in classes if "Protocol" in map(ast.unparse, node.bases)]
    promised = {id(node) for protocol in protocols for node in functions(protocol)}
    rest = [node for node in functions(tree) if id(node) not in promised and not _is_callback(node)]
    return [node.name for node in rest if _does_nothing(node)]


def _is_callback(function: Function) -> bool:
    return any(ast.unparse(line).endswith(".callback()") for line in function.decorator_list)


def _does_nothing(function: Function) -> bool:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return all(isinstance(line, ast.Pass) or ast.unparse(line) in ("...", "return None", "return") for line in body)


def forbidden(text: str) -> list[str]:
    """Return the words that no file may hold; comments and docstrings may."""
    code = ast.unparse(_without_docstrings(ast.parse(text)))
    return [word for word, pattern in FORBIDDEN.items() if re.search(pattern, code)]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _is_text(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def vague(file: str) -> bool:
    return Path(file).stem.lower().strip("_") in VAGUE


def test_no_file_has_a_vague_name() -> None:
    assert [file for file in FILES if vague(file)] == []
    assert vague("core/utils.py")
    assert vague("_base.py")
    assert not vague("core/sums.py")


@pytest.mark.parametrize("file", sorted(set(FILES) - set(SILENT)))
def test_no_function_is_empty(file: str) -> None:
    assert empty(TREES[file]) == []


def test_an_empty_function_is_named() -> None:
    text = '''
class Link(Protocol):
    def ask(self): """Ask."""
@app.callback()
def options(version): pass
def a(): pass
def b(): """Say."""
def c():
    """Say."""
    ...
def d(): return 1
def e(): return None
'''
    assert empty(ast.parse(text)) == ["a", "b", "c", "e"]


@pytest.mark.parametrize("file", FILES)
def test_no_file_runs_what_it_reads(file: str) -> None:
    assert forbidden(FILES[file]) == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("x = torch.load('f')", "torch.load"),
        ("eval('1')", "eval("),
        ("exec('1')", "exec("),
        ("load(p, trust_remote_code=True)", "trust_remote_code"),
        ("load(p, trust_remote_code=flag)", "trust_remote_code"),
    ],
)
def test_a_forbidden_word_is_found(text: str, word: str) -> None:
    assert forbidden(text) == [word]


@pytest.mark.parametrize(
    "text",
    [
        '"""No pickle here."""',
        "net.eval()\nengine.exec(1)",
        "x = 'only pickled weights'",
        "load(p, trust_remote_code=False)",
        "# eval(\nx = 1",
    ],
)
def test_a_word_that_looks_alike_is_not(text: str) -> None:
    assert forbidden(text) == []
