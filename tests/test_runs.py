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

import dpo
import grpo
import ppo
import rm
import sft

SCRIPTS = {"sft": sft, "rm": rm, "ppo": ppo, "grpo": grpo, "dpo": dpo}
ALL = pytest.mark.parametrize("name", list(SCRIPTS))
ONLINE = pytest.mark.parametrize("name", ["ppo", "grpo"])
PAIRS = pytest.mark.parametrize("name", ["rm", "dpo"])
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
    same |= {"save_every": 100, "sample_every": 1, "warmup_steps": 0}
    online = {"model": tiny_folder, "prompts_per_step": 4, "group_size": 2, "max_prompt_length": 64}
    online |= {"max_new_tokens": 8, "reward": (f"{data}/rewards.py:letters",)}
    offline = {"model": "tiny" if name == "sft" else tiny_folder, "batch_size": 4, "max_length": 200}
    offline |= {} if name == "rm" else {"max_new_tokens": 8}
    own = {"grpo": online, "ppo": {**online, "num_epochs": 2, "num_minibatches": 2}}.get(name, offline)
    return {**same, **own, **changes}


def run(name: str, data: Path, tiny_folder: str, out: Path, **changes) -> dict:
    """One run; what main returns."""
    return SCRIPTS[name].main(SCRIPTS[name].Args(**settings(name, data, tiny_folder, out, **changes)))


