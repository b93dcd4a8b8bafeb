"""The published 64 / 16 / 20 class lists of CIFAR-FS and mini-ImageNet, in order of name.

The classes of a bank stand in the order of its lists: train, validation, test.

Sources: CIFAR-FS, by the names of CIFAR-100's fine labels: Bertinetto, Henriques, Torr, Vedaldi,
"Meta-learning with differentiable closed-form solvers", ICLR 2019. Mini-ImageNet, by WordNet id:
Ravi, Larochelle, "Optimization as a Model for Few-Shot Learning", ICLR 2017 (the images are those
of Vinyals et al. 2016).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from metablocks.tasks.base import SPLITS, Split
from metablocks.tasks.image_sets import DecodedSet

ClassSplits: TypeAlias = dict[Split, tuple[str, ...]]
"""The names of the classes of each split."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CIFAR_FS: ClassSplits = {
    "train": _words("""
        apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock
        cloud cockroach couch cup dinosaur dolphin elephant forest girl hamster house kangaroo
        keyboard lawn_mower lion lizard lobster mountain mouse mushroom oak_tree orange orchid
        palm_tree pear pine_tree plate porcupine possum rabbit raccoon ray road seal shrew skunk
        skyscraper snake spider squirrel streetcar sunflower tank tiger train trout tulip turtle
        willow_tree wolf
    """),
    "validation": _words("""
        beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle
        otter sea shark television tractor
    """),
    "test": _words("""
        baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail
        sweet_pepper table telephone wardrobe whale woman worm
    """),
}

MINI_IMAGENET: ClassSplits = {
    "train": _words("""
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867
        n02091831 n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079
        n02165456 n02457408 n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168
        n03047690 n03062245 n03207743 n03220513 n03337140 n03347037 n03400231 n03476684 n03527444
        n03676483 n03838899 n03854065 n03888605 n03908618 n03924679 n03998194 n04067472 n04243546
        n04251144 n04258138 n04275548 n04296562 n04389033 n04435653 n04443257 n04509417 n04515003
        n04596742 n04604644 n04612504 n06794110 n07584110 n07697537 n07747607 n09246464 n13054560
        n13133613
    """),
    "validation": _words("""
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370
        n03417042 n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
    """),
    "test": _words("""
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484
        n02871525 n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357
        n04522168 n07613480
    """),
}


@dataclass(frozen=True, kw_only=True)
class SplitSet(DecodedSet):
    """A set of 600 images a class with a published list of the classes of each split."""

    examples: ClassVar[int | None] = 600
    splits: ClassVar[ClassSplits]

    @property
    def sizes(self) -> dict[Split, int]:
        return {split: len(names) for split, names in self.splits.items()}

    def split_names(self, names: Iterable[str]) -> ClassSplits:
        return self.splits


def class_names(splits: ClassSplits) -> tuple[str, ...]:
    """The classes of a bank: those of train, then of validation, then of test."""
    return tuple(name for split in SPLITS for name in splits[split])
