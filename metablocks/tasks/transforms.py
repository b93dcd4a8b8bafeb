"""Transforms of support or query inputs in recipes: some of torchvision's, each with its arguments.

Each function makes the transform of `torchvision.transforms.v2` that it is named after. What it draws
is seeded by the task (`metablocks.tasks.class_tasks`). Images are float32 in [0, 1]. Those that change
the size of an image take the size that the tasks have: `random_crop(size=84, padding=8)`.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Le
from torch import Tensor

from metablocks.checks import Count, CountFrom0, Interval, NonNegative, checked
from metablocks.errors import TaskError
from metablocks.torchvision_import import torchvision_module

Transform: TypeAlias = Callable[[Tensor], Tensor]
Size: TypeAlias = Count | tuple[Count, Count]
Share: TypeAlias = Annotated[float, Ge(0), Le(1)]
HalfTurn: TypeAlias = Annotated[float, Ge(0), Le(0.5)]


def _torchvision(name: str, *arguments: Any, **options: Any) -> Transform:
    made: Transform = getattr(torchvision_module("transforms.v2"), name)(*arguments, **options)
    return made


@checked(TaskError)
def random_horizontal_flip(*, p: Share = 0.5) -> Transform:
    """Mirror left and right with probability `p`.

    - `p`: the probability.

    >>> import torch
    >>> random_horizontal_flip(p=1)(torch.tensor([[[0.0, 1.0]]])).tolist()
    [[[1.0, 0.0]]]
    """
    return _torchvision("RandomHorizontalFlip", p)


@checked(TaskError)
def random_vertical_flip(*, p: Share = 0.5) -> Transform:
    """Mirror top and bottom with probability `p`.

    - `p`: the probability.
    """
    return _torchvision("RandomVerticalFlip", p)


@checked(TaskError)
def random_rotation(*, degrees: NonNegative) -> Transform:
    """Turn by an angle between `-degrees` and `degrees`; what comes into view is 0.

    - `degrees`: the largest angle.
    """
    return _torchvision("RandomRotation", degrees)


@checked(TaskError)
def random_crop(
    *,
    size: Size,
    padding: CountFrom0 = 0,
    padding_mode: Literal["constant", "edge", "reflect"] = "constant",
) -> Transform:
    """Cut out `size` at a random place, after `padding` pixels on every side.

    - `size`: side of what is cut out, or height and width.
    - `padding`: pixels added on every side before.
    - `padding_mode`: what is added: "constant" 0, "edge" the last pixel, "reflect" the mirror
      image.
    """
    return _torchvision("RandomCrop", size, padding=padding, padding_mode=padding_mode)


@checked(TaskError)
def random_resized_crop(
    *, size: Size, scale: Interval = (0.08, 1.0), ratio: Interval = (0.75, 4 / 3)
) -> Transform:
    """Cut out a share `scale` of the area, `ratio` times as wide as high, and resize it to `size`.

    - `size`: side of the result, or height and width.
    - `scale`: the range of the share of the area.
    - `ratio`: the range of width by height.
    """
    return _torchvision("RandomResizedCrop", size, scale=scale, ratio=ratio)


@checked(TaskError)
def center_crop(*, size: Size) -> Transform:
    """Cut `size` out of the middle; what lies outside of the image is 0.

    - `size`: side of what is cut out, or height and width.
    """
    return _torchvision("CenterCrop", size)


@checked(TaskError)
def resize(*, size: tuple[Count, Count]) -> Transform:
    """Resize to height and width, by area where smaller.

    - `size`: height and width of the result.
    """
    return _torchvision("Resize", size, antialias=True)


@checked(TaskError)
def color_jitter(
    *,
    brightness: NonNegative = 0.0,
    contrast: NonNegative = 0.0,
    saturation: NonNegative = 0.0,
    hue: HalfTurn = 0.0,
) -> Transform:
    """Change brightness, contrast and saturation by factors in 1 ± the value, hue by ± the value.

    - `brightness`: the largest change of the brightness's factor 1.
    - `contrast`: the same of the contrast.
    - `saturation`: the same of the saturation.
    - `hue`: the largest shift of the hue, of a circle of 1.
    """
    return _torchvision("ColorJitter", brightness, contrast, saturation, hue)


@checked(TaskError)
def random_grayscale(*, p: Share = 0.1) -> Transform:
    """Take the colour away with probability `p`.

    - `p`: the probability.
    """
    return _torchvision("RandomGrayscale", p)


@checked(TaskError)
def random_erasing(*, p: Share = 0.5, scale: Interval = (0.02, 0.33)) -> Transform:
    """Black out a rectangle, a share `scale` of the area, with probability `p`.

    - `p`: the probability.
    - `scale`: the range of the share of the area.

    Source: Zhong, Zheng, Kang, Li, Yang 2020.
    """
    return _torchvision("RandomErasing", p, scale=scale)


@checked(TaskError)
def normalize(*, mean: list[float], std: list[float]) -> Transform:
    """Take `mean` off and divide by `std`, a number for each channel.

    - `mean`: what is taken off each channel.
    - `std`: what each channel is divided by.
    """
    return _torchvision("Normalize", mean, std)


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    block.__name__: block
    for block in (
        random_horizontal_flip,
        random_vertical_flip,
        random_rotation,
        random_crop,
        random_resized_crop,
        center_crop,
        resize,
        color_jitter,
        random_grayscale,
        random_erasing,
        normalize,
    )
}
"""The transforms of recipes by name."""
