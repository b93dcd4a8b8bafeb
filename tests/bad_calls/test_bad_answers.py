"""What a block answers is refused, by the block's name, if its protocol does not know it."""

from typing import Any

import pytest
import torch
from calls import NAN, WEIGHTS, check_refusal, each_of, learner_of, meta, tasks
from good_calls import NEEDED
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError, GradientError, MetablocksError, RuleError


class Answers(mb.UpdateRule):
    """A rule that answers whatever it is made with."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, updates, state, step):
        return self.answer(updates, state)


class Writes(mb.UpdateRule):
    """A rule that writes its steps itself."""

    def forward(self, updates, state, step):
        for name, update in updates.items():
            step.params[name].sub_(0.1 * update)
        return {name: torch.zeros_like(update) for name, update in updates.items()}, state


class Estimates(mb.Estimator):
    """An estimator that answers whatever it is made with."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, inner, meta, buffers, task):
        return self.answer


def always(answer):
    def policy(*arguments):
        return answer

    return policy


def functional(**given):
    return mb.adapt(**{**NEEDED[mb.adapt], **given})


STEP_LOSS = "it returns weights [steps + 1] = [2], a tensor of floats"
RULE = "it returns a pair: updates {name: tensor}, and the new state"
LOSS = "it must return a scalar tensor of floats"
METRIC = "it returns a scalar tensor or a number"

ANSWERS: dict[str, tuple[Any, type[MetablocksError], str, str]] = {
    **{
        f"order {answer!r}": (
            lambda a=answer: meta(order=always(a)),
            BlockError,
            "order",
            "it returns True or False",
        )
        for answer in (None, "no", 1, 0.0, [True], torch.tensor(True))
    },
    "order of adapt": (
        lambda: functional(order=always("no")),
        BlockError,
        "order",
        "the order policy returned 'no'; it returns True or False",
    ),
    **{
        f"step loss {answer!r}": (
            lambda a=answer: meta(step_loss=always(a)),
            BlockError,
            "step_loss",
            STEP_LOSS,
        )
        for answer in (
            *(None, 1, [0.0, 1.0], torch.tensor([0, 1]), torch.tensor([False, True])),
            *(torch.tensor([0.0, NAN]), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.6])),
            *(torch.ones(3) / 3, torch.tensor(1.0)),
        )
    },
    **{
        f"rule {name}{' in a chain' if chained else ''}": (
            lambda a=answer, c=chained: learner_of(
                rule=mb.Chain(Answers(a), mb.LearningRate(0.1)) if c else Answers(a)
            ).evaluate(tasks()),
            RuleError,
            "rule",
            RULE,
        )
        for chained in (False, True)
        for name, answer in {
            "none": lambda updates, state: None,
            "list": lambda updates, state: [updates, state],
            "updates alone": lambda updates, state: updates,
            "number": lambda updates, state: 3,
            "numbers": lambda updates, state: (dict.fromkeys(updates, 0.0), state),
        }.items()
    },
    "rule with integers": (
        lambda: meta(rule=Answers(lambda u, s: ({k: v.long() for k, v in u.items()}, s))),
        RuleError,
        "rule",
        "returned an update of [1, 2] torch.int64 for weight, which is [1, 2] torch.float",
    ),
    "rule without a name": (
        lambda: meta(rule=Answers(lambda u, s: ({}, s))),
        RuleError,
        "rule",
        "no update for ['weight', 'bias']",
    ),
    **{
        f"loss {answer!r}{of}": (
            lambda a=answer, act=act: act(loss=always(a)),
            GradientError,
            "loss",
            LOSS,
        )
        for of, act in {
            "": meta,
            " at evaluation": lambda **blocks: learner_of(**blocks).evaluate(tasks()),
        }.items()
        for answer in (None, [0.0], 1, 1.0, torch.tensor(1), torch.zeros(6), torch.tensor(1j))
    },
    **{
        f"metric {answer!r}": (
            lambda a=answer: learner_of().evaluate(tasks(), metric=always(a)),
            BlockError,
            "metric",
            METRIC,
        )
        for answer in (None, "0.5", [0.5], torch.zeros(6), torch.tensor(1j))
    },
    **{
        f"estimator {answer!r}": (
            lambda a=answer: meta(estimator=Estimates(a)),
            BlockError,
            "estimator",
            "it returns a TaskGradient, its grads by the names of `meta`",
        )
        for answer in (None, [], {}, ({}, torch.ones(())))
    },
    "estimator of another name": (
        lambda: meta(estimator=Estimates(mb.TaskGradient(WEIGHTS, torch.ones(()), torch.ones(2)))),
        BlockError,
        "estimator",
        "it returns for w none of that name",
    ),
    **{
        f"executor {answer!r}": (
            lambda a=answer: meta(executor=always(a)),
            BlockError,
            "executor",
            "it returns a pair: the sum over tasks, and what is stacked",
        )
        for answer in (None, [], 3)
    },
}


@each_of(ANSWERS)
def test_a_bad_answer_is_refused_by_name(call, kind, field, message):
    check_refusal(call, kind, field, message)


@pytest.mark.parametrize(
    "executor", [mb.Loop(), mb.Loop(workers=2), mb.Loop(compile="trace"), mb.Vmap()]
)
@pytest.mark.parametrize("act", ["evaluate", "meta_gradient"])
def test_a_rule_that_writes_the_fast_weights_is_refused_before_it_does(executor, act):
    learner = learner_of(rule=Writes(), executor=executor)
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    with pytest.raises(RuleError, match=r"^the rule Writes writes in place into step\.params"):
        getattr(learner, act)(tasks())
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())


@pytest.mark.parametrize("learned", [False, True])
def test_a_rule_that_writes_the_fast_weights_of_adapt_is_refused(learned):
    params = {"w": torch.ones(2, requires_grad=learned)}
    with pytest.raises(RuleError, match=r"^the rule Writes writes in place into step\.params"):
        functional(params=params, rule=Writes())


class WritesItsOwn(mb.UpdateRule):
    def setup(self, params, steps):
        self.scale = nn.Parameter(torch.ones(()))
        return self

    def forward(self, updates, state, step):
        self.scale.add_(1)
        return {name: -self.scale * u for name, u in updates.items()}, state


def test_a_rule_that_writes_its_own_parameter_is_not_said_to_write_the_fast_weights():
    with pytest.raises(RuntimeError, match=r"^a leaf Variable that requires grad"):
        functional(rule=WritesItsOwn().setup({}, 1))
