"""Every formula against values worked by hand: the arithmetic stands beside the number."""

import math

import pytest
import torch

import dpo
import grpo
import ppo
import rm
import sft
from variants import (
    cispo,
    dapo,
    dr_grpo,
    gspo,
    off_policy_grpo,
    ppo_penalty,
    ppo_vtrace,
    reinforce,
    reinforce_pp,
    remax,
    rloo,
)  # fmt: skip

LN2 = math.log(2)
INF, NAN = math.inf, math.nan


def T(*values):
    return torch.tensor(values)


def logs(*ratios):
    """Log-probabilities whose ratio to 0 is this, and which take a gradient."""
    return torch.tensor(ratios).log().requires_grad_()


def close(x, expected, tolerance=2e-6):
    return torch.allclose(torch.as_tensor(x), torch.as_tensor(expected, dtype=torch.float32), tolerance, tolerance)


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


# --------------------------------------------------------------------------------------------------------------- sft.py


def test_sft_loss_of_ragged_rows_with_a_hole():
    """(1/2 + 1/8 + 2) / 3 tokens = 7/8: the prompt's -5 and the hole's -9 do not count. Gradient -1/3 where trained."""
    logprobs = T([-5.0, -0.5, -9.0, -0.125], [-5.0, -2.0, 0.0, 0.0]).requires_grad_()
    mask = T([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    loss = sft.sft_loss(logprobs, mask, 3)
    assert loss.shape == () and loss.item() == 7 / 8
    assert close(gradient(loss, logprobs), -mask / 3)


def test_sft_loss_counts_the_tokens_of_the_whole_step():
    """3/4 nats on 2 tokens and 1/4 on 1 in a step of 8 tokens: 6/64 + 2/64 = 1/8, not the mean of means 5/16."""
    assert sft.sft_loss(T([-0.25, -0.5]), torch.ones(1, 2), 8).item() == 6 / 64
    assert sft.sft_loss(T([-0.25]), torch.ones(1, 1), 8).item() == 2 / 64


# ---------------------------------------------------------------------------------------------------------------- rm.py


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "center", "loss", "slope"),
    [  # slope: the derivative by the chosen reward, -sigmoid(-gap) + 2 center (chosen + rejected)
        (0.0, 0.0, 0.0, 0.0, LN2, -1 / 2),
        (LN2, 0.0, 0.0, 0.0, math.log(3 / 2), -1 / 3),  # sigmoid(ln 2) = 2/3
        (0.0, LN2, 0.0, 0.0, math.log(3), -2 / 3),
        (LN2 + 1, 0.0, 1.0, 0.0, math.log(3 / 2), -1 / 3),  # the margin is taken off the gap
        (1.0, 2.0, 0.0, 0.1, 1.313262 + 0.9, -0.731059 + 0.6),  # ln(1 + e) = 1.313262
        (1.0, -1.0, 0.0, 5.0, 0.126928, -0.119203),  # opposite rewards: no centring; ln(1 + e^-2)
        (100.0, 0.0, 0.0, 0.0, 0.0, 0.0),  # right by far: counts nothing
        (0.0, 100.0, 0.0, 0.0, 100.0, -1.0),  # wrong by far: the gap itself, no overflow
    ],
)
def test_bradley_terry(chosen, rejected, margin, center, loss, slope):
    rewards = T(chosen).requires_grad_()
    losses = rm.bradley_terry_loss(rewards, T(rejected), margin, center)
    assert losses.shape == (1,) and close(losses, [loss])
    assert close(gradient(losses.sum(), rewards), [slope])


def test_bradley_terry_sees_differences_alone_and_takes_a_margin_per_pair():
    """Adding 7 to both sides changes nothing at center_coef 0. Gaps 1 - 1 and 1 - 0: ln 2 and ln(1 + 1/e)."""
    chosen, rejected = T(0.3, -2.0), T(1.0, -2.5)
    assert close(rm.bradley_terry_loss(chosen + 7, rejected + 7), rm.bradley_terry_loss(chosen, rejected), 1e-5)
    assert not close(
        rm.bradley_terry_loss(chosen + 7, rejected, center_coef=0.1), rm.bradley_terry_loss(chosen, rejected)
    )
    assert close(rm.bradley_terry_loss(T(1.0, 1.0), T(0.0, 0.0), T(1.0, 0.0)), [LN2, 0.313262])


# --------------------------------------------------------------------------------------------------------------- dpo.py


