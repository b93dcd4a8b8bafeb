"""The sixteen laws that docstrings and reports cite by number, one line each.

`metablocks laws` prints them. Most are functions of this package, run on a block by `metablocks
verify` and `parametrize_with_laws`; those of one shipped block (3, 4, 10, 11, 12), of a learner
without steps (2) and of whole runs (14, 15) are held by the tests of what they are about.
"""

LAWS: dict[int, tuple[str, str]] = {
    1: (
        "zero Hessian",
        "with a support loss linear in the parameters, first order is second order, for every rule "
        "that does not read the parameters",
    ),
    2: ("no steps", "without inner steps: the plain supervised gradient on the query set"),
    3: (
        "equal rates",
        "rates of any granularity filled with one value give the scalar rate's trajectory and "
        "gradient of the start; their own gradients sum to the scalar rate's",
    ),
    4: (
        "identity",
        "KFO, Meta-Curvature, T-net and MT-mask at their identity give MAML's trajectory and "
        "gradient of the start",
    ),
    5: (
        "step losses",
        "weights are at least 0, sum to 1 and end at the final step; one-hot at the last step is "
        "the final step loss",
    ),
    6: (
        "quadratic",
        "on a quadratic loss the meta-gradient is its closed form, a product of I - αA",
    ),
    7: (
        "finite differences",
        "in float64 and on smooth nets the gradient of every meta-parameter is the loss's slope",
    ),
    8: (
        "one gradient",
        "loop, vmap, any chunk, adjoint, compiled, two processes and plain autograd give one "
        "gradient, with batch norm in the net too",
    ),
    9: (
        "purity",
        "after meta_gradient, evaluate, adapt or an exception in the loss: parameters, buffers, "
        ".grad, training flags and random states are bit-identical",
    ),
    10: (
        "collapse",
        "a LinNet and its collapsed form are one function; collapsing before adaptation changes "
        "the adapted function",
    ),
    11: (
        "orders",
        "truncated at all steps is second order, at none first order; an annealed order switches "
        "at the stated epoch",
    ),
    12: (
        "end points",
        "Reptile in one step is a multiple of the joint-training gradient; Implicit on a quadratic "
        "is its closed form, and tends to the plain gradient as λ grows",
    ),
    13: ("mean of tasks", "a batch's gradient is the mean of its tasks' gradients, in any order"),
    14: ("resume", "n + m steps are n steps, a kill, and m steps, bit for bit"),
    15: (
        "nothing stale",
        "what changes between two calls (an attribute, a submodule, a frozen flag) is seen by the "
        "next call, compiled or not",
    ),
    16: (
        "whole",
        "every trainable tensor that the loss depends on is a meta-parameter or is refused by name",
    ),
}
"""Name and statement of every law by its number."""


def text() -> str:
    """The laws as lines for a terminal.

    >>> print(text().splitlines()[1])
     2  no steps            without inner steps: the plain supervised gradient on the query set
    """
    return "\n".join(f"{number:2}  {name:<18}  {law}" for number, (name, law) in LAWS.items())
