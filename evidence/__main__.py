"""Measure every recipe whose result is stale, and make the pages from the results."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts.types import PositiveInt

from callbacks.comparison import write_whole
from evidence.pages import generated_files
from evidence.recipes import ROOT, digest, find_recipes, measurements, seeds_for, unprepared_dataset, why_stale


def known_recipe(_, name):
    """Validate the name of a recipe, for the command line."""
    known = sorted(recipe.stem for recipe in find_recipes(ROOT))
    if Path(name).stem not in known:
        raise ValueError(f"There is no recipe {name!r}: choose from {', '.join(known)}.")


def main(
    *recipes: Annotated[str, cyclopts.Parameter(validator=known_recipe)],
    seeds: PositiveInt = 5,
    check: bool = False,
    force: bool = False,
):
    """Run the recipes whose results are stale, then remake the pages.

    A result is stale when the recipe's code, or that of a callback it imports, has changed since it was measured;
    comments and docstrings do not count. When the command is interrupted, the results that it finished stay, and the
    next call goes on from there, also with what `--force` has left to do. Results on a data set that has not been
    prepared are skipped.

    Args:
        recipes: names of recipes, such as `dropout`; all of them if none is given.
        seeds: number of paired repetitions.
        check: say what is stale, change nothing, and exit with 1 if anything is.
        force: run the recipes whether their results are stale or not.
    """
    names = {Path(name).stem for name in recipes}
    chosen = [recipe for recipe in find_recipes(ROOT) if not names or recipe.stem in names]
    results = {path: (recipe, flags) for recipe in chosen for path, flags in measurements(recipe).items()}
    # Names of the results that are still to be measured by force, for the next call in case this one is interrupted.
    forced_path = ROOT / "evidence" / ".forced"
    forced = set(forced_path.read_text(encoding="utf-8").split()) if forced_path.exists() else set()
    if force:
        forced |= {path.stem for path in results}
    stale = {
        path: "forced" if path.stem in forced else why_stale(recipe, path, seeds_for(flags, seeds))
        for path, (recipe, flags) in results.items()
    }
    stale = {path: reason for path, reason in stale.items() if reason}
    if check:
        outdated = [
            path for path, text in generated_files(ROOT).items() if not path.exists() or path.read_text("utf-8") != text
        ]
        for path, reason in stale.items():
            print(f"{command(*results[path])}: {reason}")
        for path in outdated:
            print(f"{path.relative_to(ROOT)}: its generated text differs from the results and cards")
        if stale or outdated:
            print("Run: python -m evidence")
            return 1
        print(f"All is fresh: {len(chosen)} {'recipe' if len(chosen) == 1 else 'recipes'}.")
        return 0
    if force:
        write_whole(forced_path, "\n".join(sorted(forced)))
    skipped = {path: name for path in stale if (name := unprepared_dataset(results[path][1], ROOT))}
    for path, name in skipped.items():
        print(
            f"Skipped: {command(*results[path])}: data/ has no {name}; `python data/fashion_mnist.py --full` makes it."
        )
        del stale[path]
    start = time.monotonic()
    for number, (path, reason) in enumerate(stale.items(), start=1):
        recipe, flags = results[path]
        minutes = (time.monotonic() - start) / 60
        print(f"[{number}/{len(stale)}, after {minutes:.0f} min] {command(recipe, flags)}: {reason}", flush=True)
        measure(recipe, path, flags, seeds_for(flags, seeds))
        forced.discard(path.stem)
        write_whole(forced_path, "\n".join(sorted(forced)))
    if not forced:
        forced_path.unlink(missing_ok=True)
    for path, text in generated_files(ROOT).items():
        write_whole(path, text)
    fresh = len(results) - len(stale) - len(skipped)
    counts = f"{len(stale)} measured, {fresh} fresh" + f", {len(skipped)} skipped" * bool(skipped)
    print(f"{counts}; README.md has the answers.")
    return 0


def command(recipe, flags):
    """Return what to type after `python` to run a recipe."""
    return " ".join([str(recipe.relative_to(ROOT)), *flags])


def measure(recipe, path, flags, seeds):
    """Run a recipe as a script, and put its result at `path`, in the place of the old one, and its picture beside it.

    Raises:
        SystemExit: the script failed; with its exit code. The old result stays.
    """
    path.parent.mkdir(exist_ok=True)
    code = digest(recipe)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".running-") as folder:
        new = Path(folder) / path.name
        process = subprocess.run([sys.executable, recipe, *flags, "--seeds", str(seeds), "--save", new], cwd=ROOT)
        if process.returncode:
            print(f"{command(recipe, flags)} failed; its old result stays as it was.", file=sys.stderr)
            raise SystemExit(process.returncode)
        result = json.loads(new.read_text(encoding="utf-8"))
        result = {"recipe": str(recipe.relative_to(ROOT)), "digest": code} | result
        new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        new.with_suffix(".svg").replace(path.with_suffix(".svg"))
        new.replace(path)


if __name__ == "__main__":
    cyclopts.run(main)
