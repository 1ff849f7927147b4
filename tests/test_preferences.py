"""rm.py and dpo.py: losses worked by hand, what they converge to, the reward that is read, and pairs as ids."""

import math

import pytest
import torch
import transformers

import dpo
import rm
import sft
from test_data import CHATML, EOS, IM_END, KINDS, MARKERS, PAD, VOCAB, byte_tokenizer, spell
from test_logprobs import FAMILIES, SHAPE, assert_equal_gradients, gradient_of, random_model

CPU = torch.device("cpu")
LN2, LN3 = math.log(2), math.log(3)
BOTH = pytest.mark.parametrize("script", [rm, dpo])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scorer(tiny_folder):
    """The tiny language model with a new head; not to be changed."""
    return rm.load_scorer(tiny_folder, CPU, False, "--model", head_scale=1.0)


def descend(loss_of, x, rate, steps):
    """Plain gradient descent on the scalar loss_of(x)."""
    x = x.clone().requires_grad_()
    for _ in range(steps):
        x.data -= rate * torch.autograd.grad(loss_of(x), x)[0]
    return x.detach()


def approx(values, tolerance=1e-6):
    return pytest.approx(values, abs=tolerance)


# -------------------------------------------------------------------------------------------------- bradley_terry_loss


def test_bradley_terry_by_hand():
    """sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4, sigmoid(0) = 1/2: ln 4/3 = .287682, ln 4 = 1.386294, ln 2."""
    losses = rm.bradley_terry_loss(
        chosen_rewards=torch.tensor([LN3, 0.0, 5.0, 2 - LN3]), rejected_rewards=torch.tensor([0.0, LN3, 5.0, 2.0])
    )
    assert losses.tolist() == approx([0.287682, 1.386294, LN2, 1.386294])


def test_the_margin_is_taken_off_the_gap():
    """Gaps ln 3, 0, -ln 3 less ln 3: sigmoid(0), sigmoid(-ln 3), sigmoid(-2 ln 3) = 1/10: ln 2, ln 4, ln 10.

    A margin for each pair, ln 3, 0 and -ln 3: gaps 0, 0, 0. A margin that were added would give ln 10/9 for the first.
    """
    chosen, rejected = torch.tensor([LN3, 1.0, 0.0]), torch.tensor([0.0, 1.0, LN3])
    assert rm.bradley_terry_loss(chosen, rejected, margin=LN3).tolist() == approx([LN2, math.log(4), math.log(10)])
    margins = torch.tensor([LN3, 0.0, -LN3])
    assert rm.bradley_terry_loss(chosen, rejected, margins).tolist() == approx([LN2, LN2, LN2])


def test_centering_by_hand():
    """.01 * (3 + 1)^2 = .16; .01 * (3 - 3)^2 = 0; .01 * (-2 - 3)^2 = .25, each on top of what the gap costs."""
    chosen, rejected = torch.tensor([3.0, 3.0, -2.0]), torch.tensor([1.0, -3.0, -3.0])
    gap_alone = rm.bradley_terry_loss(chosen, rejected)
    centered = rm.bradley_terry_loss(chosen, rejected, center_coef=0.01)
    assert (centered - gap_alone).tolist() == approx([0.16, 0.0, 0.25])


@pytest.mark.parametrize(("margin", "center_coef"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (-1.0, 0.25)])
def test_gradient_of_bradley_terry(margin, center_coef):
    """In r_c it is -sigmoid(-(r_c - r_r - margin)) + 2 center_coef (r_c + r_r); in r_r the first term has sign +."""
    chosen = torch.tensor([LN3, -1.0, 2.0], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0, 2.0], requires_grad=True)
    loss = rm.bradley_terry_loss(chosen, rejected, margin, center_coef).sum()
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    for i, (c, r) in enumerate(((LN3, 0.0), (-1.0, 2.0), (2.0, 2.0))):
        weight = 1 / (1 + math.exp(c - r - margin))
        assert gradients[0][i].item() == approx(-weight + 2 * center_coef * (c + r))
        assert gradients[1][i].item() == approx(weight + 2 * center_coef * (c + r))


def test_gradient_of_bradley_terry_in_numbers():
    """Gap ln 3: weight 1/4; gap -ln 3: 3/4; gap 0: 1/2. The pair that is already right counts a third of the wrong."""
    chosen, rejected = torch.tensor([LN3, 0.0, 1.0], requires_grad=True), torch.tensor([0.0, LN3, 1.0])
    gradient = torch.autograd.grad(rm.bradley_terry_loss(chosen, rejected).sum(), chosen)[0]
    assert gradient.tolist() == approx([-0.25, -0.75, -0.5])


def test_bradley_terry_is_the_two_way_softmax_of_the_rewards():
    """sigmoid(r_c - r_r) = exp(r_c) / (exp(r_c) + exp(r_r)): the loss is the cross-entropy of choosing the first."""
    rewards = 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(rewards, torch.zeros(50, dtype=torch.long), reduction="none")
    assert torch.allclose(rm.bradley_terry_loss(*rewards.T), expected, rtol=1e-12, atol=0)
    by_definition = -(rewards[:, 0].exp() / rewards.exp().sum(1)).log()
    assert torch.allclose(rm.bradley_terry_loss(*rewards.T), by_definition, rtol=1e-9, atol=0)


def test_a_constant_changes_nothing_but_the_centering():
    """(r_c + 5) - (r_r + 5) = r_c - r_r; of the sum r_c + r_r = 1 and 2 the squares become 11^2 and 12^2.

    At center_coef .01 that is .01 * (121 - 1) = 1.2 and .01 * (144 - 4) = 1.4 more.
    """
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.5])
    without = rm.bradley_terry_loss(chosen + 5, rejected + 5) - rm.bradley_terry_loss(chosen, rejected)
    assert without.tolist() == approx([0.0, 0.0])
    losses = [rm.bradley_terry_loss(chosen + c, rejected + c, center_coef=0.01) for c in (5, 0)]
    assert (losses[0] - losses[1]).tolist() == approx([1.2, 1.4], 1e-5)


def test_extreme_gaps_stay_finite():
    """-log sigmoid(200) is 0, -log sigmoid(-200) is 200, in float32; the gradients are 0 and -1."""
    chosen, rejected = torch.tensor([200.0, 0.0], requires_grad=True), torch.tensor([0.0, 200.0])
    losses = rm.bradley_terry_loss(chosen, rejected)
    assert losses.tolist() == [0.0, 200.0]
    assert torch.autograd.grad(losses.sum(), chosen)[0].tolist() == [0.0, -1.0]


@pytest.mark.parametrize(("first", "second"), [((3,), (2,)), ((3,), (1,)), ((3, 1), (3, 1)), ((3, 1), (3,)), ((), ())])
def test_rewards_of_other_shapes_are_refused(first, second):
    """(3,) against (1,) would broadcast, (3, 1) against (3,) would give 9 pairs."""
    with pytest.raises(ValueError, match="shape"):
        rm.bradley_terry_loss(torch.zeros(first), torch.zeros(second))


def test_a_margin_of_another_shape_is_refused():
    """A column of margins, (3, 1), would make 9 losses of 3 pairs."""
    with pytest.raises(ValueError):
        rm.bradley_terry_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))


# ---------------------------------------------------------------------------------------- what noisy labels converge to

TRUE_REWARDS = torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=torch.float64)
FIRST, SECOND = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T  # the 12 ordered pairs
PREFERRED = (TRUE_REWARDS[FIRST] - TRUE_REWARDS[SECOND]).sigmoid()  # P(first > second)


def differences(rewards):
    """All r_i - r_j."""
    return rewards[:, None] - rewards[None, :]


