"""token_logprobs against the model's own logits, and gradients that do not depend on how a step is split."""

import shutil

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
import sft

CPU = torch.device("cpu")
VOCAB = 48
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "gemma": (transformers.GemmaForCausalLM, transformers.GemmaConfig, {"head_dim": 16}),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(family, **changes):
    """A tiny model with random weights of a size that gives clearly unequal probabilities."""
    model_class, config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    return model_class(config_class(**(SHAPE | options | changes)))


def ragged_batch(pad_id=0, extra=0):
    """Four rows of 10, 7, 4 and 2 tokens: ids, mask and lengths. Row 0 has a hole, row 3 a one-token completion."""
    lengths, prompts = [10, 7, 4, 2], [3, 1, 2, 1]
    width = max(lengths) + extra
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCAB, (4, width), generator=generator)
    mask = torch.zeros(4, width)
    for n, (length, prompt) in enumerate(zip(lengths, prompts)):
        mask[n, prompt:length] = 1
        ids[n, length - 1] = 1  # EOS
        ids[n, length:] = pad_id
    mask[0, 5:7] = 0
    return ids, mask, lengths


def by_definition(model, ids, mask, lengths, temperature):
    """log softmax(logits / T) of each action, and the entropy -sum p log p, each row on its own and without padding."""
    logprobs, entropy = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for n, length in enumerate(lengths):
        logits = model(input_ids=ids[n : n + 1, :length], use_cache=False).logits[0].float() / temperature
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        for t in range(1, length):
            if mask[n, t]:
                logprobs[n, t] = log_p[t - 1, ids[n, t]]
                entropy[n, t] = -(log_p[t - 1].exp() * log_p[t - 1]).sum()
    return logprobs, entropy


def gradient_of(scalar, model):
    """The gradient of all parameters as one vector."""
    model.zero_grad()
    scalar.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def assert_equal_gradients(a, b, tolerance=1e-5):
    """Equal to `tolerance` of the norm, which is not 0."""
    assert b.norm() > 1e-3
    assert (a - b).norm() <= tolerance * b.norm()


def weights_of(mask, seed):
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_the_models_logits(family, temperature):
    """Values and the gradients of all parameters, over ragged rows, a hole, a first action at index 1 and EOS."""
    model = grpo.prepare_model(random_model(family), CPU, False)
    ids, mask, lengths = ragged_batch()
    expected, expected_entropy = by_definition(model, ids, mask, lengths, temperature)
    logprobs, entropy = grpo.token_logprobs(model, ids, mask, temperature=temperature)
    assert logprobs.shape == entropy.shape == ids.shape
    assert torch.allclose(logprobs, expected, atol=2e-5) and torch.allclose(entropy, expected_entropy, atol=2e-5)
    assert expected.min() < -2 and expected_entropy.max() > 0.5  # the model is not uniform, nor is it certain

    a, b = weights_of(mask, 1), weights_of(mask, 2)
    for x, y in ((a, 0 * b), (0 * a, b)):
        expected_gradient = gradient_of((x * expected + y * expected_entropy).sum(), model)
        expected, expected_entropy = by_definition(model, ids, mask, lengths, temperature)
        logprobs, entropy = grpo.token_logprobs(model, ids, mask, temperature)
        assert_equal_gradients(gradient_of((x * logprobs + y * entropy).sum(), model), expected_gradient)


def test_an_entropy_without_gradient_leaves_values_and_the_other_gradient_as_they_are():
    """With `entropy_grad` off the sum of both has exactly the gradient of the log-probabilities alone."""
    model = random_model("qwen3")
    ids, mask, _ = ragged_batch()
    weights = weights_of(mask, 1)
    logprobs, entropy = grpo.token_logprobs(model, ids, mask)
    alone = gradient_of((weights * logprobs).sum(), model)
    same_logprobs, same_entropy = grpo.token_logprobs(model, ids, mask, entropy_grad=False)
    assert torch.equal(same_logprobs, logprobs) and torch.equal(same_entropy, entropy)
    assert_equal_gradients(gradient_of((weights * same_logprobs + same_entropy).sum(), model), alone)


