"""The panel for the settings of a generation, such as seed and steps."""

import argparse
import random

import gradio as gr


class SettingsPanel:
    """
    Panel for the prompt and the settings that all kinds of generations share.

    Args:
        args (`argparse.Namespace`):
            The options of the page, which are the initial settings.
        prompt (`gr.Textbox`):
            The field of the prompt, which is at another place of the page.
    """

    def __init__(self, args: argparse.Namespace, prompt: gr.Textbox):
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            negative_prompt = gr.Textbox(
                value="",
                label="Negative prompt",
                info="What the image should not show",
                max_lines=3,
                elem_id="negative-prompt",
            )
            self.num_images = gr.Slider(1, 4, 4, step=1, label="Images", elem_id="num-images")
            self.random_seed = gr.Checkbox(args.seed is None, label="Random seed", elem_id="random-seed")
            self.seed = gr.Number(
                label="Seed",
                value=args.seed or 0,
                precision=0,
                minimum=0,
                info="Of the first image; the others have the following ones. To repeat it, turn off the random seed",
                elem_id="seed",
            )
            steps = gr.Slider(
                1,
                100,
                args.num_inference_steps,
                step=1,
                label="Steps",
                info=f"Usual: {args.num_inference_steps}. More steps take longer, and fewer give a rougher image",
                elem_id="steps",
            )
            guidance = gr.Slider(
                1,
                15,
                args.guidance_scale,
                step=0.1,
                label="Guidance scale",
                info=f"Usual: {args.guidance_scale:g}. How closely the prompt is followed; 1 turns the guidance off",
                elem_id="guidance",
            )
            eta = gr.Slider(
                0,
                1,
                args.eta,
                step=0.05,
                label="Eta",
                info=f"Usual: {args.eta:g}. How much noise the DDIM scheduler adds in each step; others ignore it",
                elem_id="eta",
            )
            hint = "Usual: {}. Fraction of the steps after which the subjects {}act"
            start = gr.Slider(
                0, 1, 0, step=0.05, label="Start of the subjects", info=hint.format(0, ""), elem_id="start"
            )
            end = gr.Slider(
                0, 1, 1, step=0.05, label="End of the subjects", info=hint.format(1, "no longer "), elem_id="end"
            )
        self._by_name = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "eta": eta,
            "subject_start": start,
            "subject_end": end,
        }
        self.components = [*self._by_name.values(), self.num_images, self.random_seed, self.seed]
        # the settings that an example sets
        self.defaults = {negative_prompt: "", start: 0, end: 1}
        self.defaults |= {steps: args.num_inference_steps, guidance: args.guidance_scale, eta: args.eta}

    def read(self, values: dict) -> dict:
        """Returns the values of the panel as arguments of a `GenerationRequest`. Raises a `ValueError` if the prompt is
        empty, or if the subjects never act."""
        arguments = {name: values[component] for name, component in self._by_name.items()}
        if not arguments["prompt"].strip():
            raise ValueError("The prompt is empty: describe the new image, for example “a cat in the snow”.")
        if arguments["subject_start"] >= arguments["subject_end"]:
            raise ValueError("The start of the subjects has to be before their end: change them in the settings.")
        first = random.randint(0, 999_999) if values[self.random_seed] else values[self.seed]
        if first is None:
            raise ValueError("The seed is empty: enter a whole number, or turn on the random seed.")
        return {**arguments, "seeds": tuple(range(first, first + values[self.num_images]))}