def metrics_of(out: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


ONE_UPDATE = {"num_epochs": 1, "num_minibatches": 1}


def one_update(name: str) -> dict:
    """Changes that make a step of ppo.py one update, as it is in the other scripts."""
    return ONE_UPDATE if name == "ppo" else {}


def auto_class(folder: Path | str):
    """The class of `transformers` that loads a folder: a classifier if its configuration says so."""
    kind = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    classifier = kind.endswith("ForSequenceClassification")
    return transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    """The weights of a folder, in float32."""
    return auto_class(folder).from_pretrained(folder, dtype=torch.float32).state_dict()


def default_lr(name: str, flag: str = "lr") -> tuple[float, float]:
    """The two learning rates (or values of another flag), for tiny and for real models, that a script's source gives
    where the flag is None."""
    source = Path(SCRIPTS[name].__file__).read_text()
    (found,) = re.findall(rf"args\.{flag} or \(([\d.e-]+) if .+? else ([\d.e-]+)\)", source)
    return float(found[0]), float(found[1])


def turn_ids(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Prompt and completion, the end of turn included, in the tiny tokenizer's chat template, written out here."""
    before, after = f"<|user|>{prompt}<|end|><|assistant|>", f"{completion}<|end|>"
    return tokenizer.encode(before, add_special_tokens=False), tokenizer.encode(after, add_special_tokens=False)


@torch.no_grad()
def logp_of(model, tokenizer, prompt: str, completion: str) -> float:
    """log pi(completion, EOS | prompt), summed over tokens, from the model's own logits."""
    before, after = turn_ids(tokenizer, prompt, completion)
    logprobs = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(logprobs[len(before) + k - 1, token].item() for k, token in enumerate(after))


@torch.no_grad()
def reward_of(model, tokenizer, prompt: str, completion: str) -> float:
    """`score` on the hidden state of the last token of a text, without padding."""
    before, after = turn_ids(tokenizer, prompt, completion)
    return (
        model.model(input_ids=torch.tensor([before + after])).last_hidden_state[0, -1] @ model.score.weight[0]
    ).item()


def softplus(x: float) -> float:
    """log(1 + exp(x)) = -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """A folder with the tiny model under other random weights."""
    folder = tmp_path_factory.mktemp("other")
    sft.tiny_model(1).save_pretrained(folder)
    sft.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


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


@pytest.mark.parametrize("name", ["sft", "ppo", "grpo", "dpo"])
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


def test_the_folder_of_a_reward_model_loads_as_a_classifier(runs):
    """AutoModelForSequenceClassification reads it without missing or surplus weights: one label, a pad token that is
    not the EOS, the same in configuration and tokenizer."""
    folder = runs["rm"][0]
    loader = transformers.AutoModelForSequenceClassification
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1 and model.score.weight.shape == (1, 128)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.chat_template and tokenizer.eos_token == "<|end|>"


@pytest.mark.parametrize("end", ["<|pad|> is free", "<|pad|> is new"])
def test_a_reward_model_from_a_folder_whose_pad_is_its_eos(end, data, tmp_path):
    """transformers reads the score at the last token that is not padding, so rm.py gives the model a pad token of its
    own, one more row of the embedding if need be. Then a padded batch in transformers, the score by hand without
    padding, and rm.score agree to 1e-5; ppo.py takes the folder as its reward and starts its value model from it."""
    tokenizer = sft.tiny_tokenizer()
    if end == "<|pad|> is new":
        vocab = {token: i - 1 for token, i in tokenizer.get_vocab().items() if token != "<|pad|>"}
        markers = [f"<|{role}|>" for role in ("system", "user", "assistant")]
        special = {"unk_token": None, "eos_token": "<|end|>", "pad_token": "<|end|>", "extra_special_tokens": markers}
        template, tokenizer = tokenizer.chat_template, transformers.Qwen2Tokenizer(vocab, [], **special)
        tokenizer.chat_template = template
    tokenizer.pad_token = tokenizer.eos_token
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert ("<|pad|>" in tokenizer.get_vocab()) == (end == "<|pad|> is free")
    run("rm", data, str(tmp_path / "model"), tmp_path / "rm", steps=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32).eval()
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert saved.pad_token == "<|pad|>" and model.config.pad_token_id == saved.pad_token_id != saved.eos_token_id
    assert len(saved) == model.get_input_embeddings().weight.shape[0] == 261
    texts = [f"<|user|>{prompt}<|end|><|assistant|>{text}<|end|>" for prompt, text in zip(PROMPTS, COMPLETIONS)]
    batch = saved(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        padded = model(**batch).logits[:, 0].tolist()
    by_hand = [reward_of(model, saved, prompt, text) for prompt, text in zip(PROMPTS, COMPLETIONS)]
    assert len({round(value, 3) for value in by_hand}) == 4
    assert padded == pytest.approx(by_hand, abs=1e-5)
    pairs = [((ids, [1] * len(ids)),) * 2 for ids in (saved.encode(text, add_special_tokens=False) for text in texts)]
    scores = rm.score_pairs(model, pairs, max_tokens=1000)
    assert scores[:, 0].tolist() == pytest.approx(by_hand, abs=1e-5)
    metrics = run("ppo", data, str(tmp_path / "model"), tmp_path / "ppo", steps=1, reward=(str(tmp_path / "rm"),))
    assert all(map(math.isfinite, numbers(metrics))) and metrics["value_mean"] != 0.0


@ALL
def test_the_files_of_a_run(name, runs):
    """args.json holds every setting, the resolved learning rate and that the run is finished; samples.jsonl holds
    prompt, completion and reward (rm.py: both sides and their rewards) at every `sample_every` steps."""
    folder = runs[name][0]
    record = json.loads((folder / "args.json").read_text())
    assert set(record["args"]) == set(SCRIPTS[name].Args.__dataclass_fields__)
    assert record["resolved"]["peak_lr"] == default_lr(name)[0] and record["finished"] == 2
    if name == "dpo":
        assert record["resolved"]["beta"] == default_lr(name, "beta")[0]
    if name == "ppo":
        assert record["resolved"]["value_peak_lr"] == default_lr(name, "value_lr")[0]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {1, 2}
    keys = {"prompt", "completion", "reward"}
    if name == "rm":
        keys = {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"}
    assert all(keys <= set(sample) for sample in samples)


def test_the_samples_of_ppo_are_those_of_its_rollout(runs):
    """A step of eight completions shows all of them: the mean of their rewards is the step's reward; neighbours share
    their prompt; the prompts are rows of the data."""
    folder = runs["ppo"][0]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in metrics_of(folder)[1:]:
        own = [sample for sample in samples if sample["step"] == row["step"]]
        assert len(own) == 8 and all(own[2 * b]["prompt"] == own[2 * b + 1]["prompt"] for b in range(4))
        assert row["reward"] == pytest.approx(sum(sample["reward"] for sample in own) / 8, abs=1e-6)
        assert {sample["prompt"] for sample in own} <= {row["prompt"] for row in sft.arithmetic_rows("train", 40)}


def test_the_samples_of_rm_are_held_out_pairs_with_their_rewards(runs):
    """The rewards after the last step are those that the written model gives, by hand and without padding."""
    folder = runs["rm"][0]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    samples = [sample for sample in samples if sample["step"] == 2]
    held_out = sft.arithmetic_rows("train", 40)[-8:]
    assert samples and all(sample["prompt"] in [row["prompt"] for row in held_out] for sample in samples)
    for sample in samples:
        for side in ("chosen", "rejected"):
            expected = reward_of(model, tokenizer, sample["prompt"], sample[side])
            assert sample[f"{side}_reward"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sft", "float32"), ("sft", "bfloat16"), ("sft", "float16"), ("rm", "bfloat16"), ("ppo", "bfloat16")],
)
def test_save_dtype(name, dtype, data, tiny_folder, tmp_path):
    """Weights are float32 unless --save-dtype says otherwise; the folder then loads in that format by itself.
    Checkpoints are float32 in any case, ppo.py's value model among them."""
    run(name, data, tiny_folder, tmp_path / "out", steps=1, save_dtype=dtype)
    loader = auto_class(tmp_path / "out")
    model = loader.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    checkpoint = tmp_path / "out/checkpoints/step-1"
    for folder in (checkpoint, *([checkpoint / "value_model"] if name == "ppo" else [])):
        saved = auto_class(folder).from_pretrained(folder, dtype="auto")
        assert {parameter.dtype for parameter in saved.parameters()} == {torch.float32}


@ALL
def test_weights_are_float32_whatever_the_folder_holds(name, data, tiny_folder, tmp_path):
    """From a bfloat16 folder the run trains in float32: one step at the default learning rate gives weights that
    bfloat16 could not hold, and they are saved in float32. In ppo.py that holds for the value model too."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    assert transformers.AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    run(name, data, tiny_folder, tmp_path / "out", model=str(folder), steps=1)
    before, written = weights_of(folder), [tmp_path / "out"]
    written += [tmp_path / "out/checkpoints/step-1/value_model"] if name == "ppo" else []
    for path in written:
        after = weights_of(path)
        saved = auto_class(path).from_pretrained(path, dtype="auto")
        assert saved.dtype == torch.float32
        key = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(after[key], before[key])
        assert not torch.equal(after[key], after[key].bfloat16().float())


@ALL
def test_every_parameter_moves_in_one_step_at_the_default_learning_rate(name, data, tiny_folder, tmp_path):
    """Adam's first step moves what has a gradient by the learning rate; the norm weights, which start at 1, too."""
    changes = {"steps": 1, "model": tiny_folder, "lr_schedule": "constant", **one_update(name)}
    run(name, data, tiny_folder, tmp_path / "out", **changes)
    lr = default_lr(name)[0]
    before, after = weights_of(tiny_folder), weights_of(tmp_path / "out")
    if name == "rm":
        before["score.weight"] = rm.load_scorer(tiny_folder, CPU, False, "--model", head_scale=1.0).score.weight.data
        del before["lm_head.weight"]
    assert before.keys() == after.keys()
    for key, value in before.items():
        largest = (after[key] - value).abs().max().item()
        assert 0.5 * lr < largest < 1.5 * lr, f"{key} moves by {largest}"


def test_the_value_model_moves_at_its_own_default_learning_rate(data, tiny_folder, tmp_path):
    """From a reward model every parameter of the value model moves by value_lr in its first update. From the policy it
    has a head of zeros, which passes no gradient on: the head alone moves, and the second update moves the rest."""
    lr = default_lr("ppo", "value_lr")[0]
    assert lr != default_lr("ppo")[0]
    reward = tiny_reward_model(tmp_path / "reward", tiny_folder)
    changes = {"steps": 1, "lr_schedule": "constant", **ONE_UPDATE}
    run("ppo", data, tiny_folder, tmp_path / "one", reward=(str(reward),), **changes)
    before, after = weights_of(reward), weights_of(tmp_path / "one/checkpoints/step-1/value_model")
    assert before.keys() == after.keys()
    for key, value in before.items():
        largest = (after[key] - value).abs().max().item()
        assert 0.5 * lr < largest < 1.5 * lr, f"{key} moves by {largest}"
    run("ppo", data, tiny_folder, tmp_path / "two", **changes)
    before, after = weights_of(tiny_folder), weights_of(tmp_path / "two/checkpoints/step-1/value_model")
    assert 0.5 * lr < after["score.weight"].abs().max().item() < 1.5 * lr
    assert all(torch.equal(after[key], before[key]) for key in after if key != "score.weight")
    run("ppo", data, tiny_folder, tmp_path / "three", **{**changes, "num_epochs": 2})
    after = weights_of(tmp_path / "three/checkpoints/step-1/value_model")
    assert not any(torch.equal(after[key], before[key]) for key in after if key != "score.weight")


def test_the_default_learning_rate_of_a_real_model_is_far_smaller():
    """Ten million parameters are the border: below it the tiny model's value, above it that of real models: the
    paper's, or the usual one (for grpo.py, ppo.py and dpo.py 1e-6)."""
    for name, large in (("sft", 1e-5), ("rm", 9e-6), ("ppo", 1e-6), ("grpo", 1e-6), ("dpo", 1e-6)):
        small, found = default_lr(name)
        assert found == large and small > 10 * large
        assert re.search(r"(peak_lr.*|is_tiny) = .*< 10_000_000", Path(SCRIPTS[name].__file__).read_text())


# ---------------------------------------------------------------------------------------------------------- the metrics


@ONLINE
def test_the_first_step_has_kl_0_and_ratio_1(name, runs, data, tiny_folder, tmp_path):
    """The reference is the policy as it was loaded, and one update per rollout has no other old policy: every KL of
    step 1 is 0 (exactly, but for ppo.py's minibatch, whose rows are padded otherwise) and nothing is clipped; sampling
    and training log-probabilities agree to 1e-5. At step 2 the KL is there."""
    folder = tmp_path / "out" if name == "ppo" else runs["grpo"][0]
    if name == "ppo":
        run("ppo", data, tiny_folder, folder, **ONE_UPDATE)
    first, second = metrics_of(folder)[1:3]
    for key in ("kl_ref_k1", "kl_ref_k3", "kl_ref_seq", "clip_frac"):
        assert first[key] == 0.0, key
    for row in (first, second):
        assert 0.0 <= row["approx_kl_old"] <= (1e-9 if name == "ppo" else 0.0)
    assert 0 < first["sampling_gap_mean"] <= first["sampling_gap_max"] < 1e-5
    assert second["kl_ref_k3"] > 0


def test_the_updates_of_a_step_of_ppo_move_the_ratio(runs):
    """Four updates on one rollout: from the second on the policy is another than the one that sampled."""
    for row in metrics_of(runs["ppo"][0])[1:]:
        assert row["num_updates"] == 4 and row["approx_kl_old"] > 1e-9
        assert row["skipped_updates"] == 0
    state = torch.load(runs["ppo"][0] / "checkpoints/step-2/state.pt", weights_only=True)
    for optimizer in ("optimizer", "value_optimizer"):
        assert {int(value["step"]) for value in state[optimizer]["state"].values()} == {8}


def test_the_first_metrics_of_ppo_worked_from_the_rewards(data, tiny_folder, tmp_path):
    """Completions of one token, a value model from the policy, whose head is 0, and KL 0: so V = 0, A = R = score, and
    the means over tokens are those over sequences. return_mean = mean score; value_loss = 1/2 mean score^2 = (reward^2
    + reward_std^2) / 2; explained_variance = 1 - Var(R) / Var(R) = 0; the policy loss at ratio 1 is minus the mean of
    the whitened advantages, 0, while their gradient is not."""
    changes = {"max_new_tokens": 1, "prompts_per_step": 8, "steps": 1, "missing_eos_penalty": 0.25, **ONE_UPDATE}
    (tmp_path / "mine.py").write_text(
        "def reward(prompts, completions, rows):\n    return [len(prompt) / 4 for prompt in prompts]\n"
    )
    run("ppo", data, tiny_folder, tmp_path / "out", reward=(f"{tmp_path}/mine.py:reward",), **changes)
    row = metrics_of(tmp_path / "out")[1]
    assert row["reward_std"] > 0.1 and row["completion_length"] == 1.0
    assert row["value_mean"] == 0.0 and row["return_mean"] == pytest.approx(row["reward"], abs=1e-5)
    assert row["value_loss"] == pytest.approx((row["reward"] ** 2 + row["reward_std"] ** 2) / 2, rel=1e-4)
    assert row["explained_variance"] == pytest.approx(0.0, abs=1e-5)
    assert abs(row["policy_loss"]) < 1e-5 and row["grad_norm"] > 0.1
    assert row["loss"] == pytest.approx(row["value_loss"], rel=1e-4)


def test_the_loss_of_ppo_is_the_weighted_sum_of_its_parts(data, tiny_folder, tmp_path):
    """policy_loss + vf_coef * value_loss - entropy_coef * entropy + sft_coef * sft_loss. With one update per step the
    entropy of the rollout is that of the loss. The SFT loss falls."""
    coefficients = {"vf_coef": 0.5, "entropy_coef": 0.25, "sft_coef": 2.0, "sft_dataset": f"{data}/rows.jsonl"}
    run("ppo", data, tiny_folder, tmp_path / "out", steps=6, lr=2e-3, **coefficients, **ONE_UPDATE)
    rows = metrics_of(tmp_path / "out")[1:]
    for row in rows:
        parts = row["policy_loss"], 0.5 * row["value_loss"], -0.25 * row["entropy"], 2.0 * row["sft_loss"]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-4)
        assert min(abs(part) for part in parts[1:]) > 1e-3
    assert rows[-1]["sft_loss"] < rows[0]["sft_loss"] - 0.2


def test_the_sft_rows_of_a_step_of_ppo_are_shared_among_its_minibatches(data, tiny_folder, tmp_path, monkeypatch):
    """Four rows for the SFT loss and four prompts a step: each row is drawn once. With a learning rate that moves
    nothing the SFT loss is the mean over the tokens of all four, from the model's logits, however many minibatches
    share them. One minibatch is normalised by the tokens of all four, each of four by those of a row of its own."""
    original, normalisers = ppo.sft_loss, []

    def recorded(logprobs, mask, num_tokens):
        normalisers.append(num_tokens)
        return original(logprobs, mask, num_tokens)

    monkeypatch.setattr(ppo, "sft_loss", recorded)
    rows = sft.arithmetic_rows("train", 4)
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = sft.tiny_tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    total = sum(logp_of(model, tokenizer, row["prompt"], row["completion"]) for row in rows)
    lengths = [len(turn_ids(tokenizer, row["prompt"], row["completion"])[1]) for row in rows]
    expected = -total / sum(lengths)
    for count in (1, 4):
        normalisers.clear()
        changes = {"num_minibatches": count, "num_epochs": 1, "lr": 1e-12, "steps": 1}
        changes |= {"sft_coef": 1.0, "sft_dataset": f"{tmp_path}/sft.jsonl"}
        run("ppo", data, tiny_folder, tmp_path / str(count), **changes)
        assert metrics_of(tmp_path / str(count))[1]["sft_loss"] == pytest.approx(expected, rel=1e-5)
        assert sorted(normalisers) == (sorted(lengths) if count == 4 else [sum(lengths)])


@ONLINE
def test_is_cap_weighs_the_gradient_of_each_token(name, data, tiny_folder, tmp_path):
    """On a CPU sampling and training agree, so every weight is 1; capped at 1/2 they are 1/2, and halve the gradient of
    the policy, but not that of the value model. With a cap of 2 the weights change nothing."""
    changes = {"kl_coef": 0.0, "steps": 1, **ONE_UPDATE} if name == "ppo" else {"kl_coef": 0.0, "steps": 1}
    rows = {}
    for cap in (0.0, 0.5, 2.0):
        run(name, data, tiny_folder, tmp_path / str(cap), is_cap=cap, **changes)
        rows[cap] = metrics_of(tmp_path / str(cap))[1]
    assert "is_weight" not in rows[0.0] and rows[0.0]["grad_norm"] > 1e-3
    assert rows[0.5]["is_weight"] == 0.5 and rows[2.0]["is_weight"] == pytest.approx(1.0, abs=1e-5)
    assert rows[0.5]["grad_norm"] == pytest.approx(0.5 * rows[0.0]["grad_norm"], rel=1e-3)
    assert rows[2.0]["grad_norm"] == pytest.approx(rows[0.0]["grad_norm"], rel=1e-3)
    if name == "ppo":
        assert rows[0.5]["value_grad_norm"] == pytest.approx(rows[0.0]["value_grad_norm"], rel=1e-3)


def test_the_true_accuracy_of_ppo_stands_beside_the_score_of_a_reward_model(tiny_folder, tmp_path):
    """A policy that answers every prompt with `#### 2`, right for half of the rows: `accuracy` is the share of the
    rollout's rows whose answer is 2, while `reward` is what the reward model gives."""
    prompts = [f"{a}+{b}=" for a in range(5) for b in range(4)]
    rows = [{"prompt": prompt, "completion": "#### 2", "answer": str(2 + i % 2)} for i, prompt in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, same = str(tmp_path / "model"), {"dataset": f"{tmp_path}/rows.jsonl", "eval_size": 4, "eval_every": 100}
    sft.main(sft.Args(out=model, steps=40, batch_size=16, warmup_steps=5, max_new_tokens=8, max_length=200, **same))
    reward = tiny_reward_model(tmp_path / "reward", tiny_folder)
    online = {"prompts_per_step": 8, "num_minibatches": 1, "num_epochs": 1, "max_new_tokens": 8, "sample_every": 1}
    ppo.main(ppo.Args(model=model, out=str(tmp_path / "out"), reward=(str(reward),), steps=2, **online, **same))
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32).eval()
    tokenizer, answers = sft.tiny_tokenizer(), {row["prompt"]: row["answer"] for row in rows}
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for row in metrics_of(tmp_path / "out")[1:]:
        own = [sample for sample in samples if sample["step"] == row["step"]]
        lines = [sample["completion"].rpartition("####") for sample in own]
        right = [line[1] and line[2].strip() == answers[sample["prompt"]] for line, sample in zip(lines, own)]
        assert len(own) == 8 and row["accuracy"] == pytest.approx(sum(map(bool, right)) / 8) and 0 < row["accuracy"] < 1
        scores = [reward_of(scorer, tokenizer, sample["prompt"], sample["completion"]) for sample in own]
        assert row[f"reward/{reward}"] == pytest.approx(sum(scores) / 8, abs=1e-4)


@PAIRS
def test_the_first_loss_of_a_run_on_pairs(name, runs):
    """dpo.py: the policy is its reference, so z = 0 and the loss ln 2: exactly in the evaluation, which pads as the
    scoring by the reference did, to the rounding of another padding in step 1. rm.py: near ln 2, but not there."""
    before, first = metrics_of(runs[name][0])[:2]
    if name == "rm":
        assert 0.3 < before["eval/loss"] < 2.0 and 0.3 < first["loss"] < 2.0
        return
    for value in (before["eval/loss"], first["loss"]):
        assert value == pytest.approx(math.log(2), abs=1e-5)
    for key in ("margin", "chosen_reward", "rejected_reward"):
        assert before[f"eval/{key}"] == 0.0
        assert first[key] == pytest.approx(0.0, abs=1e-5)
    assert before["eval/pair_accuracy"] == 0.5


@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
def test_dpo_against_another_reference_by_hand(label_smoothing, data, tiny_folder, other_folder, tmp_path):
    """--reference another folder: evaluation before step 1 and the loss of step 1, over all 32 pairs, from the logits
    of both models: z = beta * ((c - c_ref) - (r - r_ref)), loss = (1 - s) * softplus(-z) + s * softplus(z); without
    smoothing in the evaluation. Neither is ln 2."""
    changes = {"beta": 0.5, "batch_size": 32, "steps": 1, "reference": other_folder, "label_smoothing": label_smoothing}
    run("dpo", data, tiny_folder, tmp_path / "out", **changes)
    tokenizer, rows = sft.tiny_tokenizer(), sft.arithmetic_rows("train", 40)
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tiny_folder, other_folder)
    )
    rewards = []
    for row in rows:
        pair = [(row["prompt"], row[side]) for side in ("chosen", "rejected")]
        logps = [[logp_of(model, tokenizer, *texts) for texts in pair] for model in (policy, reference)]
        rewards.append([0.5 * (logps[0][k] - logps[1][k]) for k in (0, 1)])
    z = [chosen - rejected for chosen, rejected in rewards]
    before, first = metrics_of(tmp_path / "out")[:2]
    expected = sum(softplus(-x) for x in z[32:]) / 8
    assert abs(expected - math.log(2)) > 0.02
    assert before["eval/loss"] == pytest.approx(expected, abs=1e-4)
    assert before["eval/margin"] == pytest.approx(sum(z[32:]) / 8, abs=1e-4)
    assert before["eval/pair_accuracy"] == pytest.approx(sum(x > 0 for x in z[32:]) / 8)
    for k, side in enumerate(("chosen", "rejected")):
        assert before[f"eval/{side}_reward"] == pytest.approx(sum(pair[k] for pair in rewards[32:]) / 8, abs=1e-4)
    s = label_smoothing
    expected = sum((1 - s) * softplus(-x) + s * softplus(x) for x in z[:32]) / 32
    assert first["loss"] == pytest.approx(expected, abs=1e-4)
    assert first["margin"] == pytest.approx(sum(z[:32]) / 32, abs=1e-4)