@pytest.mark.parametrize("center_coef", [0.0, 0.01])
def test_noisy_labels_of_bradley_terry_converge_to_the_true_rewards(center_coef):
    """Expected loss over the labels, sum P(i > j) loss(r_i, r_j) / 6: its minimum has the true differences.

    P(i > j) sigmoid(-gap) = P(j > i) sigmoid(gap) makes the gradient 0. The gradient sums to 0 over the items, so that
    the mean, here 3, stays where it started. Centering brings it to 0 exactly, since sum_{i<j} (2 m + d_i + d_j)^2 has
    no term in m alone when the d_i add up to 0, and costs the differences a little.
    """
    start = torch.tensor([3.0, 4.0, 3.0, 2.0], dtype=torch.float64)

    def loss(r):
        return (PREFERRED * rm.bradley_terry_loss(r[FIRST], r[SECOND], 0.0, center_coef)).sum() / 6

    rewards = descend(loss, start, rate=2.0, steps=2000)
    if center_coef:
        assert rewards.mean().item() == approx(0.0, 1e-9)
        assert (differences(rewards) - differences(TRUE_REWARDS)).abs().max() < 0.3
    else:
        assert torch.allclose(differences(rewards), differences(TRUE_REWARDS), atol=1e-8)
        assert rewards.mean().item() == approx(3.0, 1e-9)


def test_a_sample_of_noisy_labels_gives_the_true_rewards_roughly():
    """100,000 labels for each of the six pairs. A label's information is p (1 - p), at least .07 (gap 2.5).

    One pair alone gives its gap to 1 / sqrt(7,000) = .012; five of these are .06.
    """
    once = FIRST < SECOND
    probabilities = PREFERRED[once].repeat_interleave(100_000)
    labels = torch.bernoulli(probabilities, generator=torch.Generator().manual_seed(0)).view(6, -1)
    wins = labels.sum(1) / 100_000
    assert 0.05 < wins.min() < wins.max() < 0.95  # many a label goes against the true order

    def loss(r):
        a, b = r[FIRST[once]], r[SECOND[once]]
        return (wins * rm.bradley_terry_loss(a, b) + (1 - wins) * rm.bradley_terry_loss(b, a)).sum() / 6

    rewards = descend(loss, torch.zeros(4, dtype=torch.float64), rate=2.0, steps=500)
    assert (differences(rewards) - differences(TRUE_REWARDS)).abs().max() < 0.06


# --------------------------------------------------------------------------------------------- correlation, calibration


def test_correlation_by_hand():
    """Differences 1, -2, 0 and 2, -1, 5: (2 + 2 + 0) / sqrt((1 + 4) (4 + 1 + 25)) = 4 / sqrt(150) = .326599."""
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [6.0, 1.0]])
    assert rm.correlation(x, y) == approx(0.326599)
    of_prompt = torch.tensor([[100.0], [-50.0], [7.0]])  # what both sides share drops out
    assert rm.correlation(x + of_prompt, y - of_prompt) == approx(0.326599, 1e-5)


