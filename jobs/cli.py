"""The `dvae` command. Each subcommand imports its job when it runs, so that `dvae --help` takes no time."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated, Any

import typer

from jobs.cli_jobs import Config, Overrides, jobs_app, submit
from jobs.cli_models import AsJson, export_weights, import_weights, parity
from jobs.cli_tokens import compact, register, report, stats
from jobs.command_line import say, set_up_log
from jobs.command_line import typed_command as _command
from jobs.leaving import exit_process

INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train a dVAE with Ray and turn image sets of any size into tokens.",
)


@app.command()
def pack(
    folder: Annotated[str, typer.Argument(help="folder of images, sub-folders too")],
    out: Annotated[str, typer.Argument(help="URL or folder for the shards")],
    shard_mb: Annotated[int, typer.Option(help="largest size of a shard, in MB", min=1)] = 256,
    shard_samples: Annotated[int, typer.Option(help="most images in a shard", min=1)] = 10_000,
    prefix: Annotated[str, typer.Option(help="shards are named PREFIX-000000.tar")] = "images",
) -> int:
    """Pack a folder of images, captions (.txt) and metadata (.json) into WebDataset shards."""
    from jobs.pack_folder import run_pack

    return run_pack(folder, out, shard_bytes=shard_mb << 20, shard_samples=shard_samples, prefix=prefix)


@app.command()
def train(config: Config, overrides: Overrides = None) -> int:
    """Train a dVAE; the same command again resumes."""
    from jobs.config import load_config
    from jobs.train_config import TrainConfig
    from jobs.train_dvae import run_training

    return run_training(load_config(TrainConfig, config, overrides or ()), _command())


@app.command()
def tokenize(
    config: Config,
    overrides: Overrides = None,
    prune: Annotated[bool, typer.Option("--prune", help="drop parts of shards that the input has no longer")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="only say what would be done, how long it takes and how much it writes")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --plan: print JSON, with all shards by name")] = False,
) -> int:
    """Tokenise shards into Parquet; the same command again resumes."""
    from jobs.config import load_config
    from jobs.tokenize_config import TokenizeConfig
    from jobs.tokenize_dataset import run_tokenize

    if as_json and not plan:
        raise typer.BadParameter("--json belongs to --plan")
    settings = load_config(TokenizeConfig, config, overrides or ())
    if plan:
        from jobs.tokenize_plan import run_plan

        return run_plan(settings, _command(without=("--plan", "--json")), as_json=as_json)
    return run_tokenize(settings, _command(), prune=prune)


@app.command()
def bench(
    config: Config,
    overrides: Overrides = None,
    images: Annotated[
        int | None, typer.Option(help="measure on the first so many images; 1024, and short rounds, without it", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="how often each thing is measured, in turn", min=1)] = 3,
    free: Annotated[
        bool, typer.Option("--free", help="an encoder that costs nothing: what the pipeline itself can do")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """How fast tokenize is here, and could be; what to set. A minute."""
    from jobs.bench import BenchOptions, run_bench
    from jobs.config import load_config
    from jobs.tokenize_config import TokenizeConfig

    settings = load_config(TokenizeConfig, config, overrides or ())
    return run_bench(settings, BenchOptions(images, rounds, free), as_json=as_json)


@app.command()
def retry(
    output: Annotated[str, typer.Argument(help="output of dvae tokenize")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings on top of those of the run", metavar="[KEY=VALUE]...")
    ] = None,
    whole_shards: Annotated[
        bool, typer.Option("--whole-shards", help="also try what cannot be fetched as a single image")
    ] = False,
) -> int:
    """Try again what failed in a tokenising run, and only that."""
    from jobs.retry_failed import run_retry

    return run_retry(output, overrides or (), _command(), whole_shards=whole_shards)


@app.command()
def status(output: Annotated[str, typer.Argument(help="output of dvae tokenize")], as_json: AsJson = False) -> int:
    """How far a tokenising run is, how fast, what failed and why. Reads storage only."""
    from jobs.status import run_status

    return run_status(output, as_json=as_json)


@app.command()
def verify(
    output: Annotated[str, typer.Argument(help="output of dvae tokenize")],
    quick: Annotated[bool, typer.Option("--quick", help="read footers and listings only")] = False,
    rebuild_ledger: Annotated[
        bool, typer.Option("--rebuild-ledger", help="make the ledger again from the parts and the errors files")
    ] = False,
    sample: Annotated[
        float | None, typer.Option(help="tokenise this share of the images again and compare", min=0.0, max=1.0)
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="for --sample: the checkpoint that made the tokens")] = None,
    seed: Annotated[int, typer.Option(help="for --sample: another one chooses other images", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="for --sample: cpu or cuda; that of the run without it")] = None,
    as_json: AsJson = False,
) -> int:
    """Is every image accounted for, and every file? Exit code 0: all is there and right."""
    from jobs.sample_report import SampleSettings
    from jobs.verify import run_verify

    if quick and rebuild_ledger:
        raise typer.BadParameter("a ledger is made from every byte of the parts: leave out --quick")
    if (sample is None) != (checkpoint is None):
        raise typer.BadParameter("--sample and --checkpoint belong together: give both")
    settings = None if sample is None or checkpoint is None else SampleSettings(sample, checkpoint, seed, device)
    return run_verify(output, as_json=as_json, quick=quick, rebuild=rebuild_ledger, sample=settings)


@app.command()
def show(
    output: Annotated[str, typer.Argument(help="output of dvae tokenize")],
    checkpoint: Annotated[str, typer.Option(help="the checkpoint that made the tokens")],
    keys: Annotated[str | None, typer.Option(help="comma-separated keys; the first images without it")] = None,
    limit: Annotated[int, typer.Option(help="most images", min=1)] = 16,
    png: Annotated[str, typer.Option(help="the picture to write")] = "contact-sheet.png",
) -> int:
    """Decode tokens back into a contact sheet: original | from tokens."""
    from jobs.show import run_show

    return run_show(output, checkpoint, keys=keys.split(",") if keys else None, limit=limit, png=png)


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint's folder, or an output of dvae train")],
    shards: Annotated[list[str], typer.Argument(help="shards that it was not trained on, as in dvae tokenize")],
    num_images: Annotated[int | None, typer.Option(help="the first so many; all without it", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="images at once", min=1)] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    output: Annotated[str | None, typer.Option(help="a folder for report and pictures, or a .json or .md file")] = None,
    card: Annotated[bool, typer.Option("--card", help="also write the model card beside the checkpoint")] = False,
    lpips_weights: Annotated[
        str | None, typer.Option(help="torchvision's alexnet-owt-7be5be79.pth or vgg16-397923af.pth, for LPIPS")
    ] = None,
    fid_weights: Annotated[
        str | None, typer.Option(help="pytorch-fid's pt_inception-2015-12-05-6726825d.pth, for rFID")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """How good a checkpoint is: PSNR, SSIM, use of the codes, bits per image; LPIPS and rFID with weights you have."""
    from jobs.eval_checkpoint import EvalSettings
    from jobs.eval_report import run_eval

    settings = EvalSettings(num_images, batch_size, device, precision, lpips_weights, fid_weights)
    return run_eval(checkpoint, shards, settings, output=output, card=card, as_json=as_json)


app.command("import")(import_weights)
app.command("export")(export_weights)
app.command()(parity)
app.command()(stats)
app.command()(report)
app.command()(compact)
app.command()(register)


@app.command()
def demo(
    folder: Annotated[str | None, typer.Option("--dir", help="where everything lands")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="on a Ray cluster and an S3 server of its own")] = False,
) -> int:
    """Photographs -> shards -> training -> tokens -> queries and pictures, on this machine."""
    from jobs.demo import run_demo

    return run_demo(folder or ("demo-cluster" if cluster else "demo-output"), on_cluster=cluster)


app.command()(submit)
app.add_typer(jobs_app, name="jobs")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: the exit codes of the design, one clear message for what is wrong with the world."""
    set_up_log()
    signal.signal(signal.SIGTERM, _interrupt)
    exit_process(_run(lambda: _invoke(sys.argv[1:] if arguments is None else arguments)))


def _invoke(arguments: Sequence[str]) -> Any:
    """Not by Typer's own main, which makes a silent 130 of a KeyboardInterrupt."""
    command = typer.main.get_command(app)
    with command.make_context("dvae", list(arguments)) as context:
        return command.invoke(context)


def _run(command: Callable[[], Any]) -> int:
    from model.config import ModelError
    from pipeline.errors import PipelineError

    try:
        return int(command() or 0)
    except (PipelineError, ModelError) as error:
        say(f"dvae: {error}")
        return int(getattr(error, "exit_code", 2))
    except (KeyboardInterrupt, typer.Abort):
        return _stopped()
    except typer.Exit as error:
        return error.exit_code
    except Exception as error:
        if not _is_usage(error):
            raise
        error.show()  # type: ignore[attr-defined]
        return 2


def _stopped() -> int:
    say(f"dvae: stopped; to go on:\n  {_command()}")
    return INTERRUPTED


def _is_usage(error: Exception) -> bool:
    """Click's own errors, whichever click Typer brings."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
