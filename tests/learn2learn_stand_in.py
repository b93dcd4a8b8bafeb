"""`MAML` of learn2learn, which does not install everywhere, by its documentation: clone, adapt, call.

What `clone` gives computes with tensors that are functions of the module's parameters; `adapt` takes a
gradient step on these.
"""

import torch
from torch import nn


class MAML(nn.Module):
    def __init__(self, model, lr, first_order=False, weights=None):
        super().__init__()
        self.module, self.lr, self.first_order = model, lr, first_order
        self.weights = weights

    def clone(self):
        weights = {name: p.clone() for name, p in self.module.named_parameters()}
        return MAML(self.module, self.lr, self.first_order, weights)

    def adapt(self, loss):
        gradients = torch.autograd.grad(
            loss, list(self.weights.values()), create_graph=not self.first_order
        )
        steps = zip(self.weights.items(), gradients, strict=True)
        self.weights = {name: weight - self.lr * gradient for (name, weight), gradient in steps}

    def forward(self, *inputs):
        return torch.func.functional_call(self.module, self.weights, inputs)
