"""Notes on schedules of a recipe that do not fit its training: what is stated never comes about."""

from collections.abc import Iterator

from metablocks.recipe.record import Recipe


def schedule_notes(recipe: Recipe) -> list[str]:
    """A line, with its place, for every schedule that the training is too short for.

    >>> from metablocks.recipe import load
    >>> longer = "evaluation.ensemble=20"
    >>> load("maml_pp_strokes", [longer]).notes
    ('--set evaluation.ensemble=20: evaluation.ensemble: 20, but only 8 epochs are validated
    (evaluation.every); it takes these',)
    """
    return [str(recipe.problem(path, message)) for path, message in _found(recipe)]


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
    judged, trained = recipe.at("evaluation.inner_steps"), recipe.at("inner.steps")
    if judged < trained:
        message = f"{judged}, but in training a task takes {trained} (inner.steps)"
        yield "evaluation.inner_steps", message
