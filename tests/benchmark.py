"""Measures the scripts: one command for each question.

    python tests/benchmark.py rollout       how fast is the rollout, against model.generate?
    python tests/benchmark.py memory        what do log-probabilities cost in memory, against whole logits?
    python tests/benchmark.py grpo          how long is one GRPO step, against TRL's GRPOTrainer?
    python tests/benchmark.py sft           how long is one SFT step, against TRL's SFTTrainer?
    python tests/benchmark.py dpo           how long is one DPO step, against TRL's DPOTrainer?
    python tests/benchmark.py rm            how long is one step of a reward model, against TRL's RewardTrainer?
    python tests/benchmark.py ppo           how long is one PPO step, against the sum of its parts?
    python tests/benchmark.py train         how much of the hardware's arithmetic does a training step use?
    python tests/benchmark.py scale         how do time and memory grow with length, group size and vocabulary?
    python tests/benchmark.py acceptance    do all default runs reach their accuracy, and do the controls hold?
    python tests/benchmark.py figure        draws what acceptance found: the true accuracy of every method
    python tests/benchmark.py curve         draws the learning curve of the default run of sft.py and grpo.py
    python tests/benchmark.py resident      what stays in memory under each script, for a model of a given size

Comparisons warm both sides up, then alternate them on the same machine, and print every pair, the medians and the
median ratio. Measure on a machine that does nothing else. Set up: pip install -r requirements.txt
-r tests/requirements.txt. Every command has --help. Where `--model` may be a shape, `qwen2.5-0.5b`, `qwen2.5-1.5b` and
`tiny` stand for models of that shape with random weights, built on the spot. Those with 151,936 words hardly ever stop
before the limit, so that both sides do the same work.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Literal

import torch
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import rm  # noqa: E402
import sft  # noqa: E402

# -------------------------------------------------------------------------------------------------------------- report


def describe_machine() -> dict[str, str]:
    """Hardware and versions, which belong to every figure."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    packages = {}
    for package in ("torch", "transformers", "trl"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "cpu": (names or [platform.processor() or platform.machine()])[0],
        "cores": f"{os.cpu_count()}, torch threads {torch.get_num_threads()}",
        "load": f"{os.getloadavg()[0]:.2f} runnable processes in the last minute",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": "  ".join(f"{name} {v}" for name, v in {"python": platform.python_version(), **packages}.items()),
    }


def print_machine():
    """`describe_machine`, a line for each entry."""
    for name, text in describe_machine().items():
        print(f"{name}: {text}")
    print(flush=True)


def print_pairs(other: str, unit: str, ours: list[float], theirs: list[float], digits: int = 2) -> float:
    """Every pair, the medians and the median ratio ours / theirs, which is returned."""
    print(f"\n| pair | this repository, {unit} | {other}, {unit} | ratio |\n|---|---|---|---|")
    ratios = [a / b for a, b in zip(ours, theirs)]
    rows = [(str(i + 1), *row) for i, row in enumerate(zip(ours, theirs, ratios))]
    for name, a, b, ratio in [*rows, ("median", median(ours), median(theirs), median(ratios))]:
        print(f"| {name} | {a:,.{digits}f} | {b:,.{digits}f} | {ratio:.3f} |")
    return median(ratios)


def print_aim(what: str, met: bool):
    """Whether a figure is what it should be."""
    print(f"{'met' if met else 'MISSED'}: {what}", flush=True)


def alternate(ours: Callable, theirs: Callable, pairs: int, warm_up: bool = True) -> tuple[list, list]:
    """The results of ours(i) and theirs(i) for i = 1 ... pairs after a warm-up, i = 0; every other pair is swapped."""
    results = {ours: [], theirs: []}
    for i in range(0 if warm_up else 1, pairs + 1):
        for side in (ours, theirs) if i % 2 else (theirs, ours):
            result = side(i)
            if i > 0:
                results[side].append(result)
        print("warmed up" if i == 0 else f"pair {i} of {pairs} done", file=sys.stderr, flush=True)
    return results[ours], results[theirs]


def with_peak(run: Callable, peaks: list[float]):
    """run(), whose peak of allocated CUDA memory, in GiB above what was allocated before, is appended to `peaks`."""
    gc.collect()
    baseline, peak = peak_memory()
    result = run()
    peaks.append((peak() - baseline) / 2**30)
    return result


def print_peaks(other: str, ours: list[float], theirs: list[float]):
    """The largest peaks of both sides; on the CPU both share one process, so there it would say nothing."""
    if torch.cuda.is_available():
        print(f"peak memory: this repository {max(ours):.1f} GiB, {other} {max(theirs):.1f} GiB")


def synchronize():
    """Waits until the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


SHAPES = {
    "tiny": {
        "vocab_size": 261, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2,
    },
}  # fmt: skip


def random_model(shape: str, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A language model of one of SHAPES with random weights, on the device that the scripts pick."""
    config = transformers.Qwen2Config(
        **{**SHAPES[shape], **changes}, tie_word_embeddings=True, max_position_embeddings=32_768, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    with grpo.pick_device():
        return transformers.Qwen2ForCausalLM(config)


def model_folder(model: str, folder: str) -> str:
    """The folder of `--model`; one of SHAPES is written to `folder`. Ends the command if there is neither."""
    if model in SHAPES:
        path = f"{folder}/{model}"
        random_model(model).save_pretrained(path)
        sft.tiny_tokenizer().save_pretrained(path)
        return path
    known = f"neither a folder (`python sft.py` makes runs/sft) nor one of {list(SHAPES)}"
    grpo.require(Path(model).is_dir(), f"--model {model}: {known}")
    return model


@functools.cache
def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that one large copy reads and writes: the best of ten."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        synchronize()
        clock = time.perf_counter()
        target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - clock)
    return 2 * source.numel() * source.element_size() / min(seconds)


# ------------------------------------------------------------------------------------------------------------- rollout


