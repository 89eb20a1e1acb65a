"""Commands that replace layers by two each: factorize, separate."""

from typing import TYPE_CHECKING, Any

import click

from .common import MODEL_HELP, cli, compression, examples

if TYPE_CHECKING:
    from torch import nn

    from ..surgery.factorise import FactorPlan
    from ..training.data import Batches
    from .common import Compressed

DATA = compression("Fit what layers give on images: imagefolder:PATH, digits, or a name timm.data takes.")


@cli.command(
    epilog=MODEL_HELP
    + "\n\n"
    + examples(
        "zoo-compress factorize vit_tiny_patch16_224 --pretrained --macs 0.8 -o low/",
        "zoo-compress factorize resnet50 --pretrained --energy 0.95 --scheme spatial -o low/",
        "zoo-compress factorize runs/mine/model --macs 0.7 --data imagefolder:/data/imagenet -o low/",
    )
)
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
def factorize(model: "nn.Module", data: "Batches | None", **settings: Any) -> "Compressed":
    """Replace MODEL's layers by two of lower rank each, without training, and save it. Says which layers are left, and why."""
    import zoo_compress as zc

    return _planned(model, zc.plan_factorize(model, data=data, **settings))


@cli.command(epilog=MODEL_HELP + "\n\n" + examples("zoo-compress separate resnet18 --pretrained -o separable/"))
@click.option("--macs", type=float, help="MACs to keep: a fraction up to 1, a count above. All convolutions are replaced without a budget.")
@click.option("--params", type=float, help="Parameters to keep: a fraction up to 1, a count above.")
@click.option("--multiplier", type=click.IntRange(min=1), default=1, show_default=True, help="Depthwise filters per input channel.")
@DATA
def separate(model: "nn.Module", data: "Batches | None", **settings: Any) -> "Compressed":
    """Replace MODEL's dense convolutions by depthwise and pointwise ones, fitted without training, and save it."""
    import zoo_compress as zc

    return _planned(model, zc.plan_separate(model, data=data, **settings))


def _planned(model: "nn.Module", plan: "FactorPlan") -> "Compressed":
    from ..surgery.factorise import apply_factors

    return apply_factors(model, plan), lambda output: str(plan)
