"""Whole runs on tiny models: the folders that they write, the truth of the metrics, NaN, reward models, tracking."""

import json
import math
import random
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import grpo
import sft

SCRIPTS = {"sft": sft, "grpo": grpo}
BOTH = pytest.mark.parametrize("name", ["sft", "grpo"])
CPU = torch.device("cpu")

REWARDS = """
def letters(prompts, completions, rows):
    return [len(set(completion)) / 8 for completion in completions]

def long(prompts, completions, rows):
    return [1.0 if len(completion) >= 7 else 0.0 for completion in completions]

def some(prompts, completions, rows):
    return [float(prompt[0] in "02468" and len(completion) > 6) for prompt, completion in zip(prompts, completions)]

def constant(prompts, completions, rows):
    return [1.0 for row in rows]
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models run fastest on one thread, most of all when tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Leaves the handlers of the test process as they are, whatever a run does to them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with 40 rows of the built-in task, 40 in the notation of GSM8K, 40 conversations, and rewards."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    rows = sft.arithmetic_rows("train", 40)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "gsm8k.jsonl", "w") as file:
        for _ in range(40):
            name, a, b = rng.choice(["Ann", "Bob", "Cem"]), rng.randrange(2, 2000), rng.randrange(2, 9)
            question = f"{name} has {a:,} apples and buys {b} times as many. How many apples does {name} have now?"
            steps = f"{name} buys {a}*{b}=<<{a}*{b}={a * b}>>{a * b} apples.\n"
            answer = f"{steps}So there are {a}+{a * b}=<<{a}+{a * b}={a + a * b}>>{a + a * b}.\n#### {a + a * b:,}"
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    with open(folder / "messages.jsonl", "w") as file:
        for row in rows:
            turns = [("user", row["prompt"]), ("assistant", row["completion"]), ("user", "and?"), ("assistant", "done")]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def settings(name: str, data: Path, tiny_folder: str, out: Path, **changes) -> dict:
    """A run of two small steps, with `changes`."""
    same = {"dataset": f"{data}/rows.jsonl", "out": str(out), "steps": 2, "eval_size": 8, "eval_every": 100}
    same |= {"save_every": 100, "sample_every": 1, "max_new_tokens": 8, "warmup_steps": 0}
    own = {"batch_size": 4, "max_length": 200}
    if name == "grpo":
        own = {"model": tiny_folder, "prompts_per_step": 4, "group_size": 2, "max_prompt_length": 64}
        own |= {"reward": (f"{data}/rewards.py:letters",)}
    return {**same, **own, **changes}


def run(name: str, data: Path, tiny_folder: str, out: Path, **changes) -> dict:
    """One run; what main returns."""
    return SCRIPTS[name].main(SCRIPTS[name].Args(**settings(name, data, tiny_folder, out, **changes)))


def metrics_of(out: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    """The weights of a folder, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def numbers(row: dict) -> list[float]:
    """All values of a row of metrics."""
    return [value for value in row.values() if isinstance(value, (int, float))]


