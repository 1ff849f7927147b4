# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tyro==1.0.17", "wandb==0.31.0"]
# ///
"""DPO: direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

Maximise E[reward] - beta * KL(policy || reference) without a reward model and without sampling: the policy that is
optimal for a reward r has r(x, y) = beta * log(pi(y|x) / pi_ref(y|x)) + a term of the prompt x alone. That cancels in
P(chosen > rejected) = sigmoid(r(x, chosen) - r(x, rejected)), whose likelihood is maximised. The loss:

    loss     = -1/batch_size * sum_n [ (1 - label_smoothing) * log sigmoid(z) + label_smoothing * log sigmoid(-z) ]
    z        = chosen_rewards - rejected_rewards
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)                the implicit reward; rejected_rewards alike
    logps    = sum_t mask[n, t] * log pi(ids[n, t] | ids[n, :t])             summed over the completion, not averaged

Before the first step: the reference (the model as it was loaded, or `reference`) scores all pairs and is freed, so that
only one model is in memory (on a GPU a bfloat16 copy that samples, too).
Each step:  (1) batch: the next `batch_size` pairs of an endless stream of shuffled epochs
            (2) loss and gradient over token-budget micro-batches of whole pairs    (3) update

Signal: one comparison per pair. The weight of a pair in the gradient is beta * (sigmoid(-z) - label_smoothing): pairs
    that are right count little, or are pulled back. `label_smoothing`: the share of labels taken to be wrong (Mitchell
    2023). At 0, as in the paper, z is pushed up without end, and completions outside the data may gain probability.
KL: nowhere in the loss; beta stands for it. At the optimum a larger beta stays closer to the reference, but it scales
    the gradient too: under plain gradient descent a short run may end further away (Adam divides the scale out).
Mask and normaliser: mask is 1 on the completion and its EOS, else 0; the mean is over the pairs of the whole step.
Truncation: none. A pair of which either side exceeds `max_length` is dropped and counted.
Unlike the paper: label smoothing, AdamW instead of RMSprop, a shorter warm-up, and a learning rate that decays.

Data: rows of prompt + chosen + rejected, text or messages; or of chosen + rejected alone, whole conversations whose
    shared beginning is the prompt (messages, or text with turns marked as in HH-RLHF). `answer`, an optional column.

Run:  python sft.py && python dpo.py                                             a laptop CPU, under three minutes
      python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct ... one GPU, or torchrun --nproc-per-node 8 dpo.py ...; README
      python dpo.py --score-only --model runs/dpo --reference runs/sft    policy and reference as a reward model

Metrics (metrics.jsonl), and what healthy looks like:
  loss                    ln 2 = 0.69 at the start, unless `reference` is another model; at best 0.33 if smoothed by 0.1
  pair_accuracy, margin   of the step: share of pairs with z > 0 (0.5 if equal); mean z
  chosen_reward, rejected_reward    implicit; the first should not fall far below 0
  chosen_logps, rejected_logps      nats per completion; the second falls; if both fall far: lower --lr or raise --beta
  grad_norm, lr           the norm before clipping
  eval/...                the first seven on held-out pairs, eval/loss without smoothing; at step 0 too
  eval/accuracy_sampled, eval/accuracy_greedy, eval/answered_*  share right at temperature 1, at 0; share with an answer
  skipped_updates         updates left out so far because they were not finite

Dimensions: N pairs (n in a micro-batch), 2N sequences (first the chosen ones, then the rejected ones), L tokens,
V vocabulary, D hidden. Index t of a (2N, L) tensor speaks of the decision to emit token t (read from the state at t-1).
"""

import copy
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
import torch.distributed as dist
import transformers
import tyro
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

# ------------------------------------------------------------------------------------------------------------ settings


@dataclasses.dataclass
class Args:
    # model and data
    model: str = "runs/sft"
    """Model to start from: a local folder or a Hub id; `tiny`, in sft.py, is a small one with random weights."""
    dataset: str = "arithmetic"
    """`arithmetic` (built in), a local .jsonl/.json/.csv/.parquet file, or a Hub dataset as name[:config[:split]]."""
    eval_dataset: str | None = None
    """Evaluation rows, named like `dataset`; default: the Hub's test or validation split, else the last rows."""
    system_prompt: str | None = None
    """Text put in front of every prompt, as the system turn where there is a chat template."""
    reference: str | None = None
    """Folder or Hub id of the reference; default: the model as it was loaded."""
    max_length: int = 1024
    """Rows of more tokens than this are dropped and counted."""
    max_new_tokens: int = 64
    """Most tokens of a completion that is sampled."""
    out: str = "runs/dpo"
    """Folder for the final model, logs and checkpoints."""

    # algorithm
    beta: float | None = None
    """Scale of the implicit reward; default: what suits the model's size; to score, its run's."""  # paper: 0.1
    label_smoothing: float = 0.1
    """Share s of the labels taken to be wrong, below 0.5: no pair is pushed past z = log(1 / s - 1)."""  # paper: 0.0
    score_only: bool = False
    """Train nothing: write implicit rewards of `dataset` (the Hub's test split) to `out`/implicit_rewards.jsonl."""

    # optimisation
    epochs: int = 1
    """Passes over the training rows."""
    steps: int | None = None
    """Rollouts in grpo.py and ppo.py (default: 200 and 100); else optimizer steps (default: all epochs)."""
    batch_size: int = 64
    """Rows per optimizer step."""  # paper: 64
    lr: float | None = None
    """Peak learning rate; default: one that suits the size of the model, printed and logged."""  # paper: 1e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up, to 0 just after the last step."""
    warmup_steps: int = 15
    """Steps over which the learning rate rises from 0."""
    adam_beta2: float = 0.99
    """Adam's decay rate of the squared gradient."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    micro_batch_tokens: int = 2048
    """Most tokens, padding included, in one forward and backward pass of a process, unless a single row has more."""
    rollout_batch_size: int = 1024
    """Most sequences decoded at once: bounds the KV cache."""
    cache_memory: float = 0.5
    """Largest share of a GPU's free memory for the KV cache; where it is too little, fewer are decoded at once."""
    cuda_graphs: bool = True
    """On CUDA, if no layer's attention has a window: replay a recorded decoding step, which spares Python's time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile most of the model (torch.compile): up to a minute at the start, then shorter steps."""

    # run
    seed: int = 0
    """Seed of every random draw."""
    eval_every: int = 200
    """Steps between evaluations."""
    eval_size: int = 1000
    """Evaluation rows."""
    sample_every: int = 100
    """Steps between samples written to samples.jsonl."""
    save_every: int = 100
    """Steps between checkpoints."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the final model's weights."""
    resume: bool = False
    """Go on from the last checkpoint in `out`."""
    overwrite: bool = False
    """Remove the run that `out` holds and start anew."""
    track: bool = False
    """Log to Weights & Biases too (WANDB_MODE=offline works)."""
    wandb_project: str = "onefile-rlhf"
    """Weights & Biases project."""

    def __post_init__(self):
        check_numbers(self)
        require(self.label_smoothing < 0.5, f"--label-smoothing {self.label_smoothing}: must be below 0.5")
        require(self.reference or not self.score_only, "--score-only needs --reference, what --model was trained from")


