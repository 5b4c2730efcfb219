"""Those commands of `dvae` that take or give whole models; cli.py has the others, and puts these among them."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def import_weights(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="encoder.pkl, or it and decoder.pkl; a state dict of theirs; vae.pt; dalle.pt; a checkpoint of dvae",
            metavar="SOURCE",
        ),
    ],
    dest: Annotated[str, typer.Argument(help="URL or folder for the checkpoint", metavar="DEST")],
    licence: Annotated[
        str | None, typer.Option("--license", help="what the model card says of the weights, in place of what is known")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Other people's weights into a checkpoint; nothing in their files is run."""
    from jobs.import_checkpoint import run_import

    return run_import(sources, dest, licence=licence, as_json=as_json)


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
    if dest.endswith(".pt"):
        from jobs.export_vae import run_export_vae

        return run_export_vae(checkpoint, dest, as_json=as_json)
    from jobs.export_onnx import run_export_onnx

    return run_export_onnx(checkpoint, dest, as_json=as_json)