@pytest.mark.parametrize("with_margin", [False, True])
def test_the_loss_of_rm_by_hand(with_margin, data, tiny_folder, tmp_path):
    """The loss of step 1 over all 32 pairs, from rewards that transformers gives without padding: softplus(-(r_c - r_r
    - margin)) + center_coef * (r_c + r_r)^2, with the column `margin` where there is one; the evaluation without
    either. The rewards are those of a finished run of rm.py, whose folder rm.py goes on from."""
    run("rm", data, tiny_folder, tmp_path / "first")
    rows = sft.arithmetic_rows("train", 40)
    if with_margin:
        rows = [{**row, "margin": (i % 5) / 2 - 0.5} for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"dataset": f"{tmp_path}/rows.jsonl", "center_coef": 0.5, "batch_size": 32, "steps": 1}
    run("rm", data, str(tmp_path / "first"), tmp_path / "out", **changes)
    loader = transformers.AutoModelForSequenceClassification
    model = loader.from_pretrained(tmp_path / "first", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "first")
    rewards = [
        [reward_of(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows
    ]
    before, first = metrics_of(tmp_path / "out")[:2]
    expected = sum(
        softplus(row.get("margin", 0.0) - c + r) + 0.5 * (c + r) ** 2 for row, (c, r) in zip(rows[:32], rewards)
    )
    assert first["loss"] == pytest.approx(expected / 32, rel=1e-4)
    assert first["margin"] == pytest.approx(sum(c - r for c, r in rewards[:32]) / 32, abs=1e-4)
    assert first["reward_mean"] == pytest.approx(sum(c + r for c, r in rewards[:32]) / 64, abs=1e-4)
    assert before["eval/loss"] == pytest.approx(sum(softplus(r - c) for c, r in rewards[32:]) / 8, abs=1e-4)
    assert before["eval/pair_accuracy"] == pytest.approx(sum(c > r for c, r in rewards[32:]) / 8)


def test_the_loss_of_the_first_step_is_the_policy_gradient_loss_worked_from_its_parts(data, tiny_folder, tmp_path):
    """At ratio 1 and KL 0 the loss is -mean(A), and advantages of a group sum to 0: the loss is 0 up to rounding while
    the gradient is not."""
    run("grpo", data, tiny_folder, tmp_path / "out", steps=1)
    row = metrics_of(tmp_path / "out")[1]
    assert abs(row["loss"]) < 1e-6 and row["grad_norm"] > 0.1 and row["adv_abs_mean"] > 0.1


@ALL
def test_documented_metrics_are_there(name, data, tiny_folder, tmp_path):
    """Every metric that the header names is in metrics.jsonl, and every key of metrics.jsonl is in the header."""
    changes = {"num_epochs": 2, "sft_coef": 0.1, "sft_dataset": f"{data}/rows.jsonl", "is_cap": 2.0}
    changes = changes if name in ("ppo", "grpo") else {}
    metrics = run(name, data, tiny_folder, tmp_path / "out", **changes)
    rows = metrics_of(tmp_path / "out")
    keys = set().union(*rows) | {key for key in metrics if key.startswith("before/")}
    table = SCRIPTS[name].__doc__.partition("Metrics (metrics.jsonl)")[2].partition("\n\n")[0].partition("\n")[2]
    documented = set()
    for line in table.splitlines():
        if line.startswith("  ") and not line.startswith("    "):
            names = re.split(r"  +", line.strip())[0]
            documented |= {word for word in re.findall(r"[\w/*]+", names) if re.search(r"[a-z]", word)}
    if "eval/" in documented:  # dpo.py: eval/... are the first seven on held-out pairs
        assert name == "dpo" and "the first seven on held-out pairs" in table
        seven = [
            "loss",
            "pair_accuracy",
            "margin",
            "chosen_reward",
            "rejected_reward",
            "chosen_logps",
            "rejected_logps",
        ]
        assert set(seven) <= documented
        documented = documented - {"eval/"} | {f"eval/{word}" for word in seven}
    documented = {re.sub("NAME|(?<=_)K$", "*", word) for word in documented}
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


@ALL
def test_main_returns_the_last_row_and_the_first_evaluation(name, runs):
    """before/... is the evaluation of step 0, eval/... that of the last step."""
    folder, metrics = runs[name]
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for key, value in rows[-1].items():
        assert metrics[key] == value
    expected = {"accuracy_sampled", "accuracy_greedy", "answered_sampled", "answered_greedy"} if name != "rm" else set()
    expected |= {"loss", "pair_accuracy", "margin"} if name in ("rm", "dpo") else set()
    assert expected <= {key[5:] for key in rows[0] if key.startswith("eval/")}
    for key in [key[5:] for key in rows[0] if key.startswith("eval/")]:
        assert metrics[f"before/{key}"] == rows[0][f"eval/{key}"]
        assert f"eval/{key}" in metrics
    if name in ("sft", "dpo"):
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


@pytest.mark.parametrize("name", ["rm", "ppo", "grpo", "dpo"])
def test_metrics_do_not_depend_on_the_micro_batches(name, data, tiny_folder, other_folder, tmp_path):
    """The same for all that is averaged over tokens, sequences or pairs, in the online scripts with two epochs; a
    maximum is the largest of all."""
    rows = []
    for size in (16384, 1):
        changes = {"micro_batch_tokens": size}
        if name == "dpo":
            changes |= {"reference": other_folder}
        if name in ("ppo", "grpo"):
            changes |= {"num_epochs": 2, "rollout_batch_size": 16384 if size > 1 else 2}
        run(name, data, tiny_folder, tmp_path / str(size), steps=1, **changes)
        rows.append(metrics_of(tmp_path / str(size))[1])
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) > 12
    for key in rows[0]:
        if rows[0][key] is None:  # an empty bin of the calibration
            assert rows[1][key] is None, key
        elif not key.startswith("time/"):
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-3, abs=2e-6), key


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("name", SCRIPTS)
def test_compile_gives_the_same_run(name, data, tiny_folder, tmp_path, monkeypatch):
    """--compile changes losses and gradient norms by rounding alone, and compiles the one layer of each model that a
    step runs through (the trained ones, and the reference of the online scripts) and parts of the copy that samples."""
    layers, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: (layers.append(self), compile_module(self, **options))
    )
    config = transformers.AutoConfig.from_pretrained(tiny_folder, num_hidden_layers=1, layer_types=["full_attention"])
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "one layer")
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "one layer")
    rows = []
    for compiled in (False, True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        run(name, data, tiny_folder, tmp_path / str(compiled), model=f"{tmp_path}/one layer", compile=compiled)
        rows.append(metrics_of(tmp_path / str(compiled))[1:])
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
    of_sampler = sorted(type(x).__name__ for x in layers if not type(x).__name__.endswith("Layer"))
    assert of_sampler == ([] if name == "rm" else ["Qwen3MLP", *["Qwen3RMSNorm"] * 5])
    assert len(layers) - len(of_sampler) == {"grpo": 2, "ppo": 3}.get(name, 1) and len(rows[0]) == 2
    for plain, compiled in zip(*rows, strict=True):
        for key in ("loss", "grad_norm", *(("value_grad_norm",) if name == "ppo" else ())):
            assert compiled[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------------ NaN


LOSSES = {
    "sft": "sft_loss",
    "rm": "bradley_terry_loss",
    "ppo": "policy_loss",
    "grpo": "grpo_loss",
    "dpo": "dpo_loss",
}


def spoil(monkeypatch, module, function: str, calls: set[int]) -> list[int]:
    """Makes the loss function return NaN at these calls in training, counted from 1; returns the list that counts
    them. Evaluations, which call it without gradient, are not counted."""
    original, count = getattr(module, function), []

    def spoiled(*args, **kwargs):
        result = original(*args, **kwargs)
        loss, *rest = result if isinstance(result, tuple) else (result,)
        if not loss.requires_grad:
            return result
        count.append(1)
        loss = loss * math.nan if len(count) in calls else loss
        return (loss, *rest) if rest else loss

    monkeypatch.setattr(module, function, spoiled)
    return count


@ALL
def test_an_update_that_is_not_finite_is_skipped_and_counted(name, data, tiny_folder, tmp_path, monkeypatch, capsys):
    """NaN at step 2 of 3: that step leaves weights and optimizer as they are, says so, and counts; the run goes on, and
    what it saves is finite. (steps have one micro-batch, so call 2 is step 2.) ppo.py's value model, whose own gradient
    was finite, waits as well."""
    spoil(monkeypatch, SCRIPTS[name], LOSSES[name], {2})
    changes = {"lr": 1e-3, "lr_schedule": "constant", **one_update(name)}
    run(name, data, tiny_folder, tmp_path / "out", steps=3, save_every=1, **changes)
    assert "skipped" in capsys.readouterr().out
    rows = metrics_of(tmp_path / "out")
    assert [row["skipped_updates"] for row in rows] == [0, 0, 1, 1]
    run(name, data, tiny_folder, tmp_path / "one", steps=1, **changes)
    for optimizer, model in (("optimizer", ""), *([("value_optimizer", "value_model")] if name == "ppo" else [])):
        checkpoints = {step: tmp_path / "out" / "checkpoints" / f"step-{step}" for step in (2, 3)}
        steps = []
        for folder in checkpoints.values():
            states = torch.load(folder / "state.pt", weights_only=True)[optimizer]["state"]
            assert all(torch.isfinite(value).all() for state in states.values() for value in state.values())
            assert all(torch.isfinite(value).all() for value in weights_of(folder / model).values())
            steps.append({int(state["step"]) for state in states.values()})
        assert steps == [{1}, {2}]
        after = {step: weights_of(folder / model) for step, folder in checkpoints.items()}
        for key, value in weights_of(tmp_path / "one/checkpoints/step-1" / model).items():
            assert torch.equal(value, after[2][key]), f"step 2 changed {key}"
        assert any(not torch.equal(value, after[3][key]) for key, value in after[2].items())


@ALL
def test_ten_updates_in_a_row_that_are_not_finite_end_the_run(name, data, tiny_folder, tmp_path, monkeypatch):
    """Nine in a row, one good and then ten in a row: the run ends at call 20, not before."""
    calls = spoil(monkeypatch, SCRIPTS[name], LOSSES[name], {*range(1, 10), *range(11, 100)})
    with pytest.raises(SystemExit) as info:
        run(name, data, tiny_folder, tmp_path / "out", steps=40, sample_every=100, **one_update(name))
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


@ALL
def test_metrics_stay_json_when_an_update_is_skipped(name, data, tiny_folder, tmp_path, monkeypatch):
    """NaN is no JSON: a strict reader reads every line of metrics.jsonl."""
    spoil(monkeypatch, SCRIPTS[name], LOSSES[name], {1})
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


def test_resume_refuses_data_that_has_grown(data, tiny_folder, tmp_path):
    """12 rows to train on make 3 steps, 32 make 8; under a decaying learning rate that changes every one of them."""
    file, rows = tmp_path / "rows.jsonl", (data / "rows.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:20]))
    changes = {"dataset": str(file), "steps": None, "epochs": 1, "save_every": 1}
    run("sft", data, tiny_folder, tmp_path / "out", **changes)
    file.write_text("".join(rows))
    with pytest.raises(SystemExit, match="--steps was 3; 8 would change the result"):
        run("sft", data, tiny_folder, tmp_path / "out", resume=True, **changes)


def test_a_step_without_any_signal_changes_nothing(data, tiny_folder, tmp_path):
    """All rewards equal and kl_coef 0: nothing is computed, the loss and the gradient are 0, the weights stay."""
    changes = {"reward": (f"{data}/rewards.py:constant",), "kl_coef": 0.0}
    run("grpo", data, tiny_folder, tmp_path / "out", **changes)
    rows = metrics_of(tmp_path / "out")[1:]
    for row in rows:
        assert (row["frac_zero_std"], row["frac_trained"], row["loss"], row["grad_norm"]) == (1.0, 0.0, 0.0, 0.0)
        assert not {"entropy", "sampling_gap_mean", "sampling_gap_max"} & row.keys()
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


def tiny_reward_model(folder: Path, tiny_folder: str) -> Path:
    """A reward model with the tiny model's weights and tokenizer, its head drawn wide enough to tell texts apart."""
    shutil.copytree(tiny_folder, folder)
    config = transformers.AutoConfig.from_pretrained(tiny_folder, num_labels=1)
    torch.manual_seed(0)
    loader = transformers.AutoModelForSequenceClassification
    model = loader.from_pretrained(tiny_folder, config=config, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.1)
    model.save_pretrained(folder)
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


@ONLINE
def test_a_reward_model_and_a_function_are_added_with_their_weights(name, data, tiny_folder, tmp_path):
    """A run with a reward model, a function and the format: the reward of a step is the weighted sum of the three
    means, each logged under its own name. (The reward model has another tokenizer, so ppo.py's value model starts from
    the policy; the penalty of ppo.py is off.)"""
    folder = reward_model(tmp_path / "reward", "Qwen3", True)
    names, weights = (str(folder), f"{data}/rewards.py:letters", "format"), (0.5, -2.0, 1.0)
    changes = {"value_model": tiny_folder, "missing_eos_penalty": 0.0} if name == "ppo" else {}
    run(name, data, tiny_folder, tmp_path / "out", reward=names, reward_weights=weights, **changes)
    for row in metrics_of(tmp_path / "out")[1:]:
        parts = [row[key] for key in row if key.startswith("reward/")]
        assert len(parts) == 3
        total = sum(weight * part for weight, part in zip(weights, parts))
        assert row["reward"] == pytest.approx(total, abs=1e-5)
        assert row["reward"] != pytest.approx(sum(parts), abs=1e-3)


@ONLINE
def test_a_reward_function_gets_prompts_completions_and_rows_in_step(name, data, tiny_folder, tmp_path):
    """It is called with texts and with the rows that they belong to, all columns included, `group_size` neighbours per
    prompt; no special token is left in the text."""
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "def reward(prompts, completions, rows):\n"
        f"    with open({str(tmp_path / 'calls.jsonl')!r}, 'a') as file:\n"
        "        file.write(json.dumps([prompts, completions, rows]) + '\\n')\n"
        "    return [len(text) for text in completions]\n"
    )
    run(name, data, tiny_folder, tmp_path / "out", steps=1, reward=(f"{tmp_path}/mine.py:reward",))
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [len(call[0]) for call in calls] == [1, 8, 8, 8, 8, 8]  # trial, evaluation twice, rollout, evaluation twice
    known = {json.dumps(json.loads(line)) for line in (data / "rows.jsonl").read_text().splitlines()}
    for prompts, completions, rows in calls:
        assert prompts == [row["prompt"] for row in rows]
        assert all(json.dumps(row) in known for row in rows)
        assert all(isinstance(text, str) and "<|end|>" not in text for text in completions)
    prompts = calls[3][0]
    assert prompts[::2] == prompts[1::2] and len(set(prompts)) == 4


@ONLINE
def test_truncated_completions_are_counted_and_pay_the_penalty(name, data, tiny_folder, tmp_path):
    """Completions of one token hardly ever end: the reward is 1 less the penalty for those that did not, and the share
    of them is logged. The reward before the penalty keeps its own name."""
    changes = {"reward": (f"{data}/rewards.py:constant",), "max_new_tokens": 1, "prompts_per_step": 8, "steps": 1}
    run(name, data, tiny_folder, tmp_path / "out", missing_eos_penalty=0.5, **changes)
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


def test_a_tiny_target_kl_ends_the_updates_of_a_step_of_ppo_early(data, tiny_folder, tmp_path):
    """Two epochs of two minibatches are four updates a step. With --target-kl 1e-9 the drift after the first update is
    past it: each step does one update of either model, and num_updates says so."""
    updates = {}
    for name, target_kl in (("four", None), ("stopped", 1e-9)):
        run("ppo", data, tiny_folder, tmp_path / name, target_kl=target_kl)
        state = torch.load(tmp_path / name / "checkpoints" / "step-2" / "state.pt", weights_only=True)
        for optimizer in ("optimizer", "value_optimizer"):
            updates[name, optimizer] = {int(value["step"]) for value in state[optimizer]["state"].values()}
    assert updates["four", "optimizer"] == updates["four", "value_optimizer"] == {8}
    assert updates["stopped", "optimizer"] == updates["stopped", "value_optimizer"] == {2}
    assert [row["num_updates"] for row in metrics_of(tmp_path / "four")[1:]] == [4, 4]
    assert [row["num_updates"] for row in metrics_of(tmp_path / "stopped")[1:]] == [1, 1]
    assert all(row["approx_kl_old"] > 0 for row in metrics_of(tmp_path / "stopped")[1:])


def test_the_sft_loss_is_mixed_in(data, tiny_folder, tmp_path):
    """With constant rewards and no KL the SFT loss alone trains: it is logged, it falls, and the loss is half of it."""
    changes = {"reward": (f"{data}/rewards.py:constant",), "kl_coef": 0.0, "steps": 6, "lr": 2e-3}
    run("grpo", data, tiny_folder, tmp_path / "out", sft_coef=0.5, sft_dataset=f"{data}/rows.jsonl", **changes)
    rows = metrics_of(tmp_path / "out")[1:]
    assert rows[-1]["sft_loss"] < rows[0]["sft_loss"] - 0.2
    for row in rows:
        assert row["loss"] == pytest.approx(0.5 * row["sft_loss"], rel=1e-4)


# --------------------------------------------------------------------------------------------------- data of every kind


def test_gsm8k_rows_run_through_sft_grpo_and_ppo(data, tiny_folder, tmp_path):
    """question + answer, as GSM8K is published: sft.py, then grpo.py and ppo.py on its folder with the same file and
    the exact reward. All metrics are finite, samples are readable, the trained text closes with the answer line."""
    (tmp_path / "sft").mkdir()
    changes = {"dataset": f"{data}/gsm8k.jsonl", "max_new_tokens": 24, "steps": 2}
    runs = [run("sft", data, tiny_folder, tmp_path / "sft", max_length=400, **changes)]
    changes |= {"model": str(tmp_path / "sft"), "reward": ("exact", "format"), "max_prompt_length": 300}
    for name in ("grpo", "ppo"):
        runs.append(run(name, data, tiny_folder, tmp_path / name, system_prompt="End with `#### answer`.", **changes))
        assert {"reward/exact", "reward/format"} <= set(runs[-1])
    for metrics in runs:
        metrics = {key: value for key, value in metrics.items() if key != "explained_variance"}  # rewards may be equal
        assert metrics["step"] == 2 and all(map(math.isfinite, numbers(metrics)))
        assert "eval/accuracy_sampled" in metrics and "before/accuracy_greedy" in metrics
    for folder in (tmp_path / "sft", tmp_path / "grpo", tmp_path / "ppo"):
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert samples and all("apples" in str(sample["prompt"]) for sample in samples)


def test_messages_run_through_sft_and_every_assistant_turn_is_trained(data, tiny_folder, tmp_path, capsys):
    """Two assistant turns a row, no answer column: the loss is measured, accuracy is not; the first batch is shown with
    both turns marked as trained and nothing else."""
    metrics = run("sft", data, tiny_folder, tmp_path / "out", dataset=f"{data}/messages.jsonl", steps=1)
    assert math.isfinite(metrics["eval/loss"]) and not [key for key in metrics if "accuracy" in key]
    shown = re.findall(r"«(.+?)»", capsys.readouterr().out, flags=re.S)
    assert len(shown) == 2 and shown[0].endswith("<|end|>") and "####" in shown[0] and shown[1] == "done<|end|>"


def layouts(rows: list[dict]) -> dict[str, list[dict]]:
    """The same conversations of three turns, chosen and rejected: as text in the layout of HH-RLHF, as messages from
    beginning to end, and as a prompt of messages with the last turns as text."""
    result = {"text": [], "messages": [], "prompt": []}
    for row in rows:
        before = f"\n\nHuman: {row['prompt']}\n\nAssistant: Let me see.\n\nHuman: Go on.\n\nAssistant:"
        turns = [("user", row["prompt"]), ("assistant", "Let me see."), ("user", "Go on.")]
        prompt = [{"role": role, "content": content} for role, content in turns]
        sides = {side: row[side] for side in ("chosen", "rejected")}
        result["text"].append({side: f"{before} {text}" for side, text in sides.items()})
        ends = {side: [*prompt, {"role": "assistant", "content": text}] for side, text in sides.items()}
        result["messages"].append(ends)
        result["prompt"].append({"prompt": prompt, **sides})
    return result


@PAIRS
def test_three_layouts_of_the_same_conversations_train_the_same_model(name, data, tiny_folder, tmp_path, capsys):
    """HH-RLHF's text, whole conversations of messages, and a prompt beside two answers: the rows of all three are the
    same conversations, so the weights are the same, bit for bit. All that is scored or trained is shown once: the
    markers of HH-RLHF have become turns. There is no answer, so there is no accuracy."""
    finals = {}
    for layout, rows in layouts(sft.arithmetic_rows("train", 40)).items():
        (tmp_path / f"{layout}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = {"dataset": f"{tmp_path}/{layout}.jsonl", "max_length": 300}
        metrics = run(name, data, tiny_folder, tmp_path / layout, **dataset)
        text = capsys.readouterr().out
        assert metrics["step"] == 2 and all(map(math.isfinite, numbers(metrics)))
        assert "eval/pair_accuracy" in metrics and not [key for key in metrics if "eval/accuracy" in key]
        shown = (
            r"<\|user\|>[\d+]+=<\|end\|><\|assistant\|>Let me see\.<\|end\|><\|user\|>Go on\.<\|end\|><\|assistant\|>"
        )
        completion = r"«\d[^«»]*#### \d+<\|end\|>»" if name == "dpo" else r"\d[^«»]*#### \d+«<\|end\|>»"
        assert re.search(shown + completion, text), text
        assert "Human" not in text
        finals[layout] = (tmp_path / layout / "model.safetensors").read_bytes()
    assert finals["text"] == finals["messages"] == finals["prompt"]


@PAIRS
def test_pairs_that_hold_no_preference_are_dropped_and_counted(name, data, tiny_folder, tmp_path, capsys):
    """Of 32 rows in HH-RLHF's layout three have equal sides, two part before the last turn and one has an empty side:
    26 are trained on. A pair that is there twice is kept and mentioned. The 8 rows of the evaluation are whole."""
    rows = layouts(sft.arithmetic_rows("train", 40))["text"]
    for i in (0, 3, 5):
        rows[i]["rejected"] = rows[i]["chosen"]
    for i in (7, 8):
        rows[i]["rejected"] = rows[i]["rejected"].replace("Let me see.", "Well.")
    rows[9]["rejected"] = rows[9]["rejected"].rpartition("Assistant:")[0] + "Assistant: "
    rows[11] = rows[10]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(name, data, tiny_folder, tmp_path / "out", dataset=f"{tmp_path}/rows.jsonl", max_length=300, steps=1)
    text = capsys.readouterr().out
    dropped = re.search(r"--dataset: dropped of 32 pairs: (.*)", text).group(1)
    assert "3 with equal sides" in dropped and "2 with sides that" in dropped and "1 with an empty side" in dropped
    assert re.search(r"--dataset: 1 pairs? repeats? .* 0 contradict", text)
    assert "--dataset: 26 pairs" in text and ", 26 pairs" in text and "--eval-dataset: 8 pairs" in text


def test_dpo_scores_pairs_without_training(data, tiny_folder, other_folder, tmp_path, capsys):
    """--score-only writes beta * (log pi - log pi_ref) of both sides of every row, from the two models' own logits, and
    nothing else; main returns the means, the accuracy and the margin."""
    changes = {"score_only": True, "reference": other_folder, "beta": 0.3}
    metrics = run("dpo", data, tiny_folder, tmp_path / "out", **changes)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["implicit_rewards.jsonl"]
    scored = [json.loads(line) for line in (tmp_path / "out/implicit_rewards.jsonl").read_text().splitlines()]
    rows, tokenizer = sft.arithmetic_rows("train", 40), sft.tiny_tokenizer()
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tiny_folder, other_folder)
    )
    assert len(scored) == 40
    expected = []
    for row, result in zip(rows, scored):
        assert {key: result[key] for key in row} == row
        pair = []
        for side in ("chosen", "rejected"):
            logps = [logp_of(model, tokenizer, row["prompt"], row[side]) for model in (policy, reference)]
            pair.append(0.3 * (logps[0] - logps[1]))
            assert result[f"{side}_reward"] == pytest.approx(pair[-1], abs=1e-4)
        expected.append(pair)
    assert len({round(chosen, 3) for chosen, _ in expected}) > 20
    assert metrics["chosen_reward"] == pytest.approx(sum(chosen for chosen, _ in expected) / 40, abs=1e-4)
    assert metrics["rejected_reward"] == pytest.approx(sum(rejected for _, rejected in expected) / 40, abs=1e-4)
    assert metrics["pair_accuracy"] == pytest.approx(sum(chosen > rejected for chosen, rejected in expected) / 40)
    assert metrics["margin"] == pytest.approx(sum(chosen - rejected for chosen, rejected in expected) / 40, abs=1e-4)


def test_dpo_scores_completions_without_training(data, tiny_folder, other_folder, tmp_path):
    """The same for rows of prompt + completion, under a system prompt: one reward each. --overwrite replaces the
    file; the model and its reference may be the same, and then all rewards are 0."""
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in sft.arithmetic_rows("train", 12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"score_only": True, "beta": 0.3, "system_prompt": "Add.", "dataset": f"{tmp_path}/rows.jsonl"}
    metrics = run("dpo", data, tiny_folder, tmp_path / "out", reference=other_folder, **changes)
    file, tokenizer = tmp_path / "out/implicit_rewards.jsonl", sft.tiny_tokenizer()
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tiny_folder, other_folder)
    )
    expected = []
    for row in rows:
        ids = tokenizer.encode(f"<|system|>Add.<|end|><|user|>{row['prompt']}<|end|><|assistant|>")
        length = len(ids)
        ids += tokenizer.encode(f"{row['completion']}<|end|>")
        logps = []
        for model in (policy, reference):
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            logps.append(sum(logprobs[t - 1, ids[t]].item() for t in range(length, len(ids))))
        expected.append(0.3 * (logps[0] - logps[1]))
    scored = [json.loads(line) for line in file.read_text().splitlines()]
    assert [{key: result[key] for key in ("prompt", "completion")} for result in scored] == rows
    assert [result["completion_reward"] for result in scored] == pytest.approx(expected, abs=1e-4)
    assert metrics == {"completion_reward": pytest.approx(sum(expected) / 12, abs=1e-4)}
    trained = tmp_path / "trained"  # as a run with beta 2 leaves it: without --beta the scores take that
    shutil.copytree(tiny_folder, trained)
    (trained / "args.json").write_text(json.dumps({"args": {"beta": None}, "resolved": {"beta": 2.0}}))
    changes |= {"overwrite": True}
    run("dpo", data, str(trained), tmp_path / "out", reference=other_folder, **{**changes, "beta": None})
    scored = [json.loads(line)["completion_reward"] for line in file.read_text().splitlines()]
    assert scored == pytest.approx([2.0 / 0.3 * value for value in expected], abs=1e-3)
    run("dpo", data, tiny_folder, tmp_path / "out", reference=tiny_folder, **changes)
    assert [json.loads(line)["completion_reward"] for line in file.read_text().splitlines()] == [0.0] * 12


