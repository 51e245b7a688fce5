"""The `prep` command. Commands parse arguments and report; they import the code that does the work when needed."""

import os
from typing import Any

import click

# Work is parallel by processes. numpy must not start a thread pool in each.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from loader.errors import ShardsError, one_line
from prep import __version__
from prep.commands.bench import bench
from prep.commands.build_shards import build_shards
from prep.commands.info import info
from prep.commands.verify import verify
from prep.console.unix import UnixGroup


class Cli(UnixGroup):
    """A group that reports our errors as click reports its own: one message, exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ShardsError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.filename is None:  # it concerns a stream, not a file
                raise
            raise click.ClickException(one_line(f"{error.filename}: {error.strerror}")) from None
        except ImportError as error:
            if "map segment" not in str(error) and "allocate memory" not in str(error):
                raise
            raise click.ClickException(f"too little memory to start (ulimit -v?): {error}") from None
        except (MemoryError, RecursionError, OverflowError) as error:
            got = {MemoryError: "too little memory", RecursionError: "data nested too deeply"}.get(type(error))
            raise click.ClickException(": ".join(filter(None, [got or "a number too large", str(error)]))) from None


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="srshards")
def main() -> None:
    """Turn folders of images into shards for super-resolution training."""
    # OpenCV's own limit, which it reads once, gives way to --max-pixels.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 40))


for command in (build_shards, verify, info, bench):
    main.add_command(command)


if __name__ == "__main__":
    main()