def test_correlation_is_that_of_all_values_less_their_pairs_mean():
    """Pearson's, over the 2N values: the mean of what is left is 0 by construction."""
    x, y = torch.randn(2, 20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rest = torch.stack([(z - z.mean(1, keepdim=True)).flatten() for z in (x, y)])
    assert rm.correlation(x, y) == approx(torch.corrcoef(rest)[0, 1].item(), 1e-12)


def test_correlation_of_equal_opposite_and_constant_quantities():
    """1, -1, and NaN where one of them never differs within a pair."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert rm.correlation(x, 3 * x + 1) == approx(1.0) and rm.correlation(x, -x) == approx(-1.0)
    assert math.isnan(rm.correlation(x, torch.tensor([[4.0, 4.0], [5.0, 5.0]])))
    assert math.isnan(rm.correlation(torch.ones(2, 2), x))


def logit(p):
    return math.log(p / (1 - p))


def test_calibration_by_hand():
    """A tie (.5, counts half), right at .52, wrong at .53: bin 0 predicts 1.55/3 and observes 1.5/3.

    Right at .77: bin 5. Right and wrong at a gap of 200, predicted 1: bin 9 observes 1/2. The rest is empty: NaN.
    Error: (3 * .05/3 + 1 * .23 + 2 * .5) / 6 = 1.28 / 6.
    """
    gaps = torch.tensor([0.0, logit(0.52), -logit(0.53), logit(0.77), 200.0, -200.0])
    result = rm.calibration(chosen_rewards=gaps + 1, rejected_rewards=torch.ones(6))
    expected = {0: (1.55 / 3, 0.5, 3), 5: (0.77, 1.0, 1), 9: (1.0, 0.5, 2)}
    for k in range(10):
        values = [result.pop(f"{name}_{k}") for name in ("predicted", "observed", "pairs")]
        if k in expected:
            assert values == approx(expected[k])
        else:
            assert math.isnan(values[0]) and math.isnan(values[1]) and values[2] == 0
    assert result == {"error": approx(1.28 / 6)}


def test_the_bins_of_calibration_start_at_one_half_and_are_a_twentieth_wide():
    """Just inside both ends of each bin: .501 and .549 for bin 0, .951 and .999 for bin 9."""
    for k in range(10):
        for inside in (0.501, 0.549):
            gap = torch.tensor([logit(inside + k / 20)])
            assert rm.calibration(gap, torch.zeros(1))[f"pairs_{k}"] == 1


def test_a_true_bradley_terry_model_is_calibrated_and_an_overconfident_one_is_not():
    """Labels drawn from sigmoid(gap), 100,000 of them: the observed share is the predicted one, to about .002 per bin.

    With all gaps tripled the model predicts more than it observes.
    """
    generator = torch.Generator().manual_seed(0)
    gap = torch.randn(100_000, generator=generator)
    sign = 2 * torch.bernoulli(gap.sigmoid(), generator=generator) - 1  # of chosen less rejected
    result = rm.calibration(gap * sign, torch.zeros(100_000))
    assert sum(result[f"pairs_{k}"] for k in range(10)) == 100_000 and result["error"] < 0.01
    overconfident = rm.calibration(3 * gap * sign, torch.zeros(100_000))
    assert overconfident["error"] > 0.1
    assert all(overconfident[f"observed_{k}"] < overconfident[f"predicted_{k}"] for k in range(1, 10))


def sides(*lengths):
    """Pairs of (ids, mask) of these lengths."""
    return [tuple(([2] * length, [1] * length) for length in pair) for pair in lengths]


def test_evaluate_rewards_by_hand():
    """Gaps 1, 0, -2, 3: accuracy (1 + 1/2 + 0 + 1) / 4, margin 2/4. Lengths differ by 1, 0, 1, 3: (3 + 1/2) / 4.

    Mean 6/8, mean square 16/8, so the variance is 2 - 9/16. Length: (1 + 0 - 2 + 9) / sqrt(14 * 11) = 8 / sqrt(154).
    Loss: (.313262 + .693147 + 2.126928 + .048587) / 4. Calibration: the side with the higher reward is predicted with
    .731059 (and is the chosen one), .5 (a tie), .880797 (it is not), .952574 (it is), each in a bin of its own:
    (.268941 + 0 + .880797 + .047426) / 4 = .299291.
    """
    rewards = torch.tensor([[2.0, 1.0], [0.0, 0.0], [-1.0, 1.0], [3.0, 0.0]])
    metrics = rm.evaluate_rewards(rewards, sides((3, 2), (2, 2), (6, 5), (4, 1)))
    expected = {
        "eval/loss": 0.795481, "eval/pair_accuracy": 0.625, "eval/margin": 0.5, "eval/reward_mean": 0.75,
        "eval/reward_std": math.sqrt(2 - 9 / 16), "eval/longer_wins": 0.875,
        "eval/length_correlation": 8 / math.sqrt(154), "eval/calibration_error": 0.299291,
    }  # fmt: skip
    assert {name: value for name, value in metrics.items() if name.startswith("eval/")} == approx(expected, 2e-6)
    assert [metrics[f"calibration/pairs_{k}"] for k in range(10)] == [1, 0, 0, 0, 1, 0, 0, 1, 0, 1]
    assert metrics["calibration/observed_7"] == 0.0 and metrics["calibration/observed_9"] == 1.0


def test_margin_of_a_row():
    """A number, also as text; 0 where the column is missing or empty; anything else ends the run and names it."""
    assert [rm.margin_of(row) for row in ({}, {"margin": None}, {"margin": ""}, {"margin": 0})] == [0.0] * 4
    assert [rm.margin_of({"margin": x}) for x in (2, "0.5", -1.5)] == [2.0, 0.5, -1.5]
    for bad in ("slightly", math.nan, math.inf, [1.0]):
        with pytest.raises(SystemExit, match="`margin`"):
            rm.margin_of({"margin": bad})


# --------------------------------------------------------------------------------------------------------------- score


def texts_batch(pad_id=0, extra=0, vocab=48):
    """Four texts of 9, 5, 1 and 7 tokens, right-padded; each closes with EOS (1), the first has one inside as well."""
    lengths, generator = [9, 5, 1, 7], torch.Generator().manual_seed(4)
    ids, mask = torch.full((4, 9 + extra), pad_id), torch.zeros(4, 9 + extra)
    for n, length in enumerate(lengths):
        ids[n, :length] = torch.randint(2, vocab, (length,), generator=generator)
        ids[n, length - 1], mask[n, :length] = 1, 1.0
    ids[0, 4] = 1
    return ids, mask, lengths


def random_scorer(family, folder, **changes):
    """A tiny causal model of another architecture, given a head by load_scorer."""
    random_model(family, **changes).save_pretrained(folder)
    return rm.load_scorer(str(folder), CPU, False, "--model", head_scale=1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_the_head_on_the_last_token_by_lengths_and_what_transformers_computes(family, tmp_path):
    """Each text alone, unpadded: the head on hidden[length - 1]. And the classifier's logits of the padded batch."""
    model = random_scorer(family, tmp_path)
    ids, mask, lengths = texts_batch()
    rewards = rm.score(model, ids, mask)
    assert rewards.shape == (4,) and rewards.dtype == torch.float32 and rewards.std() > 0.1
    for n, length in enumerate(lengths):
        hidden = model.base_model(input_ids=ids[n : n + 1, :length]).last_hidden_state[0]
        assert rewards[n].item() == approx((model.score.weight[0] @ hidden[length - 1]).item(), 1e-5)
        if length > 1:
            assert abs(rewards[n].item() - (model.score.weight[0] @ hidden[length - 2]).item()) > 1e-3
    assert model.config.pad_token_id == 0
    logits = model(input_ids=ids, attention_mask=mask.long()).logits
    assert torch.allclose(rewards, logits[:, 0], atol=1e-5)


@pytest.mark.parametrize(("pad_id", "extra"), [(0, 6), (1, 0), (1, 6), (7, 3)])
def test_padding_does_not_change_the_score(scorer, pad_id, extra):
    """Neither its amount nor its id, EOS (1) included: the index comes from lengths."""
    plain, padded = (rm.score(scorer, *texts_batch(*options)[:2]) for options in ((), (pad_id, extra)))
    assert torch.allclose(plain, padded, atol=1e-6) and plain.std() > 1e-2


def test_the_gradient_of_the_score_reaches_real_tokens_and_no_padding(scorer):
    """Through attention each token of the text plays a part; what pads the row plays none."""
    embeddings = []

    def keep(module, inputs, output):
        output.retain_grad()
        embeddings.append(output)

    handle = scorer.get_input_embeddings().register_forward_hook(keep)
    ids, mask, _ = texts_batch(pad_id=1, extra=2)
    rm.score(scorer, ids, mask).sum().backward()
    handle.remove()
    scorer.zero_grad()
    assert torch.equal(embeddings[0].grad.abs().sum(-1) > 0, mask.bool())


@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_score_pairs_keeps_the_order_of_the_pairs(scorer, budget):
    """(N, 2), chosen and rejected, whatever the token budget: each is the score of that text alone."""
    pairs = scored(random_pairs())
    rewards = rm.score_pairs(scorer, pairs, budget)
    assert rewards.shape == (6, 2) and not rewards.requires_grad
    for n, pair in enumerate(pairs):
        for side, (ids, _) in enumerate(pair):
            alone = rm.score(scorer, torch.tensor([ids]), torch.ones(1, len(ids)))
            assert rewards[n, side].item() == approx(alone.item(), 1e-5)


# --------------------------------------------------------------------------------------------------------- load_scorer


def test_the_new_head_has_variance_one_over_width_plus_one(tmp_path):
    """4,096 draws: mean 0 within 5 / 64 deviations, and (D + 1) times the variance 1 within 5 sqrt(2 / 4096) = .11."""
    wide = {"hidden_size": 4096, "num_hidden_layers": 1, "intermediate_size": 8}
    weight = random_scorer("qwen3", tmp_path, **wide).score.weight.detach().double() * math.sqrt(4097)
    assert weight.shape == (1, 4096)
    assert abs(weight.mean().item()) < 5 / 64 and abs(weight.square().mean().item() - 1) < 0.11
    scaled = rm.load_scorer(str(tmp_path), CPU, False, "--model", head_scale=3.0).score.weight.detach().double()
    assert torch.allclose(scaled * math.sqrt(4097), 3 * weight, atol=1e-5)


def test_the_new_head_depends_on_the_seed_alone_and_is_bias_free(tiny_folder):
    """Whatever the global generator did; the body is the language model's; all in float32 and ready to train."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(rm.load_scorer(tiny_folder, CPU, False, "--model", head_scale=1.0))
    assert torch.equal(models[0].score.weight, models[1].score.weight)
    other = rm.load_scorer(tiny_folder, CPU, False, "--model", head_scale=1.0, seed=1)
    assert (other.score.weight - models[0].score.weight).abs().max() > 0.1
    assert models[0].score.bias is None and models[0].config.num_labels == 1 and models[0].training
    body = sft.tiny_model(0).model.state_dict()
    assert all(torch.equal(x, body[name]) for name, x in models[0].model.state_dict().items())
    assert {parameter.dtype for parameter in models[0].parameters()} == {torch.float32}


def test_a_head_of_scale_zero_scores_zero(tiny_folder):
    """The value model of a policy starts there: every value is exactly 0, and the head can still learn."""
    model = rm.load_scorer(tiny_folder, CPU, False, "--value-model", head_scale=0.0)
    rewards = rm.score(model, *texts_batch()[:2])
    assert rewards.tolist() == [0.0] * 4
    (gradient,) = torch.autograd.grad(rewards.sum(), model.score.weight)
    assert gradient.norm() > 0.1


def test_a_classifiers_own_head_is_kept(scorer, tmp_path):
    """Its folder is loaded as it is, whatever head_scale says; weights in bfloat16 come back in float32."""
    scorer.save_pretrained(tmp_path / "a")
    again = rm.load_scorer(str(tmp_path / "a"), CPU, False, "--model", head_scale=0.0)
    assert torch.equal(again.score.weight, scorer.score.weight)
    again.to(torch.bfloat16).save_pretrained(tmp_path / "b")
    half = rm.load_scorer(str(tmp_path / "b"), CPU, False, "--model", head_scale=1.0)
    assert half.score.weight.dtype == torch.float32
    assert torch.equal(half.score.weight, scorer.score.weight.bfloat16().float())


def test_dropout_is_off(tmp_path):
    """A folder with dropout .5 everywhere, in training mode: two passes agree, and no layer would drop anything."""
    model = random_scorer("gpt2", tmp_path, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ids, mask, _ = texts_batch()
    assert model.training and torch.equal(rm.score(model, ids, mask), rm.score(model, ids, mask))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_an_encoder_is_refused(kind, tmp_path):
    """It sees padding and later tokens, and its head is another: the message names the flag and the folder."""
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, num_labels=1
    )
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=rf"^--model {tmp_path}.*(head|weights)"):
        rm.load_scorer(str(tmp_path), CPU, False, "--model", head_scale=1.0)


def test_two_labels_are_refused(tmp_path):
    """A reward is one number."""
    config = transformers.Qwen3Config(**SHAPE, head_dim=16, num_labels=2)
    transformers.Qwen3ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2 labels"):
        rm.load_scorer(str(tmp_path), CPU, False, "--model", head_scale=1.0)


# ------------------------------------------------------------------------------------------------ prepare_reward_model


def tokenizer_without_pad(pad_token, chat_template=CHATML):
    """The byte tokenizer of 261 tokens, of which none is <|pad|>; its EOS is 0 and <|im_end|> 3."""
    markers = MARKERS[:-1]
    table = {token: i for i, token in enumerate([*markers, *[token for token in VOCAB if token not in MARKERS]])}
    special = {"unk_token": None, "eos_token": "<|endoftext|>", "bos_token": None, "pad_token": pad_token}
    tokenizer = transformers.Qwen2Tokenizer(table, [], extra_special_tokens=markers, **special)
    tokenizer.chat_template = chat_template
    assert len(tokenizer) == 261 and "<|pad|>" not in tokenizer.get_vocab()
    return tokenizer


def fresh_scorer(tiny_folder):
    return rm.load_scorer(tiny_folder, CPU, False, "--model", head_scale=1.0)


@pytest.mark.parametrize("pad_token", [None, "<|endoftext|>", "<|im_end|>"])
def test_a_pad_token_of_its_own_is_added_where_there_is_none(pad_token, tiny_folder):
    """None, EOS, or another token that ends a turn: <|pad|>, number 261, is added with an embedding of zeros.

    The other 261 embeddings, and the score, stay what they were.
    """
    model, tokenizer = fresh_scorer(tiny_folder), tokenizer_without_pad(pad_token)
    before, rewards = model.get_input_embeddings().weight.detach().clone(), rm.score(model, *texts_batch()[:2])
    rm.prepare_reward_model(model, tokenizer, [0, 3])
    assert tokenizer.pad_token_id == model.config.pad_token_id == 261 and len(tokenizer) == 262
    after = model.get_input_embeddings().weight
    assert after.shape == (262, 128) == (model.config.vocab_size, 128)
    assert torch.equal(after[:261], before) and (after[261] == 0).all()
    assert torch.equal(rm.score(model, *texts_batch()[:2]), rewards)


def test_a_pad_token_that_ends_nothing_stays(tiny_folder):
    """Nothing is added and nothing resized."""
    model, tokenizer = fresh_scorer(tiny_folder), sft.tiny_tokenizer()
    rm.prepare_reward_model(model, tokenizer, [tokenizer.eos_token_id])
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0 and len(tokenizer) == 261
    assert model.get_input_embeddings().weight.shape == (261, 128)


def test_embeddings_that_have_room_are_not_resized(tmp_path):
    """320 rows for 262 tokens, as where a vocabulary is rounded up: they must not shrink either."""
    model, tokenizer = random_scorer("qwen3", tmp_path, vocab_size=320), tokenizer_without_pad("<|endoftext|>")
    before = model.get_input_embeddings().weight.detach().clone()
    rm.prepare_reward_model(model, tokenizer, [0, 3])
    assert torch.equal(model.get_input_embeddings().weight, before) and model.config.vocab_size == 320
    assert model.config.pad_token_id == tokenizer.pad_token_id == 261


def test_resizing_draws_nothing_that_shows(tiny_folder):
    """Two runs with different global seeds end with the same weights, bit for bit."""
    weights = []
    for seed in (1, 2):
        model = fresh_scorer(tiny_folder)
        torch.manual_seed(seed)
        rm.prepare_reward_model(model, tokenizer_without_pad(None), [0, 3])
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


class Doubled(transformers.Qwen3ForSequenceClassification):
    """A classifier whose logits are more than its head on the last hidden state."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_classifier_that_is_more_than_its_head_is_refused(scorer):
    """`score` would learn one reward, and transformers compute another from the saved folder."""
    model = Doubled(scorer.config)
    model.load_state_dict(scorer.state_dict())
    with pytest.raises(SystemExit, match="another score"):
        rm.prepare_reward_model(model, sft.tiny_tokenizer(), [1])


SAVED = {
    "tiny": lambda: (sft.tiny_tokenizer(), [1]),
    "pad is EOS": lambda: (tokenizer_without_pad("<|endoftext|>"), [0, 3]),
    "pad is EOS, no template": lambda: (tokenizer_without_pad("<|endoftext|>", chat_template=None), [0]),
    "pad is the end of turn": lambda: (tokenizer_without_pad("<|im_end|>"), [0, 3]),
    "no pad": lambda: (tokenizer_without_pad(None), [0, 3]),
}


@pytest.mark.parametrize("kind", SAVED)
def test_transformers_alone_scores_a_saved_folder_the_same(kind, tiny_folder, tmp_path):
    """Saved as the run saves it, loaded by the Auto classes, padded by the tokenizer that lies in the folder: 1e-5."""
    model, (tokenizer, eos_ids) = fresh_scorer(tiny_folder), SAVED[kind]()
    rm.prepare_reward_model(model, tokenizer, eos_ids)
    texts = [("2+2=", "#### 4"), ("1+2+3=", "1+2=3\n3+3=6\n#### 6"), ("Hi", "x"), ("7+5=", "7+5=12\n#### 12")]
    pairs = [rm.encode_scored_pair(tokenizer, {"prompt": p, "chosen": c, "rejected": c + "!"}, None) for p, c in texts]
    rewards = rm.score_pairs(model, pairs, max_tokens=100)
    model.to(torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    own = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1 and loaded.config.pad_token_id == own.pad_token_id not in eos_ids
    batch = own.pad({"input_ids": [ids for pair in pairs for ids, _ in pair]}, return_tensors="pt")
    with torch.no_grad():
        logits = loaded(**batch).logits[:, 0].view(-1, 2)
    assert torch.allclose(logits, rewards, atol=1e-5) and rewards.std() > 1e-2


def test_with_pad_equal_to_eos_transformers_would_read_another_token(tiny_folder):
    """Why the folder needs a pad token of its own: the closing EOS looks like padding, so the token before is read."""
    model, (ids, mask, lengths) = fresh_scorer(tiny_folder), texts_batch(pad_id=1)
    model.config.pad_token_id = 1
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
        one_early = mask * (torch.arange(9) < torch.tensor(lengths)[:, None] - 1)
        longer = [n for n, length in enumerate(lengths) if length > 1]
        assert torch.allclose(logits[longer], rm.score(model, ids[longer], one_early[longer]), atol=1e-6)
        assert (logits - rm.score(model, ids, mask))[longer].abs().min() > 1e-3


# ------------------------------------------------------------------------------------------------------------ dpo_loss


def dpo_by_z(z, beta=0.1, label_smoothing=0.0):
    """dpo_loss of pairs whose log-odds are z: the chosen completion's log-probability lies z / beta above its
    reference's, the rejected one's equals it. Losses and gradients in both log-probabilities."""
    chosen, rejected = -20 + torch.tensor(z) / beta, torch.full((len(z),), -12.0)
    ref_chosen, ref_rejected = torch.full((len(z),), -20.0), torch.full((len(z),), -12.0)
    chosen.requires_grad_(), rejected.requires_grad_()
    losses, *_ = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing)
    return losses, *torch.autograd.grad(losses.sum(), (chosen, rejected))


def test_dpo_by_hand():
    """log pi -10 and -12, log pi_ref -11 and -11.5, beta .1: rewards .1 and -.05, z = .15, ln(1 + e^-.15) = .620957.

    With smoothing .1: .9 * .620957 + .1 * (.620957 + .15) = .635957.
    """
    inputs = [torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.5)]
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(*inputs, beta=0.1)
    assert losses.shape == (1,) and losses.item() == approx(0.620957)
    assert (chosen_rewards.item(), rejected_rewards.item()) == (approx(0.1), approx(-0.05))
    smoothed, *rewards = dpo.dpo_loss(*inputs, beta=0.1, label_smoothing=0.1)
    assert smoothed.item() == approx(0.635957) and rewards == [chosen_rewards, rejected_rewards]


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_the_loss_is_ln_2_where_policy_and_reference_agree(beta, label_smoothing):
    """z = 0 whatever the log-probabilities: both sigmoids are 1/2."""
    chosen, rejected = torch.tensor([-3.0, -50.0]), torch.tensor([-7.0, -1.0])
    losses, *rewards = dpo.dpo_loss(chosen, rejected, chosen, rejected, beta, label_smoothing)
    assert losses.tolist() == approx([LN2, LN2]) and torch.stack(rewards).abs().max() == 0