@pytest.mark.parametrize(
    ("logps", "beta", "smoothing", "loss", "slope"),
    [  # slope by the chosen log-probability: beta * (smoothing - sigmoid(-z))
        ((-10.0, -12.0, -11.0, -11.5), 0.1, 0.0, 0.620957, -0.1 * 0.462570),  # z = .1 * (1 + .5) = .15
        ((-10.0, -12.0, -11.0, -11.5), 0.1, 0.1, 0.635957, 0.1 * (0.1 - 0.462570)),
        ((-3.0, -4.0, -3.0, -4.0), 0.5, 0.0, LN2, -0.25),  # policy = reference
        ((-2.0, -1.0, -1.0, -2.0), LN2, 0.0, math.log(5), -LN2 * 4 / 5),  # z = -2 ln 2: sigmoid(-z) = 4/5
        ((0.0, -300.0, 0.0, 0.0), 1.0, 0.0, 0.0, 0.0),
        ((-300.0, 0.0, 0.0, 0.0), 1.0, 0.0, 300.0, -1.0),
        ((-300.0, 0.0, 0.0, 0.0), 1.0, 0.25, 225.0, -0.75),  # 3/4 * 300 + 1/4 * 0
    ],
)
def test_dpo_loss(logps, beta, smoothing, loss, slope):
    chosen, rejected, ref_chosen, ref_rejected = (T(x).requires_grad_() for x in logps)
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing)
    assert losses.shape == (1,) and close(losses, [loss])
    assert close(chosen_rewards, [beta * (logps[0] - logps[2])]) and not chosen_rewards.requires_grad
    assert close(rejected_rewards, [beta * (logps[1] - logps[3])]) and not rejected_rewards.requires_grad
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert close(by_chosen, [slope]) and close(by_rejected, [-slope])


# -------------------------------------------------------------------------------------------------------------- grpo.py


@pytest.mark.parametrize(
    ("rewards", "size", "expected"),
    [
        ((1.0, 0.0, 0.0, 0.0), 4, (1.4997, -0.4999, -0.4999, -0.4999)),  # std 1/2 (ddof 1): .75 / .5001
        ((1.0, 0.0), 2, (0.70701, -0.70701)),  # std .70711
        ((1.0,) + (0.0,) * 15, 16, (3.7485,) + (-0.2499,) * 15),  # std 1/4: (G - 1) / sqrt(G), nearly
        ((0.0, 2.0, 10.0, 14.0), 2, (-0.70706, 0.70706, -0.70708, 0.70708)),  # neighbours are a group
        ((0.0, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95), 8, (-2.474137,) + (0.353448,) * 7),  # std .3358757
    ],
)
def test_group_advantages(rewards, size, expected):
    found = grpo.group_advantages(T(*rewards), size)
    assert found.shape == (len(rewards),) and close(found, expected, 1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.2, 0.95, -0.1, 1e6])
def test_a_group_of_equal_rewards_has_advantage_exactly_0(value):
    """The mean of eight float32 rewards of 1.2 is not 1.2: the formula alone would give up to .0012."""
    advantages = grpo.group_advantages(T(*[value] * 8, *[0.0] * 7, 1.0), 8)
    assert advantages[:8].tolist() == [0.0] * 8 and (advantages[8:] != 0).all()


def test_k3_and_its_gradient():
    """d = ref - log pi. e^3 - 4, e^-3 + 2, 0, and 2 - ln 2 - 1; the gradient by log pi is 1 - e^d."""
    logprobs = T(-4.0, -1.0, -2.0, -math.log(4)).requires_grad_()
    k3 = grpo.kl_k3(logprobs, T(-1.0, -4.0, -2.0, -LN2))
    assert close(k3, [16.085537, 2.049787, 0.0, 0.306853])
    assert close(gradient(k3.sum(), logprobs), [-19.085537, 0.950213, 0.0, -1.0])


CLIP = [  # A, ratio -> min(A r, A clip(r, .8, 1.2)), and its derivative by log r
    (-5.0, 0.5, -4.0, 0.0),  # -2.5 against -4: min(r, clip r) A would be -2.5
    (-5.0, 1.0, -5.0, -5.0),
    (-5.0, 1.5, -7.5, -7.5),  # a bad action that became likelier is not clipped
    (-1.0, 0.5, -0.8, 0.0),
    (-1.0, 1.0, -1.0, -1.0),
    (-1.0, 1.5, -1.5, -1.5),
    (1.0, 0.5, 0.5, 0.5),  # a good action that became less likely is not clipped
    (1.0, 1.0, 1.0, 1.0),
    (1.0, 1.5, 1.2, 0.0),
    (5.0, 0.5, 2.5, 2.5),
    (5.0, 1.0, 5.0, 5.0),
    (5.0, 1.5, 6.0, 0.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "objective", "slope"), CLIP)