def rollout(
    model: str = "runs/sft", pairs: int = 5, num_prompts: int = 64, num_samples: int = 16, max_new_tokens: int = 64,
    against: Literal["generate", "generate_batch"] = "generate", cuda_graphs: bool = True, compile: bool = False,
):  # fmt: skip
    """The rollout against `model.generate`: same model, held-out prompts, sampling and limits, in tokens per second.

    Both sides count the tokens of their completions up to and including EOS, and on CUDA run the same bfloat16 copy.
    The time of this repository's side includes the random draws and the sampling log-probabilities, which
    `model.generate` is not asked for. The bound: every decoding step must read all weights and the cache once.

    Args:
        model: Folder of the model, or a shape.
        pairs: Measurements of each side.
        num_prompts: Prompts, all in one batch.
        num_samples: Completions sampled for each prompt.
        max_new_tokens: Longest completion, in tokens.
        against: The other side: `model.generate`, or the continuous batching of `model.generate_batch`.
        cuda_graphs: As in the scripts.
        compile: As in the scripts; the other side runs as it is.
    """
    print_machine()
    num_rows = num_prompts * num_samples
    settings = sft.Args(rollout_batch_size=num_rows, cuda_graphs=cuda_graphs, compile=compile)
    with tempfile.TemporaryDirectory() as folder:
        name, device = model_folder(model, folder), grpo.pick_device()
        tokenizer, eos_ids = grpo.load_tokenizer(name, max_new_tokens)
        policy = grpo.load_model(name, device)
        sampler, policy = (grpo.sampling_copy(policy, device, x).eval() for x in (settings, None))
    prompts = [grpo.encode_prompt(tokenizer, row, None) for row in grpo.arithmetic_rows("test", num_prompts)]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(x)) + x for x in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts], device=device)
    stops = torch.tensor(eos_ids, device=device)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens}
    options |= {"eos_token_id": eos_ids, "pad_token_id": tokenizer.pad_token_id}

    def ours(draw: int) -> tuple[int, float]:
        synchronize()
        clock = time.perf_counter()
        uniforms = grpo.draw_uniforms(0, "benchmark", draw, num_rows, max_new_tokens)
        completions, _ = grpo.rollout(sampler, prompts, num_samples, 1.0, eos_ids, uniforms, settings)
        synchronize()
        return sum(map(len, completions)), time.perf_counter() - clock

    def theirs(draw: int) -> tuple[int, float]:
        torch.manual_seed(draw)
        synchronize()
        clock = time.perf_counter()
        if against == "generate_batch":
            config = transformers.GenerationConfig(**options)
            asked = [prompt for prompt in prompts for _ in range(num_samples)]
            outputs = policy.generate_batch(asked, generation_config=config, persistent_manager=True)
            return sum(len(x.generated_tokens) for x in outputs.values()), time.perf_counter() - clock
        sampling = {**options, "num_return_sequences": num_samples}
        completions = policy.generate(input_ids=ids, attention_mask=seen, **sampling)[:, width:]
        synchronize()
        seconds = time.perf_counter() - clock
        before = torch.isin(completions, stops).int().cumsum(1) == 0  # the tokens before the first EOS
        return int((before.sum(1) + 1).clamp(max=completions.shape[1]).sum()), seconds

    mine, others = alternate(ours, theirs, pairs)
    print(f"{num_prompts} prompts x {num_samples} samples, at most {max_new_tokens} new tokens, {policy.device}")
    for name, side in (("this repository", mine), (f"model.{against}", others)):
        length, seconds = mean(tokens for tokens, _ in side) / num_rows, median(seconds for _, seconds in side)
        print(f"{name}: mean completion {length:.2f} tokens, median {seconds:.3f} s")
    speeds = [[a / b for a, b in side] for side in (mine, others)]
    ratio = print_pairs(f"model.{against}", "tokens/s", *speeds, digits=0)
    aim = 4 if device.type == "cuda" else 1.6
    print_aim(f"at least {aim} times as fast", ratio >= aim)
    length, config = mean(tokens for tokens, _ in mine) / num_rows, policy.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * policy.dtype.itemsize  # keys, values
    weights = sum(x.numel() * x.element_size() for x in policy.parameters())
    cache = num_rows * (mean(map(len, prompts)) + length / 2) * entry  # on average over the steps
    bound = num_rows / ((weights + cache) / memory_bandwidth(device))
    print(f"{weights / 1e6:,.0f} MB of weights and {cache / 1e6:,.0f} MB of cache, read once a step, bound it to")
    print(f"{bound:,.0f} tokens/s at the {memory_bandwidth(device) / 1e9:,.0f} GB/s that a large copy reaches here;")
    print(f"reached: {median(speeds[0]) / bound:.3f} of that")


# -------------------------------------------------------------------------------------------------------------- memory


def status_bytes(field: str) -> int | None:
    """VmRSS (resident memory now) or VmHWM (its peak) of this process, in bytes; None where there is no /proc."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def peak_memory() -> tuple[int, Callable[[], int]]:
    """Bytes in use now, and a function that tells the most in use since: of CUDA's allocator, else of the process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    with contextlib.suppress(OSError):  # then the peak may be that of the start-up: too high, never too low
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    unit = 1 if sys.platform == "darwin" else 1024

    def of(field: str) -> int:
        return status_bytes(field) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    return of("VmRSS"), functools.partial(of, "VmHWM")