# ----------------------------------------------------------------------------------------------------------- algorithm


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each pair in nats, and the implicit rewards of both sides, detached; all (n,).

    logps: (n,), log-probabilities summed over the completion. Eq. 7 at label_smoothing 0, above it conservative DPO.
    Raises ValueError on unequal shapes.
    """
    shapes = {x.shape for x in (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)}
    if len(shapes) > 1 or chosen_logps.dim() != 1:
        raise ValueError(f"log-probabilities of shapes {shapes} are not (N,) each: sum them over the completion")
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    z = chosen_rewards - rejected_rewards  # log-odds of P(chosen > rejected)
    right, wrong = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
    losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# ----------------------------------------------------------------------------------------------------------------- data

# Pairs of the built-in task: a minute on two cores.
ARITHMETIC_ROWS = {"train": 7_000, "test": 2_000}


def solve(numbers: list[int], slip: float, habit: float, rng: random.Random) -> str:
    """The running sum of `numbers`, line by line, closed by `#### total`, with the demonstrator's two faults.

    slip: probability of a wrong step that carries on. habit: probability that adding 7 comes out one too high.
    """
    total, lines = numbers[0], []
    for number in numbers[1:]:
        result = total + number
        if number == 7 and rng.random() < habit:
            result += 1
        elif rng.random() < slip:
            result += rng.choice((-1, 1, 2)) if result else 1
        lines.append(f"{total}+{number}={result}\n")
        total = result
    return "".join(lines) + f"#### {total}"


def arithmetic_rows(split: str, num_rows: int) -> list[dict]:
    """The built-in task: distinct chains of 2 to 5 one-digit numbers; a tenth of all prompts is the `test` split.

    completion: a demonstration with both faults. chosen: a flawless one. rejected: one whose faults made it wrong.
    """
    rng, pair_rng, rows, seen = random.Random(f"arithmetic {split}"), random.Random(f"pairs {split}"), [], set()
    while len(rows) < num_rows:
        numbers = [rng.randrange(10) for _ in range(rng.randint(2, 5))]
        prompt = "+".join(map(str, numbers)) + "="
        is_test = zlib.crc32(prompt.encode()) % 10 == 0
        if is_test == (split == "test") and prompt not in seen:
            seen.add(prompt)
            completion = solve(numbers, slip=0.1, habit=0.6, rng=rng)
            chosen = rejected = solve(numbers, slip=0.0, habit=0.0, rng=pair_rng)
            while rejected.rpartition(" ")[2] == str(sum(numbers)):
                rejected = solve(numbers, slip=0.1, habit=0.6, rng=pair_rng)
            row = {"prompt": prompt, "completion": completion, "answer": str(sum(numbers))}
            rows.append({**row, "chosen": chosen, "rejected": rejected})
    return rows


def as_messages(prompt: str | list[dict], system_prompt: str | None) -> list[dict]:
    """A prompt (text or messages) as messages, behind the system prompt if there is one."""
    if not prompt or not isinstance(prompt, (str, list)):
        raise ValueError(f"expected text or messages, found {prompt!r}")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*([{"role": "system", "content": system_prompt}] if system_prompt else []), *messages]


def prompt_of(row: dict) -> str | list[dict]:
    """The prompt of a row, text or messages: its column `prompt`, else `question`."""
    return row["prompt"] if "prompt" in row else row["question"]


def render(tokenizer, messages: list[dict], generation_prompt: bool = False) -> str:
    """The text of a conversation: by the chat template where there is one, else all turns with a blank line between."""
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)


def encode_prompt(tokenizer, row: dict, system_prompt: str | None) -> list[int]:
    """The one function that turns a prompt into ids. Plain text gets one BOS if the tokenizer uses BOS."""
    text = render(tokenizer, as_messages(prompt_of(row), system_prompt), generation_prompt=True)
    ids, bos = tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id
    if tokenizer.chat_template or bos is None or ids[:1] == [bos] or tokenizer.encode("a")[:1] != [bos]:
        return ids  # a template brings its own BOS
    return [bos, *ids]


def extend(tokenizer, ids: list[int], done: str, text: str) -> list[int]:
    """Ids of what follows `done` in `text`: encoded together, if that leaves the ids of `done` as `ids`, else alone."""
    whole = tokenizer.encode(text, add_special_tokens=False)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    return tokenizer.encode(text[len(done) :], add_special_tokens=False)


def encode_row(tokenizer, row: dict, system_prompt: str | None, eos_ids: list[int]) -> tuple[list[int], list[int]]:
    """A row of SFT data as ids and mask: 1 on what is trained, up to and including its end of turn, else 0.

    Of `messages` every assistant turn is trained, else the completion alone. A prompt has the very ids that sampling
    will start from. Raises ValueError if the chat template changes earlier text once a turn follows.
    """
    if "messages" in row:
        messages = as_messages(row["messages"], system_prompt)
    else:
        completion = as_messages(row["completion" if "completion" in row else "answer"], None)
        if len(completion) > 1:
            raise ValueError("its completion is more than one message: use a column `messages`")
        messages = [*as_messages(prompt_of(row), system_prompt), {**completion[0], "role": "assistant"}]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = turns if "messages" in row else turns[-1:]
    if not turns or (not tokenizer.chat_template and turns != [len(messages) - 1]):
        raise ValueError("it needs an assistant turn: just one, as the last, if the tokenizer has no chat template")
    ids, mask, done = [], [], ""
    for i in turns:
        if tokenizer.chat_template:
            prompt, turn = render(tokenizer, messages[:i], generation_prompt=True), render(tokenizer, messages[: i + 1])
            if not (prompt.startswith(done) and turn.startswith(prompt)):
                raise ValueError(f"the chat template changes what precedes turn {i} once it follows: one row per turn")
            prompt_ids = extend(tokenizer, ids, done, prompt)
            completion_ids, done = extend(tokenizer, ids + prompt_ids, prompt, turn), turn
        else:
            prompt_ids = encode_prompt(tokenizer, {"prompt": messages[:i]}, None)
            completion_ids = tokenizer.encode(messages[i]["content"], add_special_tokens=False)
        ends = [k + 1 for k, token in enumerate(completion_ids) if token in eos_ids]
        if not ends:
            completion_ids, ends = [*completion_ids, tokenizer.eos_token_id], [len(completion_ids) + 1]
        ids += prompt_ids + completion_ids  # what the template puts after the end of turn, a newline say, has mask 0
        mask += [0] * len(prompt_ids) + [1] * ends[0] + [0] * (len(completion_ids) - ends[0])
    length = len(mask) - mask[::-1].index(1)
    return ids[:length], mask[:length]


def encode_pair(tokenizer, row: dict, system_prompt: str | None, eos_ids: list[int]) -> tuple[tuple, tuple]:
    """(ids, mask) of the chosen and of the rejected side; mask is 1 on the completion, its end of turn included."""
    texts = [{"prompt": prompt_of(row), "completion": row[side]} for side in ("chosen", "rejected")]
    return tuple(encode_row(tokenizer, text, system_prompt, eos_ids) for text in texts)


def split_pair(row: dict, chat: bool) -> dict | None:
    """The row with `prompt` and the texts `chosen` and `rejected`; None if the sides differ in more than the last turn.

    Without a prompt, or as lists of messages, the sides are whole conversations, and what precedes their last turn is
    the prompt: messages, or text in the layout of HH-RLHF, which becomes messages if `chat` (there is a template). A
    prompt of its own is taken as it is: text is one turn of the user.
    """
    prompt, chosen, rejected = row.get("prompt", row.get("question")), row["chosen"], row["rejected"]
    mark = "\n\nAssistant:"
    if type(chosen) is not type(rejected):
        raise ValueError("`chosen` and `rejected` must both be text or both be messages")
    if isinstance(chosen, list):
        if chosen[:-1] != rejected[:-1]:
            return None
        told = [message["content"] for message in chosen[:-1]]
        if told and prompt and not {message["content"] for message in as_messages(prompt, None)} <= set(told):
            raise ValueError("`prompt` holds turns that `chosen` does not repeat")
        prompt = chosen[:-1] or prompt
        if not prompt or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
            raise ValueError("`chosen` and `rejected` must close with an assistant turn, after a prompt")
        chosen, rejected = chosen[-1]["content"], rejected[-1]["content"]
    elif not prompt:
        end = chosen.rfind(mark) + len(mark)
        if end < len(mark):
            raise ValueError("without a column `prompt` it needs turns marked `\\n\\nHuman:` and `\\n\\nAssistant:`")
        prompt, chosen, other, rejected = chosen[:end], chosen[end:], rejected[:end], rejected[end:]
        if prompt != other or any(turn in chosen + rejected for turn in (mark, "\n\nHuman:")):
            return None
        if chat:
            texts = re.split(r"\n\n(Human|Assistant):", "\n\n" + prompt.strip().removesuffix(mark))
            roles = ["system", *({"Human": "user", "Assistant": "assistant"}[name] for name in texts[1::2])]
            turns = [{"role": role, "content": text.strip()} for role, text in zip(roles, texts[::2])]
            prompt = turns if turns[0]["content"] else turns[1:]  # the system's turn: what precedes the first mark
            chosen, rejected = chosen.strip(), rejected.strip()
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def select_pairs(rows: list[dict], chat: bool, flag: str) -> list[dict]:
    """The rows as `split_pair` makes them, without those that hold no preference; says what was dropped, and why."""
    kept, seen = [], set()
    dropped = dict.fromkeys(("equal sides", "sides that differ in more than the last turn", "an empty side"), 0)
    repeated = contradicted = 0
    for i, row in enumerate(rows):
        try:
            pair = split_pair(row, chat)
            equal = pair and pair["chosen"] == pair["rejected"]
            empty = pair and not (pair["chosen"].strip() and pair["rejected"].strip())
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # what a malformed row makes it raise
            raise SystemExit(f"{flag}: the sides of row {i} are no pair: {error!r}; the row is {row}") from error
        for reason, found in zip(dropped, (equal, pair is None, empty and not equal)):
            dropped[reason] += bool(found)
        if pair is None or equal or empty:
            continue
        sides = pair["chosen"], pair["rejected"]
        key, turned = (hash(json.dumps([pair["prompt"], *order])) for order in (sides, sides[::-1]))
        repeated, contradicted = repeated + (key in seen), contradicted + (turned in seen)
        seen.add(key)
        kept.append(pair)
    reasons = ", ".join(f"{count:,} with {reason}" for reason, count in dropped.items() if count)
    require(kept, f"{flag}: no preference remains of {len(rows):,} pairs: {reasons}")
    if reasons:
        print(f"{flag}: dropped of {len(rows):,} pairs: {reasons}")
    if repeated or contradicted:
        print(f"{flag}: {repeated:,} pairs repeat an earlier one and {contradicted:,} contradict one; all are kept")
    return kept


def audit(pairs: list[tuple], flag: str):
    """Prints how the sides differ in length, the commonest thing to learn instead of the preference."""
    lengths = torch.tensor([[len(ids) for ids, _ in pair] for pair in pairs], dtype=torch.float64)
    longer, equal = (lengths[:, 0] > lengths[:, 1]).double().mean(), (lengths[:, 0] == lengths[:, 1]).double().mean()
    means, largest = lengths.mean(0).tolist(), int(lengths.max())
    print(f"{flag}: {len(pairs):,} pairs; the chosen side is longer in {longer:.1%}, as long in {equal:.1%};", end=" ")
    print(f"mean tokens with the prompt {means[0]:.1f} chosen, {means[1]:.1f} rejected, at most {largest:,}")


# ------------------------------------------------------------------------------------------ model and log-probabilities


def in_forward(function: Callable) -> Callable:
    """Makes `function(model, ...)` run as a forward pass of the model, in which FSDP gathers the weights."""

    @functools.wraps(function)
    def wrapped(model, *args, **options):
        if not isinstance(model, FSDPModule):
            return function(model, *args, **options)
        model.run = functools.partial(function, model)
        register_fsdp_forward_method(model, "run")
        return model.run(*args, **options)

    return wrapped


@functools.cache
def compiled(function: Callable, compiles: bool) -> Callable:
    """`function` as it is or, if it `compiles`, through torch.compile: one program for all shapes, made once."""
    return torch.compile(function, dynamic=True) if compiles else function


@in_forward
def token_logprobs(
    model, ids: Tensor, mask: Tensor, temperature: float = 1.0, with_entropy: bool = True, entropy_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """log pi(ids[n, t] | ids[n, :t]) and the entropy (nats) of that distribution where mask is 1, else 0.

    ids, mask: (N, L), right-padded; results: (N, L) float32, differentiable. The logits are divided by `temperature`.
    No attention mask: under a causal model, right padding is never seen. Only positions with mask 1 go through the
    output head, a chunk at a time and recomputed in the backward pass, so the logits of no more than a chunk live.
    Without `with_entropy` the entropy is 0, without `entropy_grad` it has no gradient: both save time. Raises
    ValueError if an action stands at index 0, where nothing precedes it.
    """
    if ids.shape != mask.shape or mask[:, 0].any():
        raise ValueError(f"ids {ids.shape} and mask {mask.shape} must agree, and no action may be the first token")
    n, t = mask.nonzero(as_tuple=True)  # (num_actions,) each; Python waits for the GPU here, so before the decoder
    hidden = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (N, L - 1, D)
    hidden, targets = hidden[n, t - 1], ids[n, t]  # the state before token t decides it
    head, device = model.get_output_embeddings(), ids.device.type
    weight = head.weight
    if head.bias is not None:  # as one more column
        hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
        weight = torch.cat([weight, head.bias[:, None]], 1)
    if torch.is_autocast_enabled(device):  # which does not reach into ChunkedHead's backward pass
        hidden = hidden.to(torch.get_autocast_dtype(device))
    options = (temperature, with_entropy, entropy_grad, getattr(model, "compiles", False))  # set by `shard`
    logprobs, entropy, _ = ChunkedHead.apply(hidden, weight, targets, *options)  # (num_actions,) each
    zeros = torch.zeros(ids.shape, device=ids.device)
    return zeros.index_put((n, t), logprobs), zeros.index_put((n, t), entropy if entropy_grad else entropy.detach())


class ChunkedHead(torch.autograd.Function):
    """The output head: `head_logprobs` of all rows, (3, M), a chunk at a time.

    hidden: (M, D), in the number format to compute in; weight: (V, D), in that of its gradient. Nothing of size M * V
    is kept: the backward pass computes the logits anew.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, with_entropy, entropy_grad, compiles):
        num_logits = 2**24  # in a chunk: 64 MiB in float32
        if hidden.is_cuda:  # more, or the GPU would wait for Python; compiled, they exist in bfloat16 alone
            num_logits = 2**29 if compiles else 2**27
        ctx.chunk = max(1, num_logits // len(weight))  # rows at a time
        of_chunk, matrix = compiled(head_logprobs, compiles), weight.to(hidden.dtype)
        chunks = zip(hidden.split(ctx.chunk), targets.split(ctx.chunk))
        outputs = torch.cat([of_chunk(h, matrix, y, temperature, with_entropy) for h, y in chunks], 1)
        ctx.save_for_backward(hidden, weight, targets, outputs)
        ctx.compiles, ctx.options = compiles, (temperature, with_entropy and entropy_grad)
        return outputs

    @staticmethod
    def backward(ctx, grad_outputs):
        hidden, weight, targets, outputs = ctx.saved_tensors
        matrix, of_chunk = weight.to(hidden.dtype), compiled(head_gradient, ctx.compiles)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            of_rows = (targets[rows], outputs[:, rows], grad_outputs[:, rows])
            grad_logits = of_chunk(hidden[rows], matrix, *of_rows, *ctx.options)
            grad_hidden[rows] = grad_logits @ matrix
            grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight, *[None] * 5


def head_logprobs(hidden, weight, targets, temperature: float, with_entropy: bool) -> Tensor:
    """Log-probabilities of targets (m,), entropies (0 without `with_entropy`) and normalisers, (3, m) in float32."""
    logits = hidden @ weight.T  # (m, V)
    logits = logits if temperature == 1 else logits.float() / temperature  # at 1 no float32 copy
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    chosen, logit = (x.gather(1, targets[:, None])[:, 0] for x in (log_p, logits))
    entropy = -(log_p.exp() * log_p).sum(-1) if with_entropy else torch.zeros_like(chosen)
    return torch.stack([chosen, entropy, logit - chosen])


def head_gradient(hidden, weight, targets, outputs, grad_outputs, temperature: float, entropy_grad: bool) -> Tensor:
    """The gradient by the logits z, (m, V), from what `head_logprobs` returned and the gradient by that, (3, m) each.

    With p = softmax(z / T): T * dlog p[y] / dz = onehot(y) - p, and T * dH / dz = -p * (log p + H).
    """
    _, entropy, normaliser = outputs[..., None]  # (m, 1) each
    grad_chosen, grad_entropy, _ = grad_outputs[..., None] / -temperature  # with the minus of -p

    def of_p(log_p):  # the gradient without onehot(y)
        factor = grad_chosen + grad_entropy * (log_p + entropy) if entropy_grad else grad_chosen
        return log_p.exp_().mul_(factor)

    logits = hidden @ weight.T
    logits = logits if temperature == 1 else logits.float() / temperature
    gradient = of_p(logits - normaliser).to(weight.dtype)  # computed in float32
    of_targets = of_p(logits.gather(1, targets[:, None]) - normaliser) - grad_chosen  # before bfloat16 rounds it away
    return gradient.scatter_(1, targets[:, None], of_targets.to(weight.dtype))


@torch.no_grad()
def sequence_logps(model, items: list[tuple], max_tokens: int) -> Tensor:
    """Summed log-probability of each completion, on the CPU: (N, S). items: N tuples of S sides, (ids, mask) each."""
    rows = [side for item in items for side in item]
    logps, done, clock = torch.full((len(rows),), -math.inf), 0, time.perf_counter()
    for indices, ids, mask in micro_batches(rows, max_tokens, model.device):
        with autocast(model.device):
            logps[indices] = token_logprobs(model, ids, mask, with_entropy=False)[0].sum(1).cpu()
        done += len(indices)
        if time.perf_counter() - clock > 10:
            clock = time.perf_counter()
            print(f"scored {done:,} of {len(rows):,} completions, the longest first", flush=True)
    return over_ranks(logps, dist.ReduceOp.MAX).view(len(items), -1)


def resolve_beta(args: Args, model) -> float:
    """`beta`, or what suits the size of the model: the tiny one, nearly certain of each token, needs a larger one."""
    return args.beta or (0.5 if model.num_parameters() < 10_000_000 else 0.1)


def load_reference(args: Args, tokenizer, device: torch.device):
    """The frozen model that the implicit reward is relative to. Ends the run if it reads other ids than the policy."""
    name, flag = (args.reference, "--reference") if args.reference else (args.model, "--model")
    if args.reference:
        other = from_hub(transformers.AutoTokenizer, name, flag)
        require(other.get_vocab() == tokenizer.get_vocab(), f"{flag} {name} has another tokenizer than --model")
        load_config(name, flag, args.max_length)  # ends the run if they do not fit
    return shard(load_model(name, device, flag=flag).requires_grad_(False), device)


def score_completions(args: Args) -> dict[str, float]:
    """--score-only: writes `out`/implicit_rewards.jsonl, beta * log(pi / pi_ref) of each completion; returns its means.

    Rows are pairs, or prompt + completion; `row` is each one's number in the data, from 0. Only completions of one
    prompt compare: beta * log Z(prompt) is unknown.
    """
    path, device = Path(args.out) / "implicit_rewards.jsonl", pick_device()
    require(not path.parent.is_file(), f"--out {args.out} is a file: name a folder")
    require(args.overwrite or not path.exists(), f"--out: {path} exists: replace it with --overwrite")
    rows = read_dataset(args.dataset, "test", "--dataset", ["chosen+rejected", "prompt+completion"])
    rows = [{**row, "row": i} for i, row in enumerate(rows)]  # from 0; some may be dropped below
    tokenizer, eos_ids = load_tokenizer(args.model, args.max_length)
    is_pair = {"chosen", "rejected"} <= set(rows[0])
    names, encoder = (["chosen", "rejected"], encode_pair) if is_pair else (["completion"], encode_row)
    encode = functools.partial(encoder, tokenizer, system_prompt=args.system_prompt, eos_ids=eos_ids)
    if is_pair:
        rows = select_pairs(rows, bool(tokenizer.chat_template), "--dataset")
    rows, items = encode_rows(encode, rows, args.max_length, "--max-length")
    items = items if is_pair else [(item,) for item in items]
    reference = sequence_logps(load_reference(args, tokenizer, device), items, args.micro_batch_tokens)
    policy = shard(load_model(args.model, device), device)
    logps = sequence_logps(policy, items, args.micro_batch_tokens)
    trained = Path(args.model) / "args.json"  # of the run that made it
    trained = json.loads(trained.read_text()).get("resolved", {}) if trained.exists() else {}
    beta = args.beta or trained.get("beta") or resolve_beta(args, policy)
    rewards = beta * (logps - reference)  # (N, 2), or (N, 1) of single completions
    scores = [{f"{name}_reward": value for name, value in zip(names, values)} for values in rewards.tolist()]
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({**row, **score}, default=str) + "\n" for row, score in zip(rows, scores))
        write_beside(path, "".join(lines))
    metrics = {f"{name}_reward": value for name, value in zip(names, rewards.mean(0).tolist())}
    if is_pair:
        gap = rewards[:, 0] - rewards[:, 1]
        metrics |= {"pair_accuracy": ((gap > 0).float() + 0.5 * (gap == 0)).mean().item(), "margin": gap.mean().item()}
    means = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    print(f"wrote {path}: {len(rows):,} rows, beta {beta:g}; {means}")
    return metrics


