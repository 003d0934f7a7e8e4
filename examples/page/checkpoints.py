"""The checkpoints that the page uses."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkpoints:
    """Folders or Hub repositories of the base model, and optionally of an SSR-Encoder, a ControlNet and a motion
    adapter. Without `ssr`, the base model is a whole pipeline that contains the SSR-Encoder. The page only has the tabs
    for ControlNet and video if these are given."""

    base: str
    ssr: str | None = None
    controlnet: str | None = None
    motion_adapter: str | None = None

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> "Checkpoints":
        """Reads the checkpoints from the options. A ControlNet or motion adapter that is not given is taken from the
        folder of the checkpoint if it exists there."""

        def part(given: str | None, name: str) -> str | None:
            folder = Path(args.checkpoint) / name
            return given or (str(folder) if folder.is_dir() else None)

        return cls(
            base=args.checkpoint,
            ssr=args.ssr,
            controlnet=part(args.controlnet, "controlnet"),
            motion_adapter=part(args.motion_adapter, "motion_adapter"),
        )

    def world(self) -> dict:
        """Returns what the checkpoint knows: the content of its `world.json`, which only the pocket checkpoint has."""
        file = Path(self.base) / "world.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def describe(self, side: int) -> str:
        """Returns a sentence about the checkpoint for the page. `side` is the size of a generated image."""
        names = [f"`{Path(name).name if Path(name).is_dir() else name}`" for name in (self.base, self.ssr) if name]
        checkpoint = f"**Checkpoint:** {' with the SSR-Encoder '.join(names)}, images of {side} x {side} pixels."
        world = self.world()
        if not world:
            return checkpoint
        kinds = world["categories"]
        return (
            f"{checkpoint} It is a small checkpoint for tests and only knows {len(kinds)} kinds of emoji"
            f" ({', '.join(kinds)}), {', '.join(world['places'])}. From a photo, it generates an emoji."
        )