def measure_memory(side: str, num_tokens: int, folder: str) -> float:
    """Peak bytes of a forward and backward pass above weights and gradients. Runs in a process of its own.

    side: `ours` (token_logprobs) or `logits` (model(ids).logits.log_softmax(-1)). Writes the log-probabilities and
    the gradients to `folder`/`side`.pt.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = transformers.Qwen3Config(
        vocab_size=151_936, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).to(device)
    num_rows = 8
    ids = torch.randint(config.vocab_size, (num_rows, num_tokens // num_rows + 1), device=device)
    weights = torch.randn(ids.shape, device=device)  # what each log-probability counts for in the loss
    mask = torch.ones(ids.shape, device=device)
    mask[:, 0] = 0.0  # nothing precedes the first token

    def forward_and_backward(ids, mask, weights):
        if side == "ours":
            logprobs, _ = grpo.token_logprobs(model, ids, mask)
            logprobs = logprobs[:, 1:]
        else:
            logprobs = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        (logprobs * weights[:, 1:]).sum().backward()
        return logprobs.detach()

    forward_and_backward(ids[:1, :9], mask[:1, :9], weights[:1, :9])  # what the libraries allocate once, they have now
    for parameter in model.parameters():
        parameter.grad.zero_()  # stays allocated: the baseline holds weights and gradients
    baseline, peak = peak_memory()
    logprobs = forward_and_backward(ids, mask, weights)
    peak = peak()
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    torch.save({"logprobs": logprobs.cpu(), "gradients": gradients}, Path(folder) / f"{side}.pt")
    return peak - baseline


def memory(pairs: int = 3, num_tokens: int = 2048):
    """Peak memory of `token_logprobs` against whole logits, for 151,936 words and width 128, forward and backward.

    Counted above weights and gradients, each measurement in a fresh process: resident memory on the CPU, allocated
    memory on CUDA. The log-probabilities and gradients of both sides are compared.

    Args:
        pairs: Measurements of each side.
        num_tokens: Completion tokens, a multiple of 8.
    """
    grpo.require(num_tokens >= 8 and num_tokens % 8 == 0, f"--num-tokens {num_tokens}: must be a multiple of 8")
    print_machine()
    sizes = {"ours": [], "logits": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(pairs):
            for side in sorted(sizes, reverse=i % 2 == 0):
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    sizes[side].append(pool.submit(measure_memory, side, num_tokens, folder).result() / 2**20)
        ours, logits = (torch.load(Path(folder) / f"{side}.pt", weights_only=True) for side in ("ours", "logits"))
    value_gap = (ours["logprobs"] - logits["logprobs"]).abs().max().item()
    gaps = {name: gradient - logits["gradients"][name] for name, gradient in ours["gradients"].items()}
    gradient_gap = max(gap.abs().max().item() for gap in gaps.values())
    norms = [sum(x.double().square().sum() for x in xs.values()).sqrt() for xs in (gaps, logits["gradients"])]
    relative_gap = (norms[0] / norms[1]).item()
    print(f"{num_tokens:,} completion tokens")
    print(f"log-probabilities: max |difference| {value_gap:.1e} of values up to {logits['logprobs'].abs().max():.1f}")
    print(f"gradients: max |difference| {gradient_gap:.1e}; norm of the difference {relative_gap:.1e} of their norm")
    ratio = print_pairs("whole logits", "MiB", sizes["ours"], sizes["logits"], digits=0)
    print_aim("at most a quarter of the memory", ratio <= 0.25)
    print_aim("equal values (to 1e-4) and gradients (to 1e-5 of their norm)", value_gap < 1e-4 and relative_gap < 1e-5)


# ---------------------------------------------------------------------------------------------------------------- grpo


COIN = '''"""A reward for models that know nothing: written by tests/benchmark.py."""

import random


def coin(prompts, completions, rows):
    """0 or 1, at random."""
    return [float(random.random() < 0.5) for _ in completions]
'''


class StepTimes(transformers.TrainerCallback):
    """Seconds of every step of a trainer: generation, rewards, loss and update, without logging."""

    def __init__(self):
        self.seconds, self.clock = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.clock = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.clock)


@dataclasses.dataclass
class Steps:
    """What one side did in the steps of one round, a value for each."""

    seconds: list[float]
    rewards: list[float]
    lengths: list[float]
    rollout_seconds: list[float] = dataclasses.field(default_factory=list)


def our_steps(settings: grpo.Args) -> Steps:
    """`grpo.main`, its steps read from its metrics."""
    with contextlib.redirect_stdout(io.StringIO()):
        grpo.main(settings)
    rows = read_metrics(settings.out)[1:]
    names = ("time/step_s", "reward", "completion_length", "time/rollout_s")
    return Steps(*([row[name] for row in rows] for name in names))


def trl_steps(settings: grpo.Args, batch_size: int) -> Steps:
    """TRL's GRPOTrainer: same settings, same prompts in the same order, `batch_size` completions in one pass."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, eos_ids = grpo.load_tokenizer(settings.model, settings.max_prompt_length + settings.max_new_tokens)
    rows, data = grpo.arithmetic_rows("train", 20_000), []
    for step in range(1, settings.steps + 1):
        for i in grpo.shuffled_indices(len(rows), settings.seed, "prompts", step, settings.prompts_per_step):
            text, answer = rows[i]["prompt"], rows[i]["answer"]
            prompt = [{"role": "user", "content": text}] if tokenizer.chat_template else text
            data.append({"prompt": prompt, "answer": answer})

    (reward,) = (grpo.load_reward(name, settings, None) for name in settings.reward)

    def reward_of(completions, answer, **kwargs) -> list[float]:
        texts = [x if isinstance(x, str) else x[0]["content"] for x in completions]
        return reward(texts, texts, [{"answer": x} for x in answer])

    warnings.simplefilter("ignore", FutureWarning)  # TRL and transformers disagree about names
    device, times = grpo.pick_device(), StepTimes()
    num_passes = settings.prompts_per_step * settings.group_size // batch_size
    config = GRPOConfig(
        output_dir=settings.out,
        per_device_train_batch_size=batch_size,
        num_generations=settings.group_size,
        gradient_accumulation_steps=num_passes,
        steps_per_generation=num_passes,  # one rollout for each optimizer step
        max_steps=settings.steps,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        beta=settings.kl_coef,
        loss_type="grpo",
        scale_rewards="group",
        epsilon=settings.clip_eps,
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        adam_beta2=settings.adam_beta2,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        bf16=device.type == "cuda",  # as autocast in grpo.py
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        gradient_checkpointing=settings.gradient_checkpointing,
        shuffle_dataset=False,
        use_vllm=False,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    model.generation_config.eos_token_id = eos_ids
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = GRPOTrainer(model, reward_of, config, Dataset.from_list(data), None, tokenizer, callbacks=[times])
        trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    return Steps(times.seconds, [row["reward"] for row in logs], [row["completions/mean_length"] for row in logs])


def grpo_step(
    model: str = "runs/sft",
    pairs: int = 5,
    steps: int = 8,
    prompts_per_step: int = 32,
    group_size: int = 8,
    max_new_tokens: int = 64,
    micro_batch_tokens: int | None = grpo.Args.micro_batch_tokens,
    trl_batch_size: int | None = None,
    compile: bool = False,
    warm_up: bool = True,
):
    """One GRPO step (rollout, reward, loss, update) against TRL's GRPOTrainer: same model, prompts and settings.

    A pair is one short run of each side from the same weights; the time of a run is the median of its steps, the
    first left out. No KL, no gradient checkpointing, one optimizer step for each rollout, float32 on the CPU. A model
    of random weights is rewarded at random: there is nothing else to tell its completions apart.

    Args:
        model: Folder of the model, or a shape.
        pairs: Runs of each side.
        steps: Steps of each run; the first is not counted.
        prompts_per_step: Prompts per rollout.
        group_size: Completions sampled per prompt.
        max_new_tokens: Longest completion, in tokens.
        micro_batch_tokens: Most tokens in one forward and backward pass of this repository.
        trl_batch_size: Completions in one forward and backward pass of TRL, which accumulates gradients over the step;
            default: all of the step's at once.
        compile: As in the scripts; TRL runs as it is.
        warm_up: Whether a run of one step on each side goes before the pairs.
    """
    grpo.require(steps >= 2, f"--steps {steps}: must be at least 2, the first is not counted")
    num_sequences = prompts_per_step * group_size
    trl_batch_size = trl_batch_size or num_sequences
    divides = num_sequences % trl_batch_size == 0
    grpo.require(divides, f"--trl-batch-size {trl_batch_size}: must divide the step's {num_sequences} completions")
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error}: pip install -r tests/requirements.txt") from error
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rewards.py").write_text(COIN)
        settings = grpo.Args(
            model=model_folder(model, folder), prompts_per_step=prompts_per_step, group_size=group_size, kl_coef=0.0,
            lr=3e-4, lr_schedule="constant", max_new_tokens=max_new_tokens, eval_size=8, eval_every=10**9,
            save_every=10**9, sample_every=10**9, micro_batch_tokens=micro_batch_tokens, compile=compile,
            reward=(f"{folder}/rewards.py:coin" if model in SHAPES else "exact",),
        )  # fmt: skip

        peaks = [], []

        def ours(i: int) -> Steps:
            run = dataclasses.replace(settings, seed=i, steps=steps if i else 1, out=f"{folder}/ours-{i}")
            return with_peak(lambda: our_steps(run), peaks[0])

        def theirs(i: int) -> Steps:
            run = dataclasses.replace(settings, seed=i, steps=steps if i else 1, out=f"{folder}/trl-{i}")
            return with_peak(lambda: trl_steps(run, trl_batch_size), peaks[1])

        mine, others = alternate(ours, theirs, pairs, warm_up)
    print(f"{prompts_per_step} prompts x {group_size} samples, {pairs} runs of {steps} steps, {grpo.pick_device()}")
    print(f"--micro-batch-tokens {micro_batch_tokens} (this repository), {trl_batch_size} completions a pass (TRL)")
    for name, side in (("this repository", mine), ("TRL", others)):
        reward, length = mean(x for run in side for x in run.rewards), mean(x for run in side for x in run.lengths)
        print(f"{name}: mean reward {reward:.3f}, mean completion {length:.2f} tokens (both sides should agree)")
    rollout_seconds = median(x for run in mine for x in run.rollout_seconds[1:])
    print(f"this repository: {rollout_seconds:.3f} s of the step is rollout")
    print_peaks("TRL", *peaks)
    ratio = print_pairs(
        "TRL", "s/step", *([median(run.seconds[1:]) for run in side] for side in (mine, others)), digits=3
    )
    aim = 0.35 if torch.cuda.is_available() else 0.5
    print_aim(f"at most {aim} of TRL's time", ratio <= aim)


