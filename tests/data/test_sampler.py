"""The order of the samples: each once per pass over all ranks, and another in each pass."""

from __future__ import annotations

import pytest

from advdmd_lightning.data.sampler import PassSampler


def keys(length, batch_size, replicas, steps, seed=0):
    """For each rank, the (visit, index) of its first steps."""
    samplers = [
        PassSampler(range(length), batch_size, replicas, rank, seed, steps_per_epoch=steps) for rank in range(replicas)
    ]
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize(("length", "batch_size", "replicas"), [(24, 3, 4), (23, 3, 2), (5, 4, 3), (1, 2, 2)])
def test_every_sample_once_per_pass_over_ranks(length, batch_size, replicas):
    steps = -(-3 * length // (batch_size * replicas))  # at least three passes
    drawn = [key for rank in keys(length, batch_size, replicas, steps) for key in rank]
    assert len(drawn) == len(set(drawn)) == steps * batch_size * replicas
    assert {key for key in drawn if key[0] < 3} == {(visit, index) for visit in range(3) for index in range(length)}


def test_ranks_read_one_order():
    """Two ranks with batches of 2 take the batches of one rank with batches of 4, in halves."""
    (whole,) = keys(10, 4, 1, steps=5)
    halves = keys(10, 2, 2, steps=5)
    assert [key for i in range(0, 10, 2) for rank in halves for key in rank[i : i + 2]] == whole


def test_passes_and_seeds_differ():
    (order,) = keys(20, 20, 1, steps=2)
    indices = [index for _, index in order]
    assert indices[:20] != indices[20:]
    assert indices[:20] != list(range(20))
    assert order != keys(20, 20, 1, steps=2, seed=1)[0]
    assert order == keys(20, 20, 1, steps=2)[0]


def test_first_step_skips_exactly():
    whole = list(PassSampler(range(7), 2, 2, rank=1, steps_per_epoch=9))
    later = PassSampler(range(7), 2, 2, rank=1, steps_per_epoch=5)
    later.first_step = 4
    assert list(later) == whole[4 * 2 :]


@pytest.mark.parametrize(("length", "batch_size", "replicas", "steps"), [(24, 3, 4, 2), (25, 3, 2, 4), (5, 4, 3, 1)])
def test_default_epoch_is_the_full_steps_of_a_pass(length, batch_size, replicas, steps):
    sampler = PassSampler(range(length), batch_size, replicas)
    assert (sampler.steps_per_epoch, len(sampler)) == (steps, steps * batch_size) == (steps, len(list(sampler)))