# ---------------------------------------------------------------------------------------- sampling, only for evaluation


def extract_answer(text: str) -> str | None:
    """The last `#### answer` line or `\\boxed{answer}`, whichever comes later, normalised; None if there is none."""
    line, box = text.rfind("####"), text.rfind("\\boxed{")
    if line > box:
        return normalise(text[line:].lstrip("#").split("\n")[0])
    if box < 0:
        return None
    start = end = box + len("\\boxed{")
    depth = 1
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return normalise(text[start : end - 1]) if depth == 0 else None


def normalise(answer: str) -> str | None:
    """Drops spaces around it, `$`, thousands' commas, a closing full stop and a closing .0; None if nothing remains."""
    answer = re.sub(r"\\?\$|(?<=\d),(?=\d{3}(?!\d))", "", answer).strip().removesuffix(".").strip()
    return re.sub(r"(?<=\d)\.0+$", "", answer) or None


def exact_match(completion: str, answer: str) -> float:
    """1.0 if the completion's extracted answer equals `answer` (bare, or a full solution that closes with it)."""
    answer = str(answer)
    expected = extract_answer(answer) or normalise(answer)
    return float(expected is not None and extract_answer(completion) == expected)


class Decoder:
    """The rows that are being sampled: their KV cache, the columns each row sees, the position of its last token."""

    def __init__(self, model, cache, attention_mask: Tensor, position: Tensor):
        self.model, self.cache, self.attention_mask, self.position = model, cache, attention_mask, position

    def keep(self, rows: Tensor):
        """Goes on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.attention_mask, self.position = self.attention_mask[rows], self.position[rows]

    def step(self, token: Tensor) -> Tensor:
        """Reads the next token of each row, (rows, 1), and returns the logits of the one after it, (rows, 1, V)."""
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(token), 1)], 1)
        self.position = self.position + 1
        return self.forward(token)

    def forward(self, token: Tensor) -> Tensor:
        options = {"attention_mask": self.attention_mask, "position_ids": self.position, "past_key_values": self.cache}
        return self.model(input_ids=token, use_cache=True, **options).logits


class GraphDecoder(Decoder):
    """A Decoder whose step is a CUDA graph, recorded once and then replayed without Python between.

    A graph works on the same addresses each time. So the cache has room for columns to come, and a mask tells those in
    use. When the room is full, or rows leave, a new cache is made and a new graph recorded. The result of `step` is
    overwritten by the next one. The mask is what is added to the scores here: 0 is seen, -inf is not.
    """

    def __init__(self, model, cache, attention_mask: Tensor, position: Tensor, max_new_tokens: int):
        self.used = attention_mask.shape[1]  # columns filled so far; the cache counts them too, on the device
        self.end = self.used + max_new_tokens
        mask = torch.zeros_like(attention_mask, dtype=model.dtype).masked_fill(attention_mask == 0, -math.inf)
        super().__init__(model, cache, mask[:, None, None], position)  # (rows, 1, 1, columns)
        self.keep(slice(None))  # all rows, now in a cache with room

    def keep(self, rows: Tensor | slice):
        """Goes on with these rows, in a new cache: room for twice what is used, or for all if that is little more."""
        room = max(2 * self.used, 256)
        room = self.end if self.end < 1.25 * room else room
        room += -room % 64  # aligned, as fast kernels want it
        cache = transformers.StaticCache(self.model.config, max_cache_len=room)
        for k, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows, :, : self.used], layer.values[rows, :, : self.used], k)
            layer.keys = layer.values = None  # freed
        self.cache, self.position = cache, self.position[rows]
        mask = self.attention_mask[rows, ..., : self.used]
        self.attention_mask = torch.nn.functional.pad(mask, (0, room - self.used), value=-math.inf)
        self.token, self.graph = torch.zeros_like(self.position), None

    def step(self, token: Tensor) -> Tensor:
        if self.used == self.attention_mask.shape[-1]:
            self.keep(slice(None))  # all rows, in a larger cache
        self.token.copy_(token)
        self.attention_mask[..., self.used] = 0
        self.position += 1
        self.used += 1
        if self.graph is not None:
            self.graph.replay()
            return self.logits
        with end_on_error("this model cannot decode with a recorded step, so give --no-cuda-graphs"):
            logits = self.forward(self.token)  # warms up what is recorded next
            self.record()
        return logits

    def record(self):
        """Records a step, on CUDA; on the CPU (in tests) each step simply runs."""
        if self.token.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.forward(self.token)  # recorded, not run


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the draw: (rows, 1), from (rows, V) and (rows, 1).

    A large vocabulary goes in two stages, blocks of tokens and then those of one block, so that it is read but once. Of
    NaN probabilities any token is drawn: its log-probability, NaN too, shows it.
    """
    last, dtype = probs.shape[1] - 1, uniforms.dtype
    below_1 = 1 - torch.finfo(dtype).eps  # keeps a draw below the sum, so that some cumulative probability exceeds it
    if last < 1024:
        cdf = probs.cumsum(-1, dtype=dtype)
        return torch.searchsorted(cdf, uniforms.clamp(max=below_1) * cdf[:, -1:], right=True).clamp(max=last)
    if probs.shape[1] % 64:  # blocks need a common size
        probs = torch.nn.functional.pad(probs, (0, -probs.shape[1] % 64))
    size = next(x for x in (512, 256, 128, 64) if probs.shape[1] % x == 0)
    blocks = probs.unflatten(1, (-1, size))  # (rows, V / size, size)
    cdf = torch.nn.functional.pad(blocks.sum(-1).cumsum(-1, dtype=dtype), (1, 0))
    draw = uniforms.clamp(max=below_1) * cdf[:, -1:]
    block = (torch.searchsorted(cdf, draw, right=True) - 1).clamp(max=blocks.shape[1] - 1)  # (rows, 1); beyond if NaN
    draw = draw - cdf.gather(1, block)  # what is left of it for the block
    chosen = blocks.gather(1, block[..., None].expand(-1, -1, size))[:, 0]  # (rows, size)
    cdf = chosen.cumsum(-1, dtype=dtype)
    token = torch.searchsorted(cdf, torch.minimum(draw, below_1 * cdf[:, -1:]), right=True)
    return (block * size + token).clamp(max=last)


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The next token of each row, (rows, 1), and its log-probability, (rows,), from logits, (rows, V)."""
    scaled = logits if temperature in (0, 1) else logits.float() / temperature
    logprobs = scaled.log_softmax(-1, dtype=torch.float32)
    token = inverse_cdf(logprobs.exp(), uniforms) if temperature else logprobs.argmax(-1, keepdim=True)
    return token, logprobs.gather(1, token)[:, 0]


@torch.no_grad()
def generate(
    model, prompts, num_samples: int, max_new_tokens: int, temperature: float, eos_ids, uniforms, graphs: bool = False
) -> tuple[list[list[int]], list[list[float]]]:
    """Samples `num_samples` completions of each prompt: ids and their log-probabilities, prompt-major, B*G of each.

    prompts: B lists of ids. uniforms: (B*G, max_new_tokens) in [0, 1): row i draws token t from uniforms[i, t] by
    inverse CDF of softmax(logits / temperature): but for rounding, neither its neighbours nor chunking matter.
    Temperature 0 is greedy, with log-probabilities at temperature 1. A completion ends with the first of `eos_ids`,
    which it keeps, or at `max_new_tokens`. Nothing of the model's generation config applies. graphs: see GraphDecoder.

        prefill, once per prompt     decode, one row per sample; finished rows leave (graphs: late, and by halves)
        [pad pad p0 p1] | .          left padding here alone: every row's next token has the same column
        [p0  p1  p2 p3] | .
    """
    was_training, device, num_rows = model.training, model.device, len(prompts) * num_samples
    model.eval()  # training mode may checkpoint gradients, and that drops the cache
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # (B, P)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    position = (seen.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=seen, position_ids=position, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(num_samples)
    logits, seen, position = (x.repeat_interleave(num_samples, 0) for x in (output.logits, seen, position[:, -1:]))
    # a recorded step needs full attention by SDPA: a window, or a bias cut to size, needs Python
    full = all(type(layer) is transformers.cache_utils.DynamicLayer for layer in cache.layers)
    graphs = graphs and full and model.config._attn_implementation == "sdpa"
    state = (model, cache, seen, position)
    decoder = GraphDecoder(*state, max_new_tokens) if graphs else Decoder(*state)
    batch = torch.arange(num_rows, device=device)  # the rows in it; with graphs, ended ones stay for a while
    ended = torch.zeros_like(batch, dtype=torch.bool)
    tokens = torch.full((num_rows, max_new_tokens), -1, device=device)
    logprobs = torch.zeros(num_rows, max_new_tokens, device=device)
    uniforms = uniforms.to(device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64
    stops = torch.tensor(eos_ids, dtype=torch.long, device=device)
    draw = compiled(draw_tokens, getattr(model, "compiles", False))  # set by `sampling_copy`
    for t in range(max_new_tokens):
        token, logprobs[batch, t] = draw(logits[:, -1], uniforms[batch, t, None], temperature)  # (rows, 1), (rows,)
        tokens[batch, t] = token[:, 0].masked_fill(ended, -1)
        ended = ended | torch.isin(token[:, 0], stops)
        if t + 1 == max_new_tokens:
            break
        if not graphs or t % 16 == 15:  # seldom with graphs: Python must wait for the GPU to know what is left
            left = (~ended).nonzero()[:, 0]
            if not len(left):
                break
            # ended rows leave at once; a graph is recorded anew for each size, so there only once half of over 32 ended
            if (len(batch) > 32 and len(left) <= len(batch) // 2) if graphs else len(left) < len(batch):
                decoder.keep(left)
                batch, token, ended = batch[left], token[left], ended[left]
        logits = decoder.step(token)
    model.train(was_training)
    lengths, tokens, logprobs = (tokens >= 0).sum(1).tolist(), tokens.tolist(), logprobs.tolist()
    return [x[:k] for x, k in zip(tokens, lengths)], [x[:k] for x, k in zip(logprobs, lengths)]


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that tensors could still take; without bound elsewhere."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@torch.no_grad()
def cache_rows(sampler, length: int, share: float) -> float:
    """How many sequences of `length` tokens have a KV cache that fits into this share of the free memory."""
    free = free_memory(sampler.device)
    if free == math.inf:  # no bound; and on the CPU the sampler is the model in training mode, which may keep no cache
        return free
    token = torch.zeros(1, 1, dtype=torch.long, device=sampler.device)
    cache = sampler(input_ids=token, use_cache=True).past_key_values
    size = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers if x.keys is not None)  # bytes per token
    return share * free / (size * length)


def rollout(sampler, prompts, num_samples, temperature, eos_ids, uniforms, args) -> tuple[list, list]:
    """`generate`, shared among the ranks, as many prompts at a time as `args` and the memory have room for."""
    found, length = [], uniforms.shape[1]  # of each chunk: completions and their log-probabilities
    rows = cache_rows(sampler, max(map(len, prompts)) + length, args.cache_memory)
    chunk = max(1, int(min(args.rollout_batch_size, rows)) // num_samples)  # prompts at a time
    graphs = args.cuda_graphs and sampler.device.type == "cuda"
    first, end = (len(prompts) * rank // WORLD_SIZE for rank in (RANK, RANK + 1))
    for start in range(first, end, chunk):
        stop = min(start + chunk, end)
        draws = uniforms[start * num_samples : stop * num_samples]
        found.append(generate(sampler, prompts[start:stop], num_samples, length, temperature, eos_ids, draws, graphs))
    shares = [found]  # of all ranks
    if WORLD_SIZE > 1:
        shares = [None] * WORLD_SIZE
        dist.all_gather_object(shares, found)
    completions, logprobs = zip(*itertools.chain(*shares))  # of all chunks, in the order of the prompts
    return list(itertools.chain(*completions)), list(itertools.chain(*logprobs))


def decode(tokenizer, completions: list[list[int]], eos_ids: list[int]) -> list[str]:
    """The texts of completions without what ended them: not every stop token is a special one, which decoding skips."""
    return tokenizer.batch_decode([x[:-1] if x[-1] in eos_ids else x for x in completions], skip_special_tokens=True)


def evaluate(sampler, tokenizer, rows, prompts, reward_of, args, eos_ids) -> dict[str, float]:
    """Accuracy (where rows have an `answer`) and mean reward on held-out prompts, sampled at temperature 1 and greedy.

    Sampling always takes the same draws. prompts: their ids. reward_of: `compute_rewards` for prompts, completions
    and rows, or None. answered_*: the share of completions that hold a readable answer, right or wrong.
    """
    metrics, answers = {}, [row.get("answer") for row in rows]
    uniforms = draw_uniforms(0, "evaluation", 0, len(prompts), args.max_new_tokens)
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        completions, _ = rollout(sampler, prompts, 1, temperature, eos_ids, uniforms, args)
        texts = decode(tokenizer, completions, eos_ids)
        if None not in answers:
            metrics[f"eval/accuracy_{name}"] = sum(map(exact_match, texts, answers)) / len(rows)
            metrics[f"eval/answered_{name}"] = sum(extract_answer(text) is not None for text in texts) / len(rows)
        if reward_of is not None:
            metrics[f"eval/reward_{name}"] = reward_of([prompt_of(row) for row in rows], texts, rows)[0].mean().item()
    return metrics


def evaluate_dpo(model, sampler, tokenizer, rows, pairs, references, beta, args, eos_ids) -> dict[str, float]:
    """The metrics of a step on held-out pairs and, where all rows have an `answer`, accuracy. references: (N, 2)."""
    logps = sequence_logps(model, pairs, args.micro_batch_tokens)
    losses, chosen, rejected = dpo_loss(*logps.unbind(1), *references.unbind(1), beta)
    means = Means()
    means.add(loss=losses, **preference_metrics(logps.T, chosen, rejected))
    metrics = {f"eval/{name}": value for name, value in means.result().items()}
    if all(row.get("answer") is not None for row in rows):
        prompts = [ids[: mask.index(1)] for (ids, mask), _ in pairs]
        refresh(sampler, model)
        metrics |= evaluate(sampler, tokenizer, rows, prompts, None, args, eos_ids)
    return metrics


def preference_metrics(logps: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """What the header lists, per pair, (N,) each. logps: (2, N), chosen and rejected."""
    gap = chosen_rewards - rejected_rewards
    return {
        "pair_accuracy": (gap > 0).float() + 0.5 * (gap == 0), "margin": gap, "chosen_reward": chosen_rewards,
        "rejected_reward": rejected_rewards, "chosen_logps": logps[0], "rejected_logps": logps[1],
    }  # fmt: skip


def sample_rows(sampler, tokenizer, rows, data, args, eos_ids, step: int) -> list[dict]:
    """One sampled completion of each row's first prompt, to read; reward: 1.0 if it is right, None without answer."""
    uniforms = draw_uniforms(args.seed, "samples", step, len(rows), args.max_new_tokens)
    prompts = [ids[: mask.index(1)] for ids, mask in data]
    completions, _ = rollout(sampler, prompts, 1, 1.0, eos_ids, uniforms, args)
    samples = []
    for row, prompt, text in zip(rows, prompts, decode(tokenizer, completions, eos_ids)):
        reward = exact_match(text, row["answer"]) if row.get("answer") is not None else None
        samples.append({"prompt": tokenizer.decode(prompt), "completion": text, "reward": reward})
    return samples


