"""Copies shared blocks from one script to all others that have them, so that a fix reaches every copy.

    python tests/sync.py grpo.py                        every function and class that grpo.py shares with another script
    python tests/sync.py grpo.py generate Run           only these
    python tests/sync.py grpo.py --check                changes nothing; lists what differs and exits with 1

A block is a top-level function or class, decorators and comments inside it included. `Args` and `main` are not shared,
nor is, in a variant, any name after `Differs from PARENT.py in:` in its header.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = {"Args", "main"}


def scripts() -> list[Path]:
    """Every script: the algorithms at the top level and the variants."""
    return sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("variants/*.py"))


def blocks(source: str) -> dict[str, tuple[int, int, str]]:
    """Top-level functions and classes by name: first line (from 0), line after the last, text."""
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            found[node.name] = (first, node.end_lineno, "".join(lines[first : node.end_lineno]))
    return found


def declared(source: str) -> tuple[str, set[str]] | None:
    """What a variant's header says of itself: its parent's file name and the blocks in which it differs."""
    match = re.search(
        r"^Differs from (\S+\.py) in: ([^\n]*(?:\n {4}[^\n]*)*)", ast.get_docstring(ast.parse(source)) or "", re.M
    )
    return (match[1], set(re.findall(r"\w+", match[2]))) if match else None


def own_names(source: str) -> set[str]:
    """Names of the blocks that a script does not share."""
    header = declared(source)
    return OWN | (header[1] if header else set())


def replace_blocks(source: str, target: str, only: set[str]) -> tuple[str, list[str]]:
    """`target` with its copies of the blocks of `source` (just `only`, unless empty) renewed, and their names."""
    wanted, changed = blocks(source), []
    lines = target.splitlines(keepends=True)
    for name, (first, end, text) in reversed(blocks(target).items()):
        shared = name in wanted and name not in own_names(source) | own_names(target) and (not only or name in only)
        if shared and wanted[name][2] != text:
            lines[first:end] = [wanted[name][2]]
            changed.append(name)
    return "".join(lines), changed[::-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="the script whose blocks are right, such as grpo.py")
    parser.add_argument("names", nargs="*", help="functions or classes; default: all that are shared")
    parser.add_argument("--check", action="store_true", help="change nothing, only list what differs")
    options = parser.parse_args()
    source_path = (ROOT / options.script).resolve()
    if source_path not in scripts():
        sys.exit(f"{options.script} is not one of {', '.join(str(path.relative_to(ROOT)) for path in scripts())}")
    source = source_path.read_text()
    unknown = set(options.names) - set(blocks(source))
    if unknown:
        sys.exit(f"{options.script} has no {', '.join(sorted(unknown))}")
    differs = False
    for path in scripts():
        text, changed = replace_blocks(source, path.read_text(), set(options.names))
        if path != source_path and changed:
            differs = True
            print(f"{path.relative_to(ROOT)}: {', '.join(changed)}")
            if not options.check:
                path.write_text(text)
    sys.exit(1 if differs and options.check else 0)


if __name__ == "__main__":
    main()
