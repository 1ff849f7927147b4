"""Every formula against values worked by hand: the arithmetic stands in the docstring of each test."""

import math

import pytest
import torch

import grpo
import ppo
import sft

LN2 = math.log(2)


def log(*rows):
    """Log-probabilities from rows of probabilities (or ratios), padded on the right with log 1 = 0."""
    width = max(map(len, rows))
    return torch.tensor([[math.log(x) for x in row] + [0.0] * (width - len(row)) for row in rows])


def ones(*lengths, before=0):
    """A mask with `before` zeros and then `lengths` ones in each row, padded on the right."""
    width = before + max(lengths)
    return torch.tensor([[0.0] * before + [1.0] * k + [0.0] * (width - before - k) for k in lengths])


def loss_and_gradient(ratio, advantages, mask, clip_eps=0.2, kl_coef=0.0, ref_logprobs=None, num_sequences=None):
    """grpo_loss at a given (N, L) probability ratio, and its gradient in the log-probabilities."""
    old_logprobs = torch.full_like(mask, math.log(0.25))
    logprobs = (old_logprobs + ratio.log()).requires_grad_()
    loss = grpo.grpo_loss(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        advantages=torch.tensor(advantages),
        mask=mask,
        clip_eps=clip_eps,
        kl_coef=kl_coef,
        num_sequences=num_sequences or len(mask),
    )
    return loss.item(), torch.autograd.grad(loss, logprobs)[0]


# -------------------------------------------------------------------------------------------------------- masked_mean


@pytest.mark.parametrize("script", [grpo, ppo])
def test_masked_mean_of_a_ragged_mask(script):
    """Actions 2 and 3 of the first row and 5 of the second: (2 + 3 + 5) / 3 = 10/3."""
    x, mask = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    assert script.masked_mean(x, mask).item() == pytest.approx(10 / 3, rel=1e-6)


def test_masked_mean_skips_a_hole_and_weighs_tokens_alike():
    """(1 + 3 + 8) / 3 = 4 with the 100 in the hole; the mean of the two row means would be (2 + 8) / 2 = 5."""
    x, mask = torch.tensor([[1.0, 100.0, 3.0], [8.0, 7.0, 7.0]]), torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert grpo.masked_mean(x, mask).item() == 4.0


