# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tyro==1.0.17", "wandb==0.31.0"]
# ///
"""REINFORCE++ (Hu 2025, arXiv:2501.03262, eq. 8 to 10): PPO without a value model, normalised over the whole batch.

    rewards_t = -kl_coef * (old_logprobs - ref_logprobs)_t, plus the score at the last token
    A_t       = sum of the rewards from t on, whitened over all tokens of the step: mean 0, variance 1
    ratio     = exp(logprobs - old_logprobs)                   old: the policy at the start of the step
    loss      = mean_t max(-A * ratio, -A * clip(ratio, 1 - clip_eps, 1 + clip_eps))

The std of a group of eight is a rough estimate, and it differs from prompt to prompt. Here mean and std are those of
all completions of the step, so one completion of each prompt is enough, and more prompts fit into a step.

Each step (1) samples a completion of each of `prompts_per_step` prompts, (2) scores them, (3) computes
log-probabilities under policy and reference, (4) turns scores into rewards and advantages of every token and (5)
updates the policy `num_epochs` times, each time with the gradient of all tokens.

Differs from grpo.py in: Args, main, group_advantages, kl_k3, grpo_loss, kl_shaped_rewards, returns_to_go, moments,
whiten, reinforce_pp_advantages, policy_loss, micro_batches, parts, over_rollout.

Good to know
- mean_t is over all tokens of the step: each weighs the same, in long and in short completions.
- With one update per rollout, the default, the ratio is 1: the clip acts from the second update on.
- Mean and variance are over tokens, so that long completions weigh more. The variance is divided by the count, and
  1e-8 is added before the root.
- The baseline is the same for all prompts, easy or hard: right answers to easy prompts are pushed up as hard as
  others.
- The KL is part of the rewards and is not differentiated. Whitening scales it too: if all scores are equal, it is all
  that is left.
- EOS is trained like any other token. A completion that is cut at `max_new_tokens` is trained as it is.

    python sft.py && python variants/reinforce_pp.py          on a laptop CPU
    torchrun --nproc-per-node 8 variants/reinforce_pp.py ...  several GPUs; flags for real models as for grpo.py

Shapes: B completions of a process, N of all processes, n of them in a micro-batch, L tokens (prompt, completion,
padding on the right). Column t of every (n, L) or (B, L) tensor belongs to token t: row i of logprobs holds
log pi(ids[i, t] | ids[i, :t]). mask is 1 on completions.
"""

import dataclasses
import json
import math
import os
import random
import re
import runpy
import shutil
import sys
import time
import types
import zlib
from collections import defaultdict
from decimal import Context, Decimal
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import transformers
import tyro
from datasets import load_dataset
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, StaticCache
from transformers.cache_utils import StaticLayer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # of forward passes; trained weights are float32
transformers.utils.logging.disable_progress_bar()


@dataclasses.dataclass
class Args:
    # model and data
    model: str = "runs/sft"  # folder or Hub id; the policy to start from, and the frozen reference
    dataset: str = "arithmetic"  # the built-in task, a .jsonl or .parquet file, or a Hub name[:config[:split]]
    eval_dataset: str | None = None  # likewise; by default the last tenth of `dataset`, at most `eval_size` rows
    system_prompt: str | None = None  # before every prompt; by default, with `exact`, asks all but tiny models for ####
    reward: str = "exact"  # `exact`, a reward model, or file.py:function(rows, completions); `exact` reads `#### 42`
    max_prompt_length: int = 512  # tokens; longer prompts are dropped
    max_new_tokens: int = 256  # tokens; longer completions are cut
    out: str = "runs/reinforce_pp"  # the trained model, metrics.jsonl and checkpoints

    # algorithm
    steps: int = 60  # of training; each has one rollout
    prompts_per_step: int = 256  # on all processes together; one completion of each
    temperature: float = 1.0  # divides the logits, in sampling and in training
    num_epochs: int = 1  # passes over each rollout; one update each
    clip_eps: float = 0.2  # the ratio is clipped to 1 ± this
    kl_coef: float = 0.05  # weight of the KL to the reference; part of the rewards; at 0 no reference is loaded

    # optimisation
    lr: float | None = None  # peak; default: 1e-6; 3e-4 for models below 10 million parameters
    lr_schedule: Literal["linear", "constant"] = "linear"  # after the warm-up; linear falls to 0
    warmup_steps: int = 15  # over which the learning rate rises from 0
    micro_batch_size: int = 64  # sequences in a forward and backward pass, on each GPU
    rollout_batch_size: int = 1024  # sequences sampled at once on each GPU; bounds the KV cache
    gradient_checkpointing: bool = False  # keep only the layers' inputs, recompute the rest
    compile: bool = False  # torch.compile each layer

    # run
    seed: int = 0  # of every random draw in training
    eval_every: int = 20  # steps; 0: only before and after training
    eval_size: int = 1000  # held-out rows, at most
    save_every: int = 20  # steps between checkpoints; 0: only at the end
    resume: bool = False  # go on from the last checkpoint in `out`; give all other flags again
    track: bool = False  # log to Weights & Biases


