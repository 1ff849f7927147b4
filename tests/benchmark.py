"""Measures, and draws README's figures. First `pip install -r tests/requirements.txt`.

python tests/benchmark.py pipeline          all scripts with three seeds: README's table and tests/pipeline.png
python tests/benchmark.py curve             tests/learning_curve.png, from runs/sft and runs/grpo
python tests/benchmark.py rollout           completion tokens per second, against model.generate
python tests/benchmark.py step --name grpo  seconds per step of sft.py, dpo.py or grpo.py, against TRL's trainer
python tests/benchmark.py memory            peak of token_logprobs, against whole logits
python tests/benchmark.py gpu               on one GPU, in at most eight minutes: what README says of a GPU

Two sides run in turn on the same rows, weights and settings; a ratio is the median of the pairs' ratios.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
import tyro

import dpo
import grpo
import sft

DEVICE = grpo.DEVICE


def compare(ours, theirs, pairs: int, unit: str, other: str):
    """Runs both sides in turn, after a pair that warms up; prints medians, and the median of the pairs' ratios."""
    found = [(ours(i), theirs(i)) for i in range(pairs + 1)][1:]
    left, right, ratio = median(x for x, _ in found), median(y for _, y in found), median(x / y for x, y in found)
    print(f"here {left:,.4g} {unit}, {other} {right:,.4g} {unit}, ratio {ratio:.2f} ({pairs} pairs)", flush=True)


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function) -> float:
    start = clock()
    function()
    return clock() - start


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------- whole runs

RUNS = {  # name in the table: script, --reward
    "SFT": ("sft", None),
    "reward model": ("rm", None),
    "DPO": ("dpo", None),
    "PPO, reward model": ("ppo", "{}/reward-model-{}"),
    "PPO, verifier": ("ppo", "exact"),
    "GRPO, verifier": ("grpo", "exact"),
    "GRPO, negated": ("grpo", "{}/negated.py:f"),
}
NEGATED = "import grpo\ndef f(rows, texts): return [-grpo.exact_match(t, row['answer']) for t, row in zip(texts, rows)]"


def pipeline(seeds: tuple[int, ...] = (0, 1, 2), out: str = "runs/pipeline"):
    """Runs what is not finished yet; the control with the first seed alone. Prints a table, draws a figure."""
    from matplotlib import pyplot

    os.makedirs(out, exist_ok=True)
    Path(out, "negated.py").write_text(NEGATED)
    table = {name: [] for name in RUNS}
    for name, seed in [(x, seed) for x in RUNS for seed in (seeds[:1] if "negated" in x else seeds)]:
        script, reward = RUNS[name]
        folder = Path(out, f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
        if not (folder / "seconds").exists():
            shutil.rmtree(folder, ignore_errors=True)
            words = ["--eval-size", "1000", "--seed", str(seed), "--out", folder]
            words += ["--reward", reward.format(out, seed)] if reward else []
            words += ["--model", f"{out}/SFT-{seed}"] if script != "sft" else []
            command = [sys.executable, ROOT / f"{script}.py", *words]
            took = seconds(lambda c=command: subprocess.run(c, check=True, stdout=subprocess.DEVNULL))
            (folder / "seconds").write_text(f"{took:.0f}")
        last, found = rows_of(folder)[-1], ("eval/accuracy_sampled", "eval/accuracy_greedy", "eval/pair_accuracy")
        table[name].append([int((folder / "seconds").read_text()), *map(last.get, found)])
        print(folder, *table[name][-1], flush=True)
    print("\n| run | seconds | accuracy, sampled | accuracy, greedy | pairs |\n|---|---|---|---|---|")
    for name, (took, *columns) in [(name, zip(*found)) for name, found in table.items()]:
        cells = ["" if None in x else f"**{mean(x):.3f}** ({', '.join(f'{y:.3f}' for y in x)})" for x in columns]
        print(f"| {name} | {min(took)} to {max(took)} | {' | '.join(cells)} |")
    names = [name for name in RUNS if name not in ("GRPO, negated", "reward model")]
    axes = pyplot.subplots(figsize=(8, 3.6))[1]
    for k, (kind, color) in enumerate((("sampled", "#4c72b0"), ("greedy", "#dd8452"))):
        where, values = [i + 0.4 * k for i in range(5)], [[x[k + 1] for x in table[name]] for name in names]
        axes.bar(where, list(map(mean, values)), 0.38, label=kind, color=color)
        axes.plot(where, values, "k.", markersize=3)
    axes.set_xticks([i + 0.2 for i in range(5)], [name.replace(", ", ",\n") for name in names])
    finish(axes, "true accuracy on held-out prompts", "tests/pipeline.png")


def curve(sft_run: str = "runs/sft", grpo_run: str = "runs/grpo"):
    """Accuracy on held-out prompts and reward in training over the steps of sft.py, then of grpo.py."""
    from matplotlib import pyplot

    for axes, out in zip(pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)[1], (sft_run, grpo_run)):
        rows = rows_of(out)
        reward = [(x["step"], x["reward"]) for x in rows if "reward" in x]
        axes.plot(*zip(*reward or [(0, 0)]), color="#cccccc", label="reward in training" if reward else None)
        for kind, color in (("sampled", "#4c72b0"), ("greedy", "#dd8452")):
            points = [(x["step"], x[f"eval/accuracy_{kind}"]) for x in rows if f"eval/accuracy_{kind}" in x]
            axes.plot(*zip(*points), "o-", color=color, label=f"held-out accuracy, {kind}")
        axes.set(title=f"python {Path(out).name}.py", xlabel="step")
        finish(axes, "share that is right", "tests/learning_curve.png")


