"""The scripts really learn: shrunken runs on the built-in task move the true accuracy; a negated reward lowers it."""

import pytest

import dpo
import grpo
import ppo
import rm

SHRUNKEN = {"steps": 45, "lr_schedule": "constant", "eval_size": 200, "eval_every": 1000}


@pytest.fixture(scope="module")
def grpo_metrics(sft_run, tmp_path_factory):
    """A shrunken run of grpo.py from the shrunken run of sft.py."""
    out = tmp_path_factory.mktemp("learning") / "grpo"
    return grpo.main(grpo.Args(model=sft_run[0], out=str(out), **SHRUNKEN))


def test_sft_learns_the_task(sft_run):
    """Random weights answer nothing; after 500 steps three in ten samples are right, and the loss is far below the
    start's ln 261 = 5.56 nats."""
    metrics = sft_run[1]
    assert metrics["before/accuracy_sampled"] < 0.02
    assert metrics["before/loss"] > 5
    assert metrics["eval/accuracy_sampled"] > 0.3
    assert metrics["eval/loss"] < 0.3


def test_imitation_keeps_the_demonstrators_habit(sft_run):
    """Adding 7 goes wrong in 60 % of the demonstrations, so even greedy decoding cannot reach 0.85."""
    assert sft_run[1]["eval/accuracy_greedy"] < 0.85


def test_grpo_raises_sampled_and_greedy_accuracy(grpo_metrics):
    """The reward removes what imitation learnt: 45 steps raise both by more than the noise of 200 prompts, whose
    standard deviation is below sqrt(0.25 / 200) = 0.036."""
    assert grpo_metrics["eval/accuracy_sampled"] > grpo_metrics["before/accuracy_sampled"] + 0.08
    assert grpo_metrics["eval/accuracy_greedy"] > grpo_metrics["before/accuracy_greedy"] + 0.08


def test_a_negated_reward_lowers_accuracy(sft_run, tmp_path):
    """The control: nothing but the reward tells right from wrong. 15 steps are enough to unlearn it."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "import grpo\n\n\ndef negated(prompts, completions, rows):\n"
        "    return [-grpo.exact_match(c, row['answer']) for c, row in zip(completions, rows)]\n"
    )
    changes = {**SHRUNKEN, "steps": 15, "reward": (f"{rewards}:negated",)}
    metrics = grpo.main(grpo.Args(model=sft_run[0], out=str(tmp_path / "out"), **changes))
    assert metrics["eval/accuracy_sampled"] < metrics["before/accuracy_sampled"] - 0.08


def test_a_reward_model_tells_right_from_wrong_on_held_out_pairs(sft_run, tmp_path):
    """Half of the pairs at the start; after 220 steps three in five, the longer side winning less than half of them.

    The standard deviation of an accuracy over 400 pairs is below sqrt(0.25 / 400) = 0.025.
    """
    args = rm.Args(model=sft_run[0], out=str(tmp_path / "out"), steps=220, eval_size=400, eval_every=1000)
    metrics = rm.main(args)
    assert 0.4 < metrics["before/pair_accuracy"] < 0.6
    assert metrics["eval/pair_accuracy"] > 0.6 > metrics["eval/longer_wins"] + 0.05
    assert metrics["eval/margin"] > 0 and metrics["eval/loss"] < metrics["before/loss"]


def test_dpo_raises_sampled_and_greedy_accuracy(sft_run, tmp_path):
    """50 steps on pairs raise both, on the same 200 prompts and draws; the policy prefers the chosen side."""
    args = dpo.Args(model=sft_run[0], out=str(tmp_path / "out"), steps=50, eval_size=200, eval_every=1000)
    metrics = dpo.main(args)
    assert metrics["before/pair_accuracy"] == 0.5 and metrics["eval/pair_accuracy"] > 0.8
    assert metrics["eval/accuracy_sampled"] > metrics["before/accuracy_sampled"] + 0.06
    assert metrics["eval/accuracy_greedy"] > metrics["before/accuracy_greedy"] + 0.05


def ppo_metrics(model: str, out: str, steps: int, **changes) -> dict:
    """A shrunken run of ppo.py: two epochs of two minibatches for each rollout."""
    shrunken = {"steps": steps, "num_epochs": 2, "num_minibatches": 2, "warmup_steps": 4, "lr": 3e-4}
    shrunken |= {"adam_beta2": 0.99, "lr_schedule": "constant", "eval_size": 200}
    return ppo.main(ppo.Args(model=model, out=out, reward=("exact",), **shrunken, **changes))


def test_ppo_raises_sampled_and_greedy_accuracy(sft_run, tmp_path):
    """Twelve rollouts with the verifier raise both, on the same 200 prompts and draws."""
    metrics = ppo_metrics(sft_run[0], str(tmp_path / "out"), steps=12)
    assert metrics["eval/accuracy_sampled"] > metrics["before/accuracy_sampled"] + 0.05
    assert metrics["eval/accuracy_greedy"] > metrics["before/accuracy_greedy"] + 0.02


def test_ppo_with_a_negated_reward_lowers_accuracy(sft_run, tmp_path):
    """The control: seven such rollouts with the reward's sign turned."""
    metrics = ppo_metrics(sft_run[0], str(tmp_path / "out"), steps=7, reward_weights=(-1.0,))
    assert metrics["eval/accuracy_sampled"] < metrics["before/accuracy_sampled"] - 0.08
