"""The table of what a resume does with each setting, in docs/resuming.md, which the sections of settings say."""

from __future__ import annotations

import re
from pathlib import Path

from framebridge_plugin.recipe.schema import recipe_settings
from framebridge_plugin.settings.choices import ALLOWABLE, ANEW, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "resuming.md"
_TABLE = re.compile(r"(<!-- kinds of settings: [^\n]*-->\n).*(<!-- end -->)", re.DOTALL)

NAMES = {ANEW: "applied anew", **{name: f"`--allow {name}`: {what}" for name, what in ALLOWABLE.items()}}
NAMES[REFUSED] = "refused"


def written_page() -> str:
    kinds = [(section.resume_kind(name), path) for path, section, name in recipe_settings()]
    rows = [
        f"| {title} | {', '.join(f'`{path}`' for kind, path in kinds if kind == wanted)} |\n"
        for wanted, title in NAMES.items()
    ]
    table = "".join(["| kind | settings |\n|---|---|\n", *rows])
    return _TABLE.sub(lambda match: match[1] + table + match[2], PAGE.read_text(encoding="utf-8"))


def test_the_documentation_has_the_kind_of_every_setting():
    assert PAGE.read_text(encoding="utf-8") == written_page()


def test_every_setting_has_one_of_the_kinds():
    kinds = {section.resume_kind(name) for _, section, name in recipe_settings()}
    assert kinds == {ANEW, REFUSED, *ALLOWABLE}
    # Each name that a section says is one of its own settings.
    for _, section, _ in recipe_settings():
        for part in section.__mro__:
            if "on_resume" in part.__dict__:
                assert part.on_resume[1].keys() <= part.__annotations__.keys()


if __name__ == "__main__":
    PAGE.write_text(written_page(), encoding="utf-8")
