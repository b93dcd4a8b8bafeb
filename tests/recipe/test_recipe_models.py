"""Models of other packages, models of tokens and models of one's own: fitted to the tasks, or refused."""

import io
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recipe_texts import broken
from small_problems import Problem

import metablocks as mb
from metablocks.errors import BlockError, MissingError, RecipeError
from metablocks.laws import gradients
from metablocks.models import GRU, Transformer, huggingface_model, torchvision_classifier
from metablocks.recipe import build, from_text, load
from metablocks.runs.tables import transductive
from metablocks.runs.train import final_scores

STROKES = "tasks: {block: strokes, ways: 4, shots: 1, queries: 1, size: 16}"
VIT = {
    "model_type": "vit",
    "patch_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
SMALL = "shufflenet_v2_x0_5"


def recipe(model, tasks=STROKES, allow=()):
    text = broken(
        ("tasks: {block: sinusoid, shots: 5, queries: 5}", tasks),
        ("model:\n  block: mlp\n  hidden: [8]", f"model: {model}"),
    )
    return from_text(text, "x.yaml", allow=allow)


def images(*size):
    return {"input_shape": size, "outputs": 4}


# ---- torchvision


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", None),
        ("squeezenet1_1", None),  # its head is a convolution
        ("convnext_tiny", None),
        ("swin_t", None),
        ("vit_b_16", {"image_size": 32}),
        ("googlenet", {"aux_logits": False, "init_weights": True}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_classifier_of_each_kind_takes_the_tasks_images_and_classes(name, options, channels):
    with torch.device("meta"):
        model = torchvision_classifier(**images(channels, 32, 32), name=name, options=options)
        assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 4)


def test_a_model_that_looks_at_numbers_as_it_is_made_is_made_in_a_run():
    """A recipe is tried on the meta device, on which torchvision's RegNets cannot be made."""
    with torch.device("meta"), pytest.raises(BlockError, match="meta tensor"):
        torchvision_classifier(**images(1, 32, 32), name="regnet_y_400mf")
    built = build(recipe("{block: torchvision, name: regnet_y_400mf}"))
    assert built.learner.model(torch.zeros(2, 1, 32, 32, dtype=built.dtype)).shape == (2, 4)


def test_a_model_whose_output_is_no_tensor_is_refused_before_training():
    with pytest.raises(RecipeError, match="leaves gives a GoogLeNetOutputs, not a tensor"):
        recipe("{block: torchvision, name: googlenet, options: {init_weights: false}}")


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize(
    "content", [lambda value: pickle.dumps(value, 2), lambda value: saved({"fc.bias": value})]
)
def test_a_file_of_weights_runs_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_bytes(content(Harm()))
    with pytest.raises(
        BlockError, match=r"it holds more than tensors, and no code of a file is run"
    ):
        torchvision_classifier(**images(1, 32, 32), name=SMALL, weights="weights.pt")
    assert not (tmp_path / "harm").exists()


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_grey_image_is_three_equal_channels(tmp_path):
    colour = torchvision_classifier(**images(3, 32, 32), name=SMALL).double().eval()
    torch.save(colour.state_dict(), tmp_path / "weights.pt")
    weights = str(tmp_path / "weights.pt")
    grey = torchvision_classifier(**images(1, 32, 32), name=SMALL, weights=weights).double().eval()
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=0, atol=1e-6)
    assert [n for n, _ in grey.named_parameters()] == [n for n, _ in colour.named_parameters()]


def test_stored_weights_of_another_number_of_classes_leave_the_head_new(tmp_path):
    many = torchvision_classifier(input_shape=(3, 32, 32), outputs=9, name=SMALL)
    torch.save(many.state_dict(), tmp_path / "weights.pt")
    weights = str(tmp_path / "weights.pt")
    few = torchvision_classifier(**images(3, 32, 32), name=SMALL, weights=weights)
    stored = many.state_dict()
    alike = {n: torch.equal(t, stored[n]) for n, t in few.state_dict().items() if "fc." not in n}
    assert all(alike.values())
    assert len(alike) == len(stored) - 2
    assert few.fc.weight.shape[0] == 4
    built = build(recipe(f'{{block: torchvision, name: {SMALL}, weights: "{weights}"}}'))
    assert torch.equal(built.learner.model.conv5[0].weight.float(), many.conv5[0].weight)


