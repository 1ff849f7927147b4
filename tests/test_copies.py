"""Blocks are repeated on purpose; these tests keep the copies alike and the scripts within their form."""

import ast
import itertools
import re
import subprocess
import sys

import pytest

import sync

SCRIPTS = {str(path.relative_to(sync.ROOT)): path.read_text() for path in sync.scripts()}
VARIANTS = [name for name in SCRIPTS if "/" in name]
CAPS = {"sft.py": 450, "rm.py": 440, "dpo.py": 490, "grpo.py": 620, "ppo.py": 720}  # most lines, all told
WIDER = ("trpo", "vapo", "tool_grpo", "tool_sft", "evaluate")  # variants that may have 150 more than their parent


def fields(source: str) -> dict[str, tuple[str, str]]:
    """The fields of Args: annotation, and the comment behind."""
    lines = source.splitlines()
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    return {x.target.id: (ast.unparse(x.annotation), lines[x.lineno - 1].partition("  # ")[2]) for x in body}


def drifted(first: str, second: str) -> list[str]:
    """Names of blocks that two sources share but do not have alike."""
    left, right, own = sync.blocks(first), sync.blocks(second), sync.own(first) | sync.own(second)
    return [name for name in left if name in right and name not in own and left[name][2] != right[name][2]]


def different(variant: str, parent: str) -> set[str]:
    """Names of the blocks that only one of the two has, or that they have differently."""
    left, right = sync.blocks(variant), sync.blocks(parent)
    return {name for name in left | right if left.get(name, "???")[2] != right.get(name, "???")[2]}


@pytest.mark.parametrize("pair", itertools.combinations(SCRIPTS, 2), ids="-".join)
def test_shared_blocks_are_byte_identical(pair):
    assert drifted(SCRIPTS[pair[0]], SCRIPTS[pair[1]]) == []


@pytest.mark.parametrize("pair", itertools.combinations(SCRIPTS, 2), ids="-".join)
def test_fields_of_one_name_have_one_type_and_one_meaning(pair):
    left, right = (fields(SCRIPTS[name]) for name in pair)
    for name in left.keys() & right.keys():
        types = {x[name][0].removesuffix(" | None") for x in (left, right)}  # None: the default depends on the model
        assert len(types) == 1, name
        assert left[name][1].split(";")[0] == right[name][1].split(";")[0], name


@pytest.mark.parametrize("name", SCRIPTS)
def test_form(name):
    """Caps on lines; 35 fields, each with a comment and read; the header; the last lines; no import of a script."""
    source, tree, own = SCRIPTS[name], ast.parse(SCRIPTS[name]), fields(SCRIPTS[name])
    parent = sync.declared(source)
    cap = CAPS[parent[0]] + (150 if name[9:-3] in WIDER else 90) if parent else CAPS[name]
    first, end, _ = sync.blocks(source)["main"]
    assert len(source.splitlines()) <= cap
    assert end - first <= 150
    assert 20 <= tree.body[0].end_lineno - tree.body[0].lineno + 1 <= 40
    assert len(own) <= 35 and all(comment for _, comment in own.values())
    assert not [field for field in own if not re.search(rf"\bargs\.{field}\b", source)]
    assert source.endswith('\n\n\nif __name__ == "__main__":\n    main(tyro.cli(Args))\n')
    imported = {x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
    imported |= {alias.name for x in ast.walk(tree) if isinstance(x, ast.Import) for alias in x.names}
    roots = {module.split(".")[0] for module in imported}
    assert roots <= set(sys.stdlib_module_names) | {"torch", "transformers", "datasets", "tyro", "wandb"}
    pins = re.findall(r'"([a-z]+==[^"]+)"', source.split('"""')[0])
    assert pins == [x for x in (sync.ROOT / "requirements.txt").read_text().split() if not x.startswith("pytest")]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_its_parent_just_where_it_says(name):
    parent, names = sync.declared(SCRIPTS[name])
    assert names == different(SCRIPTS[name], SCRIPTS[parent])


def test_line_counts_of_the_tests():
    """3,500 lines for the five scripts, 350 of them the benchmark."""
    counts = {path.name: len(path.read_text().splitlines()) for path in (sync.ROOT / "tests").glob("*.py")}
    assert sum(counts.values()) <= 3500 + 120 * len(VARIANTS) and counts["benchmark.py"] <= 350


def test_these_checks_can_fail(tmp_path):
    """A changed comment in a copy is drift, and sync mends it; a variant says where it differs; Args, main are free."""
    parent = '"""Parent."""\n\n\nclass Args:\n    x: int = 1\n\n\ndef f(x):\n    return x  # why\n'
    parent += "\n\ndef main(args):\n    f(1)\n"
    copy = parent.replace("# why", "# because").replace("= 1", "= 2").replace("f(1)", "f(2)")
    assert drifted(parent, copy) == ["f"]
    assert sync.renewed(parent, copy, set()) == (copy.replace("# because", "# why"), ["f"])
    assert sync.renewed(parent, copy, {"g"}) == (copy, [])
    variant = copy.replace('"""Parent."""', '"""Variant.\n\nDiffers from parent.py in: Args, main,\nf.\n"""')
    assert sync.declared(variant) == ("parent.py", {"Args", "main", "f"}) == ("parent.py", different(variant, parent))
    assert drifted(parent, variant) == [] and sync.declared(parent) is None
    usage = subprocess.run([sys.executable, sync.__file__], capture_output=True, text=True)
    assert usage.returncode != 0 and "grpo.py generate" in usage.stderr