def test_without_entropy_the_log_probabilities_and_their_gradient_are_the_same():
    """With `with_entropy` off, entropy is 0 and has no gradient, whatever `entropy_grad` says."""
    model = random_model("qwen3")
    ids, mask, _ = ragged_batch()
    weights = weights_of(mask, 1)
    logprobs, _ = grpo.token_logprobs(model, ids, mask, 0.7, entropy_grad=False)
    alone = gradient_of((weights * logprobs).sum(), model)
    for entropy_grad in (True, False):
        same, entropy = grpo.token_logprobs(model, ids, mask, 0.7, with_entropy=False, entropy_grad=entropy_grad)
        assert torch.equal(same, logprobs) and not entropy.any()
        assert_equal_gradients(gradient_of((weights * same + entropy).sum(), model), alone)


def test_temperature_changes_the_logprobs():
    """Dividing the logits is not the same as dividing the log-probabilities: the results are normalised anew."""
    model = random_model("qwen3")
    ids, mask, _ = ragged_batch()
    at_one, at_half = (grpo.token_logprobs(model, ids, mask, temperature)[0] for temperature in (1.0, 0.5))
    assert (at_one - at_half).abs().max() > 0.1 and (at_one / 0.5 - at_half).abs().max() > 0.1


def test_results_are_zero_where_the_mask_is_and_nowhere_else():
    """Prompt, hole and padding hold 0 in both results; every action has a negative log-probability and an entropy."""
    ids, mask, _ = ragged_batch()
    logprobs, entropy = grpo.token_logprobs(random_model("llama"), ids, mask)
    assert torch.equal(logprobs != 0, mask.bool()) and torch.equal(entropy != 0, mask.bool())
    assert (logprobs <= 0).all() and (entropy >= 0).all()
    assert logprobs.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    """Neither its amount nor its token: padded with EOS, or with any other token, the results stay the same."""
    model = random_model(family)
    ids, mask, lengths = ragged_batch()
    logprobs, entropy = grpo.token_logprobs(model, ids, mask)
    for pad_id, extra in ((0, 5), (1, 0), (1, 5), (7, 3)):
        padded_ids, padded_mask, _ = ragged_batch(pad_id, extra)
        for n, length in enumerate(lengths):
            padded_ids[n, :length] = ids[n, :length]
        padded, padded_entropy = grpo.token_logprobs(model, padded_ids, padded_mask)
        assert torch.allclose(padded[:, : ids.shape[1]], logprobs, atol=2e-6)
        assert torch.allclose(padded_entropy[:, : ids.shape[1]], entropy, atol=2e-6)
        assert (padded[:, ids.shape[1] :] == 0).all()


def test_pad_equal_to_eos_keeps_the_eos_as_an_action():
    """micro_batches takes masks from lengths, so with pad == eos the EOS is trained and the padding after it is not."""
    rows = [([5, 6, 7, 1], [0, 0, 1, 1]), ([5, 1], [0, 1])]
    _, ids, mask = next(grpo.micro_batches(rows, max_tokens=100, device=CPU, pad_id=1))
    assert ids.tolist() == [[5, 6, 7, 1], [5, 1, 1, 1]] and mask.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    logprobs, _ = grpo.token_logprobs(random_model("llama"), ids, mask)
    assert torch.equal(logprobs != 0, mask.bool())


def test_an_action_at_index_zero_is_refused():
    """Nothing precedes the first token, so it has no log-probability; index -1 would give a wrong one silently."""
    model, mask = random_model("llama"), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="first"):
        grpo.token_logprobs(model, torch.tensor([[2, 3], [4, 5]]), mask)