def test_scored_rows_are_numbered_as_in_the_data(data, tiny_folder, other_folder, tmp_path):
    """Equal sides and what is too long are dropped; `row` says which rows are left, counted from 0."""
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": side} for side in ("3", "2", "4", "5" * 300, "6")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"score_only": True, "reference": other_folder, "dataset": f"{tmp_path}/rows.jsonl", "max_length": 100}
    run("dpo", data, tiny_folder, tmp_path / "out", **changes)
    scored = [json.loads(line) for line in (tmp_path / "out/implicit_rewards.jsonl").read_text().splitlines()]
    assert [(result["row"], result["rejected"]) for result in scored] == [(0, "3"), (2, "4"), (4, "6")]


@ALL
def test_the_system_prompt_stands_in_front_of_every_prompt(name, data, tiny_folder, tmp_path, capsys):
    """It is part of what the model reads, never of what is trained."""
    run(name, data, tiny_folder, tmp_path / "out", steps=1, system_prompt="Add them up.")
    text = capsys.readouterr().out
    first = text.partition("trained tokens in «»")[2].partition("\n")[2].partition("first micro-batch")[0]
    assert re.match(r"<\|system\|>Add them up\.<\|end\|><\|user\|>[\d+]+=<\|end\|><\|assistant\|>", first), first
    assert first.count("Add them up.") == 1


