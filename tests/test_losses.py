"""Every formula against values worked by hand: the arithmetic stands beside the number."""

import copy
import itertools
import math
from types import MethodType, SimpleNamespace

import pytest
import torch

import dpo
import grpo
import ppo
import rm
import sft
from variants import (
    cispo,
    composite_grpo,
    dapo,
    dr_grpo,
    gspo,
    off_policy_grpo,
    ppo_ensemble,
    ppo_penalty,
    ppo_vtrace,
    reinforce,
    reinforce_pp,
    remax,
    rloo,
    trpo,
    vapo,
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
    assert close(dapo.overlong_penalty(T(19, 20), 20, 0), [0.0, 0.0])  # no buffer, no penalty


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


def test_terms_are_normalised_each_on_its_own_then_weighed():
    """Groups of two: a term that differs gives +-1/sqrt(2), whatever its size, and one that is equal gives 0.

    Weights 1 and 1/2, in units of 1/sqrt(2): (1 + 1/2, -1 - 1/2, 0 - 1/2, 0 + 1/2). Their squares add up to 5 / 2, over
    N - 1 = 3: std sqrt(5/6). The result is (3, -3, -1, 1) / 2 / sqrt(2) / sqrt(5/6), but for the two 1e-4.
    """
    rewards = T([1.0, 0.0, 1.0, 1.0], [500.0, 100.0, -7.0, -3.0])
    expected = T(3.0, -3.0, -1.0, 1.0) / 2 / 2**0.5 / (5 / 6) ** 0.5
    found = composite_grpo.combined_advantages(rewards, [1.0, 0.5], 2)
    assert found.shape == (4,) and close(found, expected, 1e-3)
    assert close(composite_grpo.combined_advantages(rewards * T([3.0], [0.1]), [1.0, 0.5], 2), expected, 1e-3)
    assert close(composite_grpo.combined_advantages(rewards + T([3.0], [-5.0]), [1.0, 0.5], 2), expected, 1e-3)
    assert not close(composite_grpo.combined_advantages(rewards, [0.5, 1.0], 2), expected, 1e-1)


def test_the_size_of_all_weights_does_not_matter_and_a_negative_one_turns_its_term():
    """One term, groups (1, 0) and (1, 1): (s, -s, 0, 0) with s^2 + s^2 = N - 1 = 3, so s = sqrt(3/2)."""
    rewards, s = T([1.0, 0.0, 1.0, 1.0]), 1.5**0.5
    for weight in (1.0, 7.0, -1.0):
        found = composite_grpo.combined_advantages(rewards, [weight], 2)
        assert close(found, T(s, -s, 0.0, 0.0) * math.copysign(1, weight), 1e-3)
        assert found[2:].tolist() == [0, 0]  # exactly: frac_zero_std counts these
    assert composite_grpo.combined_advantages(T([0.3] * 4, [0.1] * 4), [1.0, 1.0], 2).tolist() == [0] * 4


def test_opposed_terms_of_equal_weight_cancel_within_a_group():
    """(1, 0) and (0, 9) are +-1/sqrt(2) of opposite signs; in the second group they agree: (0, 0, a, -a), a^2 = 3/2."""
    found = composite_grpo.combined_advantages(T([1.0, 0.0, 1.0, 0.0], [0.0, 9.0, 9.0, 0.0]), [1.0, 1.0], 2)
    assert close(found, T(0.0, 0.0, 1.5**0.5, -(1.5**0.5)), 1e-3)


def test_the_batch_of_several_processes_has_one_std(monkeypatch):
    """Two processes of one group each: (2, -2) / sqrt(2) and (1, -1) / sqrt(2), squares 4 and 1, N - 1 = 3."""
    total = {"n": 4, "squares": 5.0}
    monkeypatch.setattr(composite_grpo, "over_ranks", lambda own: {name: total[name] for name in own})
    both = [composite_grpo.combined_advantages(T([1.0, 0.0]), [w], 2) for w in (2.0, 1.0)]
    assert close(torch.cat(both), T(2.0, -2.0, 1.0, -1.0) / 2**0.5 / (5 / 3) ** 0.5, 1e-3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-INF, INF, [-3.0, 0.5, 4.0]),
        (-1.0, INF, [-1.0, 0.5, 4.0]),
        (-INF, 2.0, [-3.0, 0.5, 2.0]),
        (0.0, 0.0, [0.0] * 3),
    ],
)
def test_caps(low, high, expected):
    rewards = T(-3.0, 0.5, 4.0)
    assert composite_grpo.capped(rewards, low, high).tolist() == expected and rewards.tolist() == [-3.0, 0.5, 4.0]


