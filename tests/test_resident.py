"""README's table of what stays in memory: worked by hand, and counted in runs of the tiny model."""

import gc
import json
import shutil

import pytest
import torch

import benchmark
import dpo
import grpo
import ppo
import rm
import sft
import sync

SCRIPTS = {"sft.py": sft, "rm.py": rm, "dpo.py": dpo, "grpo.py": grpo, "ppo.py": ppo}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models run fastest on one thread, most of all when tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_table_of_seven_billion_parameters_by_hand():
    """7e9 parameters: 28 GB of weights, as much of gradients and 56 GB of Adam's moments, 112 GB trained, 28 frozen.

    ppo.py trains two and keeps two frozen: 2 * 112 + 2 * 28 = 280. dpo.py has freed its reference: 112.
    """
    totals = {name: sum(models.values()) / 1e9 for name, models in benchmark.resident_bytes(7 * 10**9).items()}
    assert totals == {
        "sft.py": 112, "rm.py": 112, "dpo.py": 112, "grpo.py --kl-coef 0": 112, "grpo.py": 140,
        "ppo.py --reward exact": 252, "ppo.py": 280,
    }  # fmt: skip


def test_readme_shows_that_table():
    """README's copy is what the command prints."""
    assert benchmark.resident_table(7.0) in (sync.ROOT / "README.md").read_text()


def parameters() -> list[torch.nn.Parameter]:
    """All that are alive in this process."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is torch.nn.Parameter]


def counted_bytes(run, old: set[int]) -> int:
    """Bytes of the parameters that are not `old`, of their gradients, and of the optimizers' moments."""
    tensors = {}
    for parameter in parameters():
        if id(parameter) not in old:
            for x in (parameter.data, parameter.grad):
                if x is not None:
                    tensors[x.data_ptr()] = x
    for optimizer in run.optimizers.values():
        for state in optimizer.state.values():
            tensors |= {x.data_ptr(): x for x in state.values() if x.dim() > 0}
    return sum(x.numel() * x.element_size() for x in tensors.values())


@pytest.mark.parametrize("command", benchmark.resident_bytes(1))
def test_a_run_holds_what_the_table_says(command, tiny_folder, tmp_path, monkeypatch):
    """In the second update of a run of the tiny model, weights, gradients and moments of all models take the bytes of
    the table, to 1 % (a scalar head has 128 parameters more or less than the other models' output head)."""
    script, *flags = command.split()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft.arithmetic_rows("train", 24)))
    reward_folder = shutil.copytree(tiny_folder, tmp_path / "reward")
    model = rm.load_scorer(tiny_folder, torch.device("cpu"), False, "--model", head_scale=1.0)
    model.save_pretrained(reward_folder)
    num_parameters = model.num_parameters()
    del model
    settings = {"model": tiny_folder, "dataset": f"{tmp_path}/rows.jsonl", "out": str(tmp_path / "out"), "steps": 2}
    settings |= {"eval_size": 4, "eval_every": 100, "save_every": 100, "sample_every": 100}
    if script in ("grpo.py", "ppo.py"):
        reward = "def letters(prompts, completions, rows):\n    return [len(set(x)) / 8 for x in completions]\n"
        (tmp_path / "rewards.py").write_text(reward)
        settings |= {"prompts_per_step": 4, "max_new_tokens": 8, "max_prompt_length": 64}
        settings["reward"] = (f"{tmp_path}/rewards.py:letters",)  # rewards that differ, so that there is a gradient
    else:
        settings |= {"batch_size": 4}
    if script == "ppo.py":
        settings |= {"num_epochs": 1, "num_minibatches": 1}
    if command == "ppo.py":
        settings["reward"] = (str(reward_folder),)
    if "--kl-coef" in flags:
        settings["kl_coef"] = 0.0
    module, counts, old = SCRIPTS[script], [], {id(x) for x in parameters()}
    original = module.Run.update

    def update(run, **rates):
        counts.append(counted_bytes(run, old))
        return original(run, **rates)

    monkeypatch.setattr(module.Run, "update", update)
    module.main(module.Args(**settings))
    assert len(counts) == 2
    assert counts[1] == pytest.approx(sum(benchmark.resident_bytes(num_parameters)[command].values()), rel=0.01)
