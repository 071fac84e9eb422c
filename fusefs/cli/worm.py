from __future__ import annotations
import click


@click.command()
def worm() -> None:
    """x"""
