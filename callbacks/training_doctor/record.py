"""The record of a run, and the signs that are read from it: figures, without a judgement."""

import math
import statistics

import numpy as np

# Steps of an epoch whose losses are told apart: rounding of the running mean hides those of later ones.
TOLD_APART = 1000


class Losses:
    """The losses of a run: of its epochs, and of its first steps, recovered from the running means that Keras gives.

    Attributes:
        training, validation: {epoch, counted from 1 in this fit: loss}.
        steps: list of the losses of single executions, from the first on; one execution is one step, unless
            `steps_per_execution` is larger.
        noise: list, for each epoch, of the standard error of its mean over batches; None where it is not known.
        made: number of the steps, complete up to the last finished epoch.
        names: set of the names in the logs.
        lost: None, or the first and the last of the steps among which is the first whose loss was not finite.
        highest: the largest loss of a step, and that step.
        highest_of_last, lowest_of_last: the largest and the lowest loss of a step in the last epoch, of which there are
            `executions_of_last`.
    """

    def __init__(self):
        self.training, self.validation = {}, {}
        self.steps, self.noise = [], []
        self.lost = None
        self.highest = (-math.inf, None)
        self.highest_of_last, self.lowest_of_last, self.executions_of_last = -math.inf, math.inf, 0
        self.names = set()
        self.made = 0
        self._means = {}

    def begin_epoch(self):
        self._means = {}

    def end_step(self, batch, logs):
        # The mean over the epoch so far. The steps may come here in another order than they were made in.
        self._means[batch] = logs.get("loss") if logs else None

    def end_epoch(self, epoch, logs):
        """Take the epoch's losses from `logs`; an epoch in which the data had run out counts for nothing."""
        means = {batch: mean for batch, mean in sorted(self._means.items()) if _is_number(mean)}
        if not self._means:
            return False
        self.names |= set(logs)
        if means:
            self._read_steps(np.array(list(means)), np.array(list(means.values()), "float64"))
        self.made += max(self._means) + 1
        if _is_number(logs.get("loss")):
            self.training[epoch] = float(logs["loss"])
        if _is_number(logs.get("val_loss")):
            self.validation[epoch] = float(logs["val_loss"])
        return True

    def _read_steps(self, batches, means):
        lost = np.flatnonzero(~np.isfinite(means))
        if len(lost) and self.lost is None:
            place = lost[0]
            first = batches[place - 1] + 1 if place else 0
            self.lost = int(self.made + first), int(self.made + batches[place])
        told = (batches < TOLD_APART) & np.isfinite(means)
        done, sums = batches[told] + 1, (batches[told] + 1) * means[told]
        if not len(done):
            self.noise.append(None)
            return
        # A gap in the steps, as where one was not finite, would be taken for a step.
        each = np.diff(sums, prepend=0.0) / np.diff(done, prepend=0)
        place = int(each.argmax())
        self.highest_of_last, self.lowest_of_last = float(each[place]), float(each.min())
        self.executions_of_last = len(each)
        if each[place] > self.highest[0]:
            self.highest = float(each[place]), int(self.made + batches[told][place])
        if len(self.steps) < TOLD_APART:
            self.steps += each.tolist()
        # Of differences, because a loss that falls within the epoch is not noise.
        enough = len(each) > 2
        deviation = np.sqrt(np.mean(np.diff(each[:-1]) ** 2) / 2) if enough else None
        self.noise.append(float(deviation / np.sqrt(len(batches))) if enough else None)


def _is_number(value):
    return isinstance(value, (int, float, np.number)) or (hasattr(value, "shape") and value.shape == ())


