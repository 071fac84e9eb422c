from __future__ import annotations
import click


@click.command()
def mount() -> None:
    """x"""


@click.command()
def umount() -> None:
    """x"""


@click.command()
def flush() -> None:
    """x"""
