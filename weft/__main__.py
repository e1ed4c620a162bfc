"""The command `weft`, as `python -m weft` too: the process is set up before anything large is imported."""

from weft.site.allocator import begin_again


def main() -> None:
    """Run the command line."""
    begin_again()
    from weft.cli import main as run

    run()


if __name__ == "__main__":
    main()