# ---------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Trains, and returns the last row of metrics.jsonl beside the first evaluation (before/...)."""
    if args.score_only:
        return score_completions(args)
    run, device = Run(args), pick_device()
    train_rows, eval_rows = load_data(args, ["chosen+rejected"])
    tokenizer, eos_ids = load_tokenizer(args.model, args.max_length + args.max_new_tokens)
    encode = functools.partial(encode_pair, tokenizer, system_prompt=args.system_prompt, eos_ids=eos_ids)
    train_rows = select_pairs(train_rows, bool(tokenizer.chat_template), "--dataset")
    eval_rows = select_pairs(eval_rows, bool(tokenizer.chat_template), "--eval-dataset")
    train_rows, train_pairs = encode_rows(encode, train_rows, args.max_length, "--max-length")
    eval_rows, eval_pairs = encode_rows(encode, eval_rows, args.max_length, "--max-length")
    audit(train_pairs, "--dataset")
    audit(eval_pairs, "--eval-dataset")
    require(len(train_pairs) >= args.batch_size, f"--batch-size: there are only {len(train_pairs)} pairs")
    steps = args.steps or math.ceil(args.epochs * len(train_pairs) / args.batch_size)
    if run.finished(steps):
        return run.summary()

    if run.checkpoint is None:
        reference = load_reference(args, tokenizer, device)
        parts = [sequence_logps(reference, pairs, args.micro_batch_tokens) for pairs in (train_pairs, eval_pairs)]
        references = torch.cat(parts)  # (train + eval pairs, 2): chosen, rejected
        del reference
        gc.collect()  # sharded modules refer to themselves
    model = load_model(run.checkpoint or args.model, device, args.gradient_checkpointing)
    sampler, model = sampling_copy(model, device, args), shard(model, device, args)
    peak_lr, beta = args.lr or (5e-5 if model.num_parameters() < 10_000_000 else 1e-6), resolve_beta(args, model)
    optimizer = torch.optim.AdamW(model.parameters(), peak_lr, (0.9, args.adam_beta2), weight_decay=0.0, fused=True)
    print(f"{model.num_parameters():,} parameters on {device}, {len(train_pairs):,} pairs", end=", ")
    print(f"beta {beta:g}, peak lr {peak_lr:g}")
    run.start({"optimizer": optimizer}, peak_lr=peak_lr, beta=beta, steps=steps)
    if run.checkpoint:
        references = run.state["references"].clone()  # the file may go before the run ends
        same = len(references) == len(train_pairs) + len(eval_pairs)
        require(same, "--resume: --dataset or --eval-dataset no longer holds the pairs that the run began with")
    eval_references = references[len(train_pairs) :]
    evaluation = (model, sampler, tokenizer, eval_rows, eval_pairs, eval_references, beta, args, eos_ids)
    if run.step == 0:
        run.log(0, steps, evaluate_dpo(*evaluation))

    for step in range(run.step + 1, steps + 1):
        # (1) batch
        clock = time.perf_counter()
        rows = shuffled_indices(len(train_pairs), args.seed, "pairs", step, args.batch_size)
        batch, means = [train_pairs[i] for i in rows], Means()

        # (2) loss: both sides of a pair in one micro-batch, since its loss is one of their difference
        for indices, ids, mask in pair_batches(batch, args.micro_batch_tokens, device):
            with autocast(device):
                logprobs, _ = token_logprobs(model, ids, mask, with_entropy=False)  # (2n, L); 0 where mask is 0
            logps = logprobs.sum(1).view(2, -1)  # (2, n)
            ref = references[rows][indices].T.to(device)  # (2, n)
            losses, chosen, rejected = dpo_loss(*logps, *ref, beta, args.label_smoothing)  # (n,) each; two rewards
            run.backward(losses.sum() / args.batch_size)
            means.add(**preference_metrics(logps, chosen, rejected))
            if not run.shown:
                run.show_first_batch(tokenizer, ids, mask)

        # (3) update
        lr = learning_rate(args, step, steps, peak_lr)
        metrics = {**run.update(optimizer=lr), **means.result(), "lr": lr}
        seconds = time.perf_counter() - clock
        num_tokens = sum(len(ids) for pair in batch for ids, _ in pair)
        metrics |= {"time/step_s": seconds, "time/tokens_per_s": num_tokens / seconds}
        if step == steps or step % args.eval_every == 0:
            metrics |= evaluate_dpo(*evaluation)
        samples = []
        if step % args.sample_every == 0:
            chosen_sides = [pair[0] for pair in eval_pairs[:4]]  # of which only the prompt is read
            refresh(sampler, model)
            samples = sample_rows(sampler, tokenizer, eval_rows[:4], chosen_sides, args, eos_ids, step)
        run.log(step, steps, metrics, samples, "loss pair_accuracy margin chosen_logps grad_norm lr")
        if step == steps or run.signal or step % args.save_every == 0:
            run.save(step, model, tokenizer, references=references)
    return run.finish(steps, model, tokenizer)


