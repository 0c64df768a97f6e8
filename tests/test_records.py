"""Laws of the records that travel between rooms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from advdmd_lightning.equations import grpo_loss
from advdmd_lightning.records import Condition, Trajectory


def condition(batch: int = 4, length: int = 3, pooled: bool = True, mask: bool = True) -> Condition:
    return Condition(
        torch.rand(batch, length, 5),
        torch.rand(batch, 2) if pooled else None,
        torch.ones(batch, length, dtype=torch.bool) if mask else None,
    )


def assert_same(a: Condition, b: Condition) -> None:
    for left, right in zip(vars(a).values(), vars(b).values(), strict=True):
        assert left is right is None or torch.equal(left, right)


@pytest.mark.parametrize(("pooled", "mask"), [(True, True), (True, False), (False, True), (False, False)])
def test_slices_join_to_the_whole(pooled, mask):
    whole = condition(4, pooled=pooled, mask=mask)
    assert_same(Condition.cat([whole[:1], whole[1:]]), whole)


def test_slices_index_tensors_and_boolean_tensors_agree():
    whole = condition(4)
    assert len(whole[1:3]) == 2
    assert_same(whole[1:3], whole[torch.tensor([1, 2])])
    assert_same(whole[1:3], whole[torch.tensor([False, True, True, False])])
    with pytest.raises(TypeError, match="int"):
        whole[0]


def test_repeated_prompts_are_consecutive():
    whole = condition(2)
    repeated = whole.repeat_interleave(3)
    assert len(repeated) == 6
    assert_same(repeated, whole[torch.tensor([0, 0, 0, 1, 1, 1])])


def test_shorter_prompts_are_padded_with_masked_tokens():
    short, long = condition(1, length=2), condition(2, length=4)
    joined = Condition.cat([short, long])
    assert joined.embeds.shape == (3, 4, 5) and (joined.embeds[0, 2:] == 0).all()
    assert joined.mask is not None and joined.mask[0].tolist() == [True, True, False, False]
    assert_same(joined[1:], long)


def test_no_mask_is_a_mask_of_all_tokens():
    bare, masked = condition(1, length=2, mask=False), condition(2, length=4)
    joined = Condition.cat([bare, masked])
    assert joined.mask.tolist() == [[True, True, False, False], *masked.mask.tolist()]
    assert Condition.cat([bare, bare]).mask is None
    assert torch.equal(masked.valid, masked.mask) and bare.valid.all() and bare.valid.shape == (1, 2)


def test_conditions_that_do_not_fit_are_not_joined():
    with pytest.raises(ValueError, match="`mask`"):
        Condition.cat([condition(1, length=2, mask=False), condition(1, length=3, mask=False)])
    with pytest.raises(ValueError, match="all lack"):
        Condition.cat([condition(1, pooled=True), condition(1, pooled=False)])
    with pytest.raises(ValueError, match="at least one"):
        Condition.cat([])


def test_parts_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"pooled.*\(3, 2\).*\(2, 4, 5\)"):
        Condition(torch.rand(2, 4, 5), pooled=torch.rand(3, 2))
    with pytest.raises(ValueError, match="mask"):
        Condition(torch.rand(2, 4, 5), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="mask"):
        Condition(torch.rand(2, 4, 5), mask=torch.ones(2, 4, 1))


def test_casting_keeps_the_mask():
    cast = condition().to(dtype=torch.bfloat16)
    assert cast.embeds.dtype == cast.pooled.dtype == torch.bfloat16 and cast.mask.dtype == torch.bool


def test_lightning_moves_a_condition_inside_a_batch():
    batch = move_data_to_device({"condition": condition(), "caption": ["a", "b"]}, torch.device("meta"))
    assert {part.device.type for part in vars(batch["condition"]).values()} == {"meta"}


def trajectory(**changes: object) -> Trajectory:
    parts = {
        "states": torch.rand(3, 4, 2, 2, 2),
        "times": torch.tensor([1.0, 0.5, 0.0]),
        "log_probs": torch.tensor([[0.1] * 4, [0.0] * 4]),
        "stochastic": (True, False),
        "condition": condition(4),
        "group_size": 2,
    }
    return Trajectory(**{**parts, **changes})


def test_trajectory_knows_its_sizes_and_its_last_state():
    t = trajectory()
    assert (t.num_steps, t.batch_size, t.num_groups) == (2, 4, 2)
    assert torch.equal(t.x0, t.states[2])


def test_stochastic_mask_selects_the_steps_of_the_policy_loss():
    t = trajectory()
    assert t.stochastic_mask.tolist() == [[True], [False]]
    log_probs = t.log_probs.clone().requires_grad_()
    grpo_loss(log_probs, t.log_probs, torch.ones(2, 4), 0.1, mask=t.stochastic_mask).loss.backward()
    assert log_probs.grad is not None and log_probs.grad.tolist() == [[-0.25] * 4, [0.0] * 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"times": torch.zeros(2)},
        {"log_probs": torch.zeros(3, 4)},
        {"stochastic": (True,)},
        {"condition": condition(2)},
        {"group_size": 3},
    ],
)
def test_trajectory_of_inconsistent_parts_is_refused(changes):
    with pytest.raises(AssertionError):
        trajectory(**changes)


def test_records_are_frozen():
    for record, name in ((condition(), "embeds"), (trajectory(), "states")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, torch.zeros(1))
