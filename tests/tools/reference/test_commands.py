"""The page of commands has every command and option; a page that is not current is told and written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.reference import __main__ as reference
from tools.reference.commands import option_names, page, subcommands


def test_every_option_is_on_the_page_with_type_default_and_meaning() -> None:
    text = page()
    found = dict(subcommands())
    assert {"train", "kernels report", "reshard"} <= set(found)
    for name, command in found.items():
        section = text.partition(f"\n## hybridtrain {name}\n")[2].partition("\n## ")[0]
        for option in option_names(command) - {"--help"}:
            assert f"`{option}`" in section, f"{name} {option}"
    assert "| `--nproc` | integer >= 1 | `1` | ranks to start on this machine |" in text
    assert "| `--bind`, `--no-bind` | flag | on | " in text
    assert "hybridtrain reshard IN OUT [OVERRIDES...] [OPTIONS]" in text
    assert "| `SOURCES` | strings | " in text


def test_every_parameter_has_a_meaning() -> None:
    assert not [line for line in page().splitlines() if line.startswith("| `") and line.endswith("|  |")]


def test_a_page_that_is_not_current_is_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["reference"])
    reference.main()
    assert "commands.md, settings.md" in capsys.readouterr().out
    (tmp_path / "settings.md").write_text("# Settings\n")
    monkeypatch.setattr("sys.argv", ["reference", "--check"])
    with pytest.raises(SystemExit, match="1"):
        reference.main()
    assert capsys.readouterr().err == "not current: settings.md; run: python -m tools.reference\n"
    assert reference.write(tmp_path) == ["settings.md"]
    reference.main()