# ------------------------------------------------------------------------------------------------------------ plumbing
# The same in every script: read it once.

# torchrun starts a process, a rank, for each GPU; without it there is one
RANK = int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def require(ok: bool, message: str):
    """Ends the run with `message` unless `ok`."""
    if not ok:
        raise SystemExit(message)


@contextmanager
def end_on_error(message: str):
    """Ends the run with `message` and the error, whatever the code inside raises: libraries raise anything."""
    try:
        yield
    except Exception as error:
        raise SystemExit(f"{message}: {type(error).__name__}: {error}") from error


def check_numbers(args: "Args"):
    """Ends the run unless counts are at least 1, other numbers at least 0, and those that divide or scale above 0."""
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            count = field.type in (int, int | None) and field.name not in ("seed", "warmup_steps")
            require(math.isfinite(value) and value >= count, f"{flag} {value}: must be at least {int(count)}")
    for name in ("lr", "value_lr", "beta", "temperature", "clip_eps", "max_grad_norm", "target_kl", "kl_stop"):
        require(getattr(args, name, None) != 0, f"--{name.replace('_', '-')} must be above 0")
    require(args.adam_beta2 < 1, f"--adam-beta2 {args.adam_beta2}: must be below 1")
    require(0 < getattr(args, "cache_memory", 1) <= 1, "--cache-memory must be above 0 and at most 1")
    for name in ("batch_size", "prompts_per_step"):
        enough = getattr(args, name, WORLD_SIZE) >= WORLD_SIZE
        require(enough, f"--{name.replace('_', '-')}: must be at least {WORLD_SIZE}, a row for each process")