# ------------------------------------------------------------------------------------------------------------ algorithm


def kl_shaped_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * (logprobs - ref_logprobs) at every action, plus the score at the last one: (B, L). scores: (B,)."""
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))  # 1 at the last action of each row
    return -kl_coef * (logprobs - ref_logprobs) * mask + scores[:, None] * last


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = rewards_t + gamma * G_{t+1} at every action, 0 elsewhere: (n, L). Columns where mask is 0 are skipped."""
    later, returns = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        later = torch.where(mask[:, t] > 0, rewards[:, t] + gamma * later, later)
        returns.append(later)
    return torch.stack(returns[::-1], 1).where(mask > 0, 0.0)


def moments(x: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and variance (divided by the count) over the actions of all processes."""
    n = over_ranks({"n": mask.sum(), "x": (x * mask).sum()})
    mean = n["x"] / n["n"]
    return mean, over_ranks({"x": ((x - mean) ** 2 * mask).sum()})["x"] / n["n"]


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and variance 1 over all actions, 0 elsewhere: (B, L)."""
    mean, variance = moments(x, mask)
    return (x - mean) * mask / (variance + 1e-8) ** 0.5


def reinforce_pp_advantages(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Returns to go, whitened over all actions of the step, on all processes: (B, L) (eq. 10)."""
    return whiten(returns_to_go(rewards, mask, gamma), mask)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_eps: float, num_tokens: float
) -> Tensor:
    """Sum over actions of max(-A * ratio, -A * clip(ratio)) / num_tokens, a scalar (Schulman et al. 2017, eq. 7).

    logprobs, old_logprobs, advantages, mask: (n, L). num_tokens: actions of the whole minibatch, on all processes.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return (torch.maximum(-advantages * ratio, -advantages * clipped) * mask).sum() / num_tokens


# ------------------------------------------------------------------------------------------------------ data and reward


def arithmetic(split: str) -> list[dict]:
    """The built-in task: chains of 2 to 4 digits to add up. One chain in ten belongs to the test split."""
    rng, rows = random.Random(split), {}
    while len(rows) < (9_000 if split == "train" else 1_000):
        digits = [rng.randrange(10) for _ in range(rng.randint(2, 4))]
        prompt = "+".join(map(str, digits)) + "="
        if (zlib.crc32(prompt.encode()) % 10 == 0) == (split == "test"):
            rows[prompt] = {"prompt": prompt, "answer": str(sum(digits)), "arithmetic": digits}
    return list(rows.values())


def read_rows(name: str, split: str) -> list[dict]:
    """Rows of the built-in task, a local .jsonl or .parquet file, or a Hub dataset name[:config[:split]]."""
    if name == "arithmetic":
        return arithmetic(split)
    if name.endswith(".jsonl"):
        with open(name, encoding="utf-8-sig") as file:
            return [json.loads(line) for line in file if line.strip()]  # as they stand: no column changes its type
    if name.endswith(".parquet"):
        return list(load_dataset("parquet", data_files=name, split="train"))
    path, config, wanted = [*name.split(":", 2), "", ""][:3]
    return list(load_dataset(path, config or None, split=wanted or split))


def read_data(args, fits, size) -> tuple[list[dict], list[dict]]:
    """Training rows and held-out rows. `fits` adds the ids to a row and says whether to keep it."""
    rows = read_rows(args.dataset, "train")
    if args.eval_dataset or args.dataset == "arithmetic":
        eval_rows = read_rows(args.eval_dataset or args.dataset, "test")[: args.eval_size]
    else:
        num_train = len(rows) - min(args.eval_size, len(rows) // 10)
        rows, eval_rows = rows[:num_train], rows[num_train:]
    hint = ' (if it is the system prompt: --system-prompt "")' if args.system_prompt else ""
    rows, eval_rows = ([{k: x for k, x in row.items() if x is not None} for row in part] for part in (rows, eval_rows))
    for number, row in enumerate(rows + eval_rows, 1):
        try:
            row["fits"] = row.get("prompt", row.get("question")) not in ("", []) and fits(row)
        except Exception as error:
            raise SystemExit(f"--dataset, row {number} (held-out rows come last): {error}{hint}") from error
    kept, held_out = ([row for row in part if row["fits"]] for part in (rows, eval_rows))
    print(f"{len(kept):,} of {len(rows):,} rows fit, and {len(held_out):,} of {len(eval_rows):,} held-out rows")
    check(len(kept) >= size and len(held_out) >= WORLD, f"--dataset: too few rows for a step ({size}) or an evaluation")
    return kept, held_out[: len(held_out) // WORLD * WORLD]  # equal shares for all processes


def encode(tokenizer, row: dict, system_prompt: str | None, completion: str | None = None) -> list[int]:
    """Ids of a row's prompt (`prompt`, text or messages, or `question`) or, with a completion, of both and its end."""
    prompt = row.get("prompt", row.get("question"))
    assert prompt is not None, f"it needs `prompt` or `question`, and has only {', '.join(row)}"
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages += [{"role": "assistant", "content": completion}] if completion is not None else []
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=completion is None, return_dict=False)
    ends = {"system": "\n\n", "assistant": tokenizer.eos_token}
    return tokenizer.encode("".join(turn["content"] + ends.get(turn["role"], "") for turn in messages))


def extract_answer(text: str) -> str | None:
    """The last `#### answer` line or `\\boxed{answer}`, a number in its shortest form; None if there is none."""
    box = r"\\boxed ?\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # holds braces two deep
    found = [(tidy(line or boxed), boxed) for line, boxed in re.findall(rf"####[ \t]*([^\n]*)|{box}", text)]
    clear = [answer for answer, boxed in found if answer and (boxed or re.search(r"\d", answer))]
    return (clear or [answer for answer, _ in found if answer] or [None])[-1]  # `#### Summary` is a heading


def tidy(answer: str) -> str:
    """Without `$`, `**`, `\\text{}`, thousands' commas, spaces and a full stop at the end; 007, +7 and 7.0 are 7."""
    answer = re.sub(r"\\(?:text|mathrm|boxed) ?\{([^{}]*)\}", r"\1", answer.replace("\u2212", "-").replace("{,}", ","))
    answer = re.sub(r"\*\*|\\?\$|\s|(?<=\d),(?=\d{3}(?!\d))", "", answer).removesuffix(".")
    is_number = re.fullmatch(r"[+-]?\d*\.?\d+", answer)
    return f"{Decimal(answer).normalize(Context(len(answer))):f}" if is_number else answer


def exact_match(completion: str, answer: str) -> float:
    """1.0 if the completion's answer is `answer`: a bare one, or a solution that closes with it, as in GSM8K."""
    expected = extract_answer(str(answer)) or tidy(str(answer))
    return float(bool(expected) and extract_answer(completion) == expected)


def load_reward(args):
    """`--reward` as a function of rows and the texts of their completions: rewards, (n,), higher is better."""
    if args.reward == "exact":
        score = lambda rows, texts: [exact_match(text, row["answer"]) for row, text in zip(rows, texts)]  # noqa: E731
    elif ".py:" in args.reward:
        path, name = args.reward.rsplit(":", 1)
        score = runpy.run_path(path)[name]
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.reward)
        model = AutoModelForSequenceClassification.from_pretrained(args.reward, dtype=DTYPE).to(DEVICE)
        check(model.config.num_labels == 1, f"--reward {args.reward}: a reward model has one label")
        model.config.pad_token_id = tokenizer.pad_token_id  # it scores the last token that is not this one

        @torch.no_grad()
        def score(rows, texts):
            scores, ids = [], [encode(tokenizer, row, args.system_prompt, text) for row, text in zip(rows, texts)]
            for i in range(0, len(ids), args.micro_batch_size):
                batch = {"input_ids": ids[i : i + args.micro_batch_size]}
                batch = tokenizer.pad(batch, padding_side="right", return_tensors="pt").to(DEVICE)
                scores += model(**batch, use_cache=False).logits.squeeze(1).tolist()
            return scores

    def reward_of(rows, texts):
        rewards = torch.tensor([math.nan if x is None else float(x) for x in score(rows, texts)])
        good = len(rewards) == len(rows) and rewards.isfinite().all()
        check(good, f"--reward {args.reward}: {len(rows)} finite numbers are needed, not {rewards.tolist()}")
        return rewards

    return reward_of


# ------------------------------------------------------------------------------------------- log-probabilities, rollout


def token_logprobs(model, ids: Tensor, mask: Tensor, temperature=1.0, entropy_grad=False) -> tuple[Tensor, Tensor]:
    """log pi(ids[n, t] | ids[n, :t]) where mask is 1, and the entropy of that distribution, in nats: (n, L) each.

    A causal model never sees padding on the right: no attention mask is needed. Only completions pass the output head,
    in chunks that the backward pass recomputes, so that n * L * vocabulary logits are never in memory.
    """
    n, t = mask.nonzero(as_tuple=True)

    def head(hidden, targets):
        log_p = (model.get_output_embeddings()(hidden).float() / temperature).log_softmax(-1)
        of_entropy = log_p if entropy_grad else log_p.detach()  # or its unused graph keeps log_p in memory
        return log_p.gather(1, targets[:, None])[:, 0], -(of_entropy.exp() * of_entropy).sum(-1)

    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda, cache_enabled=False):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[n, t - 1]  # (actions, D)
        chunks = zip(hidden.split(1024), ids[n, t].split(1024))
        logprobs, entropy = zip(*(checkpoint(head, *chunk, use_reentrant=False) for chunk in chunks))
    zeros = torch.zeros(ids.shape, device=ids.device)
    return zeros.index_put((n, t), torch.cat(logprobs)), zeros.index_put((n, t), torch.cat(entropy))


@torch.no_grad()
def generate(model, prompts, num_samples, max_new_tokens, temperature, eos_ids, generator):
    """`num_samples` completions of each prompt, side by side: lists of ids, EOS included, and of log-probabilities.

    Sampled from softmax(logits / temperature), with no top-k or top-p; temperature 0 is greedy. A prompt is read once,
    and its KV cache copied for its samples. On CUDA the decoding step is recorded once and then replayed.
    """
    ids = pad(prompts, left=True)  # (B, P)
    seen = pad([[1] * len(prompt) for prompt in prompts], left=True).bool()
    width, position = ids.shape[1], (seen.cumsum(1) - 1).clamp(min=0)
    record, cache = DEVICE.type == "cuda" and model.config._attn_implementation == "sdpa", None
    if record:  # a CUDA graph works on fixed addresses: room for every column, those to come are masked
        cache = StaticCache(model.config, max_cache_len=width + max_new_tokens)
        record = all(type(layer) is StaticLayer for layer in cache.layers)  # no windows, no recurrent states
    state = {"past_key_values": cache if record else None, "use_cache": True}
    output = model(input_ids=ids, attention_mask=seen, position_ids=position, logits_to_keep=1, **state)
    cache, repeat = output.past_key_values, torch.arange(len(prompts), device=DEVICE).repeat_interleave(num_samples)
    cache.reorder_cache(repeat)
    logits, position, seen = output.logits[repeat], position[repeat, -1:], seen[repeat]
    seen = torch.nn.functional.pad(seen, (0, max_new_tokens))  # (B*G, columns of the cache)
    rows = torch.arange(len(repeat), device=DEVICE)  # those in the batch
    done = torch.zeros_like(rows, dtype=torch.bool)
    tokens = torch.full((len(rows), max_new_tokens), -1, device=DEVICE)
    logprobs = torch.zeros(tokens.shape, device=DEVICE)
    token = graph = None

    def decode(token):
        columns = seen[:, None, None] if record else seen[:, : width + t + 1]
        return model(input_ids=token, attention_mask=columns, position_ids=position, past_key_values=cache).logits

    for t in range(max_new_tokens):
        log_p = (logits[:, -1].float() / (temperature or 1)).log_softmax(-1)  # (rows, V)
        drawn = torch.multinomial(log_p.exp(), 1, generator=generator) if temperature else log_p.argmax(-1, True)
        tokens[rows, t] = drawn[:, 0].masked_fill(done, -1)
        logprobs[rows, t] = log_p.gather(1, drawn)[:, 0]
        done |= sum(drawn[:, 0] == stop for stop in eos_ids) > 0
        left = (~done).nonzero()[:, 0]
        if len(left) == 0 or t + 1 == max_new_tokens:
            break
        if len(left) <= len(rows) * (0.5 if record else 0.95):  # rows that have ended leave; recording anew costs more
            rows, done, drawn, position, seen = (x[left] for x in (rows, done, drawn, position, seen))
            cache.reorder_cache(left)
            graph = None
        position += 1
        seen[:, width + t] = True
        if graph:
            token.copy_(drawn)
            graph.replay()  # overwrites `logits`
            continue
        token = drawn.clone()
        logits = decode(token)
        if record:
            first, graph = logits, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = decode(token)  # recorded, not run
            logits.copy_(first)
    lengths = (tokens >= 0).sum(1).tolist()
    return [x[:k] for x, k in zip(tokens.tolist(), lengths)], [x[:k] for x, k in zip(logprobs.tolist(), lengths)]


def rollout(model, prompts, num_samples, temperature, eos_ids, key, args):
    """`generate`, at most `rollout_batch_size` sequences at a time; `key` seeds the draws."""
    generator, size = seeded(*key, RANK, device=DEVICE), max(1, args.rollout_batch_size // num_samples)
    completions, logprobs = [], []
    for part in [prompts[i : i + size] for i in range(0, len(prompts), size)]:
        found = generate(model, part, num_samples, args.max_new_tokens, temperature, eos_ids, generator)
        completions, logprobs = completions + found[0], logprobs + found[1]
    return completions, logprobs


def parts(rows: Tensor, size: int, *tensors: Tensor):
    """Yields `size` of the rows at a time, cut behind their last action: (n, L) each. tensors[1] is the mask."""
    for part in rows.split(size):
        width = int(tensors[1][part].cumsum(1).argmax(1).max()) + 1
        yield [x[part, :width] for x in tensors]


@torch.no_grad()
def over_rollout(function, ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """function(ids, mask) of all rows, `size` at a time: (B, L), without gradient."""
    found = [function(*part) for part in parts(torch.arange(len(ids)), size, ids, mask)]
    return torch.cat([torch.nn.functional.pad(x, (0, ids.shape[1] - x.shape[1])) for x in found])


def evaluate(model, tokenizer, rows, reward_of, eos_ids, args) -> dict[str, float]:
    """Reward, and accuracy where rows have an `answer`, on held-out prompts: sampled at temperature 1, and greedy."""
    mine, metrics = rows[RANK::WORLD], {}
    prompts = [row["prompt_ids"] for row in mine]
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        completions, _ = rollout(model, prompts, 1, temperature, eos_ids, ["evaluation"], args)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        metrics[f"eval/reward_{name}"] = reward_of(mine, texts).sum() / len(rows)
        if all("answer" in row for row in rows):
            metrics[f"eval/accuracy_{name}"] = sum(map(exact_match, texts, [row["answer"] for row in mine])) / len(rows)
    print(f"a greedy completion: {tokenizer.decode(prompts[0] + completions[0])}")
    return over_ranks(metrics)


def main(args: Args) -> dict[str, float]:
    """Trains and returns the last step's metrics."""
    B, N = args.prompts_per_step // WORLD, args.prompts_per_step  # completions of this process, and of all processes
    check(args.prompts_per_step == B * WORLD, f"--prompts-per-step {args.prompts_per_step}: not a multiple of {WORLD}")
    check(args.temperature > 0, "--temperature 0: sampling needs more than 0")
    first_step, folder = start_run(args)
    start_from = folder / "policy" if folder else args.model
    tokenizer, policy = AutoTokenizer.from_pretrained(args.model), load_model(start_from)
    eos_ids = stop_ids(tokenizer, policy)
    tiny = policy.num_parameters() < 10_000_000  # such as sft.py's, which knows its task
    if args.system_prompt is None and args.reward == "exact" and not tiny:
        args.system_prompt = "Reason step by step. Close with a line that reads #### and then the answer."

    def fits(row):
        assert args.reward != "exact" or "answer" in row, f"--reward exact needs `answer`, it has only {', '.join(row)}"
        row["prompt_ids"] = encode(tokenizer, row, args.system_prompt)
        return 0 < len(row["prompt_ids"]) <= args.max_prompt_length

    rows, eval_rows = read_data(args, fits, args.prompts_per_step)
    longest = max(len(row["prompt_ids"]) for row in rows + eval_rows) + args.max_new_tokens
    check(longest <= policy.config.max_position_embeddings, f"--max-new-tokens: {longest} tokens do not fit the model")
    reward_of = load_reward(args)

    sampler = load_model(start_from, DTYPE)  # whole on every GPU, for fast rollouts
    policy = prepare(policy, args, token_logprobs)
    reference = prepare(load_model(args.model).requires_grad_(False), args, token_logprobs) if args.kl_coef else None
    peak_lr = args.lr if args.lr is not None else 3e-4 if tiny else 1e-6
    optimizer = torch.optim.AdamW(policy.parameters(), peak_lr, (0.9, 0.99), weight_decay=0.0)
    print(f"{WORLD} x {DEVICE}, {policy.num_parameters():,} parameters, learning rate {peak_lr:g}")
    if folder:
        state = torch.load(folder / "policy" / "optimizer.pt", weights_only=True, mmap=True)
        set_optimizer_state_dict(policy, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        log(args, 0, evaluate(sampler, tokenizer, eval_rows, reward_of, eos_ids, args))

    begin = time.perf_counter()
    for step in range(first_step, args.steps + 1):
        # (1) rollout
        clock, metrics = time.perf_counter(), defaultdict(float)
        drawn = torch.randperm(len(rows), generator=seeded(args.seed, "prompts", step))[: args.prompts_per_step]
        chosen = [rows[i] for i in drawn[RANK::WORLD]]  # (B,)
        prompts = [row["prompt_ids"] for row in chosen]
        key = (args.seed, "rollout", step)
        completions, sampled = rollout(sampler, prompts, 1, args.temperature, eos_ids, key, args)
        ids = pad([prompt + completion for prompt, completion in zip(prompts, completions)])  # (B, L)
        mask = pad([[0.0] * len(prompt) + [1.0] * len(completion) for prompt, completion in zip(prompts, completions)])
        sampled = pad([[0.0] * len(prompt) + logprobs for prompt, logprobs in zip(prompts, sampled)])
        metrics["time/rollout"] = (time.perf_counter() - clock) / WORLD

        # (2) scores
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        scores = reward_of(chosen, texts).to(DEVICE)  # (B,)

        # (3) log-probabilities before the first update: (B, L) each
        size = args.micro_batch_size
        old = ref = over_rollout(lambda *part: policy.token_logprobs(*part, args.temperature)[0], ids, mask, size)
        if reference:
            ref = over_rollout(lambda *part: reference.token_logprobs(*part, args.temperature)[0], ids, mask, size)

        # (4) rewards and advantages of every token: (B, L) each
        rewards = kl_shaped_rewards(scores, old, ref, mask, args.kl_coef)
        advantages = reinforce_pp_advantages(rewards, mask, 1.0)  # gamma is 1: no discount

        # (5) updates; sorted by length, so that micro-batches hold little padding
        order = torch.tensor(sorted(range(B), key=lambda n: len(prompts[n]) + len(completions[n])))
        num_tokens = over_ranks({"tokens": mask.sum()})["tokens"]
        for _ in range(args.num_epochs):
            for part in parts(order, size, ids, mask, old, advantages):  # (n, L) each
                part_ids, part_mask, part_old, part_advantages = part
                logprobs, entropy = policy.token_logprobs(part_ids, part_mask, args.temperature)
                loss = policy_loss(logprobs, part_old, part_advantages, part_mask, args.clip_eps, num_tokens)
                (loss * WORLD).backward()  # FSDP averages over the processes
                outside = ((logprobs.detach() - part_old).exp() - 1).abs() > args.clip_eps
                metrics["loss"] += loss.detach() / args.num_epochs
                metrics["entropy"] += entropy.sum() / num_tokens / args.num_epochs
                metrics["clip_frac"] += outside.sum() / num_tokens / args.num_epochs
            grad_norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)).item()
            optimizer.param_groups[0]["lr"] = lr = learning_rate(args, step, peak_lr)
            if math.isfinite(grad_norm):  # NaN or infinite: no update
                optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():  # the next rollout's policy
            for ours, theirs in zip(sampler.parameters(), policy.parameters()):
                ours.copy_(whole(theirs))

        metrics["reward"] = scores.sum() / N
        if reference:
            metrics["kl_ref"] = (old - ref).sum() / N  # nats per completion
        metrics["sampling_gap"] = (old - sampled).abs().sum() / num_tokens
        metrics["completion_length"] = sum(map(len, completions)) / N
        metrics["truncated_frac"] = sum(completion[-1] not in eos_ids for completion in completions) / N
        metrics = over_ranks(metrics) | {"grad_norm": grad_norm, "lr": lr, "time/step": time.perf_counter() - clock}
        last = step == args.steps
        if last or step % (args.eval_every or args.steps) == 0:
            metrics |= evaluate(sampler, tokenizer, eval_rows, reward_of, eos_ids, args)
        metrics["time/left"] = (time.perf_counter() - begin) / (step + 1 - first_step) * (args.steps - step)
        log(args, step, metrics)
        if last or step % (args.save_every or args.steps) == 0:
            save(args, step, last, tokenizer, policy=(policy, optimizer))
    if WORLD > 1:
        dist.destroy_process_group()
    return metrics


# ----------------------------------------------------------------------------------- plumbing, the same in every script


def check(condition, message: str):
    """Unless `condition` holds, ends the run with a sentence that says what to change."""
    if not condition:
        raise SystemExit(message)


def start_run(args) -> tuple[int, Path | None]:
    """Starts the process group. Returns the first step and, to resume from, the checkpoint; cuts the log back to it."""
    out = Path(args.out)
    for name in {args.model, getattr(args, "reward", "")} & {"runs/sft", "runs/rm"}:
        check(Path(name, "config.json").exists(), f"{name} is not there: run `python {name[5:]}.py` first")
    check(args.resume or not (out / "args.json").exists(), f"{out} holds a run: --resume it, or choose another --out")
    found = sorted((int(path.name[5:]), path) for path in out.glob("checkpoints/step-*[0-9]"))
    step, folder = found[-1] if found else (0, None)
    check(hasattr(args, "epochs") or step < args.steps, f"{out} is finished: it has all --steps {args.steps}")
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout  # noqa: SIM115
    if RANK == 0 and (out / "metrics.jsonl").exists():
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(lines[: step + 1 if folder else 0]))  # later steps are run again
    return step + 1, folder


@torch.no_grad()
def load_model(name, dtype=torch.float32):
    """A policy in evaluation mode, without dropout; in float32 to train: an update of 1e-6 is lost in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(DEVICE)
    ids = torch.arange(9, device=DEVICE)[None]
    logits = model.get_output_embeddings()(model.get_decoder()(ids).last_hidden_state)
    check(torch.allclose(logits, model(ids).logits), f"--model {name} changes its logits after the head: not supported")
    return model


def stop_ids(tokenizer, model) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS and the generation config's. The model is saved with both."""
    check(tokenizer.eos_token_id is not None, "--model: its tokenizer has no EOS token, so no completion could end")
    more = model.generation_config.eos_token_id
    found = sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None})
    model.generation_config = transformers.GenerationConfig(eos_token_id=found, pad_token_id=tokenizer.pad_token_id)
    return found


