"""ppo.py: rewards, advantages and losses worked by hand, and proofs that its expected gradient is the true one."""

import itertools
import math

import pytest
import torch

import ppo
import sft
from test_data import CHATML, byte_tokenizer
from test_estimators import MASK, REWARDS, SEQUENCES, V, close, far, gradient, kl, logprobs_of, policy, probabilities
from test_logprobs import assert_equal_gradients

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def value_model(tiny_folder):
    """The tiny model with a random head; not to be changed."""
    return ppo.load_scorer(tiny_folder, CPU, False, "--value-model", head_scale=1.0)


def row(*values):
    return torch.tensor([values])


def approx(values, tolerance=1e-6):
    return pytest.approx(values, abs=tolerance)


def random_case():
    """Inputs of every function: six rows of 1 to 6 actions behind a prompt, a hole in the fifth, garbage elsewhere."""
    generator = torch.Generator().manual_seed(1)
    names = ("logprobs", "ref_logprobs", "rewards", "values", "old_values", "returns", "advantages")
    case = {name: torch.randn(6, 8, generator=generator) for name in names}
    case["old_logprobs"] = case["logprobs"] + torch.rand(6, 8, generator=generator) - 0.5  # ratios beyond both bounds
    case["mask"], case["scores"] = torch.zeros(6, 8), torch.randn(6, generator=generator)
    for n in range(6):
        case["mask"][n, 1 : 2 + n] = 1
    case["mask"][4, 3] = 0
    return case


FUNCTIONS = {  # what each function takes of the case, and what else
    "kl_shaped_rewards": (("scores", "logprobs", "ref_logprobs", "mask"), {"kl_coef": 0.1}),
    "gae": (("rewards", "values", "mask"), {"gamma": 0.9, "lam": 0.8}),
    "whiten": (("rewards", "mask"), {}),
    "policy_loss": (("logprobs", "old_logprobs", "advantages", "mask"), {"clip_eps": 0.2, "num_tokens": 20}),
    "value_loss": (("values", "old_values", "returns", "mask"), {"clip_eps": 0.2, "num_tokens": 20}),
    "explained_variance": (("values", "returns", "mask"), {}),
}
SHAPED = ["kl_shaped_rewards", "gae", "policy_loss", "value_loss"]


def call(name, case):
    """The function's results as a list of tensors."""
    taken, others = FUNCTIONS[name]
    result = getattr(ppo, name)(*(case[x] for x in taken), **others)
    return [torch.as_tensor(x) for x in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_are_not_mutated(name):
    """Every function leaves its arguments bit for bit as they came."""
    case, before = random_case(), random_case()
    call(name, case)
    assert all(torch.equal(case[x], before[x]) for x in case)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("garbage", [0.0, -3.0, 7.0])
def test_what_stands_under_mask_0_changes_nothing(name, garbage):
    """More padding, and other values in prompt, hole and padding: the same results, and 0 where they are per token."""
    case = random_case()
    other = {
        x: y
        if x == "scores"
        else torch.cat([torch.where(case["mask"] > 0, y, garbage), torch.full((6, 2), garbage)], 1)
        for x, y in case.items()
    }
    other["mask"] = torch.cat([case["mask"], torch.zeros(6, 2)], 1)
    for result, again in zip(call(name, case), call(name, other)):
        if result.dim():
            assert (again[other["mask"] == 0] == 0).all()
            again = again[:, :8]
        assert torch.allclose(result, again, atol=1e-6) and result.abs().max() > 1e-3


@pytest.mark.parametrize("name", SHAPED)
def test_shapes_that_disagree_are_refused(name):
    """One row or one column too many, or too few, in any argument: it would broadcast or fail late."""
    for argument in FUNCTIONS[name][0]:
        x = random_case()[argument]
        wrong = [torch.cat([x, x[:1]]), x[:1], x[..., None], x[..., :1]]
        for other in wrong:
            with pytest.raises(ValueError, match="shape"):
                call(name, random_case() | {argument: other})


# --------------------------------------------------------------------------------------------------- kl_shaped_rewards


def test_shaped_rewards_by_hand():
    """kl_coef .1. Row 1, log-ratios .5, -1, .25, score 2: -.05, .1, 2 - .025. Row 2, one action, log-ratio 2, score -1:

    -1 - .2, at that action and not in the last column. Row 3, log-ratios 1 and 3 around a hole, score .5: -.1, .2.
    """
    log_ratio = torch.tensor([[9.0, 0.5, -1.0, 0.25, 9.0], [9.0, 2.0, 9.0, 9.0, 9.0], [9.0, 1.0, 9.0, 3.0, 9.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 0.0]])
    ref_logprobs = torch.full((3, 5), -2.0)
    rewards = ppo.kl_shaped_rewards(
        scores=torch.tensor([2.0, -1.0, 0.5]),
        logprobs=ref_logprobs + log_ratio,
        ref_logprobs=ref_logprobs,
        mask=mask,
        kl_coef=0.1,
    )
    expected = [[0, -0.05, 0.1, 1.975, 0], [0, -1.2, 0, 0, 0], [0, -0.1, 0, 0.2, 0]]
    assert rewards.shape == (3, 5) and torch.allclose(rewards, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 2.0])
def test_shaped_rewards_sum_to_the_score_less_the_kl(kl_coef):
    """sum_t = score - kl_coef * sum_t (log pi - log ref), over the actions of each row."""
    case = random_case()
    names = ("scores", "logprobs", "ref_logprobs", "mask")
    rewards = ppo.kl_shaped_rewards(*(case[x] for x in names), kl_coef)
    log_ratio = ((case["logprobs"] - case["ref_logprobs"]) * case["mask"]).sum(1)
    assert torch.allclose(rewards.sum(1), case["scores"] - kl_coef * log_ratio, atol=1e-5)
    if kl_coef == 0:
        assert torch.equal(rewards != 0, torch.nn.functional.one_hot(torch.arange(1, 7), 8).bool())