def finish(axes, label: str, path: str):
    axes.set(ylim=(0, 1.02), ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=1)
    axes.figure.tight_layout()
    axes.figure.savefig(ROOT / path, dpi=100)


# -------------------------------------------------------------------------------------------------- rollout and memory


def rollout(model: str = "runs/sft", num_prompts: int = 64, num_samples: int = 16, most: int = 64, pairs: int = 5):
    """Completion tokens per second of `generate` and of model.generate, which samples from the same distribution."""
    policy, tokenizer = grpo.load_model(model, grpo.DTYPE), transformers.AutoTokenizer.from_pretrained(model)
    eos = grpo.stop_ids(tokenizer, policy)
    prompts = [grpo.encode(tokenizer, row, None) for row in grpo.arithmetic("train")[:num_prompts]]
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": num_samples, "max_new_tokens": most}
    ids, seen = grpo.pad(prompts, left=True), grpo.pad([[1] * len(x) for x in prompts], left=True)

    def ours(i):
        made, draws = [], grpo.seeded(i, device=DEVICE)
        took = seconds(lambda: made.extend(grpo.generate(policy, prompts, num_samples, most, 1.0, eos, draws)[0]))
        return sum(map(len, made)) / took

    @torch.no_grad()
    def theirs(i):
        made = []
        torch.manual_seed(i)
        took = seconds(lambda: made.append(policy.generate(ids, attention_mask=seen, **options)))
        ends = torch.isin(made[0][:, ids.shape[1] :], torch.tensor(eos, device=DEVICE)).cumsum(1)
        return (((ends == 0).sum() + (ends[:, -1] > 0).sum()) / took).item()  # through the first EOS

    compare(ours, theirs, pairs, "tokens/s", "model.generate")


