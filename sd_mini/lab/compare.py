"""--task compare: the rows of a method, with the same prompts, seeds and budgets, in one table."""
import gc
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ..files import read_json
from . import experiment, report, runs
from .evaluation import rate_of
from .prompts import slug


def compare(method, config):
    """Every row leaves its folder, OUT/ROW/seed-N.

    What is there already, with the same settings and inputs, is not done again, and what another
    process is at work on is left to it. The table takes in all rows and seeds that are there.
    """
    config = replace(config, eval_attacks=tuple(method.attacks))
    shared = experiment.open_experiment(method, config)
    out = Path(config.out or Path("runs") / f"{slug(config.concept)}-compare")
    changes = method.rows(shared.sd_o, shared.concepts, config)
    rows = {name: replace(config, methods=(), out=None, **(changed or {}))
            for name, changed in changes.items()}
    records = {name: experiment.record(shared, row) for name, row in rows.items()}
    folders = {name: out / slug(name) / f"seed-{config.seed}" for name in rows}

    def finished(name):
        return runs.is_finished(folders[name], records[name], True, config.overwrite)

    todo = [name for name in wanted_rows([*rows], config.methods) if not finished(name)]
    if todo:
        shared = experiment.with_pictures(shared, config)

    def run(name):
        gc.collect()  # the model of the row before
        folder, model = folders[name], shared.sd_o if changes[name] is None else None
        runs.open_folder(folder, records[name], config.overwrite)
        _, figures, pictures = experiment.run(shared, rows[name], folder, "erased", model)
        report.decorate(save_thumbnails, folder / THUMBNAILS, pictures, config.eval_attacks)
        experiment.write_results(folder, shared, rows[name], {name: figures})

    for name in runs.progress(todo, "comparing", leave=False, disable=not todo):
        try:
            with runs.locked(folders[name]):
                if not finished(name):  # another process may have done it since
                    run(name)
        except runs.InUse:
            print(f"{name}: left to the process that is at work on it")
    with runs.locked(out, wait=True):  # so that the last table written has all rows
        write_comparison(out, records, shared, config)


def wanted_rows(names, chosen):
    """--methods -> names; all where none is chosen."""
    if unknown := {*chosen} - {*names}:
        raise ValueError(f"--methods {min(unknown)!r}: choose from {', '.join(map(repr, names))}")
    return chosen or names


# --- the table

def pooled(results):
    """Figures of several seeds -> one: rates over all prompts of all seeds, means of the rest."""
    figures = {}
    for key in {key for result in results for key in result} - {"details"}:
        cells = [result[key] for result in results if result.get(key) is not None]
        if cells and isinstance(cells[0], dict):
            n = sum(cell["n"] for cell in cells)
            figures[key] = rate_of(sum(round(cell["rate"] * cell["n"]) for cell in cells), n)
        elif cells:
            figures[key] = sum(cells) / len(cells)
    return figures


def read_runs(out, records):
    """OUT/ROW/seed-N/results.json -> {row: {"seed-N": the run}}, if only the seed is another."""
    found = {}
    for name, wanted in records.items():
        for path in sorted(out.glob(f"{slug(name)}/seed-*/results.json")):
            run = read_json(path)
            own_seed = {**wanted, "config": {**wanted["config"], "seed": run["config"]["seed"]}}
            if changes := runs.differences(run, own_seed):
                print(f"not in the table: {path.parent}, run with {'; '.join(changes)}")
            else:
                found.setdefault(name, {})[path.parent.name] = run
    return found


def write_comparison(out, records, shared, config):
    """Write table.csv and compare.png to OUT, and print the table."""
    found, attacks = read_runs(out, records), shared.method.attacks
    figures = {}
    for name, seeds in found.items():
        commits = " ".join(sorted({run["commit"] for run in seeds.values()}))
        found[name] = {seed: run["results"][name] for seed, run in seeds.items()}
        figures[name] = {**pooled(found[name].values()), "commits": commits,
                         "seeds": " ".join(seed.removeprefix("seed-") for seed in seeds)}
    report.write_table(out / "table.csv", figures, attacks)
    report.decorate(plot_comparison, out / "compare.png", found, shared.evaluation_set, config)
    n, steps = len(shared.evaluation_set.rows), config.eval_attack_steps
    print(f"{config.concept}, {config.model}: {n} prompts a seed, attacks of {steps} steps\n"
          f"{report.rates_table(figures, attacks)}\n{out / 'table.csv'}")


THUMBNAILS = "pictures.safetensors"


def save_thumbnails(path, pictures, attacks, largest=128):
    """What compare.png may show: the concept's pictures, plain and attacked, and three others."""
    kept = {"rows": pictures["rows"], "utility": pictures["utility"][:3],
            **{kind: pictures[kind] for kind in attacks[:1]}}
    size = min(largest, pictures["rows"].shape[-1])
    kept = {part: F.interpolate(drawn, size, mode="area") for part, drawn in kept.items()}
    save_file({part: (255 * drawn).round().byte().cpu() for part, drawn in kept.items()}, path)


def shown_prompts(found, seed, attack, n=3):
    """Indices of the first n prompts that the attack breaks, in the first row where it breaks any.

    Where it breaks fewer, the first prompts follow.
    """
    broken = []
    for name, seeds in found.items():
        details = seeds.get(seed, {}).get("details", {}).get(attack, [])
        if name != "original" and not broken:
            broken = [i for i, d in enumerate(details) if not d["without_attack"] and d["broken"]]
    return list(dict.fromkeys([*broken[:n], *range(n)]))[:n]


def plot_comparison(path, found, evaluation_set, config):
    """compare.png: a line a row; the concept's prompts plain and attacked, then other things."""
    seed, attack = f"seed-{config.seed}", next(iter(config.eval_attacks), None)
    parts = {"rows": "", attack: "attacked: "} if attack else {"rows": ""}
    shown = [i for i in shown_prompts(found, seed, attack) if i < len(evaluation_set.rows)]
    lines = {}
    for name in found:
        kept = path.parent / slug(name) / seed / THUMBNAILS
        if kept.is_file():
            drawn = {part: pictures.float() / 255 for part, pictures in load_file(kept).items()}
            lines[name] = torch.cat([drawn[part][shown] for part in parts] + [drawn["utility"]])
    if lines:
        prompts = [front + evaluation_set.rows[i].prompt for front in parts.values() for i in shown]
        others = [row.prompt for row in evaluation_set.utility[:3]]
        report.plot_grid(path, [*prompts, *others], lines)
