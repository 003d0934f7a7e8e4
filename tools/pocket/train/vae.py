"""Train the AutoencoderKL of the pocket checkpoint on the linear codes: 64 x 64 images, 8 x 8 latents with 24
channels.

`--part decoder` learns to reconstruct images from the codes, `--part encoder` learns to produce the codes. The two
parts can be trained independently.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ..base import draw_noise
from ..codes import CHANNELS, load_codes
from ..scenes import SceneStream, draw_pictures
from ..training import Batches, options, picture_array, picture_tensor, train
from ..world import SPLITS, World, download_designs, sheet


LOG_VARIANCE = -10.0


def build() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 128),
        layers_per_block=1,
        latent_channels=CHANNELS,
        # one group, because the normalisation of groups of two channels would remove colours
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    return vae.to(memory_format=torch.channels_last)


def edges(picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return picture[..., 1:] - picture[..., :-1], picture[..., 1:, :] - picture[..., :-1, :]


def main():
    parser = options(__doc__, max_train_steps=6000, train_batch_size=8, learning_rate=1.5e-3, ema_decay=0.998)
    parser.add_argument("--part", choices=("decoder", "encoder"), required=True)
    parser.add_argument("--split", choices=SPLITS, default="wide", help="split whose held-out instances are not drawn")
    parser.add_argument(
        "--varied_share", type=float, default=0.5, help="share of scenes with random sizes, positions and mirroring"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    download_designs(args.work_dir / "designs")
    world = World(args.work_dir / "designs")
    scenes = SceneStream(world, args.split, varied_share=args.varied_share, others_share=0.2)
    codes = load_codes(args.work_dir).to(args.device)
    folder = args.work_dir / "vae"
    vae = AutoencoderKL.from_pretrained(folder) if (folder / "config.json").exists() else build()
    vae = vae.to(args.device, memory_format=torch.channels_last).train()
    batches = Batches(
        lambda number: draw_pictures(scenes, args.train_batch_size, (args.seed, number)),
        args,
        lambda pictures: (picture_tensor(pictures).to(args.device), codes.encode(pictures)),
    )

    def pixels_and_codes(generator):
        pixels, latents = batches(generator)
        return pixels.contiguous(memory_format=torch.channels_last), latents

    def decoder_loss(generator):
        pixels, latents = pixels_and_codes(generator)
        # noise, because the latents of a UNet are not exact
        amount = torch.rand(len(latents), 1, 1, 1, generator=generator).to(args.device)
        latents = latents + 0.1 * amount * draw_noise(latents, generator)
        drawn = vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample
        squared = F.mse_loss(drawn, pixels)
        contour = sum(F.l1_loss(a, b) for a, b in zip(edges(drawn), edges(pixels), strict=True))
        return F.l1_loss(drawn, pixels) + 2 * squared + 0.5 * contour, {"mse": squared.detach()}

    def encoder_loss(generator):
        pixels, latents = pixels_and_codes(generator)
        moments = vae.quant_conv(vae.encoder(pixels))
        mean, log_variance = moments.chunk(2, dim=1)
        loss = F.mse_loss(mean, latents)
        return loss + 1e-3 * F.mse_loss(log_variance, torch.full_like(mean, LOG_VARIANCE)), {"mse": loss.detach()}

    shown = draw_pictures(scenes, 24, (1, 0))

    def sample_fn(file):
        latents = codes.encode(shown)
        if args.part == "encoder":
            latents = vae.encode(picture_tensor(shown).to(args.device)).latent_dist.mode()
        drawn = picture_array(vae.decode(latents).sample)
        rows = [p for i in range(0, 24, 12) for p in (*shown[i : i + 12], *drawn[i : i + 12])]
        sheet(rows, 12).save(file)

    if args.part == "decoder":
        train("vae_decoder", args, {"d": vae.decoder, "q": vae.post_quant_conv}, decoder_loss, sample_fn)
    else:
        train("vae_encoder", args, {"e": vae.encoder, "q": vae.quant_conv}, encoder_loss, sample_fn)
    stored = AutoencoderKL.from_pretrained(folder) if (folder / "config.json").exists() else vae
    for name in ("decoder", "post_quant_conv") if args.part == "decoder" else ("encoder", "quant_conv"):
        getattr(stored, name).load_state_dict(getattr(vae, name).state_dict())
    stored.save_pretrained(folder)


if __name__ == "__main__":
    main()