def test_a_completion_without_an_action_is_refused():
    """There is no last action to give the score to."""
    case = random_case()
    case["mask"][2] = 0
    with pytest.raises(ValueError, match="mask"):
        call("kl_shaped_rewards", case)


# ----------------------------------------------------------------------------------------------------------------- gae


def test_gae_by_hand():
    """r = (0, 0, 1), V = (.5, .6, .7), gamma 1, lambda .95: delta = (.1, .1, .3).

    A = .3; .1 + .95 * .3 = .385; .1 + .95 * .385 = .46575. Returns A + V = .96575, .985, 1.
    """
    advantages, returns = ppo.gae(
        rewards=row(0.0, 0.0, 1.0), values=row(0.5, 0.6, 0.7), mask=torch.ones(1, 3), gamma=1.0, lam=0.95
    )
    assert advantages[0].tolist() == approx([0.46575, 0.385, 0.3])
    assert returns[0].tolist() == approx([0.96575, 0.985, 1.0])


def test_gae_with_discount_by_hand():
    """The same, gamma .5, lambda .5: delta = .3 - .5 = -.2, .35 - .6 = -.25, 1 - .7 = .3.

    A = .3; -.25 + .25 * .3 = -.175; -.2 - .25 * .175 = -.24375. Returns .25625, .425, 1.
    """
    advantages, returns = ppo.gae(row(0.0, 0.0, 1.0), row(0.5, 0.6, 0.7), torch.ones(1, 3), 0.5, 0.5)
    assert advantages[0].tolist() == approx([-0.24375, -0.175, 0.3])
    assert returns[0].tolist() == approx([0.25625, 0.425, 1.0])


def test_gae_of_ragged_rows_and_a_hole_by_hand():
    """Row 1 is the hand value behind a prompt; row 2 has one action, r = 2, V = .5: A = 1.5, return 2.

    Row 3 is the hand value again, with a hole of two tokens inside: the value and the advantage of the action after it
    carry across, whatever stands in it.
    """
    rewards = torch.tensor([[5.0, 0.0, 0.0, 1.0, 5.0, 5.0], [5.0, 2.0, 5.0, 5.0, 5.0, 5.0], [5.0, 0.0, 5, 5, 0.0, 1.0]])
    values = torch.tensor([[9.0, 0.5, 0.6, 0.7, 9.0, 9.0], [9.0, 0.5, 9.0, 9.0, 9.0, 9.0], [9.0, 0.5, 9, 9, 0.6, 0.7]])
    mask = torch.tensor([[0.0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1]])
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.95)
    expected = [[0, 0.46575, 0.385, 0.3, 0, 0], [0, 1.5, 0, 0, 0, 0], [0, 0.46575, 0, 0, 0.385, 0.3]]
    assert torch.allclose(advantages, torch.tensor(expected), atol=1e-6)
    expected = [[0, 0.96575, 0.985, 1.0, 0, 0], [0, 2.0, 0, 0, 0, 0], [0, 0.96575, 0, 0, 0.985, 1.0]]
    assert torch.allclose(returns, torch.tensor(expected), atol=1e-6)


