"""Why parts of a network will run without the compiled kernel, for the user to read."""

from __future__ import annotations

from torch import nn

from model.cpu.mixing_kernel import why_missing
from model.cpu.torch_state import active_mode


def fallback_reasons(network: nn.Module, precision: str = "fp32", compiled: bool = False) -> list[str]:
    """Return one line for each reason why the compiled kernel will not run, naming where; none for a network on a GPU.

    `precision` is "fp32", "bf16" or "fp16"; `compiled` says that torch.compile will be used.
    """
    if any(not weight.is_cpu for weight in network.parameters()):
        return []
    whole = why_missing() or ("--compile leaves the network to torch's compiler" if compiled else "")
    if not whole and precision != "fp32":
        whole = f"the compiled kernel computes in fp32, not in {precision}"
    if whole := whole or active_mode():
        return [f"the network falls back to plain torch operations: {whole}"]
    where: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        for part, config, modules in getattr(module, "kernel_parts", list)():
            if reason := part.why_not(config, modules):
                where.setdefault(reason, []).append(f"{name}, {part.name}" if name else part.name)
    lines = []
    for reason, places in where.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"falls back to plain torch operations: {places[0]}{more} ({reason})")
    return lines
