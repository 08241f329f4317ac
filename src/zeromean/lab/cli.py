"""The command line: thin, one function a command, nothing decided here."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from tyro.conf import Positional

from zeromean.lab import show as pages
from zeromean.lab.compare import SILENT, exclusive, open_study, study_at
from zeromean.lab.compare import run as run_study
from zeromean.lab.data import AnyDataset
from zeromean.lab.plan import Plan, make
from zeromean.lab.recipes import ImageRecipe, find, override
from zeromean.lab.recording import ran_out_of_memory
from zeromean.lab.session import Session, stopped_by_sigterm
from zeromean.lab.sharing import launched
from zeromean.lab.store import Study
from zeromean.lab.tensorboard import summary_writer
from zeromean.lab.train import Stopped

_console = Console(highlight=False)
_Runs = Annotated[Path, tyro.conf.arg(metavar="DIR", help="Folder that holds all studies.")]


def ls() -> None:
    """List the recipes and the activations.

    Examples: zeromean ls
    """
    _console.print(pages.recipes())
    _console.print(pages.activations())


def show(target: Positional[str]) -> None:
    """Show a recipe, an activation, or the results of a study's folder.

    Examples: zeromean show digits-mlp8; zeromean show elu; zeromean show runs/digits-mlp8

    Args:
        target: name of a recipe or an activation, or a study's folder.
    """
    _console.print(pages.page(target))


def compare(
    recipe: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    activations: tuple[str, ...] = (),
    norm: tuple[str, ...] = (),
    seeds: int | None = None,
    baseline: str | None = None,
    tune: bool = False,
    name: str | None = None,
    runs: _Runs = Path("runs"),
    device: str = "auto",
    checkpoint_every: int = 1,
    together: int | None = None,
    gpus: int = 1,
    workers: int | None = None,
    tensorboard: bool = False,
    dry_run: bool = False,
) -> None:
    """Train a recipe's network with several activations and seeds, and say what the difference is.

    Run again, it continues where it stopped; a finished study is only reported. Under torchrun, several GPUs share
    every batch of a convolutional recipe.
    Examples: zeromean compare digits-mlp8 --activations elu relu --seeds 10;
    zeromean compare mnist-mlp8 epochs=20 --tune; zeromean compare mnist-mlp8 --dry-run;
    zeromean compare cifar100-elu11 --activations elu relu --norm none batch --baseline relu+batch;
    zeromean compare cifar100-elu11 length=0.1 --seeds 6

    Args:
        recipe: see zeromean ls.
        overrides: changed fields of the recipe, such as epochs=20 (see zeromean show RECIPE); they come before options.
            A convolutional recipe also takes length=0.1 (of its steps), rate_factor=2 and dropout_factor=0.5 (times
            its rates of learning and dropout), and everywhere=true (dropout behind every layer, not a stack's last).
        activations: the arms, such as elu leaky_relu:0.1 mpelu:alpha=0.25; the recipe's own if none is named.
        norm: normalization layers, each with every activation: none, batch; convolutional recipes only.
        seeds: runs per arm; the recipe's own number if not given.
        baseline: the arm to compare with, such as relu or relu+batch; the recipe's own if not given.
        tune: first choose each arm's learning rate on a validation split, with the same grid for all.
        name: of the study's folder; the recipe's name if not given.
        runs: folder that holds all studies.
        device: auto, cpu or cuda.
        checkpoint_every: epochs between checkpoints; a killed study loses at most as many. A convolutional recipe
            writes one a minute instead.
        together: runs of a convolutional recipe that share a GPU; if not given, what the recipe says.
        gpus: over which the runs of a convolutional recipe are spread, a process for each.
        workers: processes that decode the images of a folder, as of imagenet-elu15; a processor each if not given.
        tensorboard: write event files for TensorBoard while a convolutional recipe trains.
        dry_run: print the plan and stop.
    """
    published = find(recipe)
    chosen = override(published, overrides)
    count = chosen.seeds if seeds is None else seeds
    explicit = baseline or (chosen.baseline if chosen.baseline != published.baseline else None)
    norms = [part for text in norm for part in text.split(",")]
    plan = make(chosen, activations, norms=norms, seeds=count, tune=tune, baseline=explicit, name=name)
    _execute(plan, runs, device, checkpoint_every, together, tensorboard, dry_run, gpus, workers)


def run(
    recipe: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    activation: str | None = None,
    norm: str | None = None,
    seed: int = 0,
    name: str | None = None,
    runs: _Runs = Path("runs"),
    device: str = "auto",
    checkpoint_every: int = 1,
    workers: int | None = None,
    tensorboard: bool = False,
    dry_run: bool = False,
) -> None:
    """Train one network of a recipe, once.

    Examples: zeromean run digits-mlp8; zeromean run mnist-mlp8 epochs=5 --activation pelu --seed 3;
    zeromean run cifar100-elu18; zeromean run cifar100-elu11 --activation relu --norm batch

    Args:
        recipe: see zeromean ls.
        overrides: changed fields of the recipe, such as epochs=20.
        activation: the recipe's first if not given.
        norm: none or batch; the recipe's first if not given.
        seed: fixes initial weights, order of the samples and noise.
        name: of the folder; recipe, activation and seed if not given.
        runs: folder that holds all studies.
        device: auto, cpu or cuda.
        checkpoint_every: epochs between checkpoints; a convolutional recipe writes one a minute instead.
        workers: processes that decode the images of a folder, as of imagenet-elu15; a processor each if not given.
        tensorboard: write event files for TensorBoard while a convolutional recipe trains.
        dry_run: print the plan and stop.
    """
    chosen = override(find(recipe), overrides)
    if len(chosen.learning_rates) > 1:
        rates = ", ".join(map(str, chosen.learning_rates))
        raise ValueError(f"run trains one network, got the learning rates {rates}: choose one, as learning_rates=0.01")
    first = chosen.norms[:1] if isinstance(chosen, ImageRecipe) else ()
    wanted = [activation or chosen.activations[0]]
    plan = make(chosen, wanted, norms=(norm,) if norm else first, seeds=1, first_seed=seed)
    study = replace(plan, study=name or f"{chosen.name}-{plan.arms[0].name}-seed{seed}")
    _execute(study, runs, device, checkpoint_every, None, tensorboard, dry_run, workers=workers)


def report(study: Positional[Path]) -> None:
    """Write summary.csv, summary.md and report.html of a study anew from its run files.

    Examples: zeromean report runs/digits-mlp8

    Args:
        study: the study's folder.
    """
    _summarise(Study(study))


def bench(
    activations: Positional[tuple[str, ...]] = (),
    elements: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    layouts: tuple[str, ...] = (),
    passes: tuple[str, ...] = (),
    contenders: tuple[str, ...] = (),
    rounds: int = 5,
    output: Annotated[Path, tyro.conf.arg(metavar="DIR", help="Folder of the results.")] = Path("runs/bench"),
    device: str = "auto",
    fresh: bool = False,
    redraw: bool = False,
) -> None:
    """Time the activations against torch and other libraries, as a fraction of a copy of the same size.

    Run again, it measures only what is missing in the folder.
    Examples: zeromean bench; zeromean bench elu prelu --elements 2**24 2**28; zeromean bench --redraw

    Args:
        activations: such as elu eelu eelu:quiet (the pass without noise); all if none is named.
        elements: sizes of the input, such as 4096 or 2**28, which is the default on a GPU; 2**22 on a CPU.
        dtypes: bfloat16 (the default), float16, float32.
        layouts: contiguous, nchw, channels_last; by default the last two for activations that learn.
        passes: forward, backward, both; by default both together up to 2**20 elements, else each alone.
        contenders: zeromean eager inplace textbook compile (the default), max-autotune, zeromean-compile, attorch,
            liger, flag_gems, inplace_abn.
        rounds: how often the contenders take turns.
        output: folder of results.jsonl, machine.json, summary.md and the pictures.
        device: auto, cpu or cuda.
        fresh: throw away what is in the folder.
        redraw: measure nothing, write the summary and the pictures anew from the folder's rows.
    """
    from zeromean.lab import bench as benchmark

    if redraw:
        return benchmark.summarise(benchmark.Record(output), _console)
    chosen = benchmark.settings(
        activations,
        elements=elements,
        dtypes=dtypes,
        layouts=layouts,
        passes=passes,
        competitors=contenders,
        rounds=rounds,
        device=device,
    )
    benchmark.run(chosen, output, fresh=fresh, console=_console)
    return None


def data(names: Positional[tuple[str, ...]] = ()) -> None:
    """Show the data sets and where they are; name some to fetch and check them.

    Examples: zeromean data; zeromean data mnist

    Args:
        names: data sets to load, downloading what is missing, and to check by hash.
    """
    _console.print(pages.data_sets(names))


def doctor() -> None:
    """Say what is installed, which device is used, what is missing and how to get it.

    Examples: zeromean doctor
    """
    from zeromean.lab.doctor import diagnose, render

    _console.print(render(diagnose()))


def probe(
    target: Positional[str],
    data: str = "",
    activation: str | None = None,
    norm: str = "none",
    preset: str = "full",
    layers: tuple[str, ...] = (),
    samples: int = 500,
    steps: int = 0,
    every: int = 10,
    flat: bool = False,
    output: Annotated[Path, tyro.conf.arg(metavar="DIR", help="Folder of the report.")] = Path("runs/probe"),
    device: str = "auto",
) -> None:
    """Say which layers' units shift, saturate or die, how far the gradient is from the natural one, and what to do.

    Examples: zeromean probe digits-mlp8 --activation relu; zeromean probe my_module:build --data digits --flat;
    zeromean probe mnist-mlp8 --steps 500 --every 50

    Args:
        target: a recipe, or module:function of your own, found from this folder, which returns a torch.nn.Module.
        data: one that zeromean data lists, but no folder of images; the recipe's own, or digits, if not given.
        activation: of a recipe's network, such as relu or leaky_relu:0.1; the recipe's first if not given.
        norm: none or batch; of a convolutional recipe's network.
        preset: full, or light without natural gradients.
        layers: names or globs such as encoder.*; all Linear and Conv layers and activations if none is named.
        samples: of the probe batch; not more than there are training images.
        steps: of plain gradient descent while it is probed; 0 probes the network as it is built.
        every: steps between two measurements.
        flat: give your model vectors instead of images.
        output: folder of report.json and the pictures.
        device: auto, cpu or cuda.
    """
    from zeromean.lab import probing
    from zeromean.lab.progress import LayerBar

    probing.check_output(output)
    chosen = probing.subject(target, data, activation, _device(device), flat=flat, norm=norm, samples=samples)
    with LayerBar(_console) as bar:
        found = probing.run(chosen, preset=preset, layers=layers, steps=steps, every=every, on_layer=bar.on_layer)
    _console.print(chosen.title, style="bold")
    _console.print(found)
    written = probing.write(found, output)
    _console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


def _execute(
    plan: Plan,
    runs: Path,
    device_name: str,
    checkpoint_every: int,
    together: int | None,
    tensorboard: bool,
    dry_run: bool,
    gpus: int = 1,
    workers: int | None = None,
) -> None:
    from zeromean.lab.data import is_folder, load_any
    from zeromean.lab.spread import first_gpus

    _check_options(plan, checkpoint_every, together, tensorboard, gpus)
    if gpus > 1 and device_name == "cpu":
        raise ValueError(f"gpus must be 1 with --device cpu, got {gpus}: leave one of them out")
    _check_workers(plan, workers, gpus, is_folder(plan.recipe.data))
    study = study_at(runs, plan.study)
    with stopped_by_sigterm(), launched(_device(device_name)) as (share, device):
        if share.processes > 1 and not isinstance(plan.recipe, ImageRecipe):
            raise ValueError(f"torchrun cannot speed up {plan.recipe.name!r}: start it without, in one process")
        _console.quiet = not share.writes
        if share.processes > 1 and gpus > 1:
            raise ValueError(f"gpus spreads runs, torchrun a batch: use one of them, got gpus={gpus} under torchrun")
        session = Session(device, share, together, tensorboard, first_gpus(gpus) if gpus > 1 else (), workers)
        dataset = load_any(plan.recipe.data)
        if share.writes:
            _lead(plan, study, dataset, session, checkpoint_every, dry_run)
        elif not dry_run:
            run_study(plan, study, dataset, device=device, progress=SILENT, session=session)


def _check_options(plan: Plan, checkpoint_every: int, together: int | None, tensorboard: bool, gpus: int) -> None:
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1 epoch, got {checkpoint_every}")
    if together is not None and together < 1:
        raise ValueError(f"together must be at least 1 run, got {together}")
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if isinstance(plan.recipe, ImageRecipe):
        if checkpoint_every != 1:
            raise ValueError(f"--checkpoint-every is not for {plan.recipe.name!r}, which writes a checkpoint a minute")
        if tensorboard:
            summary_writer()
    elif together is not None or tensorboard or gpus > 1:
        option = "--together" if together is not None else "--tensorboard" if tensorboard else "--gpus"
        raise ValueError(f"{option} is not for {plan.recipe.name!r}, whose runs are trained as one: leave it out")


def _check_workers(plan: Plan, workers: int | None, gpus: int, streamed: bool) -> None:
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}: 0 decodes the images beside the training")
    if workers is not None and not streamed:
        raise ValueError(f"--workers is not for {plan.recipe.data!r}, whose images lie in memory: leave it out")
    if gpus > 1 and streamed:
        raise ValueError(
            f"--gpus is not for {plan.recipe.data!r}, whose images come from worker processes: start it with "
            f"torchrun --nproc-per-node {gpus}, which shares every batch"
        )


def _lead(
    plan: Plan, study: Study, dataset: AnyDataset, session: Session, checkpoint_every: int, dry_run: bool
) -> None:
    """What the first of several processes, or the only one, does: plan, train, report."""
    from zeromean.lab import inside
    from zeromean.lab.progress import Bar

    device = session.device
    facts = open_study(plan, study, dataset, device, processes=session.share.processes)
    _console.print(pages.plan(facts, study))
    if dry_run:
        return
    with exclusive(study):
        if study.plan() is None:
            study.write_plan(facts)
        open_study(plan, study, dataset, device)  # as another study may have begun since
        with Bar(_console) as bar:
            run_study(
                plan,
                study,
                dataset,
                device=device,
                progress=bar.progress,
                checkpoint_every=checkpoint_every,
                session=session,
            )
        with _console.status("looking inside the trained networks"):
            inside.look(plan, study, dataset, device, lambda line: _console.print(line, soft_wrap=True, markup=False))
        _summarise(study)


def _summarise(study: Study) -> None:
    from zeromean.lab.report import write_report
    from zeromean.lab.summary import load, to_csv, to_markdown

    if study.plan() is None:
        raise ValueError(f"{study.path} holds no study (no plan.json): name the folder that zeromean compare printed")
    summary = load(study)
    study.write_text("summary.csv", to_csv(summary))
    study.write_text("summary.md", to_markdown(summary))
    page = write_report(study.path)
    _console.print(pages.results(summary))
    _console.print(f"report: {page}", soft_wrap=True, markup=False)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available here: zeromean doctor says why; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


_COMMANDS: dict[str, Callable[..., Any]] = {
    "ls": ls,
    "show": show,
    "compare": compare,
    "run": run,
    "report": report,
    "bench": bench,
    "data": data,
    "probe": probe,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors of the user end with a sentence and a non-zero exit, never with a traceback."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            prog="zeromean",
            description="Networks whose units keep zero mean through their activation function.",
            args=arguments,
        )
    except KeyboardInterrupt:
        _console.print("\nStopped; the same command continues. Only what came after the last checkpoint is lost.")
        sys.exit(130)
    except Stopped:
        _console.print("Stopped by SIGTERM: the same command continues from where it stopped.", soft_wrap=True)
        sys.exit(143)
    except ValueError as error:
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker" in str(error):
            _fail(
                f"a process that reads images was ended ({error}): mostly memory or /dev/shm was short; use fewer "
                "--workers; the same command continues"
            )
        if not ran_out_of_memory(error):
            raise
        _fail(f"out of memory ({error}): name fewer seeds or arms, or make the network smaller")
    except OSError as error:
        full = error.errno == errno.ENOSPC
        remedy = (
            "free some space; the same command continues the study" if full else "check the path and its permissions"
        )
        _fail(f"{'the disk is full' if full else 'the system refused'} ({error}): {remedy}")


def _fail(message: str) -> None:
    Console(stderr=True, highlight=False, markup=False).print(f"error: {message}", style="bold red", soft_wrap=True)
    sys.exit(2)
