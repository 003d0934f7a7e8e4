"""Which checkpoints the page draws with."""

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkpoints:
    """Folders or repositories on the Hub: the base model, the SSR-Encoder, and a ControlNet and a motion adapter where the
    page has their tabs."""

    base: str
    ssr: str
    controlnet: str | None = None
    motion_adapter: str | None = None

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> "Checkpoints":
        """What the options name; a folder that holds a whole checkpoint also gives the parts that they leave out."""

        def part(given: str | None, name: str) -> str | None:
            folder = Path(args.checkpoint) / name
            return given or (str(folder) if folder.is_dir() else None)

        return cls(
            base=args.checkpoint,
            ssr=args.ssr or args.checkpoint,
            controlnet=part(args.controlnet, "controlnet"),
            motion_adapter=part(args.motion_adapter, "motion_adapter"),
        )
