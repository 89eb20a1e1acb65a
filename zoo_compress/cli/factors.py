"""Commands that replace layers by two each: factorize, separate."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import MODEL_HELP, OUTPUT, calibration_data, cli, data_options, examples, load_model, model_options

if TYPE_CHECKING:
    from torch import nn

    from ..surgery.factorise import FactorPlan

DATA = data_options("Fit what layers give on images: imagefolder:PATH, digits, or a name timm.data takes.")


@cli.command(
    epilog=MODEL_HELP
    + "\n\n"
    + examples(
        "zoo-compress factorize vit_tiny_patch16_224 --pretrained --macs 0.8 -o low/",
        "zoo-compress factorize resnet50 --pretrained --energy 0.95 --scheme spatial -o low/",
        "zoo-compress factorize runs/mine/model --macs 0.7 --data imagefolder:/data/imagenet -o low/",
    )
)
@click.argument("model")
@click.option("--macs", type=float, help="MACs to keep: a fraction up to 1, a count above.")
@click.option("--params", type=float, help="Parameters to keep: a fraction up to 1, a count above.")
@click.option("--energy", type=float, help="Share of its squared singular values that every layer keeps.")
@click.option(
    "--scheme",
    type=click.Choice(["auto", "svd", "spatial", "channel"]),
    default="auto",
    show_default=True,
    help="What k×k convolutions become: k×1 and 1×k (spatial), k×k and 1×1 (channel), whichever loses less (auto), or nothing (svd).",
)
@click.option("--round-to", type=click.IntRange(min=1), default=8, show_default=True, help="Preferred multiple for ranks.")
@DATA
@OUTPUT
@model_options
def factorize(
    model: str,
    macs: float | None,
    params: float | None,
    energy: float | None,
    scheme: str,
    round_to: int,
    source: str | None,
    data_root: str | None,
    images: int,
    output: Path,
    pretrained: bool,
    args: tuple[str, ...],
) -> None:
    """Replace MODEL's layers by two of lower rank each, without training, and save it. Says which layers are left, and why."""
    import zoo_compress as zc

    from ..training.checkpoint import check_empty

    check_empty(output)
    loaded = load_model(model, pretrained, args)
    data = calibration_data(loaded, source, data_root, images) if source else None
    plan = zc.plan_factorize(loaded, macs=macs, params=params, energy=energy, scheme=scheme, round_to=round_to, data=data)
    _finish(loaded, plan, output)


@cli.command(epilog=MODEL_HELP + "\n\n" + examples("zoo-compress separate resnet18 --pretrained -o separable/"))
@click.argument("model")
@click.option("--macs", type=float, help="MACs to keep: a fraction up to 1, a count above. All convolutions are replaced without a budget.")
@click.option("--params", type=float, help="Parameters to keep: a fraction up to 1, a count above.")
@click.option("--multiplier", type=click.IntRange(min=1), default=1, show_default=True, help="Depthwise filters per input channel.")
@DATA
@OUTPUT
@model_options
def separate(
    model: str,
    macs: float | None,
    params: float | None,
    multiplier: int,
    source: str | None,
    data_root: str | None,
    images: int,
    output: Path,
    pretrained: bool,
    args: tuple[str, ...],
) -> None:
    """Replace MODEL's dense convolutions by depthwise and pointwise ones, fitted without training, and save it."""
    import zoo_compress as zc

    from ..training.checkpoint import check_empty

    check_empty(output)
    loaded = load_model(model, pretrained, args)
    data = calibration_data(loaded, source, data_root, images) if source else None
    plan = zc.plan_separate(loaded, macs=macs, params=params, multiplier=multiplier, data=data)
    _finish(loaded, plan, output)


def _finish(model: "nn.Module", plan: "FactorPlan", output: Path) -> None:
    import zoo_compress as zc

    from ..surgery.factorise import apply_factors

    zc.save(apply_factors(model, plan), output)
    click.echo(str(plan))
    click.echo(f"saved to {output}; nothing was fine-tuned")
