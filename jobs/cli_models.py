"""Those commands of `dvae` that take or give whole models; cli.py has the others, and puts these among them."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def import_weights(
    names: Annotated[
        list[str],
        typer.Argument(
            help="encoder.pkl, or it and decoder.pkl; a state dict of theirs; vae.pt; dalle.pt; a checkpoint of dvae; "
            "and after those the URL or folder for the new checkpoint",
            metavar="SOURCE... DEST",
        ),
    ],
    licence: Annotated[
        str | None, typer.Option("--license", help="what the model card says of the weights, in place of what is known")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="pixels a side, not the source's: BEiT's tokens are OpenAI's at 112", min=8),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Other people's weights into a checkpoint; nothing in their files is run."""
    if len(names) == 1:
        raise typer.BadParameter(f"after {names[0]}, name a folder for the checkpoint", param_hint="DEST")
    from jobs.import_checkpoint import run_import

    return run_import(names[:-1], names[-1], licence=licence, as_json=as_json, image_size=image_size)


def export_weights(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint's folder, or an output of dvae train")],
    dest: Annotated[
        str,
        typer.Argument(
            help="a folder for encoder.onnx and decoder.onnx, or a .pt file for DALLE-pytorch", metavar="DEST"
        ),
    ],
    as_json: AsJson = False,
) -> int:
    """Write a checkpoint as ONNX files for other runtimes (pixels -> tokens, tokens -> pixels), or as a vae.pt."""
    if dest.lower().endswith((".pt", ".pth")):
        from jobs.export_vae import run_export_vae

        return run_export_vae(checkpoint, dest, as_json=as_json)
    if dest.lower().endswith(".onnx"):
        raise typer.BadParameter(f"{dest}: name a folder for encoder.onnx and decoder.onnx", param_hint="DEST")
    from jobs.export_onnx import run_export_onnx

    return run_export_onnx(checkpoint, dest, as_json=as_json)


def parity(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint's folder, or an output of dvae train")],
    shards: Annotated[list[str], typer.Argument(help="shards, as in dvae tokenize: some of their images are encoded")],
    images: Annotated[int, typer.Option(help="how many", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="as in dvae tokenize", min=1)] = 64,
    threads: Annotated[int, typer.Option(help="as in dvae tokenize", min=1)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    no_compile: Annotated[bool, typer.Option("--no-compile", help="leave the compiled variants out")] = False,
    against: Annotated[str | None, typer.Option(help="another checkpoint: how many of its tokens are the same")] = None,
    as_json: AsJson = False,
) -> int:
    """How many tokens of each precision, or of another checkpoint, are those of fp32; and how fast each is here."""
    from jobs.parity import ParitySettings
    from jobs.parity_report import run_parity

    settings = ParitySettings(images, batch_size, threads, device, compile=not no_compile, against=against)
    return run_parity(checkpoint, shards, settings, as_json=as_json)