def test_both_sides_of_the_clip(advantage, ratio, objective, slope):
    """One token: all that clip do it alike. Old log-probabilities are -1, so that a ratio of probabilities is meant."""
    logprobs, old, mask = logs([ratio]).detach() - 1, T([-1.0]), torch.ones(1, 1)
    logprobs.requires_grad_()
    losses = [
        grpo.grpo_loss(logprobs, old, None, T(advantage), mask, 0.2, 0.0, 1),
        ppo.policy_loss(logprobs, old, T([advantage]), mask, 0.2, 1),
        dr_grpo.dr_grpo_loss(logprobs, old, T(advantage), mask, 0.2, 1, 1),
        rloo.rloo_loss(logprobs, old, T(advantage), mask, 0.2, 1),
        dapo.dapo_loss(logprobs, old, T(advantage), mask, 0.2, 0.2, 1),
        gspo.gspo_loss(logprobs, old, T(advantage), mask, 0.2, 0.2, 1),
        off_policy_grpo.off_policy_loss(logprobs, old, T(advantage), mask, mask, 0.2, 1),
    ]
    for loss in losses:
        assert loss.shape == () and close(loss, -objective)
        assert close(gradient(loss, logprobs), [[-slope]])


RAGGED = torch.tensor([[0.0] + [1.0] * 2 + [0.0] * 4, [0.0] + [1.0] * 6])  # 2 and 6 actions behind a prompt of one


def test_denominators():
    """A = +1 on 2 tokens and -1 on 6. GRPO: 1/2 (-1 + 1) = 0, gradient -1/(2*2) and +1/(2*6). Token mean, as in PPO,
    DAPO and CISPO: (-2 + 6) / 8 = +1/2, gradient -1/8 and +1/8. Constant 8, as in Dr. GRPO: (-2 + 6) / 8 / 2 = +1/4,
    gradient -1/16 and +1/16. Sums over sequences: gradient -1/2 and +1/2. Padded to 10 and alone in a micro-batch they
    are the same."""
    for width in (7, 10):
        mask = torch.nn.functional.pad(RAGGED, (0, width - 7))
        logprobs = torch.zeros_like(mask, requires_grad=True)
        old = torch.zeros_like(mask)
        loss = grpo.grpo_loss(logprobs, old, None, T(1.0, -1.0), mask, 0.2, 0.0, 2)
        assert close(loss, 0.0) and close(gradient(loss, logprobs), mask * T([-1 / 4], [1 / 12]))
        rows = [
            grpo.grpo_loss(logprobs[n, None], old[n, None], None, T(a), mask[n, None], 0.2, 0.0, 2)
            for n, a in ((0, 1.0), (1, -1.0))
        ]
        assert close(rows[0], -0.5) and close(rows[1], 0.5)
        advantages = T([1.0], [-1.0]) * mask
        loss = ppo.policy_loss(logprobs, old, advantages, mask, 0.2, 8)
        assert close(loss, 0.5) and close(gradient(loss, logprobs), mask * T([-1 / 8], [1 / 8]))
        for of, value, slope in (
            (lambda *x: dapo.dapo_loss(*x, 0.2, 0.28, 8), 0.5, (-1 / 8, 1 / 8)),
            (lambda *x: cispo.cispo_loss(*x, 4.0, 8), 0.0, (-1 / 8, 1 / 8)),
            (lambda *x: dr_grpo.dr_grpo_loss(*x, 0.2, 8, 2), 0.25, (-1 / 16, 1 / 16)),
            (lambda *x: gspo.gspo_loss(*x, 0.2, 0.2, 2), 0.0, (-1 / 4, 1 / 12)),
            (lambda *x: off_policy_grpo.off_policy_loss(*x, x[3], 0.2, 2), 0.0, (-1 / 4, 1 / 12)),
            (lambda *x: rloo.rloo_loss(*x, 0.2, 2), 0.0, (-1 / 2, 1 / 2)),
            (lambda x, _, a, m: reinforce.reinforce_loss(x, a[:, None] * m, m, 2), 0.0, (-1 / 2, 1 / 2)),
        ):
            a = T(1.0, -1.0)
            loss = of(logprobs, old, a, mask)
            assert close(loss, value) and close(gradient(loss, logprobs), mask * T([slope[0]], [slope[1]]))
            rows = [of(logprobs[n, None], old[n, None], a[n, None], mask[n, None]) for n in (0, 1)]
            assert close(sum(rows), value) and close(gradient(rows[0], logprobs)[0], mask[0] * slope[0])


