"""The order of the folders: hybridtrain stands on launch, launch on parallel, parallel on kernels; the model
knows no ranks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "parallel", "launch", "hybridtrain")  # each may import itself and those before it
SEAM = ("common", "component", "exchanges", "scan")  # of model/: what parallel reads of it, and nothing else
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60


def sources(folder: str) -> list[Path]:
    """The folder's own modules; hybridtrain holds links to the other three, which are not followed."""
    linked = {link.name for link in (ROOT / folder).iterdir() if link.is_symlink()}
    return [
        p
        for p in sorted((ROOT / folder).rglob("*.py"))
        if p.relative_to(ROOT / folder).parts[0] not in linked
    ]


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, anywhere in it, with what `from` takes out of it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it from hybridtrain on"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def home(module: str) -> str | None:
    """The folder that a module of ours lives in."""
    parts = module.split(".")
    if parts[0] != "hybridtrain":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "hybridtrain"


def test_every_folder_has_sources() -> None:
    assert all(sources(folder) for folder in FOLDERS)
    assert imports(ROOT / "parallel/row_exchange.py") >= {"torch", "hybridtrain.parallel.collectives.Group"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_downwards_only(folder: str) -> None:
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    seam = ("hybridtrain.choices.", *(f"hybridtrain.model.{name}." for name in SEAM))
    seam = seam if folder == "parallel" else ()
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(folder)
        for name in sorted(imports(path))
        if (where := home(name)) is not None and where not in allowed and not name.startswith(seam)
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_top_level_folders_are_no_packages_of_their_own_name(folder: str) -> None:
    wrong = [
        f"{p.relative_to(ROOT)}: {n}"
        for p in sources(folder)
        for n in imports(p)
        if n.split(".")[0] in FOLDERS[:-1]
    ]
    assert wrong == []
    assert (ROOT / folder / "__init__.py").exists() == (folder == "hybridtrain")
    assert folder == "hybridtrain" or (ROOT / "hybridtrain" / folder).readlink() == Path("..") / folder


def test_the_model_knows_no_ranks() -> None:
    barred = ("torch.distributed", "hybridtrain.parallel", "hybridtrain.launch")
    for path in sources("hybridtrain"):
        if path.is_relative_to(ROOT / "hybridtrain/model"):
            assert not [n for n in imports(path) if n.startswith(barred)], path
            assert not [
                n for n in imports(path) if home(n) == "hybridtrain" and n.startswith("hybridtrain.optim")
            ], path


def test_the_layout_needs_no_torch() -> None:
    needed = imports(ROOT / "parallel/layout.py") | imports(ROOT / "hybridtrain/choices.py")
    assert {n for n in needed if n.split(".")[0] in ("torch", "numpy", "hybridtrain")} == {
        "hybridtrain.choices.MemPlacement"
    }


def test_rooms_are_small() -> None:
    lengths = {
        p.relative_to(ROOT): len(p.read_text(encoding="utf-8").splitlines())
        for f in FOLDERS
        for p in sources(f)
    }
    assert {path: lines for path, lines in lengths.items() if lines >= MOST_LINES} == {}


def test_no_module_is_changed_by_the_name_of_an_attribute() -> None:
    """What a module needs of other ranks is an argument of its constructor: a name that is found or replaced
    later would be missed without a word once it changes."""
    names = "forward|attend|scan|convolve|position_in_expert|dispatch"
    changed = re.compile(rf"\b(?:setattr|delattr)\(.*|\bhasattr\((?!os,).*|\w+(?<!self)\.(?:{names}) = .*")
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for folder in FOLDERS
        for path in sources(folder)
        for match in changed.finditer(path.read_text(encoding="utf-8"))
        if '"to_local")' not in match[0]  # asks whether a tensor is cut
    }
    # DeepSpeed marks its parameters so
    assert found == {'parallel/deepspeed.py: hasattr(param, "ds_id"):'}
    assert changed.search("layer.forward = run")
    assert not changed.search("self.dispatch = exchanges.dispatch()")


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder in FOLDERS:
        for path in sources(folder):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "hybridtrain" else ("hybridtrain", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def module_level_imports(statements: list[ast.stmt]) -> Iterator[str]:
    """What is imported when a module is, type checking apart."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from module_level_imports(node.body)
            yield from module_level_imports(node.orelse)
        elif isinstance(node, ast.Try):
            handled = [statement for handler in node.handlers for statement in handler.body]
            yield from module_level_imports([*node.body, *handled, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.With | ast.ClassDef):
            yield from module_level_imports(node.body)


def graph(found: dict[str, str]) -> dict[str, set[str]]:
    """By module, given with its source, the modules that it imports and the packages around these, of those
    given.
    """
    out: dict[str, set[str]] = {}
    for name, source in found.items():
        out[name] = set()
        for module in module_level_imports(ast.parse(source).body):
            while module:  # `import a.b.c` runs a, a.b and a.b.c; those around the module itself run already
                if module in found and not f"{name}.".startswith(f"{module}."):
                    out[name].add(module)
                module = module.rpartition(".")[0]
    return out


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of a circle in the order in which one imports the next; [] where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_circles() -> None:
    found = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    edges = graph(found)
    assert edges["hybridtrain.checkpoint.saved"] >= {"hybridtrain.checkpoint.index", "hybridtrain.errors"}
    assert circle(edges) == []


def test_packages_have_no_circles() -> None:
    """A folder of hybridtrain/ that another one stands on does not import that one, other than for types."""
    packages: dict[str, set[str]] = {}
    edges = graph({n: p.read_text(encoding="utf-8") for n, p in modules().items()})
    for name, others in edges.items():
        package = ".".join(name.split(".")[:2])
        theirs = {".".join(other.split(".")[:2]) for other in others} - {"hybridtrain", package}
        packages.setdefault(package, set()).update(theirs)
    assert "hybridtrain.checkpoint" in packages["hybridtrain.run"]
    # a component's section stands beside its module, and the tree of settings mounts it
    packages["hybridtrain.settings"].remove("hybridtrain.model")
    assert circle(packages) == []


def choices(source: str) -> list[frozenset[str]]:
    """Every `Literal` of several words."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            words = {w.value for w in ast.walk(node.slice) if isinstance(w, ast.Constant)}
            if len(words) > 1 and all(isinstance(word, str) for word in words):
                found.append(frozenset(map(str, words)))
    return found


def test_choices_are_written_once() -> None:
    """Settings and the code that takes their values read the same type. Repeats inside a module do not count:
    each op of [kernels] has its own choices."""
    homes: dict[frozenset[str], set[str]] = {}
    for name, path in modules().items():
        for words in choices(path.read_text(encoding="utf-8")):
            homes.setdefault(words, set()).add(name)
    twice = {words: names for words, names in homes.items() if len(names) > 1}
    theirs = "hybridtrain.formats.megatron_args"  # the words of another project, which happen to be ours
    assert {words: names for words, names in twice.items() if theirs not in names} == {}
    assert choices('x: Literal["a", "b"] = f("c")') == [frozenset("ab")]
    assert choices('Literal["a"], Literal[0, 1]') == []


def test_a_circle_is_noticed() -> None:
    b = "if TYPE_CHECKING:\n    from p.a import x\n"
    assert circle(graph({"p.a": "import p.b", "p.b": b})) == []
    back = "try:\n    from p.a import x\nexcept ImportError:\n    pass\n"
    assert set(circle(graph({"p.a": "from p import b", "p.b": back}))) == {"p.a", "p.b"}
    assert circle(graph({"p.a": "import p.b", "p.b": "def f():\n    import p.a\n"})) == []
    assert circle(graph({"p": "import q.a", "q": "import p.b", "q.a": "", "p.b": ""})) != []


def long_functions(source: str) -> set[str]:
    """The functions of more than MOST_LINES_OF_A_FUNCTION lines."""
    return {
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    }


def test_functions_are_short() -> None:
    """Triton kernels apart, which cannot be cut into functions at no cost."""
    exempt = ("kernel.py", "fp8.py")
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in FOLDERS
        for path in sources(folder)
        if not (folder == "kernels" and path.name.endswith(exempt))
        for name in long_functions(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_a_long_function_is_noticed() -> None:
    body = "    pass\n" * (MOST_LINES_OF_A_FUNCTION - 1)
    assert long_functions(f"def f():\n{body}") == set()
    assert long_functions(f"class A:\n  def f():\n{body}    pass\n") == {"f"}
