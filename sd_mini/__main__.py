"""Draw one picture: python -m sd_mini "a photo of a church" --seed 3 --out church.png"""
import argparse


def main():
    """Write the picture and print its path. On an error, print why and exit with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m sd_mini",
        description=__doc__.split(":")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompt")
    parser.add_argument(
        "--model",
        default="toy",
        help="toy, toy-dusk, a diffusers folder, a single .safetensors file or a hub id",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", default="picture.png")
    args = parser.parse_args()

    # Imported here because --help needs neither matplotlib nor torch, which `load` imports.
    import matplotlib.image

    from . import load

    try:
        picture = load(args.model, args.device).sample(
            [args.prompt], args.seed, args.steps, args.guidance
        )[0]
        matplotlib.image.imsave(args.out, picture.permute(1, 2, 0).cpu().numpy())
    # torch raises the last two for a device that it does not have.
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.exit(2, f"error: {error}\n")
    print(args.out)


if __name__ == "__main__":
    main()
