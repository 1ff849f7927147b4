"""Copies changed functions and classes of one script to all scripts that have one of the same name.

    python tests/sync.py grpo.py                   every shared block of grpo.py
    python tests/sync.py grpo.py generate          that one alone

`Args` and `main` belong to each script, and so does what a variant's header names after `Differs from PARENT in:`.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def scripts() -> list[Path]:
    return [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("variants/*.py")])]


def blocks(source: str) -> dict[str, tuple[int, int, str]]:
    """Top-level functions and classes: first line (from 0, decorators included), the line behind the last, text."""
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)]) - 1
            found[node.name] = (first, node.end_lineno, "".join(lines[first : node.end_lineno]))
    return found


def declared(source: str) -> tuple[str, set[str]] | None:
    """What a variant's header says: its parent, and the names in which it differs."""
    found = re.search(
        r"Differs from (\S+\.py) in:\s*([\w,\s]+?)(?:\.|\n\n)", ast.get_docstring(ast.parse(source)) or ""
    )
    return found and (found[1], set(re.findall(r"\w+", found[2])))


def own(source: str) -> set[str]:
    """Names that a script need not share."""
    return {"Args", "main"} | (declared(source) or ("", set()))[1]


def renewed(source: str, target: str, only: set[str]) -> tuple[str, list[str]]:
    """`target` with its copies of the blocks of `source` (just `only`, if any) renewed, and their names."""
    wanted, lines, changed = blocks(source), target.splitlines(keepends=True), []
    for name, (first, end, text) in reversed(blocks(target).items()):
        shared = name in wanted and name not in own(source) | own(target) and (not only or name in only)
        if shared and wanted[name][2] != text:
            lines[first:end] = [wanted[name][2]]
            changed.append(name)
    return "".join(lines), changed


def main():
    if len(sys.argv) < 2 or not (ROOT / sys.argv[1]).exists():
        sys.exit(__doc__)
    source = (ROOT / sys.argv[1]).read_text()
    for path in scripts():
        text, changed = renewed(source, path.read_text(), set(sys.argv[2:]))
        if changed and path != ROOT / sys.argv[1]:
            path.write_text(text)
            print(f"{path.relative_to(ROOT)}: {', '.join(changed)}")


if __name__ == "__main__":
    main()