@pytest.mark.parametrize(
    ("fields", "message", "field"),
    [
        ({"name": "resnet81"}, 'did you mean "resnet18"', "name"),
        ({"name": SMALL, "options": {"depth": 3}}, "which shufflenet_v2_x0_5 does not", "options"),
        (
            {"name": "vit_b_16", "options": {"image_size": 30}},
            "does not take (Input shape indivisible",
            "options",
        ),
        ({"name": SMALL, "weights": "nowhere.pt"}, "cannot be loaded", "weights"),
        ({"name": "resnet18", "input_shape": (4, 8, 8)}, "takes images (1 or 3,", None),
        ({"name": "resnet18", "input_shape": (1,)}, "takes images (1 or 3,", None),
    ],
)
def test_what_torchvision_does_not_have_is_refused(fields, message, field):
    with pytest.raises(BlockError) as caught:
        torchvision_classifier(**{**images(1, 16, 16), **fields})
    assert message in str(caught.value)
    assert caught.value.field == field


# ---- transformers


def test_a_configuration_takes_the_size_of_the_tasks():
    model = huggingface_model(**images(1, 16, 24), config=VIT)
    assert model(torch.zeros(2, 1, 16, 24)).shape == (2, 4)
    words = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = huggingface_model(input_shape=(16,), outputs=256, config=words)
    assert model(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, 256)


def test_a_type_that_has_several_models_gives_the_first():
    model = huggingface_model(**images(1, 16, 16), config={**VIT, "model_type": "deit"})
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 4)


def test_no_code_of_a_folder_runs_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    code = {"AutoConfig": "harm.Config", "AutoModelForImageClassification": "harm.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "harm", "auto_map": code}))
    (tmp_path / "harm.py").write_text("raise SystemExit")
    with pytest.raises(BlockError, match="contains custom code"):
        huggingface_model(**images(1, 16, 16), folder=str(tmp_path))


def test_a_folder_is_loaded_with_a_new_head_where_the_classes_are_others(tmp_path):
    stored = huggingface_model(**images(1, 16, 16), config=VIT)
    stored.net.save_pretrained(tmp_path)
    same = huggingface_model(**images(1, 16, 16), folder=str(tmp_path))
    assert all(torch.equal(t, stored.state_dict()[n]) for n, t in same.state_dict().items())
    experiment = build(recipe(f'{{block: huggingface, folder: "{tmp_path}"}}', STROKES))
    weight = "net.vit.layers.0.mlp.fc1.weight"
    got = experiment.learner.model.get_parameter(weight)
    assert torch.equal(got.float(), stored.get_parameter(weight))
    more = huggingface_model(input_shape=(1, 16, 16), outputs=7, folder=str(tmp_path))
    assert torch.equal(more.get_parameter(weight), stored.get_parameter(weight))
    assert len(more.net.classifier.weight) == 7


@pytest.mark.parametrize(
    ("fields", "message", "field"),
    [
        ({}, "takes config or folder, one of the two", None),
        ({"config": VIT, "folder": "x"}, "takes config or folder, one of the two", None),
        ({"config": {"model_type": "vitt"}}, 'did you mean "vit"', "config"),
        ({"config": {"patch_size": 8}}, "config has no model_type; it is one of", "config"),
        ({"config": {**VIT, "hiden_size": 3}}, "no field hiden_size; did you mean", "config"),
        ({"config": {**VIT, "hidden_size": "a"}}, "does not make a vit", "config"),
        ({"config": {"model_type": "t5"}}, "AutoModelForImageClassification", "config"),
        ({"folder": "google/vit-base-patch16-224"}, "has no config.json", "folder"),
    ],
)
def test_what_transformers_does_not_have_is_refused(fields, message, field):
    with pytest.raises(BlockError) as caught:
        huggingface_model(**images(1, 16, 16), **fields)
    assert message in str(caught.value)
    assert caught.value.field == field


def test_without_transformers_a_recipe_is_refused_with_its_place_and_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingError, match=r"metablocks\[transformers\]"):
        huggingface_model(**images(1, 16, 16), config=VIT)
    with pytest.raises(RecipeError, match=r"x.yaml:5:8 model: .*pip install"):
        recipe("{block: huggingface, config: {model_type: vit}}")


