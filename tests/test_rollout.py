"""generate and rollout: what is sampled has the stated distribution, and depends on nothing but prompt and draws."""

import math

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
import sft

VOCAB = 48
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {"head_dim": 16}),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "mistral, window 4": (transformers.MistralForCausalLM, transformers.MistralConfig, {"sliding_window": 4}),
    "gemma3, window 4 and full": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        {"sliding_window": 4, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}
PROMPTS = [[5, 9, 2, 30, 7, 11, 8], [6], [3, 4, 40, 21], [17, 29], [12, 13, 14, 15, 16, 18, 19, 20, 22]]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(family="qwen3", **changes):
    """A tiny model with random weights of a size that gives clearly unequal probabilities."""
    model_class, config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    return model_class(config_class(**(SHAPE | options | changes))).eval()


def model_with_logits(logits):
    """A model whose next-token logits are `logits`, whatever precedes."""
    model = random_model(vocab_size=len(logits), pad_token_id=None, eos_token_id=None)
    model.lm_head = torch.nn.Linear(SHAPE["hidden_size"], len(logits))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.as_tensor(logits))
    return model


def draws(num_rows, length, seed=0):
    """Uniforms in [0, 1), made here, not by the scripts."""
    return torch.rand(num_rows, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def next_logits(model, prompt):
    """The model's own logits after a prompt, one forward pass without cache or padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].double()


# ------------------------------------------------------------------------------------------------------- distribution

# Upper 1e-4 quantile of chi-square with 8 degrees of freedom: P(X > x) = exp(-x/2) (1 + x/2 + (x/2)^2/2 + (x/2)^3/6).
# At x = 31.828: exp(-15.914) * (1 + 15.914 + 126.63 + 671.71) = 1.2265e-7 * 815.25 = 1.000e-4. The seeds are fixed.
CHI_SQUARE_8 = 31.828
NINE = 9  # tokens, hence 8 degrees of freedom


def chi_square(samples, probabilities):
    """sum (observed - expected)^2 / expected; each expected count must be at least 5."""
    observed = torch.bincount(torch.tensor(samples), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(samples)
    assert expected.min() >= 5
    return ((observed - expected) ** 2 / expected).sum().item()


def test_the_critical_value_is_what_its_comment_says():
    """The survival function of chi-square with an even number of degrees of freedom is a finite sum."""
    half = CHI_SQUARE_8 / 2
    assert math.exp(-half) * sum(half**j / math.factorial(j) for j in range(4)) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(("temperature", "others"), [(1.0, (0.7, 1.3, 0.9)), (0.7, (1.0, 0.5, 0.8))])
def test_first_tokens_have_the_distribution_softmax_of_logits_over_temperature(temperature, others):
    """20,000 samples of a random model's first token. The same samples reject every other temperature."""
    model, prompt = random_model(vocab_size=NINE, initializer_range=0.1), [2, 5, 7]
    completions, _ = grpo.generate(model, [prompt], 20_000, 1, temperature, [], draws(20_000, 1))
    samples, logits = [completion[0] for completion in completions], next_logits(model, prompt)
    assert chi_square(samples, (logits / temperature).softmax(0)) < CHI_SQUARE_8
    for other in others:
        assert chi_square(samples, (logits / other).softmax(0)) > 2 * CHI_SQUARE_8


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_later_tokens_have_the_distribution_given_what_was_sampled(temperature):
    """The third token of 20,000 samples, given its two predecessors: decoding from the cache conditions on them.

    The most frequent pair is tested, and the distribution after another pair is rejected on the same samples.
    """
    model, prompt = random_model(vocab_size=NINE, initializer_range=0.15), [2, 5, 7]
    completions, _ = grpo.generate(model, [prompt], 20_000, 3, temperature, [], draws(20_000, 3, seed=1))
    pairs = [tuple(completion[:2]) for completion in completions]
    most, another = sorted(set(pairs), key=pairs.count, reverse=True)[:2]
    samples = [completion[2] for completion in completions if tuple(completion[:2]) == most]
    assert len(samples) > 500
    assert chi_square(samples, (next_logits(model, [*prompt, *most]) / temperature).softmax(0)) < CHI_SQUARE_8
    assert chi_square(samples, (next_logits(model, [*prompt, *another]) / temperature).softmax(0)) > 2 * CHI_SQUARE_8


def test_frequencies_by_hand_at_temperature_one_half():
    """Logits ln 1, ..., ln 9 at T = 1/2: probabilities are k^2 / 285, since 1 + 4 + ... + 81 = 285; at T = 1 k / 45.

    Sampling log-probabilities are those too.
    """
    model = model_with_logits([math.log(k) for k in range(1, 10)])
    completions, logprobs = grpo.generate(model, [[1]], 20_000, 1, 0.5, [], draws(20_000, 1, seed=2))
    samples = [completion[0] for completion in completions]
    squares = torch.tensor([k**2 / 285 for k in range(1, 10)])
    assert chi_square(samples, squares) < CHI_SQUARE_8
    assert chi_square(samples, torch.tensor([k / 45 for k in range(1, 10)])) > 2 * CHI_SQUARE_8
    assert torch.allclose(torch.tensor(logprobs)[:, 0], squares.log()[samples], atol=1e-5)


def test_generation_config_has_no_effect():
    """top_k 1, a repetition penalty, a minimum length, banned tokens: samples and log-probabilities stay the same."""
    uniforms, results = draws(20, 8), []
    for settings in (
        {},
        {"top_k": 1, "repetition_penalty": 5.0, "min_new_tokens": 8, "temperature": 0.1, "top_p": 0.1},
        {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(20)), "max_new_tokens": 2, "num_beams": 3},
    ):
        model = random_model()
        model.generation_config = transformers.GenerationConfig(**({"do_sample": True} | settings))
        results.append(grpo.generate(model, PROMPTS, 4, 8, 1.0, [1, 7, 9], uniforms))
    assert results[0] == results[1] == results[2]
    assert any(len(completion) < 8 for completion in results[0][0])


