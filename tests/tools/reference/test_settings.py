"""The types of settings in the words of docs/reference/settings.md, and their dotted names."""

from __future__ import annotations

from typing import Any

from hybridtrain.settings.tree import Settings
from tools.reference.settings import describe_type, names


def test_types_and_bounds_in_words() -> None:
    sections: dict[str, Any] = {name: field.annotation for name, field in Settings.model_fields.items()}
    fields = {name: section.model_fields for name, section in sections.items()}
    assert describe_type(fields["train"]["steps"]) == "integer >= 1"
    assert describe_type(fields["optim"]["beta1"]) == "number >= 0 and <= 1"
    assert describe_type(fields["engram"]["orders"]) == "list of integers >= 1"
    assert describe_type(fields["optim"]["schedule"]) == '`"cosine"` or `"wsd"`'
    assert describe_type(fields["run"]["dir"]) == "string not empty"


def test_names_are_dotted_and_say_what_is_a_section() -> None:
    found = names()
    assert found["model.moe"]
    assert not found["model.moe.top_k"]
    assert "moe.top_k" not in found
    assert len(found) > 100
