"""The methods that are compared on the pocket model: SSR-Encoder, an adapter in the style of IP-Adapter Plus, and
three ablations."""

import sys
from dataclasses import dataclass
from pathlib import Path

from diffusers_ssr import SSREncoder

from .rivals import MeanPatchEncoder, WholePictureEncoder


ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))

import train_ssr  # noqa: E402
from drawing import write_contact_sheet  # noqa: E402, F401


@dataclass(frozen=True)
class Method:
    """A method to encode the reference image: the encoder class, and the specific options of train_ssr.py."""

    label: str
    options: str = "--inner_dim 128 --num_attention_heads 4 --image_levels 1 2 3 4 5 6"
    encoder_class: type[SSREncoder] = SSREncoder
    unused: tuple[str, ...] = ()

    def build(self, *models) -> SSREncoder:
        """Creates an untrained encoder with `train_ssr.new_encoder`. Its unused parameters are frozen."""
        encoder = train_ssr.new_encoder(*models, encoder_class=self.encoder_class)
        for name in self.unused:
            encoder.get_submodule(name).requires_grad_(False)
        return encoder


METHODS = {
    "ssr": Method("SSR-Encoder"),
    "ip_adapter_plus": Method(
        "IP-Adapter-Plus style: the whole image, no query",
        # the second to last level, a head width of 64 and four blocks, as in IP-Adapter Plus
        "--inner_dim 64 --num_attention_heads 1 --image_levels 5 --consistency_form paper --consistency_weight 0",
        WholePictureEncoder,
    ),
    "mean_patch": Method("without alignment: the mean patch", encoder_class=MeanPatchEncoder, unused=("to_q", "to_k")),
    # wider, so that its number of parameters is the same as with six levels
    "one_level": Method("one level", "--inner_dim 448 --num_attention_heads 14 --image_levels 6"),
    "no_consistency": Method("without the consistency loss", f"{Method.options} --consistency_weight 0"),
}
# The options that are different when the training of an SSR-Encoder is continued on other data.
CONTINUED = "--learning_rate 7e-4 --lr_warmup_steps 50 --ema_decay 0.995"
# The encoder of each method. All were trained with the same data and steps, on the vision encoder of the checkpoint.
# The SSR-Encoder of the checkpoint was trained longer and on other pairs.
COMPARISON = Path(__file__).parent / "comparison"
COMMON = (
    "--reference_column reference --mask_column mask --mask_weight 3 --resolution 64 --min_image_size 64 --latents mode"
    " --learning_rate 1.5e-3 --lr_scheduler cosine --lr_warmup_steps 100 --adam_weight_decay 1e-3 --use_ema --ema_decay 0.998"
    " --prompt_dropout 0.5 --subject_dropout 0.1 --timestep_bias 0.5 --consistency_weight 0.002 --mask_query empty"
    " --checkpointing_steps 250 --checkpoints_total_limit 1 --resume_from_checkpoint latest --report_to none --allow_tf32"
)
