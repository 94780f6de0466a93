"""How the measurements beside the recipes condense their figures and show them; nothing here imports Keras."""

import statistics
from collections import Counter

# What the others are compared with: of `evidence.overhead` and of `evidence.speed`.
BASELINE = "no callback"
OURS = "our fit"

# The groups of runs of `evidence.training_doctor`, and the kinds of fit of a healthy one.
HEALTHY, SICK_RUN, PROGRAM = "healthy", "sick", "program"
FITS = ("first fit", "second fit", "fine-tuning")


def median_and_quartiles(values):
    """Return the median, the lower and the upper quartile of two values or more."""
    return statistics.median(values), *statistics.quantiles(values, n=4)[::2]


def rich_table(title, columns):
    """Return a dict from a column's title to its cells as a table for the terminal; the first column is not wrapped."""
    from rich.table import Table

    shown = Table(title=title)
    for number, name in enumerate(columns):
        shown.add_column(name, no_wrap=number == 0)
    for cells in zip(*columns.values(), strict=True):
        shown.add_row(*cells)
    return shown


# Overhead


def costs(seconds):
    """Return {name: (median, lower and upper quartile) of the ratios to the baseline's epochs}."""
    ratios = {
        name: [own / base for own, base in zip(times, seconds[BASELINE], strict=True)]
        for name, times in seconds.items()
    }
    return {name: median_and_quartiles(values) for name, values in ratios.items() if name != BASELINE}


def overhead_table(result):
    """Return a saved result as a dict from a column's title to its cells."""
    names = [name for name in result["kinds"] if name != BASELINE]
    columns = {"callback": names, "kind": [result["kinds"][name] for name in names]}
    for measured in result["seconds"]:
        title = f"{measured['network']}, {'XLA' if measured['jit_compile'] else 'default'}"
        ratios = costs(measured["epochs"])
        columns[title] = ["{:.3f} ({:.3f}–{:.3f})".format(*ratios[name]) for name in names]
    # The same work in each: one column, of the first network, says it. Earlier measurements lack it.
    if ends := result["seconds"][0].get("epoch_ends"):
        columns["ms when an epoch ends"] = [f"{1000 * statistics.median(ends[name]):.2f}" for name in names]
    return columns


def overhead_note(result):
    """Return in words what a saved result was measured on."""
    environment, epochs = result["environment"], len(result["seconds"][0]["epochs"][BASELINE])
    return (
        f"{epochs} epochs of {result['steps']} steps of {result['batch_size']} images; Keras {environment['keras']} on "
        f"{environment['backend']}, Python {environment['python']}; {environment['processor']}."
    )


# Speed


def speed_ratios(speeds):
    """Return {name: (median, lower and upper quartile) of how many times as fast our `fit` is}."""
    return {
        name: median_and_quartiles([ours / other for ours, other in zip(speeds[OURS], values, strict=True)])
        for name, values in speeds.items()
        if name != OURS
    }


def speed_table(result):
    """Return a saved result as a dict from a column's title to its cells."""
    columns = {"network": list(result["speeds"]), f"{OURS}, images/s": []}
    for speeds in result["speeds"].values():
        columns[f"{OURS}, images/s"].append(f"{statistics.median(speeds[OURS]):,.0f}")
        for name, ratio in speed_ratios(speeds).items():
            columns.setdefault(f"relative to {name}", []).append("{:.2f} ({:.2f}–{:.2f})".format(*ratio))
    return columns


def speed_note(result):
    """Return in words what a saved result was measured on."""
    environment, rounds = result["environment"], len(next(iter(result["speeds"].values()))[OURS])
    return (
        f"Medians (quartiles) of {rounds} rounds of {result['epochs']} epochs of {result['steps']} steps of "
        f"{result['batch_size']} images; Keras {environment['keras']} on {environment['backend']}, Python "
        f"{environment['python']}; {environment['processor']}."
    )


# TrainingDoctor


def told(run):
    """Return the names of a run's findings that are not advice."""
    return [name for name, level, _ in run["findings"] if level != "advice"]


def doctor_table(result):
    """Return what was found in healthy and in sick runs as a dict from a column's title to its cells."""
    columns = {"what is wrong": [], "runs": [], "named": [], "also named": []}
    healthy_runs = [run for run in result["runs"] if run["group"] == HEALTHY]
    groups = {f"nothing: {fit}": [run for run in healthy_runs if run["fit"] == fit] for fit in FITS}
    for run in result["runs"]:
        if run["group"] == SICK_RUN:
            groups.setdefault(run["kind"], []).append(run)
    for kind, runs in groups.items():
        # Of a sick run also the advice that it was made for.
        counts = Counter(
            name for run in runs for name, level, _ in run["findings"] if level != "advice" or name == run["kind"]
        )
        named = counts.pop(kind, 0)
        columns["what is wrong"].append(kind)
        columns["runs"].append(str(len(runs)))
        columns["named"].append("–" if kind.startswith("nothing") else str(named))
        columns["also named"].append(", ".join(f"{name} {count}" for name, count in counts.most_common()) or "–")
    return columns


def program_verdict(program, runs):
    """Return "exact", "symptom" or "miss" for the runs of a faulty program: what is said of the least well told."""
    ranks = []
    for run in runs:
        names = {name for name, _, _ in run["findings"]}
        ranks.append(0 if names & set(program["exact"]) else 1 if names & set(program["symptoms"]) else 2)
    return ("exact", "symptom", "miss")[max(ranks)]


def program_table(result):
    """Return what was said of each public program and of its repair as a dict from a column's title to its cells."""
    columns = {"program": [], "fault": [], "said of it": [], "verdict": [], "said of the repaired one": []}
    for name, program in result["programs"].items():
        by_state = {
            state: [run for run in result["runs"] if run["kind"] == f"{name}, {state}"]
            for state in ("faulty", "repaired")
        }
        if not by_state["faulty"]:
            continue
        said = {state: Counter(each for run in runs for each in told(run)) for state, runs in by_state.items()}
        advice = Counter(each for run in by_state["faulty"] for each, level, _ in run["findings"] if level == "advice")
        words = [f"{each} {count}" for each, count in said["faulty"].items()]
        words += [f"(advice: {each} {count})" for each, count in advice.items() if each in program["exact"]]
        columns["program"].append(f"{name}: {program['source']}")
        columns["fault"].append(program["fault"])
        columns["said of it"].append(", ".join(words) or "–")
        columns["verdict"].append(program_verdict(program, by_state["faulty"]))
        columns["said of the repaired one"].append(
            ", ".join(f"{each} {count}" for each, count in said["repaired"].items()) or "–"
        )
    return columns


def doctor_note(result):
    """Return the counts, and what they were measured on, in words."""
    programs = program_table(result)
    verdicts = Counter(programs["verdict"])
    alarms = sum(cell != "–" for cell in programs["said of the repaired one"])
    healthy_runs = [run for run in result["runs"] if run["group"] == HEALTHY]
    false = sum(bool(told(run)) for run in healthy_runs)
    seeds = [run["seed"] for run in result["runs"]]
    environment = result["environment"]
    return (
        f"Of {len(programs['program'])} programs {verdicts['exact']} are named exactly, of {verdicts['symptom']} a "
        f"symptom is, and {verdicts['miss']} are missed, counted by the worse of the seeds; {alarms} of the repaired "
        f"ones are reproached with something. Of {len(healthy_runs)} healthy runs {false} are. Advice is no reproach. "
        f"Seeds from {min(seeds)} on; Keras {environment['keras']} on {environment['backend']}, "
        f"Python {environment['python']}; {environment['processor']}."
    )