def test_a_mask_of_another_shape_is_refused():
    """It would broadcast or pick the wrong tokens."""
    with pytest.raises(ValueError, match="mask"):
        grpo.token_logprobs(random_model("llama"), torch.tensor([[2, 3], [4, 5]]), torch.tensor([[0.0, 1.0]]))


# -------------------------------------------------------------------------------------------------------------- chunks

BIG_VOCAB = 200_000  # 2**24 logits are 83 tokens


def test_gradient_by_the_logits_worked_by_hand():
    """z = T * (ln 2, 0, 0), so p = (1/2, 1/4, 1/4), and y = 0: T dlog p[y] / dz = (1/2, -1/4, -1/4).

    H = 1.5 ln 2, and T dH / dz = -p * (log p + H) = ln 2 * (-1/4, 1/8, 1/8).
    """
    ln2, T = 0.6931472, 0.5
    hidden, weight, targets = torch.ones(1, 1), torch.tensor([[T * ln2], [0.0], [0.0]]), torch.tensor([0])
    outputs = grpo.head_logprobs(hidden, weight, targets, T, True)
    assert torch.allclose(outputs, torch.tensor([[-ln2], [1.5 * ln2], [2 * ln2]]))  # log (2 + 1 + 1) = 2 ln 2
    for grads, entropy_grad, expected in (
        ([[1.0], [0.0], [0.0]], False, [1.0, -0.5, -0.5]),
        ([[-3.0], [7.0], [0.0]], False, [-3.0, 1.5, 1.5]),
        ([[0.0], [1.0], [0.0]], True, [-0.5 * ln2, 0.25 * ln2, 0.25 * ln2]),
        ([[2.0], [-4.0], [0.0]], True, [2 + 2 * ln2, -1 - ln2, -1 - ln2]),
    ):
        gradient = grpo.head_gradient(hidden, weight, targets, outputs, torch.tensor(grads), T, entropy_grad)
        assert torch.allclose(gradient, torch.tensor([expected]), atol=1e-6)


def test_in_bfloat16_the_gradient_of_a_likely_token_does_not_drown_in_rounding():
    """z = (8, 0): 1 - p = 1 / (1 + e^8) = 3.3535e-4, which bfloat16 holds to 0.4 %, but not as 1 less 0.99966."""
    hidden, weight, targets = torch.ones(1, 1).bfloat16(), torch.tensor([[8.0], [0.0]]).bfloat16(), torch.tensor([0])
    outputs = grpo.head_logprobs(hidden, weight, targets, 1.0, False)
    gradient = grpo.head_gradient(hidden, weight, targets, outputs, torch.tensor([[1.0], [0.0], [0.0]]), 1.0, False)
    assert gradient.dtype == torch.bfloat16
    assert gradient.float()[0].tolist() == pytest.approx([3.3535e-4, -3.3535e-4], rel=4e-3)


def test_a_head_with_a_bias():
    """Its values and gradients, the bias's own among them."""
    model = random_model("llama")
    model.lm_head = torch.nn.Linear(32, VOCAB)
    model = grpo.prepare_model(model, CPU, False)
    ids, mask, lengths = ragged_batch()
    expected, expected_entropy = by_definition(model, ids, mask, lengths, 0.7)
    logprobs, entropy = grpo.token_logprobs(model, ids, mask, 0.7)
    assert torch.allclose(logprobs, expected, atol=2e-5) and torch.allclose(entropy, expected_entropy, atol=2e-5)
    w = weights_of(mask, 1)
    gradient = gradient_of((w * logprobs + entropy).sum(), model)
    assert model.lm_head.bias.grad.norm() > 0.1
    assert_equal_gradients(gradient, gradient_of((w * expected + expected_entropy).sum(), model))


