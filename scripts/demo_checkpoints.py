"""Makes two checkpoints of XTTS's shape, several hundred megabytes each, and loads the merged one as XTTS does.

python scripts/demo_checkpoints.py make FOLDER
python scripts/demo_checkpoints.py load FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

try:
    from trainer.io import load_fsspec, save_model
except ImportError:  # the same layout and the same loading, without the trainer

    def save_model(config: Any, model: torch.nn.Module, output_path: Path, **state: Any) -> None:
        state["step"] = state.pop("current_step")
        state["optimizer"] = [optimizer.state_dict() for optimizer in state["optimizer"]]
        torch.save({"config": config, "model": model.state_dict(), **state}, output_path)

    def load_fsspec(path: Path, **options: Any) -> Any:
        return torch.load(path, weights_only=True, **options)


WIDTH, LAYERS, VOCABULARY = 768, 6, 6681
VOICES = {"news.pth": (1, 12_000, 4, 2.31), "audiobook.pth": (2, 15_500, 5, 2.17)}


class Voice(torch.nn.Module):
    """A small GPT with XTTS's tensor names, as its trainer wraps it."""

    def __init__(self) -> None:
        super().__init__()
        block = torch.nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, batch_first=True)
        gpt = torch.nn.Module()
        gpt.text_embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        gpt.gpt = torch.nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
        gpt.text_head = torch.nn.Linear(WIDTH, VOCABULARY)
        self.xtts = torch.nn.Module()
        self.xtts.gpt = gpt
        self.xtts.register_buffer("mel_stats", torch.ones(80))
        self.dvae = torch.nn.Linear(80, 512)

    def speak_differently(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.005 * torch.randn_like(parameter))

    def train_once(self) -> torch.optim.Optimizer:
        """One step of AdamW, so that there is optimizer state to leave out."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)
        sum((parameter * 1e-3).sum() for parameter in self.parameters()).backward()
        optimizer.step()
        return optimizer


def make(folder: Path) -> None:
    for name, (seed, step, epoch, loss) in VOICES.items():
        if (folder / name).exists():
            continue
        torch.manual_seed(0)
        model = Voice()  # both come from one model, as fine-tunes do
        torch.manual_seed(seed)
        model.speak_differently()
        save_model(
            {"model": "xtts", "audio": {"sample_rate": 22050}, "languages": ["en", "de"]},
            model,
            folder / name,
            current_step=step,
            epoch=epoch,
            optimizer=[model.train_once()],
            model_loss={"train_loss": loss, "eval_loss": loss + 0.2},
        )
        print(f"made {folder / name}, {(folder / name).stat().st_size / 1e6:.0f} MB")


def load(folder: Path) -> None:
    """What Xtts.load_checkpoint does with the file, and a look at the numbers."""
    merged = load_fsspec(folder / "voice.pth", map_location="cpu")
    weights = {
        name.replace("xtts.", "") if name.startswith("xtts.") else name: value
        for name, value in merged["model"].items()
        if name.split(".")[0] not in ("dvae", "torch_mel_spectrogram_style_encoder", "torch_mel_spectrogram_dvae")
    }
    Voice().xtts.load_state_dict(weights, strict=True)
    news, audiobook = (torch.load(folder / name, mmap=True)["model"] for name in VOICES)
    name = "xtts.gpt.text_head.weight"
    expected = (0.6 * news[name].double() + 0.4 * audiobook[name].double()).float()
    print("loaded by XTTS's rules, strictly; keys:", ", ".join(merged))
    print("step", merged["step"], "epoch", merged["epoch"], "model_loss", merged["model_loss"])
    print(f"{name} equals the float64 mean rounded once:", torch.equal(merged["model"][name], expected))


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](Path(sys.argv[2]))
