"""The requests of users to generate an image."""

from dataclasses import dataclass

from drawing import MASK_WEIGHT
from PIL import Image


IMAGE, ALONG_EDGES, VIDEO = "image", "along_edges", "video"


@dataclass(frozen=True, eq=False)
class SubjectChoice:
    """A subject: the reference image, the query or the mask that selects the subject, the scale, and the region of
    the output where it can appear. Masks are white at the subject. `mask` has the size of the reference, and `region`
    has the aspect ratio of the output."""

    image: Image.Image
    query: str = ""
    mask: Image.Image | None = None
    scale: float = 1.0
    region: Image.Image | None = None

    def selection(self) -> dict:
        """Returns the query and the mask as arguments of the pipeline's methods."""
        mask = {} if self.mask is None else {"mask": self.mask, "mask_weight": MASK_WEIGHT}
        return {"query": self.query or None, **mask}


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """A request to generate images, one for each seed. With `edges`, an edge map of the output size, the image follows the edges. With
    `num_frames`, the request is for a video."""

    prompt: str
    subjects: tuple[SubjectChoice, ...] = ()
    negative_prompt: str = ""
    seeds: tuple[int, ...] = (0,)
    num_inference_steps: int = 25
    guidance_scale: float = 3.0
    eta: float = 0.9
    subject_start: float = 0.0
    subject_end: float = 1.0
    edges: Image.Image | None = None
    controlnet_conditioning_scale: float = 1.0
    num_frames: int | None = None

    @property
    def kind(self) -> str:
        """The kind of pipeline that generates the request."""
        if self.edges is not None:
            return ALONG_EDGES
        return IMAGE if self.num_frames is None else VIDEO

    def call_arguments(self) -> dict:
        """Returns the number and string arguments of the pipeline call, without those that have no effect."""
        arguments = {"prompt": self.prompt}
        if len(self.seeds) > 1:
            arguments["num_images_per_prompt"] = len(self.seeds)
        if self.negative_prompt:
            arguments["negative_prompt"] = self.negative_prompt
        arguments |= {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "eta": self.eta,
        }
        if self.subjects and (self.subject_start, self.subject_end) != (0.0, 1.0):
            arguments.update(subject_start=self.subject_start, subject_end=self.subject_end)
        if self.kind == ALONG_EDGES:
            # the pipeline does not accept an `int`, but a slider can return one
            arguments["controlnet_conditioning_scale"] = float(self.controlnet_conditioning_scale)
        if self.kind == VIDEO:
            arguments["num_frames"] = self.num_frames
        return arguments
