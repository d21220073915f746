"""`python -m ray_vlm` is the same program as `ray-vlm`."""

from ray_vlm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
