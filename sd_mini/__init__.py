"""A small Stable Diffusion, written by hand for reading. `sd = sd_mini.load("toy")`."""
from importlib import import_module

HOME = {  # public name -> the file that has it
    "StableDiffusion": "pipeline", "recompute_activations": "unet", "read_json": "files",
    "write_json": "files", "load": "weights", "load_part": "weights", "save_part": "weights",
    "load_text_encoder": "weights", "save_pipeline": "weights", "fingerprint": "weights",
    "save_single_file": "weights",
}
__all__ = list(HOME)


def __getattr__(name):
    """Import a file when it is first asked for: a command line answers before torch is loaded."""
    if name not in HOME:
        raise AttributeError(f"module 'sd_mini' has no attribute {name!r}")
    return getattr(import_module(f"sd_mini.{HOME[name]}"), name)
