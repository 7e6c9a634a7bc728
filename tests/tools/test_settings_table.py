"""docs/settings.md is what the settings' definitions say."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridtrain.settings.tree import Settings
from tools.settings_table import describe_type, main

ROOT = Path(__file__).parents[2]


def test_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert capsys.readouterr().out == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), (
        "run: python tools/settings_table.py > docs/settings.md"
    )


def test_types_and_bounds_in_words() -> None:
    fields = {name: field.annotation.model_fields for name, field in Settings.model_fields.items()}  # type: ignore[union-attr]
    assert describe_type(fields["train"]["steps"]) == "integer >= 1"
    assert describe_type(fields["optim"]["beta1"]) == "number >= 0 and <= 1"
    assert describe_type(fields["engram"]["orders"]) == "list of integers >= 1"
    assert describe_type(fields["optim"]["schedule"]) == '`"cosine"` or `"wsd"`'
    assert describe_type(fields["run"]["dir"]) == "string not empty"
