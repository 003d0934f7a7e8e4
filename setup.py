from pathlib import Path

from setuptools import setup


setup(
    name="diffusers-ssr",
    version="0.1.0",
    description="SSR-Encoder for diffusers: say which thing in a picture is meant, and draw new pictures of it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # the repository's root is the package: the same files are what the Hub serves as custom pipeline code
    package_dir={"diffusers_ssr": "."},
    packages=["diffusers_ssr"],
    install_requires=[
        "diffusers>=0.42",
        "huggingface_hub",
        "numpy",
        "pillow",
        "safetensors",
        "torch>=2.4",
        "tqdm",
        "transformers>=5.0",
    ],
    extras_require={
        "test": [
            "DeepCache",
            "accelerate",
            "compel",
            "controlnet-aux",
            "datasets",
            "imageio",
            "imageio-ffmpeg",
            "matplotlib",
            "mypy",
            "opencv-python-headless",
            "peft",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scipy",
            "setuptools",
            "tensorboard",
            "tokenizers",
            "tomesd",
            "torchsde",
        ],
        "train": ["accelerate", "datasets", "matplotlib", "tensorboard"],
        "pocket": ["DeepCache", "accelerate", "opencv-python-headless", "peft", "tokenizers", "tomesd"],
    },
)