MEMORY = """
import resource, sys, torch, transformers, grpo
config = transformers.GPT2Config(vocab_size=32000, n_embd=32, n_layer=1, n_head=1)
model = transformers.GPT2LMHeadModel(config).eval()
ids, mask = torch.randint(0, 32000, (128, 128)), torch.ones(128, 128)
mask[:, 0] = 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "whole":
    logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
else:
    logprobs, entropy = grpo.token_logprobs(model, ids, mask)
logprobs.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak_memory(way: str) -> float:
    """MiB that the log-probabilities of 128 x 128 tokens over 32,000 words take, forward and backward, on the CPU."""
    command, environment = [sys.executable, "-c", MEMORY, way], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout)


def memory():
    compare(lambda _: peak_memory("chunks"), lambda _: peak_memory("whole"), 1, "MiB", "whole logits")


# ------------------------------------------------------------------------------------------------------ steps, and TRL


class StepTimes(transformers.TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.seconds.append(-clock())

    def on_step_end(self, *_, **__):
        self.seconds[-1] += clock()


def coin(rows, texts) -> list[float]:
    """A reward for models that know nothing."""
    return [zlib.crc32(text.encode()) % 2 for text in texts]


def rows_in_order(args, size: int) -> list[dict]:
    """The rows that a run of a script takes, in its order, as TRL's trainers read them."""
    data, steps = grpo.arithmetic("train"), range(1, args.steps + 1)
    if isinstance(args, grpo.Args):
        drawn = [torch.randperm(len(data), generator=grpo.seeded(args.seed, "prompts", step))[:size] for step in steps]
        rows, columns = [data[i] for i in torch.cat(drawn)], {"prompt": "user"}
    elif isinstance(args, sft.Args):
        order = torch.randperm(len(data), generator=sft.seeded(args.seed, "rows", 0))[: size * args.steps]
        rows = [data[i] | {"completion": sft.solve(data[i]["arithmetic"])} for i in order]
        columns = {"prompt": "user", "completion": "assistant"}
    else:
        dpo.random.Random(f"{args.seed} pairs").shuffle(data)
        rows = [row | dpo.arithmetic_pair(row["arithmetic"]) for row in data[: size * args.steps]]
        columns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    turns = [{name: [{"role": role, "content": row[name]}] for name, role in columns.items()} for row in rows]
    return [turn | {"answer": row["answer"]} for turn, row in zip(turns, rows)]


