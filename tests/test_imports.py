"""The order of the folders: hybridtrain stands on launch, launch on parallel, parallel on kernels; the model
knows no ranks.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "parallel", "launch", "hybridtrain")  # each may import itself and those before it
SEAM = ("common", "component", "exchanges")  # of model/: what parallel reads of it, and nothing else
MOST_LINES = 400


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
    seam = tuple(f"hybridtrain.model.{name}." for name in SEAM) if folder == "parallel" else ()
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
    assert not [
        n
        for n in imports(ROOT / "parallel/layout.py")
        if n.split(".")[0] in ("torch", "numpy", "hybridtrain")
    ]


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