def test_under_autocast_the_head_computes_in_bfloat16_and_gradients_stay_in_float32(monkeypatch):
    """As on CUDA: values to the three digits of bfloat16, gradients to 4 % of their norm."""
    model, formats = random_model("qwen3"), []
    for name in ("head_logprobs", "head_gradient"):
        function = getattr(grpo, name)
        monkeypatch.setattr(
            grpo, name, lambda h, w, *x, f=function: (formats.append((h.dtype, w.dtype)), f(h, w, *x))[1]
        )
    ids, mask, _ = ragged_batch()
    exact, _ = grpo.token_logprobs(model, ids, mask)
    expected = gradient_of(exact.sum(), model)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logprobs, _ = grpo.token_logprobs(model, ids, mask)
    assert logprobs.dtype == torch.float32 and not torch.equal(logprobs, exact)
    assert torch.allclose(logprobs, exact, atol=0.05)
    assert_equal_gradients(gradient_of(logprobs.sum(), model), expected, tolerance=0.04)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert formats == [(torch.float32,) * 2] * 2 + [(torch.bfloat16,) * 2] * 2


class LargestLogits(TorchDispatchMode):
    """Records the largest tensor whose last dimension is the vocabulary, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == BIG_VOCAB:
                self.largest = max(self.largest, x.numel())
        return result


def test_chunks_of_a_large_vocabulary_give_the_same_and_no_more_than_one_lives():
    """170 actions over 200,000 tokens, 34 million logits in all: values and gradients equal the unchunked ones.

    No tensor over the vocabulary exceeds 2**24 elements, and none is kept for the backward pass.
    """
    shape = {"vocab_size": BIG_VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "intermediate_size": 16}
    model = random_model("qwen3", **shape)
    lengths = [70, 65, 50]
    ids = torch.randint(BIG_VOCAB, (3, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 70)
    for n, length in enumerate(lengths):
        mask[n, 5:length] = 1
    kept = []

    def pack(x):
        kept.append(x.numel() if x.dim() and x.shape[-1] == BIG_VOCAB else 0)
        return x

    w = weights_of(mask, 1)
    with LargestLogits() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logprobs, entropy = grpo.token_logprobs(model, ids, mask, 0.7)
        gradient = gradient_of((w * logprobs + entropy).sum() / 170, model)
    assert 0 < seen.largest <= 2**24
    assert max(kept) == 0
    hidden = model.model(input_ids=ids).last_hidden_state
    log_p = (model.lm_head(hidden) / 0.7).log_softmax(-1)  # (3, 70, V)
    expected = log_p[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    expected_entropy = -(log_p.exp() * log_p).sum(-1)[:, :-1] * mask[:, 1:]
    assert torch.allclose(logprobs[:, 1:], expected, atol=5e-5)
    assert torch.allclose(entropy[:, 1:], expected_entropy, atol=5e-4)
    assert_equal_gradients(gradient, gradient_of((w[:, 1:] * expected + expected_entropy).sum() / 170, model))


# ------------------------------------------------------------------------------------------------- models that are odd


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_prepare_model_accepts_plain_heads(family, gradient_checkpointing):
    """The model comes back ready to train, with the same weights."""
    model = random_model(family)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    prepared = grpo.prepare_model(model, CPU, gradient_checkpointing)
    assert prepared.training and all(torch.equal(a, b) for a, b in zip(before, prepared.parameters()))
    assert (
        sum(getattr(module, "gradient_checkpointing", False) for module in prepared.modules()) > 0
    ) == gradient_checkpointing


def test_gradient_checkpointing_changes_neither_values_nor_gradients():
    """It recomputes the same numbers."""
    ids, mask, _ = ragged_batch()
    results = []
    for gradient_checkpointing in (False, True):
        model = grpo.prepare_model(random_model("qwen3"), CPU, gradient_checkpointing)
        logprobs, entropy = grpo.token_logprobs(model, ids, mask)
        results.append((logprobs, gradient_of((weights_of(mask, 1) * logprobs + entropy).sum(), model)))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert_equal_gradients(results[1][1], results[0][1])


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")
def test_compile_changes_neither_values_nor_gradients():
    """Batches of several shapes through one program for all layers, one for the head and one for its gradient."""
    plain = grpo.prepare_model(random_model("qwen3"), CPU, False)
    model = grpo.prepare_model(random_model("qwen3"), CPU, False)
    model = grpo.shard(model, CPU, grpo.Args(compile=True))
    torch._dynamo.utils.counters.clear()
    for rows, width in ((5, 12), (3, 9), (7, 20), (5, 12)):  # never 32 actions: one program more if it equals a width
        generator = torch.Generator().manual_seed(width)
        ids = torch.randint(1, VOCAB, (rows, width), generator=generator)
        mask = (torch.arange(width) >= torch.randint(1, width, (rows, 1), generator=generator)).float()
        results = []
        for x in (plain, model):
            logprobs, entropy = grpo.token_logprobs(x, ids, mask)
            results.append((logprobs, gradient_of((weights_of(mask, 1) * logprobs + entropy).sum(), x)))
        assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
        assert_equal_gradients(results[1][1], results[0][1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # layers, head, its gradient
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("vocabulary", [VOCAB, 1100])
@pytest.mark.parametrize("graphs", [False, True])
def test_compile_changes_no_sample(vocabulary, graphs):
    """The copy that samples has its norms, MLPs and the draw compiled, the draw as one program for all numbers of rows,
    with many words too, which are drawn in two stages."""
    torch.compiler.reset()
    model, programs = grpo.prepare_model(random_model("qwen3", vocab_size=vocabulary), CPU, False), []
    sampler = grpo.sampling_copy(model, CPU, grpo.Args(compile=True))
    torch._dynamo.utils.counters.clear()
    for temperature, count in ((0.0, 6), (1.0, 6), (0.0, 7), (1.0, 9), (1.0, 20)):
        draws = torch.rand(2 * count, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        asked = ([[5, 6, 7], [8]], count, 20, temperature, list(range(1, vocabulary // 8)), draws, graphs)
        (expected, expected_logprobs), (tokens, logprobs) = (grpo.generate(x, *asked) for x in (model, sampler))
        assert tokens == expected and len(set(map(len, tokens))) > 1
        for a, b in zip(logprobs, expected_logprobs):
            assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5)
        programs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 0 < programs[0] < programs[1] == programs[2] == programs[3] == programs[4]


ODD_HEADS = {
    "soft-capped": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, {"final_logit_softcapping": 30.0}),
    "multiplied": (transformers.CohereForCausalLM, transformers.CohereConfig, {"logit_scale": 0.0625}),
    "divided": (transformers.GraniteForCausalLM, transformers.GraniteConfig, {"logits_scaling": 8.0}),
}


@pytest.mark.parametrize("kind", ODD_HEADS)
@pytest.mark.parametrize("initializer_range", [0.02, 0.5])
def test_prepare_model_refuses_logits_that_are_more_than_the_head(kind, initializer_range):
    """With soft-capping or scaling after the head, token_logprobs would compute another policy than the one sampled.

    Also where fresh weights make logits so small that a cap does not show yet.
    """
    model_class, config_class, options = ODD_HEADS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**(SHAPE | {"head_dim": 16, "initializer_range": initializer_range} | options)))
    with pytest.raises(SystemExit, match="logits"):
        grpo.prepare_model(model, CPU, False)


def test_prepare_model_accepts_the_same_architectures_without_cap_or_scale():
    """It is the cap and the scale that are refused, not the name of the model."""
    for kind, off in (("soft-capped", None), ("multiplied", 1.0), ("divided", 1.0)):
        model_class, config_class, options = ODD_HEADS[kind]
        torch.manual_seed(0)
        options = dict.fromkeys(options, off)
        grpo.prepare_model(model_class(config_class(**(SHAPE | {"head_dim": 16} | options))), CPU, False)


# ------------------------------------------------------------------------------------------------------- micro-batches

ADVANTAGES = torch.tensor([1.5, -0.5, 0.0, -1.0])
LOSSES = {  # kl_coef, entropy_coef; None is the SFT loss
    "sft": None,
    "grpo": (0.0, 0.0),
    "grpo with kl": (0.3, 0.0),
    "grpo with an entropy bonus": (0.0, 0.3),
    "grpo with both": (0.3, 0.3),
}


def rows_of_a_step():
    """Four rows of 9, 12, 3 and 6 tokens: ids, mask and how far the old log-probability is off. One hole."""
    generator, rows = torch.Generator().manual_seed(5), []
    for length, prompt in ((9, 2), (12, 3), (3, 2), (6, 1)):
        ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        shift = (torch.rand(length, generator=generator) - 0.5).tolist()  # ratios up to 1.65, beyond both bounds
        rows.append((ids, [0] * prompt + [1] * (length - prompt), shift))
    rows[1][1][6:8] = [0, 0]
    return rows


def partitions(items):
    """Every way to split a list into groups: 15 for 4 items."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [items[0], *group], *rest[i + 1 :]]