# -------------------------------------------------------------------------------------------------------- sft, dpo, rm


def offline_rows(name: str, num_rows: int) -> list[dict]:
    """Rows of the built-in task with the columns that both sides read."""
    columns = ("prompt", "completion") if name == "sft" else ("prompt", "chosen", "rejected")
    return [{column: row[column] for column in columns} for row in grpo.arithmetic_rows("train", num_rows)]


def our_offline_steps(name: str, settings) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps of sft.py, dpo.py or rm.py."""
    with contextlib.redirect_stdout(io.StringIO()):
        {"sft": sft, "dpo": dpo, "rm": rm}[name].main(settings)
    rows = read_metrics(settings.out)[1:]
    return [row["time/step_s"] for row in rows], [row["loss"] for row in rows]


def trl_offline_steps(name: str, settings, batch_size: int) -> tuple[list[float], list[float]]:
    """The same of TRL's trainer: same weights and rows in the same order, `batch_size` of them in one pass."""
    import trl
    from datasets import Dataset

    tokenizer, _ = grpo.load_tokenizer(settings.model, settings.max_length)
    rows, data = [json.loads(line) for line in Path(settings.dataset).read_text().splitlines()], []
    for step in range(1, settings.steps + 1):
        purpose = "rows" if name == "sft" else "pairs"
        for i in grpo.shuffled_indices(len(rows), settings.seed, purpose, step, settings.batch_size):
            turns = {
                column: [{"role": "user" if column == "prompt" else "assistant", "content": text}]
                for column, text in rows[i].items()
            }
            data.append(turns if tokenizer.chat_template else rows[i])
    warnings.simplefilter("ignore", FutureWarning)  # TRL and transformers disagree about names
    device, times = grpo.pick_device(), StepTimes()
    own = {
        "sft": {"completion_only_loss": True, "loss_type": "nll"},
        "dpo": {"precompute_ref_log_probs": True, "beta": getattr(settings, "beta", None)},
        "rm": {"center_rewards_coefficient": getattr(settings, "center_coef", None)},
    }
    trainer_class, config_class = {
        "sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "rm": (trl.RewardTrainer, trl.RewardConfig),
    }[name]  # fmt: skip
    config = config_class(
        output_dir=settings.out,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=settings.batch_size // batch_size,
        max_steps=settings.steps,
        max_length=settings.max_length,
        train_sampling_strategy="sequential",
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        adam_beta2=settings.adam_beta2,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        bf16=device.type == "cuda",  # as autocast in the scripts
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        gradient_checkpointing=False,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own[name],
    )
    if name == "rm":
        auto, options = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    else:
        auto, options = transformers.AutoModelForCausalLM, {}
    model = auto.from_pretrained(settings.model, dtype=torch.float32, **options)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer_class(
            model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
            callbacks=[times],
        )  # fmt: skip
        trainer.train()
    return times.seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def offline_step(
    name: str, trainer: str, aim: float | None, model: str, pairs: int, steps: int, batch_size: int, trl_batch: int
):
    """One step of sft.py, dpo.py or rm.py against TRL: what the commands of these names do."""
    grpo.require(steps >= 2, f"--steps {steps}: must be at least 2, the first is not counted")
    trl_batch = trl_batch or batch_size
    grpo.require(batch_size % trl_batch == 0, f"--trl-batch-size {trl_batch}: must divide --batch-size {batch_size}")
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error}: pip install -r tests/requirements.txt") from error
    print_machine()
    script = {"sft": sft, "dpo": dpo, "rm": rm}[name]
    with tempfile.TemporaryDirectory() as folder:
        rows, data = offline_rows(name, steps * batch_size + 8), Path(folder) / "rows.jsonl"
        (Path(folder) / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[-8:]))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[:-8]))
        same = {"model": model_folder(model, folder), "dataset": str(data), "eval_dataset": f"{folder}/eval.jsonl"}
        same |= {"batch_size": batch_size, "lr": 1e-4, "lr_schedule": "constant", "eval_size": 8, "eval_every": 10**9}
        same |= {"save_every": 10**9, "sample_every": 10**9}
        same |= {"beta": 0.1, "label_smoothing": 0.0} if name == "dpo" else {}

        peaks = {"ours": [], "trl": []}

        def side(run: Callable, label: str, i: int, *more):
            settings = script.Args(**same, seed=i, steps=steps if i else 2, out=f"{folder}/{label}-{i}")
            return with_peak(lambda: run(name, settings, *more), peaks[label])

        def ours(i: int) -> tuple[list[float], list[float]]:
            return side(our_offline_steps, "ours", i)

        def theirs(i: int) -> tuple[list[float], list[float]]:
            return side(trl_offline_steps, "trl", i, trl_batch)

        mine, others = alternate(ours, theirs, pairs)
    print(f"batches of {batch_size}, {pairs} runs of {steps} steps, {grpo.pick_device()}")
    print(f"--micro-batch-tokens {script.Args.micro_batch_tokens} (this repository), {trl_batch} rows a pass (TRL)")
    for label, results in (("this repository", mine), (trainer, others)):
        first, last = (mean(losses[k] for _, losses in results) for k in (0, -1))
        print(f"{label}: mean loss of the first step {first:.4f}, of the last {last:.4f}")
    print_peaks(trainer, *peaks.values())
    ratio = print_pairs(
        trainer, "s/step", *([median(seconds[1:]) for seconds, _ in results] for results in (mine, others)), digits=3
    )
    if aim is not None:
        print_aim(f"at most {aim} of TRL's time", ratio <= aim)


def sft_step(
    model: str = "runs/sft", pairs: int = 5, steps: int = 20, batch_size: int = 64, trl_batch_size: int | None = None
):
    """One SFT step against TRL's SFTTrainer: same weights, rows, order and settings, float32 on the CPU.

    A pair is one short run of each side; the time of a run is the median of its steps, the first left out. The losses
    of both sides should agree, but for rows that TRL's chat template ends otherwise.

    Args:
        model: Folder of the model, or a shape.
        pairs: Runs of each side.
        steps: Steps of each run; the first is not counted.
        batch_size: Rows per step.
        trl_batch_size: Rows in one forward and backward pass of TRL; default: all of the step's at once.
    """
    offline_step("sft", "SFTTrainer", 0.8, model, pairs, steps, batch_size, trl_batch_size)


def dpo_step(
    model: str = "runs/sft", pairs: int = 5, steps: int = 20, batch_size: int = 32, trl_batch_size: int | None = None
):
    """One DPO step against TRL's DPOTrainer, both with log-probabilities of the reference from before the first step.

    Otherwise as `sft`.

    Args:
        model: Folder of the model, or a shape.
        pairs: Runs of each side.
        steps: Steps of each run; the first is not counted.
        batch_size: Pairs per step.
        trl_batch_size: Pairs in one forward and backward pass of TRL; default: all of the step's at once.
    """
    offline_step("dpo", "DPOTrainer", 0.8, model, pairs, steps, batch_size, trl_batch_size)