def step(name: str = "grpo", model: str = "runs/sft", pairs: int = 3, steps: int = 8, size: int = 32,
         group_size: int = 8, most: int = 64, trl_batch_size: int | None = None, compile: bool = False):  # fmt: skip
    """Seconds per step, the first one left out. `size` is rows, pairs or prompts. GRPO: rollout and update, kl_coef 0;
    a model of random weights is rewarded by chance."""
    import trl
    from datasets import Dataset

    tokenizer, kind = transformers.AutoTokenizer.from_pretrained(model), name.upper()
    by_chance, total = "qwen" in model, size * (group_size if name == "grpo" else 1)
    passes = total // (trl_batch_size or total)
    own = {"eval_size": 8, "eval_every": 0, "save_every": 0, "lr_schedule": "constant", "lr": 1e-4, "compile": compile}
    theirs_own = {"per_device_train_batch_size": total // passes, "gradient_accumulation_steps": passes}
    if name == "grpo":
        own |= {"prompts_per_step": size, "group_size": group_size, "kl_coef": 0.0, "max_new_tokens": most}
        own["reward"] = f"{__file__}:coin" if by_chance else "exact"
        theirs_own |= {"num_generations": group_size, "max_completion_length": most, "beta": 0.0, "top_k": 0}
        theirs_own |= {"loss_type": "grpo", "steps_per_generation": passes, "shuffle_dataset": False}
    else:
        own |= {"batch_size": size} | ({"beta": 0.1} if name == "dpo" else {})
        theirs_own |= {"max_length": 1024, "train_sampling_strategy": "sequential"}
        theirs_own |= {"beta": 0.1, "precompute_ref_log_probs": True} if name == "dpo" else {"loss_type": "nll"}

    def reward_of(completions, answer, **_):
        texts = [completion[0]["content"] for completion in completions]
        return coin(None, texts) if by_chance else list(map(grpo.exact_match, texts, answer))

    folder, script = tempfile.mkdtemp(), {"sft": sft, "dpo": dpo, "grpo": grpo}[name]

    def args(i):
        return script.Args(model=model, out=f"{folder}/{i}", steps=steps, seed=i, **own)

    def ours(i):
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(args(i))
        rows = rows_of(f"{folder}/{i}")[1:]
        print(f"  here: loss {rows[0]['loss']:.4f}, reward {rows[-1].get('reward', 0):.3f}")
        return median(row["time/step"] for row in rows[1:])

    def theirs(i):
        times = StepTimes()
        config = getattr(trl, f"{kind}Config")(
            output_dir=f"{folder}/trl-{i}", max_steps=steps, learning_rate=1e-4, warmup_steps=15, adam_beta2=0.99,
            lr_scheduler_type="constant_with_warmup", weight_decay=0.0, bf16=DEVICE.type == "cuda", logging_steps=1,
            gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True, seed=i,
            **theirs_own,
        )  # fmt: skip
        policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        rest = {"train_dataset": Dataset.from_list(rows_in_order(args(i), size)), "callbacks": [times]}
        rest |= {"reward_funcs": reward_of} if name == "grpo" else {}
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = getattr(trl, f"{kind}Trainer")(model=policy, args=config, processing_class=tokenizer, **rest)
            trainer.train()
        logs = [x for x in trainer.state.log_history if "loss" in x]
        print(f"  TRL: loss {logs[0]['loss']:.4f}, reward {logs[-1].get('reward', 0):.3f}")
        return median(times.seconds[1:])

    compare(ours, theirs, pairs, "s/step", f"TRL's {kind}Trainer")


# ----------------------------------------------------------------------------------------------------------------- gpu


def save_qwen(folder: str):
    """A model of random weights in the shape of Qwen2.5-0.5B and a tokenizer with as many words."""
    import tokenizers

    config = transformers.Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    words = {f"w{i}": i for i in range(config.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1")
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def mfu(folder: str, num_rows: int = 64, length: int = 512, peak: float = 989e12):
    """The share of the data sheet's bfloat16 peak (H100, H200: 989 TFLOP/s) that a compiled training step reaches."""
    model = grpo.prepare(grpo.load_model(folder), grpo.Args(compile=True), grpo.token_logprobs)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    ids, mask = torch.randint(5, 9999, (num_rows, length), device=DEVICE), torch.ones(num_rows, length, device=DEVICE)
    mask[:, 0] = 0

    def train():
        model.token_logprobs(ids, mask)[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    took = median([seconds(train) for _ in range(6)][2:])
    attention = 6 * model.config.num_hidden_layers * model.config.hidden_size * length  # causal: half of 12 L D T
    flops = num_rows * length * (6 * model.num_parameters() + attention)  # the embedding stands for the tied head
    print(f"training step: {num_rows * length / took:,.0f} tokens/s, MFU {flops / took / peak:.3f}", flush=True)


def gpu():
    """All that needs a GPU. It prints as it goes, so that a run that is cut short has said something."""
    os.chdir(tempfile.mkdtemp())
    runs = {"sft": "--steps 300", "rm": "--steps 40", "dpo": "--steps 20 --compile", "grpo": "--steps 12"}
    for name, flags in (runs | {"ppo": "--steps 6 --gradient-checkpointing"}).items():
        command = [sys.executable, ROOT / f"{name}.py", *flags.split(), "--eval-every", "0", "--eval-size", "200"]
        took = seconds(lambda c=command: subprocess.run(c, check=True, stdout=subprocess.DEVNULL))
        last = {key: round(x, 4) for key, x in rows_of(f"runs/{name}")[-1].items() if "eval/" in key or "gap" in key}
        print(f"{name}.py {flags}: {took:.0f} s, {last}", flush=True)
    model, tokenizer = grpo.load_model("runs/sft", grpo.DTYPE), transformers.AutoTokenizer.from_pretrained("runs/sft")
    prompts, made = [grpo.encode(tokenizer, row, None) for row in grpo.arithmetic("test")[:200]], []
    for model.config._attn_implementation in ("sdpa", "eager"):  # the second is not recorded
        made.append(grpo.generate(model, prompts, 2, 64, 0.0, [1], None)[0])
    same = sum(x == y for x, y in zip(*made))
    print(f"recorded decoding: {same} of {len(made[0])} greedy completions are those of plain decoding", flush=True)
    save_qwen("qwen")
    rollout("qwen", 64, 8, 256, pairs=1)
    mfu("qwen")
    step("grpo", "qwen", pairs=1, steps=3, size=64, most=256, trl_batch_size=64, compile=True)


if __name__ == "__main__":
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    print(f"{os.cpu_count()} cores, {card}, torch {torch.__version__}, transformers {transformers.__version__}")
    commands = {x.__name__: x for x in (pipeline, curve, rollout, step, memory, gpu)}
    tyro.extras.subcommand_cli_from_dict(commands)
