"""Train the pocket's AutoencoderKL on the linear codes: 64 x 64 pictures, 8 x 8 latents of 24 channels.

`--part decoder` learns to draw pictures from the codes, `--part encoder` to produce them. They do not depend on each other.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ..codes import CHANNELS, load_codes, load_latents
from ..scenes import load_scenes
from ..training import options, picture_array, picture_tensor, train
from ..world import sheet


LOG_VARIANCE = -10.0


def build() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 128),
        layers_per_block=1,
        latent_channels=CHANNELS,
        # one group: with two channels a group, colours would be normalised away
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
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    scenes = load_scenes(args.work_dir)
    codes = load_codes(args.work_dir)
    latents = load_latents(args.work_dir, scenes)
    folder = args.work_dir / "vae"
    vae = AutoencoderKL.from_pretrained(folder) if (folder / "config.json").exists() else build()
    vae = vae.to(memory_format=torch.channels_last).train()

    def decoder_loss(generator):
        index = torch.randint(len(scenes), (args.train_batch_size,), generator=generator)
        pixels = picture_tensor(scenes.pictures[index.numpy()]).contiguous(memory_format=torch.channels_last)
        codes = latents[index].float()
        # a UNet's latents are never exact
        codes = codes + 0.1 * torch.rand(len(codes), 1, 1, 1, generator=generator) * torch.randn(
            codes.shape, generator=generator
        )
        drawn = vae.decode(codes.contiguous(memory_format=torch.channels_last)).sample
        squared = F.mse_loss(drawn, pixels)
        contour = sum(F.l1_loss(a, b) for a, b in zip(edges(drawn), edges(pixels), strict=True))
        return F.l1_loss(drawn, pixels) + 2 * squared + 0.5 * contour, {"mse": squared.item()}

    def encoder_loss(generator):
        index = torch.randint(len(scenes), (args.train_batch_size,), generator=generator)
        pixels = picture_tensor(scenes.pictures[index.numpy()]).contiguous(memory_format=torch.channels_last)
        moments = vae.quant_conv(vae.encoder(pixels))
        mean, log_variance = moments.chunk(2, dim=1)
        loss = F.mse_loss(mean, latents[index].float())
        return loss + 1e-3 * F.mse_loss(log_variance, torch.full_like(mean, LOG_VARIANCE)), {"mse": loss.item()}

    def sample_fn(file):
        codes_ = codes.encode(scenes.pictures[:24])
        if args.part == "encoder":
            codes_ = vae.encode(picture_tensor(scenes.pictures[:24])).latent_dist.mode()
        drawn = picture_array(vae.decode(codes_).sample)
        rows = [p for i in range(0, 24, 12) for p in (*scenes.pictures[i : i + 12], *drawn[i : i + 12])]
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