@pytest.fixture(scope="module")
def runs(data, tiny_folder, tmp_path_factory):
    """Two steps of each script: name -> (folder, what main returned)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    finished = {}
    for name in SCRIPTS:
        folder = tmp_path_factory.mktemp("runs") / name
        finished[name] = folder, run(name, data, tiny_folder, folder)
    for number, handler in before.items():
        signal.signal(number, handler)
    return finished


# -------------------------------------------------------------------------------------------------- the folder at --out


@BOTH
def test_the_written_folder_loads_and_generates(name, runs):
    """AutoModelForCausalLM and AutoTokenizer read it without missing or surplus weights; it has a chat template and
    generates by model.generate, and ends at the tokenizer's EOS at the latest."""
    folder = runs[name][0]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == "<|pad|>"
    messages = [{"role": "user", "content": "7+5="}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(inputs["input_ids"][0]) == "<|user|>7+5=<|end|><|assistant|>"
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert inputs["input_ids"].shape[1] < output.shape[1] <= inputs["input_ids"].shape[1] + 4
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@BOTH
def test_the_files_of_a_run(name, runs):
    """args.json holds every setting, the resolved learning rate and that the run is finished; samples.jsonl holds
    prompt, completion and reward at every `sample_every` steps."""
    folder = runs[name][0]
    record = json.loads((folder / "args.json").read_text())
    assert set(record["args"]) == set(SCRIPTS[name].Args.__dataclass_fields__)
    assert record["resolved"]["peak_lr"] == (2e-3 if name == "sft" else 3e-4) and record["finished"] == 2
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {1, 2}
    assert all({"prompt", "completion", "reward"} <= set(sample) for sample in samples)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_save_dtype(dtype, data, tiny_folder, tmp_path):
    """Weights are float32 unless --save-dtype says otherwise; the folder then loads in that format by itself."""
    run("sft", data, tiny_folder, tmp_path / "out", steps=1, save_dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    checkpoint = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoints/step-1", dtype="auto")
    assert {parameter.dtype for parameter in checkpoint.parameters()} == {torch.float32}


@BOTH
def test_weights_are_float32_whatever_the_folder_holds(name, data, tiny_folder, tmp_path):
    """From a bfloat16 folder the run trains in float32: one step at the default learning rate gives weights that
    bfloat16 could not hold, and they are saved in float32."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    assert transformers.AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    run(name, data, tiny_folder, tmp_path / "out", model=str(folder), steps=1)
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype == torch.float32
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after[key], before[key])
    assert not torch.equal(after[key], after[key].bfloat16().float())


@BOTH
def test_every_parameter_moves_in_one_step_at_the_default_learning_rate(name, data, tiny_folder, tmp_path):
    """Adam's first step moves what has a gradient by the learning rate; the norm weights, which start at 1, too."""
    changes = {"steps": 1, "model": tiny_folder, "lr_schedule": "constant"}
    run(name, data, tiny_folder, tmp_path / "out", **changes)
    lr = 2e-3 if name == "sft" else 3e-4
    before, after = weights_of(tiny_folder), weights_of(tmp_path / "out")
    for key, value in before.items():
        largest = (after[key] - value).abs().max().item()
        assert 0.5 * lr < largest < 1.5 * lr, f"{key} moves by {largest}"


def test_the_default_learning_rate_of_a_real_model_is_the_papers():
    """Ten million parameters are the border: below it the tiny model's value, above it the paper's."""
    for name, small, large in (("sft", "2e-3", "1e-5"), ("grpo", "3e-4", "1e-6")):
        source = Path(SCRIPTS[name].__file__).read_text()
        assert re.search(rf"peak_lr = .*{small}.*10_000_000.*{large}", source)


# ---------------------------------------------------------------------------------------------------------- the metrics


def test_the_first_step_has_kl_0_and_ratio_1(runs):
    """The reference is the policy as it was loaded, and one update per rollout has no other old policy: every KL of
    step 1 is exactly 0 and nothing is clipped; sampling and training log-probabilities agree to 1e-5. At step 2 the
    KL is there."""
    first, second = metrics_of(runs["grpo"][0])[1:3]
    for key in ("kl_ref_k1", "kl_ref_k3", "kl_ref_seq", "approx_kl_old", "clip_frac"):
        assert first[key] == 0.0, key
    assert 0 < first["sampling_gap_mean"] <= first["sampling_gap_max"] < 1e-5
    assert second["kl_ref_k3"] > 0 and second["approx_kl_old"] == 0.0


def test_the_loss_of_the_first_step_is_the_policy_gradient_loss_worked_from_its_parts(data, tiny_folder, tmp_path):
    """At ratio 1 and KL 0 the loss is -mean(A), and advantages of a group sum to 0: the loss is 0 up to rounding while
    the gradient is not."""
    run("grpo", data, tiny_folder, tmp_path / "out", steps=1)
    row = metrics_of(tmp_path / "out")[1]
    assert abs(row["loss"]) < 1e-6 and row["grad_norm"] > 0.1 and row["adv_abs_mean"] > 0.1


@BOTH
def test_documented_metrics_are_there(name, data, tiny_folder, tmp_path):
    """Every metric that the header names is in metrics.jsonl, and every key of metrics.jsonl is in the header."""
    changes = {"num_epochs": 2, "sft_coef": 0.1, "sft_dataset": f"{data}/rows.jsonl"} if name == "grpo" else {}
    metrics = run(name, data, tiny_folder, tmp_path / "out", **changes)
    rows = metrics_of(tmp_path / "out")
    keys = set().union(*rows) | {key for key in metrics if key.startswith("before/")}
    table = SCRIPTS[name].__doc__.partition("Metrics (metrics.jsonl)")[2].partition("\n\n")[0].partition("\n")[2]
    documented = set()
    for line in table.splitlines():
        if line.startswith("  ") and not line.startswith("    "):
            names = re.split(r"  +", line.strip())[0]
            documented |= {word for word in re.findall(r"[\w/*]+", names) if re.search(r"[a-z]", word)}
    documented = {word.replace("NAME", "*") for word in documented}
    assert len(documented) >= 6
    for word in documented:
        pattern = re.escape(word).replace(r"\*", ".+")
        assert any(re.fullmatch(pattern, key) for key in keys), f"{word} is documented and not logged"
    patterns = "|".join(re.escape(word).replace(r"\*", ".+") for word in documented)
    whole = SCRIPTS[name].__doc__
    for key in keys:
        found = re.fullmatch(patterns, key) or re.search(rf"(?<![\w/]){re.escape(key)}(?![\w/])", whole)
        common = key == "step" or key.startswith(("time/", "before/"))
        assert found or common, f"{key} is logged and not documented"


@BOTH
def test_main_returns_the_last_row_and_the_first_evaluation(name, runs):
    """before/... is the evaluation of step 0, eval/... that of the last step."""
    folder, metrics = runs[name]
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for key, value in rows[-1].items():
        assert metrics[key] == value
    for key in ("accuracy_sampled", "accuracy_greedy", "answered_sampled", "answered_greedy"):
        assert metrics[f"before/{key}"] == rows[0][f"eval/{key}"]
        assert f"eval/{key}" in metrics
    if name == "sft":
        assert metrics["before/loss"] > metrics["eval/loss"]
    assert all(map(math.isfinite, numbers(metrics)))


def test_the_loss_of_sft_is_the_mean_over_all_trained_tokens_however_it_is_split(data, tiny_folder, tmp_path):
    """Loss and gradient norm of step 1 do not depend on the micro-batches: row by row gives those of all at once."""
    rows = []
    for size in (16384, 1):
        run("sft", data, tiny_folder, tmp_path / str(size), steps=1, micro_batch_tokens=size)
        rows.append(metrics_of(tmp_path / str(size))[1])
    assert rows[0]["num_tokens"] == rows[1]["num_tokens"]
    for key in ("loss", "grad_norm", "eval/loss"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-5), key


def test_metrics_of_grpo_do_not_depend_on_the_micro_batches(data, tiny_folder, tmp_path):
    """The same for all that is averaged over tokens or sequences, with two epochs; a maximum is the largest of all."""
    rows = []
    for size in (16384, 1):
        changes = {"micro_batch_tokens": size, "num_epochs": 2, "rollout_batch_size": 16384 if size > 1 else 2}
        run("grpo", data, tiny_folder, tmp_path / str(size), steps=1, **changes)
        rows.append(metrics_of(tmp_path / str(size))[1])
    for key in rows[0]:
        if not key.startswith("time/"):
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-3, abs=2e-6), key


# ------------------------------------------------------------------------------------------------------------------ NaN


def spoil(monkeypatch, module, function: str, calls: set[int]) -> list[int]:
    """Makes the loss function return NaN at these calls, counted from 1; returns the list that counts them."""
    original, count = getattr(module, function), []

    def spoiled(*args, **kwargs):
        count.append(1)
        loss = original(*args, **kwargs)
        return loss * math.nan if len(count) in calls else loss

    monkeypatch.setattr(module, function, spoiled)
    return count


@pytest.mark.parametrize(("name", "function"), [("sft", "sft_loss"), ("grpo", "grpo_loss")])
def test_an_update_that_is_not_finite_is_skipped_and_counted(
    name, function, data, tiny_folder, tmp_path, monkeypatch, capsys
):
    """NaN at step 2 of 3: that step leaves weights and optimizer as they are, says so, and counts; the run goes on, and
    what it saves is finite. (steps have one micro-batch, so call 2 is step 2.)"""
    module = SCRIPTS[name]
    spoil(monkeypatch, module, function, {2})
    run(name, data, tiny_folder, tmp_path / "out", steps=3, save_every=1, lr=1e-3, lr_schedule="constant")
    assert "skipped" in capsys.readouterr().out
    rows = metrics_of(tmp_path / "out")
    assert [row["skipped_updates"] for row in rows] == [0, 0, 1, 1]
    checkpoints = {step: tmp_path / "out" / "checkpoints" / f"step-{step}" for step in (2, 3)}
    for folder in checkpoints.values():
        states = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
        assert all(torch.isfinite(value).all() for state in states.values() for value in state.values())
        assert all(torch.isfinite(value).all() for value in weights_of(folder).values())
    steps = [
        {
            int(state["step"])
            for state in torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"].values()
        }
        for folder in checkpoints.values()
    ]
    assert steps == [{1}, {2}]
    straight = weights_of(tmp_path / "out")
    run(name, data, tiny_folder, tmp_path / "one", steps=1, lr=1e-3, lr_schedule="constant")
    for key, value in weights_of(tmp_path / "one").items():
        assert torch.equal(value, weights_of(checkpoints[2])[key]), f"step 2 changed {key}"
    assert any(not torch.equal(value, straight[key]) for key, value in weights_of(checkpoints[2]).items())


@pytest.mark.parametrize(("name", "function"), [("sft", "sft_loss"), ("grpo", "grpo_loss")])
def test_ten_updates_in_a_row_that_are_not_finite_end_the_run(name, function, data, tiny_folder, tmp_path, monkeypatch):
    """Nine in a row, one good and then ten in a row: the run ends at call 20, not before."""
    calls = spoil(monkeypatch, SCRIPTS[name], function, {*range(1, 10), *range(11, 100)})
    with pytest.raises(SystemExit) as info:
        run(name, data, tiny_folder, tmp_path / "out", steps=40, sample_every=100)
    assert len(calls) == 20
    assert "--lr" in str(info.value)


def test_skipped_updates_in_a_row_are_counted_across_a_resume(data, tiny_folder, tmp_path, monkeypatch):
    """Six before the checkpoint and four after it are ten in a row."""
    spoil(monkeypatch, sft, "sft_loss", set(range(1, 100)))
    changes = {"lr_schedule": "constant", "sample_every": 100}
    run("sft", data, tiny_folder, tmp_path / "out", steps=6, **changes)
    with pytest.raises(SystemExit) as info:
        run("sft", data, tiny_folder, tmp_path / "out", steps=40, resume=True, **changes)
    assert isinstance(info.value.code, str)
    assert [row["step"] for row in metrics_of(tmp_path / "out")][-1] in (9, 10)


@BOTH
def test_metrics_stay_json_when_an_update_is_skipped(name, data, tiny_folder, tmp_path, monkeypatch):
    """NaN is no JSON: a strict reader reads every line of metrics.jsonl."""
    spoil(monkeypatch, SCRIPTS[name], f"{name}_loss", {1})
    run(name, data, tiny_folder, tmp_path / "out")

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_an_evaluation_that_is_not_finite_does_not_end_the_run(data, tiny_folder, tmp_path, monkeypatch):
    """A held-out loss of NaN is shown and logged like any other, as valid JSON, and the run goes on."""
    monkeypatch.setattr(sft, "evaluate_sft", lambda *args: {"eval/loss": math.nan})
    assert run("sft", data, tiny_folder, tmp_path / "out")["step"] == 2
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


# --------------------------------------------------------------------------------------------------------- skipped rows


def test_rows_of_zero_advantage_add_nothing_to_the_gradient(tiny_model):
    """grpo_loss over all rows and over those with an advantage have the same gradient when kl_coef is 0, and another
    one when it is not."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 261, (4, 12), generator=generator)
    mask = (torch.arange(12) >= 4).float().expand(4, 12) * (torch.arange(12) < torch.tensor([[12], [9], [12], [7]]))
    advantages = torch.tensor([0.7, 0.0, -0.7, 0.0])
    gradients = {}
    for kl_coef in (0.0, 0.5):
        for name, rows in (("all", [0, 1, 2, 3]), ("some", [0, 2])):
            tiny_model.zero_grad()
            logprobs, _ = grpo.token_logprobs(tiny_model, ids[rows], mask[rows])
            reference = logprobs.detach() - 0.3 * mask[rows]
            loss = grpo.grpo_loss(
                logprobs, logprobs.detach(), reference, advantages[rows], mask[rows], 0.2, kl_coef, num_sequences=4
            )
            loss.backward()
            gradients[kl_coef, name] = torch.cat([p.grad.flatten() for p in tiny_model.parameters()]).clone()
    whole = gradients[0.0, "all"]
    assert (gradients[0.0, "some"] - whole).norm() < 1e-5 * whole.norm()
    assert (gradients[0.5, "some"] - gradients[0.5, "all"]).norm() > 1e-2 * whole.norm()


def test_a_run_that_skips_rows_equals_one_that_computes_all(data, tiny_folder, tmp_path):
    """With kl_coef 0, half of the groups without signal: an entropy bonus of 1e-12, which forces all rows through the
    model and changes nothing else, gives the same weights."""
    changes = {"reward": (f"{data}/rewards.py:some",), "kl_coef": 0.0, "steps": 1, "lr": 1e-3}
    for name, entropy_coef in (("some", 0.0), ("all", 1e-12)):
        run("grpo", data, tiny_folder, tmp_path / name, entropy_coef=entropy_coef, **changes)
    some, every = metrics_of(tmp_path / "some")[1], metrics_of(tmp_path / "all")[1]
    assert 0 < some["frac_zero_std"] < 1
    assert some["frac_trained"] == 1 - some["frac_zero_std"] and every["frac_trained"] == 1.0
    assert some["grad_norm"] == pytest.approx(every["grad_norm"], rel=1e-5)
    for key in ("loss", "reward", "adv_abs_mean"):
        assert some[key] == pytest.approx(every[key], abs=1e-6), key
    before, one, other = weights_of(tiny_folder), weights_of(tmp_path / "some"), weights_of(tmp_path / "all")
    for key, value in before.items():  # Adam turns rounding of a gradient near 0 into steps: compare where it is not
        moved = (one[key] - value).abs() > 0.9 * 1e-3
        difference = (one[key] - other[key]).abs()
        assert (difference < 1e-6)[moved].float().mean() > 0.999 if moved.any() else True, key


def test_a_step_without_any_signal_changes_nothing(data, tiny_folder, tmp_path):
    """All rewards equal and kl_coef 0: nothing is computed, the loss and the gradient are 0, the weights stay."""
    changes = {"reward": (f"{data}/rewards.py:constant",), "kl_coef": 0.0}
    run("grpo", data, tiny_folder, tmp_path / "out", **changes)
    rows = metrics_of(tmp_path / "out")[1:]
    for row in rows:
        assert (row["frac_zero_std"], row["frac_trained"], row["loss"], row["grad_norm"]) == (1.0, 0.0, 0.0, 0.0)
    before, after = weights_of(tiny_folder), weights_of(tmp_path / "out")
    assert all(torch.equal(value, after[key]) for key, value in before.items())


# -------------------------------------------------------------------------------------------------------- reward models


def word_tokenizer(pad_token: str, chat_template: bool):
    """Another vocabulary: one token for each digit and sign, [UNK] for the rest; [EOS] ends; pad is not EOS."""
    vocab = {token: i for i, token in enumerate(["[UNK]", "[EOS]", "[PAD]", "[Q]", "[A]", *"0123456789+=# \n"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"unk_token": "[UNK]", "eos_token": "[EOS]", "pad_token": pad_token}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["[Q]", "[A]"], **special
    )
    if chat_template:
        tokenizer.chat_template = (
            "{% for message in messages %}{{ '[A]' if message.role == 'assistant' else '[Q]' }}{{ message.content }}"
            "{% endfor %}[EOS]"
        )
    return tokenizer


def reward_model(folder: Path, architecture: str, chat_template: bool) -> Path:
    """A small classifier with one label, saved by transformers itself."""
    tokenizer = word_tokenizer("[PAD]", chat_template)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=len(tokenizer), num_key_value_heads=1, num_labels=1, **sizes, **ids
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForSequenceClassification")(config)
    torch.nn.init.normal_(model.score.weight, std=1.0)  # scores that differ by much more than the tolerance
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PROMPTS = ["1+2=", "3+4+5+6+7=", "9+9=", "0+0="]
COMPLETIONS = ["#### 3", "3+4=7\n7+5=12\n12+6=18\n18+7=25\n#### 25", "", "what?"]


@pytest.mark.parametrize("system_prompt", [None, "1 2 3"])
@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("architecture", ["Qwen3", "Llama"])
def test_a_reward_model_scores_as_transformers_does(architecture, chat_template, system_prompt, tmp_path):
    """Scores of a padded batch equal those of transformers on each unpadded text alone, to 1e-5: text by the reward
    model's own template or, without one, prompt, completion and EOS."""
    folder = reward_model(tmp_path / "reward", architecture, chat_template)
    score = grpo.RewardModel(str(folder), system_prompt, CPU, max_tokens=1000)
    scores = score(PROMPTS, COMPLETIONS, [{}] * 4)
    alone = grpo.RewardModel(str(folder), system_prompt, CPU, max_tokens=1)(PROMPTS, COMPLETIONS, [{}] * 4)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        if chat_template:
            system = f"[Q]{system_prompt}" if system_prompt else ""
            text = f"{system}[Q]{prompt}[A]{completion}[EOS]"
        else:
            text = f"{system_prompt}\n\n{prompt}{completion}[EOS]" if system_prompt else f"{prompt}{completion}[EOS]"
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            expected.append(model(input_ids=inputs["input_ids"]).logits.item())
    assert len({round(value, 3) for value in expected}) == 4
    assert scores == pytest.approx(expected, abs=1e-5)
    assert alone == pytest.approx(expected, abs=1e-5)


def test_an_encoder_gets_its_own_special_tokens_or_is_refused(tmp_path):
    """BERT pools on [CLS], which its tokenizer puts in front: without it the score would be read from the first word of
    the prompt. So it gets `[CLS] text [SEP]`, as from its own tokenizer, or it is refused; no score is made up."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"0123456789+=#"]
    vocab = {token: i for i, token in enumerate([*words, *(f"##{word}" for word in "0123456789+=#")])}
    tokenizer = transformers.BertTokenizer(vocab)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=len(vocab), num_labels=1, pad_token_id=0, initializer_range=0.5, **sizes
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    prompts, completions = ["1+2=", "9+9="], ["#### 3", "#### 18"]
    expected = []
    for prompt, completion in zip(prompts, completions):
        with torch.no_grad():
            expected.append(model(**tokenizer(prompt + completion, return_tensors="pt")).logits.item())
    try:
        scores = grpo.RewardModel(str(tmp_path / "reward"), None, CPU, 1000)(prompts, completions, [{}] * 2)
    except SystemExit as error:
        assert "--reward" in str(error)
    else:
        assert scores == pytest.approx(expected, abs=1e-4)


def test_a_reward_model_and_a_function_are_added_with_their_weights(data, tiny_folder, tmp_path):
    """A run with a reward model, a function and the format: the reward of a step is the weighted sum of the three
    means, each logged under its own name."""
    folder = reward_model(tmp_path / "reward", "Qwen3", True)
    names, weights = (str(folder), f"{data}/rewards.py:letters", "format"), (0.5, -2.0, 1.0)
    run("grpo", data, tiny_folder, tmp_path / "out", reward=names, reward_weights=weights)
    for row in metrics_of(tmp_path / "out")[1:]:
        parts = [row[key] for key in row if key.startswith("reward/")]
        assert len(parts) == 3
        total = sum(weight * part for weight, part in zip(weights, parts))
        assert row["reward"] == pytest.approx(total, abs=1e-5)
        assert row["reward"] != pytest.approx(sum(parts), abs=1e-3)


def test_a_reward_function_gets_prompts_completions_and_rows_in_step(data, tiny_folder, tmp_path):
    """It is called with texts and with the rows that they belong to, all columns included, `group_size` neighbours per
    prompt; no special token is left in the text."""
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "def reward(prompts, completions, rows):\n"
        f"    with open({str(tmp_path / 'calls.jsonl')!r}, 'a') as file:\n"
        "        file.write(json.dumps([prompts, completions, rows]) + '\\n')\n"
        "    return [len(text) for text in completions]\n"
    )
    run("grpo", data, tiny_folder, tmp_path / "out", steps=1, reward=(f"{tmp_path}/mine.py:reward",))
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [len(call[0]) for call in calls] == [1, 8, 8, 8, 8, 8]  # trial, evaluation twice, rollout, evaluation twice
    known = {json.dumps(json.loads(line)) for line in (data / "rows.jsonl").read_text().splitlines()}
    for prompts, completions, rows in calls:
        assert prompts == [row["prompt"] for row in rows]
        assert all(json.dumps(row) in known for row in rows)
        assert all(isinstance(text, str) and "<|end|>" not in text for text in completions)
    prompts = calls[3][0]
    assert prompts[::2] == prompts[1::2] and len(set(prompts)) == 4


def test_truncated_completions_are_counted_and_pay_the_penalty(data, tiny_folder, tmp_path):
    """Completions of one token hardly ever end: the reward is 1 less the penalty for those that did not, and the share
    of them is logged. The reward before the penalty keeps its own name."""
    changes = {"reward": (f"{data}/rewards.py:constant",), "max_new_tokens": 1, "prompts_per_step": 8, "steps": 1}
    run("grpo", data, tiny_folder, tmp_path / "out", missing_eos_penalty=0.5, **changes)
    row = metrics_of(tmp_path / "out")[1]
    assert 0.5 < row["truncated_frac"] <= 1.0 and row["completion_length"] == 1.0
    assert row["reward"] == pytest.approx(1 - 0.5 * row["truncated_frac"])
    assert row["reward/" + next(key for key in row if key.startswith("reward/"))[7:]] == 1.0


# --------------------------------------------------------------------------------------------------------------- epochs


def test_a_tiny_target_kl_ends_the_epochs_early(data, tiny_folder, tmp_path, monkeypatch):
    """Two epochs do two updates per step; with --target-kl 1e-9 the drift after the first update is past it, so each
    step does one, and ends where a run of one epoch ends."""
    for name, changes in (
        ("two", {"num_epochs": 2}),
        ("stopped", {"num_epochs": 2, "target_kl": 1e-9}),
        ("one", {"num_epochs": 1}),
    ):
        run("grpo", data, tiny_folder, tmp_path / name, **changes)
    updates = {}
    for name in ("two", "stopped", "one"):
        state = torch.load(tmp_path / name / "checkpoints" / "step-2" / "state.pt", weights_only=True)
        updates[name] = {int(value["step"]) for value in state["optimizer"]["state"].values()}
    assert updates == {"two": {4}, "stopped": {2}, "one": {2}}
    assert metrics_of(tmp_path / "stopped")[1]["approx_kl_old"] > 0
    one, stopped = weights_of(tmp_path / "one"), weights_of(tmp_path / "stopped")
    assert all(torch.equal(value, stopped[key]) for key, value in one.items())


def test_the_sft_loss_is_mixed_in(data, tiny_folder, tmp_path):
    """With constant rewards and no KL the SFT loss alone trains: it is logged, it falls, and the loss is half of it."""
    changes = {"reward": (f"{data}/rewards.py:constant",), "kl_coef": 0.0, "steps": 6, "lr": 2e-3}
    run("grpo", data, tiny_folder, tmp_path / "out", sft_coef=0.5, sft_dataset=f"{data}/rows.jsonl", **changes)
    rows = metrics_of(tmp_path / "out")[1:]
    assert rows[-1]["sft_loss"] < rows[0]["sft_loss"] - 0.2
    for row in rows:
        assert row["loss"] == pytest.approx(0.5 * row["sft_loss"], rel=1e-4)


# --------------------------------------------------------------------------------------------------- data of every kind


def test_gsm8k_rows_run_through_both_scripts(data, tiny_folder, tmp_path):
    """question + answer, as GSM8K is published: sft.py, then grpo.py on its folder with the same file and the exact
    reward. All metrics are finite, samples are readable, the trained text closes with the answer line."""
    (tmp_path / "sft").mkdir()
    changes = {"dataset": f"{data}/gsm8k.jsonl", "max_new_tokens": 24, "steps": 2}
    first = run("sft", data, tiny_folder, tmp_path / "sft", max_length=400, **changes)
    changes |= {"model": str(tmp_path / "sft"), "reward": ("exact", "format"), "max_prompt_length": 300}
    second = run("grpo", data, tiny_folder, tmp_path / "grpo", system_prompt="End with `#### answer`.", **changes)
    for metrics in (first, second):
        assert metrics["step"] == 2 and all(map(math.isfinite, numbers(metrics)))
        assert "eval/accuracy_sampled" in metrics and "before/accuracy_greedy" in metrics
    assert {"reward/exact", "reward/format"} <= set(second)
    for folder in (tmp_path / "sft", tmp_path / "grpo"):
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert samples and all("apples" in str(sample["prompt"]) for sample in samples)


def test_messages_run_through_sft_and_every_assistant_turn_is_trained(data, tiny_folder, tmp_path, capsys):
    """Two assistant turns a row, no answer column: the loss is measured, accuracy is not; the first batch is shown with
    both turns marked as trained and nothing else."""
    metrics = run("sft", data, tiny_folder, tmp_path / "out", dataset=f"{data}/messages.jsonl", steps=1)
    assert math.isfinite(metrics["eval/loss"]) and not [key for key in metrics if "accuracy" in key]
    shown = re.findall(r"«(.+?)»", capsys.readouterr().out, flags=re.S)
    assert len(shown) == 2 and shown[0].endswith("<|end|>") and "####" in shown[0] and shown[1] == "done<|end|>"


def test_evaluation_rows_are_kept_out_of_training(data, tiny_folder, tmp_path, capsys):
    """Of a file without splits the last eval_size rows are held out; with --eval-dataset all rows are trained on."""
    run("sft", data, tiny_folder, tmp_path / "one", steps=1)
    assert "32 rows" in capsys.readouterr().out
    run("sft", data, tiny_folder, tmp_path / "two", steps=1, eval_dataset=f"{data}/gsm8k.jsonl", max_length=300)
    assert "40 rows" in capsys.readouterr().out


def test_a_run_that_no_sample_can_answer_says_so_before_step_1(data, tiny_folder, tmp_path, capsys):
    """A random model writes no answer line: the warning names --system-prompt and stands before the first step."""
    run("grpo", data, tiny_folder, tmp_path / "out", reward=("exact",), steps=1)
    text = capsys.readouterr().out
    assert 0 <= text.find("--system-prompt") < text.find("step 1/1")


def test_the_first_batch_is_shown(data, tiny_folder, tmp_path, capsys):
    """Prompt and completion as text with the trained tokens marked, counts of tokens, BOS and EOS, the KL and the gap
    between sampling and training."""
    run("grpo", data, tiny_folder, tmp_path / "out", steps=1)
    text = capsys.readouterr().out
    assert re.search(r"<\|user\|>[\d+]+=<\|end\|><\|assistant\|>«.+?»", text, flags=re.S)
    for word in ("BOS", "EOS", "trained", "KL", "max"):
        assert word in text
    assert text.find("«") < text.find("step 1/1")


def test_sampling_that_differs_from_training_ends_the_run(data, tiny_folder, tmp_path, monkeypatch):
    """In float32 a gap of 0.01 between sampling and training log-probabilities is an error, before the first update."""
    original = grpo.generate

    def shifted(*args, **kwargs):
        completions, logprobs = original(*args, **kwargs)
        return completions, [[value - 0.01 for value in row] for row in logprobs]

    monkeypatch.setattr(grpo, "generate", shifted)
    with pytest.raises(SystemExit) as info:
        run("grpo", data, tiny_folder, tmp_path / "out")
    assert "sampling" in str(info.value)


def test_the_progress_line(data, tiny_folder, tmp_path, capsys):
    """One line per step, with speed and time left."""
    run("sft", data, tiny_folder, tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(r"step [12]/2  .*loss .*tokens/s  \d+:\d\d left", line)


# ---------------------------------------------------------------------------------------------------- threads, tracking


@BOTH
def test_main_can_be_called_from_another_thread(name, runs, data, tiny_folder, tmp_path):
    """Where no signal handler can be set, the run is the same."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run(name, data, tiny_folder, tmp_path / "out")))
    thread.start()
    thread.join()
    assert results and results[0]["step"] == 2
    final = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert final == (runs[name][0] / "model.safetensors").read_bytes()


def test_two_runs_in_one_process_do_not_influence_each_other(runs, data, tiny_folder, tmp_path):
    """Randomness belongs to seed and step: another run before it changes nothing, nor do the global generators."""
    torch.manual_seed(123)
    random.seed(123)
    run("grpo", data, tiny_folder, tmp_path / "out")
    final = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert final == (runs["grpo"][0] / "model.safetensors").read_bytes()
    run("grpo", data, tiny_folder, tmp_path / "other", seed=1)
    assert final != (tmp_path / "other" / "model.safetensors").read_bytes()


@BOTH
def test_tracking_offline_and_the_same_run_after_resume(name, data, tiny_folder, tmp_path, monkeypatch):
    """WANDB_MODE=offline --track logs two steps without an account; its files stay inside the output folder; --resume
    goes on under the same run id; the result is that of an untracked run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    changes = {"track": True, "lr_schedule": "constant"}
    run(name, data, tiny_folder, tmp_path / "out", steps=2, **changes)
    first = json.loads((tmp_path / "out" / "args.json").read_text())["wandb_id"]
    assert list((tmp_path / "out" / "wandb").glob(f"offline-run-*-{first}"))
    assert not (tmp_path / "wandb").exists()
    run(name, data, tiny_folder, tmp_path / "out", steps=3, resume=True, **changes)
    assert json.loads((tmp_path / "out" / "args.json").read_text())["wandb_id"] == first
    tracked = [path.name for path in (tmp_path / "out" / "wandb").glob("offline-run-*")]
    assert tracked and all(first in name for name in tracked)
    run(name, data, tiny_folder, tmp_path / "untracked", steps=3, lr_schedule="constant")
    final = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert final == (tmp_path / "untracked" / "model.safetensors").read_bytes()


@BOTH
def test_tracking_without_wandb_writes_nothing(name, data, tiny_folder, tmp_path, monkeypatch):
    """--track without wandb installed ends with the flag's name and writes nothing."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as info:
        run(name, data, tiny_folder, tmp_path / "out", track=True)
    assert "--track" in str(info.value)
    assert not (tmp_path / "out").exists()