@ALL
def test_evaluation_rows_are_kept_out_of_training(name, data, tiny_folder, tmp_path, capsys):
    """Of a file without splits the last eval_size rows are held out; with --eval-dataset all rows are trained on."""
    what = {"sft": "rows", "rm": "pairs", "dpo": "pairs", "ppo": "prompts", "grpo": "prompts"}[name]
    run(name, data, tiny_folder, tmp_path / "one", steps=1)
    assert f", 32 {what}," in capsys.readouterr().out
    other = f"{data}/rows.jsonl" if what == "pairs" else f"{data}/gsm8k.jsonl"
    length = {} if what == "prompts" else {"max_length": 300}
    length |= {"max_prompt_length": 300} if what == "prompts" else {}
    run(name, data, tiny_folder, tmp_path / "two", steps=1, eval_dataset=other, **length)
    assert f", 40 {what}," in capsys.readouterr().out


@ONLINE
def test_a_run_that_no_sample_can_answer_says_so_before_step_1(name, data, tiny_folder, tmp_path, capsys):
    """A random model writes no answer line: the warning names --system-prompt and stands before the first step."""
    run(name, data, tiny_folder, tmp_path / "out", reward=("exact",), steps=1)
    text = capsys.readouterr().out
    assert 0 <= text.find("--system-prompt") < text.find("step 1/1")