def prepare(model, args, forward):
    """Makes `forward` a method of the model; layers are checkpointed and compiled if asked, weights sharded (FSDP2)."""
    layers = [x for x in model.modules() if type(x).__name__ in (model._no_split_modules or ())]
    for layer in layers if args.gradient_checkpointing else ():
        layer.forward = lambda *x, forward=layer.forward, **kw: checkpoint(forward, *x, use_reentrant=False, **kw)
    for layer in layers if args.compile else ():
        layer.compile(dynamic=True)
    setattr(model, forward.__name__, types.MethodType(forward, model))
    if WORLD > 1:
        for module in [*layers, model]:
            fully_shard(module, mp_policy=MixedPrecisionPolicy(DTYPE, torch.float32), reshard_after_forward=True)
        register_fsdp_forward_method(model, forward.__name__)
    return model


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # under FSDP x is sharded


def seeded(*key, device="cpu"):
    """A generator that depends on its key alone, so that a resumed run needs no generator state."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def pad(rows, left=False):
    """Lists of numbers as a tensor, zeros on the right, or on the left: (len(rows), longest)."""
    zeros = [[0] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor([z + row if left else row + z for z, row in zip(zeros, rows)], device=DEVICE)


def over_ranks(metrics: dict) -> dict[str, float]:
    """Each number added up over all processes."""
    values = torch.tensor([float(x) for x in metrics.values()], dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(values)
    return dict(zip(metrics, values.tolist()))


def learning_rate(args, step, peak):
    """Rises over the warm-up, then stays at the peak or falls to 0 just after the last step."""
    warmup = max(1, args.warmup_steps)
    falling = (args.steps + 1 - step) / max(1, args.steps + 1 - warmup)
    return peak * min(1, step / warmup, falling if args.lr_schedule == "linear" else 1)


def save(args, step, last, tokenizer, **trained):
    """Writes checkpoints/step-N, renamed into place: a kill leaves a whole one. In the end `out` gets the model."""
    folder = Path(args.out, "checkpoints", f"step-{step}")
    for name, (model, optimizer) in trained.items():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizer, options=options)  # whole, gathered from all processes
        weights = {key: x for key, x in weights.items() if key not in model.all_tied_weights_keys}  # saved once
        if RANK == 0:
            model.save_pretrained(folder.with_suffix(".tmp") / name, state_dict=weights)
            tokenizer.save_pretrained(folder.with_suffix(".tmp") / name)
            torch.save(state, folder.with_suffix(".tmp") / name / "optimizer.pt")
    if RANK == 0:
        if last:
            source = folder.with_suffix(".tmp") / next(iter(trained))
            shutil.copytree(source, args.out, ignore=shutil.ignore_patterns("optimizer.pt"), dirs_exist_ok=True)
        folder.with_suffix(".tmp").rename(folder)
        for old in set(folder.parent.glob("step-*")) - {folder}:
            shutil.rmtree(old)


def log(args, step, metrics):
    """A line on screen and a row of metrics.jsonl; and args.json, by which `start_run` knows that `out` holds a run."""
    short = ("reward", "accuracy", "loss", "pair_accuracy", "kl_ref", "entropy", "completion_length", "grad_norm")
    shown = [name for name in (*short, "time/left") if name in metrics] + [x for x in metrics if x.startswith("eval/")]
    print(f"step {step}/{args.steps}  " + "  ".join(f"{name} {metrics[name]:.3g}" for name in shown), flush=True)
    if RANK == 0:
        os.makedirs(args.out, exist_ok=True)
        Path(args.out, "args.json").write_text(json.dumps(vars(args), indent=2))
        with open(Path(args.out, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if args.track:
            import wandb

            (wandb.run or wandb.init(project="onefile-rlhf", config=vars(args))).log(metrics, step=step)


if __name__ == "__main__":
    main(tyro.cli(Args))