def signs_of_losses(losses, start, end, constant):
    """Return the signs that the losses show.

    Args:
        losses: `Losses` of the run.
        start, end: the loss of each of the probe's examples before training and at the end, or None.
        constant: loss of the best constant prediction, or None.
    """
    signs = {"epochs": len(losses.training), "steps": losses.made}
    if losses.lost:
        signs["lost"] = losses.lost
    training, validation = list(losses.training.values()), losses.validation
    if losses.steps:
        signs["first_batch"] = losses.steps[0]
        signs["highest"], signs["highest_step"] = losses.highest
        signs["highest_of_last"] = losses.highest_of_last
        if losses.executions_of_last >= 5:
            signs["lowest_of_last"] = losses.lowest_of_last
    if not training:
        return signs
    signs |= {"first": training[0], "last": training[-1], "best": min(training, key=_or_infinity)}
    finite = [loss for loss in training if math.isfinite(loss)]
    noise = [each for each in losses.noise[-max(len(training) // 3, 1) :] if each is not None]
    signs["noise"] = statistics.median(noise) if noise else 0.0
    if start is not None and np.isfinite(start).all():
        signs["untrained"] = float(start.mean())
        signs["untrained_error"] = float(start.std() / math.sqrt(len(start)))
        if end is not None and np.isfinite(end).all():
            signs["probe"] = float(end.mean())
            # Of the same examples, so that what is hard in them counts on both sides.
            signs["probe_rise"] = float((end - start).mean())
            signs["probe_rise_error"] = float((end - start).std() / math.sqrt(len(end)))
    if constant is not None:
        signs["constant"] = constant
    if len(finite) == len(training):
        signs |= _course(training, signs["noise"])
    if validation:
        signs |= _signs_of_validation(validation, losses.training)
    return signs


def _or_infinity(loss):
    return loss if math.isfinite(loss) else math.inf


def _course(training, noise):
    """Return the fall of the loss over the last third of the epochs, and how often it rose in the second half."""
    third = len(training) // 3
    signs = {}
    if third:
        before, after = (statistics.fmean(part) for part in (training[-2 * third : -third], training[-third:]))
        signs |= {"fall": before - after, "fall_from": before, "fall_error": noise * math.sqrt(2 / third)}
    half = training[len(training) // 2 :]
    rises = [later - earlier for earlier, later in zip(half, half[1:], strict=False) if later > earlier]
    if len(half) > 2:
        signs["rises"] = len(rises) / (len(half) - 1)
        signs["typical_rise"] = statistics.median(rises) if rises else 0.0
    return signs


def _signs_of_validation(validation, training):
    finite = {epoch: loss for epoch, loss in validation.items() if math.isfinite(loss)}
    signs = {"validation_epochs": len(validation), "validation_not_finite": len(validation) - len(finite)}
    if finite:
        best, first, last = min(finite, key=finite.get), min(finite), max(finite)
        signs |= {
            "validation_first": finite[first],
            "validation_best": finite[best],
            "validation_last": finite[last],
            "best_validation_epoch": best,
            "first_validation_epoch": first,
            "last_validation_epoch": last,
            "first_epoch": min(training, default=first),
        }
        if best in training and last in training:
            signs["training_at_best"], signs["training_at_last"] = training[best], training[last]
    return signs


def signs_of_gradients(norms, clipping):
    """Return the signs that the norms of `GradientNorms` show, given the optimizer's (clipnorm, global_clipnorm)."""
    signs = {"layers": len(norms.layers)}
    everywhere = np.array(norms.history["all"])
    if not len(everywhere):
        return signs
    by_layer = np.array([norms.history[name] for name in norms.layers])
    finite = np.isfinite(everywhere)
    signs["recorded"] = len(everywhere)
    signs["norms_not_finite"] = int((~finite).sum())
    if not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        signs["first_norm_not_finite"] = norms.steps[first]
        signs["spoiled_layers"] = int((~np.isfinite(by_layer[:, first])).sum())
        # Gradients come from the loss, so among the spoiled layers the last one was the first.
        signs["spoiled_layer"] = norms.layers[np.flatnonzero(~np.isfinite(by_layer[:, first]))[-1]]
        if good := np.flatnonzero(finite[:first]).tolist():
            signs |= {"last_finite_norm": float(everywhere[good[-1]]), "last_finite_step": norms.steps[good[-1]]}
            growth = by_layer[:, good[-1]] / np.maximum(np.median(by_layer[:, good], axis=1), 1e-30)
            if len(good) > 1:
                signs["grown_layer"] = norms.layers[int(growth.argmax())]
    signs["zero"] = float(np.mean(everywhere == 0))
    zeros = np.flatnonzero(everywhere != 0)
    signs["zero_since"] = norms.steps[zeros[-1] + 1] if len(zeros) and zeros[-1] + 1 < len(everywhere) else None
    # Also with the first ones: when training converges, any norm is large beside those just before.
    # The first five have no norms before them that a median could be taken of: each is among its own five.
    good = everywhere[finite]
    if len(good):
        start = float(np.median(good[:5]))
        medians = [max(float(np.median(good[max(0, place - 50) : max(5, place)])), start) for place in range(len(good))]
        jumps = good / np.maximum(medians, 1e-30)
        place = int(jumps.argmax())
        signs |= {"norm_jump": float(jumps[place]), "norm_jump_step": int(np.array(norms.steps)[finite][place])}
    with np.errstate(all="ignore"):
        ratios = by_layer[0] / by_layer[-1]
    if np.isfinite(ratios).any():
        signs["norm_ratio"] = float(np.median(ratios[np.isfinite(ratios)]))
    clipnorm, global_clipnorm = clipping
    if clipnorm is not None:
        signs["clipped"] = float(np.mean(by_layer.max(axis=0) > clipnorm))
    elif global_clipnorm is not None:
        signs["clipped"] = float(np.mean(everywhere > global_clipnorm))
    updates = norms.update_to_weight_ratios
    finite_updates = [ratio for ratio in updates["all"] if math.isfinite(ratio)]
    if finite_updates:
        signs |= {"update_ratio": statistics.median(finite_updates), "first_update_ratio": finite_updates[0]}
        still = [name for name in norms.layers if all(ratio == 0 for ratio in updates[name])]
        signs |= {"still_layers": still, "update_epochs": len(updates["all"])}
    return signs


def signs_of_activations(measured):
    """Return the signs that `ActivationStatistics` shows."""
    signs = {}
    if measured.first_input:
        signs |= {"input_mean": measured.first_input["mean"], "input_deviation": measured.first_input["std"]}
    # The output layer may well be saturated.
    for name in ("dead", "saturated"):
        shares = {
            layer: entries[-1][name]
            for layer, entries in list(measured.history.items())[:-1]
            if entries[-1][name] is not None
        }
        if shares:
            layer = max(shares, key=shares.get)
            before = measured.history[layer][0][name]
            signs |= {name: shares[layer], f"{name}_layer": layer, f"{name}_before": before}
    return signs