def test_only_the_log_ratios_count():
    """Adding 4 to both the policy's and the reference's log-probability of one side changes nothing."""
    chosen, rejected = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -2.0])
    ref_chosen, ref_rejected = torch.tensor([-4.0, -6.0]), torch.tensor([-6.0, -2.5])
    losses, *_ = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.1)
    shifted, *_ = dpo.dpo_loss(chosen + 4, rejected, ref_chosen + 4, ref_rejected, 0.1)
    assert shifted.tolist() == approx(losses.tolist()) and losses[0] != losses[1]


def test_gradient_of_dpo_weighs_a_pair_by_beta_times_how_wrong_it_is():
    """z = ln 3, 0, -ln 3: sigmoid(-z) = 1/4, 1/2, 3/4, times beta .1; the sign raises the chosen side.

    At z = 5 a pair that is right counts .1 / (1 + e^5) = .000669, at z = -5 its opposite .099331.
    """
    losses, chosen, rejected = dpo_by_z([LN3, 0.0, -LN3, 5.0, -5.0])
    assert losses[:3].tolist() == approx([math.log(4 / 3), LN2, math.log(4)], 1e-5)
    assert chosen.tolist() == approx([-0.025, -0.05, -0.075, -0.000669, -0.099331])
    assert torch.equal(rejected, -chosen)