def pick_device() -> torch.device:
    """CUDA, else MPS, else CPU. Under torchrun each rank takes its own GPU, and all but the first fall silent."""
    has_mps = torch.backends.mps.is_available() and WORLD_SIZE == 1
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if WORLD_SIZE > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=datetime.timedelta(hours=4))  # the first may call a slow reward
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def over_ranks(x: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
    """The sum of x over all ranks, or with MAX the largest: of rows that are -inf on all ranks but one, that one's."""
    if WORLD_SIZE > 1:
        x = x.clone()
        dist.all_reduce(x, operation)
    return x


def autocast(device: torch.device):
    """bfloat16 on CUDA, over float32 weights; float32 elsewhere. No cached copy: it would sum gradients in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def seeded(seed: int, purpose: str, step: int) -> torch.Generator:
    """A generator that depends on the arguments alone, so that there is no generator state to save."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose} {step}".encode()))


def draw_uniforms(seed: int, purpose: str, step: int, num_rows: int, length: int) -> Tensor:
    """(num_rows, length) float64 in [0, 1)."""
    return torch.rand(num_rows, length, generator=seeded(seed, purpose, step), dtype=torch.float64)


def shuffled_indices(num_rows: int, seed: int, purpose: str, step: int, count: int) -> list[int]:
    """The `count` rows of step 1, 2, ...: slices of an endless stream of epochs, each shuffled anew."""
    epoch, first = divmod((step - 1) * count, num_rows)
    epochs = (torch.randperm(num_rows, generator=seeded(seed, purpose, k)).tolist() for k in itertools.count(epoch))
    return list(itertools.islice(itertools.chain.from_iterable(epochs), first, first + count))