def step_gradient(kind, split, policy, reference):
    """Loss and gradient of one optimizer step whose rows come in the groups of `split`, composed as in main."""
    rows, total = rows_of_a_step(), 0.0
    policy.zero_grad()
    for group in split:
        batch, ids, mask, shift = next(grpo.micro_batches([rows[n] for n in group], max_tokens=10**6, device=CPU))
        advantages = ADVANTAGES[[group[i] for i in batch]]
        if LOSSES[kind] is None:
            logprobs, _ = sft.token_logprobs(policy, ids, mask)
            loss = sft.sft_loss(logprobs, mask, num_tokens=7 + 7 + 1 + 5)  # trained tokens of the four rows
        else:
            kl_coef, entropy_coef = LOSSES[kind]
            logprobs, entropy = grpo.token_logprobs(policy, ids, mask, 0.7)
            with torch.no_grad():
                ref_logprobs = grpo.token_logprobs(reference, ids, mask, 0.7)[0] if kl_coef else None
            old_logprobs = logprobs.detach() + shift
            loss = grpo.grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, 0.2, kl_coef, num_sequences=4)
            loss = loss - entropy_coef * ((entropy * mask).sum(1) / mask.sum(1)).sum() / 4
        loss.backward()
        total += loss.item()
    return total, torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(kind):
    """All 15 partitions of four ragged rows, each group padded to its own longest row, to 1e-5 of the norm."""
    policy, reference = random_model("qwen3"), random_model("qwen3")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    splits = list(partitions([0, 1, 2, 3]))
    assert len(splits) == 15
    whole, gradient = step_gradient(kind, [[0, 1, 2, 3]], policy, reference)
    for split in splits:
        loss, split_gradient = step_gradient(kind, split, policy, reference)
        assert loss == pytest.approx(whole, rel=1e-5)
        assert_equal_gradients(split_gradient, gradient)


@pytest.mark.parametrize("kind", ["sft", "grpo with both"])
def test_loss_and_gradient_do_not_depend_on_the_token_budget(kind):
    """Budgets of micro_batches from one row at a time (1) to all at once (48): the step has the same gradient."""
    policy, reference = random_model("llama"), random_model("llama", initializer_range=0.15)
    rows, results = rows_of_a_step(), []
    for budget in (1, 12, 18, 24, 36, 48):
        split = [batch for batch, *_ in grpo.micro_batches(rows, max_tokens=budget, device=CPU)]
        results.append((len(split), *step_gradient(kind, split, policy, reference)))
    assert [count for count, *_ in results] == [4, 3, 3, 2, 2, 1]
    for _, loss, gradient in results:
        assert loss == pytest.approx(results[-1][1], rel=1e-5)
        assert_equal_gradients(gradient, results[-1][2])
