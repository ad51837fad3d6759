"""docs/compatibility.md lists what the suite tests. Oracle: the suite's own families, features and limits."""

from __future__ import annotations

from pathlib import Path

from tests.matrix.document import cells, standing
from tests.matrix.families import FAMILIES
from tests.matrix.features import FEATURES

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
STALE = "docs/compatibility.md is stale: run `make compat`"


def test_the_page_has_every_family_and_feature_as_the_suite_has_them() -> None:
    listed = {(family, feature): result for family, feature, result in cells(PAGE.read_text(encoding="utf-8"))}
    wanted = {(family.name, feature.name): standing(family, feature) for family in FAMILIES for feature in FEATURES}
    missing = {cell for cell, result in wanted.items() if result != "–"} - set(listed)
    assert not missing, STALE
    assert not set(listed) - set(wanted), STALE
    for cell, result in listed.items():
        if wanted[cell] == "exact":
            assert float(result) >= 0, f"{cell}: {STALE}"
        else:
            assert result == wanted[cell], f"{cell}: {STALE}"