def micro_batch_rows(widths: list[int], max_tokens: int) -> list[list[int]]:
    """The row numbers of this rank's micro-batches, widest rows first: width * rows is at most `max_tokens`.

    Their number is the same on every rank: all must run together, or FSDP's gathering of weights would wait for ever.
    """
    order, batches = sorted(range(len(widths)), key=lambda i: -widths[i]), []
    if 0 < len(order) < WORLD_SIZE:
        few = f"{len(order)} rows for {WORLD_SIZE} processes: raise --batch-size, --prompts-per-step or --eval-size"
        require(not torch.is_grad_enabled(), few)
        order = (order * WORLD_SIZE)[:WORLD_SIZE]  # without a gradient nothing adds up: rows may come twice
    start = 0
    while start < len(order):
        count = max(1, max_tokens // widths[order[start]])
        batches.append(order[start : start + count])
        start += count
    wanted = min(math.ceil(len(batches) / WORLD_SIZE), len(order) // WORLD_SIZE) * WORLD_SIZE
    if len(batches) > wanted:  # single rows that do not divide among the ranks: some come in pairs, above `max_tokens`
        batches = [order[k::wanted] for k in range(wanted)]
    while len(batches) < wanted:  # halve the largest
        k = max(range(len(batches)), key=lambda k: len(batches[k]))
        half = len(batches[k]) // 2
        batches[k : k + 1] = [batches[k][:half], batches[k][half:]]
    return batches[RANK::WORLD_SIZE]


def micro_batches(rows: list[tuple], max_tokens: int, device: torch.device, pad_id: int = 0) -> Iterator[tuple]:
    """This rank's rows of (ids, mask, ...), right-padded: indices (n), ids (n, L), mask (n, L), ..."""
    for batch in micro_batch_rows([len(row[0]) for row in rows], max_tokens):
        width = len(rows[batch[0]][0])
        ids, *others = zip(*(rows[i] for i in batch))
        columns = [np.array([row + [pad_id] * (width - len(row)) for row in ids])]  # padding is causally never seen
        for column in others:
            columns.append(np.array([row + [0] * (width - len(row)) for row in column], dtype=np.float32))
        yield batch, *(torch.tensor(column, device=device) for column in columns)


def pair_batches(pairs: list[tuple], max_tokens: int, device: torch.device) -> Iterator[tuple]:
    """This rank's pairs of (ids, mask), right-padded: indices (n), ids and mask (2n, L), the n chosen sides first."""
    widths = [max(len(ids) for ids, _ in pair) for pair in pairs]
    for batch in micro_batch_rows([2 * width for width in widths], max_tokens):
        width = widths[batch[0]]
        sides = [pairs[i][side] for side in (0, 1) for i in batch]
        ids, mask = ([row + [0] * (width - len(row)) for row in column] for column in zip(*sides))
        yield batch, torch.tensor(ids, device=device), torch.tensor(mask, dtype=torch.float32, device=device)


def learning_rate(args: "Args", step: int, steps: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup_steps`, then the decay of `lr_schedule`, at step 1, 2, ... `steps`."""
    if step < args.warmup_steps:
        return peak * step / args.warmup_steps
    left = (steps + 1 - step) / (steps + 1 - args.warmup_steps)  # 1 at the end of the warm-up, 0 after the last step
    return peak * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[args.lr_schedule]


@functools.cache
def hub_is_out_of_reach() -> bool:
    """Asked once, because the Hub's own client goes on trying for half a minute."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
    except OSError as error:
        return not isinstance(error, urllib.error.HTTPError)  # which would be an answer
    return False


def from_hub(loader, name: str, flag: str, **options):
    """loader.from_pretrained of a local folder or Hub id. Ends the run, naming the flag, if that fails."""
    local, is_path = Path(name).is_dir(), name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1
    hint = f"; `python {name[5:]}.py` makes it" if name in ("runs/sft", "runs/rm") else ""
    require(local or not is_path, f"{flag} {name}: there is no such folder{hint}")
    with end_on_error(f"{flag} {name} cannot be loaded"):
        return loader.from_pretrained(name, local_files_only=local or hub_is_out_of_reach(), **options)


def load_tokenizer(name: str, num_tokens: int):
    """The tokenizer and the ids that end a completion: its EOS, the generation config's, the template's end of turn."""
    tokenizer = from_hub(transformers.AutoTokenizer, name, "--model")
    require(tokenizer.eos_token_id is not None, f"--model {name}: its tokenizer has no eos_token, so nothing could end")
    config = load_config(name, "--model", num_tokens)
    stops, offline = config.get_text_config().eos_token_id, Path(name).is_dir() or hub_is_out_of_reach()
    with suppress(OSError):  # there may be no generation config
        stops = transformers.GenerationConfig.from_pretrained(name, local_files_only=offline).eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "@answer@"}]
    tail = render(tokenizer, turns).rpartition("@answer@")[2]  # empty without a template
    eos_ids |= set(tokenizer.encode(tail, add_special_tokens=False)[:1]) & set(tokenizer.added_tokens_decoder)
    return tokenizer, sorted(eos_ids)


def load_config(name: str, flag: str, num_tokens: int = 0):
    """The configuration of a model that holds `num_tokens`, without dropout: sampling and training see one model."""
    config = from_hub(transformers.AutoConfig, name, flag)
    window = getattr(config.get_text_config(), "max_position_embeddings", num_tokens)
    require(num_tokens <= window, f"{flag} {name} holds {window} tokens, not {num_tokens}: lower the --max-... flags")
    for part in (config, config.get_text_config()):
        part.update({key: 0.0 for key in part.to_dict() if key.endswith(("dropout", "pdrop"))})
    return config


def load_weights(loader, name: str, flag: str, config, new: tuple[str, ...] = ()):
    """A model in float32, whatever its folder holds. Ends the run if weights are missing there, but for those `new`."""
    model, info = from_hub(loader, name, flag, config=config, dtype=torch.float32, output_loading_info=True)
    missing = sorted(set(info["missing_keys"]) - set(new))
    require(not missing, f"{flag} {name} lacks weights, so they would be random: {missing[:5]}")
    return model


def load_model(name: str, device: torch.device, gradient_checkpointing: bool = False, flag: str = "--model"):
    """A causal language model, ready to train."""
    config = load_config(name, flag)
    require("ForSequenceClassification" not in str(config.architectures), f"{flag} {name} is a reward model")
    model = load_weights(transformers.AutoModelForCausalLM, name, flag, config)
    return prepare_model(model, device, gradient_checkpointing)


def to_device(model, device: torch.device, gradient_checkpointing: bool):
    """The model on `device`, in training mode; where `shard` will follow, still on the CPU, as it may not fit."""
    model = model.to(device if WORLD_SIZE == 1 else "cpu").train()
    for parameter in model.parameters():  # fresh, aligned memory: a resumed run then adds up the same bits
        parameter.data = parameter.data.clone()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def prepare_model(model, device: torch.device, gradient_checkpointing: bool):
    """The model on `device`, ready to train. Ends the run if its logits are not those that token_logprobs computes."""
    model = to_device(model, device, gradient_checkpointing)
    ids = torch.arange(8, device=model.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        logprobs, _ = token_logprobs(model, ids, (ids > 0).float())
    same = (expected.gather(1, ids[0, 1:, None])[:, 0] - logprobs[0, 1:]).abs().max() < 1e-3
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # shows on large logits only
    require(same and not capped, "--model: its logits are more than lm_head(hidden), all that token_logprobs knows")
    return model


def sampling_copy(model, device: torch.device, args: "Args | None" = None):
    """What rollouts run on: an unsharded copy, in bfloat16 on CUDA; the model itself where that will do.

    With --compile its norms and MLPs are compiled; not its attention, whose cache is another in each layer.
    """
    if device.type != "cuda" and WORLD_SIZE == 1 and not (args and args.compile):
        return model
    sampler = copy.deepcopy(model).requires_grad_(False).eval()
    sampler.compiles = bool(args and args.compile)  # read by `generate`
    for module in sampler.modules() if sampler.compiles else ():
        if type(module).__name__.endswith(("RMSNorm", "MLP")):
            module.compile(dynamic=True)
    for parameter in sampler.parameters():  # and no buffers: rotary frequencies need float32
        parameter.data = parameter.data.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return sampler.to(device)


def whole(x: Tensor) -> Tensor:
    """A sharded tensor in full, on every rank; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def refresh(sampler, model):
    """Gives a sampling copy the model's present weights."""
    if sampler is not model:
        for ours, theirs in zip(sampler.parameters(), model.parameters()):
            ours.copy_(whole(theirs))


def shard(model, device: torch.device, args: "Args | None" = None):
    """The model with its layers compiled, if `args` say so, and a share of each weight on every rank (FSDP2)."""
    layers = [x for x in model.modules() if type(x).__name__ in (model._no_split_modules or ())]
    model.compiles = bool(args and args.compile)  # read by token_logprobs, where there is one
    for layer in layers if model.compiles else ():
        layer.compile(dynamic=True)
    if WORLD_SIZE > 1:
        mesh = dist.init_device_mesh(device.type, (WORLD_SIZE,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)  # so that its weights are always the sharded ones
    return model


def gathered(state: dict) -> dict:
    """A state dict with whole tensors for its sharded ones, tied ones still tied; they reach the first rank alone."""
    found = {}
    for x in state.values():
        if isinstance(x, DTensor) and id(x) not in found:
            full = whole(x.detach())  # in which all ranks take part
            found[id(x)] = full.cpu() if RANK == 0 else None
    return {name: found.get(id(x), x) for name, x in state.items()}


def share_of(x: Tensor, parameter: Tensor) -> Tensor:
    """Of an optimizer's state of a parameter, which every rank has read whole, this rank's share."""
    if not isinstance(parameter, DTensor) or x.shape != parameter.shape:
        return x
    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)


def read_dataset(name: str, split: str, flag: str, wanted: list[str]) -> list[dict]:
    """Rows of `arithmetic`, a local file or a Hub dataset, if they have one of the `wanted` sets of columns."""
    if name == "arithmetic":
        return arithmetic_rows(split, ARITHMETIC_ROWS[split])
    formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    file_format = formats.get(Path(name.removesuffix(".gz")).suffix)
    require(not file_format or Path(name).is_file(), f"{flag} {name}: there is no such file")
    with end_on_error(f"{flag} {name} cannot be read"):
        if not file_format:
            hub_name, config, chosen = (*name.split(":", 2), "", "")[:3]
            datasets.config.HF_HUB_OFFLINE |= hub_is_out_of_reach()
            rows = list(datasets.load_dataset(hub_name, config or None, split=chosen or split))
        else:
            empty = Path(name).stat().st_size == 0
            rows = [] if empty else list(datasets.load_dataset(file_format, data_files=name, split="train"))
    require(len(rows) > 0, f"{flag} {name} holds no rows")
    found = [columns.split("+") for columns in wanted if set(columns.split("+")) <= set(rows[0])]
    require(found, f"{flag} {name} has the columns {', '.join(rows[0])}; this script needs {' or '.join(wanted)}")
    for i, row in enumerate(rows):
        require(all(row[column] is not None for column in found[0]), f"{flag} {name}: row {i} lacks a value: {row}")
    return rows


def load_data(args: "Args", wanted: list[str]) -> tuple[list[dict], list[dict]]:
    """Training and evaluation rows: `eval_dataset`, else the Hub's test or validation split, else the last rows."""
    rows, eval_dataset = read_dataset(args.dataset, "train", "--dataset", wanted), args.eval_dataset
    if not eval_dataset and args.dataset == "arithmetic":
        eval_dataset = args.dataset
    elif not eval_dataset and not Path(args.dataset).is_file():
        hub_name, config, chosen = (*args.dataset.split(":", 2), "", "")[:3]
        with end_on_error(f"--dataset {args.dataset}: its splits are unknown, so give --eval-dataset"):
            names = datasets.get_dataset_split_names(hub_name, config or None)
        splits = [name for name in ("test", "validation") if name in names and not chosen.startswith(name)]
        eval_dataset = f"{hub_name}:{config}:{splits[0]}" if splits else None
    if eval_dataset:
        return rows, read_dataset(eval_dataset, "test", "--eval-dataset", wanted)[: args.eval_size]
    require(args.eval_size < len(rows), f"--eval-size {args.eval_size} leaves no row of {len(rows)} to train on")
    return rows[: -args.eval_size], rows[-args.eval_size :]


def encode_rows(encode: Callable, rows: list[dict], max_length: int, flag: str) -> tuple[list[dict], list]:
    """The rows that are not too long, and what `encode` makes of each: ids, (ids, mask), or a pair of (ids, mask)."""
    kept, encoded = [], []
    for i, row in enumerate(rows):
        try:
            item = encode(row)
        except Exception as error:  # a chat template may raise anything
            hint = " (drop --system-prompt?)" if "system" in str(error).lower() else ""
            raise SystemExit(f"row {i} cannot be encoded: {error}{hint}; the row is {row}") from error
        parts = item if isinstance(item, tuple) else (item,)
        if max(len(part[0] if isinstance(part, tuple) else part) for part in parts) <= max_length:
            kept.append(row)
            encoded.append(item)
        if (i + 1) % 50_000 == 0:
            print(f"encoded {i + 1:,} of {len(rows):,} rows", flush=True)
    require(len(kept) > 0, f"all {len(rows)} rows are longer than {flag} {max_length} (tokens): raise it")
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept):,} of {len(rows):,} rows: longer than {flag} {max_length} (tokens)")
    return kept, encoded


class Means:
    """Sums and counts over all micro-batches, divided only at the end."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, mask: Tensor | None = None, **values):
        """values: numbers or tensors by name; with a mask of their shape, only where that is 1. Kept on the device."""
        for name, x in values.items():
            x = torch.as_tensor(x).detach().float()
            weight = torch.ones_like(x) if mask is None else mask
            self.sums[name] = self.sums.get(name, 0) + (x * weight).sum()
            self.counts[name] = self.counts.get(name, 0) + weight.sum()

    def result(self) -> dict[str, float]:
        """The means over all ranks."""
        here = torch.tensor([[self.sums[name], self.counts[name]] for name in self.sums], dtype=torch.float64)
        return {name: (total / count).item() for name, (total, count) in zip(self.sums, over_ranks(here))}


class Run:
    """The output folder: args.json, metrics.jsonl, samples.jsonl, checkpoints/step-N, and the final model.

    Whatever is more than a line is written beside its place and renamed: a kill leaves what --resume goes on from.
    """

    may_change = ("resume", "overwrite", "track", "wandb_project", "sample_every", "save_every", "save_dtype", "out")
    files = """metrics.jsonl samples.jsonl checkpoints wandb config.json generation_config.json chat_template.jinja
        additional_chat_templates model.safetensors model.safetensors.index.json model-*-of-*.safetensors tokenizer.json
        tokenizer_config.json tokenizer.model added_tokens.json vocab.json vocab.txt merges.txt"""

    def __init__(self, args: "Args"):
        """Decides between a new run and a resumed one and refuses what would lose something. Writes nothing."""
        self.args, self.out, self.settings = args, Path(args.out), json.loads(json.dumps(vars(args)))
        self.step, self.checkpoint = 0, None  # the step that this process begins after, and the folder to load it from
        self.rows, self.record = [], {}  # of metrics.jsonl; the content of args.json
        self.optimizers, self.state = {}, {}  # by name; what state.pt holds beside them
        self.loss = self.skipped = self.skipped_in_a_row = 0
        self.received = self.signal = 0  # the signal that came here; the one that all ranks know of
        self.shown, self.wandb, self.clock = False, None, 0.0
        inputs = ("model", "reference", "value_model", "dataset", "eval_dataset", "sft_dataset")
        read = [getattr(args, name, None) or "" for name in inputs]
        for folder in filter(os.path.exists, (*read, *getattr(args, "reward", ()))):
            inside = Path(folder).resolve().is_relative_to(self.out.resolve())
            require(not inside, f"--out {self.out} holds {folder}, which this run reads: choose another --out")
        require(not (args.resume and args.overwrite), "--resume goes on from a run, --overwrite removes it: give one")
        require(not self.out.is_file(), f"--out {self.out} is a file: name a folder")
        held = sorted(path.name for pattern in ("args.json " + self.files).split() for path in self.out.glob(pattern))
        with end_on_error(f"--out {self.out}: its args.json is broken, so choose another --out"):
            self.record = json.loads((self.out / "args.json").read_text()) if "args.json" in held else {}
        ours = {"args", "resolved"} <= set(self.record)
        require(ours or not held, f"--out {self.out} holds {held}, which no run of ours wrote: choose another --out")
        may_go = not ours or args.resume or args.overwrite
        require(may_go, f"--out {self.out} holds a run: go on with --resume, or start anew with --overwrite")
        if not args.resume or not ours:
            self.record = {}
            return
        for name, value in self.settings.items():
            free = name in self.may_change or (name in ("steps", "epochs") and args.lr_schedule == "constant")
            before, flag = self.record["args"].get(name), "--" + name.replace("_", "-")
            require(free or value == before, f"--resume: {flag} was {before!r}; {value!r} would change the result")
        for folder in self.checkpoints():  # the last one counts
            self.step, self.checkpoint = int(folder.name.removeprefix("step-")), str(folder)

    def checkpoints(self) -> list[Path]:
        """The folders of the checkpoints that are whole, in the order of their steps."""
        folders = (self.out / "checkpoints").glob("step-*[0-9]")
        return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))

    def prune(self, keep: int):
        """Removes all checkpoints but the last `keep`, so that a kill leaves each of them whole or not at all."""
        for old in self.checkpoints()[::-1][keep:]:
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))

    def finished(self, steps: int) -> bool:
        """Whether there is nothing left to do; says so."""
        require(steps >= self.step, f"--steps {steps}: the last checkpoint is at step {self.step} already")
        over, before = self.record.get("finished"), self.record.get("resolved", {}).get("steps", steps)
        same = before == steps or self.args.lr_schedule == "constant"
        require(same, f"--resume: --steps was {before}; {steps} would change the result")
        hint = "has no checkpoint to go on from: choose another --out, or start anew with --overwrite"
        require(over in (None, steps) or self.checkpoint, f"--resume: {self.out} is a finished run and {hint}")
        if over == steps:
            print(f"{self.out}: this run is finished")
            self.close()
        return over == steps

    def start(self, optimizers: dict[str, torch.optim.Optimizer], **resolved):
        """Makes the folder or, resuming, restores the optimizers and cuts the logs back to the checkpoint's step."""
        self.optimizers, logs = optimizers, {"metrics.jsonl": [], "samples.jsonl": []}
        if self.checkpoint:
            with end_on_error(f"--resume: {self.checkpoint} is broken; remove it to use the one before"):
                self.state = torch.load(f"{self.checkpoint}/state.pt", "cpu", weights_only=True, mmap=WORLD_SIZE > 1)
                for name, optimizer in optimizers.items():  # of which a rank needs but its share
                    saved, (group,) = self.state.pop(name), optimizer.param_groups
                    for i, moments in saved["state"].items():
                        saved["state"][i] = {key: share_of(x, group["params"][i]) for key, x in moments.items()}
                    optimizer.load_state_dict(saved)
                self.skipped, self.skipped_in_a_row = self.state["skipped"], self.state["skipped_in_a_row"]
            for name in logs:
                with end_on_error(f"--resume: {self.out / name} is broken"):
                    lines = (self.out / name).read_text().split("\n")[:-1]  # a kill may have torn what follows
                    logs[name] = [row for row in map(json.loads, lines) if row["step"] <= self.step]
        self.rows = logs["metrics.jsonl"]
        steps = over_ranks(torch.tensor([self.step, -self.step]), dist.ReduceOp.MAX)  # all have read what now changes
        require(steps.sum() == 0, f"--out {self.out} is not one folder for all processes: name one that they share")
        if RANK == 0:
            self.open_folder(logs, resolved)
        if __name__ == "__main__":  # a notebook keeps its own Ctrl-C
            signal.signal(signal.SIGINT, self.on_signal)
            signal.signal(signal.SIGTERM, self.on_signal)
        self.clock = time.perf_counter()

    def open_folder(self, logs: dict[str, list[dict]], resolved: dict):
        """Makes the folder or clears it, and writes args.json and the logs up to the step that the run begins after."""
        if self.args.track:
            with end_on_error("--track needs wandb, pip install wandb"):
                import wandb
            self.wandb = wandb
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / "args.json"
        if self.args.overwrite and file.exists():  # in an order in which no kill leaves a mixture of two runs
            write_beside(file, json.dumps(json.loads(file.read_text()) | {"finished": None}))
        self.prune(0 if self.args.overwrite else 2)
        wandb_id = self.record.get("wandb_id") or os.urandom(4).hex()
        self.record = {"args": self.settings, "resolved": resolved, "wandb_id": wandb_id}
        write_beside(file, json.dumps(self.record, indent=2))  # marks the folder as a run's
        patterns = "checkpoints/*.tmp" if self.checkpoint else self.files  # of a run before, or of one just begun
        for path in [path for pattern in patterns.split() for path in self.out.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, rows in logs.items():
            write_beside(self.out / name, "".join(json.dumps(row) + "\n" for row in rows))
        if self.args.resume:
            print(f"resuming {self.out} from step {self.step}")
        if self.args.track:
            options = {"id": self.record["wandb_id"], "resume": "allow", "dir": self.out, "name": self.out.name}
            self.wandb.init(project=self.args.wandb_project, config=self.settings | resolved, **options)

    def on_signal(self, number: int, frame):
        """The first signal lets the step finish and be saved; a second one stops at once."""
        if self.received and (WORLD_SIZE == 1 or number == signal.SIGINT):  # torchrun repeats what a scheduler sends
            raise KeyboardInterrupt
        self.received = number
        print("stopping after this step; once more to stop at once", flush=True)

    def show_first_batch(self, tokenizer, ids: Tensor, mask: Tensor):
        """Shows what is trained: the first row as text, and counts of tokens."""
        self.shown, actions, text = True, mask.bool(), ""
        end = int(actions[0].nonzero()[-1]) + 1
        for trained, tokens in itertools.groupby(range(end), key=actions[0].tolist().__getitem__):
            piece = tokenizer.decode(ids[0, list(tokens)])
            text += f"«{piece}»" if trained else piece
        num_bos, targets = ids[0, :end].tolist().count(tokenizer.bos_token_id), ids[actions].tolist()
        counts = f"{len(targets)} trained, {targets.count(tokenizer.eos_token_id)} of them EOS"
        print(f"first row, trained tokens in «», BOS {num_bos} times:\n{text}")
        print(f"first micro-batch: {len(ids)} rows, {ids.numel()} tokens with padding, {counts}")

    def backward(self, loss: Tensor):
        """Adds to the gradient. The losses of a step's micro-batches, on all ranks, add up to the loss of the step."""
        (loss * WORLD_SIZE).backward()  # FSDP averages over the ranks
        self.loss = self.loss + loss.detach()

    def discard(self):
        """Forgets the gradient and the loss that have added up."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.loss = 0

    def update(self, **rates: float) -> dict[str, float]:
        """Clips each model's gradient to max_grad_norm and steps each optimizer at the rate given under its name.

        Returns loss, grad_norm (value_grad_norm for `value_optimizer`). Ten in a row that are not finite end the run.
        """
        metrics = {"loss": float(over_ranks(torch.as_tensor(self.loss)))}
        for name, lr in rates.items():
            (group,) = self.optimizers[name].param_groups
            for parameter in group["params"]:
                if parameter.grad is None:  # no row had a signal: Adam's momentum still acts
                    parameter.grad = torch.zeros_like(parameter)
            norm = whole(torch.nn.utils.clip_grad_norm_(group["params"], self.args.max_grad_norm)).item()
            group["lr"], metrics[name.replace("optimizer", "grad_norm")] = lr, norm
        if all(map(math.isfinite, metrics.values())):
            for name in rates:
                self.optimizers[name].step()
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            print(f"update skipped: {metrics}", flush=True)
            require(self.skipped_in_a_row < 10, "ten updates in a row were not finite: lower --lr, or look at the data")
        self.discard()
        return metrics

    def log(self, step: int, steps: int, metrics: dict, samples: list[dict] = (), shown: str = ""):
        """A row in metrics.jsonl, the samples in samples.jsonl, and a line on screen with the `shown` metrics."""
        metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self.rows.append({"step": step, **metrics, "skipped_updates": self.skipped})
        self.signal = int(over_ranks(torch.tensor(self.received), dist.ReduceOp.MAX))  # all ranks agree before a save
        if RANK > 0:
            return
        for name, rows in (("samples", [{"step": step, **sample} for sample in samples]), ("metrics", self.rows[-1:])):
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        if step == self.step:  # the first evaluation says nothing of the time that a step takes
            self.clock = time.perf_counter()
        else:
            left = (time.perf_counter() - self.clock) / (step - self.step) * (steps - step)
            text = "  ".join(f"{x} {metrics[x]:.4g}" for x in shown.split() if metrics.get(x) is not None)
            speed = f"{metrics['time/tokens_per_s']:,.0f} tokens/s"
            print(f"step {step}/{steps}  {text}  {speed}  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
        evaluated = [f"{x[5:]} {metrics[x]:.4g}" for x in metrics if x.startswith("eval/") and metrics[x] is not None]
        if evaluated:
            print(f"evaluation at step {step}:  {'  '.join(evaluated)}", flush=True)
        if self.wandb:
            data = [[str(value) for value in sample.values()] for sample in samples]
            table = {"samples": self.wandb.Table(list(samples[0]), data)} if samples else {}
            self.wandb.log(self.rows[-1] | table, step=step)

    def write_model(self, folder: Path, model, tokenizer):
        """A plain Hugging Face folder, whole weights whatever the number of ranks."""
        weights = gathered(model.state_dict(keep_vars=True))  # the parameters themselves, so that tied ones are one
        if RANK == 0:
            model.save_pretrained(folder, state_dict={name: x.detach() for name, x in weights.items()})
            tokenizer.save_pretrained(folder)

    def save(self, step: int, model, tokenizer, value_model=None, **tensors):
        """checkpoints/step-N, a model folder with the optimizers' state and `tensors`. Exits if a signal came."""
        beside = self.out / "checkpoints" / f"step-{step}.tmp"
        self.write_model(beside, model, tokenizer)
        if value_model is not None:
            self.write_model(beside / "value_model", value_model, tokenizer)
        state = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, **tensors}
        for name, optimizer in self.optimizers.items():
            saved = optimizer.state_dict()
            state[name] = saved | {"state": {i: gathered(moments) for i, moments in saved["state"].items()}}
        if RANK == 0:
            torch.save(state, beside / "state.pt")
            beside.rename(beside.with_suffix(""))
            self.prune(2)
        if self.signal:
            print(f"stopped at step {step}: go on with --resume", flush=True)
            self.close()
            raise SystemExit(128 + self.signal)

    def close(self):
        """Ends the tracking, and the ranks: none of them may end before all are done."""
        if self.wandb:
            self.wandb.finish()
        if dist.is_initialized():
            over_ranks(torch.zeros(1))  # waits until the first has written
            dist.destroy_process_group()

    def finish(self, steps: int, model, tokenizer) -> dict[str, float]:
        """Writes the final model to `out`, config.json last, and returns the final metrics."""
        beside = self.out / "checkpoints" / "final.tmp"
        self.write_model(beside, model.to(getattr(torch, self.args.save_dtype)), tokenizer)
        if RANK == 0:
            for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
                shutil.rmtree(self.out / path.name, ignore_errors=True)  # a folder cannot be replaced
                path.replace(self.out / path.name)
            beside.rmdir()
            write_beside(self.out / "args.json", json.dumps(self.record | {"finished": steps}, indent=2))
        self.close()
        print(f"wrote {self.out}")
        return self.summary()

    def summary(self) -> dict[str, float]:
        """The last row of metrics.jsonl, and the first evaluation as before/..."""
        rows = self.rows or [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        before = {x.replace("eval/", "before/"): value for x, value in rows[0].items() if x.startswith("eval/")}
        return before | rows[-1]


def write_beside(path: Path, text: str):
    """Writes a file so that a kill leaves the old one or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    main(tyro.cli(Args))