def rm_step(
    model: str = "runs/sft", pairs: int = 5, steps: int = 20, batch_size: int = 32, trl_batch_size: int | None = None
):
    """One step of a reward model against TRL's RewardTrainer. Otherwise as `sft`, but the heads start from other draws.

    Args:
        model: Folder of the model, or a shape.
        pairs: Runs of each side.
        steps: Steps of each run; the first is not counted.
        batch_size: Pairs per step.
        trl_batch_size: Pairs in one forward and backward pass of TRL; default: all of the step's at once.
    """
    offline_step("rm", "RewardTrainer", None, model, pairs, steps, batch_size, trl_batch_size)


# ----------------------------------------------------------------------------------------------------------------- ppo


def part_seconds(settings: ppo.Args) -> dict[str, list[float]]:
    """Seconds of each part of a step of ppo.py, timed alone, `steps` times: the same models, prompts and row counts."""
    device, seconds, (reward_name,) = grpo.pick_device(), {}, settings.reward
    tokenizer, eos_ids = ppo.load_tokenizer(settings.model, settings.max_prompt_length + settings.max_new_tokens)
    policy = ppo.load_model(settings.model, device, settings.gradient_checkpointing)
    reference, sampler = ppo.load_model(settings.model, device), ppo.sampling_copy(policy, device)
    value_model = ppo.load_scorer(reward_name, device, settings.gradient_checkpointing, "--reward", 0.0)
    reward = ppo.load_reward(reward_name, settings, device)
    optimizers = [torch.optim.AdamW(x.parameters(), 1e-6, fused=True) for x in (policy, value_model)]
    rows = ppo.arithmetic_rows("train", settings.prompts_per_step * settings.steps)
    num_rows, limit = settings.prompts_per_step * settings.group_size, settings.micro_batch_tokens

    def timed(name: str, function: Callable):
        synchronize()
        clock = time.perf_counter()
        result = function()
        synchronize()
        seconds.setdefault(name, []).append(time.perf_counter() - clock)
        return result

    def forward(name: str, function: Callable):
        return timed(name, lambda: ppo.over_rollout(sequences, limit, device, function))[0]

    def update():
        for minibatch in ppo.minibatches(num_rows, settings, 1):
            batch = [sequences[n] for n in minibatch]
            num_tokens = sum(sum(actions) for _, actions in batch)
            for indices, ids, actions in ppo.micro_batches(batch, limit, device):
                old, old_value = (x[[minibatch[i] for i in indices], : ids.shape[1]] for x in (old_logprobs, values))
                with ppo.autocast(device):
                    logprobs, _ = ppo.token_logprobs(policy, ids, actions, with_entropy=False)
                ppo.policy_loss(logprobs, old, old_value, actions, settings.clip_eps, num_tokens).backward()
                with ppo.autocast(device):
                    new = ppo.token_values(value_model, ids, actions)
                ppo.value_loss(new, old_value, old_value + 1, actions, 0.0, num_tokens).backward()
            for optimizer in optimizers:
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()

    for step in range(settings.steps):
        asked = rows[step * settings.prompts_per_step : (step + 1) * settings.prompts_per_step]
        prompts = [ppo.encode_prompt(tokenizer, row, None) for row in asked]
        draws = ppo.draw_uniforms(settings.seed, "parts", step, num_rows, settings.max_new_tokens)
        sampling = (sampler, prompts, settings.group_size, 1.0, eos_ids, draws, settings)
        completions, _ = timed("rollout", functools.partial(ppo.rollout, *sampling))
        asked, prompts = ([x for x in xs for _ in range(settings.group_size)] for xs in (asked, prompts))
        texts = ppo.decode(tokenizer, completions, eos_ids)
        questions = [row["prompt"] for row in asked]
        timed("reward model, forward", functools.partial(reward, questions, texts, asked))
        sequences = [(p + c, [0] * len(p) + [1] * len(c)) for p, c in zip(prompts, completions)]
        old_logprobs = forward("policy, forward", functools.partial(ppo.token_logprobs, policy))
        forward("reference, forward", functools.partial(ppo.token_logprobs, reference, with_entropy=False))
        values = forward("value model, forward", functools.partial(ppo.token_values, value_model))
        timed("updates", update)
    return seconds


def ppo_step(model: str = "runs/sft", reward_model: str = "runs/rm", pairs: int = 3, steps: int = 6):
    """One step of ppo.py against the sum of its parts, each timed alone: rollout, four forward passes, all updates.

    Sizes are the defaults of ppo.py. A pair is one short run of the script and one of the parts; times are medians over
    the steps, the first left out. A ratio near 1: nothing but these parts takes time.

    Args:
        model: Folder of the policy.
        reward_model: Folder of the reward model, from which the value model starts.
        pairs: Runs of each side.
        steps: Steps of each run; the first is not counted.
    """
    grpo.require(steps >= 2, f"--steps {steps}: must be at least 2, the first is not counted")
    for flag, folder in (("--model", model), ("--reward-model", reward_model)):
        grpo.require(Path(folder).is_dir(), f"{flag} {folder}: there is no such folder; sft.py and rm.py make them")
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        settings = ppo.Args(
            model=model, reward=(reward_model,), eval_size=8, eval_every=10**9, save_every=10**9, sample_every=10**9,
            lr=1e-6, value_lr=1e-6, lr_schedule="constant", steps=steps,
        )  # fmt: skip

        def ours(i: int) -> list[float]:
            with contextlib.redirect_stdout(io.StringIO()):
                ppo.main(dataclasses.replace(settings, seed=i, out=f"{folder}/{i}"))
            return [row["time/step_s"] for row in read_metrics(f"{folder}/{i}")[1:]]

        def theirs(i: int) -> dict[str, list[float]]:
            return part_seconds(dataclasses.replace(settings, seed=i))

        mine, others = alternate(ours, theirs, pairs)
    parts = [{name: median(x[1:]) for name, x in side.items()} for side in others]
    print(f"{settings.prompts_per_step} prompts x {settings.group_size} samples, {settings.num_epochs} x")
    print(f"{settings.num_minibatches} minibatches, {pairs} runs of {steps} steps, {grpo.pick_device()}")
    print("\n| part | s, median |\n|---|---|")
    for name in parts[0]:
        print(f"| {name} | {median(side[name] for side in parts):.3f} |")
    sums = [sum(side.values()) for side in parts]
    ratio = print_pairs("sum of the parts", "s/step", [median(x[1:]) for x in mine], sums, digits=3)
    print_aim("at most 1.1 of the sum of its parts", ratio <= 1.1)


# --------------------------------------------------------------------------------------------------------------- train

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from NVIDIA's data sheets (SXM)


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of one large matrix product as training does them (bfloat16 on CUDA, float32 on the CPU): best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else None) for _ in "ab")
    seconds = []
    for _ in range(10):
        synchronize()
        clock = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - clock)
    return 2 * n**3 / min(seconds)


