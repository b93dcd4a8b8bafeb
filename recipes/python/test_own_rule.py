"""The laws of `own_rule.SignedRoot`, in pytest: `pytest recipes/python`."""

from collections.abc import Callable

from own_rule import SignedRoot

from metablocks.laws import parametrize_with_laws


@parametrize_with_laws([SignedRoot], examples=3)
def test_the_rule_obeys_its_laws(law: Callable[[], None]) -> None:
    law()