def actions_of(case, n, *names):
    """The values of row n at its actions alone, as lists."""
    return [case[name][n][case["mask"][n] > 0].tolist() for name in names]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_the_discounted_sum_of_td_residuals(gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_{t+k} over the actions that follow, written out; the hole is no action."""
    case = random_case()
    advantages, returns = ppo.gae(case["rewards"], case["values"], case["mask"], gamma, lam)
    for n in range(6):
        rewards, values = actions_of(case, n, "rewards", "values")
        deltas = [r + gamma * following - v for r, v, following in zip(rewards, values, [*values[1:], 0.0])]
        expected = [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]
        actions = case["mask"][n] > 0
        assert advantages[n][actions].tolist() == approx(expected, 1e-5)
        assert returns[n][actions].tolist() == approx([a + v for a, v in zip(expected, values)], 1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_is_monte_carlo_and_lambda_0_the_td_residual(gamma):
    """lambda 1: A_t = G_t - V_t with G_t = sum_k gamma^k r_{t+k}, so the return is G_t and does not see the values.

    lambda 0: A_t = r_t + gamma V_{t+1} - V_t, and 0 for V after the last action.
    """
    case = random_case()
    inputs = case["rewards"], case["values"], case["mask"]
    monte_carlo, returns = ppo.gae(*inputs, gamma, 1.0)
    residuals, _ = ppo.gae(*inputs, gamma, 0.0)
    for n in range(6):
        rewards, values = actions_of(case, n, "rewards", "values")
        for t, index in enumerate(case["mask"][n].nonzero()[:, 0].tolist()):
            to_go = sum(gamma**k * r for k, r in enumerate(rewards[t:]))
            following = values[t + 1] if t + 1 < len(values) else 0.0
            assert returns[n, index].item() == approx(to_go, 1e-5)
            assert monte_carlo[n, index].item() == approx(to_go - values[t], 1e-5)
            assert residuals[n, index].item() == approx(rewards[t] + gamma * following - values[t], 1e-5)


# -------------------------------------------------------------------------------------------------------------- whiten


def test_whiten_by_hand():
    """1, 2, 3, 6: mean 3, biased variance (4 + 1 + 0 + 9) / 4 = 3.5, deviation 1.870829.

    -2, -1, 0, 3 become -1.069045, -.534522, 0, 1.603567. The unbiased deviation, 2.160247, would give -.925820.
    """
    x = torch.tensor([[50.0, 1.0, 2.0, 50.0], [50.0, 3.0, 50.0, 6.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    expected = [0, -1.069045, -0.534522, 0, 0, 0, 0, 1.603567]
    assert ppo.whiten(x=x, mask=mask).flatten().tolist() == approx(expected)


def test_whitened_actions_have_mean_0_and_biased_variance_1():
    """Over all 20 actions of ragged rows together, not row by row; the scale and shift of the input play no part."""
    case = random_case()
    actions, white = case["mask"] > 0, ppo.whiten(case["advantages"], case["mask"])
    assert white[actions].mean().item() == approx(0.0) and white[actions].square().mean().item() == approx(1.0)
    assert abs(white[5][actions[5]].mean().item()) > 0.05
    assert torch.allclose(ppo.whiten(7 * case["advantages"] - 3, case["mask"]), white, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.2, -0.1, 1e6])
def test_equal_values_are_whitened_to_exactly_0(value):
    """Eight float32 values of 1.2 have a mean that is off by rounding, and dividing by its size would make that 1.

    What stands outside of the mask differs, and does not count.
    """
    x, mask = torch.full((2, 6), value), torch.ones(2, 6)
    x[:, :2], mask[:, :2] = 99.0, 0.0
    assert (ppo.whiten(x, mask) == 0).all()


def test_a_single_action_is_whitened_to_0():
    """It is its own mean."""
    assert ppo.whiten(row(5.0, -7.0, 5.0), row(0.0, 1.0, 0.0)).tolist() == [[0.0, 0.0, 0.0]]


# --------------------------------------------------------------------------------------------------------- policy_loss


def policy_loss_at(ratio, advantages, mask, clip_eps=0.2, num_tokens=1):
    """policy_loss at a given (N, L) probability ratio, and its gradient in the log-probabilities."""
    old_logprobs = torch.full_like(ratio, math.log(0.25))
    logprobs = (old_logprobs + ratio.log()).requires_grad_()
    loss = ppo.policy_loss(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip_eps=clip_eps,
        num_tokens=num_tokens,
    )
    assert loss.shape == ()
    return loss.item(), torch.autograd.grad(loss, logprobs)[0]


# advantage, ratio -> max(-A r, -A clip(r, .8, 1.2)) and its derivative in log r: -A r where the first is larger (or
# both are equal inside the band), 0 where the clipped one is.
CLIP_TABLE = [
    (-5.0, 0.5, 4.0, 0.0),  # 2.5 against 4: clipped
    (-5.0, 1.0, 5.0, 5.0),
    (-5.0, 1.5, 7.5, 7.5),  # 7.5 against 6: a bad action that became likelier is not clipped
    (-1.0, 0.5, 0.8, 0.0),
    (-1.0, 1.0, 1.0, 1.0),
    (-1.0, 1.5, 1.5, 1.5),
    (1.0, 0.5, -0.5, -0.5),  # -.5 against -.8: a good action that became less likely is not clipped
    (1.0, 1.0, -1.0, -1.0),
    (1.0, 1.5, -1.2, 0.0),
    (5.0, 0.5, -2.5, -2.5),
    (5.0, 1.0, -5.0, -5.0),
    (5.0, 1.5, -6.0, 0.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "slope"), CLIP_TABLE)
def test_clip_table(advantage, ratio, loss, slope):
    """One action: value and gradient of the table."""
    mask = row(0.0, 1.0, 0.0)
    value, gradients = policy_loss_at(torch.full((1, 3), ratio), torch.full((1, 3), advantage), mask)
    assert value == approx(loss, 1e-5) and gradients[0].tolist() == approx([0.0, slope, 0.0], 1e-5)


def test_the_smaller_ratio_times_the_advantage_is_another_objective():
    """At A = -5, r = .5: min(r, clip r) A = .5 * -5 = -2.5, of slope -2.5; PPO's objective is -4, of slope 0."""
    value, gradients = policy_loss_at(row(0.5), row(-5.0), torch.ones(1, 1))
    assert value == approx(4.0) and gradients.item() == 0.0


def test_policy_loss_of_ragged_rows_and_a_hole_by_hand():
    """Row 1, A = 2 and -1, ratios 1.5 and 1.5: -2.4 and 1.5. Row 2, A = 1, -2, 3 around a hole, ratios .5, .5, 1:

    -.5, 1.6, -3. Sum -2.8 over the 10 tokens of the step: -.28. Gradient: 0, .15; -.05, 0, -.3; elsewhere 0.
    """
    ratio = torch.tensor([[7.0, 1.5, 1.5, 7.0, 7.0], [7.0, 0.5, 7.0, 0.5, 1.0]])
    advantages = torch.tensor([[9.0, 2.0, -1.0, 9.0, 9.0], [9.0, 1.0, 9.0, -2.0, 3.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 1.0]])
    loss, gradients = policy_loss_at(ratio, advantages, mask, num_tokens=10)
    assert loss == approx(-0.28)
    assert gradients.flatten().tolist() == approx([0, 0, 0.15, 0, 0, 0, -0.05, 0, 0, -0.3])


def test_all_actions_of_the_step_weigh_alike():
    """Rows of 1 and 3 actions with A = 1 and -1 at ratio 1: (-1 + 3) / 4 = 1/2, not a mean of row means, 0.

    One row at a time, with the 4 of the whole step: -1/4 and 3/4.
    """
    mask, advantages = torch.tensor([[1.0, 0, 0], [1, 1, 1]]), torch.tensor([[1.0] * 3, [-1.0] * 3])
    assert policy_loss_at(torch.ones(2, 3), advantages, mask, num_tokens=4)[0] == 0.5
    parts = [policy_loss_at(torch.ones(1, 3), advantages[n : n + 1], mask[n : n + 1], num_tokens=4)[0] for n in (0, 1)]
    assert parts == [-0.25, 0.75]


def test_whitened_advantages_give_no_loss_but_a_gradient_at_ratio_1():
    """Their sum is 0, so the loss is; its gradient is -A / num_tokens."""
    case = random_case()
    advantages = ppo.whiten(case["advantages"], case["mask"])
    loss, gradients = policy_loss_at(torch.ones(6, 8), advantages, case["mask"], num_tokens=20)
    assert loss == approx(0.0) and torch.allclose(gradients, -advantages / 20, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- value_loss

# V, R at the old value 1, clip .2 -> 1/2 max((V - R)^2, (V_clip - R)^2) and its derivative in V
VALUE_TABLE = [
    (1.1, 2.0, 0.405, -0.9),  # inside the band: .9^2 / 2
    (0.9, -1.0, 1.805, 1.9),  # 1.9^2 / 2
    (1.5, 2.0, 0.32, 0.0),  # .5^2 against (1.2 - 2)^2: the clipped one is larger, and flat: it has moved enough
    (0.5, 0.0, 0.32, 0.0),  # .5^2 against (.8 - 0)^2, the same downwards
    (1.5, 0.0, 1.125, 1.5),  # 1.5^2 against 1.2^2: it moved away from the return, and is not held there
    (0.5, 2.0, 1.125, -1.5),  # (-1.5)^2 against (.8 - 2)^2
    (3.0, 1.5, 1.125, 1.5),  # beyond the return: 1.5^2 against (1.2 - 1.5)^2
    (1.0, 1.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("value", "target", "loss", "slope"), VALUE_TABLE)
def test_value_clip_table(value, target, loss, slope):
    """One action: value and gradient of the table, with the 1/2."""
    values, mask = row(9.0, value, 9.0).requires_grad_(), row(0.0, 1.0, 0.0)
    result = ppo.value_loss(
        values=values,
        old_values=torch.ones(1, 3),
        returns=torch.full((1, 3), target),
        mask=mask,
        clip_eps=0.2,
        num_tokens=1,
    )
    assert result.shape == () and result.item() == approx(loss)
    assert torch.autograd.grad(result, values)[0][0].tolist() == approx([0.0, slope, 0.0])


@pytest.mark.parametrize(("value", "target"), [entry[:2] for entry in VALUE_TABLE])
def test_without_value_clipping_it_is_half_the_squared_error(value, target):
    """clip_eps 0 turns the clipping off: 1/2 (V - R)^2 with slope V - R, whatever the old value."""
    values = row(value).requires_grad_()
    result = ppo.value_loss(values, row(1.0), row(target), torch.ones(1, 1), 0.0, 1)
    assert result.item() == approx((value - target) ** 2 / 2)
    assert torch.autograd.grad(result, values)[0].item() == approx(value - target)


def test_value_loss_of_ragged_rows_and_a_hole_by_hand():
    """Old value 1, returns 2; row 1: V 1.1, 1.5: .81, .64; row 2: V .5, 1 around a hole: 2.25, 1. 4.7 / 2 / 10 = .235.

    Gradient (V - R) / 10 where the band does not hold: -.09, 0; -.15, -.1.
    """
    values = torch.tensor([[9.0, 1.1, 1.5, 9.0], [9.0, 0.5, 9.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    loss = ppo.value_loss(values, torch.ones(2, 4), torch.full((2, 4), 2.0), mask, 0.2, 10)
    assert loss.item() == approx(0.235)
    assert torch.autograd.grad(loss, values)[0].flatten().tolist() == approx([0, -0.09, 0, 0, 0, -0.15, 0, -0.1])


# -------------------------------------------------------------------------------------------------- explained_variance


def test_explained_variance_by_hand():
    """Returns 1, 2, 3, 6, of variance 3.5. The returns themselves: 1; shifted by a constant: still 1; a constant: 0.

    Half of them leave half: 1 - 1/4; the negated ones leave double: 1 - 4 = -3. Garbage outside of the mask.
    """
    returns = torch.tensor([[50.0, 1.0, 2.0, -50.0], [50.0, 3.0, 9.0, 6.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    for values, expected in ((returns, 1.0), (returns + 5, 1.0), (returns / 2, 0.75), (-returns, -3.0)):
        explained = ppo.explained_variance(values=values, returns=returns, mask=mask)
        assert explained == approx(expected) and isinstance(explained, float)
    assert ppo.explained_variance(torch.full((2, 4), 7.0), returns, mask) == approx(0.0)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 2.0]])
def test_explained_variance_of_equal_returns_is_nan(values):
    """There is nothing to explain, whether the values vary or not."""
    assert math.isnan(ppo.explained_variance(row(*values), torch.ones(1, 2), torch.ones(1, 2)))


# ----------------------------------------------------------------------------------------------- REINFORCE, on a model


def ragged_rollout():
    """Four rows of ids and mask: 6, 1, 4 and 2 actions behind prompts of 2, 3, 1 and 2 tokens, a hole in the first."""
    generator, rows = torch.Generator().manual_seed(5), []
    for prompt, completion in ((2, 6), (3, 1), (1, 4), (2, 2)):
        ids = torch.randint(2, 261, (prompt + completion,), generator=generator).tolist()
        rows.append((ids, [0] * prompt + [1] * completion))
    rows[0][1][4] = 0
    return rows


def one_batch(rows):
    """All rows as one padded batch, in their own order: ids and mask (N, L)."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([mask + [0.0] * (width - len(mask)) for _, mask in rows])


def parameter_gradient(loss, *models):
    """One vector over the parameters of all models."""
    for model in models:
        model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for model in models for parameter in model.parameters()])


def reinforce_gradient(model, rows, weights, num_tokens):
    """Of -sum weight log pi / num_tokens, from the model's own logits, one row at a time and without padding."""
    total = 0.0
    for n, (ids, mask) in enumerate(rows):
        log_p = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if mask[t]:
                total = total - weights[n][t] * log_p[t - 1, ids[t]] / num_tokens
    return parameter_gradient(total, model)


def rewards_to_go(rewards, rows):
    """Sum of the rewards of this and all later actions, as nested lists, 0 elsewhere."""
    result = []
    for n, (ids, mask) in enumerate(rows):
        result.append([mask[t] * sum(mask[k] * rewards[n][k] for k in range(t, len(ids))) for t in range(len(ids))])
    return result


@pytest.mark.parametrize("kind", ["scores alone", "a reward at every token"])
@pytest.mark.parametrize("whitened", [False, True])
def test_without_a_baseline_the_first_update_is_reinforce(kind, whitened, tiny_model):
    """Values 0, kl_coef 0, gamma 1, lambda 1, ratio 1, no clipping: -sum_t G_t grad log pi / num_tokens.

    G_t is the reward-to-go, here the score itself at every action; with rewards at every token it falls along the row.
    Whitened, G is replaced by (G - mean) / deviation over the 12 actions.
    """
    rows = ragged_rollout()
    ids, mask = one_batch(rows)
    scores = torch.tensor([1.0, -0.5, 2.0, 0.25])
    logprobs, _ = ppo.token_logprobs(tiny_model, ids, mask)
    old_logprobs = logprobs.detach()
    rewards = ppo.kl_shaped_rewards(scores, old_logprobs, old_logprobs - 1.0, mask, kl_coef=0.0)
    if kind != "scores alone":
        rewards = rewards + torch.randn(rewards.shape, generator=torch.Generator().manual_seed(0)) * mask
    advantages, _ = ppo.gae(rewards, torch.zeros_like(mask), mask, gamma=1.0, lam=1.0)
    to_go = rewards_to_go(rewards.tolist(), rows)
    if kind == "scores alone":
        for n, (_, row_mask) in enumerate(rows):
            assert to_go[n] == [scores[n].item() * action for action in row_mask]
    if whitened:
        advantages = ppo.whiten(advantages, mask)
        of_actions = [g for n, (_, m) in enumerate(rows) for g, action in zip(to_go[n], m) if action]
        assert len(of_actions) == 12
        mean = sum(of_actions) / 12
        deviation = math.sqrt(sum((g - mean) ** 2 for g in of_actions) / 12)
        to_go = [[(g - mean) / deviation for g in row] for row in to_go]
    loss = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=1e9, num_tokens=12)
    result = parameter_gradient(loss, tiny_model)
    assert_equal_gradients(result, reinforce_gradient(tiny_model, rows, to_go, 12))


# ------------------------------------------------------------------------------------------------ proof by enumeration

# Two tokens out of three, all nine sequences, in float64; index 0 is the prompt. The state before the first token is
# the prompt, that before the second is the first token, a.


def shaped_rewards(pi, ref, i, scores=REWARDS, kl_coef=0.3):
    """(1, 3): kl_shaped_rewards of sequence i under the policy that sampled, which is not differentiated."""
    score = torch.tensor([scores[i]], dtype=torch.float64)
    return ppo.kl_shaped_rewards(
        score, logprobs_of(pi, SEQUENCES[i]).detach(), logprobs_of(ref, SEQUENCES[i]), MASK, kl_coef
    )


def exact_values(pi, rewards):
    """V(prompt) and V(a) for each a, (4,): the expected sum of the rewards (9, 3) that are still to come."""
    first, second = pi.detach()[:V].softmax(0), pi.detach()[V:].view(V, V).softmax(1)
    after_a = (second * rewards[:, 2].view(V, V)).sum(1)
    before = (first * (rewards[:, 1].view(V, V) * second).sum(1)).sum() + (first * after_a).sum()
    return torch.cat([before[None], after_a])


def values_along(values, i):
    """(1, 3): the state's value at each index of sequence i."""
    return torch.stack([values.new_zeros(()), values[0], values[1 + SEQUENCES[i][0]]])[None]


def expected_gradient(pi, rewards, values_of, lam):
    """Of policy_loss at ratio 1 over all sequences, weighted by their probability; values_of(i) is (1, 3)."""
    total = torch.zeros((), dtype=torch.float64)
    for i, weight in enumerate(probabilities(pi).detach()):
        logprobs = logprobs_of(pi, SEQUENCES[i])
        advantages, _ = ppo.gae(rewards[i : i + 1], values_of(i), MASK, 1.0, lam)
        total = total + weight * ppo.policy_loss(logprobs, logprobs.detach(), advantages, MASK, 0.2, num_tokens=1)
    return gradient(total, pi)


def objective_gradient(pi, ref, kl_coef=0.3, scores=REWARDS):
    """Of E[r] - kl_coef KL(pi || ref), by differentiating the sum over sequences itself."""
    p = probabilities(pi)
    objective = (p * torch.tensor(scores, dtype=torch.float64)).sum() - kl_coef * kl(p, probabilities(ref))
    return gradient(objective, pi)


def all_rewards(pi, ref, **options):
    """shaped_rewards of all nine sequences, (9, 3)."""
    return torch.cat([shaped_rewards(pi, ref, i, **options) for i in range(len(SEQUENCES))])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_with_exact_values_every_lambda_ascends_the_regularised_objective(seed, lam):
    """E[gradient of the loss] = -grad (E[score] - kl_coef KL(pi || ref)), the KL's own gradient included.

    The shaped reward of a sequence is its score - kl_coef log(pi / ref); E[A_t | s_t, a_t] = Q - V for every lambda if
    V is exact, and the log pi inside the reward would only add E[grad log pi] = 0.
    """
    pi, ref = policy(seed, requires_grad=True), policy(seed + 100)
    rewards = all_rewards(pi, ref)
    values = exact_values(pi, rewards)
    result = expected_gradient(pi, rewards, lambda i: values_along(values, i), lam)
    expected = objective_gradient(pi, ref)
    assert close(-result, expected) and expected.norm() > 0.1
    assert far(-result, objective_gradient(pi, ref, kl_coef=0.0))


@pytest.mark.parametrize("seed", range(2))
def test_with_lambda_1_any_value_of_the_state_will_do(seed):
    """Random values that do not see the token are a baseline, and drop out of the expectation; lambda .5 is biased."""
    pi, ref = policy(seed, requires_grad=True), policy(seed + 100)
    rewards, values = all_rewards(pi, ref), policy(seed + 50)[:4]
    expected = objective_gradient(pi, ref)
    assert close(-expected_gradient(pi, rewards, lambda i: values_along(values, i), 1.0), expected)
    assert far(-expected_gradient(pi, rewards, lambda i: values_along(values, i), 0.5), expected)
    assert far(-expected_gradient(pi, rewards, lambda i: values_along(values, i), 0.0), expected)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_a_value_that_sees_the_token_biases_the_gradient(lam):
    """Read one token late: V(a) stands at the first token, and at the second the value of (a, b), 0: all is over.

    The baseline then takes away the very difference that the first token makes.
    """
    pi, ref = policy(0, requires_grad=True), policy(100)
    rewards = all_rewards(pi, ref)
    values = exact_values(pi, rewards)

    def late(i):
        return torch.stack([values[0], values[1 + SEQUENCES[i][0]], values.new_zeros(())])[None]

    expected = objective_gradient(pi, ref)
    assert far(-expected_gradient(pi, rewards, late, lam), expected)
    assert close(-expected_gradient(pi, rewards, lambda i: values_along(values, i), lam), expected)


@pytest.mark.parametrize("seed", range(2))
def test_k1_in_the_reward_has_the_true_gradient_of_the_kl(seed):
    """Scores 0, kl_coef 1: the expected gradient of the loss is grad KL(pi || ref), not grad KL(ref || pi).

    k1 inside of the loss has expected gradient 0, and k3 there has that of the other KL (tests/test_estimators.py).
    """
    pi, ref = policy(seed, requires_grad=True), policy(seed + 100)
    rewards = all_rewards(pi, ref, scores=[0.0] * 9, kl_coef=1.0)
    result = expected_gradient(pi, rewards, lambda i: torch.zeros_like(MASK), 1.0)
    p, q = probabilities(pi), probabilities(ref)
    assert close(result, gradient(kl(p, q), pi)) and result.norm() > 0.1
    assert far(result, gradient(kl(q, p), pi))


def test_the_optimum_of_the_regularised_objective_is_stationary():
    """At pi = ref exp(r / kl_coef) / Z the shaped rewards of all sequences are equal, and the expected gradient is 0.

    The optimum over sequences, as a policy over tokens: pi(a) and pi(b | a) of that distribution.
    """
    ref = policy(100)
    optimum = (probabilities(ref).log() + torch.tensor(REWARDS, dtype=torch.float64) / 0.3).softmax(0).view(V, V)
    pi = torch.cat([optimum.sum(1).log(), optimum.log().flatten()]).requires_grad_()
    rewards = all_rewards(pi, ref)
    assert (rewards.sum(1) - rewards[0].sum()).abs().max() < 1e-9
    values = exact_values(pi, rewards)
    for lam in (0.0, 0.95, 1.0):
        assert expected_gradient(pi, rewards, lambda i: values_along(values, i), lam).norm() < 1e-9


# -------------------------------------------------------------------------------------------------------- token_values


def test_the_value_at_index_t_is_read_from_the_state_before_token_t(value_model):
    """The head on hidden[t - 1] of each row alone, unpadded; 0 at the prompt, in the hole and in the padding."""
    rows = ragged_rollout()
    ids, mask = one_batch(rows)
    values = ppo.token_values(value_model, ids, mask)
    assert values.shape == ids.shape and values.dtype == torch.float32
    assert torch.equal(values != 0, mask.bool())
    for n, (row_ids, row_mask) in enumerate(rows):
        hidden = value_model.base_model(input_ids=torch.tensor([row_ids])).last_hidden_state[0]
        heads = (hidden @ value_model.score.weight[0]).tolist()
        for t in range(len(row_ids)):
            if row_mask[t]:
                assert values[n, t].item() == approx(heads[t - 1], 1e-5)
                assert abs(values[n, t].item() - heads[t]) > 1e-3


def test_a_value_does_not_see_its_own_token_or_a_later_one(value_model):
    """Another token at index t leaves the values up to and including t as they are, and changes those after it."""
    ids = torch.arange(20, 32)[None]
    mask = (torch.arange(12) >= 3).float()[None]
    values = ppo.token_values(value_model, ids, mask)
    for t in range(3, 12):
        changed = ids.clone()
        changed[0, t] = 77
        difference = (ppo.token_values(value_model, changed, mask) - values).abs()[0]
        assert (difference[: t + 1] <= 1e-6).all() and (difference[t + 1 :] > 1e-6).all()


def test_values_reach_the_whole_value_model(value_model):
    """They are differentiable: head and body both get a gradient."""
    ids, mask = one_batch(ragged_rollout())
    loss = ppo.token_values(value_model, ids, mask).square().sum()
    gradients = torch.autograd.grad(loss, [value_model.score.weight, value_model.model.norm.weight])
    assert all(x.norm() > 1e-4 for x in gradients)


# ------------------------------------------------------------------------------------------------------- over_rollout


@pytest.mark.parametrize("budget", [1, 16, 1000])
def test_over_rollout_keeps_the_order_and_equals_a_single_pass(budget, tiny_model, value_model):
    """Log-probabilities and entropies, a tuple, and values, one tensor, whatever the micro-batches: (N, L) each."""
    rows = ragged_rollout()
    ids, mask = one_batch(rows)
    both = ppo.over_rollout(rows, budget, CPU, lambda ids, mask: ppo.token_logprobs(tiny_model, ids, mask, 0.7))
    (values,) = ppo.over_rollout(rows, budget, CPU, lambda ids, mask: ppo.token_values(value_model, ids, mask))
    expected = [*ppo.token_logprobs(tiny_model, ids, mask, 0.7), ppo.token_values(value_model, ids, mask)]
    for result, whole in zip([*both, values], expected):
        assert result.shape == (4, 8) and not result.requires_grad
        assert torch.allclose(result, whole, atol=1e-5) and torch.equal(result != 0, mask.bool())


@pytest.mark.parametrize("budget", [1, 9, 16, 24, 1000])
def test_over_rollout_by_hand(budget):
    """Micro-batches sort the rows by length: each result comes back to its own row, padded with 0."""
    rows = [([5, 6], [0, 1]), ([1, 2, 3, 4], [0, 1, 1, 1]), ([7, 8, 9], [0, 0, 1])]
    (result,) = ppo.over_rollout(rows, budget, CPU, lambda ids, mask: ids * mask)
    assert result.tolist() == [[0, 6, 0, 0], [0, 2, 3, 4], [0, 0, 9, 0]]


def test_pad():
    """Rows of unequal length, right-padded with 0."""
    assert ppo.pad([[1.0, 2.0, 3.0], [4.0], [5.0, 6.0]], CPU).tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]


# -------------------------------------------------------------------------------------------------------- minibatches


def options(**changes):
    """Args of 32 prompts, two samples each, three epochs of four minibatches."""
    return ppo.Args(**({"prompts_per_step": 32, "group_size": 2, "num_epochs": 3, "num_minibatches": 4} | changes))


def epochs_of(parts):
    """The rows of each four minibatches, one after the other."""
    return [[n for part in parts[k : k + 4] for n in part] for k in range(0, len(parts), 4)]


def test_minibatches_hold_every_row_once_per_epoch():
    """64 rows, 3 epochs of 4 parts: twelve minibatches of 16, each four of them a permutation, in another order."""
    parts = list(ppo.minibatches(64, options(), step=5))
    assert [len(part) for part in parts] == [16] * 12
    epochs = epochs_of(parts)
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(("epochs", "count"), [(1, 1), (1, 8), (4, 1), (2, 64)])
def test_there_are_num_epochs_times_num_minibatches_parts(epochs, count):
    """Down to one row each."""
    parts = list(ppo.minibatches(64, options(num_epochs=epochs, num_minibatches=count), step=1))
    assert [len(part) for part in parts] == [64 // count] * (epochs * count)


def test_minibatches_depend_on_seed_and_step_and_on_nothing_else():
    """No shuffle occurs twice in a run, and resuming at a step gives the same ones."""
    torch.manual_seed(1)
    first = list(ppo.minibatches(64, options(), step=2))
    torch.rand(5)
    assert first == list(ppo.minibatches(64, options(), step=2))
    others = [ppo.minibatches(64, options(), step=1), ppo.minibatches(64, options(), step=3)]
    others.append(ppo.minibatches(64, options(seed=1), step=2))
    shuffles = {tuple(epoch) for parts in [first, *map(list, others)] for epoch in epochs_of(parts)}
    assert len(shuffles) == 12


@pytest.mark.parametrize("changes", [{"num_minibatches": 5}, {"gamma": 1.1}, {"lam": 1.5}, {"reward": ()}])
def test_options_that_make_no_sense_are_refused(changes):
    """64 rows do not split into 5 equal parts; gamma and lambda are at most 1; the message names the flag."""
    flag = "--" + next(iter(changes)).replace("_", "-")
    with pytest.raises(SystemExit, match=flag):
        options(**changes)


# ------------------------------------------------------------------------------------------------------- micro-batches


def step_gradient(tiny_model, value_model, budget):
    """Loss and gradient of one minibatch over both models, composed as in main; and how many micro-batches it had."""
    rows, total, count = ragged_rollout(), 0.0, 0
    _, mask = one_batch(rows)
    generator = torch.Generator().manual_seed(7)
    shift, advantages, old_values, returns = (torch.randn(4, 8, generator=generator) for _ in range(4))
    num_tokens = int(mask.sum())
    assert num_tokens == 12
    for n, ids, x in ppo.micro_batches(rows, budget, CPU):
        count, length = count + 1, ids.shape[1]
        logprobs, entropy = ppo.token_logprobs(tiny_model, ids, x, 0.7)
        values = ppo.token_values(value_model, ids, x)
        old_logprobs = logprobs.detach() + 0.3 * shift[n, :length]  # ratios beyond both bounds
        loss = ppo.policy_loss(logprobs, old_logprobs, advantages[n, :length], x, 0.2, num_tokens)
        inputs = values, old_values[n, :length], returns[n, :length]
        loss = loss + 0.5 * ppo.value_loss(*inputs, x, 0.2, num_tokens)
        total = total + loss - 0.1 * (entropy * x).sum() / num_tokens
    return total.item(), parameter_gradient(total, tiny_model, value_model), count


def test_loss_and_gradient_do_not_depend_on_the_token_budget(tiny_model, value_model):
    """Policy loss, value loss and entropy bonus together; one row at a time up to all at once: 1e-5 of the norm."""
    whole, expected, count = step_gradient(tiny_model, value_model, 1000)
    assert count == 1
    for budget, parts in ((1, 4), (10, 3), (16, 2)):
        loss, split, count = step_gradient(tiny_model, value_model, budget)
        assert count == parts and loss == pytest.approx(whole, rel=1e-5)
        assert_equal_gradients(split, expected)
    value_model.zero_grad()


# -------------------------------------------------------------------------------------------------- accuracy, warnings


def test_accuracy_of_completions():
    """Two right of three; none where a row has no answer."""
    rows = [{"answer": "4"}, {"answer": "5"}, {"answer": "#### 6"}]
    assert ppo.accuracy_of(["#### 4", "#### 4", "6 is\n#### 6"], rows) == {"accuracy": approx(2 / 3)}
    assert ppo.accuracy_of(["#### 4", "#### 5"], [{"answer": "4"}, {"answer": None}]) == {}
    assert ppo.accuracy_of(["#### 4"], [{"prompt": "2+2="}]) == {}


HEALTHY = {"entropy": 1.0, "reward_std": 0.5, "kl_ref_seq": 2.0, "clip_frac": 0.1}
WARNINGS = {  # metric -> healthy at the limit, beyond it, what the message has
    "kl_ref_seq": (15.0, 15.1, "--kl-coef"),
    "clip_frac": (0.3, 0.31, "--target-kl"),
    "entropy": (0.1, 0.09, "--entropy-coef"),
    "reward_std": (1e-3, 0.0, "equal"),
}


def warnings_of(steps, capsys):
    """What each step prints, when its metrics follow one another; the first row is the evaluation before training."""
    rows, printed = [{"step": 0, "eval/reward_sampled": 0.5}], []
    for metrics in steps:
        ppo.warn(rows, HEALTHY | metrics)
        printed.append(capsys.readouterr().out)
        rows.append(HEALTHY | metrics)
    return printed


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_comes_once_when_a_limit_is_passed(name, capsys):
    """Silent while healthy, at the limit too; a line on passing it; none while it stays there; again the next time."""
    at_limit, beyond, word = WARNINGS[name]
    steps = [{}, {name: at_limit}, {name: beyond}, {name: beyond}, {}, {name: beyond}]
    printed = warnings_of(steps, capsys)
    assert [text.count("warning:") for text in printed] == [0, 0, 1, 0, 0, 1]
    assert word in printed[2] and printed[2] == printed[5]
    if name != "reward_std":
        assert name in printed[2]


def test_a_warning_comes_in_the_first_step_too(capsys):
    """Nothing precedes it but the evaluation; of the entropy the first step is the measure, so it cannot warn there."""
    (printed,) = warnings_of([{"kl_ref_seq": 20.0, "clip_frac": 0.5, "reward_std": 0.0, "entropy": 0.001}], capsys)
    assert printed.count("warning:") == 3 and "entropy" not in printed
    ppo.warn([], HEALTHY)
    assert capsys.readouterr().out == ""


def test_without_a_reference_there_is_no_warning_about_it(capsys):
    """kl_coef 0: the metric is not there."""
    metrics = {name: value for name, value in HEALTHY.items() if name != "kl_ref_seq"}
    ppo.warn([metrics], metrics)
    assert capsys.readouterr().out == ""


# -------------------------------------------------------------------------------------------------------- value_source


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizers and configurations: the policy's, the same for a reward model, one with a pad token more, another."""
    root = tmp_path_factory.mktemp("tokenizers")
    longer = sft.tiny_tokenizer()
    longer.add_special_tokens({"pad_token": "<|another pad|>"})
    made = {
        "policy": sft.tiny_tokenizer(),
        "rm": sft.tiny_tokenizer(),
        "longer": longer,
        "other": byte_tokenizer(CHATML),
    }
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(root / name)
        config = ppo.transformers.Qwen3Config(vocab_size=300, num_hidden_layers=1, max_position_embeddings=64)
        config.save_pretrained(root / name)
    return {name: str(root / name) for name in made}


def source(folders, reward, value_model=None, num_tokens=64):
    """value_source, with folders by their short names."""
    args = ppo.Args(
        model=folders["policy"],
        reward=tuple(folders.get(name, name) for name in reward),
        value_model=folders.get(value_model),
    )
    name, flag = ppo.value_source(args, sft.tiny_tokenizer(), num_tokens)
    return next(short for short, path in folders.items() if path == name), flag


def test_the_value_model_starts_from_the_first_reward_model_or_else_from_the_policy(folders):
    """--value-model comes first; then the first learned reward; where all rewards are functions, the policy."""
    assert source(folders, ["rm"]) == ("rm", "--reward")
    assert source(folders, ["exact", "format", "mine.py:reward", "longer", "rm"]) == ("longer", "--reward")
    assert source(folders, ["exact"]) == source(folders, ["format", "a/mine.py:reward"]) == ("policy", "--model")
    assert source(folders, ["rm"], value_model="longer") == ("longer", "--value-model")
    assert source(folders, ["exact"], value_model="policy") == ("policy", "--value-model")
    assert source(folders, ["other"], value_model="rm") == ("rm", "--value-model")  # a reward may read other ids


def test_a_source_with_another_tokenizer_is_refused(folders):
    """Its ids would mean something else: the message names the flag, the folder and the way out."""
    with pytest.raises(SystemExit, match=r"^--reward .*other has another tokenizer .*name another.*--value-model"):
        source(folders, ["exact", "other"])
    with pytest.raises(SystemExit, match=r"^--value-model .*other has another tokenizer"):
        source(folders, ["rm"], value_model="other")


def test_a_vocabulary_that_lacks_one_of_the_policys_tokens_is_refused(folders):
    """More tokens are harmless, fewer are not: ids beyond the embeddings could come up."""
    args = ppo.Args(model=folders["policy"], reward=(folders["rm"],))
    with pytest.raises(SystemExit, match="another tokenizer"):
        ppo.value_source(args, ppo.transformers.AutoTokenizer.from_pretrained(folders["longer"]), 64)


def test_a_source_with_too_small_a_window_is_refused(folders):
    """It has to read as many tokens as the policy: 64 fit, 65 do not."""
    assert source(folders, ["rm"], num_tokens=64) == ("rm", "--reward")
    with pytest.raises(SystemExit, match=r"^--reward .*rm holds 64 tokens, not 65"):
        source(folders, ["rm"], num_tokens=65)


def test_every_order_of_rewards_takes_the_first_that_is_learned(folders):
    """Functions are passed over wherever they stand."""
    for order in itertools.permutations(["exact", "format", "rm"]):
        assert source(folders, order) == ("rm", "--reward")