def test_masked_mean_of_one_token_is_that_token():
    """One action of value -7: the mean is -7, a scalar."""
    mean = grpo.masked_mean(torch.tensor([[5.0, -7.0, 5.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    assert mean.item() == -7.0 and mean.shape == ()


# ----------------------------------------------------------------------------------------------------------- sft_loss


@pytest.mark.parametrize("script", [sft, grpo])
def test_sft_loss_of_ragged_rows_with_a_hole(script):
    """-( -1/2 - 1/8 ) - ( -2 ) = 21/8 over 3 tokens = 7/8; the -9 in the hole and the -5 of the prompt do not count.

    The gradient in each trained log-probability is -1/3, elsewhere 0.
    """
    logprobs = torch.tensor([[-5.0, -0.5, -9.0, -0.125], [-5.0, -2.0, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    loss = script.sft_loss(logprobs=logprobs, mask=mask, num_tokens=3)
    assert loss.shape == () and loss.item() == pytest.approx(7 / 8, rel=1e-6)
    assert torch.allclose(torch.autograd.grad(loss, logprobs)[0], -mask / 3)


def test_sft_loss_divides_by_the_tokens_of_the_whole_step():
    """Rows of 2 and 1 tokens at 3/8 and 1/4 nats in a step of 8 tokens: 6/64 and 2/64, which add up to 1/8.

    A mean of the two means would be (3/8 + 1/4) / 2 = 5/16.
    """
    first = sft.sft_loss(torch.tensor([[-0.25, -0.5]]), torch.ones(1, 2), 8).item()
    second = sft.sft_loss(torch.tensor([[-0.25]]), torch.ones(1, 1), 8).item()
    assert first == 6 / 64 and second == 2 / 64


# --------------------------------------------------------------------------------------------------- group_advantages


def test_one_success_among_four():
    """Mean 1/4, sum of squares 9/16 + 3/16 = 3/4, variance (ddof 1) 1/4, std 1/2.

    So .75/.5001 = 1.49970 and -.25/.5001 = -.49990. With ddof 0 the success would get 1.7317.
    """
    advantages = grpo.group_advantages(rewards=torch.tensor([0.0, 1.0, 0.0, 0.0]), group_size=4)
    assert advantages.tolist() == pytest.approx([-0.4999, 1.4997, -0.4999, -0.4999], abs=1e-6)


def test_half_successes_of_a_pair():
    """Rewards 1 and 0: mean 1/2, variance 1/4 + 1/4, std sqrt(1/2) = .70711; +-.5/.70721 = +-.70701."""
    advantages = grpo.group_advantages(torch.tensor([1.0, 0.0]), 2)
    assert advantages.tolist() == pytest.approx([0.70701, -0.70701], abs=1e-5)


def test_the_largest_advantage_grows_like_the_root_of_the_group_size():
    """One success among G: (1 - 1/G) / sqrt(1/G) = (G - 1) / sqrt(G), about sqrt(G - 1): 3.75 for G = 16.

    Variance (ddof 1) = (G - 1)/G / (G - 1) = 1/G, std 1/4, so 15/16 / .2501 = 3.74850.
    """
    rewards = torch.tensor([1.0] + [0.0] * 15)
    assert grpo.group_advantages(rewards, 16)[0].item() == pytest.approx(3.74850, abs=1e-5)


def test_groups_are_neighbours_and_do_not_see_each_other():
    """(0, 2) and (10, 14): means 1 and 12, std sqrt(2) and sqrt(8), so both are -+ 1/sqrt(2) but for the 1e-4.

    1/1.414314 = .70706 and 2/2.828527 = .70708. Interleaved groups (0, 10), (2, 14) would have signs - - + +.
    """
    advantages = grpo.group_advantages(torch.tensor([0.0, 2.0, 10.0, 14.0]), 2)
    assert advantages.tolist() == pytest.approx([-0.70706, 0.70706, -0.70708, 0.70708], abs=6e-6)


def test_order_of_groups_and_within_groups_only_permutes_the_advantages():
    """The advantage belongs to the completion and its group, not to its place."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 5.0, 5.0, 2.0, 3.0, 3.0, 3.0])
    advantages = grpo.group_advantages(rewards, 3)
    order = torch.tensor([7, 6, 8, 2, 0, 1, 4, 3, 5])
    assert torch.allclose(grpo.group_advantages(rewards[order], 3), advantages[order], atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.2, -0.1, 1e6])
def test_a_group_of_equal_rewards_gets_exactly_zero(value):
    """The mean equals every reward, so A = 0. Rounding alone gives up to .0012 for eight float32 rewards of 1.2."""
    rewards = torch.tensor([value] * 8 + [0.0] * 7 + [1.0])
    advantages = grpo.group_advantages(rewards, 8)
    assert advantages[:8].tolist() == [0.0] * 8
    assert (advantages[8:] != 0).all()


def test_an_advantage_does_not_depend_on_a_shift_of_the_rewards():
    """(r + 3) - (mean + 3) = r - mean, and the std is unchanged."""
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.25])
    assert torch.allclose(grpo.group_advantages(rewards + 3, 4), grpo.group_advantages(rewards, 4), atol=1e-5)


@pytest.mark.parametrize(("count", "group_size"), [(4, 1), (4, 0), (4, 3), (2, 4)])
def test_groups_that_cannot_be_formed_are_refused(count, group_size):
    """A lone completion has no advantage, and a group may not be cut."""
    with pytest.raises(ValueError, match=str(group_size)):
        grpo.group_advantages(torch.arange(float(count)), group_size)


# -------------------------------------------------------------------------------------------------------------- kl_k3


def test_k3_by_hand_and_in_the_right_direction():
    """d = ln ref - ln pi. pi 1/4, ref 1/2: 2 - ln 2 - 1 = .306853. pi 1/2, ref 1/4: 1/2 + ln 2 - 1 = .193147.

    Equal: exactly 0. The other direction would swap the first two.
    """
    k3 = grpo.kl_k3(logprobs=log([1 / 4, 1 / 2, 1 / 3]), ref_logprobs=log([1 / 2, 1 / 4, 1 / 3]))
    assert k3[0, :2].tolist() == pytest.approx([0.306853, 0.193147], abs=1e-6)
    assert k3[0, 2].item() == 0.0


def test_k3_is_never_negative():
    """exp(d) >= 1 + d for every d."""
    logprobs = torch.linspace(-20, 0, 400, dtype=torch.float64)
    assert (grpo.kl_k3(logprobs[:, None], logprobs[None, :]) >= 0).all()


def test_gradient_of_k3():
    """d k3 / d ln pi = 1 - exp(d): -1 at ref/pi = 2, +1/2 at ref/pi = 1/2, 0 at 1."""
    logprobs = log([1 / 4, 1 / 2, 1 / 3]).requires_grad_()
    gradient = torch.autograd.grad(grpo.kl_k3(logprobs, log([1 / 2, 1 / 4, 1 / 3])).sum(), logprobs)[0]
    assert gradient[0].tolist() == pytest.approx([-1.0, 0.5, 0.0], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- grpo_loss

# advantage, ratio -> min(A r, A clip(r, .8, 1.2)) and its derivative in log r, which is A r where the first is smaller
# (or both are equal inside the band) and 0 where the clipped one is.
CLIP_TABLE = [
    (-5, 0.5, -4.0, 0.0),  # -2.5 against -4: clipped, min(r, clip r) A would be -2.5
    (-5, 1.0, -5.0, -5.0),
    (-5, 1.5, -7.5, -7.5),  # -7.5 against -6: a bad action that became likelier is not clipped
    (-1, 0.5, -0.8, 0.0),
    (-1, 1.0, -1.0, -1.0),
    (-1, 1.5, -1.5, -1.5),
    (1, 0.5, 0.5, 0.5),  # .5 against .8: a good action that became less likely is not clipped
    (1, 1.0, 1.0, 1.0),
    (1, 1.5, 1.2, 0.0),
    (5, 0.5, 2.5, 2.5),
    (5, 1.0, 5.0, 5.0),
    (5, 1.5, 6.0, 0.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "objective", "gradient"), CLIP_TABLE)
def test_clip_table_of_a_one_token_completion(advantage, ratio, objective, gradient):
    """One action, one sequence: the loss is minus the objective, its gradient minus the objective's; see the table."""
    mask = torch.tensor([[0.0, 1.0, 0.0]])
    loss, gradients = loss_and_gradient(torch.full((1, 3), ratio), [float(advantage)], mask)
    assert loss == pytest.approx(-objective, rel=1e-5)
    assert gradients[0].tolist() == pytest.approx([0.0, -gradient, 0.0], rel=1e-5)


def test_clip_bounds_follow_clip_eps():
    """Ratio 1.5, A = 1: clipped at 1.4 for eps .4, not clipped for eps .6. Ratio .5, A = -1: -.6 and -.5."""
    mask = torch.ones(1, 1)
    for eps, up, down in ((0.4, 1.4, -0.6), (0.6, 1.5, -0.5)):
        assert loss_and_gradient(torch.tensor([[1.5]]), [1.0], mask, eps)[0] == pytest.approx(-up, rel=1e-5)
        assert loss_and_gradient(torch.tensor([[0.5]]), [-1.0], mask, eps)[0] == pytest.approx(-down, rel=1e-5)


def test_two_and_four_tokens_with_opposite_advantages_cancel():
    """(1/2)(2/2 * 1 - 4/4 * 1) = 0 at ratio 1. The token mean would give +1/3, a constant length of 8 +1/8.

    Nevertheless a gradient remains: -A / |y| / N = -1/4 on two tokens, +1/8 on four.
    """
    loss, gradient = loss_and_gradient(torch.ones(2, 5), [1.0, -1.0], ones(2, 4, before=1))
    assert loss == pytest.approx(0.0, abs=1e-7)
    assert gradient.tolist() == [[0, -0.25, -0.25, 0, 0], [0, 0.125, 0.125, 0.125, 0.125]]


def test_ragged_rows_clip_and_a_hole_by_hand():
    """Row 1, A = 2, ratios 1.5 and .5: (1.2 * 2 + .5 * 2) / 2 = 1.7.

    Row 2, A = -1, ratios 1.5, .5, 1 around a hole: (-1.5 - .8 - 1) / 3 = -1.1. Loss -(1.7 - 1.1) / 2 = -.3.
    Gradient, minus the objective's over |y| N: row 1 (0, -.5 * 2 / 4), row 2 (1.5/6, 0, 1/6), 0 in the hole.
    """
    ratio = torch.tensor([[7.0, 1.5, 0.5, 7.0, 7.0], [7.0, 1.5, 7.0, 0.5, 1.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 1.0]])
    loss, gradient = loss_and_gradient(ratio, [2.0, -1.0], mask)
    assert loss == pytest.approx(-0.3, rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([0, 0, -0.25, 0, 0], rel=1e-5)
    assert gradient[1].tolist() == pytest.approx([0, 0.25, 0, 0, 1 / 6], rel=1e-5)


def test_kl_is_added_per_token_and_averaged_like_the_objective():
    """The same rows; ref/pi is 2 at the first action of row 1, 1/2 at that of row 2, 1 elsewhere.

    k3 = 1 - ln 2 = .306853 and ln 2 - 1/2 = .193147; (.306853/2 + .193147/3) / 2 = .108904; at kl_coef .1 the loss is
    -.3 + .0108904 = -.2891096. Gradient of the KL part: .1 (1 - ref/pi) / |y| / N = -.1/4 and .05/6.
    """
    ratio = torch.tensor([[7.0, 1.5, 0.5, 7.0, 7.0], [7.0, 1.5, 7.0, 0.5, 1.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 1.0]])
    ref_over_policy = torch.tensor([[9.0, 2.0, 1.0, 9.0, 9.0], [9.0, 0.5, 9.0, 1.0, 1.0]])
    ref_logprobs = math.log(0.25) + ratio.log() + ref_over_policy.log()
    loss, gradient = loss_and_gradient(ratio, [2.0, -1.0], mask, kl_coef=0.1, ref_logprobs=ref_logprobs)
    assert loss == pytest.approx(-0.2891096, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([0, -0.025, -0.25, 0, 0], abs=1e-6)
    assert gradient[1].tolist() == pytest.approx([0, 0.25 + 0.05 / 6, 0, 0, 1 / 6], abs=1e-6)


def test_kl_pulls_towards_the_reference_whatever_the_clip():
    """A = 1, ratio 1.5 is clipped and has gradient 0; with ref/pi = 1/2 the KL part alone is 1 - 1/2 = 1/2 > 0.

    Descent then lowers an action that is likelier than under the reference; with ref/pi = 2 it is 1 - 2 = -1.
    """
    for ref_over_policy, expected in ((0.5, 0.5), (2.0, -1.0)):
        ref = torch.tensor([[math.log(0.25 * 1.5 * ref_over_policy)]])
        _, gradient = loss_and_gradient(torch.tensor([[1.5]]), [1.0], torch.ones(1, 1), kl_coef=1.0, ref_logprobs=ref)
        assert gradient.item() == pytest.approx(expected, rel=1e-5)


def test_without_kl_the_reference_may_be_none_and_has_no_effect():
    """kl_coef 0: None, and a reference that is far away, give the same -(1/1) * 1 = -1."""
    mask = ones(2)
    far = torch.full((1, 2), -9.0)
    assert loss_and_gradient(torch.ones(1, 2), [1.0], mask)[0] == -1.0
    assert loss_and_gradient(torch.ones(1, 2), [1.0], mask, ref_logprobs=far)[0] == -1.0


def test_loss_is_zero_but_its_gradient_is_not_at_ratio_one():
    """A group (1, 0, 0, 0) has advantages 1.4997 and three times -.4999, of sum 0, so the loss is 0 at ratio 1.

    The gradient is -A / (2 tokens * 4 sequences): -.187463 for the success, +.062488 for the others.
    """
    advantages = grpo.group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4).tolist()
    loss, gradient = loss_and_gradient(torch.ones(4, 2), advantages, ones(2, 2, 2, 2))
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([-0.187463] * 2 + [0.062488] * 6, abs=1e-6)


def test_a_group_without_spread_gives_exactly_no_loss_and_no_gradient():
    """A = 0 makes every objective 0, clipped or not."""
    advantages = grpo.group_advantages(torch.full((3,), 1.2), 3).tolist()
    loss, gradient = loss_and_gradient(torch.tensor([[0.5, 1.0], [1.5, 1.0], [1.0, 1.0]]), advantages, ones(2, 1, 2))
    assert loss == 0.0 and (gradient == 0).all()


def test_rows_of_advantage_zero_change_nothing():
    """They add 0 to the sum while num_sequences, the count of the whole step, stays: with and without them -1.2/4."""
    ratio, mask = torch.tensor([[1.5], [0.7], [1.3], [0.2]]), torch.ones(4, 1)
    loss, gradient = loss_and_gradient(ratio, [1.0, 0.0, 0.0, 0.0], mask)
    alone, gradient_alone = loss_and_gradient(ratio[:1], [1.0], mask[:1], num_sequences=4)
    assert loss == alone == pytest.approx(-0.3, rel=1e-6)
    assert torch.equal(gradient[:1], gradient_alone) and (gradient[1:] == 0).all()


def test_losses_of_parts_add_up_to_that_of_the_step():
    """Rows of 1, 2 and 3 tokens with A = 3, -2, 1 at ratio 1: -(3 - 2 + 1)/3 = -2/3 = -1/3 (part 1) - 1/3 (part 2)."""
    first, _ = loss_and_gradient(torch.ones(2, 2), [3.0, -2.0], ones(1, 2), num_sequences=3)
    second, _ = loss_and_gradient(torch.ones(1, 3), [1.0], ones(3), num_sequences=3)
    both, _ = loss_and_gradient(torch.ones(3, 3), [3.0, -2.0, 1.0], ones(1, 2, 3), num_sequences=3)
    assert (first, second) == (pytest.approx(-1 / 3, rel=1e-6), pytest.approx(-1 / 3, rel=1e-6))
    assert both == pytest.approx(-2 / 3, rel=1e-6)


def random_case(num_rows=6, length=7):
    """Inputs of every loss with ragged masks, a hole, both signs and ratios beyond both bounds."""
    generator = torch.Generator().manual_seed(1)
    logprobs, noise, far = (torch.rand(num_rows, length, generator=generator) for _ in range(3))
    mask = torch.zeros(num_rows, length)
    for n in range(num_rows):
        mask[n, 1 : 2 + n] = 1
    mask[4, 3] = 0
    return {
        "logprobs": -logprobs * 3, "old_logprobs": -logprobs * 3 + noise - 0.5, "ref_logprobs": -far * 3,
        "advantages": torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0, 0.5]), "mask": mask,
    }  # fmt: skip


def per_row(case):
    """(logprobs gradient, loss) of grpo_loss with KL."""
    logprobs = case["logprobs"].clone().requires_grad_()
    loss = grpo.grpo_loss(**(case | {"logprobs": logprobs}), clip_eps=0.2, kl_coef=0.1, num_sequences=6)
    return torch.autograd.grad(loss, logprobs)[0], loss.item()


def test_order_of_rows_does_not_matter():
    """A sum over sequences: permuting the rows permutes the gradient and leaves the loss."""
    case, order = random_case(), [3, 1, 5, 0, 4, 2]
    gradient, loss = per_row(case)
    permuted_gradient, permuted_loss = per_row({name: x[order] for name, x in case.items()})
    assert permuted_loss == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(permuted_gradient, gradient[order], atol=1e-7)


@pytest.mark.parametrize("amount", [1, 5])
@pytest.mark.parametrize("garbage", [0.0, -3.0, 2.0])
def test_padding_changes_nothing(amount, garbage):
    """More columns of mask 0, whatever they hold, leave every loss, mean and gradient as they were."""
    case = random_case()
    extra = {name: torch.full((6, amount), 0.0 if name == "mask" else garbage) for name in case}
    padded = {name: x if name == "advantages" else torch.cat([x, extra[name]], 1) for name, x in case.items()}
    padded["old_logprobs"][:, -1] += 1.0
    gradient, loss = per_row(case)
    padded_gradient, padded_loss = per_row(padded)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    assert (
        torch.allclose(padded_gradient[:, :-amount], gradient, atol=1e-7) and (padded_gradient[:, -amount:] == 0).all()
    )
    for function in (grpo.masked_mean, lambda x, mask: sft.sft_loss(x, mask, 21)):
        before, after = (function(x["logprobs"], x["mask"]).item() for x in (case, padded))
        assert after == pytest.approx(before, rel=1e-6)


def test_inputs_are_not_mutated():
    """Every function leaves its arguments bit for bit as they came."""
    case = random_case()
    before = {name: x.clone() for name, x in case.items()}
    grpo.grpo_loss(**case, clip_eps=0.2, kl_coef=0.1, num_sequences=6)
    grpo.kl_k3(case["logprobs"], case["ref_logprobs"])
    grpo.masked_mean(case["logprobs"], case["mask"])
    sft.sft_loss(case["logprobs"], case["mask"], 3)
    rewards = torch.tensor([0.0, 1.0, 1.2, 1.2])
    grpo.group_advantages(rewards, 2)
    assert all(torch.equal(before[name], case[name]) for name in case)
    assert torch.equal(rewards, torch.tensor([0.0, 1.0, 1.2, 1.2]))


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", "mask"])
def test_shapes_that_disagree_are_refused(name):
    """One row too many in any argument would broadcast or fail late; it is a ValueError."""
    case = random_case()
    case[name] = torch.cat([case[name], case[name][:1]])
    with pytest.raises(ValueError, match="shape"):
        grpo.grpo_loss(**case, clip_eps=0.2, kl_coef=0.0, num_sequences=6)


def test_advantages_per_token_or_of_a_lone_row_are_refused():
    """(N, L), (N, 1) and (1,) advantages would all broadcast silently."""
    case = random_case()
    for advantages in (torch.ones(6, 7), torch.ones(6, 1), torch.ones(1)):
        with pytest.raises(ValueError):
            grpo.grpo_loss(**(case | {"advantages": advantages}), clip_eps=0.2, kl_coef=0.0, num_sequences=6)


def test_weights_scale_the_objective_of_each_token_but_not_its_kl():
    """Two actions at ratio 1.5, clipped at 1.2 under A = 2: 2.4 each, weighted by 2 and .5, so (4.8 + 1.2) / 2 = 3.
    The KL, k3 = e^d - d - 1 at d = ln 2, 1 - ln 2, has weight 1: 3 - .1 (1 - ln 2). Under A = -2 nothing is clipped:
    -3 each, (-6 - 1.5) / 2 = -3.75, and its gradient in the log-probabilities is that over 2 at each token."""
    mask, weights = torch.ones(1, 2), torch.tensor([[2.0, 0.5]])
    logprobs = torch.full((1, 2), math.log(0.3), requires_grad=True)
    case = {
        "logprobs": logprobs,
        "old_logprobs": torch.full((1, 2), math.log(0.2)),
        "mask": mask,
        "is_weights": weights,
    }
    case |= {"ref_logprobs": torch.full((1, 2), math.log(0.6)), "clip_eps": 0.2, "num_sequences": 1}
    loss = grpo.grpo_loss(**case, advantages=torch.tensor([2.0]), kl_coef=0.1)
    assert loss.item() == pytest.approx(-3 + 0.1 * (1 - math.log(2)), rel=1e-5)
    loss = grpo.grpo_loss(**case, advantages=torch.tensor([-2.0]), kl_coef=0.0)
    assert loss.item() == pytest.approx(3.75, rel=1e-5)
    assert torch.autograd.grad(loss, logprobs)[0].tolist()[0] == pytest.approx([3.0, 0.75], rel=1e-5)


def test_a_row_without_an_action_is_refused():
    """Its length 0 would divide by 0."""
    case = random_case()
    case["mask"][2] = 0
    with pytest.raises(ValueError, match="mask"):
        grpo.grpo_loss(**case, clip_eps=0.2, kl_coef=0.0, num_sequences=6)


# ------------------------------------------------------------------------------------------------------ learning_rate

# Warm-up of 4 steps, 11 steps in all, peak 8: step s of the decay has (12 - s) / 8 of the way to 0 left.
RATES = [
    ("linear", 1, 2.0),  # 8 * 1/4
    ("linear", 3, 6.0),  # 8 * 3/4
    ("linear", 4, 8.0),  # 8 * 8/8
    ("linear", 5, 7.0),  # 8 * 7/8
    ("linear", 11, 1.0),  # 8 * 1/8: the last step still moves, the one after it would not
    ("linear", 12, 0.0),
    ("cosine", 2, 4.0),  # the warm-up is the same
    ("cosine", 4, 8.0),
    ("cosine", 6, 4 + 4 * math.sqrt(0.5)),  # 8 * (1 - cos(3/4 pi)) / 2
    ("cosine", 8, 4.0),  # 8 * (1 - cos(pi/2)) / 2
    ("cosine", 10, 4 - 4 * math.sqrt(0.5)),
    ("cosine", 12, 0.0),
    ("constant", 1, 2.0),
    ("constant", 4, 8.0),
    ("constant", 11, 8.0),
]


@pytest.mark.parametrize(("schedule", "step", "expected"), RATES)
def test_learning_rate_by_hand(schedule, step, expected):
    """Linear warm-up, then the decay; see the table."""
    args = grpo.Args(warmup_steps=4, lr_schedule=schedule)
    assert grpo.learning_rate(args, step, 11, 8.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 1), (0, 7), (1, 1), (5, 5), (5, 6), (15, 3), (4, 3)])
def test_learning_rate_stays_above_zero_and_at_most_the_peak(schedule, warmup_steps, steps):
    """Also with no warm-up, and with one that is as long as the run or longer: it rises first and then never again."""
    args = grpo.Args(warmup_steps=warmup_steps, lr_schedule=schedule)
    rates = [grpo.learning_rate(args, step, steps, 1.0) for step in range(1, steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert top + 1 >= min(warmup_steps, steps)