# --------------------------------------------------------------------------------------------------------- inverse CDF


def test_tokens_by_inverse_cdf_worked_by_hand():
    """Probabilities 1/8, 3/8, 1/2 have the sums 1/8, 1/2, 1; the token is the first whose sum exceeds the draw.

    At T = 1/2 the weights are 1, 9, 16 of 26, with the sums .0385, .3846, 1.
    """
    model = model_with_logits([math.log(1 / 8), math.log(3 / 8), math.log(1 / 2)])
    uniforms = torch.tensor([[0.0, 0.12, 0.13, 0.49, 0.51, 0.99], [0.6, 0.3, 0.01, 0.9, 0.2, 0.45]])
    completions, logprobs = grpo.generate(model, [[0]], 2, 6, 1.0, [], uniforms)
    assert completions == [[0, 0, 1, 1, 2, 2], [2, 1, 0, 2, 1, 1]]
    assert logprobs[0] == pytest.approx([math.log(p) for p in (1 / 8, 1 / 8, 3 / 8, 3 / 8, 1 / 2, 1 / 2)], abs=1e-6)
    completions, logprobs = grpo.generate(model, [[0]], 2, 6, 0.5, [], uniforms)
    assert completions == [[0, 1, 1, 2, 2, 2], [2, 1, 0, 2, 1, 2]]
    assert logprobs[1][:3] == pytest.approx([math.log(p / 26) for p in (16, 9, 1)], abs=1e-6)


@pytest.mark.parametrize("low", [-1e9, -1e4, -200.0, -math.inf])
def test_extreme_draws_choose_tokens_of_positive_probability(low):
    """Exactly 0 takes the first token that is possible, 1 - 2^-53 the last, however many impossible ones lie around.

    The possible ones are 2, 3 and 5 here; at -200 the others have about exp(-200), which a draw of exactly 0 may hit.
    """
    logits = torch.full((8,), low)
    logits[[2, 3, 5]] = torch.tensor([0.3, -0.2, 0.1])
    uniforms = torch.tensor([[0.0, 1 - 2.0**-53], [1 - 2.0**-53, 0.0]], dtype=torch.float64)
    for temperature in (1.0, 0.7):
        completions, logprobs = grpo.generate(model_with_logits(logits), [[1]], 2, 2, temperature, [], uniforms)
        assert [completions[0][1], completions[1][0]] == [5, 5]
        if low < -1000:
            assert [completions[0][0], completions[1][1]] == [2, 2]
        assert all(math.isfinite(x) for row in logprobs for x in row)