@pytest.mark.parametrize("name", ["rm", "ppo", "grpo", "dpo"])
def test_the_first_batch_is_shown(name, data, tiny_folder, tmp_path, capsys):
    """Prompt and completion as text with the trained tokens marked (rm.py: the one that the reward is read at), counts
    of tokens, BOS and EOS; in the online scripts the KL and the gap between sampling and training."""
    run(name, data, tiny_folder, tmp_path / "out", steps=1)
    text = capsys.readouterr().out
    marked = {"rm": r"[^«»]+#### \d+«<\|end\|>»\n", "dpo": r"«[^«»]+#### \d+<\|end\|>»\n"}.get(name, "«.+?»")
    assert re.search(r"<\|user\|>[\d+]+=<\|end\|><\|assistant\|>" + marked, text, flags=re.S)
    for word in ("BOS", "EOS", "trained", *(["KL", "max"] if name in ("ppo", "grpo") else [])):
        assert word in text
    assert text.find("«") < text.find("step 1/1")


@ONLINE
def test_sampling_that_differs_from_training_ends_the_run(name, data, tiny_folder, tmp_path, monkeypatch):
    """In float32 a gap of 0.01 between sampling and training log-probabilities is an error, before the first update."""
    original = SCRIPTS[name].generate

    def shifted(*args, **kwargs):
        completions, logprobs = original(*args, **kwargs)
        return completions, [[value - 0.01 for value in row] for row in logprobs]

    monkeypatch.setattr(SCRIPTS[name], "generate", shifted)
    with pytest.raises(SystemExit) as info:
        run(name, data, tiny_folder, tmp_path / "out")
    assert "sampling" in str(info.value)


