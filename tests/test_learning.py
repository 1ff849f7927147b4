"""The scripts really learn: short runs on the built-in task move the true accuracy; a negated reward lowers it.

The standard deviation of an accuracy over 300 prompts is below sqrt(.25 / 300) = .029.
"""

import pytest

import dpo
import grpo
import ppo
import rm
from conftest import VARIANTS, known

SHORT = {"eval_size": 300, "eval_every": 0, "save_every": 0, "lr_schedule": "constant", "warmup_steps": 10}
NEGATED = "import grpo\ndef f(rows, texts): return [-grpo.exact_match(x, row['answer']) for x, row in zip(texts, rows)]"

OWN = {  # what short runs of a variant need
    "off_policy_grpo": {"steps": 4, "warmup_steps": 2},
    "ppo_vtrace": {"warmup_steps": 15},  # with a shorter one it is unstable at first
    "trpo": {"steps": 8},
    "vapo": {"value_warmup": 2},
}
APART = ("ppo_ensemble",)  # needs reward models: see compare.py


def change(script, folder, out, **changes):
    """What a short run changes: metrics after it, less those before."""
    metrics = script.main(script.Args(model=folder, out=str(out), **(SHORT | changes)))
    first = script.json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return {key: x - first[key] for key, x in metrics.items() if key in first and key != "step"} | {"last": metrics}


def test_imitation_learns_the_task_with_its_mistakes(sft_run):
    """From nothing at all; the habit of adding 7 wrongly is there in greedy decoding too."""
    metrics = sft_run[1]
    assert metrics["eval/loss"] < 0.3
    assert 0.3 < metrics["eval/accuracy_sampled"] < 0.75 and metrics["eval/accuracy_greedy"] < 0.85


@pytest.mark.parametrize(("script", "changes"), [(grpo, {"steps": 24}), (ppo, {"steps": 14, "reward": "exact"})])
def test_a_verifier_removes_mistakes_and_a_negated_one_adds_them(script, changes, sft_run, tmp_path):
    found = change(script, sft_run[0], tmp_path / "up", **changes)
    assert found["eval/accuracy_sampled"] > 0.1 and found["eval/accuracy_greedy"] > 0.06
    (tmp_path / "r.py").write_text(NEGATED)
    found = change(script, sft_run[0], tmp_path / "down", **{**changes, "steps": 10, "reward": f"{tmp_path}/r.py:f"})
    assert found["eval/accuracy_sampled"] < -0.1


@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if hasattr(VARIANTS[name].Args, "steps") and name not in APART]
)
def test_variants_remove_mistakes(name, sft_run, tmp_path):
    """Ten steps of each; fewer where a step has several updates."""
    changes = {"steps": 10, "warmup_steps": 6, "reward": "exact"}
    found = change(VARIANTS[name], sft_run[0], tmp_path / "out", **known(name, changes | OWN.get(name, {})))
    assert found["eval/accuracy_sampled"] > 0.05


def test_dpo_removes_mistakes(sft_run, tmp_path):
    found = change(dpo, sft_run[0], tmp_path / "out", steps=40)
    assert found["eval/pair_accuracy"] > 0.2 and found["last"]["eval/margin"] > 0
    assert found["eval/accuracy_sampled"] > 0.08 and found["eval/accuracy_greedy"] > 0.08


def test_a_reward_model_learns_more_than_length(sft_run, tmp_path):
    found = change(rm, sft_run[0], tmp_path / "out", steps=220)
    assert found["eval/pair_accuracy"] > 0.15 and found["eval/loss"] < -0.05
    assert found["last"]["eval/pair_accuracy"] > found["last"]["eval/longer_wins"] + 0.1
