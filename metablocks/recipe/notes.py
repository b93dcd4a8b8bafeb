"""Notes on a recipe: schedules that do not fit its training, and a precision that costs the gradient."""

from collections.abc import Iterator

from metablocks.recipe.record import Recipe


def recipe_notes(recipe: Recipe) -> list[str]:
    """A line, with its place, for every schedule that the training is too short for, and for bfloat16.

    >>> from metablocks.recipe import load
    >>> longer = "evaluation.ensemble=20"
    >>> load("maml_pp_strokes", [longer]).notes
    ('--set evaluation.ensemble=20: evaluation.ensemble: 20, but only 8 epochs are validated
    (evaluation.every); it takes these',)
    """
    return [str(recipe.problem(path, message)) for path, message in _found(recipe)]


_COSINES = {
    "first_order": ("0.94 after 1 inner step, 0.69 after 3, 0.55 after 5", "0.99, 0.97, 0.97"),
    "second_order": ("0.94 after 1 inner step, 0.26 after 3, -0.02 after 5", "0.99, 0.94, 0.91"),
}
"""Of meta-gradients in bfloat16 to those in float64: as initialised, and after 60 meta-steps."""


def _found(recipe: Recipe) -> Iterator[tuple[str, str]]:
    epochs, every = recipe.at("outer.epochs"), recipe.at("evaluation.every")
    ends = f"but training ends after epoch {epochs} (outer.epochs)"
    path = "inner.order.first_order_epochs"
    if recipe.at("inner.order.block") == "annealed" and recipe.at(path) >= epochs:
        yield path, f"{recipe.at(path)}, {ends}: no step is ever of second order"
    path = "outer.step_loss.epochs"
    if recipe.at("outer.step_loss.block") == "annealed" and recipe.at(path) > epochs:
        yield path, f"{recipe.at(path)}, {ends}: earlier steps count to the end"
    validated = -(-epochs // every)
    ensemble = recipe.at("evaluation.ensemble")
    if ensemble > validated:
        count = f"{validated} epoch{' is' if validated == 1 else 's are'}"
        message = f"{ensemble}, but only {count} validated (evaluation.every); it takes these"
        yield "evaluation.ensemble", message
    path = "hardware.precision"
    low = recipe.at(path) == "bfloat16" and recipe.at("inner.steps")
    if low and recipe.at("outer.estimator.block") in ("unrolled", "adjoint"):
        order = recipe.at("inner.order.block")
        fresh, later = _COSINES.get(order, _COSINES["second_order"])
        message = (
            "bfloat16, in which the meta-gradient of a new conv4 has a cosine to the exact one of "
            f"{fresh}, of one trained a little {later} (tools/results/bfloat16.md); take float32, or "
            "in Python a loss that calls the model under autocast: the query pass alone keeps 0.998"
        )
        yield path, message
    judged, trained = recipe.at("evaluation.inner_steps"), recipe.at("inner.steps")
    if judged < trained:
        message = f"{judged}, but in training a task takes {trained} (inner.steps)"
        yield "evaluation.inner_steps", message