def test_the_gradient_scales_with_beta_at_the_start():
    """z = 0: beta / 2."""
    for beta in (0.05, 0.1, 0.5):
        assert dpo_by_z([0.0], beta)[1].item() == approx(-beta / 2)


def test_label_smoothing_of_right_and_wrong_pairs():
    """eps 1/4, z = ln 3: 3/4 ln 4/3 + 1/4 ln 4 = .562335; z = -ln 3: 3/4 ln 4 + 1/4 ln 4/3 = 1.111641.

    d/dz = -3/4 sigmoid(-z) + 1/4 sigmoid(z) is 0 at z = ln 3, -9/16 + 1/16 = -1/2 at -ln 3, and at z = ln 27, with
    sigmoid 27/28: (-3 + 27) / 112 = 3/14 > 0: a pair that is surer than the labels are is pulled back.
    """
    losses, chosen, rejected = dpo_by_z([LN3, -LN3, 3 * LN3], beta=0.1, label_smoothing=0.25)
    assert losses[:2].tolist() == approx([0.562335, 1.111641], 1e-5)
    assert chosen.tolist() == approx([0.0, -0.05, 0.1 * 3 / 14]) and torch.equal(rejected, -chosen)


def test_implicit_rewards_are_detached_and_inputs_stay():
    """Rewards are for the log; the loss still has its gradient; no argument is changed."""
    inputs = [torch.tensor([-1.0, -2.0]) * k for k in (1, 2, 3, 4)]
    inputs[0].requires_grad_()
    before = [x.detach().clone() for x in inputs]
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(*inputs, beta=0.5)
    assert losses.requires_grad and not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
    assert chosen_rewards.tolist() == [1.0, 2.0] and rejected_rewards.tolist() == [1.0, 2.0]  # .5 (-1 + 3), ...
    assert all(torch.equal(x, y) for x, y in zip(before, inputs))


@pytest.mark.parametrize("which", range(4))
def test_log_probabilities_of_other_shapes_are_refused(which):
    """One row too many in any of the four; (N, 1) or one number would broadcast."""
    for shape in ((4,), (3, 1), (1,), ()):
        inputs = [torch.zeros(3) for _ in range(4)]
        inputs[which] = torch.zeros(shape)
        with pytest.raises(ValueError, match="shape"):
            dpo.dpo_loss(*inputs, beta=0.1)


def test_log_probabilities_per_token_are_refused():
    """They are to be summed over the completion first."""
    with pytest.raises(ValueError, match="sum"):
        dpo.dpo_loss(*[torch.zeros(3, 5)] * 4, beta=0.1)


def test_extreme_log_ratios_stay_finite():
    """z = 1,000 and -1,000: losses 0 and 1,000; gradients 0 and -beta; with smoothing .1: 100 and 900."""
    losses, chosen, _ = dpo_by_z([1000.0, -1000.0])
    assert losses.tolist() == [0.0, 1000.0] and chosen.tolist() == approx([0.0, -0.1])
    losses, chosen, _ = dpo_by_z([1000.0, -1000.0], label_smoothing=0.1)
    assert losses.tolist() == approx([100.0, 900.0], 1e-3) and chosen.tolist() == approx([0.01, -0.09])


# ------------------------------------------------------------------------------------------------ what dpo converges to

REFERENCE = torch.tensor([0.5, -0.3, 1.0, -1.0], dtype=torch.float64).log_softmax(0)


def expected_dpo_loss(theta, beta):
    """Over all preferences among the four completions, P(i > j) = sigmoid(r_i - r_j), of the policy softmax(theta)."""
    logps = theta.log_softmax(0)
    losses, *_ = dpo.dpo_loss(logps[FIRST], logps[SECOND], REFERENCE[FIRST], REFERENCE[SECOND], beta)
    return (PREFERRED * losses).sum() / 6


def trained(beta, rate, steps):
    """Log-probabilities of the four completions after `steps` of gradient descent from the reference."""
    return descend(lambda theta: expected_dpo_loss(theta, beta), REFERENCE, rate, steps).log_softmax(0)


