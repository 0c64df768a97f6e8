"""Which samples a process has, and what it takes from other processes: real ones, with gloo."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

from advdmd_lightning.checks import check_processes
from advdmd_lightning.groups import Groups
from advdmd_lightning.records import Condition
from advdmd_lightning.settings import GRPOSettings

WORDS = ["a", "b c", "d e f", "g h i j"]
LENGTHS = [2, 3]  # tokens, in each of two processes


def prompts(rank, masked=(True, True), pooled=True):
    """Two of the four prompts, told apart by their numbers; without a mask where that process gives none."""
    numbers = torch.tensor([2.0 * rank, 2.0 * rank + 1]).view(2, 1, 1)
    embeds = (numbers + torch.arange(LENGTHS[rank]).view(1, -1, 1) / 10).expand(2, -1, 4).bfloat16()
    mask = torch.ones(2, LENGTHS[rank], dtype=torch.bool)
    mask[0, 1:] = rank == 1
    return Condition(embeds, numbers[:, :, 0].expand(2, 3) if pooled else None, mask if masked[rank] else None)


def in_process(rank, folder):
    meeting = {"init_method": f"file://{folder}/rendezvous", "timeout": timedelta(seconds=60)}
    distributed.init_process_group("gloo", rank=rank, world_size=2, **meeting)
    words = WORDS[2 * rank : 2 * rank + 2]
    form = {"size": 4, "rank": rank, "processes": 2}
    found = {"spanning": Groups.form(prompts(rank), words, span=True, **form)}
    found["whole"] = Groups.form(prompts(rank), words, **form)
    found["one mask"] = Groups.form(prompts(rank, (False, True)), (), span=True, **form)
    found["no pooled"] = Groups.form(prompts(rank, pooled=False), (), span=True, **form)
    try:
        Groups.form(prompts(rank, (False, False)), (), span=True, **form)
    except ValueError as error:
        found["refused"] = str(error)
    for name in ("spanning", "whole"):
        groups = found[name]
        per_step = torch.stack([torch.tensor(groups.own_places), -torch.tensor(groups.own_places)])
        found[f"{name}, gathered"] = groups.gather(per_step)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes came to."""
    folder = tmp_path_factory.mktemp("groups")
    multiprocessing.spawn(in_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_each_process_has_half_the_members_of_every_group(found):
    groups = [each["spanning"] for each in found]
    assert [g.members for g in groups] == [2, 2]
    assert groups[0].own_places == [0, 1, 4, 5, 8, 9, 12, 13]
    assert groups[1].own_places == [2, 3, 6, 7, 10, 11, 14, 15]
    for g in groups:
        assert g.own_prompts == [0, 0, 1, 1, 2, 2, 3, 3]
        assert g.captions == [WORDS[prompt] for prompt in g.own_prompts]
        assert g.condition.pooled[:, 0].tolist() == g.own_prompts


def test_prompts_of_different_lengths_are_padded_and_masked(found):
    for each in found:
        condition = each["spanning"].condition
        assert condition.embeds.dtype == torch.bfloat16
        expected = Condition.cat([prompts(0), prompts(1)]).repeat_interleave(2)
        assert torch.equal(condition.embeds, expected.embeds)
        assert torch.equal(condition.mask, expected.mask)
        assert condition.mask[::2].sum(1).tolist() == [1, 2, 3, 3]
        assert "need a `mask`" in each["refused"]
        assert each["no pooled"].condition.pooled is None


def test_a_mask_in_one_process_only_is_one_of_all_tokens_in_the_other(found):
    for each in found:
        assert each["one mask"].condition.mask[::2].sum(1).tolist() == [2, 2, 3, 3]
        assert each["one mask"].captions == []


def test_without_spanning_each_process_keeps_its_own(found):
    for rank, each in enumerate(found):
        groups = each["whole"]
        assert groups.own_places == list(range(8 * rank, 8 * rank + 8))
        assert groups.own_prompts == [2 * rank] * 4 + [2 * rank + 1] * 4
        assert groups.captions == [WORDS[prompt] for prompt in groups.own_prompts]
        assert torch.equal(groups.condition.embeds, prompts(rank).repeat_interleave(4).embeds)


@pytest.mark.parametrize("kind", ["spanning", "whole"])
def test_gathered_values_lie_at_their_places(found, kind):
    for each in found:
        whole = each[f"{kind}, gathered"]
        assert torch.equal(whole, torch.stack([torch.arange(16), -torch.arange(16)]))
        assert each[kind].own(whole)[0].tolist() == each[kind].own_places


def test_one_process_has_everything_whether_groups_span_or_not():
    for span in (False, True):
        groups = Groups.form(prompts(1), WORDS[2:], size=3, span=span)
        values = torch.rand(2, 6)
        assert groups.own_places == list(range(6))
        assert torch.equal(groups.own(groups.gather(values)), values)
        assert (groups.members, groups.captions) == (3, WORDS[2:3] * 3 + WORDS[3:] * 3)


def test_processes_that_cannot_share_a_group_are_refused():
    check_processes(GRPOSettings(group_size=6), 4)
    check_processes(GRPOSettings(group_size=8, span_processes=True), 4)
    with pytest.raises(ValueError, match="`model.grpo.group_size` is 6, which 4 processes .* a multiple of 4"):
        check_processes(GRPOSettings(group_size=6, span_processes=True), 4)
