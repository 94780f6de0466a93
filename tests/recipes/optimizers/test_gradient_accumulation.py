import keras
import numpy as np
import pytest

EPOCHS, UPDATES = 4, 8  # 48 training images, 24 to an update
SMALL_VARIANTS = {
    "batch 24": (24, 1, False, 0.1),
    "3 × 8": (8, 3, False, 0.1),
    "batch 8": (8, 1, False, 0.1),
    "24, batch norm": (24, 1, True, 0.1),
    "3 × 8, batch norm": (8, 3, True, 0.1),
}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    """The recipe with smaller batches, for fewer images."""
    recipe = import_recipe("optimizers/gradient_accumulation")
    recipe.LARGE, recipe.VARIANTS = 24, SMALL_VARIANTS
    return recipe


@pytest.fixture(scope="module")
def trained(recipe, observe):
    return observe(recipe, train=True, epochs=EPOCHS)


def flat(arrays):
    return np.concatenate([array.ravel() for array in arrays])


def distance(first, second):
    """Return how far the final weights are from each other, over the length of the second training's way."""
    apart = np.linalg.norm(flat(first.after) - flat(second.after))
    return apart / np.linalg.norm(flat(second.after) - flat(second.before))


def test_final_weights_are_those_of_the_large_batch_unless_there_is_batch_normalisation(trained):
    one, accumulated, small, normalised, normalised_sum = trained.values()
    for weight, expected in zip(accumulated.after, one.after, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
    assert distance(small, one) > 0.1
    assert distance(normalised_sum, normalised) > 0.01


def test_figures_are_the_distance_to_the_large_batch_of_the_same_kind(trained):
    one, accumulated, small, normalised, normalised_sum = trained.values()
    for run, large in ((one, one), (accumulated, one), (small, one), (normalised_sum, normalised)):
        assert run.figures["distance to 320"] == pytest.approx(distance(run, large), rel=1e-3, abs=1e-6)
    assert accumulated.figures["distance to 320"] < 1e-5
    assert normalised.figures["distance to 320"] == 0


# Nothing is trained by `fit` here, and a way of no length is divided by.
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_step_is_made_at_the_last_of_k_batches_with_the_mean_of_their_gradients(
    recipe, observe, images, weights_of, gradients, falling_rates
):
    run = observe(recipe, train=False, epochs=EPOCHS)["3 × 8"]
    rates = falling_rates(0.1, UPDATES)
    weights, (pictures, labels) = run.before, images[0]
    velocity = [np.zeros_like(weight) for weight in weights]
    for update in range(2):
        for part in range(3):
            present = weights_of(run.model)
            for weight, expected in zip(present, weights, strict=True):
                np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
            chosen = slice(24 * update + 8 * part, 24 * update + 8 * part + 8)
            run.model.train_on_batch(pictures[chosen], labels[chosen])
        chosen = slice(24 * update, 24 * update + 24)
        found = gradients(weights, pictures[chosen], labels[chosen])
        velocity = [0.9 * old - rates[update] * gradient for old, gradient in zip(velocity, found, strict=True)]
        weights = [weight + step for weight, step in zip(weights, velocity, strict=True)]
        assert int(keras.ops.convert_to_numpy(run.model.optimizer.iterations)) == update + 1
    for weight, expected in zip(weights_of(run.model), weights, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


def test_variants_accumulate_up_to_the_large_batch_at_its_rate(import_recipe):
    variants = import_recipe("optimizers/gradient_accumulation").VARIANTS
    assert variants["batch 320"][:3] == (320, 1, False)
    assert variants["320, batch norm"][:3] == (320, 1, True)
    assert variants["10 × 32"] == (32, 10, *variants["batch 320"][2:])
    assert variants["10 × 32, batch norm"] == (32, 10, *variants["320, batch norm"][2:])
    assert variants["batch 32"][:3] == (32, 1, False)


def test_without_the_large_batch_there_is_no_distance(recipe, observe, monkeypatch):
    monkeypatch.setattr(recipe, "VARIANTS", {"batch 8": (8, 1, False, 0.1), "3 × 8": (8, 3, False, 0.1)})
    runs = observe(recipe, train=False, epochs=EPOCHS)
    assert all("distance to 320" not in run.figures for run in runs.values())


def test_outputs_are_counted_for_one_batch(recipe):
    model = recipe.build_model((5, 4, 1), 3, normalised=False)
    # The input, flattened too, three dense layers with ReLU, and the logits; four bytes each.
    assert recipe.outputs_in_megabytes(model, 32) == pytest.approx(32 * (20 + 20 + 3 * 200 + 3) * 4e-6)
    assert any(
        isinstance(layer, keras.layers.BatchNormalization) for layer in recipe.build_model((5, 4, 1), 3, True).layers
    )


# Nothing is trained by `fit` here, and a way of no length is divided by.
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_search_leaves_out_what_accumulates(recipe, images, monkeypatch):
    seen = []

    def fit(model, *arguments, batch_size, callbacks, **keywords):
        # Without training.
        (run,) = callbacks
        seen.append((run.variant, batch_size, run.rate))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "load", lambda *arguments: images)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    recipe.main(search=True, epochs=1, seeds=1)
    sizes = {"batch 24": 24, "batch 8": 8, "24, batch norm": 24}
    assert seen == [(variant, size, rate) for variant, size in sizes.items() for rate in (0.01, 0.02)]
