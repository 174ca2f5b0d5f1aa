"""A small Stable Diffusion, written by hand for reading. `sd = sd_mini.load("toy")`."""
from .pipeline import StableDiffusion
from .weights import fingerprint, load, load_part, load_text_encoder, save_part, save_pipeline, write_json

__all__ = ["StableDiffusion", "fingerprint", "load", "load_part", "load_text_encoder", "save_part", "save_pipeline", "write_json"]
