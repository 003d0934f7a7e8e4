"""The panel for the settings of a drawing, such as prompts, seed and steps."""

import argparse
import random

import gradio as gr

from .widgets import HIDDEN


LARGEST_SEED = 2**32 - 1


class SettingsPanel:
    """
    Panel for the settings that all kinds of drawings share.

    Args:
        args (`argparse.Namespace`):
            The options of the page, which are the initial settings.
    """

    def __init__(self, args: argparse.Namespace):
        prompt = gr.Textbox(label="Prompt", value=args.prompt, max_lines=3, elem_id="prompt")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            negative_prompt = gr.Textbox(label="Negative prompt", max_lines=3, elem_id="negative-prompt")
            seed = gr.Number(
                label="Seed", value=args.seed, precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed"
            )
            another = gr.Button("Another seed", size="sm", elem_id="another-seed")
            steps = gr.Slider(1, 100, args.num_inference_steps, step=1, label="Steps", elem_id="steps")
            guidance = gr.Slider(1, 15, args.guidance_scale, step=0.1, label="Guidance scale", elem_id="guidance")
            eta = gr.Slider(0, 1, args.eta, step=0.05, label="Eta (noise of the DDIM scheduler)", elem_id="eta")
            start = gr.Slider(
                0, 1, 0, step=0.05, label="Start of the subjects (fraction of the steps)", elem_id="start"
            )
            end = gr.Slider(0, 1, 1, step=0.05, label="End of the subjects (fraction of the steps)", elem_id="end")
        another.click(lambda: random.randint(0, LARGEST_SEED), None, seed, **HIDDEN)
        self._by_name = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "eta": eta,
            "subject_start": start,
            "subject_end": end,
        }
        self.components = set(self._by_name.values())

    def read(self, values: dict) -> dict:
        """Returns the values of the panel as arguments of a `DrawingRequest`."""
        arguments = {name: values[component] for name, component in self._by_name.items()}
        if arguments["seed"] is None:
            raise ValueError("The seed is empty. It has to be a whole number.")
        return arguments
