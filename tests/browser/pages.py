"""What tests of every page do: go to a view, ask axe-core."""

from __future__ import annotations

from typing import Any


def go(page: Any, view: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=view, exact=True).click()


def findings(page: Any, axe: str) -> list[Any]:
    """What axe-core finds serious or worse, each with the places."""
    page.evaluate(axe)  # not as a script of the page: its policy would rightly refuse that
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        (each["id"], each["impact"], [node["target"] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
