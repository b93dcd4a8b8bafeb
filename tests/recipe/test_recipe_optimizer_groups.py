"""Optimiser groups and schedules, by the rates that come out."""

import pytest
import torch
from recipe_texts import broken
from torch import nn

from metablocks.errors import BlockError, MetablocksError
from metablocks.recipe import build, from_text
from metablocks.recipe.outer import adam, adamw, constant, cosine, sgd, split


@pytest.fixture
def net():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    net[1].bias.requires_grad_(False)
    return net


def test_every_trainable_parameter_is_in_exactly_one_group(net):
    groups = split(net.named_parameters(), {"0.*": {"lr": 1.0}, "1.w*": {"lr": 2.0}})
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert [group.get("lr") for group in groups] == [1.0, 2.0]


def test_parameters_without_a_pattern_come_first_with_the_common_options(net):
    groups = adam(net.named_parameters(), lr=0.5, groups={"*.bias": {"lr": 0.1}}).param_groups
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(2, 0.5), (1, 0.1)]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"2.*": {}}, 'pattern "2.\\*" matches no parameter'),
        ({"1.bias": {}}, 'pattern "1.bias" matches frozen parameters only: 1.bias'),
        ({"0.*": {}, "*.bias": {}}, 'pattern "\\*.bias" matches 0.bias, which "0.\\*" matches too'),
    ],
)
def test_a_pattern_that_selects_nothing_or_twice_is_refused(net, groups, message):
    with pytest.raises(MetablocksError, match=message) as caught:
        split(net.named_parameters(), groups)
    assert caught.value.field == "groups"


def test_nothing_to_train_is_refused(net):
    with pytest.raises(BlockError, match="no parameter is trainable"):
        split(net.requires_grad_(False).named_parameters(), None)


@pytest.mark.parametrize(
    ("block", "kind"),
    [(adam, torch.optim.Adam), (adamw, torch.optim.AdamW), (sgd, torch.optim.SGD)],
)
def test_defaults_are_those_of_torch(net, block, kind):
    ours = block(net.named_parameters(), lr=0.1).param_groups[0]
    theirs = kind([p for p in net.parameters() if p.requires_grad], lr=0.1).param_groups[0]
    assert {k: v for k, v in ours.items() if k != "params"} == {
        k: v for k, v in theirs.items() if k != "params"
    }


def test_nesterov_without_momentum_is_refused(net):
    with pytest.raises(BlockError, match="momentum is 0"):
        sgd(net.named_parameters(), lr=0.1, nesterov=True)


def test_cosine_goes_from_each_groups_rate_to_the_final_rate(net):
    optimizer = sgd(net.named_parameters(), lr=0.5, groups={"0.*": {"lr": 0.3}})
    scheduler = cosine(optimizer, final=0.1, epochs=4)
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    torch.testing.assert_close(
        torch.tensor([rates[0], rates[2], rates[4]]),
        torch.tensor([[0.5, 0.3], [0.3, 0.2], [0.1, 0.1]]),
    )
    assert constant(optimizer) is None


def test_recipe_groups_reach_the_optimiser():
    experiment = build(from_text(broken()))
    assert [group["lr"] for group in experiment.optimizer.param_groups] == [1e-3, 1e-4]
    assert experiment.optimizer.param_groups[1]["params"] == list(
        experiment.learner.rule.parameters()
    )
    assert {p.dtype for p in experiment.learner.parameters()} == {torch.float64}
    assert experiment.scheduler.T_max == experiment.epochs == 2


def test_group_options_are_checked_as_fields_of_the_optimiser():
    with pytest.raises(ValueError, match=r'groups\["rule.\*"\].betas: takes a list of 2, each a'):
        from_text(broken(("{lr: 1e-4}", "{betas: 0.9}")))


def test_group_betas_are_a_pair_and_keep_training():
    recipe = from_text(broken(("{lr: 1e-4}", "{betas: [0.5, 0.9]}")))
    experiment = build(recipe)
    for parameter in experiment.learner.parameters():
        parameter.grad = torch.ones_like(parameter)
    experiment.optimizer.step()
    assert tuple(experiment.optimizer.param_groups[1]["betas"]) == (0.5, 0.9)