def test_length_penalty():
    """Nothing up to the target of 4 tokens; then 5/4 - 1, 8/4 - 1, 14/4 - 1."""
    assert close(composite_grpo.length_penalty(torch.tensor([1, 4, 5, 8, 14]), 4), T(0.0, 0.0, -0.25, -1.0, -2.5))


@pytest.mark.parametrize(
    ("tokens", "n", "penalty"),
    [
        ([5, 6, 5, 6, 5], 2, -1 / 2),  # 56 65 56 65: two of four occurred before
        ([7, 7, 7, 7], 2, -2 / 3),  # 77 77 77
        ([7, 7, 7, 7], 1, -3 / 4),
        ([1, 2, 3], 1, 0.0),
        ([5, 6, 5, 6, 5], 4, 0.0),
        ([1, 2, 1, 2], 4, 0.0),  # a single 4-gram
        ([1, 1, 1], 4, 0.0),  # shorter than n
        ([], 1, 0.0),
    ],
)
def test_repetition_penalty(tokens, n, penalty):
    assert math.isclose(composite_grpo.repetition_penalty(tokens, n), penalty, abs_tol=1e-9)


def test_terms_have_names_weights_and_caps(tmp_path):
    """Of three completions the first is right, the second closes with a wrong box, the third answers too early."""
    (tmp_path / "own.py").write_text("def f(rows, texts):\n    return [10 * len(text) for text in texts]\n")
    own = f"{tmp_path}/own.py:f"
    terms = ("exact", "format=.5", "length=2:-1", "repetition=-1::0.5", f"{own}=3::150", "exact=2")
    args = SimpleNamespace(rewards=terms, target_length=2, ngram=1, system_prompt=None, micro_batch_size=4)
    names, weights, terms_of = composite_grpo.load_terms(args)
    assert names == ["exact", "format", "length", "repetition", own] and weights == [2.0, 0.5, 2.0, -1.0, 3.0]
    texts = ["1\n#### 7", r"so \boxed{8}.", "#### 7\nno doubt"]
    found = terms_of([{"answer": "7"}] * 3, texts, [[1, 2], [3, 3, 3], [4] * 9])
    assert close(found, [[1, 0, 1], [1, 1, 0], [0, -0.5, -1], [0, -2 / 3, -8 / 9], [80, 130, 150]])
    with pytest.raises(SystemExit, match="--rewards formt is not there"):
        composite_grpo.load_terms(SimpleNamespace(rewards=("formt=1",)))


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


