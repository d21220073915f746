"""Checks that a card is fit for measurements, and the speed of its products and copies."""

from benchmarks.gpu.bench import CAP_GIB, GIB, Bench
from benchmarks.gpu.supervise import Refused

OLDEST = (8, 0)  # Ampere; older ones emulate bfloat16
NEEDED_GIB = 14.0


def inspect_card(bench: Bench) -> None:
    """Refuse a card that is unfit for measurements, cap the memory, and write the card's ceilings."""
    import torch

    if bench.scale.rehearse:
        torch.set_num_threads(1)  # the planner has the other core
    else:
        check_card()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GIB * GIB / whole))
    if any(entry["block"] == "card" for entry in bench.figures.read()):
        return  # a process that goes on where another one ended
    described = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if not bench.scale.rehearse:
        described = f"{torch.cuda.get_device_name(0)}; {described}"
        free, whole = torch.cuda.mem_get_info()
        bench.add("memory of the card", whole / GIB, "GiB", note=described)
        bench.add("used by others", (whole - free - torch.cuda.memory_reserved()) / GIB, "GiB", 2.0)
    else:
        bench.add("rehearsal", 1, "", note=described)
    product, copy = measure_ceilings(bench)
    bench.add("product of bfloat16 matrices", product / 1e12, "TFLOP/s")
    bench.add("copy on the device, read and written", copy / 1e9, "GB/s")


def check_card() -> None:
    """Raise `Refused` if there is no card, or if it emulates bfloat16, is too full or is too small."""
    import torch

    if not torch.cuda.is_available():
        raise Refused("torch sees no NVIDIA card. Use a machine with one; `--rehearse` runs tiny shapes on a CPU")
    name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    if capability < OLDEST:
        raise Refused(
            f"{name} has compute capability {capability[0]}.{capability[1]}, which emulates bfloat16. Use a card of "
            "8.0 (Ampere) or newer"
        )
    free, _ = torch.cuda.mem_get_info()
    if free + torch.cuda.memory_reserved() < NEEDED_GIB * GIB:
        raise Refused(
            f"{NEEDED_GIB:g} GiB are needed and {free / GIB:.1f} GiB of the card are free. Use a larger card, or end "
            "what else runs on it"
        )


def measure_ceilings(bench: Bench) -> tuple[float, float]:
    """Measure operations per second of a large matrix product, and bytes per second of a copy."""
    import torch

    scale = bench.scale
    a, b = (torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * scale.matrix**3 / bench.seconds(lambda: a @ b, repeats=5, warm=3)
    one = torch.ones(scale.copied, dtype=torch.uint8, device=scale.device)
    other = torch.empty_like(one)
    copy = 2 * scale.copied / bench.seconds(lambda: other.copy_(one), repeats=5, warm=2)
    return product, copy