def training_flops(config, num_weights: int, num_rows: int, length: int) -> int:
    """FLOPs of a forward and backward pass over `num_rows` rows of `length` tokens, a product of m*k*n being 2mkn.

    Each weight of a matrix: 2 forward and 4 backward a token (num_weights: with the head, without an embedding that is
    not the head). Causal attention: a token sees (length + 1) / 2 others on average, in two products, and three times
    that with the backward pass. Recomputation by gradient checkpointing does not count.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * (length + 1) // 2
    return num_rows * length * (6 * num_weights + attention)


def train(
    model: str = "tiny", steps: int = 10, num_rows: int = 32, length: int = 128, micro_batch_tokens: int = 4096,
    gradient_checkpointing: bool = False, compile: bool = False,
):  # fmt: skip
    """Model FLOPs utilisation of a training step: SFT on rows of random tokens, through the functions of the scripts.

    Forward, loss, backward, clipping and AdamW; the median step, the first left out. The utilisation is given of what
    a large matrix product reaches on the same device, and of the data sheet's peak where that is known.

    Args:
        model: A shape.
        steps: Steps; the first is not counted.
        num_rows: Rows per step.
        length: Tokens per row.
        micro_batch_tokens: Most tokens in one forward and backward pass.
        gradient_checkpointing: As in the scripts.
        compile: As in the scripts.
    """
    grpo.require(model in SHAPES, f"--model {model}: must be one of {list(SHAPES)}")
    grpo.require(steps >= 2, f"--steps {steps}: must be at least 2, the first is not counted")
    print_machine()
    device, (_, peak) = grpo.pick_device(), peak_memory()
    policy = grpo.to_device(random_model(model), device, gradient_checkpointing)
    policy = grpo.shard(policy, device, grpo.Args(compile=compile))
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-4, (0.9, 0.99), weight_decay=0.0, fused=True)
    seconds, generator = [], torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(policy.config.vocab_size, (num_rows, length), generator=generator).tolist()
        rows = [(x, [0] + [1] * (length - 1)) for x in ids]
        synchronize()
        clock = time.perf_counter()
        for _, ids, mask in grpo.micro_batches(rows, micro_batch_tokens, device):
            with grpo.autocast(device):
                logprobs, _ = grpo.token_logprobs(policy, ids, mask, with_entropy=False)
            grpo.sft_loss(logprobs, mask, num_rows * (length - 1)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - clock)
    num_weights = sum(x.numel() for x in policy.parameters() if x.dim() > 1)
    speed = training_flops(policy.config, num_weights, num_rows, length) / median(seconds[1:])
    print(f"{model}: {num_rows} rows of {length} tokens in micro-batches of {micro_batch_tokens} tokens, {device}")
    print(f"median step {median(seconds[1:]):.3f} s, {num_rows * length / median(seconds[1:]):,.0f} tokens/s")
    peaks = {"a large matrix product here": matmul_flops(device)}
    peaks |= {f"the data sheet's {x}": flops for x, flops in PEAK_FLOPS.items() if x in describe_machine()["gpu"]}
    if device.type == "cuda":
        print(f"peak memory {peak() / 2**30:.1f} GiB")
    for name, flops in peaks.items():
        print(f"{speed / 1e12:.3f} of {flops / 1e12:.3f} TFLOP/s, {name}: utilisation {speed / flops:.3f}")


# --------------------------------------------------------------------------------------------------------------- scale


def measure_step(vocabulary: int, num_prompts: int, num_samples: int, max_new_tokens: int) -> list[float]:
    """Seconds of rollout and of training, and peak MiB of both above weights and gradients. In a process of its own."""
    device = grpo.pick_device()
    policy = grpo.to_device(random_model("tiny", vocab_size=vocabulary), device, False)
    sampler = grpo.sampling_copy(policy, device)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    generator, num_rows = torch.Generator().manual_seed(0), num_prompts * num_samples
    prompts = torch.randint(vocabulary, (num_prompts, 16), generator=generator).tolist()

    def step(length: int) -> tuple[float, float]:
        clock = time.perf_counter()
        draws = grpo.draw_uniforms(0, "scale", length, num_rows, length)
        completions, _ = grpo.rollout(sampler, prompts, num_samples, 1.0, [], draws, grpo.Args())
        synchronize()
        middle = time.perf_counter()
        rows = [(prompts[n // num_samples] + x, [0] * 16 + [1] * len(x)) for n, x in enumerate(completions)]
        for _, ids, mask in grpo.micro_batches(rows, grpo.Args.micro_batch_tokens, device):
            with grpo.autocast(device):
                logprobs, _ = grpo.token_logprobs(policy, ids, mask)
            ones = torch.ones(len(ids), device=device)
            grpo.grpo_loss(logprobs, logprobs.detach(), None, ones, mask, 0.2, 0.0, num_rows).backward()
        synchronize()
        return middle - clock, time.perf_counter() - middle

    step(2)  # what the libraries allocate once, they have now
    baseline, peak = peak_memory()
    times = step(max_new_tokens)
    return [*times, (peak() - baseline) / 2**20]


def scale(
    num_prompts: int = 8, num_samples: int = 8, max_new_tokens: int = 32, vocabulary: int = 18_992, repeats: int = 3
):
    """How time and memory of a GRPO step grow: completion length x1 to x8, group size and vocabulary alike.

    A model of the tiny shape with random weights, which never stops early. Every measurement in a fresh process, so
    that peaks do not mix: resident memory on the CPU, allocated memory on CUDA, above weights and gradients.

    Args:
        num_prompts: Prompts per step, of 16 tokens.
        num_samples: Completions of each prompt, where the group size does not vary.
        max_new_tokens: Tokens of a completion, where the length does not vary.
        vocabulary: Words, where the vocabulary does not vary; eight times 18,992 is Qwen2.5's.
        repeats: Measurements of each line, of which the median is printed.
    """
    print_machine()
    base = {"vocabulary": vocabulary, "num_samples": num_samples, "max_new_tokens": max_new_tokens}
    print(f"{num_prompts} prompts; where it does not vary: {base}\n")
    print("| what grows | value | rollout, s | training, s | peak MiB | tokens/s |\n|---|---|---|---|---|---|")
    for name in ("max_new_tokens", "num_samples", "vocabulary"):
        for factor in (1, 2, 4, 8):
            sizes = {**base, name: base[name] * factor, "num_prompts": num_prompts}
            results = []
            for _ in range(repeats):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    results.append(pool.submit(measure_step, **sizes).result())
            sampling, training, peak = (median(x) for x in zip(*results))
            num_tokens = num_prompts * sizes["num_samples"] * sizes["max_new_tokens"]
            speed = num_tokens / (sampling + training)
            cells = f"{sizes[name]:,} | {sampling:.2f} | {training:.2f} | {peak:,.0f} | {speed:,.0f}"
            print(f"| {name} | {cells} |", flush=True)


# ---------------------------------------------------------------------------------------------------------- acceptance

CONTROLS = '''"""Rewards that must not help: written by tests/benchmark.py."""

import hashlib

from grpo import exact_match


def negated(prompts, completions, rows):
    return [-exact_match(completion, row["answer"]) for completion, row in zip(completions, rows)]


def random(prompts, completions, rows):
    """In [0, 1), the same whenever the same prompt gets the same completion, and blind to whether it is right."""
    digests = [hashlib.sha256(repr(pair).encode()).digest() for pair in zip(prompts, completions)]
    return [int.from_bytes(digest[:6], "big") / 2**48 for digest in digests]
'''


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def run_script(folder: Path, name: str, script: str, flags: list[str], parents: tuple[str, ...] = ()) -> dict:
    """Runs `script`, unless `folder`/`name`.json says that it has run so; returns what that file holds.

    The run's output goes to `folder`/`name`, what it prints to `folder`/`name`.log. parents: the runs whose models
    this one reads; if one of them is newer, this one runs again. peak_mib: the largest resident memory of the process.
    """
    result_file = folder / f"{name}.json"
    version = zlib.crc32((ROOT / script).read_bytes())
    if result_file.exists() and (folder / name / "config.json").exists():
        result = json.loads(result_file.read_text())
        stale = any((folder / f"{x}.json").stat().st_mtime > result_file.stat().st_mtime for x in parents)
        if result["flags"] == flags and not stale:
            changed = f"; {script} HAS CHANGED since: remove it to run anew"
            print(f"{name}: found in {folder}{changed if result['script_crc32'] != version else ''}", flush=True)
            return result
    print(f"{name}: {script} {' '.join(flags)}", flush=True)
    command = [sys.executable, str(ROOT / script), *flags, "--out", str(folder / name), "--overwrite"]
    clock = time.perf_counter()
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - clock
    log_tail = "\n".join((folder / f"{name}.log").read_text().splitlines()[-20:])
    grpo.require(process.returncode == 0, f"{name} ended with {process.returncode}:\n{log_tail}")
    rows = read_metrics(folder / name)
    unit = 1 if sys.platform == "darwin" else 1024
    result = {"script": script, "flags": flags, "script_crc32": version, "seconds": seconds}
    result["peak_mib"] = usage.ru_maxrss * unit / 2**20
    for when, row in (("before", rows[0]), ("after", rows[-1])):
        evaluated = {name[5:].removeprefix("accuracy_"): x for name, x in row.items() if name.startswith("eval/")}
        result |= {f"{when}_{name}": x for name, x in evaluated.items()}
    result |= {name: x for name, x in rows[-1].items() if name in ("explained_variance", "kl_ref_seq")}
    result["machine"] = describe_machine()
    grpo.write_beside(result_file, json.dumps(result, indent=2))
    return result


# Every method from the same SFT model: script, flags beyond seed and model.
METHODS = {
    "DPO": ("dpo.py", []),
    "PPO, reward model": ("ppo.py", []),
    "PPO, verifier": ("ppo.py", ["--reward", "exact"]),
    "GRPO, verifier": ("grpo.py", []),
}


def acceptance(seeds: tuple[int, ...] = (0, 1, 2), out: str = "runs/acceptance", quick: bool = False):
    """The default runs of all scripts for every seed, and the controls; a table with every seed and the means.

    Accuracy is that on 1,000 held-out prompts. Everything starts from the seed's SFT model; PPO's reward model is the
    seed's. The controls start from the first seed's SFT model: with the reward negated accuracy falls, with a random
    one it does not rise. What an earlier call has finished is not run again.

    Args:
        seeds: Seeds of the default runs.
        out: Folder for the runs and for results.json.
        quick: A few steps of everything, only to see that the command works.
    """
    grpo.require(len(seeds) > 0, "--seeds: give at least one")
    print_machine()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    grpo.write_beside(folder / "controls.py", CONTROLS)
    short = ["--eval-size", "64", "--steps"]
    results = {name: [] for name in ("SFT", "reward model", *METHODS)}
    for seed in seeds:
        sft, reward_model = f"sft-{seed}", f"rm-{seed}"
        flags = ["--seed", str(seed), *([*short, "20"] if quick else [])]
        results["SFT"].append(run_script(folder, sft, "sft.py", flags))
        flags += ["--model", str(folder / sft)]
        results["reward model"].append(run_script(folder, reward_model, "rm.py", flags, (sft,)))
        flags = ["--seed", str(seed), "--model", str(folder / sft), *([*short, "3"] if quick else [])]
        for name, (script, extra) in METHODS.items():
            parents = (sft, reward_model) if name == "PPO, reward model" else (sft,)
            extra = ["--reward", str(folder / reward_model)] if reward_model in parents else extra
            run = f"{script.removesuffix('.py')}{'-exact' if name == 'PPO, verifier' else ''}-{seed}"
            results[name].append(run_script(folder, run, script, [*extra, *flags], parents))
    controls, parent = {}, f"sft-{seeds[0]}"
    for script, steps in (("grpo.py", "60"), ("ppo.py", "20")):
        for name in ("negated", "random"):
            flags = ["--seed", str(seeds[0]), "--model", str(folder / parent)]
            flags += ["--reward", f"{folder}/controls.py:{name}", *([*short, "3"] if quick else ["--steps", steps])]
            run = f"{script.removesuffix('.py')}-{name}-{seeds[0]}"
            controls[f"{script}, {name} reward"] = run_script(folder, run, script, flags, (parent,))
    grpo.write_beside(folder / "results.json", json.dumps({"methods": results, "controls": controls}, indent=2))

    print("\n| run | seed | seconds | peak MiB | sampled | greedy | pair accuracy |\n|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        for seed, run in [*zip(seeds, runs), ("**mean**", mean_of(runs))]:
            figures = [run.get(f"after_{x}") for x in ("sampled", "greedy", "pair_accuracy")]
            cells = " | ".join("" if x is None else f"{x:.3f}" for x in figures)
            print(f"| {name} | {seed} | {run['seconds']:.0f} | {run['peak_mib']:,.0f} | {cells} |")
    print("\n| control | sampled before | after | greedy before | after |\n|---|---|---|---|---|")
    columns = ("before_sampled", "after_sampled", "before_greedy", "after_greedy")
    for name, run in controls.items():
        print(f"| {name} | " + " | ".join(f"{run[column]:.3f}" for column in columns) + " |")
    print()
    means = {name: mean_of(runs) for name, runs in results.items()}
    slowest = {name: max(run["seconds"] for run in runs) for name, runs in results.items()}
    print_aim("after sft.py between 0.45 and 0.75 sampled, mean", 0.45 <= means["SFT"]["after_sampled"] <= 0.75)
    print_aim("after sft.py below 0.85 greedy, mean", means["SFT"]["after_greedy"] < 0.85)
    for name, script, sampled, greedy, seconds in (
        ("DPO", "dpo.py", 0.80, 0.05, 90),
        ("PPO, reward model", "ppo.py", 0.85, 0.1, 300),
        ("PPO, verifier", "ppo.py --reward exact", 0.92, 0.1, 300),
        ("GRPO, verifier", "grpo.py", 0.94, 0.2, 300),
    ):
        print_aim(f"after {script} at least {sampled} sampled, mean", means[name]["after_sampled"] >= sampled)
        rise = means[name]["after_greedy"] - means["SFT"]["after_greedy"]
        print_aim(f"after {script} greedy accuracy higher by at least {greedy}: {rise:+.3f}, mean", rise >= greedy)
        print_aim(f"{script} in at most {seconds} s (slowest seed: {slowest[name]:.0f} s)", slowest[name] <= seconds)
    accuracy, slow = means["reward model"]["after_pair_accuracy"], slowest["reward model"]
    print_aim(f"rm.py: held-out pair accuracy at least 0.88, mean: {accuracy:.3f}", accuracy >= 0.88)
    print_aim(f"rm.py in at most 120 s (slowest seed: {slow:.0f} s)", slow <= 120)
    explained = means["PPO, reward model"]["explained_variance"]
    print_aim(f"ppo.py: explained variance above 0.5 at the end, mean: {explained:.3f}", explained > 0.5)
    for name, run in controls.items():
        for how in ("sampled", "greedy"):
            before, after = (run[f"{when}_{how}"] for when in ("before", "after"))
            noise = 2 * math.sqrt(before * (1 - before) / (64 if quick else 1000))  # two standard errors
            if "negated" in name:
                print_aim(f"{name}: {how} accuracy falls: {after - before:+.3f}", after < before - noise)
            else:
                rise = f"{after - before:+.3f}, noise {noise:.3f}"
                print_aim(f"{name}: {how} accuracy does not rise: {rise}", after <= before + noise)


def mean_of(runs: list[dict]) -> dict:
    """The mean of every figure that all runs have."""
    shared = [name for name in runs[0] if all(isinstance(run.get(name), (int, float)) for run in runs)]
    return {name: mean(run[name] for run in runs) for name in shared}


# ------------------------------------------------------------------------------------------------------------- figures

COLOURS = {"grey": "#8a8f98", "blue": "#1f5fa8", "orange": "#d9730d", "green": "#2a7f4f"}


def load_pyplot():
    """matplotlib's pyplot, without a display, in the style of all figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.grid": True, "grid.color": "#e6e6e6"})
    return pyplot