def test_surrogate_of_ragged_rows_with_a_hole():
    """Ratios 2, 1/2 with A = 3, -4, and 1 with A = 8: (6 - 2 + 8) / 4 = 3; the hole's -9 does not count. The gradient
    is ratio * A / 4. With the same ratios and A turned, -3: nothing is clipped."""
    logprobs = T([-5.0, LN2, -9.0, -LN2], [-5.0, 0.0, 0.0, 0.0]).requires_grad_()
    mask = T([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    advantages, old = T([7.0, 3.0, 7.0, -4.0], [7.0, 8.0, 7.0, 7.0]), torch.zeros(2, 4)
    found = trpo.surrogate(logprobs, old, advantages, mask, 4)
    assert found.shape == () and close(found, 3.0)
    expected = T([0.0, 1.5, 0.0, -0.5], [0.0, 2.0, 0.0, 0.0])
    assert close(torch.autograd.grad(found, logprobs)[0], expected)
    assert close(trpo.surrogate(logprobs, old, -advantages, mask, 4), -3.0)
    rows = [trpo.surrogate(*(x[i : i + 1] for x in (logprobs, old, advantages, mask)), 4) for i in range(2)]
    assert close(sum(rows), 3.0)


def test_conjugate_gradient():
    """((4, 1), (1, 3)) x = (1, 2): x = (1, 7) / 11, after two products. One iteration is steepest descent: b times
    (b b) / (b H b) = 5 / 20. The solution of 0 is 0, not 0 / 0, and NaN gives no product."""
    matrix, b, calls = T([4.0, 1.0], [1.0, 3.0]).double(), T(1.0, 2.0).double(), []

    def product(v):
        calls.append(v)
        return matrix @ v

    found = trpo.conjugate_gradient(product, b, 10)
    assert torch.allclose(found, T(1.0, 7.0).double() / 11, 1e-12, 1e-12) and len(calls) == 2
    assert trpo.conjugate_gradient(product, b, 1).tolist() == [0.25, 0.5]
    for broken in (0 * b, math.nan * b):
        assert trpo.conjugate_gradient(product, broken, 10).tolist() == [0.0, 0.0]
    assert len(calls) == 3


def test_fisher_product_is_that_of_the_fisher_matrix_of_a_softmax():
    """p = (1/6, 1/3, 1/2): the Fisher matrix of the logits is diag(p) - p p', by enumeration E[grad log p grad log p'].
    Times (1, 0, 0): (5, -2, -3) / 36. The weights come in two tensors, and as products, so that the KL has curvature
    from the weights too, which vanishes at old."""
    p = torch.tensor([1 / 6, 1 / 3, 1 / 2], dtype=torch.float64)
    first, second = p[:1].log().requires_grad_(), p[1:].log().requires_grad_()
    log_p = torch.cat([first, second]).log_softmax(0)
    kl = (p * (p.log() - log_p)).sum()
    found = trpo.fisher_product(kl, [first, second], torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert torch.allclose(36 * found, torch.tensor([5.0, -2.0, -3.0], dtype=torch.float64))
    weights = [torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()]
    weights += [torch.tensor([0.3, -0.7], dtype=torch.float64).requires_grad_()]
    log_p = (weights[1].tanh() @ weights[0]).log_softmax(0)
    scores = torch.stack([trpo.flat(torch.autograd.grad(x, weights, retain_graph=True)) for x in log_p])  # (3, P)
    fisher, vector = scores.T @ (log_p.exp()[:, None] * scores), torch.arange(8, dtype=torch.float64)
    kl = (log_p.exp().detach() * (log_p.detach() - log_p)).sum()
    assert torch.allclose(trpo.fisher_product(kl, weights, vector), fisher @ vector)


def test_natural_step_ends_on_the_ellipse():
    """H = diag(1, 4), gradient (2, 8): s = H^-1 gradient = (2, 2), s H s = 4 + 16 = 20; 1/2 step H step = 0.1 needs the
    factor (0.2 / 20)^(1/2) = 1/10. Ten times the gradient gives the same step."""
    diagonal, gradient = T(1.0, 4.0), T(2.0, 8.0)
    for scale in (1, 10):
        assert close(trpo.natural_step(lambda v: diagonal * v, scale * gradient, 0.1, 10), [0.2, 0.2])


@pytest.mark.parametrize(
    ("improvement", "max_kl", "expected"),
    [  # KL of fraction f is f^2; the improvement of f stands in the first column
        (lambda f: f, 1.0, (1.0, 1.0, 1.0)),
        (lambda f: f, 0.1, (0.25, 0.25, 1 / 16)),  # 1/4 does not hold
        (lambda f: 0.3 - f, 1.0, (0.25, 0.3 - 0.25, 1 / 16)),  # 1 and 1/2 hold, but do not improve
        (lambda f: 0.0, 1.0, (0.0, 0.0, 0.0)),  # as good as before is no improvement
        (lambda f: -f, 1.0, (0.0, 0.0, 0.0)),
        (lambda f: math.nan, 1.0, (0.0, 0.0, 0.0)),
        (lambda f: f, 1e-9, (0.0, 0.0, 0.0)),
    ],
)
def test_line_search(improvement, max_kl, expected):
    """The policy stays where the last call has moved it: at the fraction returned, or at 0."""
    moved = []

    def measure(step):
        moved.append(step.item())
        return improvement(step.item()), step.item() ** 2

    assert trpo.line_search(measure, torch.tensor(1.0), max_kl) == expected and moved[-1] == expected[0]


class Bigram(torch.nn.Module):
    """Logits of a token that depend on the token before it: row `previous` of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(table, freeze=False)

    def get_decoder(self):
        return lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=self.table(input_ids))

    def get_output_embeddings(self):
        return torch.nn.Identity()


def test_token_kl_sums_over_the_vocabulary_and_is_that_of_old_to_new():
    """(1/2, 1/2) || (3/4, 1/4): 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3); turned, 3/4 ln(3/2) + 1/4 ln(1/2). At temperature
    1/2 the logits double: 9 to 1, 1/2 ln(25/9). It is 0 in the prompt and in a hole, whatever the token."""
    old, new = Bigram(torch.zeros(2, 2)), Bigram(T([math.log(3), 0.0], [0.0, 0.0]))
    ids, mask = T([0, 1, 0, 0, 1], [0, 0, 0, 0, 0]), T([0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0])
    at = T([0.0, 1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0])  # token 0 stands before; behind token 1 both agree
    assert close(trpo.token_kl(new, old, ids, mask), at * math.log(4 / 3) / 2)
    assert close(trpo.token_kl(old, new, ids, mask), at * (0.75 * math.log(1.5) - 0.25 * LN2))
    assert close(trpo.token_kl(new, old, ids, mask, 0.5), at * math.log(25 / 9) / 2)


def updated(seed=0, size=64, scale=1.0, **changes):
    """A model of 5 tokens after a step on 20 random rows with a hole: metrics, policy, old, ids, mask, advantages."""
    generator = torch.Generator().manual_seed(seed)
    table, ids = torch.randn(5, 5, generator=generator), torch.randint(5, (20, 7), generator=generator)
    policy, mask = Bigram(table), (torch.arange(7) > 1).float().repeat(20, 1)
    mask[3:9, 4] = mask[10:, 6] = 0.0
    advantages = scale * torch.randn(20, 7, generator=generator)
    policy.token_logprobs, old = MethodType(trpo.token_logprobs, policy), copy.deepcopy(policy).requires_grad_(False)
    old_logprobs = trpo.token_logprobs(old, ids, mask)[0]
    settings = {"max_kl": 0.01, "damping": 0.1, "cg_iterations": 10, "temperature": 1.0, "micro_batch_size": size}
    args = SimpleNamespace(**(settings | changes))
    metrics = trpo.trpo_update(policy, old, ids, mask, old_logprobs, advantages, args)
    return metrics, policy, old, ids, mask, advantages


@pytest.mark.parametrize(("seed", "max_kl"), itertools.product(range(3), (0.3, 0.01, 0.0001)))
def test_after_a_step_the_kl_holds_and_the_surrogate_is_better(seed, max_kl):
    """Both computed anew from the tables, position by position; and the KL is no tiny part of what is allowed."""
    metrics, policy, old, ids, mask, advantages = updated(seed, max_kl=max_kl)
    new_p, old_p = (model.table.weight.detach().double().softmax(1) for model in (policy, old))
    improvement = kl = 0.0
    for n, t in mask.nonzero().tolist():
        before, token = ids[n, t - 1], ids[n, t]
        kl += (old_p[before] * (old_p[before] / new_p[before]).log()).sum() / mask.sum()
        improvement += (new_p[before, token] / old_p[before, token] - 1) * advantages[n, t] / mask.sum()
    assert metrics["accepted"] > 0 and max_kl / 20 < kl <= max_kl * (1 + 1e-3) and improvement > 0
    assert close(metrics["kl_step"], kl, 1e-6) and close(metrics["improvement"], improvement, 1e-5)


def test_a_step_does_not_depend_on_micro_batches_nor_on_the_size_of_the_advantages():
    tables = [updated(**changes)[1].table.weight for changes in ({}, {"size": 1}, {"size": 7}, {"scale": 1000.0})]
    assert all(close(x, tables[0], 2e-5) for x in tables[1:]) and not close(tables[0], updated()[2].table.weight, 1e-2)


@pytest.mark.parametrize("scale", [0.0, math.nan])
def test_without_a_gradient_the_policy_stays_as_it_is_to_the_last_bit(scale):
    metrics, policy, old, *_ = updated(scale=scale)
    assert metrics["accepted"] == metrics["kl_step"] == 0 and torch.equal(policy.table.weight, old.table.weight)
    assert math.isnan(metrics["grad_norm"]) == math.isnan(scale)


@pytest.mark.parametrize(
    ("how", "coef", "expected"),
    [  # by column: 1, 3, 5 have mean 3 and variance 8/3 (over 3); all 2 have 0; 0, 0, -6 have mean -2, variance 8
        ("mean", 9.0, [3.0, 2.0, -2.0]),
        ("min", 9.0, [1.0, 2.0, -6.0]),
        ("std", 0.0, [3.0, 2.0, -2.0]),
        ("std", 1.0, [3 - (8 / 3) ** 0.5, 2.0, -2 - 8**0.5]),
        ("std", 0.5, [3 - (2 / 3) ** 0.5, 2.0, -2 - 2**0.5]),
        ("std", -1.0, [3 + (8 / 3) ** 0.5, 2.0, -2 + 8**0.5]),
    ],
)
def test_ensemble_score(how, coef, expected):
    """Of K = 3 models and n = 3 completions; the order of the models does not matter."""
    scores = T([1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [5.0, 2.0, -6.0])
    found = ppo_ensemble.ensemble_score(scores, how, coef)
    assert found.shape == (3,) and close(found, expected)
    assert close(ppo_ensemble.ensemble_score(scores[[2, 0, 1]], how, coef), expected)


@pytest.mark.parametrize("how", ["mean", "min", "std"])
def test_an_ensemble_of_one_is_its_model(how):
    assert ppo_ensemble.ensemble_score(T([1.5, -2.0]), how, 0.5).tolist() == [1.5, -2.0]


def ensemble(monkeypatch, functions, texts, over_ranks=None):
    """load_ensemble with these reward functions, and a policy that writes these texts."""
    monkeypatch.setattr(ppo_ensemble, "load_reward", lambda args: lambda rows, texts: functions[args.reward](texts))
    monkeypatch.setattr(ppo_ensemble, "rollout", lambda *_: (texts, None))
    if over_ranks:
        monkeypatch.setattr(ppo_ensemble, "over_ranks", over_ranks)
    args = SimpleNamespace(rewards=list(functions), seed=0, temperature=1.0)
    tokenizer = SimpleNamespace(batch_decode=lambda completions, **_: completions)
    return ppo_ensemble.load_ensemble(args, None, tokenizer, [{"prompt_ids": [1]}] * len(texts), [0])


def lengths(texts):
    return T(*[float(len(text)) for text in texts])


def test_scores_have_the_scale_of_the_first_policys_completions(monkeypatch):
    """Lengths 1, 1, 5, 5 have mean 3 and std 2 (divided by 4): a length of 9 is 3. 100 - 7 times as much: -3."""
    functions = {"a": lengths, "b": lambda texts: 100 - 7 * lengths(texts)}
    scores_of = ensemble(monkeypatch, functions, ["x", "x", "xxxxx", "xxxxx"])
    assert close(scores_of([{}] * 3, ["x" * 9, "xxx", "x"]), T([3.0, 0.0, -1.0], [-3.0, 0.0, 1.0]), 1e-5)


def test_the_scale_is_that_of_all_processes(monkeypatch):
    """This process has lengths 1, 1, the other 5, 5: n 4, sum 12, squared deviations from 3 add up to 16."""
    totals = iter([{"n": 4.0, "x": 12.0}, {"x": 16.0}])
    scores_of = ensemble(monkeypatch, {"a": lengths}, ["x", "x"], lambda own: next(totals))
    assert close(scores_of([{}], ["x" * 9]), T([3.0]), 1e-5)


def test_a_model_without_opinion_stays_finite(monkeypatch):
    scores_of = ensemble(monkeypatch, {"a": lambda texts: torch.full((len(texts),), 7.0)}, ["x", "xx"])
    assert scores_of([{}], ["xxx"]).tolist() == [[0.0]]


def test_the_lambda_of_vapo_grows_with_the_length():
    """1 - 1 / (alpha * length), at least 0. In GAE each row has its own: 1/2 and 0, for a reward of 1 at the end."""
    assert close(vapo.length_adaptive_lam(T(1.0, 2.0, 4.0, 100.0), 1.0), [0.0, 0.5, 0.75, 0.99])
    assert close(vapo.length_adaptive_lam(T(5.0, 20.0, 40.0, 1000.0), 0.05), [0.0, 0.0, 0.5, 0.98])
    mask = T([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    rewards = T([0.0, 0.0, 1.0], [0.0, 0.0, 1.0])
    advantages, _ = ppo.gae(rewards, torch.zeros(2, 3), mask, 1.0, T(0.5, 0.0))
    assert close(advantages, [[0.25, 0.5, 1.0], [0.0, 0.0, 1.0]])


def test_vapo_clips_higher_and_imitates_what_was_right():
    """Ratios 1.25, 1.3, 1.3, .75 with A = 1, 1, -1, -1: -1.25, -1.28, 1.3, .8, of 10 tokens; the second and the fourth
    have no gradient. Right are rows 1 and 3 with 2 and 1 of the minibatch's 4 right tokens: (1 + 2 + 4) / 4."""
    logprobs, mask = logs([1.25, 1.3, 1.3, 0.75, 9.0]), T([1.0, 1.0, 1.0, 1.0, 0.0])
    loss = vapo.vapo_loss(logprobs, torch.zeros(1, 5), T([1.0, 1.0, -1.0, -1.0, 5.0]), mask, 0.2, 0.28, 10)
    assert close(loss, -0.043) and close(gradient(loss, logprobs), [[-0.125, 0.0, 0.13, 0.0, 0.0]])
    logprobs = T([-1.0, -9.0, -2.0], [-3.0, -3.0, -3.0], [-4.0, 0.0, 0.0]).requires_grad_()
    mask = T([1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0])
    loss = vapo.positive_lm_loss(logprobs, mask, T(1.0, 0.0, 1.0), 4)
    expected = [[-1 / 4, 0.0, -1 / 4], [0.0, 0.0, 0.0], [-1 / 4, 0.0, 0.0]]
    assert close(loss, 7 / 4) and close(gradient(loss, logprobs), expected)
    assert vapo.positive_lm_loss(logprobs, mask, torch.zeros(3), 0).item() == 0