def kl_to_reference(logps):
    return (logps.exp() * (logps - REFERENCE)).sum().item()


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0, 2.0])
def test_dpo_converges_to_the_optimum_of_reward_less_kl(beta):
    """pi_ref exp(r / beta) / Z, without ever seeing a reward or a sample of the policy.

    The loss is convex in the differences of theta; the curvature is that of Bradley-Terry times beta^2.
    """
    optimum = (REFERENCE + TRUE_REWARDS / beta).softmax(0)
    assert (trained(beta, rate=2.0 / beta**2, steps=1000).exp() - optimum).abs().max() < 1e-4
    assert (optimum - REFERENCE.exp()).abs().max() > 0.1
    other = (REFERENCE + TRUE_REWARDS * beta).softmax(0)
    assert beta == 1.0 or (optimum - other).abs().max() > 0.05


def test_at_the_optimum_a_larger_beta_stays_closer_to_the_reference():
    """KL(pi || pi_ref) falls with beta."""
    distances = [kl_to_reference(trained(beta, rate=2.0 / beta**2, steps=1000)) for beta in (0.3, 0.5, 1.0, 2.0)]
    assert distances[0] > 1.2 * distances[1] > 1.2**2 * distances[2] > 1.2**3 * distances[3] > 0.01


def test_after_a_few_small_steps_a_larger_beta_is_further_from_the_reference():
    """The first gradient is -beta/2 per pair: five steps of one rate move the policy in proportion to beta.

    The KL of a small move is quadratic in it, so doubling beta gives about four times the distance.
    """
    distances = [kl_to_reference(trained(beta, rate=0.1, steps=5)) for beta in (0.25, 0.5, 1.0)]
    assert 3 * distances[0] < distances[1] and 3 * distances[1] < distances[2] < 0.05


# -------------------------------------------------------------------------------------------------------- pair_batches


def random_pairs(vocab=261):
    """Six pairs of unequal lengths that share a prompt of 2 to 4 tokens and close with EOS: (ids, mask) per side."""
    generator, pairs = torch.Generator().manual_seed(6), []

    def draw(count):
        return torch.randint(5, vocab, (count,), generator=generator).tolist()

    for prompt, chosen, rejected in ((2, 5, 3), (3, 1, 9), (4, 12, 2), (2, 2, 2), (3, 6, 7), (2, 1, 1)):
        start = draw(prompt)
        ids = [start + draw(k - 1) + [1] for k in (chosen, rejected)]
        pairs.append(tuple((x, [0] * prompt + [1] * (len(x) - prompt)) for x in ids))
    return pairs


def scored(pairs):
    """The same pairs as a reward model reads them: the mask is 1 on the prompt too."""
    return [tuple((ids, [1] * len(ids)) for ids, _ in pair) for pair in pairs]


@BOTH
@pytest.mark.parametrize("budget", [1, 20, 24, 32, 50, 1000])
def test_pair_batches_hold_every_pair_once_within_the_budget(script, budget):
    """Chosen sides first, then the rejected ones in the same order; right-padded with 0 to the batch's longest side.

    The longest pairs come first: widths 16, 12, 10, 7, 4, 3. 2n * L is within the budget, but for a longer pair, alone.
    """
    pairs, seen, widths = random_pairs(), [], []
    for batch, ids, mask in script.pair_batches(pairs, max_tokens=budget, device=CPU):
        width = max(len(side) for i in batch for side, _ in pairs[i])
        assert ids.shape == mask.shape == (2 * len(batch), width)
        assert ids.numel() <= budget or len(batch) == 1
        assert ids.dtype == torch.long and mask.dtype == torch.float32
        for k, i in enumerate(batch):
            for row, (side, trained_tokens) in zip((k, len(batch) + k), pairs[i]):
                padding = [0] * (width - len(side))
                assert ids[row].tolist() == side + padding and mask[row].tolist() == trained_tokens + padding
            widths.append(max(len(side) for side, _ in pairs[i]))
        seen += batch
    assert sorted(seen) == list(range(6)) and widths == [16, 12, 10, 7, 4, 3]


@BOTH
def test_pair_batches_use_their_budget(script):
    """Budget 80: 2n * 16 <= 80 gives n = 2 (widths 16 and 12), then 2n * 10 <= 80 gives n = 4 (10, 7, 4 and 3)."""
    assert [batch for batch, *_ in script.pair_batches(random_pairs(), 80, CPU)] == [[2, 1], [4, 0, 3, 5]]


def reward_gradient(model, budget):
    """Loss and gradient of one step of rm.py, composed as in its main."""
    pairs, margins, total = scored(random_pairs()), torch.tensor([0.0, 0.5, -0.5, 1.0, 0.0, 2.0]), 0.0
    for indices, ids, mask in rm.pair_batches(pairs, budget, CPU):
        chosen, rejected = rm.score(model, ids, mask).chunk(2)
        total = total + rm.bradley_terry_loss(chosen, rejected, margins[indices], 0.1).sum() / 6
    return total.item(), gradient_of(total, model)


def dpo_gradient(model, budget):
    """Loss and gradient of one step of dpo.py, composed as in its main."""
    pairs, total = random_pairs(), 0.0
    references = dpo.sequence_logps(model, pairs, 1000) + torch.linspace(-9, 9, 12).view(6, 2)
    for indices, ids, mask in dpo.pair_batches(pairs, budget, CPU):
        logps = dpo.token_logprobs(model, ids, mask)[0].sum(1).view(2, -1)
        losses, *_ = dpo.dpo_loss(*logps, *references[indices].T, 0.3, 0.1)
        total = total + losses.sum() / 6
    return total.item(), gradient_of(total, model)


@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_loss_and_gradient_do_not_depend_on_the_token_budget(kind, tiny_folder, tiny_model):
    """From one pair at a time to all at once, in 6, 3, 2 and 1 micro-batches: equal to 1e-5 of the norm."""
    model = fresh_scorer(tiny_folder) if kind == "rm" else tiny_model
    step = {"rm": reward_gradient, "dpo": dpo_gradient}[kind]
    budgets = (1, 48, 80, 1000)
    assert [len(list(rm.pair_batches(random_pairs(), budget, CPU))) for budget in budgets] == [6, 3, 2, 1]
    whole, gradient = step(model, 1000)
    for budget in budgets[:-1]:
        loss, split = step(model, budget)
        assert loss == pytest.approx(whole, rel=1e-5)
        assert_equal_gradients(split, gradient)


# ------------------------------------------------------------------------------------------------------- sequence_logps


def summed_by_definition(model, ids, mask):
    """Teacher-forced: log softmax of the model's own logits at every token whose mask is 1, one row, no padding."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    return sum(log_p[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])


@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_logps_are_summed_over_the_completion_with_its_eos_and_without_the_prompt(tiny_model, budget):
    """Row by row from the model's logits, in the order of the rows, whatever the micro-batches."""
    pairs = random_pairs()
    logps = dpo.sequence_logps(tiny_model, pairs, budget)
    assert logps.shape == (6, 2) and not logps.requires_grad
    expected = [[summed_by_definition(tiny_model, *side) for side in pair] for pair in pairs]
    assert torch.allclose(logps, torch.tensor(expected), atol=1e-4)
    alone = dpo.sequence_logps(tiny_model, [(side,) for pair in pairs for side in pair], budget)
    assert torch.equal(alone, logps.view(12, 1))
    ids, mask = pairs[0][0]
    without_eos, with_prompt = [*mask[:-1], 0], [0] + [1] * (len(ids) - 1)
    for other in (without_eos, with_prompt):
        assert abs(summed_by_definition(tiny_model, ids, other) - logps[0, 0].item()) > 1