def figure(results: str = "runs/acceptance/results.json", out: str = "tests/pipeline.png"):
    """Draws the true accuracy of SFT and of every method that starts from it: bars are means, dots are seeds.

    Args:
        results: What `acceptance` wrote.
        out: The image.
    """
    grpo.require(Path(results).exists(), f"--results {results}: run `python tests/benchmark.py acceptance` first")
    methods = json.loads(Path(results).read_text())["methods"]
    names = ["SFT", *METHODS]
    pyplot = load_pyplot()
    plot, axes = pyplot.subplots(figsize=(9, 4.2), dpi=100, layout="constrained")
    for offset, how, colour in ((-0.2, "sampled", COLOURS["blue"]), (0.2, "greedy", COLOURS["orange"])):
        values = [[run[f"after_{how}"] for run in methods[name]] for name in names]
        places = [i + offset for i in range(len(names))]
        axes.bar(places, [mean(x) for x in values], 0.36, color=colour, alpha=0.75, label=how, zorder=2)
        for place, x in zip(places, values):
            axes.plot([place] * len(x), x, "o", color="black", markersize=3, zorder=3)
            axes.text(place, max(x) + 0.015, f"{mean(x):.2f}", ha="center", fontsize=9)
    axes.set(ylim=(0, 1.08), ylabel="true accuracy, 1,000 held-out prompts", xticks=range(len(names)))
    axes.set_xticklabels(names)
    axes.spines["right"].set_visible(False)
    axes.legend(loc="upper left", frameon=False, ncols=2)
    plot.savefig(out)
    print(f"wrote {out}")