@ONLINE
def test_the_gaps_are_those_of_all_micro_batches(name, data, tiny_folder, tmp_path, monkeypatch):
    """One token off by 1/2, another by 1/4, each row a micro-batch: largest 1/2, mean 3/4 over the number of tokens."""
    original = SCRIPTS[name].generate

    def shifted(*args, **kwargs):
        completions, logprobs = original(*args, **kwargs)
        logprobs[0][0] -= 0.5
        logprobs[5][-1] += 0.25
        return completions, logprobs

    monkeypatch.setattr(SCRIPTS[name], "generate", shifted)
    monkeypatch.setattr(SCRIPTS[name], "check_sampling", lambda *args: None)
    run(name, data, tiny_folder, tmp_path / "out", steps=1, kl_coef=0.1, micro_batch_tokens=1)
    row = metrics_of(tmp_path / "out")[1]
    assert row["sampling_gap_max"] == pytest.approx(0.5, abs=1e-4)
    assert row["sampling_gap_mean"] * row["completion_length"] * 8 == pytest.approx(0.75, abs=1e-3)


@ALL
def test_the_progress_line(name, data, tiny_folder, tmp_path, capsys):
    """One line per step, with speed and time left."""
    run(name, data, tiny_folder, tmp_path / "out")
    first = "reward" if name in ("ppo", "grpo") else "loss"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(rf"step [12]/2  {first} .*tokens/s  \d+:\d\d left", line), line