def test_grpo_loss_with_kl_a_hole_and_columns_that_do_not_count():
    """3 actions around a hole: ratios 1, 3/2, 1/2 and A = 2 give 2, 2.4 (clipped), 1; k3 at d = ln 2 is .306853.

    -(5.4 / 3 - .04 * .306853) / 4 sequences = -.446931. What stands at mask 0 changes nothing.
    """
    mask = T([0.0, 1.0, 1.0, 0.0, 1.0])
    logprobs = logs([7.0, 1.0, 1.5, 9.0, 0.5])
    ref = logprobs.detach() + T([5.0, LN2, LN2, -3.0, LN2])
    loss = grpo.grpo_loss(logprobs, T([0.0] * 5), ref, T(2.0), mask, 0.2, 0.04, 4)
    assert close(loss, -0.446931)
    # by log pi: -(A r - .04 * (1 - 2)) / 3 / 4, without the first term where it is clipped
    assert close(gradient(loss, logprobs), [[0.0, -2.04 / 12, -0.04 / 12, 0.0, -1.04 / 12]])


def test_at_ratio_1_the_loss_is_0_but_its_gradient_is_not():
    """A completion of one token among them; advantages of a group sum to 0."""
    mask = T([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    logprobs = torch.zeros(2, 3, requires_grad=True)
    loss = grpo.grpo_loss(logprobs, torch.zeros(2, 3), None, T(0.7, -0.7), mask, 0.2, 0.0, 2)
    assert close(loss, 0.0) and close(gradient(loss, logprobs), [[-0.175, -0.175, 0.0], [0.35, 0.0, 0.0]])


# --------------------------------------------------------------------------------------------------------------- ppo.py


def test_the_score_stands_at_the_last_action():
    """-.1 * log-ratio at every action, and the score at the last one, behind holes, before padding; 0 elsewhere."""
    mask = T([0.0, 1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0])
    logprobs = T([9.0, -1.0, 9.0, -2.0, 9.0], [9.0, -1.0, -1.0, -1.0, -3.0], [9.0, -4.0, 9.0, 9.0, 9.0])
    rewards = ppo.kl_shaped_rewards(T(1.0, -2.0, 0.5), logprobs, torch.full((3, 5), -2.0) * mask, mask, 0.1)
    expected = [[0, -0.1, 0, 1.0, 0], [0, -0.1, -0.1, -0.1, -1.9], [0, 0.7, 0, 0, 0]]
    assert close(rewards, expected)
    kl = ((logprobs + 2) * mask).sum(1)
    assert close(rewards.sum(1), T(1.0, -2.0, 0.5) - 0.1 * kl)  # score - kl_coef * the sequence's log-ratio


@pytest.mark.parametrize(
    ("rewards", "values", "mask", "gamma", "lam", "advantages", "returns"),
    [
        ((0, 0, 1), (0.5, 0.6, 0.7), (1, 1, 1), 1.0, 0.95, (0.46575, 0.385, 0.3), (0.96575, 0.985, 1.0)),
        ((0, 0, 1), (0.5, 0.6, 0.7), (1, 1, 1), 1.0, 1.0, (0.5, 0.4, 0.3), (1, 1, 1)),  # Monte Carlo
        ((0, 0, 1), (0.5, 0.6, 0.7), (1, 1, 1), 1.0, 0.0, (0.1, 0.1, 0.3), (0.6, 0.7, 1)),  # the one-step residual
        ((0, 0, 1), (0.5, 0.6, 0.7), (1, 1, 1), 0.5, 1.0, (-0.25, -0.1, 0.3), (0.25, 0.5, 1)),  # G_t = 1/4, 1/2, 1
        ((0, 1, 0), (0, 0, 100), (1, 1, 0), 1.0, 0.95, (0.95, 1, 0), (0.95, 1, 0)),
        ((0, 0, 0, 1), (0.5, 9, 9, 0.7), (1, 0, 0, 1), 1.0, 0.95, (0.485, 0, 0, 0.3), (0.985, 0, 0, 1)),
        ((NAN, 1, NAN), (NAN, 0.25, NAN), (0, 1, 0), 1.0, 0.95, (0, 0.75, 0), (0, 1, 0)),
        ((-1,), (0.5,), (1,), 1.0, 0.95, (-1.5,), (-1,)),  # a completion of one token
    ],
)
def test_gae(rewards, values, mask, gamma, lam, advantages, returns):
    found = ppo.gae(*(torch.tensor([x], dtype=torch.float32) for x in (rewards, values, mask)), gamma, lam)
    assert close(found[0], [advantages]) and close(found[1], [returns])


def test_whiten_over_the_actions_of_a_ragged_mask():
    """Returns 1, 1, 1 and -1: mean 1/2, variance 3/4: .577350 three times and -1.732051."""
    mask = T([0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    white = ppo.whiten(T([99.0, 1.0, 1.0, 1.0], [99.0, -1.0, 99.0, 99.0]), mask)
    assert close(white, [[0, 0.577350, 0.577350, 0.577350], [0, -1.732051, 0, 0]], 1e-5)


def test_policy_loss_over_tokens():
    """Max(-A r, -A clip r) = -1.2, 1.5, -2 on three actions, divided by the 6 of the minibatch: -1.7 / 6."""
    logprobs, mask = logs([1.5, 1.5, 1.0, 8.0]), T([1.0, 1.0, 1.0, 0.0])
    loss = ppo.policy_loss(logprobs, torch.zeros(1, 4), T([1.0, -1.0, 2.0, 5.0]), mask, 0.2, 6)
    assert close(loss, -1.7 / 6) and close(gradient(loss, logprobs), [[0.0, 1.5 / 6, -2 / 6, 0.0]])


@pytest.mark.parametrize(
    ("value", "old", "clip", "loss", "slope"),
    [  # the return is 1
        (0.5, 9.0, 0.0, 0.125, -0.5),  # without a clip the old value does not matter
        (0.5, 0.4, 0.2, 0.125, -0.5),  # within .2 of the old value
        (0.9, 0.5, 0.2, 0.045, 0.0),  # clipped to .7: its error .3 is larger, and constant
        (0.2, 0.9, 0.2, 0.32, -0.8),  # clipped to .7, but the value's own error is larger
        (1.6, 1.2, 0.2, 0.18, 0.6),  # clipped to 1.4: the value's own error .6 is larger
        (1.1, 1.5, 0.2, 0.045, 0.0),  # clipped to 1.3
    ],
)
def test_value_loss(value, old, clip, loss, slope):
    values = T([value, 77.0]).requires_grad_()
    found = ppo.value_loss(values, T([old, 0.0]), T([1.0, 0.0]), T([1.0, 0.0]), clip, 1)
    assert close(found, loss) and close(gradient(found, values), [[slope, 0.0]], 1e-5)


# ----------------------------------------------------------------------------------- policy gradients without a critic


@pytest.mark.parametrize(
    ("function", "rewards", "size", "expected"),
    [
        (dr_grpo.centered_advantages, (1.0, 0.0, 0.0, 0.0), 4, (0.75, -0.25, -0.25, -0.25)),
        (dr_grpo.centered_advantages, (0.0, 2.0, 10.0, 14.0), 2, (-1.0, 1.0, -2.0, 2.0)),  # no std
        (rloo.rloo_advantages, (1.0, 0.0, 0.0, 0.0), 4, (1.0, -1 / 3, -1 / 3, -1 / 3)),
        (rloo.rloo_advantages, (1.0, 0.0, 0.0, 1.0), 4, (2 / 3, -2 / 3, -2 / 3, 2 / 3)),  # 1 - 1/3, 0 - 2/3
        (rloo.rloo_advantages, (0.0, 2.0, 10.0, 14.0), 2, (-2.0, 2.0, -4.0, 4.0)),
        (rloo.rloo_advantages, (0.0, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95), 8, (-0.95,) + (0.1357143,) * 7),
    ],
)
def test_advantages_without_a_std(function, rewards, size, expected):
    found = function(T(*rewards), size)
    assert found.shape == (len(rewards),) and close(found, expected)
    assert function(T(*[0.95] * 8), size).tolist() == [0.0] * 8  # exactly, though the mean of eight .95 is not .95


def test_dr_grpo_divides_by_a_constant():
    """2 and 4 tokens, A = +1 and -1, ratio 1, constant 8: (-2 + 4) / 8 / 2 = 1/8. GRPO: 0; token mean: (-2 + 4) / 6."""
    mask = T([0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0, 1.0])
    zeros = torch.zeros_like(mask)
    assert close(dr_grpo.dr_grpo_loss(zeros, zeros, T(1.0, -1.0), mask, 0.2, 8, 2), 1 / 8)
    assert close(dapo.dapo_loss(zeros, zeros, T(1.0, -1.0), mask, 0.2, 0.28, 6), 1 / 3)


@pytest.mark.parametrize(
    ("advantage", "value", "slope"), [(1.0, -1.2, 0.0), (-1.0, 1.5, 1.5), (2.0, -2.4, 0.0), (-2.0, 3.0, 3.0)]
)
def test_rloo_clips_whole_completions(advantage, value, slope):
    """Ratios 2 and 3/4 around a hole: 3/2 for the completion, beyond 1.2, though the second token is below 0.8."""
    logprobs, mask = logs([2.0, 9.0, 0.75]), T([1.0, 0.0, 1.0])
    loss = rloo.rloo_loss(logprobs, torch.zeros(1, 3), T(advantage), mask, 0.2, 4)
    assert close(loss, value / 4) and close(gradient(loss, logprobs), [[slope / 4, 0.0, slope / 4]])


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective", "slope"),
    [
        (1.0, 1.25, 1.25, 1.25),  # above 1.2, below 1.28
        (1.0, 1.3, 1.28, 0.0),
        (1.0, 0.5, 0.5, 0.5),
        (-1.0, 1.3, -1.3, -1.3),
        (-1.0, 0.75, -0.8, 0.0),  # the lower bound is at .8, not at .72
    ],
)
def test_dapo_clips_higher(advantage, ratio, objective, slope):
    logprobs, mask = logs([ratio, 5.0]), T([1.0, 0.0])
    loss = dapo.dapo_loss(logprobs, torch.zeros(1, 2), T(advantage), mask, 0.2, 0.28, 10)
    assert close(loss, -objective / 10) and close(gradient(loss, logprobs), [[-slope / 10, 0.0]])


def test_the_overlong_penalty():
    """At most 20 tokens, the last 4 of them cost: 0 up to 16, a quarter for each."""
    found = dapo.overlong_penalty(T(1, 16, 17, 18, 20, 21), 20, 4)
    assert close(found, [0.0, 0.0, -0.25, -0.5, -1.0, -1.0])


@pytest.mark.parametrize("advantage", [1.0, -2.0])
def test_cispo_keeps_every_gradient(advantage):
    """Ratios .1, 1 and 10 and a cap of 5: weights .1, 1 and 5, constants; the gradient of -w A log pi is -w A."""
    logprobs, mask = logs([0.1, 1.0, 10.0, 10.0]), T([1.0, 1.0, 1.0, 0.0])
    loss = cispo.cispo_loss(logprobs, torch.zeros(1, 4), T(advantage), mask, 4.0, 3)
    weights = T([0.1, 1.0, 5.0, 0.0])
    assert close(loss, -advantage * (0.1 * math.log(0.1) + 5 * math.log(10)) / 3)
    assert close(gradient(loss, logprobs), -advantage * weights / 3)


def test_gspo_weighs_by_the_root_of_the_completions_ratio():
    """Log-ratios (.2, 0) and (.1, .1, .1, .1), A = +1 and -1: s = e^.1 for both, so the loss is 0, and the gradient by
    each log-ratio e^.1 / 2 / |y|: .276293 and .138146. (.5, .5) is clipped: 1.2, gradient 0 on both tokens."""
    for width in (5, 9):
        mask = torch.zeros(2, width)
        mask[0, [1, 3]] = mask[1, 1:5] = 1.0  # the first with a hole
        logprobs = torch.full((2, width), 7.0)
        logprobs[0, [1, 3]], logprobs[1, 1:5] = torch.tensor([0.2, 0.0]), 0.1
        logprobs.requires_grad_()
        loss = gspo.gspo_loss(logprobs, torch.zeros(2, width), T(1.0, -1.0), mask, 0.2, 0.2, 2)
        assert close(loss, 0.0) and close(gradient(loss, logprobs), mask * T([-0.276293], [0.138146]))
    logprobs, mask = T([0.5, 0.5]).requires_grad_(), torch.ones(1, 2)
    for clip_high, value, slope in ((0.2, 1.2, 0.0), (0.7, math.exp(0.5), math.exp(0.5) / 2)):
        loss = gspo.gspo_loss(logprobs, torch.zeros(1, 2), T(1.0), mask, 0.2, clip_high, 1)
        assert close(loss, -value) and close(gradient(loss, logprobs), [[-slope] * 2])
    logprobs = T([-0.5, -0.5]).requires_grad_()
    loss = gspo.gspo_loss(logprobs, torch.zeros(1, 2), T(-1.0), mask, 0.3, 0.2, 1)
    assert close(loss, 0.7) and close(gradient(loss, logprobs), [[0.0, 0.0]])  # e^-.5 = .61 is below 1 - .3


def test_truncated_importance_weights():
    """pi_old / pi_sampling = 1/2, 1, 3 with cap 2: 1/2, 1, 2, and 0 where mask is 0. With A = 2 and ratios 1, 3/2, 1:
    -(1/2 * 2 + 2.4 + 2 * 2) / 3 / 2; the clipped token has no gradient, and the weights take none."""
    old, mask = torch.tensor([[0.5, 1.0, 9.0, 3.0]]).log().requires_grad_(), T([1.0, 1.0, 0.0, 1.0])
    weights = off_policy_grpo.truncated_weights(old, torch.zeros(1, 4), mask, 2.0)
    assert close(weights, [[0.5, 1.0, 0.0, 2.0]]) and not weights.requires_grad
    logprobs = (old.detach() + T([1.0, 1.5, 1.0, 1.0]).log()).requires_grad_()
    loss = off_policy_grpo.off_policy_loss(logprobs, old.detach(), T(2.0), weights, mask, 0.2, 2)
    assert close(loss, -7.4 / 6) and close(gradient(loss, logprobs), [[-1 / 6, 0.0, 0.0, -4 / 6]])


@pytest.mark.parametrize(
    ("rewards", "mask", "gamma", "returns"),
    [
        ((0, 0, 1), (1, 1, 1), 0.5, (0.25, 0.5, 1)),
        ((0, 0, 1), (1, 1, 1), 1.0, (1, 1, 1)),
        ((1, 2, -4), (1, 1, 1), 0.5, (1, 0, -4)),  # 2 - 2 = 0, 1 + 0
        ((0, 9, 0, 1), (1, 0, 1, 1), 0.5, (0.25, 0, 0.5, 1)),  # the exponent counts actions
        ((NAN, 1, 2, NAN), (0, 1, 1, 0), 1.0, (0, 3, 2, 0)),
        ((5,), (1,), 0.5, (5,)),
    ],
)
def test_returns_to_go(rewards, mask, gamma, returns):
    rewards, mask = (torch.tensor([x], dtype=torch.float32) for x in (rewards, mask))
    assert close(reinforce.returns_to_go(rewards, mask, gamma), [returns])


def test_the_baseline_of_reinforce_leaves_the_completion_out():
    """The mean of the others, and minus A over N at every action: A = 2, -1 and a hole, of 4 sequences."""
    assert close(reinforce.leave_one_out(T(1.0, 0.0, 0.0, 0.0)), [0.0, 1 / 3, 1 / 3, 1 / 3])
    assert close(reinforce.leave_one_out(T(1.0, 2.0, 6.0)), [4.0, 3.5, 1.5])
    logprobs = T([-1.0, -2.0, -9.0, -4.0]).requires_grad_()
    loss = reinforce.reinforce_loss(logprobs, T([2.0, -1.0, 7.0, 2.0]), T([1.0, 1.0, 0.0, 1.0]), 4)
    assert close(loss, (2 - 2 + 8) / 4) and close(gradient(loss, logprobs), [[-0.5, 0.25, 0.0, -0.5]])


def test_remax_takes_the_greedy_score_off_every_return():
    """Returns .7, .9, 1 around a hole, less 1/4; in the second row less 1."""
    rewards, mask = T([-0.2, 9.0, -0.1, 1.0], [0.0, 0.0, 0.0, 0.0]), T([1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    found = remax.remax_advantages(rewards, T(0.25, 1.0), mask)
    assert close(found, [[0.45, 0.0, 0.65, 0.75], [0.0, -1.0, 0.0, 0.0]])


def test_reinforce_pp_whitens_over_all_actions():
    """Returns 1 on three actions and -1 on one: mean 1/2, variance 3/4. With gamma 1/2 they are 1/4, 1/2, 1 and -1:
    mean 3/16, variance 139/256."""
    rewards, mask = T([0.0, 0.0, 0.0, 1.0], [9.0, 9.0, 9.0, -1.0]), T([0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0])
    found = reinforce_pp.reinforce_pp_advantages(rewards, mask, 1.0)
    assert close(found, [[0, 0.577350, 0.577350, 0.577350], [0, 0, 0, -1.732051]], 1e-5)
    found = reinforce_pp.reinforce_pp_advantages(rewards, mask, 0.5) * math.sqrt(139) / 16
    assert close(found, [[0, 1 / 16, 5 / 16, 13 / 16], [0, 0, 0, -19 / 16]], 1e-5)


# ------------------------------------------------------------------------------------------------------- with a critic


def test_the_penalty_of_ppo_without_a_clip():
    """Ratio 2 with A = 3, 1/2 with A = -1, 1 with A = 5; beta = 4. -6 + 4 (1 - ln 2), 1/2 + 4 (ln 2 - 1/2) and -5,
    over 10. By log pi: -A r + beta (r - 1)."""
    logprobs, mask = logs([2.0, 0.5, 1.0, 8.0]), T([1.0, 1.0, 1.0, 0.0])
    loss = ppo_penalty.penalty_loss(logprobs, torch.zeros(1, 4), T([3.0, -1.0, 5.0, 1.0]), mask, 4.0, 10)
    assert close(loss, (-2 - 4 * LN2 + 4 * LN2 - 1.5 - 5) / 10)
    assert close(gradient(loss, logprobs), [[-0.2, -0.15, -0.5, 0.0]])


@pytest.mark.parametrize(
    ("kl", "beta"), [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1.0), (0.01, 1.0), (0.0149, 1.0), (0.0151, 2.0), (9.0, 2.0)]
)
def test_beta_follows_the_kl(kl, beta):
    """Target .01: halved below .0066667, doubled above .015."""
    assert ppo_penalty.adapt_beta(1.0, kl, 0.01) == beta and ppo_penalty.adapt_beta(6.0, kl, 0.01) == 6 * beta


@pytest.mark.parametrize(
    ("rewards", "values", "ratios", "mask", "options", "advantages", "targets"),
    [
        ((0, 0, 1), (0.5, 0.6, 0.7), (0.5, 2, 1), (1, 1, 1), (1.0, 1.0, 1.0), (0.25, 0.4, 0.3), (0.75, 1, 1)),
        ((0, 0, 1), (0.5, 0.6, 0.7), (1, 1, 1), (1, 1, 1), (1.0, 1.0, 1.0), (0.5, 0.4, 0.3), (1, 1, 1)),
        # caps 3 and 1: rho = 1/2, 2, 1; c = 1/2, 1, 1. v1 = .6 + 2 * .1 + .3 = 1.1, v0 = .5 + .05 + .5 * .5 = .8
        ((0, 0, 1), (0.5, 0.6, 0.7), (0.5, 2, 1), (1, 1, 1), (1.0, 3.0, 1.0), (0.3, 0.8, 0.3), (0.8, 1.1, 1)),
        # c = 1/2, 2, 1 under a cap of 3: v1 = .6 + .1 + 2 * .3 = 1.3, v0 = .5 + .05 + .5 * .7 = .9
        ((0, 0, 1), (0.5, 0.6, 0.7), (0.5, 2, 1), (1, 1, 1), (1.0, 1.0, 3.0), (0.4, 0.4, 0.3), (0.9, 1.3, 1)),
        # lambda 0: one-step targets v = V + rho delta, and advantages that look one target ahead
        ((0, 0, 1), (0.5, 0.6, 0.7), (0.5, 2, 1), (1, 1, 1), (1.0, 1.0, 1.0, 0.0), (0.1, 0.4, 0.3), (0.55, 0.7, 1)),
        # gamma 1/2: delta = -.2, -.25, .3; v2 = 1, v1 = .6 - .25 + .15 = .5, v0 = .5 - .1 - .025 = .375
        ((0, 0, 1), (0.5, 0.6, 0.7), (0.5, 2, 1), (1, 1, 1), (0.5, 1.0, 1.0), (-0.125, -0.1, 0.3), (0.375, 0.5, 1)),
        # what stands at mask 0 is passed over: .5 (1 - .5), and .5 + .5 (.7 - .5) + .5 (1 - .7)
        (
            (NAN, 0, NAN, 1), (9, 0.5, 9, 0.7), (9, 0.5, NAN, 1), (0, 1, 0, 1), (1.0, 1.0, 1.0),
            (0, 0.25, 0, 0.3), (0, 0.75, 0, 1),
        ),
    ],
)  # fmt: skip
def test_vtrace(rewards, values, ratios, mask, options, advantages, targets):
    inputs = [torch.tensor([x], dtype=torch.float32) for x in (rewards, values, ratios, mask)]
    found = ppo_vtrace.vtrace(*inputs, *options)
    assert close(found[0], [advantages]) and close(found[1], [targets])