# ------------------------------------------------------------------------------------------------------------ resident


def resident_bytes(num_parameters: int) -> dict[str, dict[str, int]]:
    """Bytes that stay in memory while each script trains, by model; float32, the reference and reward model frozen.

    A trained model holds weights and gradients (4 bytes a parameter each) and Adam's two moments (8), a frozen one its
    weights. Reward and value model are taken to be as large as the policy. Activations, the KV cache and the
    low-precision copies that autocast makes come on top.
    """
    frozen, trained = 4 * num_parameters, (4 + 4 + 8) * num_parameters
    return {
        "sft.py": {"policy": trained},
        "rm.py": {"reward model": trained},
        "dpo.py": {"policy": trained},  # the reference is freed before the policy is loaded
        "grpo.py --kl-coef 0": {"policy": trained},
        "grpo.py": {"policy": trained, "reference": frozen},
        "ppo.py --reward exact": {"policy": trained, "value model": trained, "reference": frozen},
        "ppo.py": {"policy": trained, "value model": trained, "reference": frozen, "reward model": frozen},
    }


def resident_table(billions: float) -> str:
    """`resident_bytes` as a table, in GB of 10^9 bytes."""
    size = resident_bytes(round(billions * 1e9))
    names = ("policy", "value model", "reference", "reward model")
    lines = ["| GB | " + " | ".join(names) + " | in all |", "|---" * (len(names) + 2) + "|"]
    for script, models in size.items():
        cells = [f"{models[name] / 1e9:.0f}" if name in models else "" for name in names]
        lines.append(f"| `{script}` | " + " | ".join(cells) + f" | {sum(models.values()) / 1e9:.0f} |")
    return "\n".join(lines)


def resident(billions: float = 7.0):
    """Prints what stays in memory under each script: weights, gradients and optimizer state of every model.

    Args:
        billions: Parameters of each model, in 10^9.
    """
    print(resident_table(billions))


# --------------------------------------------------------------------------------------------------------------- curve


def curve(runs: tuple[str, str] = ("runs/sft", "runs/grpo"), out: str = "tests/learning_curve.png"):
    """Draws the learning curve of a run of sft.py and of the run of grpo.py that followed it, as a PNG.

    Args:
        runs: Output folders of sft.py and of grpo.py.
        out: The image, or a folder for learning_curve.png.
    """
    pyplot = load_pyplot()
    from matplotlib import ticker

    for folder, script in zip(runs, ("sft.py", "grpo.py")):
        found = (Path(folder) / "metrics.jsonl").exists()
        grpo.require(found, f"--runs {folder} holds no run: `python {script}` makes one")
    grey, blue, orange, green = COLOURS.values()
    image, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), dpi=100, layout="constrained")
    rows = read_metrics(runs[0])
    left.set(title="sft.py", xlabel="step", ylabel="loss, nats per token (log scale)", yscale="log")
    lines = draw(left, rows, "loss", "training loss", color=grey, linewidth=0.8)
    lines += draw(left, rows, "eval/loss", "held-out loss", color=green, marker="D", linestyle="none")
    left.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    second = left.twinx()  # accuracy has a scale of its own
    second.set(ylabel="accuracy", ylim=(0, 1.02))
    second.grid(False)
    lines += draw(second, rows, "eval/accuracy_sampled", "held-out accuracy, sampled", color=blue, marker="o")
    lines += draw(second, rows, "eval/accuracy_greedy", "held-out accuracy, greedy", color=orange, marker="s")
    left.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    rows = read_metrics(runs[1])
    right.set(title="grpo.py", xlabel="step", ylabel="accuracy, reward")
    right.spines["right"].set_visible(False)
    lines = draw(right, rows, "reward", "mean reward of the step", color=grey, linewidth=0.8)
    lines += draw(right, rows, "eval/accuracy_sampled", "held-out accuracy, sampled", color=blue, marker="o")
    lines += draw(right, rows, "eval/accuracy_greedy", "held-out accuracy, greedy", color=orange, marker="s")
    right.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    path = Path(out) / "learning_curve.png" if Path(out).is_dir() else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.savefig(path)
    print(f"wrote {path}")


def draw(axes, rows: list[dict], name: str, label: str, **style) -> list:
    """The metric `name` over the steps that have it; returns the lines, for the legend."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return axes.plot(*zip(*points), label=label, **style)


if __name__ == "__main__":
    commands = {"rollout": rollout, "memory": memory, "grpo": grpo_step, "sft": sft_step, "dpo": dpo_step}
    commands |= {"rm": rm_step, "ppo": ppo_step, "train": train, "scale": scale, "acceptance": acceptance}
    commands |= {"figure": figure, "curve": curve, "resident": resident}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