@pytest.mark.parametrize("precise", [torch.float64, torch.float32])  # MPS has the second alone
@pytest.mark.parametrize("size", [1, 7, 512, 1536, 5000, 40_064, 50_257])
def test_every_draw_in_its_token(size, precise):
    """Integer weights, some tokens and whole blocks of them without any: draw (j + 1/2) / total falls to the owner of
    ticket j, if each token holds as many tickets as its weight."""
    weights = torch.randint(4, (size,), generator=torch.Generator().manual_seed(size))
    weights[min(600, size - 1)] = 2
    weights[:512] = weights[:512] if size <= 512 else 0
    weights[1024:1200] = 0
    if size > 2000:
        weights[-1100:] = 0  # so that whole blocks follow the last ticket
    tickets = [token for token, weight in enumerate(weights.tolist()) for _ in range(weight)]
    chosen = torch.arange(0, len(tickets), max(1, len(tickets) // 300))
    uniforms = torch.cat([(chosen.double() + 0.5) / len(tickets), torch.tensor([0.0, 1 - 2.0**-53]).double()])
    probs = (weights / len(tickets)).float().expand(len(uniforms), -1)
    tokens = grpo.inverse_cdf(probs, uniforms[:, None].to(precise))[:, 0].tolist()
    assert tokens[:-2] == [tickets[j] for j in chosen.tolist()]
    assert tokens[-2:] == [tickets[0], tickets[-1]]


def test_a_block_that_rounds_up_keeps_its_last_token():
    """The float32 sum of the first 512 weights exceeds their true sum, and no others have any: a draw just below 1 is
    more than the tokens of the block add up to. It is the last of them, not the first of the next block."""
    generator = torch.Generator().manual_seed(0)
    candidates = (torch.rand(512, generator=generator) for _ in range(100))
    block = next(x for x in candidates if x.sum().double() > x.double().sum() * (1 + 1e-9))
    probs = torch.cat([block, torch.zeros(1024)])[None]
    assert grpo.inverse_cdf(probs, torch.tensor([[1 - 2.0**-53]], dtype=torch.float64)).tolist() == [[511]]


class InBounds(TorchDispatchMode):
    """Every gather reads inside its tensor: a GPU stops where it does not, the CPU may say nothing."""

    gathers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.gather.default:
            x, dim, index = args[:3]
            assert index.min() >= 0 and index.max() < x.shape[dim]
            self.gathers += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [7, 261, 1536, 50_257])
def test_nan_gives_some_token(size):
    """So that a run whose weights are NaN goes on to the update that is skipped, and its message."""
    with InBounds() as seen:
        completions, logprobs = grpo.generate(model_with_logits([math.nan] * size), [[1]], 2, 2, 1.0, [], draws(2, 2))
    assert seen.gathers > 0
    assert all(0 <= token < size for row in completions for token in row)
    assert all(map(math.isnan, [x for row in logprobs for x in row]))


def test_extreme_draws_on_a_large_uniform_vocabulary():
    """40,000 equal logits, whose sum ends a little off 1: 0 and 1 - 2^-53 still give the first and the last token."""
    model = model_with_logits(torch.zeros(40_000))
    uniforms = torch.tensor([[0.0, 1 - 2.0**-53, 0.50001]], dtype=torch.float64)
    completions, _ = grpo.generate(model, [[1]], 1, 3, 1.0, [], uniforms)
    assert completions[0][:2] == [0, 39_999] and completions[0][2] == pytest.approx(20_000, abs=2)


# ------------------------------------------------------------------------------------------- decoding against a forward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_logprobs_equal_teacher_forced_ones(family, temperature):
    """Ragged prompts, 12 tokens, rows that end early: cached decoding and token_logprobs agree to 1e-4."""
    model = random_model(family)
    completions, sampled = grpo.generate(model, PROMPTS, 4, 12, temperature, [1, 7, 9], draws(20, 12))
    lengths = {len(completion) for completion in completions}
    assert len(lengths) > 3 and max(lengths) == 12  # some rows leave the batch early, some never end
    rows = []
    for i, (completion, logprobs) in enumerate(zip(completions, sampled)):
        prompt = PROMPTS[i // 4]
        assert len(logprobs) == len(completion)
        mask, shifted = [0] * len(prompt) + [1] * len(completion), [0.0] * len(prompt) + logprobs
        rows.append((prompt + completion, mask, shifted))
    for _, ids, mask, shifted in grpo.micro_batches(rows, max_tokens=200, device=model.device):
        logprobs, _ = grpo.token_logprobs(model, ids, mask, temperature)
        assert (logprobs - shifted).abs().max() < 1e-4
    assert min(map(min, sampled)) < -2  # not all near 0


@pytest.mark.parametrize("family", ["mistral, window 4", "gemma3, window 4 and full"])
def test_the_window_is_shorter_than_the_sequences(family):
    """Without its window the model gives other logits, so the agreement above is about the window too."""
    prompt = PROMPTS[-1]
    full = random_model(family, sliding_window=64)
    assert (next_logits(random_model(family), prompt) - next_logits(full, prompt)).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_models_own_generate(family):
    """Temperature 0 gives the ids of model.generate(do_sample=False), prompt by prompt, and stops at the same place."""
    model = random_model(family)
    eos_ids = [1, 7, 9, 30]
    completions, logprobs = grpo.generate(model, PROMPTS, 1, 12, 0.0, eos_ids, draws(len(PROMPTS), 12))
    for prompt, completion, sampled in zip(PROMPTS, completions, logprobs):
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=eos_ids
        )
        assert output[0, len(prompt) :].tolist() == completion
        expected = next_logits(model, prompt).log_softmax(0)[completion[0]].item()  # temperature 1
        assert sampled[0] == pytest.approx(expected, abs=1e-4)


def test_greedy_does_not_depend_on_the_draws():
    """Two sets of uniforms, one completion; and the samples of one prompt are all alike."""
    model = random_model()
    first, _ = grpo.generate(model, PROMPTS, 2, 6, 0.0, [], draws(10, 6, seed=1))
    second, _ = grpo.generate(model, PROMPTS, 2, 6, 0.0, [], draws(10, 6, seed=2))
    assert first == second and first[0::2] == first[1::2]


# -------------------------------------------------------------------------------------------------------- independence


def count_rows(model, rows):
    """Has the number of rows of each forward pass appended to `rows`."""
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )


def close(a, b):
    """Log-probabilities of rows, equal up to rounding."""
    return all(x == pytest.approx(y, abs=1e-4) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 12, 1000])
def test_rollout_does_not_depend_on_how_many_are_decoded_at_once(batch_size):
    """From one prompt at a time to all of them: the same completions in the same order."""
    model, uniforms = random_model(), draws(20, 10)
    expected, expected_logprobs = grpo.generate(model, PROMPTS, 4, 10, 1.0, [1, 7, 9], uniforms)
    settings = sft.Args(rollout_batch_size=batch_size)
    completions, logprobs = grpo.rollout(model, PROMPTS, 4, 1.0, [1, 7, 9], uniforms, settings)
    assert completions == expected and close(logprobs, expected_logprobs)


def test_rollout_bounds_the_sequences_decoded_at_once():
    """With 4 samples per prompt, 8 at once are two prompts at a time: no forward pass has more than 8 rows."""
    model, rows = random_model(), []
    count_rows(model, rows)
    grpo.rollout(model, PROMPTS, 4, 1.0, [], draws(20, 3), sft.Args(rollout_batch_size=8))
    assert max(rows) == 8


@pytest.mark.parametrize(("share", "expected"), [(1.0, 12), (0.5, 4), (1e-6, 4)])
def test_the_memory_that_is_free_bounds_the_sequences_decoded_at_once(monkeypatch, share, expected):
    """A token takes 2 layers x 1 head x 16 x 4 bytes x (keys and values) = 256 bytes; the longest prompt has 9 tokens.

    With 3 new ones a row takes 256 * 12 = 3,072 bytes. Of 44,000 free bytes all hold 14.3 rows, so 3 prompts of 4
    samples; half of them 7.2, so one prompt, and one prompt it is at least.
    """
    monkeypatch.setattr(grpo, "free_memory", lambda device: 44_000)
    model, rows = random_model(), []
    uniforms = draws(20, 3)
    expected_completions, _ = grpo.generate(model, PROMPTS, 4, 3, 1.0, [], uniforms)
    count_rows(model, rows)
    completions, _ = grpo.rollout(model, PROMPTS, 4, 1.0, [], uniforms, sft.Args(cache_memory=share))
    assert max(rows) == expected and completions == expected_completions