def test_logps_are_a_sum_and_not_a_mean(tiny_model):
    """A random model gives every token about -ln 261 = -5.6: twelve tokens about -67, one token about -5.6."""
    logps = dpo.sequence_logps(tiny_model, random_pairs(), 1000)
    assert logps[2, 0].item() == pytest.approx(-12 * math.log(261), rel=0.05)
    assert logps[5, 0].item() == pytest.approx(-math.log(261), rel=0.2)


# ---------------------------------------------------------------------------------------------------------- split_pair

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]
LONG, GO = {"role": "assistant", "content": "So long."}, {"role": "assistant", "content": "Go."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:"
LAYOUTS = {  # name -> row; all say the same
    "prompt and texts": {"prompt": TALK, "chosen": "So long.", "rejected": "Go."},
    "question and texts": {"question": TALK, "chosen": "So long.", "rejected": "Go."},
    "prompt and single messages": {"prompt": TALK, "chosen": [LONG], "rejected": [GO]},
    "whole conversations": {"chosen": [*TALK, LONG], "rejected": [*TALK, GO]},
    "whole conversations and a prompt": {"prompt": "Bye", "chosen": [*TALK, LONG], "rejected": [*TALK, GO]},
    "whole conversations and an empty prompt": {"prompt": None, "chosen": [*TALK, LONG], "rejected": [*TALK, GO]},
    "HH-RLHF": {"chosen": HH + " So long.", "rejected": HH + " Go."},
}


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_a_prompt_and_two_texts(script, layout):
    """With a chat template all layouts of one conversation give the same pair; other columns stay."""
    pair = script.split_pair(LAYOUTS[layout] | {"margin": 2.0}, chat=True)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (TALK, "So long.", "Go.")
    assert pair["margin"] == 2.0


@BOTH
def test_text_stays_text_without_a_chat_template(script):
    """HH-RLHF is cut behind the last `Assistant:`; a prompt that is text stays as it is, with a template or without."""
    pair = script.split_pair(LAYOUTS["HH-RLHF"], chat=False)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (HH, " So long.", " Go.")
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    assert script.split_pair(row, True) == script.split_pair(row, False) == row


@BOTH
@pytest.mark.parametrize("chat", [False, True])
def test_the_first_answer_of_a_conversation(script, chat):
    """One question: its prompt is the user's turn alone. Line breaks inside a turn stay."""
    row = {"chosen": "\n\nHuman: a\n\nb\n\nAssistant: c\n\nd", "rejected": "\n\nHuman: a\n\nb\n\nAssistant: e"}
    pair = script.split_pair(row, chat)
    if chat:
        assert pair == {"prompt": [{"role": "user", "content": "a\n\nb"}], "chosen": "c\n\nd", "rejected": "e"}
    else:
        assert pair == {"prompt": "\n\nHuman: a\n\nb\n\nAssistant:", "chosen": " c\n\nd", "rejected": " e"}


@BOTH
def test_text_in_front_of_the_first_turn_becomes_the_system_turn(script):
    """With a chat template it is kept; without one it stands at the head of the text anyway."""
    row = {"chosen": "Be kind.\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "Be kind.\n\nHuman: Hi\n\nAssistant: He"}
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert script.split_pair(row, True) == {"prompt": prompt, "chosen": "Ho", "rejected": "He"}
    assert script.split_pair(row, False)["prompt"] == "Be kind.\n\nHuman: Hi\n\nAssistant:"


@BOTH
def test_a_text_prompt_of_its_own_column_is_one_turn_whatever_it_holds(script):
    """As in ppo.py, grpo.py and sft.py, which know no marks: all scripts must read a prompt alike."""
    row = {"prompt": HH, "chosen": " So long.", "rejected": " Go."}
    assert script.split_pair(row, True) == script.split_pair(row, False) == row


PARTED = {
    "texts": {"chosen": HH + " So long.", "rejected": HH.replace("Hello!", "What?") + " Go."},
    "a longer rejected text": {"chosen": HH + " So long.", "rejected": HH + " Go.\n\nHuman: No\n\nAssistant: Yes."},
    "a longer chosen text": {"chosen": HH + " So long.\n\nHuman: No\n\nAssistant: Yes.", "rejected": HH + " Go."},
    "an answer that speaks for the user": {"chosen": HH + " So long.\n\nHuman: No", "rejected": HH + " Go."},
    "messages": {"chosen": [*TALK, LONG], "rejected": [TALK[0], GO, TALK[2], GO]},
    "messages of another length": {"chosen": [*TALK, LONG], "rejected": [TALK[0], GO]},
}


@BOTH
@pytest.mark.parametrize("kind", PARTED)
@pytest.mark.parametrize("chat", [False, True])
def test_sides_that_part_before_the_last_turn_are_no_pair(script, kind, chat):
    """They answer different prompts, so there is nothing to compare."""
    assert script.split_pair(PARTED[kind], chat) is None


MALFORMED = {
    "text without turns": {"chosen": "So long.", "rejected": "Go."},
    "an empty prompt": {"prompt": "", "chosen": "So long.", "rejected": "Go."},
    "a message of another role": {"prompt": "Bye", "chosen": [LONG], "rejected": [{"role": "user", "content": "Go."}]},
    "a user's last word": {"chosen": [*TALK, LONG, TALK[0]], "rejected": [*TALK, LONG, TALK[2]]},
    "an answer to nothing": {"chosen": [LONG], "rejected": [GO]},
    "a prompt that is not repeated": {"prompt": "Why?", "chosen": [*TALK, LONG], "rejected": [*TALK, GO]},
    "no messages": {"chosen": [], "rejected": []},
    "no messages after a prompt": {"prompt": "Bye", "chosen": [], "rejected": []},
    "a list and a text": {"prompt": "Bye", "chosen": [LONG], "rejected": "Go."},
    "no content": {"prompt": "Bye", "chosen": [LONG], "rejected": [{"role": "assistant"}]},
    "content that is no text": {"prompt": "Bye", "chosen": [LONG], "rejected": [GO | {"content": None}]},
    "a number": {"prompt": "Bye", "chosen": "So long.", "rejected": 5},
    "messages that are texts": {"chosen": ["Hi", "So long."], "rejected": ["Hi", "Go."]},
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_row_that_is_no_pair_ends_the_run_and_is_named(script, kind):
    """The message has the flag, the row's number and the row."""
    rows = [LAYOUTS["prompt and texts"], MALFORMED[kind]]
    with pytest.raises(SystemExit, match=r"^--dataset: .*row 1 are no pair: .*'chosen'"):
        script.select_pairs(rows, True, "--dataset")


@BOTH
def test_a_layout_that_lacks_a_prompt_says_what_is_wanted(script):
    """The two ways to give a prompt are in the message."""
    with pytest.raises(SystemExit, match=r"`prompt`.*Assistant:"):
        script.select_pairs([MALFORMED["text without turns"]], True, "--dataset")
    with pytest.raises(SystemExit, match="assistant turn, after a prompt"):
        script.select_pairs([MALFORMED["an answer to nothing"]], True, "--dataset")


# -------------------------------------------------------------------------------------------------------- select_pairs


def pair_row(chosen, rejected, prompt="2+2="):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@BOTH
def test_what_holds_no_preference_is_dropped_and_counted(script, capsys):
    """Two with equal sides (one of them empty on both sides), one that parts, three with an empty side; three stay."""
    rows = [
        pair_row("4", "5"), pair_row("4", "4"), PARTED["messages"], pair_row("4", " \n"), pair_row("", "5"),
        pair_row("", ""), LAYOUTS["HH-RLHF"], pair_row(" ", ""), pair_row("6", "7"),
    ]  # fmt: skip
    kept = script.select_pairs(rows, True, "--dataset")
    assert [row["chosen"] for row in kept] == ["4", "So long.", "6"]
    assert capsys.readouterr().out == (
        "--dataset: dropped of 9 pairs: 2 with equal sides, 1 with sides that differ in more than the last turn, "
        "3 with an empty side\n"
    )


@BOTH
def test_only_what_occurs_is_mentioned(script, capsys):
    """Nothing at all where every row is a pair."""
    assert script.select_pairs([pair_row("4", "5"), pair_row("4", "4")], True, "--dataset") == [pair_row("4", "5")]
    assert capsys.readouterr().out == "--dataset: dropped of 2 pairs: 1 with equal sides\n"
    script.select_pairs([pair_row("4", "5"), pair_row("4", "5", prompt="3+1=")], True, "--dataset")
    assert capsys.readouterr().out == ""


@BOTH
def test_repeated_and_contradicted_pairs_are_counted_and_kept(script, capsys):
    """The second and third repeat the first, the fourth turns it round; another prompt is another pair."""
    rows = [*[pair_row("4", "5")] * 3, pair_row("5", "4"), pair_row("5", "4", "1+4=")]
    assert script.select_pairs(rows, True, "evaluation rows") == rows
    assert capsys.readouterr().out == (
        "evaluation rows: 2 pairs repeat an earlier one and 1 contradict one; all are kept\n"
    )


@BOTH
def test_no_pair_at_all_ends_the_run(script):
    """With the reasons and their counts."""
    rows = [pair_row("4", "4"), pair_row("", "5")]
    with pytest.raises(SystemExit, match=r"no preference remains of 2 pairs: 1 with equal.*1 with an empty"):
        script.select_pairs(rows, True, "--dataset")


@BOTH
def test_audit_by_hand(script, capsys):
    """Lengths (3, 2), (2, 2), (6, 7), (4, 1), prompt included: longer in 2 of 4, as long in 1; means 15/4 and 12/4."""
    script.audit(sides((3, 2), (2, 2), (6, 7), (4, 1)), "--dataset")
    assert capsys.readouterr().out == (
        "--dataset: 4 pairs; the chosen side is longer in 50.0%, as long in 25.0%; "
        "mean tokens with the prompt 3.8 chosen, 3.0 rejected, at most 7\n"
    )


# ------------------------------------------------------------------------------------------------------- pairs as ids

TALK_IN_CHATML = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pad_token", ["<|pad|>", "<|endoftext|>", "<|im_end|>"])
def test_of_a_pair_only_the_last_turn_and_its_end_are_trained(layout, pad_token):
    """By hand, in ChatML: the assistant's earlier turn is part of the prompt, <|im_end|> of the completion.

    Whether padding has a token of its own plays no part.
    """
    (row,) = dpo.select_pairs([LAYOUTS[layout]], True, "--dataset")
    pair = dpo.encode_pair(byte_tokenizer(CHATML, pad_token=pad_token), row, None, [EOS, IM_END])
    prompt = spell(TALK_IN_CHATML)
    for (ids, mask), text in zip(pair, ("So long.<|im_end|>", "Go.<|im_end|>")):
        assert ids == prompt + spell(text)
        assert mask == [0] * len(prompt) + [1] * len(spell(text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system_prompt", [None, "Answer briefly."])
def test_both_sides_start_from_the_ids_that_sampling_starts_from(kind, system_prompt):
    """The same prompt ids, mask 0; then the completion and one end of turn, mask 1, for every kind of tokenizer."""
    tokenizer = KINDS[kind][0]()
    eos_ids = sorted({tokenizer.eos_token_id, IM_END} if "chatml" in kind else {tokenizer.eos_token_id})
    row = {"prompt": "How many?", "chosen": "It is 3.\n#### 3", "rejected": "4"}
    prompt = dpo.encode_prompt(tokenizer, row, system_prompt)
    for (ids, mask), side in zip(dpo.encode_pair(tokenizer, row, system_prompt, eos_ids), ("chosen", "rejected")):
        assert ids[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        assert ids[-1] in eos_ids and not set(ids[len(prompt) : -1]) & set(eos_ids)
        assert tokenizer.decode(ids[len(prompt) : -1]).strip() == row[side]


def test_a_pair_without_a_template_by_hand():
    """HH-RLHF as text: the marked conversation, up to `Assistant:`, then the answer with its space, and EOS."""
    (row,) = dpo.select_pairs([LAYOUTS["HH-RLHF"]], False, "--dataset")
    pair = dpo.encode_pair(byte_tokenizer(), row, None, [EOS])
    for (ids, mask), text in zip(pair, (" So long.", " Go.")):
        assert ids == [*spell(HH + text), EOS]
        assert mask == [0] * len(HH) + [1] * (len(text) + 1)


def test_with_pad_equal_to_eos_the_eos_of_a_padded_pair_is_still_trained():
    """pair_batches takes masks from lengths: the closing EOS of both sides has mask 1, what follows has 0."""
    tokenizer = byte_tokenizer(pad_token="<|endoftext|>")
    assert tokenizer.pad_token_id == EOS == 0  # which is also what pair_batches pads with
    pair = dpo.encode_pair(tokenizer, {"prompt": "Hi", "chosen": "abc", "rejected": "d"}, None, [EOS])
    _, ids, mask = next(dpo.pair_batches([pair], 100, CPU))
    assert ids.tolist() == [[*spell("Hiabc"), EOS], [*spell("Hid"), EOS, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_model_reads_the_whole_conversation(layout):
    """By hand, in ChatML, as the template renders it; the mask is 1 on all of it."""
    (row,) = rm.select_pairs([LAYOUTS[layout]], True, "--dataset")
    pair = rm.encode_scored_pair(byte_tokenizer(CHATML), row, None)
    for (ids, mask), text in zip(pair, ("So long.<|im_end|>\n", "Go.<|im_end|>\n")):
        assert ids == spell(TALK_IN_CHATML + text) and mask == [1] * len(ids)


def test_a_reward_model_without_a_template_reads_prompt_completion_and_eos():
    """With the BOS that the tokenizer itself adds, the system prompt in front, and one EOS, also if the text has it."""
    row = {"prompt": "Hi", "chosen": "Ho", "rejected": "He<|endoftext|>"}
    (chosen, mask), (rejected, _) = rm.encode_scored_pair(byte_tokenizer(), row, "Sum.")
    assert chosen == spell("Sum.\n\nHiHo<|endoftext|>") and mask == [1] * len(chosen)
    assert rejected == spell("Sum.\n\nHiHe<|endoftext|>")
    with_bos = byte_tokenizer(bos_token="<s>", adds_bos=True)
    assert rm.encode_scored_pair(with_bos, row, None)[0][0] == spell("<s>HiHo<|endoftext|>")


def test_a_tiny_pair_by_hand():
    """The built-in tokenizer: the same prompt ids, and <|end|> closes both sides, for both scripts."""
    tokenizer = sft.tiny_tokenizer()
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "22"}
    text = ["<|user|>", "2", "+", "2", "=", "<|end|>", "<|assistant|>"]
    expected = [[*text, "4", "<|end|>"], [*text, "2", "2", "<|end|>"]]
    pair = dpo.encode_pair(tokenizer, row, None, [tokenizer.eos_token_id])
    assert [tokenizer.convert_ids_to_tokens(ids) for ids, _ in pair] == expected
    assert [mask for _, mask in pair] == [[0] * 7 + [1] * 2, [0] * 7 + [1] * 3]
    scored = rm.encode_scored_pair(tokenizer, row, None)
    assert [ids for ids, _ in scored] == [ids for ids, _ in pair]
    assert [mask for _, mask in scored] == [[1] * 9, [1] * 10] and tokenizer.pad_token_id != PAD
