"""Plumbing is repeated on purpose; these tests keep the copies alike and the scripts within their form."""

import ast
import itertools
import re

import pytest

import sync

SCRIPTS = {str(path.relative_to(sync.ROOT)): path.read_text() for path in sync.scripts()}
TOP_LEVEL = [name for name in SCRIPTS if "/" not in name]
VARIANTS = [name for name in SCRIPTS if "/" in name]
PLUMBING = f"# {'-' * 108} plumbing"
# Most lines from the header to the end of main, and of the plumbing below it. Caps, not targets.
BUDGETS = {"sft.py": 769, "rm.py": 540, "dpo.py": 960, "grpo.py": 1039, "ppo.py": 1216}
PLUMBING_BUDGET = 623


def fields(source: str) -> dict[str, tuple[str, str]]:
    """Fields of Args: annotation and the help text that follows."""
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    found = {}
    for node, following in itertools.zip_longest(body, body[1:]):
        if isinstance(node, ast.AnnAssign):
            text = following.value.value if isinstance(getattr(following, "value", None), ast.Constant) else ""
            found[node.target.id] = (ast.unparse(node.annotation), text)
    return found


def drifted(first: str, second: str) -> list[str]:
    """Names of blocks that two sources share but do not have alike."""
    own = sync.own_names(first) | sync.own_names(second)
    left, right = sync.blocks(first), sync.blocks(second)
    return [name for name in left if name in right and name not in own and left[name][2] != right[name][2]]


def different(variant: str, parent: str) -> set[str]:
    """Names of the blocks that only one of the two has, or that they have differently."""
    left, right = sync.blocks(variant), sync.blocks(parent)
    return {name for name in left | right if left.get(name, (0, 0, ""))[2] != right.get(name, (0, 0, ""))[2]}


def depth(node: ast.AST, level: int = 0) -> int:
    """How deeply loops, conditions and contexts are nested below `node`."""
    nests = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    return max([level] + [depth(child, level + isinstance(child, nests)) for child in ast.iter_child_nodes(node)])


@pytest.mark.parametrize("pair", itertools.combinations(SCRIPTS, 2), ids="-".join)
def test_shared_blocks_are_byte_identical(pair):
    assert drifted(SCRIPTS[pair[0]], SCRIPTS[pair[1]]) == []


@pytest.mark.parametrize("pair", itertools.combinations(SCRIPTS, 2), ids="-".join)
def test_fields_of_one_name_have_one_type_and_one_help_text(pair):
    left, right = fields(SCRIPTS[pair[0]]), fields(SCRIPTS[pair[1]])
    assert {name: left[name] for name in left if name in right} == {name: right[name] for name in left if name in right}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_has_a_help_text_and_is_read(name):
    source = SCRIPTS[name]
    assert len(fields(source)) <= 51
    for field, (_, text) in fields(source).items():
        assert text, f"{field} has no help text"
        assert re.search(rf"\bargs\.{field}\b", source), f"{field} is never read"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_no_other(name):
    stems = {path.stem for path in sync.scripts()} | {"tests", "variants"}
    for node in ast.walk(ast.parse(SCRIPTS[name])):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {module.split(".")[0] for module in modules} & stems


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_its_parent_just_where_it_says(name):
    parent, names = sync.declared(SCRIPTS[name])
    assert names == different(SCRIPTS[name], SCRIPTS[parent])


@pytest.mark.parametrize("name", SCRIPTS)
def test_form_and_line_budgets(name):
    source = SCRIPTS[name]
    tree, lines = ast.parse(source), source.splitlines()
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    parent = sync.declared(source)
    budget = BUDGETS[parent[0]] + 60 if parent else BUDGETS[name]
    plumbing = lines.index(PLUMBING)
    assert tree.body[0].end_lineno - tree.body[0].lineno + 1 <= 45, "header"
    assert main.end_lineno <= budget, "from the header to the end of main"
    assert plumbing > main.end_lineno and len(lines) - plumbing <= PLUMBING_BUDGET, "plumbing"
    assert main.end_lineno - main.lineno + 1 <= 160, "main"
    assert depth(main) <= 4
    assert not [node for node in ast.walk(main) if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not main]
    assert lines[-2:] == ['if __name__ == "__main__":', "    main(tyro.cli(Args))"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_metadata_pins_what_requirements_pin(name):
    pins = re.findall(r'"([a-z]+==[^"]+)"', SCRIPTS[name].split('"""')[0])
    wanted = [line for line in (sync.ROOT / "requirements.txt").read_text().split() if not line.startswith("pytest")]
    assert pins == wanted


def test_these_checks_can_fail():
    """A changed comment in a copy is drift and sync mends it; a variant says where it differs; Args, main are free."""
    parent = (
        '"""Parent."""\n\n\nclass Args:\n    x = 1\n\n\ndef f(x):\n    return x  # why\n\n\ndef main(args):\n    f(1)\n'
    )
    copy = parent.replace("# why", "# because").replace("x = 1", "x = 2").replace("f(1)", "f(2)")
    assert drifted(parent, copy) == ["f"]
    assert sync.replace_blocks(parent, copy, set()) == (copy.replace("# because", "# why"), ["f"])
    assert sync.replace_blocks(parent, copy, {"g"}) == (copy, [])
    variant = copy.replace('"""Parent."""', '"""Variant.\n\nDiffers from parent.py in: Args, main,\n    f\n"""')
    assert sync.declared(variant) == ("parent.py", {"Args", "main", "f"}) == ("parent.py", different(variant, parent))
    assert drifted(parent, variant) == []
    assert sync.declared(parent) is None
    nested = "for a in b:\n  if a:\n    with c:\n      while d:\n        pass"
    assert depth(ast.parse(nested)) == 4