@pytest.mark.parametrize("family", ["qwen3", "mistral, window 4"])
def test_a_row_does_not_depend_on_other_rows(family):
    """Each prompt alone, with its own draws, gives what it gives among longer and shorter ones."""
    model, uniforms = random_model(family), draws(20, 10)
    together, logprobs = grpo.generate(model, PROMPTS, 4, 10, 1.0, [1, 7, 9], uniforms)
    for b, prompt in enumerate(PROMPTS):
        own = slice(4 * b, 4 * b + 4)
        alone, alone_logprobs = grpo.generate(model, [prompt], 4, 10, 1.0, [1, 7, 9], uniforms[own])
        assert alone == together[own] and close(alone_logprobs, logprobs[own])


def test_order_of_rows_only_permutes_the_completions():
    """Prompts in another order, each with its own draws."""
    model, uniforms, order = random_model(), draws(20, 10).view(5, 4, 10), [3, 0, 4, 1, 2]
    completions, _ = grpo.generate(model, PROMPTS, 4, 10, 1.0, [1, 7, 9], uniforms.view(20, 10))
    permuted, _ = grpo.generate(model, [PROMPTS[b] for b in order], 4, 10, 1.0, [1, 7, 9], uniforms[order].view(20, 10))
    assert permuted == [completions[4 * b + g] for b in order for g in range(4)]


def test_completions_are_prompt_major():
    """B * G of them; those of one prompt are neighbours: each first log-probability is that after its own prompt."""
    model = random_model()
    completions, logprobs = grpo.generate(model, PROMPTS, 3, 2, 1.0, [], draws(15, 2))
    assert len(completions) == len(logprobs) == 15
    for i, (completion, sampled) in enumerate(zip(completions, logprobs)):
        expected = next_logits(model, PROMPTS[i // 3]).log_softmax(0)
        assert sampled[0] == pytest.approx(expected[completion[0]].item(), abs=1e-4)


def test_samples_of_one_prompt_differ():
    """Each row has draws of its own."""
    completions, _ = grpo.generate(random_model(), PROMPTS[:1], 8, 6, 1.0, [], draws(8, 6))
    assert len({tuple(completion) for completion in completions}) > 4


# ------------------------------------------------------------------------------------------------------ where it stops

QUARTERS = [0.0] * 4  # four equal logits: the token is floor(4 u)


def test_a_completion_ends_with_the_first_of_the_eos_ids_and_keeps_it():
    """Tokens by hand, floor(4 u): row 0 draws 0 1 3 ..., row 1 draws 2 ..., row 2 ends at the limit, 2 and 3 end it."""
    model = model_with_logits(QUARTERS)
    uniforms = torch.tensor([[0.1, 0.3, 0.8, 0.1], [0.6, 0.1, 0.8, 0.1], [0.1, 0.3, 0.3, 0.1]])
    completions, logprobs = grpo.generate(model, [[0]], 3, 4, 1.0, [3, 2], uniforms)
    assert completions == [[0, 1, 3], [2], [0, 1, 1, 0]]
    assert [len(row) for row in logprobs] == [3, 1, 4]
    assert all(x == pytest.approx(math.log(1 / 4), abs=1e-6) for row in logprobs for x in row)


def test_without_eos_ids_it_never_stops_early():
    """The model's and the generation config's own EOS, token 1 here, is a token like any other."""
    model = model_with_logits(QUARTERS)
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    completions, _ = grpo.generate(model, [[0], [0, 1]], 2, 5, 1.0, [], torch.full((4, 5), 0.3))
    assert completions == [[1] * 5] * 4


def test_no_completion_exceeds_max_new_tokens_or_is_empty():
    """At most 5 and at least 1, the EOS itself counted; at a limit of 1 all have one token."""
    model = random_model()
    for limit in (1, 5):
        completions, logprobs = grpo.generate(model, PROMPTS, 4, limit, 1.0, [1, 7, 9], draws(20, limit))
        assert {len(completion) for completion in completions} <= set(range(1, limit + 1))
        assert max(map(len, completions)) == limit and list(map(len, logprobs)) == list(map(len, completions))


def test_an_eos_inside_the_prompt_does_not_end_anything():
    """Only what is sampled counts: a prompt of token 3 goes on."""
    completions, _ = grpo.generate(model_with_logits(QUARTERS), [[3, 3]], 1, 3, 1.0, [3], torch.full((1, 3), 0.1))
    assert completions == [[0, 0, 0]]


# --------------------------------------------------------------------------------------------------- state of the model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_mode_and_gradient_checkpointing_are_restored(training, gradient_checkpointing):
    """Sampling needs the cache, which checkpointing in training mode drops; afterwards every module is as it was."""
    model, uniforms = random_model(), draws(5, 6)
    expected = grpo.generate(model, PROMPTS, 1, 6, 1.0, [1], uniforms)
    model = grpo.prepare_model(model, torch.device("cpu"), gradient_checkpointing).train(training)
    modes = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    completions, logprobs = grpo.generate(model, PROMPTS, 1, 6, 1.0, [1], uniforms)
    assert completions == expected[0] and close(logprobs, expected[1])
    after = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    assert after == modes and any(flag for _, flag in after) == gradient_checkpointing
    assert model.training == training


def test_inputs_and_weights_are_left_alone_and_nothing_is_differentiated():
    """Prompts, draws and parameters stay as they were, and no parameter gets a gradient."""
    model, uniforms, prompts = random_model(), draws(10, 4), [list(prompt) for prompt in PROMPTS]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    before = uniforms.clone()
    grpo.generate(model, prompts, 2, 4, 1.0, [1], uniforms)
    assert prompts == PROMPTS and torch.equal(before, uniforms)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, model.parameters()))


