"""A model of one's own in a recipe: a function, or an `nn.Module`, of what the recipe hands over.

A recipe gives a model what its signature names: `input_shape`, of one example; `outputs`, how many
numbers an example's output has (classes, target dimensions, or tokens at each place of a text); and
the fields of the model's own entry, held to their annotations. Code of a package runs only if the
command allows it:

    cd recipes/python
    metablocks run maml_strokes --set 'model={block: own_model:net, width: 32}' --allow own_model
"""

from torch import nn


def net(input_shape: tuple[int, ...], outputs: int, width: int = 32, depth: int = 2) -> nn.Module:
    """`depth` convolutions that halve the image, the mean over its places, and a linear head."""
    channels, layers = input_shape[0], []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(1, width)]
        layers.append(nn.ReLU())
        channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.add_module("head", nn.Linear(width, outputs))
    return model
