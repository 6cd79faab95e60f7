"""How much faster the published loops of docs/faster_loops.md become by the change that the page shows.

    python bench/loops.py                      ResNet-18, 3x32x32, batch 32; about ten minutes on 2 cores
    python bench/loops.py --model small_cnn --rounds 1

A whole training step is timed: the attack as in the page's block before or after, then for both the same loss, its
backward pass, and a step of SGD in float32. Both run in this process by turns. Attacks that the page makes once,
before the loop, are made once. Results go to bench/results/loops_*.json, and a table is printed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import Seconds, interleave, machine, machine_line, text_table, write_json

from fastadv.models import Normalized, create_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faster_loops.md"
RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")

# The loss of each loop, for both sides. AWP's is the loss of its second pass alone, which both sides share.
_PLAIN = "loss = F.cross_entropy(model(x_adv), y)"
_NORMALISED = "loss = F.cross_entropy(normalised(x_adv), y)"
LOSSES = {
    "TRADES": "loss = losses.trades(model(x), model(x_adv), y, 6.0)",
    "MART": "loss = losses.mart(model(x), model(x_adv), y, 6.0)",
    "AWP": _NORMALISED,
    "robust_overfitting": _NORMALISED,
    "fast_adversarial": _NORMALISED,
    "LBGAT": "loss = losses.lbgat(model(x_adv), natural_model(x), y, model(x), 0.0)",
    "HAT": """
with torch.no_grad():
    helper_y = natural_model(x_adv).argmax(1)
helper_logits = model(x + 2 * (x_adv - x))
loss = losses.hat(model(x), model(x_adv), helper_logits, y, helper_y, 2.5, 0.5)
""",
    "MAIR": _PLAIN,
}


def blocks_of(text: str) -> list[str]:
    """The Python of a text."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def pairs_of(text: str) -> Iterator[tuple[str, str, str]]:
    """The name of each loop of the page, and its blocks before and after."""
    for section in text.split("\n## "):
        if "\nBefore" in section:
            before, after = blocks_of(section)[:2]
            yield section.splitlines()[0], before, after


def attack_alone(block: str) -> str:
    """The lines of a block up to the loss, without objects that are made once."""
    kept = []
    for line in block.splitlines():
        if line.startswith(("loss", "out_", "h, ", "delta", "inputs_adv")):
            break
        if not line.startswith("attack = "):
            kept.append(line)
    return "\n".join(kept)


def training_step(attack: str, loss: str, names: dict[str, Any]) -> Callable[[], None]:
    """A whole step of training, of which the attack is a part."""
    code = compile(f"{attack}\n{loss}\n", "docs/faster_loops.md", "exec")
    own = dict(names)
    weights = [*own["model"].parameters(), *own["natural_model"].parameters()]
    optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9)

    def step() -> None:
        exec(code, own)
        optimizer.zero_grad()
        own["loss"].backward()
        optimizer.step()

    return step


def made_once(after: str, names: dict[str, Any]) -> None:
    """Make the attack of a block after."""
    for line in after.splitlines():
        if line.startswith("attack = "):
            exec(line, names)


def setting(model: str, batch: int) -> dict[str, Any]:
    """The names of the page, with a larger network and batch."""
    names: dict[str, Any] = {}
    exec(blocks_of(PAGE.read_text())[0], names)
    torch.manual_seed(0)
    names["model"], names["natural_model"] = create_model(model, 10), create_model(model, 10)
    names["normalised"] = Normalized(names["model"], 0.5, 0.25)
    for network in ("model", "natural_model", "normalised"):
        names[network].train()
    names["x"], names["y"] = torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="By default in bench/results.")
    options = parser.parse_args()
    names, rows, found = setting(options.model, options.batch), [], {}
    for name, before, after in pairs_of(PAGE.read_text()):
        made_once(after, names)
        steps = {
            "before": training_step(attack_alone(before), LOSSES[name], names),
            "after": training_step(attack_alone(after), LOSSES[name], names),
        }
        for step in (*steps.values(), steps["after"]):
            step()
        times = interleave(steps, options.rounds, CPU)
        found[name] = {side: seconds.to_dict() for side, seconds in times.items()}
        ratio = times["before"].median / times["after"].median
        rows.append([name, *map(_shown, times.values()), f"{ratio:.1f}x"])
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    facts = machine(CPU)
    out = options.out or RESULTS / f"loops_cpu_{options.model}_b{options.batch}.json"
    write_json(
        out,
        {
            "machine": facts,
            "command": " ".join(sys.argv),
            "batch": options.batch,
            "model": options.model,
            "loops": found,
        },
    )
    print(machine_line(facts))
    print(text_table(["loop", "before, s (min to max)", "after, s (min to max)", "ratio"], rows))


def _shown(seconds: Seconds) -> str:
    return f"{seconds.median:.2f} ({seconds.smallest:.2f} to {seconds.largest:.2f})"


if __name__ == "__main__":
    main()