# --------------------------------------------------------------------------------------------------------- CUDA graphs


class Recorded:
    """A CUDA graph without CUDA: replays the recorded step on the very tensors that it was recorded with.

    What a real graph would not see, tensors that are replaced instead of changed, this one does not see either. The
    Python of the cache does run again here; models whose layers count in Python get no GraphDecoder.
    """

    replays = 0

    def replay(self):
        self.logits.copy_(self.step())
        Recorded.replays += 1


@pytest.fixture
def recorded(monkeypatch):
    """GraphDecoder records on the CPU too."""

    def record(decoder):
        token = decoder.token
        frozen = grpo.Decoder(decoder.model, decoder.cache, decoder.attention_mask, decoder.position)
        decoder.graph = Recorded()
        decoder.graph.step = lambda: frozen.forward(token)
        decoder.graph.logits = decoder.logits = torch.full((len(token), 1, decoder.model.config.vocab_size), math.nan)

    monkeypatch.setattr(grpo.GraphDecoder, "record", record)
    monkeypatch.setattr(Recorded, "replays", 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("with_graph", [False, True])
def test_fixed_shapes_change_nothing(family, temperature, with_graph, request):
    """A cache with room for columns to come, rows that stay behind their end, and a batch that shrinks late: the same
    completions."""
    if with_graph:
        request.getfixturevalue("recorded")
    model, uniforms, eos_ids, rows = random_model(family), draws(200, 40), [1, 7, 9, 30, 31, 32, 33], []
    expected, expected_logprobs = grpo.generate(model, PROMPTS, 40, 40, temperature, eos_ids, uniforms)
    count_rows(model, rows)
    completions, logprobs = grpo.generate(model, PROMPTS, 40, 40, temperature, eos_ids, uniforms, graphs=True)
    assert completions == expected and close(logprobs, expected_logprobs)
    assert temperature == 0 or rows[1] == 200 > rows[-1] > 1  # some left together; the first pass is the prefill
    assert len({len(completion) for completion in expected}) > 1  # they end at different steps
    assert (Recorded.replays > 0) == with_graph


def test_with_graphs_the_batch_shrinks_when_half_of_it_has_ended():
    """The rows of each step: always the first number, or, looked at every 16th step, at most half of the one before,
    until 32 are left; without graphs, one by one. A batch that has ended is noticed then too."""
    model, uniforms, found = random_model(max_position_embeddings=256), draws(200, 160), []
    for graphs, eos_ids in ((True, [3]), (False, [3]), (True, list(range(1, 40)))):
        rows = []
        count_rows(model, rows)
        completions, _ = grpo.generate(model, PROMPTS, 40, 160, 1.0, eos_ids, uniforms, graphs=graphs)
        found.append(completions)
        left = [sum(len(x) > t for x in completions) for t in range(1, 160)]
        size, expected = 200, []
        for t, unfinished in enumerate(left):
            if not graphs or t % 16 == 15:
                if not unfinished:
                    break
                if not graphs or (2 * unfinished <= size and size > 32):
                    size = unfinished
            expected.append(size)
        assert rows[1:] == expected  # the first pass is the prefill
        if len(eos_ids) == 1:
            assert len(set(expected)) > 2 and min(expected) <= 32
        else:
            assert max(map(len, completions)) <= 16 and expected == [200] * 15
    assert found[0] == found[1]


def test_with_graphs_the_cache_grows(monkeypatch, recorded):
    """256 columns, doubled once they are full, but no more than the 9 + 700 that are asked for, rounded up to 64."""
    model, uniforms, columns = random_model(max_position_embeddings=1024), draws(10, 700), []
    step = grpo.GraphDecoder.step
    monkeypatch.setattr(
        grpo.GraphDecoder,
        "step",
        lambda self, token: (step(self, token), columns.append(self.attention_mask.shape[-1]))[0],
    )
    completions, logprobs = grpo.generate(model, PROMPTS, 2, 700, 1.0, [], uniforms, graphs=True)
    assert columns == [256] * (256 - 9) + [512] * 256 + [768] * (9 + 699 - 512)
    expected, expected_logprobs = grpo.generate(model, PROMPTS, 2, 700, 1.0, [], uniforms)
    assert completions == expected and close(logprobs, expected_logprobs)


@pytest.mark.parametrize(
    ("family", "attention", "served"),
    [("mistral, window 4", "sdpa", False), ("qwen3", "eager", False), ("qwen3", "sdpa", True), ("gpt2", "sdpa", True)],
)
def test_graphs_need_full_attention(family, attention, served, monkeypatch):
    """A sliding window keeps its place in Python, which a graph does not run; eager attention may cut a bias to the
    length of the cache: such models decode without."""
    model, decoders = random_model(family), []
    model.set_attn_implementation(attention)
    expected, _ = grpo.generate(model, PROMPTS, 1, 4, 0.0, [], draws(5, 4))
    step = grpo.GraphDecoder.step
    monkeypatch.setattr(grpo.GraphDecoder, "step", lambda self, token: (decoders.append(self), step(self, token))[1])
    completions, _ = grpo.generate(model, PROMPTS, 1, 4, 0.0, [], draws(5, 4), graphs=True)
    assert completions == expected and bool(decoders) == served


def test_a_model_that_takes_no_such_mask_names_the_flag(monkeypatch):
    """What goes wrong in the first recorded step ends the run with the way out."""
    model = random_model()
    forward = grpo.Decoder.forward
    monkeypatch.setattr(grpo.Decoder, "forward", lambda self, token: forward(self, token.unsqueeze(0)))
    with pytest.raises(SystemExit, match="--no-cuda-graphs"):
        grpo.generate(model, PROMPTS, 1, 4, 0.0, [], draws(5, 4), graphs=True)


def test_graphs_are_for_cuda(monkeypatch):
    """On the CPU, where nothing can be recorded, the setting that is on by default does nothing."""
    assert grpo.Args().cuda_graphs
    monkeypatch.setattr(grpo, "GraphDecoder", None)
    completions, _ = grpo.rollout(random_model(), PROMPTS, 2, 1.0, [], draws(10, 3), grpo.Args())
    assert len(completions) == 10
