"""A small Stable Diffusion, written by hand for reading. `sd = sd_mini.load("toy")`."""
from .files import read_json, write_json
from .pipeline import StableDiffusion
from .unet import recompute_activations
from .weights import (fingerprint, load, load_part, load_text_encoder, save_part, save_pipeline,
                      save_single_file)

__all__ = ["StableDiffusion", "fingerprint", "load", "load_part", "load_text_encoder", "read_json",
           "recompute_activations", "save_part", "save_pipeline", "save_single_file", "write_json"]
