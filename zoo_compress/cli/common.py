"""What every command needs: the group they belong to, options of models, and how a model's name is understood."""

import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from ..errors import CompressError

if TYPE_CHECKING:
    from torch import nn

    from ..training.data import Batches

    Compressed: TypeAlias = tuple[nn.Module, Callable[[Path], str]]

Command = TypeVar("Command", bound=Callable[..., Any])

MODEL_HELP = "MODEL is anything timm.create_model takes (an architecture, local-dir:PATH, hf-hub:OWNER/REPO) or the path of a saved model."


class Group(click.Group):
    """Shows errors that a user can act on in one line; any other exception is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CompressError as error:
            rank = os.environ.get("RANK", "0")
            click.echo(f"error{'' if rank == '0' else f' (process {rank})'}: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(130)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="zoo_compress", prog_name="zoo-compress")
def cli() -> None:
    """Compress timm models: prune, fine-tune, measure, save."""


def model_options(command: Command) -> Command:
    """The options of every command that loads a model."""
    arg = click.option("-a", "--arg", "args", multiple=True, metavar="NAME=VALUE", help="Argument of timm.create_model; repeatable.")
    pretrained = click.option(
        "--pretrained", is_flag=True, help="Load an architecture's pretrained weights; saved models always have theirs."
    )
    return arg(pretrained(command))


def examples(*lines: str) -> str:
    """An epilog that click does not reflow."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def load_model(name: str, pretrained: bool = False, args: Sequence[str] = ()) -> "nn.Module":
    """Load what a user calls a model.

    Args:
        name: an architecture, `local-dir:PATH`, `hf-hub:OWNER/REPO`, or the path of a folder that holds a saved model.
        pretrained: for an architecture, load its pretrained weights.
        args: `NAME=VALUE` arguments of `timm.create_model`, values written as in YAML.

    Raises:
        CompressError: there is no such model, or it cannot be loaded with these arguments.
    """
    import difflib

    import timm
    import yaml
    from timm.models import split_model_name_tag

    from zoo_compress.zoo import index  # registers the package's architectures with timm, too

    kwargs = {}
    for arg in args:
        key, equals, value = arg.partition("=")
        if not equals or not key.isidentifier():
            raise CompressError(f"--arg: expected NAME=VALUE, found {arg!r}")
        try:
            kwargs[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise CompressError(f"--arg {key}: expected a value as in YAML, found {value!r}") from error
    if Path(name).is_dir():
        name = f"local-dir:{name}"
    saved = ":" in name or index.find(name) is not None
    if ":" not in name and not timm.is_model(split_model_name_tag(name)[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise CompressError(f"model {name!r}: expected a name of timm.list_models(), local-dir:PATH, hf-hub:OWNER/REPO or a folder{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained or saved, **kwargs)
    except CompressError:
        raise
    # Whatever an architecture or the network raises, the user's name or arguments led there.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        given = f" with {kwargs}" if kwargs else ""
        raise CompressError(f"model {name!r}: timm cannot create it{given}: {type(error).__name__}: {reason}") from error


OUTPUT = click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to save to; new or empty."
)


def _image_options(text: str) -> tuple[Callable[[Command], Command], ...]:
    count = click.IntRange(min=1)
    return (
        click.option("--data", "source", help=text),
        click.option("--data-root", help="Folder of the data set."),
        click.option("--images", type=count, default=256, show_default=True, help="How many of its training images to look at."),
    )


def compression(images: str | None = None, needing: Sequence[str] = ()) -> Callable[[Callable[..., "Compressed"]], Callable[..., None]]:
    """A command that makes another model of MODEL and saves it, with the options that all such commands have.

    What it decorates takes the model, batches of images or None, and its own options, and gives the new model and what to say of it, given
    the folder it was saved to.

    Args:
        images: What images are looked at for; None where they are not.
        needing: Its options that mean nothing without images.
    """

    def decorate(make: Callable[..., "Compressed"]) -> Callable[..., None]:
        @wraps(make)
        def command(
            model: str,
            output: Path,
            pretrained: bool,
            args: tuple[str, ...],
            source: str | None = None,
            data_root: str | None = None,
            images: int = 0,
            **settings: Any,
        ) -> None:
            import zoo_compress as zc

            from ..training.checkpoint import check_empty

            for name in needing:
                if settings[name] and source is None:
                    raise CompressError(f"--{name}: expected --data with images for it, found none")
            check_empty(output)
            loaded = load_model(model, pretrained, args)
            made, report = make(loaded, calibration_data(loaded, source, data_root, images) if source else None, **settings)
            zc.save(made, output)
            click.echo(report(output))
            click.echo(f"saved to {output}; nothing was fine-tuned")

        options = [click.argument("model"), *(_image_options(images) if images else ()), OUTPUT, model_options]
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def calibration_data(model: "nn.Module", source: str, root: str | None, images: int) -> "Batches":
    """Training images of a data source, shuffled, as the model wants them; the same ones every time."""
    from ..training.config import DataConfig
    from ..training.data import calibration_batches, check_channels
    from ..training.loop import reseed
    from ..training.sources import open_source

    check_channels(model)
    reseed(0, 0, 0)
    config = DataConfig(source=source, root=root, batch_size=min(images, 32))
    return calibration_batches(open_source(config, getattr(model, "in_chans", 3)), config, model, -(-images // config.batch_size))