def test_a_model_that_does_not_take_the_tasks_is_refused_before_training():
    config = (
        "{model_type: vit, image_size: 12, patch_size: 4, hidden_size: 8, num_attention_heads: 2}"
    )
    with pytest.raises(
        RecipeError, match=r"x\.yaml:5:8 model: the model that huggingface leaves does"
    ):
        recipe(f"{{block: huggingface, config: {config}}}")


# ---- what norms normalise by


def test_a_recipe_says_what_norms_normalise_by():
    small = ["inner.steps=1", "hardware.device=cpu", "model.filters=2"]
    scores = {}
    for statistics in ("batch", "support", "running"):
        experiment = build(load("maml_strokes", [*small, f"inner.norm_statistics={statistics}"]))
        assert experiment.learner.norm_statistics == statistics
        assert transductive(experiment) == (statistics == "batch")
        scores[statistics] = final_scores(experiment, "validation", tasks=2, steps=1).loss
    assert len({loss for _, loss in scores.values()}) == 3
    surgery = "surgery=[{block: per_step_batch_norm}]"
    with pytest.raises(RecipeError, match=r"inner\.norm_statistics: .*statistics of its own"):
        build(load("maml_strokes", [*small, surgery, "inner.norm_statistics=support"]))


# ---- tokens


def texts(model, steps=2):
    def batch(count):
        return tuple(torch.randint(0, 9, (3, count, 6)) for _ in range(2))

    def loss(scores, targets):
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())

    return Problem(lambda: model, loss, mb.TaskBatch(batch(3), batch(2)), steps)


MAKERS = {
    "transformer": lambda: Transformer(input_shape=(6,), outputs=9, width=4, heads=2, layers=2),
    "gru": lambda: GRU(input_shape=(6,), outputs=9, width=3, layers=2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_no_token_knows_of_those_behind_it(name):
    model = MAKERS[name]()
    tokens = torch.randint(0, 9, (2, 6))
    changed = torch.cat([tokens[:, :3], (tokens[:, 3:] + 1) % 9], 1)
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("name", MAKERS)
def test_the_meta_gradient_of_nets_over_tokens_is_that_of_plain_autograd(name):
    problem = texts(MAKERS[name]().double())
    learner = problem.learner(mb.lslr(0.1))
    gradients.plain_autograd(learner, problem.tasks)
    gradients.finite_differences(learner, problem.tasks)


def test_a_transformer_and_a_configuration_take_vmap():
    problem = texts(MAKERS["transformer"]().double())
    gradients.one_gradient(problem, [mb.Vmap()], lambda e: problem.learner(executor=e))
    net = huggingface_model(**images(1, 16, 16), config=VIT).double()
    tasks = mb.tasks.Strokes(ways=4, shots=1, queries=1, size=16).sample("train", range(2))
    problem = Problem(lambda: net, F.cross_entropy, tasks.to(torch.float64), 2)
    gradients.one_gradient(problem, [mb.Vmap()], lambda e: problem.learner(executor=e))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transformer(input_shape=(6,), outputs=9, width=5, heads=2), "width is 5, which 2"),
        (lambda: Transformer(input_shape=(1, 8, 8), outputs=9), "Transformer takes tokens"),
        (lambda: GRU(input_shape=(1, 8, 8), outputs=9), "GRU takes tokens"),
    ],
)
def test_nets_over_tokens_refuse_what_they_cannot_be(make, message):
    with pytest.raises(BlockError, match=message):
        make()


def test_context_inputs_adapt_alone_from_zero_and_are_not_learned():
    changes = ["model.hidden=[3]", "model.activation=tanh", "hardware.precision=float64"]
    made = build(load("cavia_sinusoid", [*changes, "hardware.device=cpu"]))
    learner, tasks = made.learner, made.source.sample("train", [0, 1]).to(torch.float64)
    assert list(learner.adapted) == ["context"]
    gradients.plain_autograd(learner, tasks)
    grads = learner.meta_gradient(tasks).grads
    assert grads["model.body.linear0.weight"][:, 1:].abs().min() > 0
    assert "model.context" not in grads