# ---------------------------------------------------------------------------------------------------- threads, tracking


@ALL
def test_main_can_be_called_from_another_thread(name, runs, data, tiny_folder, tmp_path):
    """Where no signal handler can be set, the run is the same."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run(name, data, tiny_folder, tmp_path / "out")))
    thread.start()
    thread.join()
    assert results and results[0]["step"] == 2
    final = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert final == (runs[name][0] / "model.safetensors").read_bytes()


@ALL
def test_two_runs_in_one_process_do_not_influence_each_other(name, runs, data, tiny_folder, tmp_path):
    """Randomness belongs to seed and step: another run before it changes nothing, nor do the global generators."""
    torch.manual_seed(123)
    random.seed(123)
    run(name, data, tiny_folder, tmp_path / "out")
    final = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert final == (runs[name][0] / "model.safetensors").read_bytes()
    run(name, data, tiny_folder, tmp_path / "other", seed=1)
    assert final != (tmp_path / "other" / "model.safetensors").read_bytes()


@ALL
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


@ALL
def test_tracking_without_wandb_writes_nothing(name, data, tiny_folder, tmp_path, monkeypatch):
    """--track without wandb installed ends with the flag's name and writes nothing."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as info:
        run(name, data, tiny_folder, tmp_path / "out", track=True)
    assert "--track" in str(info.value)
    assert not (tmp_path / "out").exists()


def test_resume_does_not_begin_a_finished_run_anew(data, tiny_folder, tmp_path):
    """Its checkpoints gone, a run that is to be extended has nothing to go on from: its logs and model stay."""
    changes = {"lr_schedule": "constant", "steps": 2}
    run("sft", data, tiny_folder, tmp_path / "out", **changes)
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit, match="no checkpoint to go on from"):
        run("sft", data, tiny_folder, tmp_path / "out", resume=True, **{**changes, "steps": 4})
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_run_without_a_checkpoint_keeps_nothing_of_the_one_before(data, tiny_folder, tmp_path):
    """Killed while --overwrite was removing a former run and then resumed: what is left of that run's model goes."""
    run("sft", data, tiny_folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    record = json.loads((tmp_path / "out" / "args.json").read_text())
    (tmp_path / "out" / "args.json").write_text(json.dumps({x: y for x, y in record.items() if x != "finished"}))
    (tmp_path / "out" / "merges.txt").write_text("of another tokenizer")
    (tmp_path / "out" / "notes.txt").write_text("the user's own")
    run("sft", data, tiny_folder, tmp_path / "out", resume=True)
    assert not (tmp_path / "out" / "merges.txt").exists() and (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out" / "notes.txt").read_text() == "the user's own"


def test_a_tokenizer_with_several_chat_templates_is_saved_and_saved_again(data, tiny_folder, tmp_path):
    """transformers writes all but the default one into a folder, which a run that is extended has to replace."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template + "tools"}
    tokenizer.save_pretrained(model)
    assert (model / "additional_chat_templates").is_dir()
    for changes in ({"steps": 2}, {"steps": 4, "resume": True}, {"steps": 2, "overwrite": True}):
        wanted = {"model": str(model), "lr_schedule": "constant", **changes}
        run("sft", data, str(model), tmp_path / "out", **wanted)
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
        assert saved == tokenizer.chat_template
